"""bench.py: what its table says, in moments; no assertion about time."""
import json

from evaluation import bench
import torch

from evaluation import timing


def test_rows_and_their_table(tmp_path, monkeypatch, capsys):
    def absent(model):
        raise ImportError("No module: diffusers")
    monkeypatch.setattr(bench, "Theirs", absent)
    arguments = "--device cpu --rows a e --repeats 2 --people 2 --out".split()
    monkeypatch.setattr("sys.argv", ["bench.py", *arguments, str(tmp_path)])
    bench.main(bench.arguments())
    found = json.loads((tmp_path / "bench_nano_cpu.json").read_text())
    assert [row["key"] for row in found["rows"]] == ["a", "e"]
    forward = found["rows"][0]
    assert len(forward["seconds"]) == 2 and forward["against"] == [] and min(forward["seconds"]) > 0
    # convolutions, matrices and attention of one guidance batch
    assert 1e9 < forward["FLOP"] < 1.2e9 and 0 < forward["possible"] < 1.5
    shown = capsys.readouterr().out
    assert "no comparison with diffusers and peft: No module: diffusers" in shown
    assert shown.count("| a | UNet, a guidance batch |") == 1


def test_medians_ranges_and_ratios():
    row = {"key": "a", "what": "it", "seconds": [3., 1., 2.], "against": [4., 4.], "peak GB": .5,
           "possible": .25}
    assert timing.table([row]).splitlines()[2] == "| a | it | 2 (1–3) | 4 (4–4) | 2.00 | 25% | 0.50 |"
    row = {"key": "a", "what": "it", "seconds": [3.], "against": [], "peak GB": None}
    assert timing.table([row]).splitlines()[2] == "| a | it | 3 (3–3) | – | – | – | – |"


def test_ticks_are_of_the_last_steps():
    def work(steps, callback):
        for step in range(steps):
            callback(step, 0.)
    assert len(timing.ticks(work, 3)) == 2 and len(timing.ticks(work, 12)) == 6


def test_a_full_size_model_is_one(monkeypatch):
    monkeypatch.setattr(torch.nn.init, "normal_", lambda t, *_, **__: t)
    model = bench.full_size("meta", torch.float16)
    assert sum(p.numel() for p in model.unet.parameters()) == 859_520_964 and model.dtype == torch.float16


def test_another_model_is_refused(refusal):
    assert "--model: invalid choice" in refusal(bench, "--model", "somewhere")
    assert "--rows: expected at least one argument" in refusal(bench, "--rows")

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import checkpoints
from checkpoints import write
from console import UserError
from trainer import Ring, Trainer


def train(out, steps, total=120, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    trainer = Trainer({"model": model}, out, total, lr=.3, warmup=5, **options)
    for step in trainer:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        trainer.update((model(x) - x.sum(1, keepdim=True)).square().mean())
        if trainer.step == steps:
            break
    trainer.save()
    return trainer, model


@pytest.mark.parametrize("muon", [False, True])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, muon):
    _, straight = train(tmp_path / "straight", 120, muon=muon)
    train(tmp_path / "halves", 51, muon=muon)
    trainer, resumed = train(tmp_path / "halves", 120, muon=muon)
    assert trainer.step == 120 and torch.allclose(straight.weight, resumed.weight, atol=1e-6)
    assert torch.allclose(resumed.weight, torch.ones(1, 4), atol=.05)
    trainer.average()
    assert not torch.equal(resumed.weight, straight.weight)


def test_the_state_of_another_run_or_a_damaged_one_is_refused(tmp_path):
    train(tmp_path, 3, of="one")
    with pytest.raises(UserError, match=r"of another run \(one\)"):
        train(tmp_path, 3, of="two")
    file = tmp_path / "state.safetensors"
    tensors = load_file(file)
    for spoilt in ({"exp_avg.model.weight": torch.zeros(3)}, {"ema.model.weight": torch.zeros(3)}, {"ema.model.weight": None}):
        kept = {k: t for k, t in (tensors | spoilt).items() if t is not None}
        write(kept, file, {"step": "3", "of": "one"})
        with pytest.raises(UserError, match="remove it"):
            train(tmp_path, 5, of="one")


def test_muon_trains_the_kernels_where_they_are(tmp_path):
    model = nn.Conv2d(2, 3, 3)
    before = model.weight.detach().clone()
    trainer = Trainer({"m": model}, tmp_path, 10, lr=.1, warmup=1, muon=True)
    assert list(trainer.matrices) == ["m.weight"]
    trainer.update(model(torch.ones(1, 2, 3, 3)).sum())
    moved = (model.weight.detach() - before).flatten(1)
    assert torch.linalg.svdvals(moved)[0] / moved.norm() > .99  # the gradient's one direction, rank 1
    assert .6 < moved.norm() / (.1 * .2 * 18 ** .5) < 1.3  # and about as long as AdamW's steps, whatever the gradient's length


def test_frozen_parameters_stay_out(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert list(Trainer({"m": model}, tmp_path, 1, lr=.1).parameters) == ["m.1.weight", "m.1.bias"]


def test_log_lines_and_schedule(tmp_path):
    train(tmp_path, 100, total=100)
    first, last = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert (first["step"], last["step"]) == (50, 100) and last["loss"] < first["loss"]
    assert abs(first["lr"] - .15) < .01 and last["lr"] < .001


def test_what_cannot_be_written_whole_is_not_written(tmp_path, monkeypatch):
    write({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    before = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "y").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "y").stat().st_mode  # not for the owner alone
    (tmp_path / "y").unlink()

    def disk_full(tensors, path, metadata):
        path.write_text("half")
        raise OSError("no space left")
    monkeypatch.setattr(checkpoints, "save_file", disk_full)
    with pytest.raises(OSError, match="no space"):
        write({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"] and (tmp_path / "x.safetensors").read_bytes() == before


def test_a_run_that_cannot_go_on_says_so(tmp_path):
    train(tmp_path, 5)
    for other in (nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 1))):
        with pytest.raises(UserError, match="other modules"):
            Trainer({"model": other}, tmp_path, 10, lr=.1)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        train(tmp_path, 5)
    model = nn.Linear(4, 1)
    trainer = Trainer({"model": model}, tmp_path / "new", 10, lr=.1)
    before = model.weight.clone()
    with pytest.raises(UserError, match="loss is nan at step 0"):
        trainer.update(model(torch.full((1, 4), torch.nan)).sum())
    assert torch.equal(model.weight, before)


def test_ring_keeps_the_last_rows_of_all_tensors_together():
    ring = Ring(5)
    for i in range(4):
        ring.add(torch.tensor([2 * i, 2 * i + 1]), torch.tensor([[2. * i], [2. * i + 1]]))
    a, b = ring[torch.arange(len(ring))]
    assert len(ring) == 5 and sorted(a.tolist()) == [3, 4, 5, 6, 7] and torch.equal(a.float(), b[:, 0])

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kill import kill
from safetensors.torch import load_file, save_file
from tiny import adam_by_hand, generator, shared_model
from torch import nn

from program import distributed
from files import disk
from files.checkpoints import write
from program.console import Stopped, UserError
from training.parts import differences
from training.trainer import Pool, Trainer, global_seed, say_start


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
    of = {"unet": "12ab", "people": 3}
    train(tmp_path, 3, depends_on=of)
    train(tmp_path, 3, depends_on=of)  # the same goes on
    for other, why in (({"unet": "34cd", "people": 3}, "unet 12ab there, 34cd here"),
                       ({"unet": "12ab"}, "people 3 there, none here"),
                       (of | {"faces": "x"}, "faces not known there, x here")):
        with pytest.raises(UserError, match=rf"of another run \({why}\); remove it"):
            train(tmp_path, 3, depends_on=other)
    file = tmp_path / "state.safetensors"
    tensors, note = load_file(file), {"step": "3", "of": json.dumps({"unet": "12ab", "people": "3"})}
    write(tensors, file, note)
    train(tmp_path, 3, depends_on=of)
    write(tensors, file, note | {"step": "121"})
    with pytest.raises(UserError, match="at step 121, past --steps; give more") as info:
        train(tmp_path, 3, depends_on=of)
    assert "remove" not in str(info.value)  # it is whole, and hours of work
    lacking = {k: t for k, t in tensors.items() if k != "exp_avg_sq.model.bias"}
    for spoilt in (tensors | {"exp_avg.model.weight": torch.zeros(3)},
                   tensors | {"ema.model.weight": torch.zeros(3)},
                   lacking, tensors | {"more": torch.zeros(3)}):
        write(spoilt, file, note)
        with pytest.raises(UserError, match=r"of another run \(with other modules\)"):
            train(tmp_path, 5, depends_on=of)
    for spoilt, why in ((tensors["exp_avg.model.weight"] * torch.nan, "NaN"),
                        (tensors["exp_avg.model.weight"].half(), "with other modules")):
        write(tensors | {"exp_avg.model.weight": spoilt}, file, note)
        with pytest.raises(UserError, match=why):
            train(tmp_path, 5, depends_on=of)
    steps = [{"step": step} for step in ("x", "-1", "9" * 5000)]
    deep = [{"step": "3", "of": '{"a":' * 100_000}]
    for wrong in (*steps, *deep, {}, {"step": "3", "of": "{"}):
        write(tensors, file, wrong)
        with pytest.raises(UserError, match="damaged"):
            train(tmp_path, 5, depends_on=of)
    write(tensors, file, {"step": "3"})
    with pytest.raises(UserError, match="remove it"):
        train(tmp_path, 5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16, torch.complex64])
def test_a_state_of_another_dtype_is_refused(tmp_path, dtype):
    """Also one in which nothing can be computed."""
    train(tmp_path, 3)
    file = tmp_path / "state.safetensors"
    note = {"step": "3", "of": "{}"}
    save_file(load_file(file) | {"ema.model.weight": torch.ones(1, 4).to(dtype)}, file, note)
    with pytest.raises(UserError, match="state.safetensors: (damaged|of another run)"):
        train(tmp_path, 5)


def test_what_differs_in_words():
    assert differences({"a": "1", "b": "2"}, {"a": "1", "b": "2"}) == []
    assert differences({"a": "1"}, {"a": "2", "c": "3"}) == ["a 1 there, 2 here", "c not known there, 3 here"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves(tmp_path, signum):
    model, trainer = some_trainer(tmp_path)
    before = signal.getsignal(signum)
    with pytest.raises(Stopped, match="stopped at step 3 of 100; the same command resumes it") as stop:
        for step in trainer:
            if step == 2:
                os.kill(os.getpid(), signum)
            trainer.update(model.weight.square().sum())
    assert stop.value.signum == signum and signal.getsignal(signum) == before
    _, again = some_trainer(tmp_path)
    assert again.step == 3 and all(torch.equal(t, trainer.tensors()[k]) for k, t in again.tensors().items())


def test_killed_again_and_again_it_ends_the_same():
    differ, codes, left = kill(2, steps=80)
    assert differ == [] and left == set() and set(codes) <= {-signal.SIGKILL, 143, 0}


def test_leftovers_of_the_dead_are_swept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in dead.pid, os.getppid(), 10 ** 30:
        for i in range(2):
            (tmp_path / f".hdb-{pid}-{i}.tmp").mkdir()
            (tmp_path / f".hdb-{pid}-{i}.tmp/half").write_text("half")
    (tmp_path / ".hdb-mine-0.tmp").write_text("not ours")
    write({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    left = {path.name for path in tmp_path.iterdir()}
    alive = {f".hdb-{os.getppid()}-{i}.tmp" for i in range(2)}
    assert left == {"x.safetensors", ".hdb-mine-0.tmp"} | alive


def some_trainer(folder):
    with global_seed(0):
        model = nn.Linear(2, 2)
    return model, Trainer({"m": model}, folder, 100, lr=.1)


def test_updates_are_adamw_with_warm_up_cosine_clipping_and_an_average(tmp_path):
    model = nn.Linear(3, 1)
    weight, x = model.weight.detach().clone(), torch.tensor([[1., 2., -1.]])
    bias, total, warmup = model.bias.detach().clone(), 20, 4
    trainer = Trainer({"m": model}, tmp_path, total, lr=.1, warmup=warmup, ema=.3, weight_decay=.3)
    gradients, rates, average = {"w": [], "b": []}, [], weight
    for step in range(6):
        y = x @ model.weight.detach().T + model.bias.detach()
        size = (5, .02)[step % 2]  # too steep and not
        raw = {"w": 2 * y * x * size, "b": 2 * y[0] * size}  # of the loss size·y²
        norm = (raw["w"].square().sum() + raw["b"].square().sum()).sqrt()
        for key in raw:
            gradients[key].append(raw[key] * min(1, 1 / (norm + 1e-6)))
        rates.append(.1 * min(1, (step + 1) / warmup) * (.5 + .5 * math.cos(math.pi * step / total)))
        trainer.update((size * model(x) ** 2).sum())
        assert torch.allclose(model.weight, adam_by_hand(weight, gradients["w"], rates, decay=.3), atol=1e-5)
        assert torch.allclose(model.bias, adam_by_hand(bias, gradients["b"], rates, decay=.3), atol=1e-5)
        average = average.lerp(model.weight.detach(), 1 - min(.3, (1 + step) / (10 + step)))
        assert torch.allclose(trainer.ema["m.weight"], average, atol=1e-6)
        assert model.weight.grad is None and trainer.step == step + 1
    trainer.average()
    assert torch.equal(model.weight.detach(), trainer.ema["m.weight"])


def test_the_usual_settings_of_a_run(tmp_path):
    trainer = Trainer({"m": nn.Linear(2, 2)}, tmp_path / "in/a/folder", 10, lr=.1)
    (adam,) = trainer.optimizers
    (group,) = adam.param_groups
    assert (trainer.warmup, trainer.decay, trainer.deadline, trainer.depends_on) == (100, .999, math.inf, {})
    assert (group["betas"], group["weight_decay"], trainer.matrices) == ((.9, .99), .01, {})


def test_the_optimisers_remember_where_the_modules_are(tmp_path):
    model = nn.Linear(2, 2)
    with torch.device("meta"):
        trainer = Trainer({"m": model}, tmp_path, 10, lr=.1, muon=True)
    states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    assert len(states) == 2 and all(t.device == model.weight.device for s in states for t in s.values())


@pytest.mark.filterwarnings("error")
def test_the_numbers_shown_are_running_means(tmp_path):
    model = nn.Linear(1, 1)
    trainer = Trainer({"m": model}, tmp_path, 10, lr=0.)
    for value in 1., 2.:
        trainer.update(model.weight.sum() * 0 + value, other=value * 10)
    assert trainer.mean["loss"] == pytest.approx(1.02) and trainer.mean["other"] == pytest.approx(10.2)


def test_the_numbers_shown_are_those_of_all_processes(tmp_path, monkeypatch):
    model, mine = nn.Linear(1, 1), torch.tensor(3.)
    monkeypatch.setattr(distributed, "average", lambda tensors: torch._foreach_mul_(tensors, .5))
    trainer = Trainer({"m": model}, tmp_path, 10, lr=0.)
    trainer.update(model.weight.sum() * 0 + 2, other=mine, third=8)
    assert trainer.mean == {"loss": 1., "other": 1.5, "third": 4.} and mine == 3


def test_a_deadline_ends_the_loop_and_a_later_call_goes_on(tmp_path):
    model = nn.Linear(1, 1)
    assert list(Trainer({"m": model}, tmp_path, 3, lr=.1, deadline=0)) == []
    assert (tmp_path / "state.safetensors").exists()
    trainer = Trainer({"m": model}, tmp_path, 3, lr=.1)
    seen = []
    for step in trainer:
        seen.append((step, trainer.done))
        trainer.update(model.weight.square().sum())
    assert seen == [(0, False), (1, False), (2, False)] and trainer.done
    assert list(Trainer({"m": model}, tmp_path, 3, lr=.1)) == []


def test_the_clock_decides_when_to_save_and_when_to_stop(tmp_path, monkeypatch):
    model, clock, saved = nn.Linear(1, 1), [1000.], []
    monkeypatch.setattr("time.time", lambda: clock[0])
    monkeypatch.setattr(Trainer, "save", lambda trainer: saved.append(trainer.step))
    trainer = Trainer({"m": model}, tmp_path, 100, lr=.1, deadline=1300.5)
    passed = 60, 60, 1, 60, 61, 58.5  # up to 120 seconds without saving are long enough, 121 are too long
    for step in trainer:
        trainer.update(model.weight.square().sum())
        clock[0] += passed[step]
    assert saved == [3, 5, 6]
    trainer.log(third=1 / 3)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 6, "time": 1300, "third": 0.333333}\n'


def test_the_bar_says_how_far_a_run_is(tmp_path, capsys, monkeypatch):
    train(tmp_path / "run", 3, total=5)
    *_, last = capsys.readouterr().err.split("\r")
    assert last.startswith("run:  40%|") and "| 2/5 [" in last  # a step counts when the next one is asked for
    assert "loss=" in last
    train(tmp_path / "run", 5, total=5)
    _, first, *_ = capsys.readouterr().err.split("\r")
    assert first.startswith("run:  60%|") and "| 3/5 [" in first
    monkeypatch.setattr(distributed, "is_main", lambda: False)  # of several processes one has a bar
    train(tmp_path / "other", 1)
    assert capsys.readouterr().err == ""


def test_seeded_modules_leave_the_global_generator_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with global_seed(5):
        one = nn.Linear(3, 3)
    assert torch.equal(torch.get_rng_state(), state)
    with global_seed(5):
        assert torch.equal(nn.Linear(3, 3).weight, one.weight)
    with global_seed(6):
        assert not torch.equal(nn.Linear(3, 3).weight, one.weight)


def test_muon_trains_the_kernels_where_they_are(tmp_path):
    model = nn.Conv2d(32, 3, 3)
    before = model.weight.detach().clone()
    trainer = Trainer({"m": model}, tmp_path, 10, lr=.1, warmup=1, muon=True)
    assert list(trainer.matrices) == ["m.weight"]
    trainer.update(model(torch.ones(1, 32, 3, 3)).sum())
    moved = (model.weight.detach() - before).flatten(1)
    assert torch.linalg.svdvals(moved)[0] / moved.norm() > .99  # the gradient's one direction, rank 1
    # and about as long as AdamW's steps, whatever the gradient's length
    assert .6 < moved.norm() / (.1 * .2 * 288 ** .5) < 1.3


def test_muon_s_weights_decay(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(2, 2, 1), nn.Conv1d(2, 2, 1), nn.LayerNorm(2))
    before = [model[i].weight.detach().clone() for i in range(2)]
    trainer = Trainer({"m": model}, tmp_path, 10, lr=.1, warmup=1, weight_decay=.3, muon=True)
    assert list(trainer.matrices) == ["m.0.weight", "m.1.weight"]
    trainer.update(sum(p.sum() for p in model.parameters()) * 0)
    for i in range(2):
        assert torch.allclose(model[i].weight, before[i] * (1 - .1 * .3), atol=1e-7)


def test_frozen_parameters_stay_out(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert list(Trainer({"m": model}, tmp_path, 1, lr=.1).parameters) == ["m.1.weight", "m.1.bias"]


def test_the_average_is_lent_to_the_modules(tmp_path):
    model = nn.Linear(2, 2)
    trainer = Trainer({"m": model}, tmp_path, 10, lr=.1)
    for _ in range(3):
        trainer.update(model(torch.ones(1, 2)).square().sum())
    now = model.weight.detach().clone()
    with trainer.averaged():
        assert torch.equal(model.weight, trainer.ema["m.weight"]) and not torch.equal(model.weight, now)
    assert torch.equal(model.weight, now)


def test_what_a_training_says_and_leaves(tmp_path, capsys):
    """The average: in the run's folder, and where it was asked for once it is done."""
    model, trainer = some_trainer(tmp_path)
    say_start(trainer, shared_model(), SimpleNamespace(told="2 photos"), 4)
    first, memory = capsys.readouterr().out.splitlines()
    assert first == "tiny on cpu, float32; 2 photos; 100 steps of 4" and "memory" in memory
    written = []
    stopped = 3, tmp_path / "its", "stopped; the same command resumes it"
    for step, file, said in stopped, (100, "good", "finished"):
        trainer.update(model.weight.square().sum())
        trainer.step = step
        trainer.finish("good", "its", written.append)
        assert capsys.readouterr().out == f"{said}; {file}\n" and written[-1] == Path(file)
        assert torch.equal(model.weight, trainer.ema["m.weight"])
    trainer.finish(None, "its", written.append)
    assert written[-1] == tmp_path / "its"


def test_log_lines_and_schedule(tmp_path):
    train(tmp_path, 100, total=100)
    first, last = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert (first["step"], last["step"]) == (50, 100) and last["loss"] < first["loss"]
    assert abs(first["lr"] - .15) < .01 and last["lr"] < .001


def test_what_cannot_be_written_whole_is_not_written(tmp_path, monkeypatch):
    write({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    before = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "y").touch()
    mode, usual = ((tmp_path / name).stat().st_mode for name in ("x.safetensors", "y"))
    assert mode == usual  # not for the owner alone
    (tmp_path / "y").unlink()

    def disk_full(path):
        assert path.stat().st_size == 80
        raise OSError("no space left")
    monkeypatch.setattr(disk, "sync", disk_full)
    with pytest.raises(OSError, match="no space"):
        write({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert (tmp_path / "x.safetensors").read_bytes() == before


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


def test_a_pool_follows_from_the_step_alone():
    made = []

    def make(n):
        made.append(n)
        return torch.tensor(n), torch.tensor([2. * n])
    pool = Pool(make, first=3, fresh=2, size=4)
    assert set(pool.draw(0, 50, generator(0)).tolist()) == {0, 1, 2}
    assert set(pool.draw(1, 50, generator(0)).tolist()) == {1, 2, 3, 4}  # of five the last four
    a, b = pool[torch.tensor([4, 1, 4])]
    assert a.tolist() == [4, 1, 4] and b.tolist() == [[8.], [2.], [8.]] and made == [4, 1]
    pool[torch.tensor([5, 6, 4, 1])]
    assert made == [4, 1, 5, 6]  # each was made once
    pool[torch.tensor([7, 8, 4, 1])]
    assert made == [4, 1, 5, 6, 7, 8] and pool.row.cache_info().currsize == 4  # the longest unused went
    assert torch.equal(pool.draw(9, 5, generator(1)), Pool(make, 3, 2, 4).draw(9, 5, generator(1)))

import json
import math
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from kill import kill
from safetensors.torch import load_file
from tiny import generator
from torch import nn

from files import checkpoints
from files.checkpoints import write
from files.console import Stopped, UserError
from files.parts import differences
from trainer import Pool, Trainer, backward, fit, seeded


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
    train(tmp_path, 3, of=of)
    train(tmp_path, 3, of=of)  # the same goes on
    for other, why in (({"unet": "34cd", "people": 3}, "unet 12ab there, 34cd here"),
                       ({"unet": "12ab"}, "people 3 there, none here"),
                       (of | {"faces": "x"}, "faces not known there, x here")):
        with pytest.raises(UserError, match=rf"of another run \({why}\); remove it"):
            train(tmp_path, 3, of=other)
    file = tmp_path / "state.safetensors"
    tensors, note = load_file(file), {"step": "3", "of": json.dumps({"unet": "12ab", "people": "3"})}
    write(tensors, file, note)
    train(tmp_path, 3, of=of)
    lacking = {k: t for k, t in tensors.items() if k != "exp_avg_sq.model.bias"}
    for spoilt in (tensors | {"exp_avg.model.weight": torch.zeros(3)},
                   tensors | {"ema.model.weight": torch.zeros(3)},
                   lacking, tensors | {"more": torch.zeros(3)}):
        write(spoilt, file, note)
        with pytest.raises(UserError, match=r"of another run \(with other modules\)"):
            train(tmp_path, 5, of=of)
    for spoilt, why in ((tensors["exp_avg.model.weight"] * torch.nan, "NaN"),
                        (tensors["exp_avg.model.weight"].half(), "with other modules")):
        write(tensors | {"exp_avg.model.weight": spoilt}, file, note)
        with pytest.raises(UserError, match=why):
            train(tmp_path, 5, of=of)
    steps = [{"step": step} for step in ("x", "-1", "121", "9" * 5000)]
    deep = [{"step": "3", "of": '{"a":' * 100_000}]
    for wrong in (*steps, *deep, {}, {"step": "3", "of": "{"}):
        write(tensors, file, wrong)
        with pytest.raises(UserError, match="damaged"):
            train(tmp_path, 5, of=of)
    write(tensors, file, {"step": "3", "of": "start None, basis 5"})  # as states said it before
    with pytest.raises(UserError, match="run start None, basis 5 there, none here"):
        train(tmp_path, 5)
    write(tensors, file, {"step": "3"})
    with pytest.raises(UserError, match="remove it"):
        train(tmp_path, 5)


def test_what_differs_in_words():
    assert differences({"a": "1", "b": "2"}, {"a": "1", "b": "2"}) == []
    assert differences({"a": "1"}, {"a": "2", "c": "3"}) == ["a 1 there, 2 here", "c not known there, 3 here"]


# ------------------------------------------------------------------------------------------------------------
# One step by numbers

def test_gradients_are_those_of_the_loss_whatever_the_scale_in_between():
    p, q = torch.tensor([3., -2.], requires_grad=True), torch.ones(2, requires_grad=True)
    seen = []
    p.register_hook(lambda g: seen.append(g.clone()))
    backward((p ** 2).sum(), [p, q])
    assert p.grad.tolist() == [6, -4] and q.grad is None and seen[0].tolist() == [6 * 1024, -4 * 1024]


def test_small_gradients_survive_float16():
    p = torch.ones(1, requires_grad=True)
    backward((p.half() * 2 ** -15).float().mean() * 2 ** -10, [p])
    assert p.grad.item() == 2 ** -25  # less than float16's smallest number


def adam_by_hand(p, gradients, lr, betas=(.9, .99), decay=0.):
    """Loshchilov & Hutter, arXiv 1711.05101, algorithm 2."""
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, (g, rate) in enumerate(zip(gradients, lr), 1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g ** 2
        ahead = m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + 1e-8)
        p = p - rate * decay * p - rate * ahead
    return p


def test_a_loss_that_rises_for_good_is_taken_back():
    """Down a slope that turns into a cliff: of the states kept the last one before the cliff stays."""
    x, y = (torch.zeros(1, requires_grad=True) for _ in range(2))

    def loss(x):
        return (2 - x + 100 * (x.detach() > 1.05)).sum()
    with pytest.warns(UserWarning, match="rose from 2 to 100, .* a rate of 0.1 is too high; a tenth"):
        fit(lambda: loss(x), [x], 16, .1, generator=generator(0))
    assert x.item() == pytest.approx(.9, abs=1e-4)  # of 0, .3, .6, .9, 1.2 and 1.5
    fit(lambda: loss(y), [y], 16, .1)  # not asked to look
    assert y.item() == pytest.approx(1.6, abs=1e-4)
    with pytest.warns(UserWarning, match="rose from 100 to 200: a rate"):  # nothing is kept
        fit(lambda: loss(y) + 100 * (y.item() > 1.85), [y], 3, .1, generator=generator(0), states=0)
    assert y.item() == pytest.approx(1.9, abs=1e-4)


@pytest.mark.parametrize("steps, worse", [(1, 2.), (4, 100.), (4, torch.nan), (30, torch.inf)])
def test_what_is_destroyed_by_the_first_step_is_put_back_to_the_start(steps, worse):
    x = torch.zeros(1, requires_grad=True)
    with pytest.warns(UserWarning, match="the loss rose from 1 to"):
        fit(lambda: (1 - x + (worse if x.item() else 0)).sum(), [x], steps, .5, generator=generator(0))
    assert x.item() == 0


@pytest.mark.parametrize("times, risen", [(1.4, False), (1.6, True)])
def test_how_much_of_a_rise_is_one(times, risen, recwarn):
    x = torch.zeros(1, requires_grad=True)

    def loss():
        return ((times if x.item() else 1) - 1e-9 * x).sum()
    fit(loss, [x], 3, .1, generator=generator(0))
    assert bool(recwarn.list) == risen and bool(x.item()) == (not risen)
    fit(lambda: x.sum(), [x], 0, .1, generator=generator(0))  # no step, nothing to look back at


@pytest.mark.parametrize("passed", [True, False], ids=["drawn before", "drawn in the loss"])
def test_the_loss_is_compared_on_the_noise_of_the_first_step(passed, recwarn):
    """Noises of very different sizes: whatever stands beside them has not risen. What is drawn afterwards is
    what would have been drawn without a look back."""
    g, other, x = generator(3), generator(3), torch.zeros(1, requires_grad=True)

    def draw():
        return [torch.rand(1, generator=g) ** 9]
    if passed:
        fit(lambda noise: (noise + 1e-9 * x).sum(), [x], 20, .01, generator=g, draw=draw)
    else:
        fit(lambda: (draw()[0] + 1e-9 * x).sum(), [x], 20, .01, generator=g)
    assert not recwarn.list
    torch.rand(20, generator=other)
    assert torch.equal(torch.rand(3, generator=g), torch.rand(3, generator=other))


def test_looking_back_is_no_step():
    """around() is entered without gradients then, so that what it does in a step can be left out."""
    entered, x = [], torch.zeros(1, requires_grad=True)

    @contextmanager
    def around():
        entered.append(torch.is_grad_enabled())
        yield
    fit(lambda: (x ** 2).sum(), [x], 3, .1, around, generator=generator(0))
    assert entered == [True] * 3 + [False]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves(tmp_path, signum):
    model, trainer = some_trainer(tmp_path)
    before = signal.getsignal(signum)
    with pytest.raises(Stopped, match="stopped at step 3 of 100; the same command goes on") as stop:
        for step in trainer:
            if step == 2:
                os.kill(os.getpid(), signum)
            trainer.update(model.weight.square().sum())
    assert stop.value.signum == signum and signal.getsignal(signum) == before
    _, again = some_trainer(tmp_path)
    assert again.step == 3 and all(torch.equal(t, trainer.tensors()[k]) for k, t in again.tensors().items())


def test_killed_again_and_again_it_ends_the_same():
    differ, codes, left = kill(2)
    assert differ == [] and left == set() and set(codes) <= {-signal.SIGKILL, 143, 0}


def test_leftovers_of_the_dead_are_swept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in dead.pid, os.getppid(), 10 ** 30:
        (tmp_path / f"x.safetensors.{pid}.tmp").mkdir()
        (tmp_path / f"x.safetensors.{pid}.tmp/half").write_text("half")
    (tmp_path / "x.safetensors.mine.tmp").write_text("not ours")
    write({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"x.safetensors", f"x.safetensors.{os.getppid()}.tmp", "x.safetensors.mine.tmp"}


def some_trainer(folder):
    with seeded(0):
        model = nn.Linear(2, 2)
    return model, Trainer({"m": model}, folder, 100, lr=.1)


def test_fit_is_adam_on_the_loss_with_its_context_around():
    p, inside, log = torch.tensor([1., -2.], requires_grad=True), [], []

    class Around:
        def __enter__(self):
            inside.append(True)

        def __exit__(self, *_):
            inside.pop()

    def loss():
        assert inside and torch.is_grad_enabled()
        value = (p ** 3).sum()
        value.register_hook(lambda g: log.append(len(inside)))  # the backward pass too
        return value
    start, points, gradients = p.detach().clone(), [], []
    with torch.no_grad():
        fit(loss, [p], 3, .1, Around, lambda step, value: points.append((step, value, p.clone())))
    assert not inside and log == [1, 1, 1] and p.grad is None
    now = start
    for step, (index, value, after) in enumerate(points):
        assert index == step and value == pytest.approx((now ** 3).sum().item(), rel=1e-5)
        gradients.append(3 * now ** 2)
        now = adam_by_hand(start, gradients, [.1] * 3)
        assert torch.allclose(after, now, atol=1e-5)
    fit(loss, [p], 0, .1, Around)
    assert torch.allclose(p, now, atol=1e-5)


def test_groups_have_rates_of_their_own():
    """As torch.optim's AdamW has them, to the last bit, kernels that lie channels last as well; what the loss
    doesn't depend on stays."""
    def some():
        kernels = (torch.linspace(start, 2, 54).view(2, 3, 3, 3) for start in (-1, 0, 1))
        return [k.to(memory_format=torch.channels_last).requires_grad_() for k in kernels]

    def groups(p, q, alone):
        return [{"params": [p, alone], "lr": .1}, {"params": [q], "lr": .01}]

    def loss(p, q, alone):
        return (p ** 3 * torch.arange(3.) + (2 * q).sin()).sum()
    ours, theirs = some(), some()
    fit(lambda: loss(*ours), groups(*ours), 6, .1)
    optimizer = torch.optim.AdamW(groups(*theirs), betas=(.9, .99), weight_decay=0., fused=True)
    for _ in range(6):
        loss(*theirs).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(map(torch.equal, ours, theirs)) and torch.equal(ours[2], some()[2])


def test_updates_are_adamw_with_warm_up_cosine_clipping_and_an_average(tmp_path):
    model = nn.Linear(3, 1)
    weight, x = model.weight.detach().clone(), torch.tensor([[1., 2., -1.]])
    bias, total, warmup = model.bias.detach().clone(), 20, 4
    trainer = Trainer({"m": model}, tmp_path, total, lr=.1, warmup=warmup, ema=.5, weight_decay=.3)
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
        average = average.lerp(model.weight.detach(), 1 - min(.5, (1 + step) / (10 + step)))
        assert torch.allclose(trainer.ema["m.weight"], average, atol=1e-6)
        assert model.weight.grad is None and trainer.step == step + 1
    trainer.average()
    assert torch.equal(model.weight.detach(), trainer.ema["m.weight"])


def test_the_usual_settings_of_a_run(tmp_path):
    trainer = Trainer({"m": nn.Linear(2, 2)}, tmp_path / "in/a/folder", 10, lr=.1)
    (adam,) = trainer.optimizers
    (group,) = adam.param_groups
    assert (trainer.warmup, trainer.decay, trainer.deadline, trainer.of) == (100, .999, math.inf, {})
    assert (group["betas"], group["weight_decay"], trainer.matrices) == ((.9, .99), .01, {})
    other = Trainer({"m": nn.Linear(2, 2)}, tmp_path, 10, lr=.1, betas=(.5, .6))
    assert [g["betas"] for optimizer in other.optimizers for g in optimizer.param_groups] == [(.5, .6)]


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


def test_the_bar_says_how_far_a_run_is(tmp_path, capsys):
    train(tmp_path / "run", 3, total=5)
    *_, last = capsys.readouterr().err.split("\r")
    assert last.startswith("run:  40%|") and "| 2/5 [" in last  # a step counts when the next one is asked for
    assert "loss=" in last
    train(tmp_path / "run", 5, total=5)
    _, first, *_ = capsys.readouterr().err.split("\r")
    assert first.startswith("run:  60%|") and "| 3/5 [" in first


def test_seeded_modules_leave_the_global_generator_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with seeded(5):
        one = nn.Linear(3, 3)
    assert torch.equal(torch.get_rng_state(), state)
    with seeded(5):
        assert torch.equal(nn.Linear(3, 3).weight, one.weight)
    with seeded(6):
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

    def disk_full(tensors, path, metadata):
        path.write_text("half")
        raise OSError("no space left")
    monkeypatch.setattr(checkpoints, "save_file", disk_full)
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
    pool[torch.tensor([5, 6, 7, 8, 1])]
    assert made == [4, 1, 5, 6, 7, 8] and len(pool.rows) == 4  # each was made once, the first went
    assert torch.equal(pool.draw(9, 5, generator(1)), Pool(None, 3, 2, 4).draw(9, 5, generator(1)))

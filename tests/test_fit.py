from contextlib import contextmanager

import pytest
import torch
from tiny import adam_by_hand, generator

from training.fit import backward, fit, fit_or_take_back


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


def test_a_loss_that_rises_for_good_is_taken_back():
    """Down a slope that turns into a cliff: of the states kept the last one before the cliff stays."""
    x, y = (torch.zeros(1, requires_grad=True) for _ in range(2))

    def loss(x):
        return (2 - x + 100 * (x.detach() > 1.05)).sum()
    with pytest.warns(UserWarning, match="rose from 2 to 100, so the last steps are undone: "):
        fit_or_take_back(lambda: loss(x), [x], 18, .1, replay=[generator(0)])
    assert x.item() == pytest.approx(.9, abs=1e-4)  # of 0, .3, .6, .9, 1.2 and 1.5
    fit(lambda: loss(y), [y], 16, .1)  # not asked to look
    assert y.item() == pytest.approx(1.6, abs=1e-4)
    with pytest.warns(UserWarning, match="rose from 100 to 200: the rate"):  # nothing is kept
        fit_or_take_back(lambda: loss(y) + 100 * (y.item() > 1.85), [y], 3, .1, replay=[generator(0)],
                         states=0)
    assert y.item() == pytest.approx(1.9, abs=1e-4)


@pytest.mark.parametrize("steps, worse", [(1, 2.), (4, 100.), (4, torch.nan), (30, torch.inf)])
def test_what_is_destroyed_by_the_first_step_is_put_back_to_the_start(steps, worse):
    x = torch.zeros(1, requires_grad=True)
    with pytest.warns(UserWarning, match="the loss rose from 1 to"):
        fit_or_take_back(lambda: (1 - x + (worse if x.item() else 0)).sum(), [x], steps, .5,
                         replay=[generator(0)])
    assert x.item() == 0


@pytest.mark.parametrize("times, risen", [(1.4, False), (1.6, True)])
def test_how_much_of_a_rise_is_one(times, risen, recwarn):
    x = torch.zeros(1, requires_grad=True)

    def loss():
        return ((times if x.item() else 1) - 1e-9 * x).sum()
    fit_or_take_back(loss, [x], 3, .1, replay=[generator(0)])
    assert bool(recwarn.list) == risen and bool(x.item()) == (not risen)
    fit_or_take_back(lambda: x.sum(), [x], 0, .1, replay=[generator(0)])  # no step, nothing to look back at


@pytest.mark.parametrize("passed", [True, False], ids=["drawn before", "drawn in the loss"])
def test_the_loss_is_compared_on_the_noise_of_the_first_step(passed, recwarn):
    """Noises of very different sizes: whatever stands beside them has not risen. What is drawn afterwards is
    what would have been drawn without a look back."""
    g, other, x = generator(3), generator(3), torch.zeros(1, requires_grad=True)

    def draw():
        return [torch.rand(1, generator=g) ** 9]
    if passed:
        fit_or_take_back(lambda noise: (noise + 1e-9 * x).sum(), [x], 20, .01, replay=[g], inputs=draw)
    else:
        fit_or_take_back(lambda: (draw()[0] + 1e-9 * x).sum(), [x], 20, .01, replay=[g])
    assert not recwarn.list
    torch.rand(20, generator=other)
    assert torch.equal(torch.rand(3, generator=g), torch.rand(3, generator=other))


def test_looking_back_is_no_step():
    """context() is entered without gradients then, so that what it does in a step can be left out."""
    entered, x = [], torch.zeros(1, requires_grad=True)

    @contextmanager
    def context():
        entered.append(torch.is_grad_enabled())
        yield
    fit_or_take_back(lambda: (x ** 2).sum(), [x], 3, .1, context, replay=[generator(0)])
    assert entered == [True] * 3 + [False]


def test_fit_is_adam_on_the_loss_with_its_context_context():
    p, inside, log = torch.tensor([1., -2.], requires_grad=True), [], []

    class Context:
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
        fit(loss, [p], 3, .1, Context, lambda step, value: points.append((step, value, p.clone())))
    assert not inside and log == [1, 1, 1] and p.grad is None
    now = start
    for step, (index, value, after) in enumerate(points):
        assert index == step and value == pytest.approx((now ** 3).sum().item(), rel=1e-5)
        gradients.append(3 * now ** 2)
        now = adam_by_hand(start, gradients, [.1] * 3)
        assert torch.allclose(after, now, atol=1e-5)
    fit(loss, [p], 0, .1, Context)
    assert torch.allclose(p, now, atol=1e-5)


def test_a_callback_may_end_it():
    x, seen = torch.zeros(1, requires_grad=True), []
    fit(lambda: -x.sum(), [x], 9, .1, callback=lambda i, value: seen.append(i) or i == 2)
    assert seen == [0, 1, 2] and x.item() == pytest.approx(.3, abs=1e-5)
    fit_or_take_back(lambda: 2 - x.sum(), [x], 9, .1, callback=lambda *_: True, replay=[generator(0)])
    assert x.item() == pytest.approx(.4, abs=1e-5)


def test_groups_have_rates_of_their_own():
    """As torch.optim's AdamW has them, to the last bit, kernels that lie channels last as well; what the loss
    doesn't depend on stays."""
    def some():
        kernels = (torch.linspace(start, 2, 54).view(2, 3, 3, 3) for start in (-1, 0, 1))
        return [k.to(memory_format=torch.channels_last).requires_grad_() for k in kernels]

    def groups(p, q, alone):
        return [{"params": [p, alone], "lr": .1}, {"params": [q]}]

    def loss(p, q, alone):
        return (p ** 3 * torch.arange(3.) + (2 * q).sin()).sum()
    ours, theirs = some(), some()
    fit(lambda: loss(*ours), groups(*ours), 6, .01)
    optimizer = torch.optim.AdamW(groups(*theirs), .01, betas=(.9, .99), weight_decay=0., fused=True)
    for _ in range(6):
        loss(*theirs).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(map(torch.equal, ours, theirs)) and torch.equal(ours[2], some()[2])

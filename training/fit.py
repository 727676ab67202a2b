"""A few steps down the gradient of a loss, all in memory: Adam, on a GPU each step in one piece, and at the
end a look at whether it went down."""
import warnings
from contextlib import nullcontext

import torch
from torch.optim.adamw import adamw

SCALE = 2 ** 10
RISEN = 1.5  # a loss that is so many times what it was at the start


def backward(loss, parameters):
    """The gradients of `loss` in `parameters`, as loss.backward() makes them in float32. In between they are
    SCALE times as large, since float16, which ends at 6e-8, would round most of a picture's mean error away;
    the scale is a power of two, so nothing else changes."""
    (loss * SCALE).backward()
    torch._foreach_div_([p.grad for p in parameters if p.grad is not None], SCALE)


def fit(loss, parameters, steps, lr, around=nullcontext, callback=None, generator=None, states=8,
            draw=None):
    """Change `parameters`, a list of tensors that require gradients, or of groups of them, {"params":
    [tensors], "lr": a rate of their own}, by `steps` of Adam down the scalar loss().

    around() is a context for each loss and its backward: lambda: model.adapted(adapters made of the
    parameters). callback(step, loss) after every step. generator: what the losses' noise comes from, or a
    list of those. Given, the first noise is tried again at the end, with a warning where its loss is well
    above what it was; then the last of so many `states` in between of which that is not so is put back.
    draw() -> all tensors that change from step to step, in shapes that don't, for loss(*draw()): with it a
    GPU is given each step in one piece, `recorded`.
    """
    groups = parameters if isinstance(parameters[0], dict) else [{"params": parameters}]
    trained = [p for group in groups for p in group["params"]]
    # both moments and how many steps were made
    like = torch.zeros_like
    memory = {p: (like(p), like(p), torch.zeros((), device=p.device)) for p in trained}

    def step(*tensors):
        with torch.enable_grad(), around():
            value = loss(*tensors)
            backward(value, trained)
        with torch.no_grad():
            for group in groups:
                adam(group["params"], memory, group.get("lr", lr))
        return value.detach()
    if draw and trained[0].is_cuda:
        step = recorded(step)

    draw = draw or tuple
    sources = generator if isinstance(generator, list) else [generator] if generator else []
    kept, beginning = [], [source.get_state() for source in sources]
    for i in range(steps):
        if generator and states and i % (steps // states + 1) == 0:
            kept.append([p.detach().clone() for p in trained])
        value = step(*draw())
        if i == 0:
            first = value.clone()  # a recorded step writes to the same place
        if callback:
            callback(i, value.item())  # on a GPU, to read it is to wait for it
    if not (generator and steps):
        return

    def risen():
        """What the first step's noise gives now, if that is well above what it gave then or no number."""
        now = [source.get_state() for source in sources]
        rewind(sources, beginning)
        with torch.no_grad(), around():
            value = loss(*draw())
        rewind(sources, now)
        return None if value <= RISEN * first else value
    if (last := risen()) is not None:
        so = ", so the last steps are not kept" if kept else ""
        warnings.warn(f"the loss rose from {first:.3g} to {last:.3g}{so}: a rate of {lr:g} is too high; a "
                      "tenth of it, or fewer steps, may do", stacklevel=3)
        for state in reversed(kept):
            torch._foreach_copy_([p.detach() for p in trained], state)
            if risen() is None:
                break


def rewind(sources, states):
    """Put generators into the states that they had."""
    for source, state in zip(sources, states):
        source.set_state(state)


def adam(parameters, memory, lr):
    """A step of Adam down the parameters' gradients, which are gone afterwards. torch.optim's class would do
    the same, but imports a compiler first, a quarter of the time that a person on nano takes."""
    moved = [p for p in parameters if p.grad is not None]
    first, second, steps = map(list, zip(*(memory[p] for p in moved)))
    adamw(moved, [p.grad for p in moved], first, second, [], steps, fused=True, amsgrad=False, beta1=.9,
          beta2=.99, lr=lr, weight_decay=0., eps=1e-8, maximize=False)
    for p in moved:
        p.grad = None


def recorded(step, eager=3):
    """step(*tensors) -> tensor, on a GPU, as a CUDA graph: run as it is a few times, then recorded, and from
    then on replayed, which spares Python and thousands of launches, the most of a step's time. Whatever
    else the step reads and writes stays where it is in memory."""
    graph, aside, calls, given, result = torch.cuda.CUDAGraph(), torch.cuda.Stream(), 0, [], None

    def run(*tensors):
        nonlocal calls, given, result
        calls += 1
        if calls <= eager:  # on a stream of its own, as when it is recorded
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                result = step(*tensors)
            torch.cuda.current_stream().wait_stream(aside)
            return result
        if calls == eager + 1:
            given = [t.clone() for t in tensors]
            with torch.cuda.graph(graph):
                result = step(*given)
        torch._foreach_copy_(given, list(tensors))
        graph.replay()
        return result
    return run

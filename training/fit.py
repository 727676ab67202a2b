"""A few steps of Adam on one loss: the fine-tuning on a photo, for every method.

`fit` is the plain loop. `backward` makes a step safe in float16, `fit_or_take_back` undoes a fit that went
wrong, and `fastest` (on a CPU) and `recorded` (on a GPU) save time."""
import warnings
from contextlib import nullcontext

import torch
from torch.optim.adamw import adamw

from adapters import SMALL, Change, require_low_rank

SCALE = 2 ** 10
RISEN = 1.5  # a loss has risen if it is this many times that of the start


def fit(loss, parameters, steps, lr, context=nullcontext, callback=None, inputs=tuple):
    """Change `parameters` by `steps` of Adam down the scalar loss(*inputs()). They are a list of tensors that
    require gradients, or of groups {"params": [tensors], "lr": their own rate}.

    context(): the context of each loss and its backward, such as lambda: model.adapted(adapters).
    callback(step, loss) after every step; True ends the fit. inputs() -> all tensors that change between
    steps, in constant shapes, so that a GPU can replay a recorded step. By default there are none, and no
    step is recorded. ValueError inside torch.inference_mode()."""
    if torch.is_inference_mode_enabled():
        raise ValueError("nothing can be trained inside torch.inference_mode()")
    step = adam_step(loss, parameters, lr, context)
    if inputs is not tuple and tensors_of(parameters)[0].is_cuda:
        step = recorded(step)
    for i in range(steps):
        value = step(*inputs())
        if callback and callback(i, value.item()):
            break


def fit_or_take_back(loss, parameters, steps, lr, context=nullcontext, callback=None, inputs=tuple,
                     replay=(), states=8):
    """fit(), then a check with the first step's noise, which the generator `replay`, or each of a list, gave.
    If its loss has risen, a warning says so, and the last of `states` states without a rise is restored."""
    trained, every = tensors_of(parameters), steps // states + 1 if states else steps + 1
    replay = [replay] if isinstance(replay, torch.Generator) else replay
    beginning, losses, kept = [g.get_state() for g in replay], [], []

    def keep(i):
        if states and i % every == 0 and i < steps:
            kept.append([p.detach().clone() for p in trained])

    def after(i, value):
        losses.append(value)
        keep(i + 1)
        return callback and callback(i, value)

    keep(0)
    fit(loss, parameters, steps, lr, context, after, inputs)
    if not losses:
        return

    def risen():
        """The loss for the first step's noise, if it is well above the first loss or NaN; else None."""
        now = [g.get_state() for g in replay]
        for generator, state in zip(replay, beginning):
            generator.set_state(state)
        with torch.no_grad(), context():
            value = loss(*inputs()).item()
        for generator, state in zip(replay, now):
            generator.set_state(state)
        return None if value <= RISEN * losses[0] else value

    if (last := risen()) is not None:
        undone = ", so the last steps are undone" if kept else ""
        warnings.warn(f"the loss rose from {losses[0]:.3g} to {last:.3g}{undone}: the rate {lr:g} is too "
                      "high; try a tenth of it, or fewer steps", stacklevel=3)
        for state in reversed(kept):
            torch._foreach_copy_([p.detach() for p in trained], state)
            if risen() is None:
                break


def groups_of(parameters):
    """A list of groups, from a list of tensors or groups."""
    return parameters if isinstance(parameters[0], dict) else [{"params": parameters}]


def tensors_of(parameters):
    """All tensors of a list of tensors or groups."""
    return [p for group in groups_of(parameters) for p in group["params"]]


def adam_step(loss, parameters, lr, context):
    """step(*inputs) -> the loss before the step: one step of Adam, which keeps its moments between calls."""
    trained, zeros = tensors_of(parameters), torch.zeros_like
    memory = {p: (zeros(p), zeros(p), torch.zeros((), device=p.device)) for p in trained}  # moments, steps

    def step(*inputs):
        with torch.enable_grad(), context():
            value = loss(*inputs)
            backward(value, trained)
        with torch.no_grad():
            for group in groups_of(parameters):
                adam(group["params"], memory, group.get("lr", lr))
        return value.detach()
    return step


def adam(parameters, memory, lr):
    """A step of Adam down the parameters' gradients, which it clears. torch.optim.Adam does the same, but
    first imports a compiler, which would take a quarter of the time of a person on nano."""
    moved = [p for p in parameters if p.grad is not None]
    first, second, steps = map(list, zip(*(memory[p] for p in moved)))
    adamw(moved, [p.grad for p in moved], first, second, [], steps, fused=True, amsgrad=False, beta1=.9,
          beta2=.99, lr=lr, weight_decay=0., eps=1e-8, maximize=False)
    for p in moved:
        p.grad = None


def backward(loss, parameters):
    """Set the gradients of `parameters`. The backward pass computes them times SCALE, a power of two, because
    float16 ends at 6e-8 and would round most of the gradient of a mean over a picture to 0."""
    (loss * SCALE).backward()
    torch._foreach_div_([p.grad for p in parameters if p.grad is not None], SCALE)


def recorded(step, eager=3):
    """step(*tensors) -> tensor on a GPU, as a CUDA graph: the first `eager` calls run the step, the next one
    records it, and later ones replay it. That saves Python and thousands of launches, most of the time of a
    step. All else that the step reads and writes must keep its place in memory."""
    graph, aside, calls, given, result = torch.cuda.CUDAGraph(), torch.cuda.Stream(), 0, [], None

    def run(*tensors):
        nonlocal calls, given, result
        calls += 1
        if calls <= eager:  # on another stream, as during recording
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


def as_changes(lora, layers):
    """One person's low-rank adapters as changes of whole weights, with the present ΔW = A·B. Gradients reach
    A and B through them. One product serves all layers of a shape."""
    alike, changes = {}, {}
    for name, (a, b) in require_low_rank(lora, people=1).items():
        alike.setdefault((a.shape, b.shape), []).append(name)
    for names in alike.values():
        a, b = (torch.cat(factors) for factors in zip(*(lora[name] for name in names)))
        for name, change in zip(names, b.mT.float() @ a.mT.float()):
            changes[name] = Change({"weight": change.view_as(layers[name].weight)})
    return changes


def fastest(lora, layers):
    """A LoRA in training in its fastest form, with the same output: one person's goes into the weights if
    these are small, on a CPU and in float32 (a step of nano's fine-tuning: 91 ms, not 118)."""
    weights = [layers[name].weight for name in lora]
    small = all(w.numel() <= SMALL and w.device.type == "cpu" and w.dtype == torch.float32 for w in weights)
    one = all(len(pair.a) == 1 for pair in lora.values())
    return as_changes(lora, layers) if small and one else lora

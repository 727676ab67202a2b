"""A few steps of Adam on one loss, all in memory: what fine-tuning on one photo is, for every method.

`fit` is the plain loop. Beside it stand what makes a step safe in float16 (`backward`), what takes a training
back that went wrong (`fit_or_take_back`), and what makes a GPU's steps fast (`recorded`)."""
import warnings
from contextlib import nullcontext

import torch
from torch.optim.adamw import adamw

from adapters import Change, require_low_rank

SCALE = 2 ** 10
SMALL = 2 ** 18  # fastest() puts a LoRA into the weights of layers with at most this many
RISEN = 1.5  # a loss that is this many times what it was at the start has risen


def fit(loss, parameters, steps, lr, context=nullcontext, callback=None, inputs=tuple):
    """Change `parameters`, a list of tensors that require gradients, or of groups of them, {"params":
    [tensors], "lr": a rate of their own}, by `steps` of Adam down the scalar loss(*inputs()).

    context() is a context for each loss and its backward: lambda: model.adapted(adapters of the parameters).
    callback(step, loss) after every step; True ends it. inputs() -> all tensors that change between steps, in
    shapes that don't: a GPU then gets a step in one piece. ValueError inside torch.inference_mode()."""
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
    """fit(), and a look back at its end: the first step's noise, which the generator `replay`, or each of a
    list of them, gave, is tried again. Where its loss is well above what it was, a warning says so, and the
    last of so many `states` kept on the way for which it is not is put back."""
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
        """What the first step's noise gives now, where that is well above what it gave then, or no number."""
        now = [g.get_state() for g in replay]
        for generator, state in zip(replay, beginning):
            generator.set_state(state)
        with torch.no_grad(), context():
            value = loss(*inputs()).item()
        for generator, state in zip(replay, now):
            generator.set_state(state)
        return None if value <= RISEN * losses[0] else value

    if (last := risen()) is not None:
        so = ", so the last steps are not kept" if kept else ""
        warnings.warn(f"the loss rose from {losses[0]:.3g} to {last:.3g}{so}: a rate of {lr:g} is too high; "
                      "a tenth of it, or fewer steps, may do", stacklevel=3)
        for state in reversed(kept):
            torch._foreach_copy_([p.detach() for p in trained], state)
            if risen() is None:
                break


def tensors_of(parameters):
    """The tensors of a list of tensors or groups."""
    groups = parameters if isinstance(parameters[0], dict) else [{"params": parameters}]
    return [p for group in groups for p in group["params"]]


def adam_step(loss, parameters, lr, context):
    """step(*inputs) -> the loss before it: one step of Adam, which keeps its moments from call to call."""
    groups = parameters if isinstance(parameters[0], dict) else [{"params": parameters}]
    trained, zeros = tensors_of(parameters), torch.zeros_like
    memory = {p: (zeros(p), zeros(p), torch.zeros((), device=p.device)) for p in trained}  # moments, steps

    def step(*inputs):
        with torch.enable_grad(), context():
            value = loss(*inputs)
            backward(value, trained)
        with torch.no_grad():
            for group in groups:
                adam(group["params"], memory, group.get("lr", lr))
        return value.detach()
    return step


def adam(parameters, memory, lr):
    """A step of Adam down the parameters' gradients, which are gone afterwards. torch.optim's class does the
    same, but imports a compiler first, a quarter of the time that a person on nano takes."""
    moved = [p for p in parameters if p.grad is not None]
    first, second, steps = map(list, zip(*(memory[p] for p in moved)))
    adamw(moved, [p.grad for p in moved], first, second, [], steps, fused=True, amsgrad=False, beta1=.9,
          beta2=.99, lr=lr, weight_decay=0., eps=1e-8, maximize=False)
    for p in moved:
        p.grad = None


def backward(loss, parameters):
    """The gradients of `loss` in `parameters`. In between they are SCALE times as large, a power of two, as
    float16, which ends at 6e-8, would round most of a picture's mean error away."""
    (loss * SCALE).backward()
    torch._foreach_div_([p.grad for p in parameters if p.grad is not None], SCALE)


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

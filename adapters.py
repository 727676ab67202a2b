"""A person's changes to a model, as a dict of layer name -> adapter.

An adapter is any callable that gets a layer, its input x and its output y, and returns the new output.
Adapters act only inside

    with adapted(layers, adapters):
        ...                          # a sample, or a loss and its backward

and leave no trace. HyperDreamBooth's are low-rank (LiDB and LoRA):

    LowRank    y + x·A·B,  A (P, in, r), B (P, r, out), so W' = W + (A·B)ᵀ for each of P people
    Change     y + x·Dᵀ (+ d),  one person's differences from the layer's own weights or biases

You can join low-rank adapters, scale them, stack several people's, merge them into the weights, and export
them as a LoRA. You can scale and merge a Change."""
import copy
import itertools
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

SMALL = 2 ** 18  # a layer with at most this many weights is small; all of nano's are


class LowRank(NamedTuple):
    """y + x·A·B, with A (P, in, r) and B (P, r, out) of P people.

    One person takes the whole batch; for P people a batch of k·P samples is k groups of all people in order
    (guidance makes two: all negatives, then all prompts). The layer is linear, or a k×k convolution, whose
    `in` is channels · k·k: A is then a k×k convolution to r channels, and B a 1×1 convolution."""
    a: torch.Tensor
    b: torch.Tensor

    def __call__(self, layer, x, y):
        """ValueError for a batch that is no multiple of the people."""
        a, b = (shared(t.to(x.dtype), len(x)) for t in self)
        if isinstance(layer, nn.Conv2d):
            kernel = a.mT.reshape(-1, *layer.weight.shape[1:])          # (people·r, channels, k, k)
            side_by_side = x.reshape(-1, len(a) * x.shape[1], *x.shape[2:])
            x = F.conv2d(side_by_side, kernel, None, layer.stride, layer.padding, groups=len(a))
            x = x.view(len(y), -1, *y.shape[2:]).flatten(2).mT          # (B, pixels, r)
            return y + (x @ b).mT.reshape(y.shape)
        # (B, tokens, in), or one person's tokens as one matrix; baddbmm adds the product to y
        x, start = (z.reshape(len(a), -1, z.shape[-1]) for z in (x, y))
        return torch.baddbmm(start, x @ a, b).view(y.shape)

    def scaled(self, strength):
        return LowRank(self.a, self.b * strength)

    def changes(self, layer):
        """name -> what one person's adapter adds to that parameter of the layer, in float32."""
        (a,), (b,) = self.a.float(), self.b.float()
        return {"weight": (a @ b).T.view_as(layer.weight)}


class Change(NamedTuple):
    """One person's differences from the layer's parameters: name -> tensor.

    All layers here are linear in their parameters, even the norms, so the differences alone change y."""
    tensors: dict

    def __call__(self, layer, x, y):
        bare = copy.copy(layer)
        bare._forward_hooks = bare._forward_pre_hooks = {}  # or this adapter would run on the copy too
        zeros = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
        return y + functional_call(bare, zeros | {name: t.to(y.dtype) for name, t in self.tensors.items()}, x)

    def scaled(self, strength):
        return Change({name: t * strength for name, t in self.tensors.items()})

    def changes(self, layer):
        return self.tensors


def shared(tensor, batch):
    """One person's tensor (1, …), or P people's (P, …) repeated for a batch of k·P. ValueError for others."""
    groups, rest = divmod(batch, len(tensor))
    if rest:
        raise ValueError(f"a batch of {batch} cannot be shared among {len(tensor)} people")
    return tensor if len(tensor) == 1 else tensor.repeat(groups, *[1] * (tensor.dim() - 1))


@contextmanager
def adapted(layers, adapters):
    """Inside, adapters[name](layer, x, y) replaces the output y that layers[name] computes from x. A method
    before(layer, inputs) -> inputs, if the adapter has one, first changes what layer and adapter get.

    Several `with` add up: the inner adapters see the outer ones' output. Put the backward pass inside too:
    gradient checkpointing runs the layers again. Call layers as modules, with x as the first argument; give
    each thread its own model. Adapters that pass fits_weights() go into the weights and cost nothing there;
    all others are hooks. ValueError for a name that `layers` lacks, and for copying an adapted model."""
    if unknown := [name for name in adapters if name not in layers]:
        raise ValueError(f"no such layer here: {', '.join(unknown[:3])}")
    in_weights = {name: adapter for name, adapter in adapters.items() if fits_weights(layers[name], adapter)}
    by_hooks = {name: adapter for name, adapter in adapters.items() if name not in in_weights}
    with weights_changed(layers, in_weights), hooked(layers, by_hooks):
        yield


@contextmanager
def hooked(layers, adapters):
    """Inside, hooks replace each layer's output: the plain mechanism, right for any adapter."""
    handles = []
    try:
        for name, adapter in adapters.items():
            if hasattr(adapter, "before"):
                handles.append(layers[name].register_forward_pre_hook(adapter.before))
            handles.append(layers[name].register_forward_hook(Hook(adapter)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def weights_changed(layers, adapters):
    """Inside, W + ΔW replaces W: the fast mechanism, equal to `hooked` up to rounding."""
    entered = []
    try:
        for name, adapter in adapters.items():
            layer, change = layers[name], adapter.changes(layers[name])
            layer.__dict__.setdefault("weight_changes", WeightChanges(layer)).enter(change)
            entered.append((layer, change))
        yield
    finally:
        for layer, change in entered:
            layer.weight_changes.leave(change)
            if not layer.weight_changes.entries:
                del layer.weight_changes


class NoCopy:
    """What is attached to an adapted layer. ValueError for a copy, which would stay adapted forever."""

    def __deepcopy__(self, memo):
        raise ValueError("this model is adapted: copy it outside `with adapted(…)`")


class Hook(NoCopy):
    """The forward hook of an adapter."""

    def __init__(self, adapter):
        self.adapter = adapter

    def __call__(self, layer, inputs, output):
        return self.adapter(layer, inputs[0], output)


def outside(adapter, layer, x):
    """The layer's output for another x under the adapters outside this one, which asks for it in its call."""
    every = [hook.adapter for hook in layer._forward_hooks.values() if isinstance(hook, Hook)]
    y = layer.forward(x)  # without hooks
    for other in itertools.takewhile(lambda one: one is not adapter, every):
        y = other(layer, x, y)
    return y


class WeightChanges(NoCopy):
    """One layer's changes, outermost first, each with the parameters before it. They leave in any order."""

    def __init__(self, layer):
        self.layer, self.entries = layer, []

    def enter(self, change):
        before = dict(self.layer._parameters)
        for name, difference in change.items():
            # no nn.Parameter: the gradient of a trained change flows through the sum
            self.layer._parameters[name] = before[name] + difference
        self.entries.append((before, change))

    def leave(self, change):
        at = max(i for i, (_, other) in enumerate(self.entries) if other is change)
        self.layer._parameters.update(self.entries[at][0])
        inner, self.entries = self.entries[at + 1:], self.entries[:at]
        for _, other in inner:  # usually none: the innermost leaves first
            self.enter(other)


def fits_weights(layer, adapter):
    """Whether W + ΔW may and should replace W. It may if the adapter is one person's and untrained (or a
    Change, which passes gradients on), W needs no gradient, and float32 rounds nothing away. It should if W
    is small or the rank high: else a hook needs less memory (on SD 1.5 a GB) and 2 % more time."""
    if isinstance(adapter, LowRank):
        a, b = adapter
        fixed = len(a) == 1 and not a.requires_grad and not b.requires_grad
        pays = layer.weight.numel() <= max(SMALL, 16 * (a.numel() + b.numel()))
    else:
        fixed = pays = isinstance(adapter, Change)
    own = layer.parameters(recurse=False)
    return fixed and pays and all(p.dtype == torch.float32 and not p.requires_grad for p in own)


def fresh_lora(layers, rank, generator, people=1):
    """LoRA adapters to train (Hu et al., arXiv 2106.09685) for P people: A (P, in, rank) ~ N(0, 1/in) from
    one CPU generator or a list of P, and B (P, rank, out) = 0. ValueError for rank 0."""
    if rank < 1:
        raise ValueError(f"a LoRA of rank {rank} changes nothing")
    adapters, each = {}, generator if isinstance(generator, list) else [generator]
    for name, layer in layers.items():
        shape = people // len(each), layer.in_features, rank
        a = torch.cat([torch.randn(shape, generator=one, device="cpu") for one in each])
        a = a / layer.in_features ** .5
        b = torch.zeros(people, rank, layer.out_features)
        adapters[name] = LowRank(*(t.to(layer.weight.device).requires_grad_() for t in (a, b)))
    return adapters


def require_low_rank(adapters, people=None):
    """The same adapters. ValueError unless they are LowRank and, if `people` is given, of that many."""
    for name, adapter in adapters.items():
        if not isinstance(adapter, LowRank):
            raise ValueError(f"{name}: only low-rank adapters can be joined, stacked or exported")
        if people not in (None, len(adapter.a)):
            raise ValueError(f"{people} person's adapters are needed, not {len(adapter.a)} people's")
    return adapters


def join(*many):
    """The sum of low-rank adapters: a sum of products is a product of concatenated factors."""
    joined = {}
    for adapters in many:
        for name, new in require_low_rank(adapters).items():
            if name in joined:
                people = max(len(joined[name].a), len(new.a))
                (a, b), (c, d) = ([t.expand(people, -1, -1) for t in pair] for pair in (joined[name], new))
                new = LowRank(torch.cat([a, c], 2), torch.cat([b, d], 1))
            joined[name] = new
    return joined


def scale(adapters, strength):
    """The same adapters with `strength` times the effect. ValueError for adapters that change no weights."""
    return {name: linear(name, adapter).scaled(strength) for name, adapter in adapters.items()}


LINEAR = LowRank, Change  # these add to the weights, so half of one has a meaning


def linear(name, adapter):
    """The same adapter. ValueError unless it changes weights."""
    if not isinstance(adapter, LINEAR):
        raise ValueError(f"{name}: only changes of weights can be scaled or merged")
    return adapter


def detach(adapters):
    """The same low-rank adapters, without the graph that made them."""
    return {name: LowRank(a.detach(), b.detach()) for name, (a, b) in require_low_rank(adapters).items()}


def stack(people):
    """The low-rank adapters of all people in a list of adapters, in order: one person per picture of a batch.
    Zeros fill lower ranks and layers without an adapter; {} is the unchanged model."""
    counts = [len(next(iter(require_low_rank(own).values())).a) if own else 1 for own in people]
    stacked = {}
    for name in dict.fromkeys(name for adapters in people for name in adapters):
        a, b = next(adapters[name] for adapters in people if name in adapters)
        nothing = a.new_zeros(1, a.shape[1], 1), b.new_zeros(1, 1, b.shape[2])
        pairs = [adapters.get(name) or [t.expand(n, -1, -1) for t in nothing]
                 for n, adapters in zip(counts, people)]
        rank = max(a.shape[2] for a, _ in pairs)
        stacked[name] = LowRank(torch.cat([F.pad(a, (0, rank - a.shape[2])) for a, _ in pairs]),
                                torch.cat([F.pad(b, (0, 0, 0, rank - b.shape[1])) for _, b in pairs]))
    return stacked


@torch.no_grad()
def merge(layers, adapters):
    """Add one person's adapters to the weights for good: W ← W + ΔW, in float32. ValueError for several
    people's adapters, and for adapters that change no weights."""
    require_low_rank({name: one for name, one in adapters.items() if isinstance(one, LowRank)}, people=1)
    for name, adapter in adapters.items():
        for key, change in linear(name, adapter).changes(layers[name]).items():
            parameter = layers[name].get_parameter(key)
            parameter.copy_(parameter.float() + change.float())

"""Lightweight DreamBooth (HyperDreamBooth, arXiv 2307.06949, section 4.1): personal weights in a frozen random subspace.

A personalised linear layer computes y = x·Wᵀ + x·A·B with A (in, r) and B (r, out). Everything personal here is a set of such *factors*:
a dict of layer name -> (A (P, in, r), B (P, r, out)), P people (1 or one per sample). LiDB makes them from a few numbers θ, LoRA trains
them directly, and `join` puts any two side by side: a sum of products is a product of concatenations.
"""
import zlib
from functools import partial

import torch
from torch import nn


def personal_layers(unet, text):
    """The layers that are personalised: name -> nn.Linear. On SD 1.5: 128 attention projections and 16 GEGLU projections of the UNet and 48
    attention projections of the text encoder: 192 layers, the set behind the paper's "386K" for rank-1 LoRA and "28k" for LiDB."""
    names = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj")
    found = {f"unet.{n}": m for n, m in unet.named_modules() if isinstance(m, nn.Linear) and n.endswith(names)}
    return found | {f"text.{n}": m for n, m in text.named_modules() if isinstance(m, nn.Linear) and ".self_attn." in n}


def adaptable_layers(unet, text):
    """Every layer that can take factors, ours or another LoRA's: name -> nn.Linear, or a 1×1 nn.Conv2d, which is one at each pixel."""
    kinds = lambda m: isinstance(m, nn.Linear) or isinstance(m, nn.Conv2d) and m.kernel_size == m.stride == (1, 1)
    return {f"{part}.{n}": m for part, module in (("unet", unet), ("text", text)) for n, m in module.named_modules() if kinds(m)}


class LiDB:
    """Eq. 1: ΔW = A_aux · A_train · B_train · B_aux, with only A_train (a, r) and B_train (r, b) trained, for every layer at once.

    θ is one tensor (P, layers, r·(a + b)): for each layer A_train, then B_train. It is counted from a start A₀, the same for everybody, that
    is not zero: so θ = 0 leaves the model untouched although its gradient doesn't vanish, and θ fitted for two people are comparable.
    All random numbers come from a CPU generator, the bases' in float64, so `seed` means the same on every device; `checksum` proves it.
    """

    def __init__(self, layers, a=None, b=None, rank=1, seed=0, device=None):
        """layers: name -> nn.Linear. a, b: 100 and 50 as in the paper, or the narrowest layer's width where that is less (the miniature's)."""
        narrowest = min(min(m.in_features, m.out_features) for m in layers.values())
        self.names, self.a, self.b, self.rank, self.seed = list(layers), a or min(100, narrowest), b or min(50, narrowest), rank, seed
        if max(self.a, self.b) > narrowest:
            raise ValueError(f"a = {self.a} and b = {self.b} must not exceed the narrowest layer's width, {narrowest}")
        generator = torch.Generator().manual_seed(seed)
        self.a0 = torch.randn(self.a, rank, generator=generator, dtype=torch.float32, device="cpu") / self.a ** .5
        self.a_aux = [orthonormal(m.in_features, self.a, generator) for m in layers.values()]    # (in, a): columns of length 1
        self.b_aux = [orthonormal(m.out_features, self.b, generator).T for m in layers.values()]  # (b, out): rows of length 1
        self.checksum = zlib.crc32(b"".join((t * 1e4).round().short().numpy().tobytes() for t in (self.a0, *self.a_aux, *self.b_aux)))
        self.a0, self.a_aux, self.b_aux = self.a0.to(device), [t.to(device) for t in self.a_aux], [t.to(device) for t in self.b_aux]

    @property
    def shape(self):
        """(layers, r·(a + b)), the shape of one person's θ."""
        return len(self.names), self.rank * (self.a + self.b)

    def factors(self, theta):
        """θ (P, layers, r·(a + b)) -> name -> (A (P, in, r), B (P, r, out)), differentiable.  A = A_aux·A_train, B = B_train·B_aux."""
        if theta.shape[1:] != self.shape:
            raise ValueError(f"θ is {tuple(theta.shape)}, but this basis needs (people, {self.shape[0]}, {self.shape[1]})")
        a_train, b_train = theta.split([self.rank * self.a, self.rank * self.b], dim=2)
        a_train = self.a0.to(theta) + a_train.unflatten(2, (self.a, self.rank))  # (P, layers, a, r)
        b_train = b_train.unflatten(2, (self.rank, self.b))                      # (P, layers, r, b)
        factors = {}
        for i, name in enumerate(self.names):
            factors[name] = self.a_aux[i].to(theta) @ a_train[:, i], b_train[:, i] @ self.b_aux[i].to(theta)
        return factors


def orthonormal(rows, columns, generator):
    """Random float32 matrix (rows, columns) with orthonormal columns. Float64 and the sign rule make it the same with every LAPACK."""
    q, r = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64, device="cpu"))
    return (q * r.diagonal().sign()).float()


class Personal:
    """Adds the residual of `factors` to every layer named there, from construction until `remove()`.

    Set `.factors` to a dict from LiDB.factors, lora or join, or to {} for the untouched model. They stay in force until they are set
    again, through the backward pass too, where gradient checkpointing runs the layers once more. With one person in the factors the whole
    batch is that person; with P people a batch of k·P samples is k groups of them in order (guidance: negatives first, then prompts).
    A layer has to be called as a module, with its input as the one argument; in several threads at once each needs a model of its own.
    """

    def __init__(self, layers):
        self.factors = {}
        # a bound method and not a closure, so that a deep copy of the model brings a Personal of its own
        self.handles = [m.register_forward_hook(partial(self._add, name)) for name, m in layers.items()]

    def _add(self, name, module, inputs, y):
        if name not in self.factors:
            return None
        x, (a, b) = inputs[0], self.factors[name]
        if len(a) not in (1, len(x)):
            if len(x) % len(a):
                raise ValueError(f"a batch of {len(x)} cannot be shared among {len(a)} people")
            a, b = (t.repeat(len(x) // len(t), 1, 1) for t in (a, b))
        pixels = isinstance(module, nn.Conv2d)
        x = x.flatten(2).mT if pixels else x.reshape(len(x), -1, x.shape[-1])  # (B, n, in): n pixels or tokens, or one vector
        residual = x @ a.to(x.dtype) @ b.to(x.dtype)
        return y + (residual.mT if pixels else residual).reshape(y.shape)

    def remove(self):
        for handle in self.handles:
            handle.remove()


def lora(layers, rank, generator, people=1):
    """Fresh LoRA factors (Hu et al., 2106.09685): A ~ N(0, 1/in) from a CPU generator, B = 0, so the residual starts at 0. Trainable."""
    def pair(m):
        a = torch.randn(people, m.in_features, rank, generator=generator, device="cpu") / m.in_features ** .5
        return tuple(t.to(m.weight.device).requires_grad_() for t in (a, torch.zeros(people, rank, m.out_features)))
    return {name: pair(m) for name, m in layers.items()}


def join(*many):
    """One set of factors whose residual is the sum of the given ones'; ranks add up."""
    joined = {}
    for factors in many:
        for name, (a, b) in factors.items():
            if name in joined:
                people = max(len(a), len(joined[name][0]))
                a, b = (torch.cat([old.expand(people, -1, -1), new.expand(people, -1, -1)], dim)
                        for old, new, dim in zip(joined[name], (a, b), (2, 1)))
            joined[name] = a, b
    return joined


def scale(factors, strength):
    """The same factors with `strength` times the residual."""
    return {name: (a, b * strength) for name, (a, b) in factors.items()}


@torch.no_grad()
def merge(layers, factors):
    """Add one person's residual to the weights themselves, in place: W ← W + (A·B)ᵀ, computed in float32, exact to rounding."""
    for name, (a, b) in factors.items():
        if len(a) != 1:
            raise ValueError(f"only one person can be merged into the weights, not {len(a)}")
        weight = layers[name].weight
        weight.copy_(weight.float() + (a[0].float() @ b[0].float()).T.view_as(weight))

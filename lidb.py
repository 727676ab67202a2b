"""Lightweight DreamBooth (arXiv 2307.06949, section 4.1): personal weights in a frozen random subspace.

Why A_aux and B_aux are frozen: a seed makes them again, so they are neither stored nor predicted, and all
people share one space. Why they are orthonormal: ‖A_aux·v‖ = ‖v‖ in a layer of any width, so that one scale
of θ and one learning rate suit all layers."""
import zlib
from functools import lru_cache

import torch
from torch import nn

from adapters import LowRank


def personal_layers(unet, text):
    """The layers that are personalised: name -> nn.Linear. On SD 1.5: 128 attention projections and 16 GEGLU
    projections of the UNet and 48 attention projections of the text encoder: 192 layers, the set behind the
    paper's "386K" for rank-1 LoRA and "28k" for LiDB."""
    ends = "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj"
    found = {}
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(ends):
            found[f"unet.{name}"] = layer
    for name, layer in text.named_modules():
        if isinstance(layer, nn.Linear) and ".self_attn." in name:
            found[f"text.{name}"] = layer
    return found


def unet_layers(layers):
    """Those of `layers` that belong to the UNet."""
    return {name: layer for name, layer in layers.items() if name.startswith("unet.")}


class LiDB:
    """Eq. 1: ΔW = A_aux · A_train · B_train · B_aux, with only A_train (a, r) and B_train (r, b) trained, for
    every layer at once.

    θ is one tensor (P, layers, r·(a + b)): for each layer A_train − A₀, then B_train. A₀ is random and the
    same for everybody. So at θ = 0, where B_train = 0, the model is untouched, but the gradient of B_train is
    not zero; and θ fitted for two people are comparable."""

    def __init__(self, layers, a=None, b=None, rank=1, seed=0, device=None):
        """layers: name -> nn.Linear. a, b: if None the paper's 100 and 50, or the width of the narrowest
        layer where that is less.

        ValueError where a or b exceeds that width. The basis itself is made when it is first used."""
        self.sizes = tuple((layer.in_features, layer.out_features) for layer in layers.values())
        narrowest = min(min(size) for size in self.sizes)
        self.a, self.b = a or min(100, narrowest), b or min(50, narrowest)
        if max(self.a, self.b) > narrowest:
            raise ValueError(f"a = {self.a} and b = {self.b} must not exceed the narrowest layer's width, "
                             f"{narrowest}")
        self.names, self.rank, self.seed, self.device = list(layers), rank, seed, device

    @property
    def shape(self):
        """(layers, r·(a + b)), the shape of one person's θ."""
        return len(self.names), self.rank * (self.a + self.b)

    @property
    def basis(self):
        """A₀ (a, r), and of each layer A_aux (in, a), whose columns are orthonormal, and B_aux (b, out),
        whose rows are."""
        return make_basis(self.sizes, self.a, self.b, self.rank, self.seed, self.device)[0]

    @property
    def checksum(self):
        """Of the basis, rounded to 4 decimals: equal on every machine where `seed` makes the same basis."""
        return make_basis(self.sizes, self.a, self.b, self.rank, self.seed, self.device)[1]

    def adapters(self, theta):
        """θ (P, *shape) -> name -> LowRank(A_aux·A_train, B_train·B_aux). ValueError for another shape."""
        if theta.shape[1:] != self.shape:
            raise ValueError(f"θ is {tuple(theta.shape)}, but this basis needs (people, {self.shape[0]}, "
                             f"{self.shape[1]})")
        a0, a_aux, b_aux = self.basis
        a_train, b_train = theta.split([self.rank * self.a, self.rank * self.b], dim=2)
        a_train = a0.to(theta) + a_train.unflatten(2, (self.a, self.rank))  # (P, layers, a, r)
        b_train = b_train.unflatten(2, (self.rank, self.b))                 # (P, layers, r, b)
        adapters = {}
        for i, name in enumerate(self.names):
            adapters[name] = LowRank(a_aux[i].to(theta) @ a_train[:, i], b_train[:, i] @ b_aux[i].to(theta))
        return adapters


@lru_cache(maxsize=2)
def make_basis(sizes, a, b, rank, seed, device):
    """((A₀, [A_aux …], [B_aux …]), checksum) for layers of these (in, out) sizes. It takes a second, once.
    One CPU generator draws everything, the bases in float64: `seed` makes the same basis on every device."""
    generator = torch.Generator().manual_seed(seed)
    a0 = torch.randn(a, rank, generator=generator, dtype=torch.float32, device="cpu") / a ** .5
    a_aux = [orthonormal(n_in, a, generator) for n_in, _ in sizes]
    b_aux = [orthonormal(n_out, b, generator).T for _, n_out in sizes]
    digits = [(t * 1e4).round().short().numpy().tobytes() for t in (a0, *a_aux, *b_aux)]
    basis = a0.to(device), [t.to(device) for t in a_aux], [t.to(device) for t in b_aux]
    return basis, zlib.crc32(b"".join(digits))


def orthonormal(rows, columns, generator):
    """Random (rows, columns) with orthonormal columns; in float64, and with fixed signs: as by any LAPACK."""
    q, r = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64, device="cpu"))
    return (q * r.diagonal().sign()).float()

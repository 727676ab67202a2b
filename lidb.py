"""Lightweight DreamBooth (arXiv 2307.06949, section 4.1): personal weights in a frozen random subspace.

Why A_aux and B_aux are frozen: a seed makes them again, so nobody stores or predicts them, and all people
share one space. Why they are orthonormal: ‖A_aux·v‖ = ‖v‖ in a layer of any width, so one scale of θ and one
learning rate suit all layers."""
import zlib
from functools import lru_cache

import torch
from torch import nn

from adapters import LowRank


def personal_layers(unet, text):
    """The personalised layers: name -> nn.Linear. On SD 1.5 these are 192, as in the paper's "386K" for
    rank-1 LoRA and "28k" for LiDB: attention (128) and GEGLU (16) of the UNet, attention (48) of the text
    encoder."""
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
    """The UNet's layers among `layers`."""
    return {name: layer for name, layer in layers.items() if name.startswith("unet.")}


class LiDB:
    """Eq. 1 for every layer at once: ΔW = A_aux · A_train · B_train · B_aux, which trains only A_train (a, r)
    and B_train (r, b).

    θ is one tensor (P, layers, r·(a + b)): for each layer A_train − A₀, then B_train. A₀ is random and the
    same for all people, so their θ can be compared. At θ = 0 B_train is 0: the model is unchanged, but
    B_train has a gradient."""

    def __init__(self, layers, a=None, b=None, rank=1, seed=0, device=None):
        """layers: name -> nn.Linear. a, b: None: the paper's 100 and 50, but at most the narrowest layer's
        width. ValueError if a or b exceeds that width. The first use makes the basis."""
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
        """A₀ (a, r), and for each layer A_aux (in, a) with orthonormal columns and B_aux (b, out) with
        orthonormal rows."""
        return make_basis(self.sizes, self.a, self.b, self.rank, self.seed, self.device)[0]

    @property
    def checksum(self):
        """A checksum of the basis, rounded to 4 decimals: equal wherever `seed` makes the same basis."""
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
    """((A₀, [A_aux …], [B_aux …]), checksum) for layers of these (in, out) sizes, kept because SD 1.5's takes
    1.4 s of a core. One CPU generator draws everything, so `seed` makes the same basis for every device."""
    generator = torch.Generator().manual_seed(seed)
    a0 = torch.randn(a, rank, generator=generator, dtype=torch.float32, device="cpu") / a ** .5
    a_aux = [orthonormal(n_in, a, generator) for n_in, _ in sizes]
    b_aux = [orthonormal(n_out, b, generator).T for _, n_out in sizes]
    digits = [(t * 1e4).round().short().numpy().tobytes() for t in (a0, *a_aux, *b_aux)]
    basis = a0.to(device), [t.to(device) for t in a_aux], [t.to(device) for t in b_aux]
    return basis, zlib.crc32(b"".join(digits))


def orthonormal(rows, columns, generator):
    """A random (rows, columns) with orthonormal columns; float64 and fixed signs make all LAPACKs agree."""
    q, r = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64, device="cpu"))
    return (q * r.diagonal().sign()).float()

"""The hypernetwork (arXiv 2307.06949, section 4.2, figure 4): one photo of a face in, LiDB weights θ out.

A ViT encodes the photo once. A small transformer decoder with one token per personalised layer then runs s
times: each pass sees the face and the last estimate, and predicts a correction (Eq. 3).

The paper does not say what the earlier passes should give. Here every estimate is trained to be useful:
train.py draws a number of passes for each sample, and the loss sees the estimate after that many. With the
loss on the last pass alone, earlier passes may do anything that helps it (on nano the second undid the
first)."""
from dataclasses import dataclass

import torch
from torch import nn

from vit import NANO_VIT, ViT, ViTConfig


@dataclass(frozen=True)
class HyperConfig:
    layers: int           # personalised layers, one token each
    size: int             # numbers of θ for each layer, r·(a + b)
    width: int = 160
    heads: int = 4
    depth: int = 2        # the paper's "2 hidden layers"
    iterations: int = 4   # s of Eq. 3; the same in training and use
    output_scale: float = .1  # T ends with this factor: for a usual θ̂ its heads then give about 1
    vit: ViTConfig = NANO_VIT
    basis_seed: int = 0   # of θ's LiDB basis
    encoder: str = ""     # an official ViT's name, which files store in place of its weights


class HyperNetwork(nn.Module):
    """T of Eq. 3 with its encoder: photos to θ̂. vit: an encoder of config.vit; None: a fresh one."""

    def __init__(self, config, vit=None):
        super().__init__()
        self.config = config
        self.vit = vit or ViT(config.vit)
        self.face = nn.Linear(config.vit.hidden_size, config.width)
        # no bias: θ̂ = 0 makes a token of zeros, as in the paper
        self.estimate = nn.Linear(config.size, config.width, bias=False)
        self.position = nn.Parameter(torch.empty(config.layers, config.width))
        nn.init.normal_(self.position, std=.02)
        layer = nn.TransformerDecoderLayer(config.width, config.heads, 4 * config.width, dropout=0.,
                                           activation="gelu", batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, config.depth, norm=nn.LayerNorm(config.width))
        # One linear head per layer. Zeros are a good start: since A₀ is not 0, B_train has a gradient there
        self.heads = nn.Parameter(torch.zeros(config.layers, config.width, config.size))
        self.bias = nn.Parameter(torch.zeros(config.layers, config.size))

    def forward(self, image, iterations=None):
        """Photos (B, 3, side, side), normalised for the encoder -> θ̂ (B, layers, size)."""
        return self.refine(self.vit(image), iterations)

    def refine(self, features, iterations=None):
        """ViT features f (B, n, d) -> θ̂_s (B, layers, size), the last pass's estimate.

        iterations: s; None: config's. ValueError if it is less than 1."""
        if iterations is not None and iterations < 1:
            raise ValueError(f"{iterations} iterations predict nothing")
        return self.passes(features, iterations)[-1]

    def passes(self, features, iterations=None):
        """Eq. 3, θ̂_k = θ̂_{k−1} + T(f, θ̂_{k−1}) with θ̂_0 = 0: ViT features f (B, n, d) -> θ̂_0, …, θ̂_s as
        one tensor (s + 1, B, layers, size). Every pass runs the same decoder; only θ̂_{k−1} changes."""
        steps = self.config.iterations if iterations is None else iterations
        face = self.face(features)
        estimates = [features.new_zeros(len(features), self.config.layers, self.config.size)]
        for _ in range(steps):
            estimates.append(estimates[-1] + self.correction(face, estimates[-1]))
        return torch.stack(estimates)

    def correction(self, face, theta):
        """T of Eq. 3: self.face(f) (B, n, width), an estimate θ̂ (B, layers, size) -> what to add to it."""
        tokens = self.estimate(theta / self.config.output_scale) + self.position
        delta = torch.einsum("bld,lds->bls", self.decoder(tokens, face), self.heads) + self.bias
        return self.config.output_scale * delta

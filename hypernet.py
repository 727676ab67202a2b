"""The hypernetwork (HyperDreamBooth, arXiv 2307.06949, section 4.2, figure 4): one photo of a face in, LiDB weights θ out.

A ViT encodes the photo once; a small transformer decoder with one token per personalised layer then runs s times, each pass looking at the
face and at its own last estimate and predicting a correction (Eq. 3).
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class ViTConfig:
    """Field names are those of transformers' ViTConfig, the last two those of its image processor, for values from 0 to 1."""
    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    layer_norm_eps: float = 1e-12
    image_mean: tuple = (.5, .5, .5)
    image_std: tuple = (.5, .5, .5)


VIT_H = ViTConfig()  # google/vit-huge-patch14-224-in21k
DINO_S = ViTConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6, patch_size=16)  # facebook/dino-vits16
NANO_VIT = ViTConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, image_size=128, patch_size=16,
                     layer_norm_eps=1e-6)


class SelfAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, d = c.num_attention_heads, c.hidden_size
        if d % self.heads:
            raise ValueError(f"{d} channels cannot be shared among {self.heads} heads")
        self.attention = nn.ModuleDict({k: nn.Linear(d, d) for k in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(d, d)})

    def forward(self, x):
        q, k, v = (self.attention[name](x).unflatten(2, (self.heads, -1)).transpose(1, 2) for name in ("query", "key", "value"))
        return self.output["dense"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.attention = SelfAttention(c)
        self.layernorm_after = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(c.hidden_size, c.intermediate_size)})
        self.output = nn.ModuleDict({"dense": nn.Linear(c.intermediate_size, c.hidden_size)})

    def forward(self, x):
        x = x + self.attention(self.layernorm_before(x))
        return x + self.output["dense"](F.gelu(self.intermediate["dense"](self.layernorm_after(x))))


class Embeddings(nn.Module):
    """Patches, a class token before them, and learnt positions that are stretched to other picture sizes."""

    def __init__(self, c):
        super().__init__()
        self.side = c.image_size // c.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.hidden_size))
        self.position_embeddings = nn.Parameter(torch.randn(1, self.side ** 2 + 1, c.hidden_size) * .02)
        self.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(3, c.hidden_size, c.patch_size, c.patch_size)})

    def forward(self, image):
        x = self.patch_embeddings["projection"](image)  # (B, d, h, w)
        first, rest = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        if x.shape[2:] != (self.side, self.side):
            grid = rest.transpose(1, 2).unflatten(2, (self.side, self.side))
            rest = F.interpolate(grid, x.shape[2:], mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(x), -1, -1) + first, x.flatten(2).transpose(1, 2) + rest], 1)


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al., 2010.11929) with the parameter names of transformers' ViTModel."""

    def __init__(self, config=VIT_H):
        super().__init__()
        if len(config.image_mean) != 3 or len(config.image_std) != 3:
            raise ValueError(f"a mean of {config.image_mean} and a deviation of {config.image_std} are not of three colours")
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))})
        self.layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, image):
        """image (B, 3, H, W), normalised as config says: in [-1, 1] for mean and deviation .5 -> (B, 1 + patches, d), class token first."""
        x = self.embeddings(image)
        for block in self.encoder["layer"]:
            x = block(x)
        return self.layernorm(x)


@dataclass(frozen=True)
class HyperConfig:
    layers: int           # personalised layers, one token each
    size: int             # numbers a layer, r·(a + b)
    width: int = 160
    heads: int = 4
    depth: int = 2        # the paper's "2 hidden layers"
    iterations: int = 4   # s of Eq. 3; the same in training and use
    output_scale: float = .1
    vit: ViTConfig = NANO_VIT


class HyperNetwork(nn.Module):
    """T of Eq. 3 with its encoder: photos to θ̂. vit: an encoder that is there already, of config.vit; a fresh one if None."""

    def __init__(self, config, vit=None):
        super().__init__()
        self.config, c = config, config
        self.vit = vit or ViT(c.vit)
        self.face = nn.Linear(c.vit.hidden_size, c.width)
        self.estimate = nn.Linear(c.size, c.width, bias=False)  # θ̂ = 0 makes a token of zeros, as the paper starts
        self.position = nn.Parameter(torch.randn(c.layers, c.width) * .02)
        layer = nn.TransformerDecoderLayer(c.width, c.heads, 4 * c.width, dropout=0., activation="gelu", batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, c.depth, norm=nn.LayerNorm(c.width))
        # One linear head per layer. They may start at zero, because θ = 0 is no saddle of LiDB's: A₀ is not zero.
        self.heads = nn.Parameter(torch.zeros(c.layers, c.width, c.size))
        self.bias = nn.Parameter(torch.zeros(c.layers, c.size))

    def forward(self, image, iterations=None):
        """Photos (B, 3, side, side), as the encoder takes them, -> θ̂ (B, layers, size)."""
        return self.refine(self.vit(image), iterations)

    def refine(self, features, iterations=None):
        """Eq. 3, θ̂_k = T(f, θ̂_{k−1}) with θ̂_0 = 0: ViT features f (B, n, d) -> θ̂_s (B, layers, size)."""
        face = self.face(features)
        theta = features.new_zeros(len(features), self.config.layers, self.config.size)
        for _ in range(iterations or self.config.iterations):
            tokens = self.estimate(theta / self.config.output_scale) + self.position
            delta = torch.einsum("bld,lds->bls", self.decoder(tokens, face), self.heads) + self.bias
            theta = theta + self.config.output_scale * delta
        return theta

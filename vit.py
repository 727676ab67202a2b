"""The vision transformer that looks at faces (Dosovitskiy et al., arXiv 2010.11929).

Parameters carry the names of transformers' ViTModel, so official files load with strict=True."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class ViTConfig:
    """The fields of transformers' ViTConfig, then mean and std of its image processor, for [0, 1]."""
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
DINO_S = ViTConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6,
                   patch_size=16)  # facebook/dino-vits16
NANO_VIT = ViTConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
                     image_size=128, patch_size=16, layer_norm_eps=1e-6)


class SelfAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        if width % heads:
            raise ValueError(f"{width} channels cannot be shared among {heads} heads")
        self.heads = heads
        self.attention = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width)})

    def forward(self, x):
        qkv = (self.attention[name](x) for name in ("query", "key", "value"))
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in qkv)  # (B, heads, n, d/heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.output["dense"](y.transpose(1, 2).flatten(2))  # (B, n, d)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.layernorm_before = nn.LayerNorm(width, config.layer_norm_eps)
        self.attention = SelfAttention(width, config.num_attention_heads)
        self.layernorm_after = nn.LayerNorm(width, config.layer_norm_eps)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = nn.ModuleDict({"dense": nn.Linear(hidden, width)})

    def forward(self, x):
        x = x + self.attention(self.layernorm_before(x))
        hidden = F.gelu(self.intermediate["dense"](self.layernorm_after(x)))
        return x + self.output["dense"](hidden)


class Embeddings(nn.Module):
    """A class token, patches, and learnt positions, which it stretches to other picture sizes."""

    def __init__(self, config):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.side = config.image_size // patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.empty(1, self.side ** 2 + 1, width))
        nn.init.normal_(self.position_embeddings, std=.02)
        self.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(3, width, patch, patch)})

    def forward(self, image):
        x = self.patch_embeddings["projection"](image)  # (B, d, h, w)
        first, rest = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        if x.shape[2:] != (self.side, self.side):
            grid = rest.transpose(1, 2).unflatten(2, (self.side, self.side))
            grid = F.interpolate(grid, x.shape[2:], mode="bicubic", align_corners=False)
            rest = grid.flatten(2).transpose(1, 2)
        first = self.cls_token.expand(len(x), -1, -1) + first
        return torch.cat([first, x.flatten(2).transpose(1, 2) + rest], 1)


class ViT(nn.Module):
    """Pictures to features. ValueError for heads that don't divide the width, or other than 3 colours."""

    def __init__(self, config=VIT_H):
        super().__init__()
        mean, deviation = config.image_mean, config.image_std
        if len(mean) != 3 or len(deviation) != 3:
            raise ValueError(f"a mean of {mean} and a deviation of {deviation} are not of three colours")
        self.config = config
        self.embeddings = Embeddings(config)
        blocks = nn.Sequential(*(Block(config) for _ in range(config.num_hidden_layers)))
        self.encoder = nn.ModuleDict({"layer": blocks})
        self.layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, image):
        """Normalised images (B, 3, H, W) → (B, 1 + patches, d): the class token, then the patches."""
        return self.layernorm(self.encoder["layer"](self.embeddings(image)))


@torch.no_grad()
def encode_face(vit, photo):
    """ViT features (B, n, d) of photos (B, 3, H, W) in [-1, 1], normalised here. ValueError for others."""
    if photo.dim() != 4 or photo.shape[1] != 3 or not photo.is_floating_point():
        raise ValueError(f"photos are (B, 3, H, W) in [-1, 1], not {photo.dtype} {tuple(photo.shape)}")
    side, weight = vit.config.image_size, vit.layernorm.weight
    photo = photo.float()
    if photo.shape[2:] != (side, side):
        photo = F.interpolate(photo, (side, side), mode="bicubic", antialias=True)
    # config's mean and std are for values in [0, 1]
    mean = 2 * photo.new_tensor(vit.config.image_mean).view(3, 1, 1)
    std = 2 * photo.new_tensor(vit.config.image_std).view(3, 1, 1)
    return vit(((photo - (mean - 1)) / std).to(weight.device, weight.dtype))

"""Stable Diffusion's autoencoder: pictures (B, 3, H, W) in [-1, 1] to latents (B, 4, H/8, W/8) and back.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2112.10752). Parameter names are diffusers' AutoencoderKL.
"""
from dataclasses import dataclass

import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class VAEConfig:
    """Field names are those of diffusers' vae/config.json."""
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple = (128, 256, 512, 512)  # one level each; all but the last halve the resolution
    layers_per_block: int = 2                         # the decoder has one more
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215                   # latents times this have about unit variance: what the UNet sees


SD15 = VAEConfig()
NANO = VAEConfig(block_out_channels=(16, 24, 48, 64), norm_num_groups=2, scaling_factor=1.0)


class ResnetBlock2D(nn.Module):
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """Single-head self-attention over all pixels."""

    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, H·W, C)
        q, k, v = (f(h)[:, None] for f in (self.to_q, self.to_k, self.to_v))
        h = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + h.transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    def __init__(self, c, groups):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock2D(c, c, groups), ResnetBlock2D(c, c, groups)])
        self.attentions = nn.ModuleList([Attention(c, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as the official weights were trained


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Resnet blocks at one resolution, then, where `resample` is Downsample or Upsample, a change of resolution."""

    def __init__(self, c_in, c_out, layers, groups, resample=None):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock2D(c_in if i == 0 else c_out, c_out, groups) for i in range(layers)])
        if resample:
            setattr(self, "downsamplers" if resample is Downsample else "upsamplers", nn.ModuleList([resample(c_out)]))

    def forward(self, x):
        for block in self.children():
            for layer in block:
                x = layer(x)
        return x


class Encoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        c, groups = cfg.block_out_channels, cfg.norm_num_groups
        self.conv_in = nn.Conv2d(cfg.in_channels, c[0], 3, padding=1)
        self.down_blocks = nn.ModuleList([
            Level(c[max(i - 1, 0)], c[i], cfg.layers_per_block, groups, Downsample if i + 1 < len(c) else None) for i in range(len(c))])
        self.mid_block = MidBlock(c[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, c[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(c[-1], 2 * cfg.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        c, groups = cfg.block_out_channels[::-1], cfg.norm_num_groups
        self.conv_in = nn.Conv2d(cfg.latent_channels, c[0], 3, padding=1)
        self.mid_block = MidBlock(c[0], groups)
        self.up_blocks = nn.ModuleList([
            Level(c[max(i - 1, 0)], c[i], cfg.layers_per_block + 1, groups, Upsample if i + 1 < len(c) else None) for i in range(len(c))])
        self.conv_norm_out = nn.GroupNorm(groups, c[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(c[-1], cfg.out_channels, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """`encode` a picture to the mean and log-variance of its latent; `decode` a latent. Neither applies `config.scaling_factor`."""

    def __init__(self, config=SD15):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, image):
        """image (B, 3, H, W) in [-1, 1], H and W divisible by 8 -> (mean, logvar), each (B, 4, H/8, W/8)."""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """z (B, 4, h, w) -> picture (B, 3, 8h, 8w), about [-1, 1] and not clamped."""
        return self.decoder(self.post_quant_conv(z))


def from_compvis(name):
    """Our name of a tensor of the CompVis single-file layout, its `first_stage_model.` prefix stripped. KeyError if it is none of the VAE's."""
    part, *rest = name.split(".")
    if part in ("quant_conv", "post_quant_conv"):
        return name
    if part not in ("encoder", "decoder"):
        raise KeyError(name)
    levels = len(SD15.block_out_channels)
    match rest:
        case ["conv_in" | "conv_out", _]:
            return name
        case ["norm_out", leaf]:
            return f"{part}.conv_norm_out.{leaf}"
        case ["mid", "attn_1", leaf, kind] if leaf in MID_ATTENTION:
            return f"{part}.mid_block.attentions.0.{MID_ATTENTION[leaf]}.{kind}"
        case ["mid", "block_1" | "block_2" as block, leaf, kind]:
            return f"{part}.mid_block.resnets.{int(block[-1]) - 1}.{leaf.replace('nin_shortcut', 'conv_shortcut')}.{kind}"
        case ["down", i, "block", j, leaf, kind]:
            return f"{part}.down_blocks.{i}.resnets.{j}.{leaf.replace('nin_shortcut', 'conv_shortcut')}.{kind}"
        case ["down", i, "downsample", "conv", kind]:
            return f"{part}.down_blocks.{i}.downsamplers.0.conv.{kind}"
        case ["up", i, "block", j, leaf, kind]:  # CompVis counts the decoder's levels from the picture, diffusers from the latent
            return f"{part}.up_blocks.{levels - 1 - int(i)}.resnets.{j}.{leaf.replace('nin_shortcut', 'conv_shortcut')}.{kind}"
        case ["up", i, "upsample", "conv", kind]:
            return f"{part}.up_blocks.{levels - 1 - int(i)}.upsamplers.0.conv.{kind}"
    raise KeyError(name)


# The attention's names in CompVis files (as 1×1 convolutions) and in the hub's older folders (as linear layers).
MID_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

"""Stable Diffusion's autoencoder: pictures (B, 3, H, W) in [-1, 1] to latents (B, 4, H/8, W/8) and back.

Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models (arXiv 2112.10752)."""
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from attention import attention

LARGE = 2 ** 19  # numbers in a feature map from which on the fast form of growing pays; nano's are smaller


@dataclass(frozen=True)
class VAEConfig:
    """The fields of diffusers' vae/config.json. Parameters have the names of its AutoencoderKL."""
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple = (128, 256, 512, 512)  # one level each; all but the last halve the sides
    layers_per_block: int = 2  # the decoder has one more
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # the UNet's latents are this times the VAE's: about unit variance


SD15 = VAEConfig()
NANO = VAEConfig(block_out_channels=(16, 24, 48, 64), norm_num_groups=2, scaling_factor=1.0)


class ResnetBlock(nn.Module):
    def __init__(self, width_in, width, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=1e-6)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.conv_shortcut(x) + y


class Attention(nn.Module):
    """Single-head self-attention over all pixels, as a residual."""

    def __init__(self, width, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])  # a list because the files say to_out.0

    def forward(self, x):
        y = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, h·w, c)
        q, k, v = (project(y)[:, None] for project in (self.to_q, self.to_k, self.to_v))
        y = attention(q, k, v)[:, 0]
        return x + self.to_out[0](y).transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    def __init__(self, width, groups):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width, width, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(width, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Grow(nn.Sequential):
    """Twice the sides by repeating pixels, then a convolution `conv`."""

    def forward(self, x):
        if x.device.type == "cpu" and x.shape[1:].numel() >= LARGE:
            return grown_in_four(x, self.conv.weight, self.conv.bias)
        return super().forward(x)


def grown_in_four(x, kernel, bias):
    """Grow's result for x (B, C, h, w) on a CPU, in 4/9 of the multiplications. A kernel of 3×3 sees only 2×2
    different pixels of x, some of them repeatedly: its weights for the same pixel are added first. There are
    four cases, because a pixel of the result is the first or the second of a pair in both directions."""
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1))
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    y = torch.empty(len(x), len(kernel), 2 * height, 2 * width, dtype=x.dtype, memory_format=layout)
    for row, of_rows in enumerate(halves(kernel, 2)):
        for column, of_both in enumerate(halves(of_rows, 3)):
            seen = padded[..., row:row + height + 1, column:column + width + 1]
            y[..., row::2, column::2] = F.conv2d(seen, of_both, bias)
    return y


def halves(kernel, dim):
    """The three weights along `dim` as two: for the first pixel of a repeated pair, and for the second."""
    first, second, third = kernel.unbind(dim)
    return torch.stack([first, second + third], dim), torch.stack([first + second, third], dim)


def levels(widths, layers, groups, samplers, kind, before, **options):
    """The resnets of each resolution and, under the name `samplers`, the step to the next one: a `kind` of
    `before` and a convolution."""
    levels, now = nn.Sequential(), widths[0]
    for i, width in enumerate(widths):
        widths_in = [now] + [width] * (layers - 1)
        level = nn.Sequential()
        level.resnets = nn.Sequential(*(ResnetBlock(n, width, groups) for n in widths_in))
        if i + 1 < len(widths):
            resample = OrderedDict(before=before, conv=nn.Conv2d(width, width, 3, **options))
            level.add_module(samplers, nn.Sequential(kind(resample)))
        levels.append(level)
        now = width
    return levels


def encoder(config):
    widths, groups = config.block_out_channels, config.norm_num_groups
    pad = nn.ZeroPad2d((0, 1, 0, 1))  # right and bottom only, as the weights were trained
    return nn.Sequential(OrderedDict(
        conv_in=nn.Conv2d(config.in_channels, widths[0], 3, padding=1),
        down_blocks=levels(widths, config.layers_per_block, groups, "downsamplers", nn.Sequential, pad,
                           stride=2),
        mid_block=MidBlock(widths[-1], groups),
        conv_norm_out=nn.GroupNorm(groups, widths[-1], eps=1e-6),
        conv_act=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)))


def decoder(config):
    widths, groups = config.block_out_channels[::-1], config.norm_num_groups
    double = nn.Upsample(scale_factor=2.0, mode="nearest")
    return nn.Sequential(OrderedDict(
        conv_in=nn.Conv2d(config.latent_channels, widths[0], 3, padding=1),
        mid_block=MidBlock(widths[0], groups),
        up_blocks=levels(widths, config.layers_per_block + 1, groups, "upsamplers", Grow, double,
                         padding=1),
        conv_norm_out=nn.GroupNorm(groups, widths[-1], eps=1e-6),
        conv_act=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)))


class VAE(nn.Module):
    """`encode` a picture to its latent's mean and log-variance, `decode` a latent; no scaling_factor here."""

    def __init__(self, config=SD15):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = encoder(config), decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, image):
        """image (B, 3, H, W) in [-1, 1], H and W divisible by 8 → (mean, logvar), each (B, 4, H/8, W/8)."""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """z (B, 4, h, w) → picture (B, 3, 8h, 8w), about [-1, 1] and not clamped."""
        return self.decoder(self.post_quant_conv(z))

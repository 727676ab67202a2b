"""The denoising UNet of Stable Diffusion 1.x: convolutions over latents, with cross-attention to the text.

Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models (arXiv 2112.10752), section 3.3.
Parameters carry the names that diffusers gives them, so official files load with strict=True."""
import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention import attention


@dataclass(frozen=True)
class UNetConfig:
    """The fields of diffusers' unet/config.json, levels from the finest on; the way up mirrors them."""
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple = (320, 640, 1280, 1280)
    down_block_types: tuple = 3 * ("CrossAttnDownBlock2D",) + ("DownBlock2D",)
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    attention_head_dim: int = 8  # despite its name the NUMBER of heads: SD 1.x files use it so
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int = 64  # height and width of the latents in training; a picture has 8 times that


ATTENDS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}  # to the text
SD15 = UNetConfig()
NANO = UNetConfig(block_out_channels=(48, 80, 160), layers_per_block=1, attention_head_dim=4, sample_size=16,
                  down_block_types=SD15.down_block_types[1:], cross_attention_dim=128, norm_num_groups=16)


class Attention(nn.Module):
    """Multi-head attention from x (B, n, c) to context (B, m, d); self-attention if the context is x."""

    def __init__(self, width, context_width, heads):
        super().__init__()
        if width % heads:
            raise ValueError(f"{width} channels cannot be shared among {heads} heads")
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])  # a list because the files say to_out.0

    def forward(self, x, context):
        qkv = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in qkv)  # (B, heads, n, c/heads)
        y = attention(q, k, v)
        return self.to_out[0](y.transpose(1, 2).flatten(2))  # (B, n, c)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward: each a residual with a norm before it."""

    def __init__(self, width, config):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1 = Attention(width, width, config.attention_head_dim)
        self.attn2 = Attention(width, config.cross_attention_dim, config.attention_head_dim)
        gated = nn.ModuleDict({"proj": nn.Linear(width, 8 * width)})  # net.0 in the files; net.1 was dropout
        self.ff = nn.ModuleDict({"net": nn.ModuleDict({"0": gated, "2": nn.Linear(4 * width, width)})})

    def forward(self, x, context):
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        # gated GELU (Shazeer, arXiv 2002.05202): one projection makes both values and gates
        value, gate = self.ff.net["0"].proj(self.norm3(x)).chunk(2, dim=-1)
        return x + self.ff.net["2"](value * F.gelu(gate))


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a feature map, as a residual."""

    def __init__(self, width, config):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, width, eps=1e-6)  # not norm_eps, as originally
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, config)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x, context):
        y = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, h·w, c)
        y = self.transformer_blocks[0](y, context)
        return x + self.proj_out(y.transpose(1, 2).reshape(x.shape))


class ResnetBlock(nn.Module):
    """Two convolutions as a residual, with the time added between them."""

    def __init__(self, width_in, width, config):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_num_groups, width_in, eps=config.norm_eps)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.block_out_channels[0], width)
        self.norm2 = nn.GroupNorm(config.norm_num_groups, width, eps=config.norm_eps)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x, time):
        y = self.conv1(F.silu(self.norm1(x)))
        y = y + self.time_emb_proj(F.silu(time))[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return self.conv_shortcut(x) + y


class Level(nn.Module):
    """The modules of one resolution: a resnet for each input width, each with a transformer or none."""

    def __init__(self, widths_in, width, attends, config):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width_in, width, config) for width_in in widths_in)
        self.attentions = nn.ModuleList(SpatialTransformer(width, config) for _ in widths_in if attends)
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()


def sinusoids(t, width):
    """Cosines and sines of the time steps t (B,) at falling frequencies: (B, width)."""
    half = width // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    frequency = torch.exp(-math.log(10000) * index / half)
    angle = t.float()[:, None] * frequency  # always fp32: bf16 can't tell step 999 from 1000
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class UNet(nn.Module):
    """Predicts the noise in x, a noisy latent, at time step t under the text features `context`.

    `gradient_checkpointing` computes the blocks again in backward: equal gradients, less memory, a third more
    time. KeyError for another down_block_type, ValueError for widths that norm_num_groups does not divide."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        widths, layers = config.block_out_channels, config.layers_per_block
        attends = [ATTENDS[kind] for kind in config.down_block_types]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        first, second = nn.Linear(widths[0], 4 * widths[0]), nn.Linear(4 * widths[0], 4 * widths[0])
        self.time_embedding = nn.Sequential(OrderedDict(linear_1=first, act=nn.SiLU(), linear_2=second))

        self.down_blocks = nn.ModuleList()
        skips, now = [widths[0]], widths[0]  # widths of the maps that forward() keeps, and of the present one
        for i, width in enumerate(widths):
            level = Level([now] + [width] * (layers - 1), width, attends[i], config)
            if i + 1 < len(widths):
                level.downsamplers.append(nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, 2, padding=1)}))
            self.down_blocks.append(level)
            skips += [width] * (layers + len(level.downsamplers))
            now = width

        self.mid_block = Level([now, now], now, False, config)
        self.mid_block.attentions.append(SpatialTransformer(now, config))  # one, between the two resnets

        self.up_blocks = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            widths_in = [n + skips.pop() for n in [now] + [width] * layers]
            level = Level(widths_in, width, attends[i], config)
            if i > 0:
                level.upsamplers.append(nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, padding=1)}))
            self.up_blocks.append(level)
            now = width

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, now, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(now, config.out_channels, 3, padding=1)

    def forward(self, x, t, context):
        """x (B, 4, h, w), t a number or (B,), context (B, n, cross_attention_dim) → noise (B, 4, h, w).
        x and context have the weights' dtype. PyTorch's RuntimeError if sizes disagree."""
        skips, time = self.down(x, t, context)
        x = skips[-1]
        x = self._run(self.mid_block.resnets[0], x, time)
        x = self._run(self.mid_block.attentions[0], x, context)
        x = self._run(self.mid_block.resnets[1], x, time)

        # The way up, with the maps kept on the way down
        for level in self.up_blocks:
            for i, resnet in enumerate(level.resnets):
                x = self._run(resnet, torch.cat([x, skips.pop()], dim=1), time)
                if level.attentions:
                    x = self._run(level.attentions[i], x, context)
            for up in level.upsamplers:
                size = skips[-1].shape[-2:]  # not twice x's: the way down rounded odd sizes up
                x = up["conv"](F.interpolate(x, size=size, mode="nearest"))

        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def down(self, x, t, context):
        """The first half of forward: (all feature maps (B, c, h, w), the embedded time (B, 4·c₀))."""
        wave = sinusoids(torch.as_tensor(t, device=x.device).expand(len(x)), self.conv_in.out_channels)
        time = self.time_embedding(wave.to(self.conv_in.weight.dtype))
        x = self.conv_in(x)
        skips = [x]
        for level in self.down_blocks:
            for i, resnet in enumerate(level.resnets):
                x = self._run(resnet, x, time)
                if level.attentions:
                    x = self._run(level.attentions[i], x, context)
                skips.append(x)
            for down in level.downsamplers:  # one, or none in the last level
                x = down["conv"](x)  # (B, c, ⌈h/2⌉, ⌈w/2⌉)
                skips.append(x)
        return skips, time

    def _run(self, block, *inputs):
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return block(*inputs)
        # no dropout, so no random state to keep
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)

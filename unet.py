"""The denoising UNet of Stable Diffusion 1.x, and its miniature.

Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models (arXiv 2112.10752), section 3.3: a convolutional
UNet over latents whose transformer blocks look at the text through cross-attention. Parameters carry the names that diffusers
gives them, so the official files load with strict=True; from_compvis() renames those of the original single-file layout.
"""
import math
import re
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a UNet; fields are named as in the config.json that diffusers puts beside the weights.

    down_block_types says level by level, from the finest, whether a level attends to the text ("CrossAttnDownBlock2D") or not
    ("DownBlock2D"); the way up mirrors it. attention_head_dim is, despite its name, the NUMBER of heads: that is how SD 1.x
    files use the field.
    """
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple = (320, 640, 1280, 1280)
    down_block_types: tuple = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    attention_head_dim: int = 8
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int = 64  # the latent that it was trained on: pictures of 8 times as many pixels


SD15 = UNetConfig()
NANO = UNetConfig(block_out_channels=(48, 80, 160), down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                  layers_per_block=1, cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16, sample_size=16)


class Attention(nn.Module):
    """Multi-head attention of x (B, n, c) to context (B, m, d); self-attention where the context is x."""

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
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, heads, n or m, c / heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](y.transpose(1, 2).flatten(2))  # (B, n, c)


class GEGLU(nn.Module):
    """Gated GELU (Shazeer, arXiv 2002.05202): one projection makes both the values and their gates."""

    def __init__(self, width, hidden):
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each normalised before and added to its input."""

    def __init__(self, width, context_width, heads):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1 = Attention(width, width, heads)
        self.attn2 = Attention(width, context_width, heads)
        net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))  # net.1 was dropout
        self.ff = nn.ModuleDict({"net": net})

    def forward(self, x, context):
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff["net"](self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a feature map, as a residual."""

    def __init__(self, width, config):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, width, eps=1e-6)  # not config.norm_eps: the original differs here
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, config.cross_attention_dim, config.attention_head_dim)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x, context):
        y = self.proj_in(self.norm(x))
        size = y.shape[-2:]
        y = y.flatten(2).transpose(1, 2)  # (B, h·w, c)
        y = self.transformer_blocks[0](y, context)
        y = y.transpose(1, 2).unflatten(2, size)  # (B, c, h, w)
        return x + self.proj_out(y)


class ResnetBlock(nn.Module):
    """Two convolutions as a residual, told the time between them."""

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
    """The modules of one resolution under the checkpoint's names: a resnet for each input width, and as many transformers or none."""

    def __init__(self, widths_in, width, attends, config):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(n, width, config) for n in widths_in)
        self.attentions = nn.ModuleList(SpatialTransformer(width, config) for _ in widths_in if attends)
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()


class TimeEmbedding(nn.Module):
    """Sinusoids of the time step (B,), cosines first, through a two-layer perceptron: (B, 4·width)."""

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.linear_1 = nn.Linear(width, 4 * width)
        self.linear_2 = nn.Linear(4 * width, 4 * width)

    def forward(self, t):
        half = self.width // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angle = t.float()[:, None] * frequency  # fp32 whatever the weights are: bf16 can't tell step 999 from 1000
        wave = torch.cat([angle.cos(), angle.sin()], dim=1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(wave)))


class UNet(nn.Module):
    """Predicts the noise in x, a noisy latent, at time step t under the text features `context`.

    Set `gradient_checkpointing` to True to recompute each block in the backward pass instead of keeping its activations: equal
    gradients, less memory, about a third more time.

    Raises KeyError for a down_block_type it doesn't know and ValueError for widths that norm_num_groups doesn't divide.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        widths, layers = config.block_out_channels, config.layers_per_block
        attends = [{"CrossAttnDownBlock2D": True, "DownBlock2D": False}[kind] for kind in config.down_block_types]
        last = len(widths) - 1

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0])

        self.down_blocks = nn.ModuleList()
        skips, now = [widths[0]], widths[0]  # the widths of what forward() keeps for the way up, and of what it holds
        for i, width in enumerate(widths):
            level = Level([now] + [width] * (layers - 1), width, attends[i], config)
            if i < last:
                level.downsamplers.append(nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, stride=2, padding=1)}))
            self.down_blocks.append(level)
            skips += [width] * (layers + (i < last))
            now = width

        self.mid_block = Level([now, now], now, False, config)
        self.mid_block.attentions.append(SpatialTransformer(now, config))  # one, between the two resnets

        self.up_blocks = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            level = Level([n + skips.pop() for n in [now] + [width] * layers], width, attends[i], config)
            if i > 0:
                level.upsamplers.append(nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, padding=1)}))
            self.up_blocks.append(level)
            now = width

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, now, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(now, config.out_channels, 3, padding=1)

    def forward(self, x, t, context):
        """x (B, 4, h, w) of any size, t a number or (B,), context (B, n, cross_attention_dim) → noise (B, 4, h, w).

        x and context have the dtype of the weights. Raises RuntimeError, as PyTorch does, when batch sizes or widths disagree.
        """
        time = self.time_embedding(torch.as_tensor(t, device=x.device).expand(len(x)))  # (B, 4·c₀)

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

        x = self._run(self.mid_block.resnets[0], x, time)
        x = self._run(self.mid_block.attentions[0], x, context)
        x = self._run(self.mid_block.resnets[1], x, time)

        for level in self.up_blocks:
            for i, resnet in enumerate(level.resnets):
                x = self._run(resnet, torch.cat([x, skips.pop()], dim=1), time)
                if level.attentions:
                    x = self._run(level.attentions[i], x, context)
            for up in level.upsamplers:
                size = skips[-1].shape[-2:]  # and not twice x's: an odd size was rounded up on the way down
                x = up["conv"](F.interpolate(x, size=size, mode="nearest"))

        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def _run(self, block, *inputs):
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)  # no dropout: nothing is random
        return block(*inputs)


OUTER = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
         "conv_norm_out": "out.0", "conv_out": "out.2"}
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}


def from_compvis(name):
    """Our name for a parameter of the original single-file layout, given without its prefix "model.diffusion_model.".

    Raises KeyError(name) for a name that no SD 1.x UNet has.
    """
    return _ours_by_compvis(SD15)[name]


@cache
def _ours_by_compvis(config):
    with torch.device("meta"):  # names only, no memory
        return {to_compvis(name): name for name in UNet(config).state_dict()}


def to_compvis(name):
    """The single-file layout's name for a parameter of an SD 1.x UNet: the inverse of from_compvis().

    That layout numbers blocks straight through the levels: on the way down input_blocks.0 is conv_in, then each level has two
    resnets and a downsampler; on the way up each has three resnets, the last sharing its block with the upsampler.
    """
    stem, kind = name.rsplit(".", 1)
    if stem in OUTER:
        return f"{OUTER[stem]}.{kind}"
    way, level, part, i, inner = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d)\.)?(\w+)\.(\d)\.(.+)", stem).groups()
    i, level = int(i), int(level or 0)
    if part == "resnets":
        inner = RESNET[inner]
    if part == "downsamplers":
        return f"input_blocks.{3 * level + 3}.0.op.{kind}"
    if part == "upsamplers":
        return f"output_blocks.{3 * level + 2}.{1 if level == 0 else 2}.conv.{kind}"  # the coarsest level has no transformer before it
    if way == "mid":
        return f"middle_block.{1 if part == 'attentions' else 2 * i}.{inner}.{kind}"
    block = f"input_blocks.{3 * level + 1 + i}" if way == "down" else f"output_blocks.{3 * level + i}"
    return f"{block}.{int(part == 'attentions')}.{inner}.{kind}"

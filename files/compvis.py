"""Translate names of tensors between ours and those of the original (CompVis) single-file layout of Stable
Diffusion 1.x or of older hub folders. VAE and UNET: our parts of names -> theirs, applied in this order."""
from functools import cache, partial

import torch

import unet
import vae

VAE = {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "resnets": "block",
       "down_blocks": "down", "downsamplers.0": "downsample", "upsamplers.0": "upsample",
       "mid_block.block.0": "mid.block_1", "mid_block.block.1": "mid.block_2",
       "mid_block.attentions.0": "mid.attn_1", "attn_1.group_norm": "attn_1.norm",
       "attn_1.to_out.0": "attn_1.proj_out", "attn_1.to_": "attn_1.",
       # the original counts the levels of the decoder from the picture, ours from the latent
       **{f"up_blocks.{level}": f"up.{3 - level}" for level in range(4)}}

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
          "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
UNET = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
        **{f"resnets.{i}.{a}": f"resnets.{i}.{b}" for i in range(3) for a, b in RESNET.items()},
        "mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2",
        "mid_block.attentions.0": "middle_block.1"}
# The original numbers blocks through all levels; a block is a resnet and its transformer. On the way down,
# input_blocks.0 is conv_in, and each level has two blocks and a downsampler. On the way up, each level has
# three blocks, and the last contains the upsampler; on the coarsest level there are no transformers.
for level in range(4):
    for i in range(3):
        for part, place in ("resnets", 0), ("attentions", 1):
            UNET[f"down_blocks.{level}.{part}.{i}"] = f"input_blocks.{3 * level + 1 + i}.{place}"
            UNET[f"up_blocks.{level}.{part}.{i}"] = f"output_blocks.{3 * level + i}.{place}"
    UNET[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{3 * level + 3}.0.op"
    UNET[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{3 * level + 2}.{2 if level else 1}"

# names in older folders -> ours
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
KNOWN_EXTRAS = {f"{tower}_model.embeddings.position_ids" for tower in ("text", "vision")}  # 0, 1, 2, ...


def renamed(name, rules):
    for before, after in rules.items():
        name = name.replace(before, after)
    return name


# Our names -> those in a single file, without the prefixes "model.diffusion_model." and "first_stage_model."
unet_to_compvis = partial(renamed, rules=UNET)
vae_to_compvis = partial(renamed, rules=VAE)
# names of a VAE in a folder, perhaps an older one -> ours
folder_vae_name = partial(renamed, rules=OLD_ATTENTION)


@cache
def inverse(to_compvis, kind, config):
    with torch.device("meta"):  # names only, no memory
        return {to_compvis(name): name for name in kind(config).state_dict()}


def ours(to_compvis, kind, config, key):
    """Our name in an SD 1.x that to_compvis() turns into `key`; KeyError(key) if there is none."""
    return inverse(to_compvis, kind, config)[key]


unet_name = partial(ours, unet_to_compvis, unet.UNet, unet.SD15)
vae_name = partial(ours, vae_to_compvis, vae.VAE, vae.SD15)


def text_name(key):
    """Our name for a text encoder's key in a folder or, without "cond_stage_model.transformer.", in a single
    file; None if it is not needed. Some old files, and transformers from 5.6 on, leave out "text_model."."""
    name = "text_model." + key.removeprefix("text_model.")
    # text_projection maps into the space shared with pictures, which is not needed here
    return None if key == "text_projection.weight" or name in KNOWN_EXTRAS else name

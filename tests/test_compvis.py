"""files/compvis.py against the names and shapes that the original constructors make."""
import pytest
import torch

import clip
import unet
import vae
from files import compvis


def shapes(kind, config):
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in kind(config).state_dict().items()}


def unet_shapes():
    """The parameters of CompVis's UNetModel as its constructor makes them: model_channels 320, channel_mult
    1, 2, 4, 4."""
    shapes = {}

    def add(name, *weight, bias=True):
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = weight[:1]

    def resblock(name, n, c):
        add(f"{name}.in_layers.0", n), add(f"{name}.in_layers.2", c, n, 3, 3)
        add(f"{name}.emb_layers.1", c, 1280)
        add(f"{name}.out_layers.0", c), add(f"{name}.out_layers.3", c, c, 3, 3)
        if n != c:
            add(f"{name}.skip_connection", c, n, 1, 1)

    def transformer(name, c):
        add(f"{name}.norm", c), add(f"{name}.proj_in", c, c, 1, 1), add(f"{name}.proj_out", c, c, 1, 1)
        block = f"{name}.transformer_blocks.0"
        for attn, d in (("attn1", c), ("attn2", 768)):
            add(f"{block}.{attn}.to_q", c, c, bias=False), add(f"{block}.{attn}.to_out.0", c, c)
            add(f"{block}.{attn}.to_k", c, d, bias=False), add(f"{block}.{attn}.to_v", c, d, bias=False)
        add(f"{block}.ff.net.0.proj", 8 * c, c), add(f"{block}.ff.net.2", c, 4 * c)
        add(f"{block}.norm1", c), add(f"{block}.norm2", c), add(f"{block}.norm3", c)

    add("time_embed.0", 1280, 320), add("time_embed.2", 1280, 1280), add("input_blocks.0.0", 320, 4, 3, 3)
    stack, now, block = [320], 320, 1
    for level, mult in enumerate((1, 2, 4, 4)):
        for _ in range(2):
            resblock(f"input_blocks.{block}.0", now, 320 * mult)
            now = 320 * mult
            if level < 3:
                transformer(f"input_blocks.{block}.1", now)
            stack, block = stack + [now], block + 1
        if level < 3:
            add(f"input_blocks.{block}.0.op", now, now, 3, 3)
            stack, block = stack + [now], block + 1
    resblock("middle_block.0", now, now), transformer("middle_block.1", now)
    resblock("middle_block.2", now, now)
    block = 0
    for level, mult in reversed(list(enumerate((1, 2, 4, 4)))):
        for i in range(3):
            resblock(f"output_blocks.{block}.0", now + stack.pop(), 320 * mult)
            now = 320 * mult
            if level < 3:
                transformer(f"output_blocks.{block}.1", now)
            if level and i == 2:
                add(f"output_blocks.{block}.{2 if level < 3 else 1}.conv", now, now, 3, 3)
            block += 1
    add("out.0", 320), add("out.2", 4, 320, 3, 3)
    return shapes


def vae_shapes():
    """The parameters of CompVis's AutoencoderKL as its constructors make them: ch 128, ch_mult 1, 2, 4, 4,
    two resnets a level."""
    shapes = {}

    def add(name, *weight):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    def resblock(name, n, c):
        add(f"{name}.norm1", n), add(f"{name}.conv1", c, n, 3, 3)
        add(f"{name}.norm2", c), add(f"{name}.conv2", c, c, 3, 3)
        if n != c:
            add(f"{name}.nin_shortcut", c, n, 1, 1)

    def middle(name):
        resblock(f"{name}.block_1", 512, 512), resblock(f"{name}.block_2", 512, 512)
        add(f"{name}.attn_1.norm", 512)
        for leaf in ("q", "k", "v", "proj_out"):
            add(f"{name}.attn_1.{leaf}", 512, 512, 1, 1)

    widths, now = (128, 256, 512, 512), 128
    add("encoder.conv_in", 128, 3, 3, 3)
    for level, width in enumerate(widths):
        for i in range(2):
            resblock(f"encoder.down.{level}.block.{i}", now, width)
            now = width
        if level < 3:
            add(f"encoder.down.{level}.downsample.conv", now, now, 3, 3)
    middle("encoder.mid"), add("encoder.norm_out", 512), add("encoder.conv_out", 8, 512, 3, 3)
    add("quant_conv", 8, 8, 1, 1), add("post_quant_conv", 4, 4, 1, 1)
    add("decoder.conv_in", 512, 4, 3, 3), middle("decoder.mid")
    for level, width in reversed(list(enumerate(widths))):
        for i in range(3):
            resblock(f"decoder.up.{level}.block.{i}", now, width)
            now = width
        if level > 0:
            add(f"decoder.up.{level}.upsample.conv", now, now, 3, 3)
    add("decoder.norm_out", 128), add("decoder.conv_out", 3, 128, 3, 3)
    return shapes


def test_unet_names_map_one_to_one():
    theirs, ours = unet_shapes(), shapes(unet.UNet, unet.SD15)
    assert len(theirs) == len(ours)
    assert {compvis.unet_name(name): shape for name, shape in theirs.items()} == ours
    assert all(compvis.unet_to_compvis(compvis.unet_name(name)) == name for name in theirs)


def test_vae_names_map_one_to_one():
    theirs, ours = vae_shapes(), shapes(vae.VAE, vae.SD15)
    assert len(theirs) == len(ours)
    # the attention's four layers are 1x1 convolutions there and linear here
    flat = {name: shape[:2] if "attn_1" in name else shape for name, shape in theirs.items()}
    assert {compvis.vae_name(name): shape for name, shape in flat.items()} == ours
    assert all(compvis.vae_to_compvis(compvis.vae_name(name)) == name for name in theirs)


OTHERS = {
    compvis.unet_name: [
        "", "label_emb.0.0.weight", "input_blocks.3.0.in_layers.0.weight", "conv_in.weight",
        "input_blocks.4.1.transformer_blocks.1.attn1.to_q.weight", "input_blocks.12.0.in_layers.0.weight",
        "input_blocks.1.1.proj_in.lora_down.weight", "output_blocks.2.2.conv.weight",
        "middle_block.1.in_layers.0.weight"],
    compvis.vae_name: [
        "", "loss.logvar", "encoder.down.0.attn.0.q.weight", "encoder.mid_block.resnets.0.conv1.weight",
        "decoder.mid.attn_1.to_q.weight", "decoder.up.4.block.0.conv1.weight"]}


def test_other_names_are_refused():
    for read, names in OTHERS.items():
        for name in names:
            with pytest.raises(KeyError) as error:
                read(name)
            assert error.value.args == (name,)


def test_vae_names_in_older_folders():
    middle = "encoder.mid_block.attentions.0"
    for old, ours in ("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"):
        assert compvis.folder_vae_name(f"{middle}.{old}.weight") == f"{middle}.{ours}.weight"
    for name in shapes(vae.VAE, vae.SD15):
        assert compvis.folder_vae_name(name) == name


def test_text_names():
    ours = set(shapes(clip.TextTransformer, clip.SD15))
    assert {compvis.text_name(name) for name in ours} == ours
    assert {compvis.text_name(name.removeprefix("text_model.")) for name in ours} == ours
    for name in "text_model.embeddings.position_ids", "embeddings.position_ids", "text_projection.weight":
        assert compvis.text_name(name) is None

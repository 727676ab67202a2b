from functools import cache
from pathlib import Path

import pytest
import torch
from rule import difference, draw, fill
from safetensors.torch import load_file

import vae

# SD 1.5's levels, blocks and groups at a quarter of its width.
SMALL = vae.VAEConfig(block_out_channels=(32, 64, 96, 128))
CONFIGS = {"small": SMALL, "nano": vae.NANO}


@cache
def model(kind):
    return fill(vae.VAE(CONFIGS[kind]))


@cache
def stored():
    return load_file(Path(__file__).parent / "reference/vae.safetensors")


@cache
def sd15():
    with torch.device("meta"):
        return vae.VAE(vae.SD15)


def test_sd15_is_the_official_size():
    shapes = {name: tuple(p.shape) for name, p in sd15().state_dict().items()}
    assert sum(p.numel() for p in sd15().parameters()) == 83_653_863
    assert len(shapes) == 248
    known = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": (256, 128, 1, 1),
        "encoder.down_blocks.2.downsamplers.0.conv.weight": (512, 512, 3, 3),
        "encoder.mid_block.attentions.0.group_norm.weight": (512,),
        "encoder.mid_block.attentions.0.to_q.weight": (512, 512),
        "encoder.conv_norm_out.bias": (512,),
        "encoder.conv_out.weight": (8, 512, 3, 3),
        "quant_conv.weight": (8, 8, 1, 1),
        "post_quant_conv.weight": (4, 4, 1, 1),
        "decoder.conv_in.weight": (512, 4, 3, 3),
        "decoder.mid_block.attentions.0.to_out.0.bias": (512,),
        "decoder.up_blocks.0.upsamplers.0.conv.weight": (512, 512, 3, 3),
        "decoder.up_blocks.3.resnets.0.conv1.weight": (128, 256, 3, 3),
        "decoder.conv_out.weight": (3, 128, 3, 3),
    }
    assert {name: shapes.get(name) for name in known} == known


@pytest.mark.parametrize("height, width", [(512, 512), (384, 576), (8, 24)])
def test_sd15_latents_are_an_eighth_of_the_picture(height, width):
    with torch.device("meta"):
        mean, logvar = sd15().encode(torch.empty(2, 3, height, width))
        assert mean.shape == logvar.shape == (2, 4, height // 8, width // 8)
        assert sd15().decode(mean).shape == (2, 3, height, width)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("size", ["64x64", "40x56"])
def test_encode_equals_diffusers(kind, size):
    case = f"{kind} {size}"
    height, width = map(int, size.split("x"))
    with torch.no_grad():
        mean, logvar = model(kind).encode(draw((1, 3, height, width), f"{case}:image"))
    assert difference(mean, stored()[f"{case} mean"]) <= 1e-4
    assert difference(logvar, stored()[f"{case} logvar"]) <= 1e-4


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("size", ["64x64", "40x56"])
def test_decode_equals_diffusers(kind, size):
    case = f"{kind} {size}"
    height, width = map(int, size.split("x"))
    with torch.no_grad():
        image = model(kind).decode(draw((1, 4, height // 8, width // 8), f"{case}:z"))
    assert difference(image, stored()[f"{case} image"]) <= 1e-4


def test_group_norms_have_the_official_eps():
    """Too small a thing for the comparison with diffusers to see."""
    eps = [m.eps for m in sd15().modules() if isinstance(m, torch.nn.GroupNorm)]
    assert eps == [1e-6] * (2 * (10 + 14) + 2 + 2)


def test_log_variance_is_bounded():
    loud = fill(vae.VAE(vae.NANO))
    with torch.no_grad():
        loud.quant_conv.weight.mul_(1e3)
        mean, logvar = loud.encode(draw((1, 3, 16, 16), 0))
    assert mean.abs().max() > 100
    assert (logvar.min(), logvar.max()) == (-30, 20)


def test_samples_of_a_batch_are_independent():
    images = draw((3, 3, 16, 24), "images")
    with torch.no_grad():
        mean, _ = model("nano").encode(images)
        alone = torch.cat([model("nano").encode(image[None])[0] for image in images])
        assert difference(mean, alone) < 1e-5
        assert difference(model("nano").decode(mean), torch.cat([model("nano").decode(z[None]) for z in mean])) < 1e-5


def test_half_precision_stays_close():
    half = fill(vae.VAE(vae.NANO)).bfloat16()
    image = draw((1, 3, 16, 24), "half")
    with torch.no_grad():
        mean, _ = model("nano").encode(image)
        assert difference(half.encode(image.bfloat16())[0].float(), mean) < 5e-2
        assert difference(half.decode(mean.bfloat16()).float(), model("nano").decode(mean)) < 5e-2


def compvis_shapes():
    """The parameters of CompVis's AutoencoderKL as its constructors make them: ch 128, ch_mult 1, 2, 4, 4, two resnets a level."""
    shapes = {}

    def add(name, *weight):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    def resblock(name, n, c):
        add(f"{name}.norm1", n), add(f"{name}.conv1", c, n, 3, 3), add(f"{name}.norm2", c), add(f"{name}.conv2", c, c, 3, 3)
        if n != c:
            add(f"{name}.nin_shortcut", c, n, 1, 1)

    def middle(name):
        resblock(f"{name}.block_1", 512, 512), resblock(f"{name}.block_2", 512, 512), add(f"{name}.attn_1.norm", 512)
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


def test_single_file_names_map_one_to_one():
    theirs = compvis_shapes()
    ours = {name: tuple(p.shape) for name, p in sd15().state_dict().items()}
    assert len(theirs) == len(ours)
    # the attention's four layers are 1x1 convolutions there and linear here
    assert {vae.from_compvis(name): shape[:2] if "attn_1" in name else shape for name, shape in theirs.items()} == ours


@pytest.mark.parametrize("name", ["", "loss.logvar", "encoder.down.0.attn.0.q.weight", "encoder.mid_block.resnets.0.conv1.weight",
                                  "decoder.mid.attn_1.to_q.weight"])
def test_other_single_file_names_are_refused(name):
    with pytest.raises(KeyError, match=f"^'{name}'$"):
        vae.from_compvis(name)

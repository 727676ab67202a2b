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


@pytest.mark.parametrize("large", [0, vae.LARGE])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("height, width", [(64, 64), (40, 56)])
def test_encode_and_decode_equal_diffusers(kind, height, width, large, monkeypatch):
    monkeypatch.setattr(vae, "LARGE", large)
    case = f"{kind} {height}x{width}"
    with torch.no_grad():
        mean, logvar = model(kind).encode(draw((1, 3, height, width), f"{case}:image"))
        image = model(kind).decode(draw((1, 4, height // 8, width // 8), f"{case}:z"))
    for name, ours in ("mean", mean), ("logvar", logvar), ("image", image):
        assert difference(ours, stored()[f"{case} {name}"]) <= 1e-4, name


@pytest.mark.parametrize("dtype, off", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_growing_in_four_equals_growing(dtype, off):
    """For an odd height too, with gradients."""
    double = torch.nn.Upsample(scale_factor=2.)
    levels = fill(vae.levels((8, 8), 1, 2, "upsamplers", vae.Grow, double, padding=1))
    grow, x = levels[0].upsamplers[0].to(dtype), draw((2, 8, 5, 6), "x").to(dtype).requires_grad_()
    for layout in torch.contiguous_format, torch.channels_last:
        four = vae.grown_in_four(x.to(memory_format=layout), grow.conv.weight, grow.conv.bias)
        assert four.is_contiguous(memory_format=layout)
    plain = grow(x)
    assert plain.shape == (2, 8, 10, 12) and four.dtype == dtype and difference(four, plain) <= off
    gradients = [torch.autograd.grad(y.float().pow(2).sum(), [x, *grow.parameters()]) for y in (plain, four)]
    for one, other in zip(*gradients):
        assert difference(other, one) <= 2 * off


def test_a_large_feature_map_grows_in_four(monkeypatch):
    used, grow = [], vae.Grow()
    grow.add_module("conv", torch.nn.Conv2d(128, 2, 3, padding=1))
    monkeypatch.setattr(vae, "grown_in_four", lambda x, kernel, bias: used.append(len(x)))
    grow(torch.zeros(2, 128, 64, 64))
    assert used == [2] and vae.LARGE == 128 * 64 * 64
    grow(torch.zeros(2, 128, 63, 64))
    assert used == [2]


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
        alone = torch.cat([model("nano").decode(z[None]) for z in mean])
        assert difference(model("nano").decode(mean), alone) < 1e-5


def test_half_precision_stays_close():
    half = fill(vae.VAE(vae.NANO)).bfloat16()
    image = draw((1, 3, 16, 24), "half")
    with torch.no_grad():
        mean, _ = model("nano").encode(image)
        assert difference(half.encode(image.bfloat16())[0].float(), mean) < 5e-2
        assert difference(half.decode(mean.bfloat16()).float(), model("nano").decode(mean)) < 5e-2

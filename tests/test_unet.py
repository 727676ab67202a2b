import re
from functools import cache
from pathlib import Path

import pytest
import torch
from rule import difference, draw, fill
from safetensors.torch import load_file

import unet

# SD 1.5's levels, blocks, heads and groups at a tenth of its width.
SMALL = unet.UNetConfig(block_out_channels=(32, 64, 96, 96), cross_attention_dim=24)
CONFIGS = {"small": SMALL, "nano": unet.NANO}


def inputs(case, shape):
    """The inputs of a stored output: its name and its shape say which."""
    config = CONFIGS[case.split()[0]]
    context = draw((shape[0], 7, config.cross_attention_dim), f"{case}:context")
    return draw(shape, f"{case}:x"), torch.tensor([1, 981]), context


@cache
def sd15():
    with torch.device("meta"):
        return unet.UNet(unet.SD15)


@cache
def nano():
    return fill(unet.UNet(unet.NANO))


def test_sd15_is_the_official_size():
    shapes = {name: tuple(p.shape) for name, p in sd15().state_dict().items()}
    assert sum(p.numel() for p in sd15().parameters()) == 859_520_964
    assert len(shapes) == 686
    known = {
        "conv_in.weight": (320, 4, 3, 3),
        "time_embedding.linear_1.weight": (1280, 320),
        "down_blocks.0.resnets.0.time_emb_proj.weight": (320, 1280),
        "down_blocks.1.resnets.0.conv_shortcut.weight": (640, 320, 1, 1),
        "down_blocks.0.attentions.0.proj_in.weight": (320, 320, 1, 1),
        "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0.bias": (320,),
        "down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
        "down_blocks.2.downsamplers.0.conv.weight": (1280, 1280, 3, 3),
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
        "mid_block.resnets.1.conv2.weight": (1280, 1280, 3, 3),
        "up_blocks.0.upsamplers.0.conv.bias": (1280,),
        "up_blocks.1.resnets.2.conv1.weight": (1280, 1920, 3, 3),
        "up_blocks.3.resnets.0.norm1.weight": (960,),
        "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.2.weight": (320, 1280),
        "conv_norm_out.weight": (320,),
        "conv_out.weight": (4, 320, 3, 3),
    }
    assert {name: shapes.get(name) for name in known} == known


@pytest.mark.parametrize("size", [(64, 64), (48, 72), (9, 13)])
def test_sd15_keeps_the_shape_of_its_input(size):
    with torch.device("meta"):
        assert sd15()(torch.empty(2, 4, *size), 500, torch.empty(2, 77, 768)).shape == (2, 4, *size)


def test_nano_is_small_and_keeps_the_shape_of_its_input():
    assert 5.0e6 < sum(p.numel() for p in nano().parameters()) < 5.5e6
    with torch.no_grad():
        for size in [(16, 16), (8, 12), (5, 7)]:
            assert nano()(draw((1, 4, *size), 0), 500, draw((1, 7, 128), 1)).shape == (1, 4, *size)


@pytest.mark.parametrize("case", ["small 16x16", "small 9x13", "nano 16x16", "nano 7x10"])
def test_equals_diffusers(case):
    stored = load_file(Path(__file__).parent / "reference/unet.safetensors")[case]
    model = fill(unet.UNet(CONFIGS[case.split()[0]]))
    with torch.no_grad():
        assert difference(model(*inputs(case, stored.shape)), stored) <= 1e-4


def test_group_norms_have_the_official_eps():
    """Too small a thing for the comparison with diffusers to see."""
    eps = {name: m.eps for name, m in sd15().named_modules() if isinstance(m, torch.nn.GroupNorm)}
    assert len(eps) == 2 * 22 + 16 + 1
    assert eps == {name: 1e-6 if "attentions" in name else 1e-5 for name in eps}


def test_one_time_step_for_all_equals_one_for_each():
    x, _, context = inputs("nano t", (2, 4, 8, 8))
    with torch.no_grad():
        each = nano()(x, torch.tensor([500, 500]), context)
        for t in (500, 500.0, torch.tensor(500), torch.tensor([500]), torch.tensor([500., 500.])):
            assert torch.equal(nano()(x, t, context), each)
        assert difference(nano()(x, 501, context), each) > 1e-3


def test_samples_of_a_batch_are_independent():
    x, _, context = inputs("nano batch", (3, 4, 8, 8))
    t = torch.tensor([3, 500, 998])
    with torch.no_grad():
        together = nano()(x, t, context)
        alone = torch.cat([nano()(x[i:i + 1], t[i], context[i:i + 1]) for i in range(3)])
    assert difference(together, alone) < 1e-5


def test_checkpointing_gives_equal_gradients():
    x, t, context = inputs("nano checkpoint", (2, 4, 8, 8))
    model = fill(unet.UNet(unet.NANO))
    calls = []
    model.up_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients():
        model.zero_grad()
        latent, text = x.clone().requires_grad_(), context.clone().requires_grad_()
        model(latent, t, text).square().mean().backward()
        return [latent.grad, text.grad, *(p.grad.clone() for p in model.parameters())]

    plain = gradients()
    assert len(calls) == 1
    model.gradient_checkpointing = True
    again = gradients()
    assert len(calls) == 3  # computed a second time for the backward pass
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


def test_half_precision_stays_close():
    x, _, context = inputs("nano half", (2, 4, 8, 8))
    t = torch.tensor([998, 999])  # equal in bf16, so the sinusoids have to be made before the cast
    half = fill(unet.UNet(unet.NANO)).bfloat16()
    with torch.no_grad():
        y = half(x.bfloat16(), t, context.bfloat16())
        assert y.dtype == torch.bfloat16
        assert difference(y.float(), nano()(x, t, context)) < 5e-2


def test_attention_and_gate_layers_see_one_row_of_tokens_per_sample():
    """What lets a forward hook add another residual for each sample."""
    seen, handles = {}, []
    for name, module in sd15().named_modules():
        if re.search(r"attn[12]\.to_(q|k|v|out\.0)$|ff\.net\.0\.proj$", name):
            assert isinstance(module, torch.nn.Linear)
            def see(_, args, y, name=name):
                seen[name] = args[0].shape, y.shape
            handles.append(module.register_forward_hook(see))
    with torch.device("meta"):
        sd15()(torch.empty(3, 4, 16, 16), 0, torch.empty(3, 77, 768))
    for handle in handles:
        handle.remove()
    assert len(seen) == 128 + 16
    assert all(len(x) == len(y) == 3 and x[0] == y[0] == 3 and x[1] == y[1] for x, y in seen.values())
    assert seen["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"] == ((3, 77, 768), (3, 77, 320))


def test_wrong_configurations_and_inputs_are_refused():
    with pytest.raises(KeyError, match="AttnDownBlock3D"):
        unet.UNet(unet.UNetConfig(down_block_types=("AttnDownBlock3D",) * 4))
    with pytest.raises(ValueError):
        unet.UNet(unet.UNetConfig(block_out_channels=(33, 64)))
    x, context = draw((2, 4, 8, 8), 0), draw((2, 7, 128), 1)
    with pytest.raises(RuntimeError):
        nano()(x, torch.tensor([1, 2, 3]), context)
    with pytest.raises(RuntimeError):
        nano()(x, 1, draw((2, 7, 127), 1))
    with pytest.raises(RuntimeError):
        nano()(x, 1, context.expand(3, 2, 7, 128)[:, 0])

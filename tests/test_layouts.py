"""Small models from files: they are loaded exactly, what can't be is refused in one line that says why."""
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import FILE, MERGES, SMALL, VOCAB, parts, state, write_folder

import clip
import sd
import unet
from files import layouts
from files.checkpoints import alike, checksum
from files.compvis import unet_to_compvis, vae_to_compvis
from files.disk import LoadError
from files.tokenizers import write_tokenizer

CONTEXT = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
TOKENIZER = clip.Tokenizer(VOCAB, MERGES, 24)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("original") / "model")
    save_file(single(), folder.parent / "single.safetensors")
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy of the original to spoil."""
    return shutil.copytree(original, tmp_path / "model")


@cache
def single():
    """The tensors of a single-file checkpoint, with the extras of the official ones."""
    tensors = {f"model.diffusion_model.{unet_to_compvis(name)}": p for name, p in state("unet").items()}
    for name, p in state("vae").items():
        convolution = ".attentions.0.to_" in name and name.endswith("weight")
        tensors[f"first_stage_model.{vae_to_compvis(name)}"] = p[:, :, None, None] if convolution else p
    tensors |= {f"cond_stage_model.transformer.{name}": p for name, p in state("text_encoder").items()}
    for name in ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_recipm1_alphas_cumprod",
                 "log_one_minus_alphas_cumprod", "posterior_mean_coef1"):
        tensors[name] = torch.ones(9)
    return tensors | {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "model_ema.decay": torch.ones(()), "model_ema.diffusion_modelinput_blocks00weight": torch.ones(3),
        "cond_stage_model.logit_scale": torch.ones(()), "cond_stage_model.text_projection": torch.ones(9, 9),
        "cond_stage_model.transformer.text_projection.weight": torch.ones(9, 9)}


@pytest.fixture
def file(original, tmp_path, monkeypatch):
    """A single-file checkpoint with the tokenizer's vocabulary beside it; small models pass for SD 1.5."""
    for name, part in layouts.PARTS.items():
        monkeypatch.setitem(layouts.PARTS, name, part._replace(config=partial(replace, SMALL[name])))
    file = shutil.copy(original.parent / "single.safetensors", tmp_path / "model.safetensors")
    write_tokenizer(TOKENIZER, tmp_path)
    return file


def is_ours(model, dtype=torch.float32):
    """Whether a loaded model has exactly the weights of parts()."""
    loaded = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text}
    for part, module in loaded.items():
        got, want = module.state_dict(), state(part)
        assert list(got) == list(want)
        assert all(got[name].dtype == dtype and torch.equal(got[name], want[name].to(dtype)) for name in want)
    return True


def refused(source, *words, **options):
    """Assert that load() refuses with a message of one line that says these words; return it."""
    with pytest.raises(LoadError) as info:
        sd.load(source, **{"device": "cpu"} | options)
    message = str(info.value)
    assert "\n" not in message
    assert [word for word in words if str(word) not in message] == [], message
    return message


def change(path, **changes):
    """Change entries of a JSON file."""
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def retensor(path, drop=(), **tensors):
    """Change tensors of a safetensors file."""
    kept = {key: p.clone() for key, p in load_file(path).items() if key not in drop}
    save_file(kept | tensors, path)


# ------------------------------------------------------------------------------------------------------------

def test_folder(folder):
    model = sd.load(folder, device="cpu")
    assert is_ours(model)
    assert (model.name, model.device, model.dtype) == (str(folder), torch.device("cpu"), torch.float32)
    modules = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text}
    assert {part: module.config for part, module in modules.items()} == SMALL
    for module in modules.values():
        assert not any(m.training for m in module.modules())
        assert not any(p.requires_grad for p in module.parameters())


def test_the_variant_that_suits_the_dtype(folder):
    for part in SMALL:
        half = {k: p.half() + 1 for k, p in state(part).items()}
        save_file(half, folder / part / f"{FILE[part]}.fp16.safetensors")
    name = "conv_in.bias"
    assert torch.equal(sd.load(folder, "cpu").unet.state_dict()[name], state("unet")[name])
    half = state("unet")[name].half() + 1
    assert torch.equal(sd.load(folder, "cpu", torch.float16).unet.state_dict()[name], half)
    for part in SMALL:
        (folder / part / f"{FILE[part]}.safetensors").unlink()
    assert torch.equal(sd.load(folder, "cpu").unet.state_dict()[name], half.float())


def test_shards(folder):
    whole = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = list(load_file(whole).items())
    whole.unlink()
    for i in range(3):
        name = f"diffusion_pytorch_model-0000{i + 1}-of-00003.safetensors"
        save_file(dict(tensors[i::3]), folder / "unet" / name)
    assert is_ours(sd.load(folder, "cpu"))
    (folder / "unet/diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    refused(folder, "no tensor for", "more")


def test_old_names_in_folders(folder):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {re.sub("|".join(old), lambda m: old[m[0]], name): p for name, p in state("vae").items()}
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in renamed and len(renamed) == len(state("vae"))
    save_file(renamed, folder / "vae/diffusion_pytorch_model.safetensors")
    short = {name.removeprefix("text_model."): p for name, p in state("text_encoder").items()}
    short["embeddings.position_ids"] = torch.arange(24)[None]
    save_file(short, folder / "text_encoder/model.safetensors")
    config = folder / "vae/config.json"
    settings = json.loads(config.read_text())
    del settings["scaling_factor"]  # as SD 1.4's
    config.write_text(json.dumps(settings))
    assert is_ours(sd.load(folder, "cpu"))


def test_nano_lies_beside_sd(folder, monkeypatch):
    monkeypatch.setattr(layouts, "HERE", folder.parent)
    refused("nano", folder.parent / "nano", "vae/config.json", "nano/training/pretrain.py")
    for part in SMALL:
        save_file({k: p.half() for k, p in state(part).items()}, folder / part / f"{FILE[part]}.safetensors")
    folder.rename(folder.parent / "nano")
    model = sd.load("nano", "cpu")
    assert (model.name, model.dtype) == ("nano", torch.float32)
    assert torch.equal(model.unet.conv_in.weight, parts()["unet"].conv_in.weight.half().float())


def test_files_may_change_after_loading(folder):
    model = sd.load(folder, "cpu")
    for part in SMALL:
        path = folder / part / f"{FILE[part]}.safetensors"
        path.write_bytes(bytes(path.stat().st_size))  # the same file, overwritten
    assert is_ours(model)


def test_single_file(file):
    model = sd.load(str(file), "cpu")
    assert is_ours(model) and model.name == str(file)
    assert torch.equal(model.tokenizer(["a face"]), TOKENIZER(["a face"]))


def test_single_file_vocabulary(file, monkeypatch, tmp_path_factory):
    asked = []

    def snapshot_download(repo, allow_patterns):
        asked.append((repo, *allow_patterns))
        if hub is None:
            raise OSError("no network")
        return str(hub)
    monkeypatch.setattr(layouts.huggingface_hub, "snapshot_download", snapshot_download)
    hub = tmp_path_factory.mktemp("hub")
    (hub / "tokenizer").mkdir()
    write_tokenizer(TOKENIZER, hub / "tokenizer")
    for name in ("vocab.json", "merges.txt"):
        (file.parent / name).unlink()
    assert is_ours(sd.load(file, "cpu"))
    assert asked == [(layouts.HUB, "tokenizer/vocab.json", "tokenizer/merges.txt")]
    hub = None
    refused(file, "vocab.json and merges.txt", f"into {file.parent}", layouts.HUB)
    hub = tmp_path_factory.mktemp("others")  # a cache of other files alone
    refused(file, "vocab.json and merges.txt", f"into {file.parent}", layouts.HUB)
    (file.parent / "tokenizer").mkdir()
    write_tokenizer(TOKENIZER, file.parent / "tokenizer")
    assert is_ours(sd.load(file, "cpu"))


def shards(folder, part, *names, of=None, index=".safetensors.index.json"):
    """Put a part's weights, or others, into these shards, in turns, with their index."""
    stem, tensors = FILE[part], of or state(part)
    places = {key: stem + names[i % len(names)] for i, key in enumerate(sorted(tensors))}
    for name in set(places.values()):
        save_file({key: t.clone() for key, t in tensors.items() if places[key] == name}, folder / part / name)
    (folder / part / (stem + index)).write_text(json.dumps({"weight_map": places}))


TWO = "-00001-of-00002.safetensors", "-00002-of-00002.safetensors"


@pytest.mark.parametrize("index", [".safetensors.index.fp16.json", ".fp16.safetensors.index.json"])
def test_shards_of_a_variant(folder, index):
    (folder / "unet" / f"{FILE['unet']}.safetensors").unlink()
    shards(folder, "unet", *(f".fp16{name}" for name in TWO), index=index)
    assert is_ours(sd.load(folder, "cpu"))
    (folder / "unet" / f"{FILE['unet']}.fp16{TWO[1]}").unlink()
    refused(folder, index, f"names {FILE['unet']}.fp16{TWO[1]}, which is missing")


def test_shards_are_those_of_the_index(folder):
    """Others are of an earlier save, a whole file too, which is said."""
    other = {key: t + 1 for key, t in state("unet").items()}
    whole = folder / "unet" / f"{FILE['unet']}.safetensors"
    save_file(other, whole)
    shards(folder, "unet", "-00001-of-00003.safetensors", "-00002-of-00003.safetensors", of=other)
    shards(folder, "unet", *TWO)
    with pytest.warns(UserWarning, match="unet: has a whole file and shards; the shards that .* are read"):
        assert is_ours(sd.load(folder, "cpu"))
    whole.unlink()
    assert is_ours(sd.load(folder, "cpu"))
    save_file(state("unet"), whole)
    (folder / "unet" / f"{FILE['unet']}.safetensors.index.json").unlink()
    with pytest.warns(UserWarning, match=f"unet: has a whole file and shards; {whole.name} is read"):
        assert is_ours(sd.load(folder, "cpu"))


@pytest.mark.parametrize("index", [
    "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none(folder, index):
    (folder / "unet" / f"{FILE['unet']}.safetensors.index.json").write_text(index)
    (folder / "unet" / f"{FILE['unet']}.safetensors").unlink()
    refused(folder, "index.json", "no")


@pytest.mark.parametrize("other", [".bf16.safetensors", ".non_ema.safetensors"])
def test_weights_of_another_kind_are_named(folder, other):
    whole = folder / "unet" / f"{FILE['unet']}.safetensors"
    whole.rename(whole.with_name(FILE["unet"] + other))
    refused(folder, f"lacks unet/{FILE['unet']}.safetensors (not {FILE['unet']}{other})")


def test_a_safetensors_file_of_any_name(file):
    assert is_ours(sd.load(file.rename(file.with_suffix(".ckpt")), "cpu"))


# ------------------------------------------------------------------------------------------------------------
# Strictness

def test_folder_is_strict(folder):
    part, key = "unet", CONTEXT
    path, shape = folder / part / f"{FILE[part]}.safetensors", tuple(state(part)[key].shape)
    retensor(path, drop=[key])
    refused(folder, path, key, f"expected shape {shape}")
    wrong = torch.zeros(5, *shape)
    retensor(path, **{key: wrong})
    refused(folder, path, key, tuple(wrong.shape), f"expected {shape}")
    retensor(path, **{key: state(part)[key], "extra.weight": wrong})
    refused(folder, path, "surplus tensor extra.weight", tuple(wrong.shape))


@pytest.mark.parametrize("key", [
    "model.diffusion_model.out.2.bias", "first_stage_model.encoder.norm_out.bias",
    "cond_stage_model.transformer.text_model.final_layer_norm.bias"])
def test_single_file_is_strict(file, key):
    shape = tuple(single()[key].shape)
    retensor(file, drop=[key])
    refused(file, "no tensor for", f"expected shape {shape}")
    retensor(file, **{key: torch.zeros(*shape, 3)})
    refused(file, key, (*shape, 3), f"expected {shape}")


@pytest.mark.parametrize("key", [
    "model.diffusion_model.out.2.extra", "first_stage_model.loss.logvar", "other.bias",
    "first_stage_model.decoder.up.x.block.0.conv1.bias", "cond_stage_model.transformer.extra"])
def test_surplus_in_single_files(file, key):
    retensor(file, **{key: torch.zeros(7)})
    refused(file, f"surplus tensor {key} of shape (7,)")


@pytest.mark.parametrize("value, words", [
    (torch.full((16,), torch.nan), "holds NaN"), (torch.full((16,), -torch.inf), "too large"),
    (torch.zeros(16, dtype=torch.int8), "is quantised (int8)")])
def test_weights_that_are_no_numbers(folder, value, words):
    shape = state("unet")["conv_in.bias"].shape
    retensor(folder / "unet" / f"{FILE['unet']}.safetensors", **{"conv_in.bias": value.expand(shape).clone()})
    refused(folder, "tensor conv_in.bias", words)


def test_a_settings_file_larger_than_any_is_not_read(folder):
    with open(folder / "unet/config.json", "r+b") as file:
        file.truncate(10 ** 10)  # sparse: no disk is used
    refused(folder, "config.json", "larger than 10 MB")


def test_one_by_one_convolutions_only_where_they_are_official(file):
    key = "model.diffusion_model.time_embed.0.weight"
    shape = tuple(single()[key].shape)
    retensor(file, **{key: single()[key][:, :, None, None]})
    refused(file, key, (*shape, 1, 1), f"expected {shape}")


def test_the_same_tensor_twice(file):
    name = "cond_stage_model.transformer.{}final_layer_norm.bias"
    retensor(file, **{name.format(""): single()[name.format("text_model.")]})
    refused(file, "surplus tensor", "final_layer_norm.bias")


# ------------------------------------------------------------------------------------------------------------
# Refusals

@pytest.mark.parametrize("name, changes, words", [
    ("unet/config.json", {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20]},
     ["Stable Diffusion 2.x"]),
    ("unet/config.json", {"attention_head_dim": [5, 10, 20, 20]}, ["Stable Diffusion 2.x"]),
    ("unet/config.json", {"cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20]}, ["SDXL"]),
    ("unet/config.json", {"addition_embed_type": "text_time"}, ["SDXL"]),
    ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}, ["SDXL"]),
    ("model_index.json", {"_class_name": "FluxPipeline", "transformer": ["diffusers", "x"]},
     ["FluxPipeline", "diffusion transformer"]),
    ("unet/config.json", {"in_channels": 9}, ["9 input channels", "inpainting"]),
    ("unet/config.json", {"act_fn": "gelu"}, ["unet/config.json", "act_fn is 'gelu'", "'silu'"]),
    ("unet/config.json", {"down_block_types": ["AttnDownBlock2D"] * 4}, ["UNet", "AttnDownBlock2D"]),
    ("unet/config.json", {"norm_num_groups": 7}, ["UNet"]),
    ("unet/config.json", {"layers_per_block": "two"}, ["layers_per_block"]),
    ("unet/config.json", {"sample_size": 0}, ["sample_size cannot be 0"]),
    ("unet/config.json", {"sample_size": [16, 16]}, ["sample_size cannot be (16, 16)"]),
    ("unet/config.json", {"sample_size": 999_999}, ["sample_size cannot be 999999"]),
    ("unet/config.json", {"block_out_channels": [16] * 5000}, ["block_out_channels cannot be"]),
    ("unet/config.json", {"attention_head_dim": 7}, ["shared among 7 heads"]),
    ("unet/config.json", {"norm_eps": None}, ["norm_eps cannot be None"]),
    ("unet/config.json", {"block_out_channels": [16, -24]}, ["block_out_channels cannot be (16, -24)"]),
    ("vae/config.json", {"scaling_factor": float("nan")}, ["scaling_factor cannot be nan"]),
    ("text_encoder/config.json", {"num_attention_heads": 3}, ["shared among 3 heads"]),
    ("unet/config.json", {"layers_per_block": 64}, ["layers_per_block cannot be 64"]),
    ("unet/config.json", {"block_out_channels": [16] * 9}, ["block_out_channels cannot be"]),
    ("unet/config.json", {"time_embedding_act_fn": "gelu"}, ["time_embedding_act_fn is 'gelu'"]),
    ("unet/config.json", {"timestep_post_act": "silu"}, ["timestep_post_act is 'silu'"]),
    ("unet/config.json", {"resnet_skip_time_act": True}, ["resnet_skip_time_act is True"]),
    ("unet/config.json", {"resnet_out_scale_factor": 2.}, ["resnet_out_scale_factor is 2.0"]),
    ("unet/config.json", {"time_cond_proj_dim": 256}, ["takes the guidance scale", "LCM-LoRA"]),
    ("text_encoder/config.json", {"num_hidden_layers": 999}, ["num_hidden_layers cannot be 999"]),
    ("text_encoder/config.json", {"num_attention_heads": True}, ["num_attention_heads cannot be True"]),
    ("unet/config.json", {"cross_attention_dim": 48}, ["the text encoder is 32 wide, but the UNet takes 48"]),
    ("vae/config.json", {"shift_factor": .1}, ["vae/config.json", "shift_factor"]),
    ("text_encoder/config.json", {"hidden_act": "relu"}, ["TextTransformer", "relu"]),
    ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, ["v_prediction", "'epsilon'"]),
])
def test_other_folders(folder, name, changes, words):
    change(folder / name, **changes)
    refused(folder, folder, *words)


def test_parts_that_are_named_and_not_there(folder):
    """As newer pipelines write what they could have and don't."""
    change(folder / "model_index.json", transformer=None, text_encoder_2=[None, None])
    assert sd.load(folder, "cpu").unet.config.in_channels == 4


@pytest.mark.parametrize("faster, large, expected", [
    (True, True, torch.bfloat16), (True, False, torch.float32), (False, True, torch.float32)])
def test_a_large_model_is_in_what_the_cpu_is_fast_in(folder, monkeypatch, faster, large, expected):
    monkeypatch.setattr(layouts, "bfloat16_is_faster", lambda: faster)
    monkeypatch.setattr(layouts, "LARGE", 0 if large else 10 ** 9)
    assert sd.load(folder, "cpu").dtype == expected
    assert sd.load(folder, "cpu", torch.float32).dtype == torch.float32


@pytest.mark.parametrize("large, dtype", [(0, torch.float32), (0, torch.bfloat16), (10 ** 9, torch.float32)])
def test_kernels_are_channels_last_but_a_large_autoencoders_in_float32(folder, monkeypatch, large, dtype):
    """Where PyTorch's group norm would be too far off."""
    monkeypatch.setattr(layouts, "LARGE", large)
    model = sd.load(folder, "cpu", dtype)
    own = model.vae.decoder.mid_block.resnets[0].conv1.weight
    kernel = model.unet.mid_block.resnets[0].conv1.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert own.is_contiguous() == (large == 0 and dtype == torch.float32)


@pytest.mark.parametrize("kind", ["LCMScheduler", "TCDScheduler"])
def test_a_folder_made_for_few_steps_says_so(folder, kind):
    change(folder / "scheduler/scheduler_config.json", _class_name=kind)
    with pytest.warns(UserWarning, match=f"made for {kind}.* --sampler lcm"):
        sd.load(folder, device="cpu")


def test_another_noise_schedule_is_warned_of(folder):
    change(folder / "scheduler/scheduler_config.json", beta_schedule="linear")
    with pytest.warns(UserWarning, match="beta_schedule 'linear' is not"):
        sd.load(folder, "cpu")
    change(folder / "scheduler/scheduler_config.json", beta_schedule="scaled_linear", trained_betas=[.1])
    with pytest.warns(UserWarning, match="trained_betas"):
        sd.load(folder, "cpu")


def test_parts_that_do_not_fit_together(folder):
    odd = clip.TextConfig(**asdict(SMALL["text_encoder"]) | {"hidden_size": 48})
    change(folder / "text_encoder/config.json", **asdict(odd))
    save_file(clip.TextTransformer(odd).state_dict(), folder / "text_encoder/model.safetensors")
    refused(folder, "48 wide", "takes 32")


def test_incomplete_folders(folder):
    shutil.rmtree(folder / "vae")
    refused(folder, folder, "vae/config.json, vae/diffusion_pytorch_model.safetensors")
    (folder / "tokenizer/merges.txt").unlink()
    refused(folder, "vae/config.json", "tokenizer/vocab.json and merges.txt")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    refused(folder, "unet/diffusion_pytorch_model.safetensors", "pickles")
    (folder / "unet/config.json").write_text("{")
    refused(folder, folder / "unet/config.json", "JSON")
    (folder / "unet/config.json").write_text("[1]")
    refused(folder, folder / "unet/config.json", "JSON")


def test_a_folder_with_a_name_like_a_hub_id(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    refused("owner/name", "owner/name: not a complete Stable Diffusion", "vae/config.json")


@pytest.mark.parametrize("keys, words", [
    (["conditioner.embedders.0.transformer.text_model.x", "model.diffusion_model.out.0.bias",
      "first_stage_model.x"], "SDXL"),
    (["cond_stage_model.model.ln_final.bias", "model.diffusion_model.out.0.bias", "first_stage_model.x"],
     "Stable Diffusion 2.x"),
    (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "Flux"),
    (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight",
      "lora_unet_down_blocks_0_attentions_0_proj_in.alpha"], "a LoRA"),
    (["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"], "a LoRA"),
    (["down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight"], "a LoRA"),
    (["control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"], "a ControlNet"),
    (["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.bias"], "a ControlNet"),
    (["model.diffusion_model.time_embed.cond_proj.weight"], "takes the guidance scale"),
    (["emb_params"], "an embedding of a token"),
    (["<my-cat>"], "an embedding of a token"),
    (["clip_g", "clip_l"], "an embedding of a token"),
    (["control_model.input_blocks.0.0.weight", "model.diffusion_model.out.0.bias", "first_stage_model.x",
      "cond_stage_model.transformer.x"], "a ControlNet"),
    (["down_blocks.0.resnets.0.conv1.bias", "conv_in.bias"], "a UNet alone"),
    (["model.diffusion_model.input_blocks.0.0.weight"], "a UNet alone"),
    (["encoder.conv_in.bias", "decoder.conv_in.bias"], "a VAE alone"),
    (["text_model.encoder.layers.0.layer_norm1.bias"], "a text encoder alone"),
    (["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.text_model.x"],
     "without its vae (first_stage_model.…)"),
    (["cond_stage_model.transformer.text_model.x", "first_stage_model.decoder.conv_in.bias"],
     "without its unet (model.diffusion_model.…)"),
    (["blocks.0.weight"], "blocks.0.weight"),
    ([], "not a known model"),
])
def test_other_files(tmp_path, keys, words):
    save_file({key: torch.zeros(2, 2) for key in keys}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", tmp_path / "x.safetensors", words)


def test_single_files_that_predict_v(file):
    tensors = load_file(file)
    for note, more in ({"modelspec.prediction_type": "v"}, {}), ({}, {"v_pred": torch.zeros(0)}):
        save_file(tensors | more, file, note)
        refused(file, "predicts v")
    save_file(tensors, file, {"modelspec.prediction_type": "epsilon"})
    sd.load(file, "cpu")
    settings = file.with_suffix(".yaml")
    settings.write_text('model:\n  params:\n    parameterization: "v"\n')
    refused(file, "predicts v")
    settings.write_text('model:\n  params:\n    parameterization: "eps"\n    very: 1\n')
    sd.load(file, "cpu")


def test_single_inpainting_file(file):
    retensor(file, **{"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)})
    refused(file, "9 input channels", "inpainting")
    retensor(file, **{"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16)})
    refused(file, "input_blocks.0.0.weight has shape (16,), expected (16, 4, 3, 3)")


@pytest.mark.parametrize("name, content, words", [
    ("x.safetensors", b"", "empty"),
    ("x.safetensors", b"This is a text, whatever its name says.\n", "not safetensors"),
    ("x.safetensors", b"hi", "not safetensors"),
    ("x.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "not safetensors"),
    ("x.safetensors", b"PK\x03\x04\x00\x00\x08\x08\x00\x00", "a pickle"),
    ("x.safetensors", b"\x80\x02\x8a\nl\xfc\x9cF\xf9\x20", "a pickle"),
    ("x.ckpt", b"anything", "a pickle"),
    ("x.bin", b"", "a pickle"),
    ("x.pt", b"anything", "a pickle"),
])
def test_what_is_no_safetensors_file(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, tmp_path / name, words)


def test_truncated_files(file, folder):
    whole = file.read_bytes()
    for kept in (len(whole) - 1, len(whole) // 2, 2000, 20):
        file.write_bytes(whole[:kept])
        refused(file, file, "damaged or truncated", "download or make it again")
    part = folder / "vae/diffusion_pytorch_model.safetensors"
    part.write_bytes(part.read_bytes()[:-100])
    refused(folder, part, "damaged or truncated")


@pytest.mark.parametrize("source", [
    "nothing", "no/such/folder", "missing.safetensors", "folder/missing.safetensors", "./here", "/abs",
    "owner/model.ckpt", "", "a [V] face " * 40])
def test_names_of_nothing(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    # "" is the current folder
    refused(source, *([source, "no such file"] if source else ["not a complete Stable Diffusion"]))


# ------------------------------------------------------------------------------------------------------------
# The hub, stubbed

class Hub:
    """snapshot_download of one repository, from the folder `source` to the folder `cache`; `online` says of a
    name if it can be had."""

    def __init__(self, source, cache, monkeypatch):
        self.source, self.cache, self.asked, self.online = source, cache, [], lambda name: True
        monkeypatch.setattr(layouts.huggingface_hub, "snapshot_download", self)

    def __call__(self, name, allow_patterns):
        assert name == "owner/name.v1"
        self.asked.append(allow_patterns)
        for path in sorted(self.source.rglob("*")):
            relative = path.relative_to(self.source)
            if path.is_file() and any(fnmatch(str(relative), pattern) for pattern in allow_patterns):
                if not self.online(str(relative)):
                    raise OSError("Got: ConnectError\nand more")
                (self.cache / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.cache / relative)
        return str(self.cache)

    def fetched(self):
        return {str(path.relative_to(self.cache)) for path in self.cache.rglob("*") if path.is_file()}


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """The folder with everything else that the official repository has; both variants."""
    for part in SMALL:
        half = {k: p.half() for k, p in state(part).items()}
        save_file(half, folder / part / f"{FILE[part]}.fp16.safetensors")
        for other in (".bin", ".fp16.bin", ".non_ema.safetensors", ".non_ema.bin"):
            (folder / part / f"{FILE[part]}{other}").write_bytes(b"x")
    change(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    (folder / "safety_checker").mkdir()
    for other in ("v1-5-pruned-emaonly.safetensors", "v1-5-pruned.ckpt", "safety_checker/model.safetensors",
                  "safety_checker/config.json", "README.md", "tokenizer/special_tokens_map.json.bak"):
        (folder / other).write_bytes(b"x")
    (tmp_path / "cache").mkdir()
    return Hub(folder, tmp_path / "cache", monkeypatch)


NEEDED = {"model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json",
          "tokenizer/merges.txt", "unet/config.json", "vae/config.json", "text_encoder/config.json"}


@pytest.mark.parametrize("dtype, variant", [
    (torch.float32, ""), (torch.float16, ".fp16"), (torch.bfloat16, ".fp16")])
def test_hub_fetches_only_what_is_needed(hub, dtype, variant):
    model = sd.load("owner/name.v1", "cpu", dtype)
    assert (model.name, model.dtype) == ("owner/name.v1", dtype)
    assert hub.fetched() == NEEDED | {f"{part}/{FILE[part]}{variant}.safetensors" for part in SMALL}


@pytest.mark.parametrize("dtype, variant", [(torch.float32, ".fp16"), (torch.float16, "")])
def test_hub_without_the_best_variant(hub, dtype, variant):
    other = "" if variant else ".fp16"
    for part in SMALL:
        (hub.source / part / f"{FILE[part]}{other}.safetensors").unlink()
    assert sd.load("owner/name.v1", "cpu", dtype).dtype == dtype
    assert hub.fetched() == NEEDED | {f"{part}/{FILE[part]}{variant}.safetensors" for part in SMALL}


def test_hub_with_shards(hub):
    (hub.source / "unet" / f"{FILE['unet']}.safetensors").unlink()
    shards(hub.source, "unet", *TWO)
    assert is_ours(sd.load("owner/name.v1", "cpu"))
    names = {f"unet/{FILE['unet']}{end}" for end in (*TWO, ".safetensors.index.json")}
    assert names <= hub.fetched() and not any("fp16" in name for name in hub.fetched())


def test_hub_refuses_before_the_weights(hub):
    change(hub.source / "unet/config.json", cross_attention_dim=1024)
    refused("owner/name.v1", "Stable Diffusion 2.x")
    assert hub.fetched() == NEEDED


def test_hub_out_of_reach(hub):
    hub.online = lambda name: "fp16" not in name  # the plain files were downloaded before
    assert is_ours(sd.load("owner/name.v1", "cpu", torch.float16), torch.float16)
    shutil.rmtree(hub.cache)
    hub.cache.mkdir()
    hub.online = lambda name: "safetensors" not in name
    refused("owner/name.v1", "owner/name.v1", "Got: ConnectError", "network")
    hub.online = lambda name: False
    refused("owner/name.v1", "owner/name.v1", "Got: ConnectError", "network")


def test_hub_with_nothing_to_load(hub):
    shutil.rmtree(hub.source / "unet")
    refused("owner/name.v1", "lacks unet/config.json, unet/diffusion_pytorch_model.safetensors")


# ------------------------------------------------------------------------------------------------------------
# Where to, and at what cost

def test_device_and_dtype(monkeypatch):
    assert layouts.device_and_dtype("cpu", None) == (torch.device("cpu"), torch.float32)
    assert layouts.device_and_dtype("cpu", torch.float16) == (torch.device("cpu"), torch.float16)
    refused("nano", "device nowhere", device="nowhere")
    accelerators = [None]
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: accelerators[-1])
    assert layouts.device_and_dtype(None, None) == (torch.device("cpu"), torch.float32)

    class Empty:  # torch.empty where a GPU is
        def __init__(self, size, device):
            self.device = torch.device(device)
    monkeypatch.setattr(torch, "empty", Empty)
    accelerators.append(torch.device("mps"))
    for new, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version, new=new: new)
        assert layouts.device_and_dtype(None, None) == (torch.device("mps"), dtype)
    accelerators.append(torch.device("cuda"))
    for new, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, new=new: new)
        assert layouts.device_and_dtype(None, None) == (torch.device("cuda"), dtype)
    assert layouts.device_and_dtype(None, torch.float32) == (torch.device("cuda"), torch.float32)


def hollow(path, shapes):
    """A safetensors file of zeros, fp32 and fp16 in turns, that takes no disk. Returns the number of them."""
    header, end = {}, 0
    for i, (name, shape) in enumerate(shapes.items()):
        start, end = end, end + (2, 4)[i % 2] * shape.numel()
        header[name] = {"dtype": ("F16", "F32")[i % 2], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)
    return sum(shape.numel() for shape in shapes.values())


MEASURE = """
import re, sys, torch, sd
def memory(kind):
    return 1024 * int(re.search(kind + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = memory("VmRSS")
model = sd.load(sys.argv[1], "cpu")
parameters = [p for m in (model.unet, model.vae, model.text) for p in m.parameters()]
print(memory("VmHWM") - before, sum(p.nbytes for p in parameters))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's memory from /proc")
def test_loading_holds_the_weights_once(folder):
    wide = unet.UNetConfig(block_out_channels=(128, 224, 352, 352), cross_attention_dim=32)
    change(folder / "unet/config.json", **asdict(wide))
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in unet.UNet(wide).state_dict().items()}
    assert hollow(folder / "unet/diffusion_pytorch_model.safetensors", shapes) > 70e6
    run = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], cwd=Path(sd.__file__).parent,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    peak, weights = map(int, run.stdout.split())
    print(f"peak {peak / 1e6:.0f} MB, weights {weights / 1e6:.0f} MB: {peak / weights:.3f}")
    assert weights < peak <= 1.15 * weights


# ------------------------------------------------------------------------------------------------------------
# Checkpoints by themselves

def test_one_checksum_for_one_model_in_any_precision(folder):
    for part in SMALL:
        save_file({k: p.half() for k, p in state(part).items()}, folder / part / f"{FILE[part]}.safetensors")
    dtypes = (torch.float32, torch.bfloat16)
    read = [sd.load(folder, "cpu", dtype) for dtype in dtypes]
    assert read[0].checksums == read[1].checksums
    assert len(set(read[0].checksums.values())) == 3
    # of the full file as well, read in any, and as it was once written
    for part in SMALL:
        save_file(state(part), folder / part / f"{FILE[part]}.safetensors")
    for full in (sd.load(folder, "cpu", dtype).checksums["unet"] for dtype in dtypes):
        assert alike(full, read[0].checksums["unet"]) and alike(full, full[:8]) and full[:8] != full[9:]
    # and in bfloat16 of what was read in float32
    half = unet.UNet(SMALL["unet"]).bfloat16()
    half.load_state_dict(parts()["unet"].state_dict())
    assert alike(checksum(half), checksum(parts()["unet"])) and not alike(checksum(half), "0" * 8)
    # what is read may change
    read[1].unet.conv_in.bias.data += 1
    assert not alike(read[1].checksums["unet"], read[0].checksums["unet"])
    # and what is no checksum is compared as it is
    assert not alike("photos-a", "photos-b") and alike("photos-a", "photos-a") and not alike(None, "0" * 8)


def holding(**tensors):
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


def test_other_weights_have_another_checksum():
    weight, bias = torch.linspace(-1, 1, 600).view(20, 30), torch.ones(20)
    ours = checksum(holding(weight=weight, bias=bias))
    changed, barely = weight.clone(), weight.clone()
    changed[7, 11] += .01
    barely[7, 11] += 1e-6  # less than bfloat16 tells
    assert checksum(holding(weight=weight.clone(), bias=bias)) == ours
    assert alike(checksum(holding(weight=barely, bias=bias)), ours)
    others = [{"weight": changed, "bias": bias}, {"weight": 1.1 * weight, "bias": bias}, {"weight": weight},
              {"weight": weight, "shift": bias}, {"weight": weight.view(30, 20), "bias": bias}]
    found = [ours, *(checksum(holding(**tensors)) for tensors in others)]
    assert not any(alike(a, b) for i, a in enumerate(found) for b in found[:i])

"""export.py on small models: LoRAs of others do what diffusers does with them, and a person exported or merged is still the person."""
import json
from pathlib import Path

import pytest
import torch
from rule import difference
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hdb
import lidb
import sd
from export import export_lora, load_lora, merge_to_folder
from person import stack
from test_person import LAYER, adapted, equal, method, output, refused, small, someone

REFERENCE = Path(__file__).parent / "reference/lora.safetensors"
NAMINGS = ["diffusers peft", "diffusers lora.down", "diffusers processor", "kohya", "peft"]


# ---------------------------------------------------------------------------------------------------------------------------------
# LoRA

def test_an_export_is_the_person(tmp_path):
    factors = someone().factors(method().lidb)
    export_lora(factors, tmp_path / "lora.safetensors", {"title": "me"})
    assert equal(load_lora(tmp_path / "lora.safetensors", method().model), factors)
    half = load_lora(tmp_path / "lora.safetensors", method().model, strength=.5)
    assert all(torch.equal(half[k][0] @ half[k][1], .5 * (a @ b)) for k, (a, b) in factors.items())
    export_lora(factors, tmp_path / "lora.safetensors", {"title": "me"}, dtype=torch.float16)
    tensors = load_file(tmp_path / "lora.safetensors")
    down, up, alpha = (tensors[f"lora_unet_{LAYER[5:].replace('.', '_')}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
    assert down.shape == (5, 16) and up.shape == (16, 5) and alpha == 5 and down.dtype == up.dtype == torch.float16
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha" in tensors and len(tensors) == 3 * len(factors)
    with safe_open(tmp_path / "lora.safetensors", "pt") as f:
        assert f.metadata()["title"] == "me"


def test_layers_of_different_rank_are_filled_up(tmp_path):
    """diffusers 0.42 takes one layer's alpha for all."""
    model, personal = adapted()
    factors = lidb.join(someone().factors(method().lidb), {LAYER: (torch.randn(1, 16, 2), torch.randn(1, 2, 16))})
    export_lora(factors, tmp_path / "lora.safetensors")
    tensors = load_file(tmp_path / "lora.safetensors")
    assert {t.item() for key, t in tensors.items() if key.endswith(".alpha")} == {7.}
    assert all(t.shape[0] == 7 for key, t in tensors.items() if key.endswith(".lora_down.weight"))
    back = load_lora(tmp_path / "lora.safetensors", model)
    assert all(torch.equal(back[k][0] @ back[k][1], a @ b) for k, (a, b) in factors.items())


def test_convolutions_are_exported_as_convolutions(tmp_path):
    model = method().model
    layers = lidb.adaptable_layers(model.unet, model.text)
    factors = {k: (torch.randn(1, m.weight.shape[1], 2), torch.randn(1, 2, m.weight.shape[0])) for k, m in layers.items()}
    export_lora(factors, tmp_path / "lora.safetensors")
    tensors = load_file(tmp_path / "lora.safetensors")
    for name, layer in layers.items():
        key = f"lora_{'te' if name[:4] == 'text' else 'unet'}_{name[5:].replace('.', '_')}"
        assert tensors[f"{key}.lora_down.weight"].shape == (2, *layer.weight.shape[1:]), name
        assert tensors[f"{key}.lora_up.weight"].shape == (layer.weight.shape[0], 2, *layer.weight.shape[2:])
    assert any(isinstance(m, torch.nn.Conv2d) for m in layers.values()) and equal(load_lora(tmp_path / "lora.safetensors", model), factors)


def test_an_export_in_the_model_is_the_merged_model(tmp_path):
    model, personal = adapted()
    factors = someone().factors(method().lidb)
    export_lora(factors, tmp_path / "lora.safetensors")
    merged = small()
    lidb.merge(lidb.adaptable_layers(merged.unet, merged.text), factors)
    for ours, theirs in zip(output(model, load_lora(tmp_path / "lora.safetensors", model), personal), output(merged)):
        assert difference(ours, theirs) < 1e-5


def foreign(naming, folder):
    """Write a stored LoRA as its program wrote it; return its path."""
    stored = load_file(REFERENCE)
    path, note = folder / "their.safetensors", json.loads(bytes(stored[f"{naming}:metadata"].tolist()))
    if naming == "peft":
        (folder / "adapter_config.json").write_text(json.dumps(note))
        note = {}
    save_file({k.split("|")[1]: t for k, t in stored.items() if k.startswith(f"{naming}|")}, path, note)
    return path


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_lora_of_others_does_what_theirs_does(naming, tmp_path):
    stored, (model, personal) = load_file(REFERENCE), adapted()
    factors = load_lora(foreign(naming, tmp_path), model)
    assert len(factors) == sum(key.startswith(f"{naming}|") and "alpha" not in key for key in stored) / 2
    plain, (context, noise) = output(model), output(model, factors, personal)
    assert difference(context, stored[f"{naming}:context"]) < 1e-5
    assert difference(noise, stored[f"{naming}:noise"]) < 1e-5 and difference(noise, plain[1]) > .05
    merged = small()
    lidb.merge(lidb.adaptable_layers(merged.unet, merged.text), factors)
    assert difference(output(merged)[1], stored[f"{naming}:noise"]) < 1e-5


def test_without_alpha_it_is_the_rank(tmp_path):
    path = foreign("kohya", tmp_path)
    tensors = load_file(path)
    save_file({k: t for k, t in tensors.items() if not k.endswith("alpha")}, path)
    factors = load_lora(path, method().model)
    key = f"lora_unet_{LAYER[5:].replace('.', '_')}"
    a, b = factors[LAYER]
    assert torch.equal(a[0].T, tensors[f"{key}.lora_down.weight"]) and torch.equal(b[0].T, tensors[f"{key}.lora_up.weight"])


KEY = f"lora_unet_{LAYER[5:].replace('.', '_')}"


def z(*shape):
    return torch.zeros(shape)


@pytest.mark.parametrize("tensors, words", [
    ({}, ["empty"]),
    ({"lora_unet_nowhere.lora_down.weight": z(2, 16)}, ["doesn't have", "lora_unet_nowhere.lora_down.weight"]),
    ({f"block{i}.weight": z(2) for i in range(8)}, ["block0.weight", "block4.weight and 3 more"]),
    ({f"{KEY}.lora_up.weight": None}, ["one matrix without the other", f"{KEY}.lora_down"]),
    ({f"{KEY}.lora_up.weight": z(16, 3)}, ["other widths", "(2, 16) and (16, 3) for a layer 16 → 16"]),
    ({f"{KEY}.lora_down.weight": z(2, 16, 3, 3)}, ["other widths"]),
    ({f"{KEY}.lora_down.weight": z(2, 1024)}, ["other widths", "(2, 1024)"]),
    ({f"{KEY}.lora_down.weight": z()}, ["other widths"]),
    ({f"{KEY}.alpha": z(3)}, [f"{KEY}.alpha"]),
    ({f"{KEY}.alpha": torch.tensor(torch.inf)}, [f"{KEY}.alpha", "infinite"]),
    ({f"{KEY}.lora_up.weight": torch.full((16, 2), torch.nan)}, [f"{KEY}.lora_up.weight", "NaN"]),
    ({f"{LAYER}.lora_A.weight": z(2, 16)}, ["same layer twice", f"{LAYER}.lora_A"]),
    ({f"{LAYER}.lora_B.bias": z(2, 16)}, [f"{LAYER}.lora_B.bias"]),
    ({"lora_unet_conv_in.lora_down.weight": z(2, 4, 3, 3)}, ["LoCon", "lora_unet_conv_in"]),
    ({"lora_unet_down_blocks_0_resnets_0_conv1.lora_mid.weight": z(2, 2, 3, 3)}, ["LyCORIS", "lora_mid"]),
    ({f"{KEY}.hada_w1_a": z(16, 2)}, ["LoHa", "hada_w1_a"]),
    ({f"{KEY}.lokr_w1": z(4, 4)}, ["LoKr"]),
    ({f"{KEY}.dora_scale": z(16, 1)}, ["DoRA"]),
    ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": z()}, ["SDXL", "lora_te2_"]),
    ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": z(2, 640)}, ["SDXL"]),
    ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": z(2, 9)}, ["diffusion transformer"]),
    ({"cond_stage_model.transformer.text_model.embeddings.position_ids": z(1, 77)}, ["whole model"]),
    ({"bundle_emb.x.string_to_param.*": z(1, 768)}, ["embedding bundled in"]),
    ({"emb_params": z(1, 768)}, ["textual inversion"])])
def test_a_lora_that_does_not_fit_is_refused_with_its_keys(tmp_path, tensors, words):
    path = tmp_path / "style.safetensors"
    good = {f"{KEY}.lora_down.weight": z(2, 16), f"{KEY}.lora_up.weight": z(16, 2)} if tensors else {}
    save_file({k: t for k, t in (good | tensors).items() if t is not None}, path)
    refused(lambda: load_lora(path, method().model), str(path), *words)


def test_an_adapter_of_the_unet_alone(tmp_path):
    """UNet2DConditionModel.save_lora_adapter() of diffusers: no prefix, neither in the keys nor in the settings."""
    whole = load_lora(foreign("diffusers peft", tmp_path), method().model)
    with safe_open(tmp_path / "their.safetensors", "pt") as f:
        settings = json.loads(f.metadata()["lora_adapter_metadata"])
        tensors = {key.removeprefix("unet."): f.get_tensor(key) for key in f.keys() if key.startswith("unet.")}
    alone = {key.removeprefix("unet."): value for key, value in settings.items() if key.startswith("unet.")}
    save_file(tensors, tmp_path / "alone.safetensors", {"lora_adapter_metadata": json.dumps(alone)})
    assert alone["lora_alpha"] != alone["r"]
    assert equal(load_lora(tmp_path / "alone.safetensors", method().model), {k: f for k, f in whole.items() if k.startswith("unet.")})


@pytest.mark.parametrize("settings", ["null", "5", "[1]", "[" * 100_000, "{"])
def test_pefts_settings_that_are_none(tmp_path, settings):
    path = tmp_path / "their.safetensors"
    save_file({f"{LAYER}.lora_A.weight": torch.zeros(2, 16), f"{LAYER}.lora_B.weight": torch.zeros(16, 2)}, path, {"lora_adapter_metadata": settings})
    refused(lambda: load_lora(path, method().model), "not readable")


def test_peft_without_its_settings_is_refused(tmp_path):
    path = foreign("peft", tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    refused(lambda: load_lora(path, method().model), "adapter_config.json")


@pytest.mark.parametrize("wrong", [{"lora_alpha": "much"}, {"lora_alpha": [8]}, {"alpha_pattern": {"(": 1}}, {"alpha_pattern": 3}])
def test_pefts_settings_that_make_no_sense(tmp_path, wrong):
    path, file = foreign("peft", tmp_path), tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | wrong))
    refused(lambda: load_lora(path, method().model), "settings make no sense")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": float("nan"), "alpha_pattern": {}}))
    refused(lambda: load_lora(path, method().model), "NaN")


# ---------------------------------------------------------------------------------------------------------------------------------
# The merged folder

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_merged_folder_is_the_person(tmp_path, dtype):
    factors = someone().factors(method().lidb)
    model = small()
    for module in (model.unet, model.text, model.vae):
        module.to(dtype)
    ours = hdb.HyperDreamBooth(model)
    before = [{k: p.clone() for k, p in m.state_dict().items()} for m in (model.unet, model.text, model.vae)]
    (tmp_path / "out").mkdir()
    merge_to_folder(ours, factors, None, tmp_path / "out")
    assert all(torch.equal(p, was[k]) for m, was in zip((model.unet, model.text, model.vae), before) for k, p in m.state_dict().items())
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    lidb.merge(ours.layers, factors)
    back = sd.load(tmp_path / "out", "cpu", dtype)
    for mine, theirs in (model.unet, back.unet), (model.text, back.text), (model.vae, back.vae):
        assert mine.config == theirs.config
        assert all(torch.equal(p, q) for p, q in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert torch.equal(model.tokenizer(["a face"]), back.tokenizer(["a face"]))


def test_a_person_merged_in_bfloat16_survives(tmp_path):
    model, factors = small(), someone().factors(method().lidb)
    for module in (model.unet, model.text, model.vae):
        module.bfloat16()
    before = model.unet.state_dict()
    merge_to_folder(hdb.HyperDreamBooth(model), factors, None, tmp_path / "out")
    after = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    a, b = factors[LAYER]
    key = f"{LAYER[5:]}.weight"
    assert after[key].dtype == torch.float16 and difference(after[key].float() - before[key].float(), (a[0] @ b[0]).T) < 2e-3


def test_a_merged_folder_keeps_its_sources_settings(tmp_path):
    merge_to_folder(method(), {}, None, tmp_path / "source")
    for name, changes in {"scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler", "clip_sample": True},
                          "model_index.json": {"safety_checker": ["stable_diffusion", "Checker"]}}.items():
        path = tmp_path / "source" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    merge_to_folder(method(), someone().relaxed, tmp_path / "source", tmp_path / "out")
    read = lambda name: json.loads((tmp_path / "out" / name).read_text())
    assert read("scheduler/scheduler_config.json")["clip_sample"] is True
    assert read("model_index.json")["scheduler"] == ["diffusers", read("scheduler/scheduler_config.json")["_class_name"]]
    assert read("model_index.json")["safety_checker"] == [None, None]


def test_a_merge_that_cannot_be_leaves_nothing(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    refused(lambda: merge_to_folder(method(), {}, None, tmp_path / "out"), "exists already")
    refused(lambda: merge_to_folder(method(), {}, None, tmp_path / "out/mine.txt"), "exists already")
    two = stack([someone(1).relaxed, someone(2).relaxed])
    refused(lambda: merge_to_folder(method(), two, None, tmp_path / "new"), "one person")
    infinite = {LAYER: (torch.ones(1, 16, 1), torch.full((1, 1, 16), torch.inf))}
    refused(lambda: merge_to_folder(method(), infinite, None, tmp_path / "new"), LAYER, "infinite")
    (tmp_path / "source/scheduler").mkdir(parents=True)
    (tmp_path / "source/scheduler/scheduler_config.json").write_text("{")
    with pytest.raises(ValueError):
        merge_to_folder(method(), {}, tmp_path / "source", tmp_path / "new")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out", "source"]

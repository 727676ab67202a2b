"""files/lora.py on small models: LoRAs of others do what they do in diffusers, an export is the person."""
import json
from pathlib import Path

import pytest
import torch
from rule import difference, draw, generator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from personal import LAYER, equal, lora_inputs, method, output, refused, small, someone

from adapters import LowRank, join, merge, scale, stack
from diffusion import guided, lcm
from files.checkpoints import Tensors
from program.console import UserError
from files.lora import adaptable_layers, export_lora, load_lora

REFERENCE = Path(__file__).parent / "reference/lora.safetensors"
NAMINGS = ["diffusers peft", "diffusers lora.down", "diffusers processor", "kohya", "peft"]
KEY = f"lora_unet_{LAYER[5:].replace('.', '_')}"
LCM_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1",
              "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")


def lcm_lora(unet):
    """Random factors for the layers that LCM-LoRA has, as kohya's scripts name them."""
    tensors = {}
    for name, layer in unet.named_modules():
        if name.endswith(LCM_LAYERS) and hasattr(layer, "weight"):
            key, (n_out, *sizes) = f"lora_unet_{name.replace('.', '_')}", layer.weight.shape
            down, up = draw((4, *sizes), f"{key}:down"), draw((n_out, 4, *[1] * len(sizes[1:])), f"{key}:up")
            tensors[f"{key}.lora_down.weight"] = down / layer.weight[0].numel() ** .5
            tensors |= {f"{key}.lora_up.weight": up / 2, f"{key}.alpha": torch.tensor(3.)}
    return tensors


def test_lcm_loras_layers_and_sampler_do_what_they_do_in_diffusers(tmp_path):
    model, stored = method().model, load_file(REFERENCE.with_name("lcm.safetensors"))["latents"]
    save_file(lcm_lora(model.unet), tmp_path / "lcm.safetensors")
    adapters, way, (x, _, ids) = load_lora(tmp_path / "lcm.safetensors", model), [], lora_inputs()
    assert sum(isinstance(model.layers[name], torch.nn.Conv2d) for name in adapters) > 20
    with model.adapted(adapters), torch.no_grad():
        denoise = guided(model.unet, model.text(ids), scale=1)
        lcm(denoise, x, 4, [generator(f"lcm:{i}") for i in range(2)], lambda i, t, x, x0: way.append(x))
    assert max(difference(a, b) for a, b in zip(way, stored, strict=True)) <= 1e-4
    # exactly exported, merged, and beside another person
    export_lora(adapters, tmp_path / "again.safetensors")
    again, merged = load_lora(tmp_path / "again.safetensors", model), small()
    assert equal(again, adapters)
    merge(merged.layers, adapters)
    expected = output(merged)[1]
    assert difference(output(model, adapters)[1], expected) < 1e-5
    assert difference(output(model)[1], expected) > .05
    halves = join(scale(adapters, .25), scale(adapters, .75))
    assert difference(output(model, halves)[1], expected) < 1e-5
    two = output(model, stack([adapters, someone().adapters(method())]))[1]
    alone = output(model, someone().adapters(method()))[1]
    assert difference(two[0], expected[0]) < 1e-5 and difference(two[1], alone[1]) < 1e-5


def test_an_export_is_the_person(tmp_path):
    adapters = someone().adapters(method())
    export_lora(adapters, tmp_path / "lora.safetensors", {"title": "me"})
    assert equal(load_lora(tmp_path / "lora.safetensors", method().model), adapters)
    half = load_lora(tmp_path / "lora.safetensors", method().model, strength=.5)
    assert all(torch.equal(half[k][0] @ half[k][1], .5 * (a @ b)) for k, (a, b) in adapters.items())
    tensors = load_file(tmp_path / "lora.safetensors")
    down, up, alpha = (tensors[f"{KEY}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
    assert down.shape == (5, 16) and up.shape == (16, 5) and alpha == 5
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha" in tensors
    assert len(tensors) == 3 * len(adapters)
    with safe_open(tmp_path / "lora.safetensors", "pt") as f:
        assert f.metadata()["title"] == "me"


def test_layers_of_different_rank_are_filled_up(tmp_path):
    """diffusers 0.42 takes one layer's alpha for all."""
    model = method().model
    style = {LAYER: LowRank(torch.randn(1, 16, 2), torch.randn(1, 2, 16))}
    adapters = join(someone().adapters(method()), style)
    export_lora(adapters, tmp_path / "lora.safetensors")
    tensors = load_file(tmp_path / "lora.safetensors")
    assert {t.item() for key, t in tensors.items() if key.endswith(".alpha")} == {7.}
    assert all(t.shape[0] == 7 for key, t in tensors.items() if key.endswith(".lora_down.weight"))
    back = load_lora(tmp_path / "lora.safetensors", model)
    assert all(torch.equal(back[k][0] @ back[k][1], a @ b) for k, (a, b) in adapters.items())


def test_convolutions_are_exported_as_convolutions(tmp_path):
    model = method().model
    layers = adaptable_layers(model)
    adapters = {}
    for name, layer in layers.items():
        n_out, seen = len(layer.weight), layer.weight[0].numel()
        adapters[name] = LowRank(torch.randn(1, seen, 2), torch.randn(1, 2, n_out))
    export_lora(adapters, tmp_path / "lora.safetensors")
    tensors = load_file(tmp_path / "lora.safetensors")
    for name, layer in layers.items():
        key = f"lora_{'te' if name[:4] == 'text' else 'unet'}_{name[5:].replace('.', '_')}"
        assert tensors[f"{key}.lora_down.weight"].shape == (2, *layer.weight.shape[1:]), name
        ones = [1] * (layer.weight.dim() - 2)
        assert tensors[f"{key}.lora_up.weight"].shape == (len(layer.weight), 2, *ones)
    assert any(isinstance(m, torch.nn.Conv2d) for m in layers.values())
    assert equal(load_lora(tmp_path / "lora.safetensors", model), adapters)


def test_what_is_no_lora_of_one_person_is_not_written(tmp_path):
    path = tmp_path / "lora.safetensors"
    large = {LAYER: LowRank(torch.ones(1, 16, 1), torch.full((1, 1, 16), torch.inf))}
    refused(lambda: export_lora(large, path), str(path), "infinite")
    two = {LAYER: LowRank(torch.ones(2, 16, 1), torch.ones(2, 1, 16))}
    doubled = {LAYER: lambda layer, x, y: 2 * y}
    for adapters, why in (two, "2 people"), (doubled, f"{LAYER}: only low-rank adapters"):
        with pytest.raises(ValueError, match=why):
            export_lora(adapters, path)
    refused(lambda: export_lora({}, path), "nothing to write")
    assert list(tmp_path.iterdir()) == []


def test_an_export_in_the_model_is_the_merged_model(tmp_path):
    model = method().model
    adapters = someone().adapters(method())
    export_lora(adapters, tmp_path / "lora.safetensors")
    merged = small()
    merge(adaptable_layers(merged), adapters)
    for ours, theirs in zip(output(model, load_lora(tmp_path / "lora.safetensors", model)), output(merged)):
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
    stored, model = load_file(REFERENCE), method().model
    adapters = load_lora(foreign(naming, tmp_path), model)
    assert len(adapters) == sum(key.startswith(f"{naming}|") and "alpha" not in key for key in stored) / 2
    plain, (context, noise) = output(model), output(model, adapters)
    assert difference(context, stored[f"{naming}:context"]) < 1e-5
    assert difference(noise, stored[f"{naming}:noise"]) < 1e-5 and difference(noise, plain[1]) > .05
    merged = small()
    merge(adaptable_layers(merged), adapters)
    assert difference(output(merged)[1], stored[f"{naming}:noise"]) < 1e-5


def test_without_alpha_it_is_the_rank(tmp_path):
    path = foreign("kohya", tmp_path)
    tensors = load_file(path)
    save_file({k: t for k, t in tensors.items() if not k.endswith("alpha")}, path)
    adapters = load_lora(path, method().model)
    a, b = adapters[LAYER]
    assert torch.equal(a[0].T, tensors[f"{KEY}.lora_down.weight"])
    assert torch.equal(b[0].T, tensors[f"{KEY}.lora_up.weight"])


def z(*shape):
    return torch.zeros(shape)


@pytest.mark.parametrize("tensors, words", [
    ({}, ["empty"]),
    ({"lora_unet_no.lora_down.weight": z(2, 16)}, ["that this model has", "lora_unet_no.lora_down.weight"]),
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
    ({"lora_unet_conv_in.lora_down.weight": z(2, 4, 3, 3)}, ["one matrix without", "lora_unet_conv_in"]),
    ({"lora_unet_conv_in.lora_down.weight": z(2, 4), "lora_unet_conv_in.lora_up.weight": z(16, 2, 1, 1)},
     ["other widths", "lora_unet_conv_in"]),
    ({"lora_unet_conv_norm_out.lora_down.weight": z(2, 16)}, ["neither linear layers nor", "conv_norm_out"]),
    ({"lora_unet_down_blocks_0_resnets_0_conv1.lora_mid.weight": z(2, 2, 3, 3)}, ["LyCORIS", "lora_mid"]),
    ({f"{KEY}.hada_w1_a": z(16, 2)}, ["LoHa", "hada_w1_a"]),
    ({f"{KEY}.lokr_w1": z(4, 4)}, ["LoKr"]),
    ({f"{KEY}.dora_scale": z(16, 1)}, ["DoRA"]),
    ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": z()}, ["SDXL", "lora_te2_"]),
    ({"lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q.lora_down.weight": z(2, 640)}, ["SDXL"]),
    ({"unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q.lora_A.weight": z(2, 640)}, ["SDXL"]),
    ({"down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.processor."
      "to_q_lora.down.weight": z(2, 9)}, ["AnimateDiff motion LoRA"]),
    ({"model.diffusion_model.input_blocks.0.0.weight": z(2, 4)}, ["whole model"]),
    ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": z(2, 9)}, ["diffusion transformer"]),
    ({"cond_stage_model.transformer.text_model.embeddings.position_ids": z(1, 77)}, ["whole model"]),
    ({"bundle_emb.x.string_to_param.*": z(1, 768)}, ["embedding bundled in"]),
    ({"emb_params": z(1, 768)}, ["an embedding, not a LoRA"]),
    ({"<me>": z(768), "<me>_1": z(768)}, ["an embedding, not a LoRA", "<me>_1"]),
    ({"clip_g": z(1, 1280), "clip_l": z(1, 768)}, ["an embedding, not a LoRA"])])
def test_a_lora_that_does_not_fit_is_refused_with_its_keys(tmp_path, tensors, words):
    path = tmp_path / "style.safetensors"
    good = {f"{KEY}.lora_down.weight": z(2, 16), f"{KEY}.lora_up.weight": z(16, 2)} if tensors else {}
    save_file({k: t for k, t in (good | tensors).items() if t is not None}, path)
    refused(lambda: load_lora(path, method().model), str(path), *words)


def test_names_of_single_files(tmp_path):
    """ComfyUI reads LoRAs whose layers are called as in the original checkpoints."""
    tensors = {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q": LAYER,
               "lora_unet_middle_block_1_proj_in": "unet.mid_block.attentions.0.proj_in",
               "lora_unet_output_blocks_3_1_transformer_blocks_0_ff_net_2":
                   "unet.up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"}
    layers = method().model.layers
    theirs = {}
    for key, name in tensors.items():
        (n_out, n_in), end = layers[name].weight.shape[:2], layers[name].weight.shape[2:]
        theirs[f"{key}.lora_down.weight"] = torch.randn(2, n_in, *end)
        theirs[f"{key}.lora_up.weight"] = torch.randn(n_out, 2, *end)
    save_file(theirs, tmp_path / "x.safetensors")
    found = load_lora(tmp_path / "x.safetensors", method().model)
    assert found.keys() == set(tensors.values())
    for key, name in tensors.items():
        down, up = (theirs[f"{key}.lora_{which}.weight"].flatten(1) for which in ("down", "up"))
        assert torch.allclose(found[name].a[0] @ found[name].b[0], (up @ down).T, atol=1e-5)


TEXT_LAYER = "text_model.encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("text, unet, adapter", [
    ("lora_te_", "lora_unet_", None), ("lora_te1_", "lora_unet_", None), ("lycoris_", "lycoris_", None),
    ("lora_te_wrapped_transformer_", "lora_unet_", None), ("lora_te_0_transformer_", "lora_unet_unet_", None),
    ("text_encoder.", "unet.unet.", "."), ("text_encoder._orig_mod.", "unet._orig_mod.", "."),
    ("text_encoder.", "unet.", ".my-adapter v1."),
    ("text_encoders.clip_l.transformer.", "diffusion_model.", "."),
    ("clip_l.", "model.diffusion_model.", ".default."), ("_orig_mod.text_encoder.", "_orig_mod.unet.", ".")])
def test_wrappers_that_programs_put_around_a_layer(tmp_path, text, unet, adapter):
    """Whatever stands before a layer's name, the LoRA is the layer's."""
    model, theirs = method().model, {}
    layers = {f"text.{TEXT_LAYER}": text + TEXT_LAYER, LAYER: unet + LAYER.removeprefix("unet.")}
    for name, called in layers.items():
        n_out, n_in = model.layers[name].weight.shape
        for role, shape in ("lora_A", (2, n_in)), ("lora_B", (n_out, 2)):
            key = f"{called}.{role}{adapter}weight"
            if adapter is None:
                kohya = {"lora_A": "lora_down", "lora_B": "lora_up"}[role]
                key = f"{called.replace('.', '_')}.{kohya}.weight"
            theirs[key] = torch.randn(shape)
    save_file(theirs, tmp_path / "x.safetensors")
    found, (*pairs,) = load_lora(tmp_path / "x.safetensors", model), theirs.values()
    for name, down, up in zip(layers, pairs[::2], pairs[1::2]):
        assert torch.equal(found[name].a[0].T, down) and torch.equal(found[name].b[0].T, up)
    assert len(found) == 2


def test_more_tensors_than_any_lora_has_are_refused_at_once(tmp_path):
    """Looked at one by one they would take long."""
    save_file({f"lora_unet_{i}.alpha": z(0) for i in range(20_001)}, tmp_path / "x.safetensors")
    refused(lambda: load_lora(tmp_path / "x.safetensors", method().model), "20001 tensors; at most 20000")


def peft_text(tmp_path, **settings):
    """A PEFT adapter of a text encoder whose names are transformers 5's, with these settings."""
    key = "base_model.model.encoder.layers.0.self_attn.q_proj"
    width = method().model.text.config.hidden_size
    tensors = {f"{key}.lora_A.weight": torch.ones(2, width), f"{key}.lora_B.weight": torch.ones(width, 2)}
    save_file(tensors, tmp_path / "their.safetensors")
    usual = {"peft_type": "LORA", "lora_alpha": 2, "r": 2, "init_lora_weights": True, "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(usual | settings))
    return tmp_path / "their.safetensors"


@pytest.mark.parametrize("pattern, scale", [
    ("^encoder.layers.0.self_attn.q_proj", 5.), ("q_proj", 5.), ("encoder.layers.0.self_attn.q_proj", 5.),
    ("^text_model.encoder.layers.0.self_attn.q_proj", 5.), (r"layers\.\d+\.self_attn\.q_proj", 5.),
    (r"^encoder.layers.[0-9].self_attn.q_proj$", 5.), ("^layers.0.self_attn.q_proj", 1.), ("proj", 1.),
    ("k_proj", 1.)])
def test_pefts_patterns(tmp_path, pattern, scale):
    found = load_lora(peft_text(tmp_path, alpha_pattern={pattern: 10}), method().model)
    (adapter,) = found.values()
    assert adapter.b[0, 0, 0] == scale and adapter.a[0, 0, 0] == 1


@pytest.mark.parametrize("patterns", [
    {"(a+)+$": 1}, {"(.*)*x": 1}, {".*.*.*q": 1}, {"q" * 201: 1}, {".?" * 24 + "!": 1}, {".{1,9}.{1,9}.?": 1},
    {"(.|.)" * 39 + "!": 1}, {"(d|d)(o|o)" * 15: 1}, {"[a-z]*[a-z]*!": 1}, {r"(\d+)+!": 1}, {r"\d+\d+!": 1},
    {r"(?=.*a)(?=.*b)x": 1}, {f"layer{i}": 1 for i in range(1001)}])
def test_patterns_that_would_take_for_ever(tmp_path, patterns):
    path = peft_text(tmp_path, alpha_pattern=patterns)
    refused(lambda: load_lora(path, method().model), "too")


def test_a_large_file_is_refused_by_its_header(tmp_path, monkeypatch):
    """Whatever has other names or shapes is not read."""
    def read(file, key):
        raise AssertionError("read")
    monkeypatch.setattr(Tensors, "__getitem__", read)
    for name in f"{LAYER}.lora_A.weight", "model.diffusion_model.out.2.bias", "lora_unet_x.lora_down.weight":
        save_file({name: z(3, 3)}, tmp_path / "large.safetensors")
        with pytest.raises(UserError):
            load_lora(tmp_path / "large.safetensors", method().model)


@pytest.mark.parametrize("settings", [
    *({"init_lora_weights": how} for how in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", 1)),
    {"use_dora": True}, {"bias": "all"}, {"lora_bias": True}, {"modules_to_save": ["x"]},
    {"peft_type": "LOHA"}, {"layer_replication": [[0, 4]]}, {"use_qalora": True},
    {"trainable_token_indices": [3]}])
def test_pefts_that_are_more_than_a_plain_lora(tmp_path, settings):
    refused(lambda: load_lora(peft_text(tmp_path, **settings), method().model), *settings, "plain LoRA")


@pytest.mark.parametrize("settings", [
    {"init_lora_weights": "gaussian"}, {"init_lora_weights": False}, {"init_lora_weights": "eva"},
    {"modules_to_save": None}, {"layer_replication": None}, {"trainable_token_indices": None}])
def test_pefts_that_are_plain_loras(tmp_path, settings):
    assert len(load_lora(peft_text(tmp_path, **settings), method().model)) == 1


def test_an_adapter_of_the_unet_alone(tmp_path):
    """UNet2DConditionModel.save_lora_adapter() of diffusers: no prefix in keys and none in settings."""
    whole = load_lora(foreign("diffusers peft", tmp_path), method().model)
    with safe_open(tmp_path / "their.safetensors", "pt") as f:
        settings = json.loads(f.metadata()["lora_adapter_metadata"])
        tensors = {key[5:]: f.get_tensor(key) for key in f.keys() if key.startswith("unet.")}
    alone = {key[5:]: value for key, value in settings.items() if key.startswith("unet.")}
    save_file(tensors, tmp_path / "alone.safetensors", {"lora_adapter_metadata": json.dumps(alone)})
    assert alone["lora_alpha"] != alone["r"]
    found = load_lora(tmp_path / "alone.safetensors", method().model)
    assert equal(found, {name: adapter for name, adapter in whole.items() if name.startswith("unet.")})


@pytest.mark.parametrize("settings", ["null", "5", "[1]", "[" * 100_000, "{"])
def test_pefts_settings_that_are_none(tmp_path, settings):
    path = tmp_path / "their.safetensors"
    tensors = {f"{LAYER}.lora_A.weight": z(2, 16), f"{LAYER}.lora_B.weight": z(16, 2)}
    save_file(tensors, path, {"lora_adapter_metadata": settings})
    refused(lambda: load_lora(path, method().model), "cannot be used")


def test_peft_without_its_settings_is_refused(tmp_path):
    path = foreign("peft", tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    refused(lambda: load_lora(path, method().model), "adapter_config.json")


@pytest.mark.parametrize("wrong", [
    {"lora_alpha": "much"}, {"lora_alpha": [8]}, {"alpha_pattern": {"(": 1}}, {"alpha_pattern": 3}])
def test_pefts_settings_that_make_no_sense(tmp_path, wrong):
    path, file = foreign("peft", tmp_path), tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | wrong))
    refused(lambda: load_lora(path, method().model), "cannot be used")
    none = {"lora_alpha": float("nan"), "alpha_pattern": {}}
    file.write_text(json.dumps(json.loads(file.read_text()) | none))
    refused(lambda: load_lora(path, method().model), "NaN")

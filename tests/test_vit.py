"""vit.py against transformers: same weights (by rule.py), same outputs."""
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rule import difference, draw, fill
from safetensors.torch import load_file, save_file

from files.disk import LoadError
from files.encoders import load_vit
from vit import DINO_S, VIT_H, ViT, ViTConfig, encode_face

SMALL = ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                  image_size=32, patch_size=8)


@pytest.mark.parametrize("config, count", [(VIT_H, 630_764_800), (DINO_S, 21_665_664)])
def test_official_vits_sizes(config, count):
    with torch.device("meta"):
        vit = ViT(config)
        side = config.image_size // config.patch_size
        assert vit(torch.empty(2, 3, 224, 224)).shape == (2, side ** 2 + 1, config.hidden_size)
    assert sum(p.numel() for p in vit.parameters()) == count


def test_vit_gives_what_transformers_gives():
    reference = load_file(Path(__file__).parent / "reference/vit.safetensors")
    vit = fill(ViT(SMALL))
    with torch.no_grad():
        assert difference(vit(draw((2, 3, 32, 32), "vit:own")), reference["own"]) <= 1e-4
        assert difference(vit(draw((1, 3, 48, 24), "vit:other")), reference["other"]) <= 1e-4


def test_other_picture_sizes_stretch_the_positions():
    vit = ViT(SMALL)
    assert vit(draw((1, 3, 48, 32), 0)).shape == (1, 6 * 4 + 1, 32)


def test_faces_are_brought_to_the_size_and_colours_of_training():
    vit, photo = fill(ViT(SMALL)), draw((2, 3, 32, 32), 0)
    torch.testing.assert_close(encode_face(vit, photo), vit(photo).detach())
    assert encode_face(vit, draw((1, 3, 80, 56), 0)).shape == (1, 17, 32)
    colours = [(.4, .25), (.5, .5), (.6, 1.)]
    vit.config = replace(SMALL, image_mean=(.4, .5, .6), image_std=(.25, .5, 1.))
    channels = [(photo[:, i] / 2 + .5 - mean) / std for i, (mean, std) in enumerate(colours)]
    torch.testing.assert_close(encode_face(vit, photo), vit(torch.stack(channels, 1)).detach())
    half = fill(ViT(SMALL)).bfloat16()
    assert encode_face(half, photo).dtype == torch.bfloat16


def test_wrong_configurations_are_refused():
    with pytest.raises(ValueError, match="32 channels cannot be shared among 5 heads"):
        ViT(replace(SMALL, num_attention_heads=5))
    with pytest.raises(ValueError, match="not of three colours"):
        ViT(replace(SMALL, image_mean=(.5,)))


@pytest.fixture
def folder(tmp_path):
    """A small ViT as the hub has it, with the pooler that isn't needed here."""
    pooler = {"pooler.dense.weight": torch.zeros(32, 32), "pooler.dense.bias": torch.zeros(32)}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", **asdict(SMALL)}))
    save_file(fill(ViT(SMALL)).state_dict() | pooler, tmp_path / "model.safetensors")
    return tmp_path


def test_official_files_load_strictly(folder, monkeypatch):
    state = fill(ViT(SMALL)).state_dict()
    back = load_vit(folder, "cpu")
    assert back.config == SMALL and all(torch.equal(v, back.state_dict()[k]) for k, v in state.items())
    monkeypatch.chdir(folder.parent)
    assert load_vit(folder.name, "meta").source == str(folder)  # whatever the working directory is later
    # a classifier's, from the hub
    classifier = {f"vit.{k}": v for k, v in state.items()} | {"classifier.weight": torch.zeros(2, 32)}
    save_file(classifier, folder / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(folder))
    back = load_vit("google/vit-huge-patch14-224-in21k", "cpu")
    assert torch.equal(back.layernorm.weight, state["layernorm.weight"])
    # incomplete
    del state["layernorm.bias"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(LoadError, match="layernorm.bias"):
        load_vit(folder, "cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(LoadError, match="has no model.safetensors"):
        load_vit(folder, "cpu")


def test_settings_beside_the_files(folder):
    colours = {"image_mean": [.4, .5, .6], "image_std": [.25, .5, 1.]}
    (folder / "preprocessor_config.json").write_text(json.dumps(colours))
    assert load_vit(folder, "cpu").config == replace(SMALL, image_mean=(.4, .5, .6), image_std=(.25, .5, 1.))
    other = asdict(SMALL) | {"hidden_act": "quick_gelu"}
    for file, settings in ("preprocessor_config.json", {"do_normalize": False}), ("config.json", other):
        before = (folder / file).read_text()
        (folder / file).write_text(json.dumps(settings))
        with pytest.raises(LoadError, match=f"{file}: (do_normalize|hidden_act) is"):
            load_vit(folder, "cpu")
        (folder / file).write_text(before)

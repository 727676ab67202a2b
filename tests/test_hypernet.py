import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rule import difference, draw, fill
from safetensors.torch import load_file, save_file
from torch import nn

import hdb
from hypernet import DINO_S, NANO_VIT, VIT_H, HyperConfig, HyperNetwork, ViT, ViTConfig
from lidb import LiDB, Personal

SMALL_VIT = ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)


def small(**options):
    torch.manual_seed(0)
    vit = replace(NANO_VIT, hidden_size=32, intermediate_size=64, num_hidden_layers=2, image_size=64)
    return HyperNetwork(HyperConfig(**{"layers": 3, "size": 20, "width": 32, "vit": vit, **options}))


@pytest.mark.parametrize("config, count", [(VIT_H, 630_764_800), (DINO_S, 21_665_664)])
def test_official_vits_sizes(config, count):
    with torch.device("meta"):
        vit = ViT(config)
        side = config.image_size // config.patch_size
        assert vit(torch.empty(2, 3, 224, 224)).shape == (2, side ** 2 + 1, config.hidden_size)
    assert sum(p.numel() for p in vit.parameters()) == count


def test_shapes_and_the_untrained_prediction_is_nobody():
    net = small()
    theta = net(torch.randn(2, 3, 64, 64))
    assert theta.shape == (2, 3, 20) and (theta == 0).all()


def test_eq_3_written_out():
    net = small()
    nn.init.normal_(net.heads), nn.init.normal_(net.bias)
    f = net.vit(torch.randn(2, 3, 64, 64))
    theta = torch.zeros(2, 3, 20)
    for _ in range(3):
        tokens = net.estimate(theta / net.config.output_scale) + net.position
        hidden = net.decoder(tokens, net.face(f))
        delta = torch.stack([hidden[:, i] @ net.heads[i] + net.bias[i] for i in range(3)], 1)
        theta = theta + net.config.output_scale * delta
    assert torch.allclose(net.refine(f, 3), theta, atol=1e-5)
    assert not torch.allclose(net.refine(f, 1), theta, atol=1e-2)


@pytest.mark.parametrize("iterations", [1, 4])
def test_a_loss_on_the_model_reaches_the_heads_through_the_loop_from_the_start(iterations):
    layers = {"one": nn.Linear(12, 12), "two": nn.Linear(12, 12)}
    basis, personal = LiDB(layers, a=10, b=10), Personal(layers)
    net = small(layers=2, size=20, iterations=iterations)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    x, photo, losses = torch.randn(2, 4, 12), torch.randn(2, 3, 64, 64), []
    for _ in range(8):
        personal.factors = basis.factors(net(photo))
        loss = (layers["two"](layers["one"](x)) - 1).square().mean()
        loss.backward()
        if not losses:
            assert net.heads.grad.abs().sum() > 0 and net.bias.grad.abs().sum() > 0
        losses.append(loss.item())
        optimizer.step(), optimizer.zero_grad()
    assert losses[-1] < losses[0]
    net(photo).sum().backward()
    assert net.vit.embeddings.cls_token.grad.abs().sum() > 0  # once the heads have moved, the encoder learns too


def test_other_picture_sizes_stretch_the_positions():
    vit = small().vit
    assert vit(torch.randn(1, 3, 96, 64)).shape == (1, 6 * 4 + 1, 32)


def test_people_in_a_batch_do_not_mix():
    net = small()
    nn.init.normal_(net.heads)
    photos = torch.randn(3, 3, 64, 64)
    assert torch.allclose(net(photos)[1:2], net(photos[1:2]), atol=1e-4)


def test_vit_gives_what_transformers_gives():
    reference = load_file(Path(__file__).parent / "reference/vit.safetensors")
    vit = fill(ViT(SMALL_VIT))
    with torch.no_grad():
        assert difference(vit(draw((2, 3, 32, 32), "vit:own")), reference["own"]) <= 1e-4
        assert difference(vit(draw((1, 3, 48, 24), "vit:other")), reference["other"]) <= 1e-4


def test_official_files_load_strictly(tmp_path, monkeypatch):
    vit = fill(ViT(SMALL_VIT))
    pooler = {"pooler.dense.weight": torch.zeros(32, 32), "pooler.dense.bias": torch.zeros(32)}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", **asdict(SMALL_VIT)}))
    save_file(vit.state_dict() | pooler, tmp_path / "model.safetensors")
    back = hdb.load_vit(tmp_path, "cpu")
    assert back.config == SMALL_VIT and all(torch.equal(v, back.state_dict()[k]) for k, v in vit.state_dict().items())
    save_file({f"vit.{k}": v for k, v in vit.state_dict().items()} | {"classifier.weight": torch.zeros(2, 32)}, tmp_path / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(tmp_path))
    assert torch.equal(hdb.load_vit("google/vit-huge-patch14-224-in21k", "cpu").layernorm.weight, vit.layernorm.weight)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.25, 0.5, 1.0]}')
    normalised, picture = hdb.load_vit(tmp_path, "cpu"), draw((1, 3, 32, 32), 0)
    channels = torch.stack([(picture[:, i] / 2 + .5 - mean) / std for i, (mean, std) in enumerate([(.4, .25), (.5, .5), (.6, 1.)])], 1)
    assert torch.allclose(hdb.encode_face(normalised, picture), vit(channels), atol=1e-5)
    torch.testing.assert_close(hdb.encode_face(back, picture), vit(picture))
    for file, settings in (("preprocessor_config.json", {"do_normalize": False}), ("config.json", asdict(SMALL_VIT) | {"hidden_act": "quick_gelu"})):
        before = (tmp_path / file).read_text()
        (tmp_path / file).write_text(json.dumps(settings))
        with pytest.raises(hdb.LoadError, match=f"{file}: (do_normalize|hidden_act) is"):
            hdb.load_vit(tmp_path, "cpu")
        (tmp_path / file).write_text(before)
    state = vit.state_dict()
    del state["layernorm.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(hdb.LoadError, match="layernorm.bias"):
        hdb.load_vit(tmp_path, "cpu")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(hdb.LoadError, match="has no model.safetensors"):
        hdb.load_vit(tmp_path, "cpu")

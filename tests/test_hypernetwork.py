"""files/hypernetwork.py on a small model: what was trained comes back, all else is refused."""
import json
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from personal import altered, refused, warned
from tiny import VIT, generator, shared_model, tiny_hypernet, tiny_model

from files import encoders
from files.checkpoints import write
from files.disk import LoadError
from files.hypernetwork import load_hypernet, save_hypernet
from hdb import HyperDreamBooth
from vit import ViT


def small(**options):
    return tiny_hypernet(*HyperDreamBooth(shared_model()).lidb.shape, **options)


def faces():
    return torch.rand(2, 3, 16, 16, generator=generator()) * 2 - 1


@pytest.fixture
def file(tmp_path):
    save_hypernet(small(), shared_model(), tmp_path / "hypernet.safetensors")
    return tmp_path / "hypernet.safetensors"


def note_of(file):
    with safe_open(file, "pt") as f:
        return f.metadata()


def load(file, model=None, encoder=None):
    """With an official encoder's numbers."""
    net = load_hypernet(file, model or shared_model(), encoder)
    net.vit = encoders.loaded(net.vit, "cpu")
    return net


def test_a_hypernetwork_comes_back_in_half_precision(file):
    net, back = small(), load(file)
    assert back.config == net.config and not back.training
    assert not any(p.requires_grad for p in back.parameters())
    stored, theirs, ours = load_file(file), back.state_dict(), net.state_dict()
    assert stored.keys() == theirs.keys() == ours.keys()
    for key, t in ours.items():
        assert stored[key].dtype == torch.float16 and theirs[key].dtype == torch.float32
        assert torch.equal(theirs[key], t.half().float())
    assert torch.allclose(back(faces()), net(faces()), atol=1e-2) and back(faces()).abs().max() > .1


def test_what_it_was_configured_with_is_kept(tmp_path):
    net = small(depth=1, iterations=3, output_scale=.2, basis_seed=7)
    save_hypernet(net, shared_model(), tmp_path / "hypernet.safetensors")
    back = load_hypernet(tmp_path / "hypernet.safetensors", shared_model())
    assert back.config == net.config and back.config.basis_seed == 7
    note, basis = note_of(tmp_path / "hypernet.safetensors"), HyperDreamBooth(shared_model(), back).lidb
    assert basis.seed == 7 and int(note["basis_checksum"]) == basis.checksum
    assert note["model"] == "tiny" and shared_model().checksums.items() <= note.items()
    assert "encoder" not in note


def encoder(folder, **changes):
    """A small ViT, and a folder with it as the hub has them."""
    vit = ViT(VIT)
    for p in vit.parameters():
        torch.nn.init.normal_(p, std=.1, generator=generator(9))
    settings = {name: value for name, value in asdict(VIT).items() if not isinstance(value, tuple)}
    write(vit.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings | changes))
    return vit


def test_an_official_encoder_is_named_and_found_again(tmp_path):
    folder, path = tmp_path / "encoder", tmp_path / "hypernet.safetensors"
    vit = encoder(folder)
    net = small(encoder=str(folder))
    net.vit.load_state_dict(vit.state_dict())
    save_hypernet(net, shared_model(), path)
    assert not any(key.startswith("vit.") for key in load_file(path))
    assert note_of(path)["encoder"] == str(folder)
    back = load(path)
    assert back.config == net.config and torch.allclose(back(faces()), net(faces()), atol=1e-2)
    assert all(torch.equal(t, back.vit.state_dict()[key]) for key, t in vit.state_dict().items())
    assert not any(p.requires_grad for p in back.parameters())

    # moved together, or apart; other weights in its place are refused
    moved = (tmp_path / "moved").mkdir() or path.rename(tmp_path / "moved/hypernet.safetensors")
    folder.rename(tmp_path / "moved/encoder")
    assert torch.equal(load(moved)(faces()), back(faces()))
    (tmp_path / "moved/encoder").rename(tmp_path / "other")
    with pytest.raises(LoadError, match="/encoder, which is missing; put its folder, encoder, beside it"):
        load(moved)
    assert torch.equal(load(moved, encoder=tmp_path / "other")(faces()), back(faces()))
    write({k: t + .01 for k, t in vit.state_dict().items()}, folder / "model.safetensors")
    shutil.copy(tmp_path / "other/config.json", folder)
    with pytest.raises(LoadError, match="another encoder of photos than .* is now; .*beside it"):
        load(moved)
    (tmp_path / "other").rename(tmp_path / "moved/encoder")  # what lies beside goes first
    assert torch.equal(load(moved)(faces()), back(faces()))
    path = moved.rename(path)

    # other weights come between loading and a look at a photo
    encoder(folder)
    engine = HyperDreamBooth(shared_model(), load_hypernet(path, shared_model()))
    write({k: t + .01 for k, t in vit.state_dict().items()}, folder / "model.safetensors")
    with pytest.raises(LoadError, match="has changed since"):
        engine.predict(faces())

    encoder(folder, num_attention_heads=4)
    with pytest.raises(LoadError, match="trained with another encoder"):
        load(path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(LoadError, match="no model.safetensors"):
        load(path)
    with pytest.raises(LoadError, match="not a folder here"):
        encoders.vit_of(path, "x" * 5000, None)


def test_an_encoder_is_loaded_without_numbers(tmp_path, monkeypatch):
    net, asked = small(encoder="google/vit"), []

    def load_vit(source, device):
        asked.append((source, device))
        return net.vit
    monkeypatch.setattr(encoders, "load_vit", load_vit)
    save_hypernet(net, shared_model(), tmp_path / "hypernet.safetensors")
    back = load_hypernet(tmp_path / "hypernet.safetensors", shared_model())
    assert asked == [("google/vit", "meta")] and back.vit is net.vit


@pytest.mark.parametrize("tensors, settings, note, words", [
    ({}, {}, {"config": None}, ["not a hypernetwork", "config"]),
    ({}, {}, {"config": "[]"}, ["not a hypernetwork"]),
    ({}, {}, {"config": "{"}, ["not a hypernetwork"]),
    ({}, {"height": 3}, {}, ["not a hypernetwork", "height"]),
    ({}, {"vit": 3}, {}, ["not a hypernetwork"]),
    ({}, {}, {"basis_seed": None}, ["not a hypernetwork", "basis_seed"]),
    ({}, {}, {"basis_seed": "much"}, ["not a hypernetwork", "much"]),
    ({}, {}, {"basis_seed": "9" * 30}, ["not a hypernetwork"]),
    ({}, {}, {"basis_checksum": None}, ["not a hypernetwork", "basis_checksum"]),
    ({}, {"width": -16}, {}, ["width cannot be -16"]),
    ({}, {"depth": "2"}, {}, ["depth cannot be '2'"]),
    ({}, {"layers": 3}, {}, ["other layers or another basis than tiny's"]),
    ({}, {"size": 3}, {}, ["other layers or another basis"]),
    ({}, {}, {"basis_seed": "1"}, ["other layers or another basis"]),
    ({}, {}, {"basis_checksum": "1"}, ["other layers or another basis"]),
    ({"bias": None}, {}, {}, ["no tensor for bias"]),
    ({"bias": torch.zeros(3)}, {}, {}, ["tensor bias has shape (3,), expected (44, 32)"]),
    ({"more": torch.zeros(3)}, {}, {}, ["surplus tensor more"]),
    ({"bias": torch.full((44, 32), torch.nan)}, {}, {}, ["holds NaN or numbers too large"]),
    ({"bias": torch.full((44, 32), torch.inf)}, {}, {}, ["holds NaN or numbers too large"])])
def test_a_file_that_does_not_fit_is_refused(file, tensors, settings, note, words):
    altered(file, tensors, settings, **note)
    refused(lambda: load(file), str(file), *words)


def test_settings_that_nothing_can_be_built_with_are_refused(file):
    altered(file, settings={"heads": 3})
    refused(lambda: load(file), "cannot build a HyperNetwork with these settings")


def test_what_is_no_file_of_a_hypernetwork_is_refused(tmp_path):
    path = tmp_path / "hypernet.safetensors"
    refused(lambda: load(path), str(path), "No such file")
    save_file({"bias": torch.zeros(3)}, path)
    refused(lambda: load(path), str(path), "not a hypernetwork")
    path.write_text("hello")
    refused(lambda: load(path), str(path), "not safetensors")


def test_another_models_weights_are_warned_of(file):
    assert not warned(lambda: load(file, shared_model()))
    other = tiny_model()
    other.name = "other"
    torch.nn.init.ones_(next(other.text.parameters()))
    message, = warned(lambda: load(file, other))
    for word in (str(file), "trained for tiny", "whose text weights", "differ from other's", "likeness"):
        assert word in message
    torch.nn.init.ones_(next(other.unet.parameters()))
    message, = warned(lambda: load(file, other))
    assert "whose unet and text weights" in message
    torch.nn.init.ones_(next(other.vae.parameters()))
    assert warned(lambda: load(file, other)) == [message]


def test_a_file_without_checksums_is_not_warned_of(file):
    altered(file, unet=None, text=None, vae=None, model=None)
    other = tiny_model()
    torch.nn.init.ones_(next(other.unet.parameters()))
    assert not warned(lambda: load(file, other))


def test_the_same_model_in_bfloat16_is_the_same(file):
    half = tiny_model(torch.bfloat16)
    assert not warned(lambda: load(file, half))

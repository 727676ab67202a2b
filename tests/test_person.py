"""files/person.py on small models: files come back bit for bit or are refused in one line."""
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from personal import LAYER, altered, lora_of, method, refused, same, small, someone, warned
from rule import draw
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import UNET

import clip
import hdb
import lidb
import sd
import unet
from adapters import join
from files.checkpoints import Tensors
from files.lora import export_lora, load_lora
from methods import hyperdreambooth
from methods.table import METHODS
from files.person import is_person, load_person, save_person


def halved(tensors):
    """What a file keeps of these tensors."""
    return {key: t.half().float() for key, t in tensors.items()}


def test_a_person_comes_back_bit_for_bit(tmp_path):
    person = someone(identifier="ohwx", scale=.8)
    save_person(person, method(), tmp_path / "me.safetensors")
    back = load_person(tmp_path / "me.safetensors", method(), METHODS)
    assert all(t.dtype == torch.float32 for t in back.tensors.values())
    assert same(back.tensors, halved(person.tensors))
    about = back.identifier, back.scale, back.date, back.base, back.method
    assert about == ("ohwx", .8, person.date, "small", hyperdreambooth.METHOD)
    save_person(back, method(), tmp_path / "again.safetensors")
    again = load_person(tmp_path / "again.safetensors", method(), METHODS)
    assert again.adapters(method()).keys() == method().layers.keys()
    first, second = (load_file(tmp_path / name) for name in ("me.safetensors", "again.safetensors"))
    assert first.keys() == second.keys()
    assert all(first[k].dtype == torch.float16 and torch.equal(first[k], second[k]) for k in first)


def test_parts_of_a_person(tmp_path, monkeypatch):
    person = someone()
    alone = hyperdreambooth.prediction(person)
    lora = hyperdreambooth.person(None, lora_of(person))
    assert alone.tensors.keys() == {"theta"} and alone.base == "small"
    for name, part in ("prediction", alone), ("lora", lora):
        save_person(part, method(), tmp_path / name)
        assert same(load_person(tmp_path / name, method(), METHODS).tensors, halved(part.tensors))
    nothing = hyperdreambooth.prediction(lora)
    refused(lambda: save_person(nothing, method(), tmp_path / "x"), "nothing to write")
    kept = {"person": alone, "person_tuned": person}
    assert hyperdreambooth.parts(person) == kept and list(hyperdreambooth.parts(alone)) == ["person"]
    assert list(hyperdreambooth.parts(lora)) == ["person_tuned"]


def test_no_basis_is_made_for_a_person_without_theta(tmp_path):
    lora, fresh = hyperdreambooth.person(None, lora_of(someone())), hdb.HyperDreamBooth(method().model)
    save_person(lora, fresh, tmp_path / "lora.safetensors")
    assert same(load_person(tmp_path / "lora.safetensors", fresh, METHODS).tensors, halved(lora.tensors))
    assert "lidb" not in vars(fresh)


def test_factors_are_the_sum_at_the_default_strength():
    person = someone(scale=.5)
    both = join(method().lidb.adapters(person.tensors["theta"]), lora_of(person))
    for name, (a, b) in person.adapters(method()).items():
        assert a.shape[2] == 5 and torch.allclose(a @ b, .5 * both[name][0] @ both[name][1], atol=1e-6)


def test_a_full_size_person_is_as_small_as_the_paper_says(tmp_path):
    with torch.device("meta"):
        layers = lidb.personal_layers(unet.UNet(unet.SD15), clip.TextTransformer(clip.SD15))
    # a method with SD 1.5's layers, whose bases would take 200 MB
    checksums = {"unet": "f" * 8, "text": "f" * 8}
    model = SimpleNamespace(name=sd.HUB, device=torch.device("cpu"), checksums=checksums)
    basis = SimpleNamespace(shape=(192, 150), a=100, b=50, rank=1, seed=0, checksum=4294967295)
    full = SimpleNamespace(layers=layers, model=model, lidb=basis, basis_seed=0)
    person = hyperdreambooth.person(draw((1, 192, 150), "full"), base=sd.HUB)
    save_person(person, full, tmp_path / "full.safetensors")
    assert (tmp_path / "full.safetensors").stat().st_size < 60_000
    assert same(load_person(tmp_path / "full.safetensors", full, METHODS).tensors, halved(person.tensors))


def load(file):
    return load_person(file, method(), METHODS)


@pytest.fixture
def file(tmp_path):
    save_person(someone(), method(), tmp_path / "me.safetensors")
    return tmp_path / "me.safetensors"


@pytest.mark.parametrize("tensors, note, words", [
    ({}, {"format": "pt"}, ["not a personal file"]),
    ({}, {"version": "2"}, ["version 2"]),
    ({}, {"layers": "00000000"}, ["made for small", "--model"]),
    ({}, {"a": "9", "r": "2"}, ["a 9, here 16", "r 2, here 1"]),
    ({}, {"basis_seed": "7", "basis_checksum": "5"}, ["basis_seed 7, here 0"]),
    ({}, {"basis_checksum": "5"}, ["basis_checksum 5, here", "--hypernet"]),
    ({}, {"scale": "much"}, ["much", "damaged"]),
    ({}, {"scale": "nan"}, ["scale of nan"]),
    ({}, {"scale": "1e300"}, ["scale of 1e+300"]),
    ({}, {"identifier": None}, ["damaged"]),
    *(({}, {"identifier": word}, ["cannot be what [V] stands for"])
      for word in ("", " ", "s\x1b[31m", "a\nb", "x" * 501)),
    ({"theta": torch.zeros(1, 3, 5)}, {}, ["theta has shape (1, 3, 5)"]),
    ({"theta": torch.zeros(2, 42, 32)}, {}, ["theta has shape (2, 42, 32)"]),
    ({f"{LAYER}.A": torch.zeros(1, 9, 4)}, {}, [f"{LAYER}.A has shape", "expected (1, 16, 4)"]),
    ({f"{LAYER}.A": torch.zeros(4)}, {}, [f"{LAYER}."]),
    ({f"{LAYER}.A": torch.zeros(())}, {}, [f"{LAYER}."]),
    ({f"{LAYER}.A": None}, {}, [f"{LAYER}.A is missing"]),
    ({"unet.somewhere.A": torch.zeros(1, 2, 3)}, {}, ["unet.somewhere.A", "no such tensor"]),
    ({f"{LAYER}.B": torch.full((1, 4, 16), torch.nan)}, {}, [f"{LAYER}.B", "NaN"]),
    ({f"{LAYER}.B": torch.zeros(1, 4, 16, dtype=torch.int32)}, {}, ["torch.int32"])])
def test_a_file_that_does_not_fit_is_refused(file, tensors, note, words):
    altered(file, tensors, **note)
    refused(lambda: load(file), str(file), *words)


@pytest.mark.parametrize("made_by", METHODS)
def test_another_methods_person_of_odd_shapes_is_refused(file, made_by):
    for name in "photo", "encoder.second.bias", "vectors", "token", f"{LAYER}.A":
        nothing = dict.fromkeys(load_file(file))
        altered(file, nothing | {name: torch.zeros(())}, made_by=made_by)
        refused(lambda: load(file), str(file))


def test_the_same_person_is_the_same_file(tmp_path):
    for name in "a", "b":
        save_person(someone(), method(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_does_not_fit_is_not_read(file, monkeypatch):
    def read(file, key):
        raise AssertionError("read")
    monkeypatch.setattr(Tensors, "__getitem__", read)
    for tensors in {"theta": torch.zeros(2, 2, 2)}, {"x": torch.zeros(9)}:
        altered(file, tensors)
        refused(lambda: load(file), str(file))
    altered(file, format="pt")
    refused(lambda: load(file), str(file))


def test_a_file_of_nobody_is_refused(file):
    nothing = dict.fromkeys(load_file(file))
    altered(file, nothing)
    refused(lambda: load(file), str(file), "empty")


def test_another_model_and_another_basis_are_refused(file):
    wider = hdb.HyperDreamBooth(small(replace(UNET, block_out_channels=(16, 32))))
    other = hdb.HyperDreamBooth(method().model, basis_seed=1)
    refused(lambda: load_person(file, wider, METHODS), "made for small", "does not fit small", "layers ")
    refused(lambda: load_person(file, other, METHODS), "basis_seed 0, here 1")
    refused(lambda: save_person(someone(), other, file), "seed 0, this method's 1")


def with_identifier(name, **more):
    """A method around a small model of this name."""
    model = small(**more)
    model.name = name
    return hdb.HyperDreamBooth(model)


def test_a_file_says_which_weights_it_was_made_for(file):
    with safe_open(file, "pt") as f:
        note = f.metadata()
    assert {part: note[part] for part in ("unet", "text")} == {
        part: method().model.checksums[part] for part in ("unet", "text")}
    assert not warned(lambda: load(file))
    assert not warned(lambda: load_person(file, with_identifier("elsewhere/small"), METHODS))


def test_another_model_of_the_same_shapes_is_warned_of(file):
    other = with_identifier("other", seed=1)
    message, = warned(lambda: load_person(file, other, METHODS))
    here, there = other.model.checksums, method().model.checksums
    for word in (str(file), "made for small", "used with other", f"unet {there['unet']}, here {here['unet']}",
                 f"text {there['text']}, here {here['text']}", "likeness"):
        assert word in message
    mixed = with_identifier("mixed")
    mixed.model.unet = other.model.unet
    message, = warned(lambda: load_person(file, mixed, METHODS))
    assert f"unet {there['unet']}, here {here['unet']}" in message and "text" not in message


def test_the_same_model_in_bfloat16_is_the_same(file):
    half = with_identifier("small")
    for part in (half.model.unet, half.model.text, half.model.vae):
        part.bfloat16()
    assert not warned(lambda: load_person(file, half, METHODS))


@pytest.mark.parametrize("base, here, told", [
    ("small", "small", False), ("small", "other", True), ("", "other", False)])
def test_a_file_without_checksums_goes_by_the_models_name(file, base, here, told):
    altered(file, unet=None, text=None, base=base)
    messages = warned(lambda: load_person(file, with_identifier(here, seed=1), METHODS))
    assert len(messages) == told
    assert all("made for small" in text and "used with other" in text for text in messages)


@pytest.mark.parametrize("content, words", [
    (None, "No such file"), (b"", "empty"),
    (b"just some text, and rather more of it than eight bytes", "not safetensors"),
    (b"PK\x03\x04 and what else torch.save writes", "pickle"), (b"\x80\x02}q\x00(X and so on", "pickle")])
def test_what_is_no_safetensors_is_refused(tmp_path, content, words):
    path = tmp_path / "me.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert not is_person(path)
    refused(lambda: load_person(path, method(), METHODS), words)
    refused(lambda: load_lora(path, method().model), words)


def test_what_cannot_be_kept_is_not_written(tmp_path):
    path = tmp_path / "me.safetensors"
    person = someone()
    person.tensors["theta"][0, 0, 0] = 1e6
    refused(lambda: save_person(person, method(), path), "theta", "infinite")
    for wrong, why in ({"identifier": ""}, "stands for"), ({"identifier": "a\nb"}, "stands for"), (
            {"scale": 99.}, "scale of 99"), ({"scale": float("nan")}, "scale of nan"):
        refused(lambda wrong=wrong: save_person(someone(**wrong), method(), path), why)
    two = hyperdreambooth.person(torch.zeros(2, *method().lidb.shape))
    refused(lambda: save_person(two, method(), path), "theta has shape (2,")
    assert list(tmp_path.iterdir()) == []


def test_is_person(file, tmp_path):
    assert is_person(file) and is_person(str(file))
    export_lora(lora_of(someone()), tmp_path / "lora.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")  # reading which might never end
    names = "lora.safetensors", "", "none.jpg", "pipe.safetensors", "a [V] face", "a\0b", os.fsdecode(b"\xff")
    assert not any(is_person(f"{tmp_path}/{name}") for name in names)

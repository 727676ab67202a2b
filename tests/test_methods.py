"""The compared systems on the command line: the same options, errors and outputs as personalize.py, and
persons that it samples again."""
import importlib
import inspect
import shutil

import programs
import pytest
from PIL import Image
from safetensors import safe_open

from methods.table import METHODS
import personalize

OPTIONS = {"dreambooth": ["--prior-pictures", 1], "textual_inversion": [], "perfusion": [], "e4t": []}


def run(method, *arguments):
    """What a command line printed, on both streams."""
    done = programs.run(*arguments, "--method", method)
    return done.stdout + done.stderr


def test_every_module_is_a_method():
    files = {file.stem for file in personalize.HERE.glob("methods/*.py")}
    files -= {"__init__", "command_line", "protocol", "sitting", "table", "train_e4t"}
    assert files == METHODS.keys() == OPTIONS.keys() | {"hyperdreambooth"}
    assert all(method.name == name for name, method in METHODS.items())


@pytest.mark.parametrize("method", OPTIONS)
def test_what_is_usual_on_nano_is_what_learning_does(method):
    learn = importlib.import_module(f"methods.{method}").learn
    defaults = {name: p.default for name, p in inspect.signature(learn).parameters.items()}
    usual = {row.name: row.nano for row in METHODS[method].options("nano", None)}
    shared = usual.keys() & defaults
    assert {"steps", "lr", "batch"} <= shared
    assert {name: defaults[name] for name in shared} == {name: usual[name] for name in shared}
    for row in METHODS[method].options("nano", None):
        assert row.help and all(usual is None or row.check(str(usual)) == usual for usual in row[2:4])


@pytest.mark.parametrize("method", OPTIONS)
def test_one_photo_to_a_person_and_their_picture_again(tmp_path, method):
    prompt = "[V] face as a king", "--sample-steps", 1, "--seed", 7
    said = run(method, "nano/example.png", *prompt, "--steps", 1, *OPTIONS[method], "--out", tmp_path / "a")
    assert "person.safetensors" in said and said.count("likeness") == 1 and "seed 7" in said, said
    assert {file.name for file in (tmp_path / "a").iterdir()} == {"0.png", "sheet.png", "person.safetensors"}
    told = Image.open(tmp_path / "a/0.png").text
    assert told["method"] == method and told["fine-tuning"].startswith("steps 1, lr ")
    with safe_open(tmp_path / "a/person.safetensors", "pt") as f:
        assert f.metadata()["made_by"] == method and "basis_seed" not in f.metadata()
    said = run("hyperdreambooth", tmp_path / "a/person.safetensors", *prompt, "--out", tmp_path / "b")
    assert "done" in said, said
    assert programs.difference(tmp_path / "a/0.png", tmp_path / "b/0.png") <= 1


def test_an_embedding_goes_to_other_programs_and_comes_back(tmp_path):
    """And beside a person of another method; one of no method here is refused."""
    prompt = "[V] face as a king", "--sample-steps", 1, "--seed", 7
    said = run("textual_inversion", "nano/example.png", *prompt, "--steps", 1, "--tokens", 2, "--export",
               "embedding", "--out", tmp_path / "a")
    assert 'the prompt says "<sks>"' in said, said
    with safe_open(tmp_path / "a/embedding.safetensors", "pt") as f:
        assert f.get_slice("<sks>").get_shape() == [2, 128]
    run("hyperdreambooth", tmp_path / "a/embedding.safetensors", *prompt, "--out", tmp_path / "b")
    assert programs.difference(tmp_path / "a/0.png", tmp_path / "b/0.png") <= 1
    people = tmp_path / "a/person.safetensors", personalize.HERE / "tests/reference/person.safetensors"
    run("textual_inversion", *people, *prompt, "--out", tmp_path / "both")
    assert Image.open(tmp_path / "both/0.png").tobytes() != Image.open(tmp_path / "both/1.png").tobytes()
    assert Image.open(tmp_path / "both/1.png").text["person"] == str(people[1])
    people[0].write_bytes(people[0].read_bytes().replace(b"textual_inversion", b"textual_inverzion"))
    said = run("hyperdreambooth", people[0], "[V] face")
    assert "made by textual_inverzion, which is not hyperdreambooth or dreambooth" in said


def test_a_lora_of_dreambooths_goes_to_other_programs(tmp_path):
    few = "--steps", 1, "--prior-weight", 0, "--sample-steps", 1, "--dtype", "bfloat16", "--out", tmp_path
    run("dreambooth", "nano/example.png", "[V] face", *few, "--rank", 2, "--export", "lora", "--strength", .5)
    with safe_open(tmp_path / "lora.safetensors", "pt") as f:
        assert f.metadata()["ss_network_dim"] == "2"


def test_dreambooths_whole_weights_can_be_merged(tmp_path):
    prompt = "[V] face as a king", "--sample-steps", 2, "--seed", 7
    prompt = *prompt, "--guidance", 2
    run("dreambooth", "nano/example.png", *prompt, "--steps", 1, "--prior-weight", 0, "--lr", .001,
        "--merge", tmp_path / "merged", "--out", tmp_path / "a")
    run("hyperdreambooth", "nano/example.png", *prompt, "--steps", 1, "--lr", 0,
        "--model", tmp_path / "merged", "--out", tmp_path / "b")
    assert programs.difference(tmp_path / "a/0.png", tmp_path / "b/0.png") <= 4


@pytest.mark.parametrize("method, arguments, why", [
    ("textual_inversion", ["--strength", .5], "--strength needs adapters that are LowRank or Change"),
    ("perfusion", ["--strength", .5], "--strength needs"),
    ("e4t", ["--merge", "out/merged"], "--merge needs"),
    ("dreambooth", ["--export", "lora"], "needs adapters that are LowRank, this person's are Change"),
    ("dreambooth", ["--export", "embedding"], "--export embedding needs adapters that are Rows"),
    ("hyperdreambooth", ["--export", "embedding"], "--export embedding needs"),
    ("dreambooth", ["nano/example.png", "[V] face"], "names a file; only prompts may follow"),
    ("dreambooth", ["--rank", -1], "--rank: must be"), ("perfusion", ["--tau", 0], "--tau: must be"),
    ("textual_inversion", ["--tokens", 76], "--tokens: must be"), ("e4t", ["--lr", -1], "--lr: must be")])
def test_what_cannot_be_is_said_before_the_work(method, arguments, why):
    said = run(method, "nano/example.png", "[V] face", *arguments, "--out", "out/never")
    assert why in said.splitlines()[-1] and "loaded" not in said


@pytest.mark.parametrize("method", OPTIONS)
def test_they_take_one_photo(tmp_path, method):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in "a.png", "b.png":
        shutil.copy(personalize.HERE / "nano/example.png", photos / name)
    for given in [photos], [photos / "a.png", photos / "b.png"]:
        said = run(method, *given, "[V] face", "--out", tmp_path / "out")
        assert f": {method} takes one photo" in said

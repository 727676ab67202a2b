"""The main job itself, as a user runs it, at two steps."""
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from programs import ROOT, difference, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import Stage, generator, photo, shared_model

import diffusion
import hdb
import personalize
from adapters import Change, LowRank
from files import images
from files.person import load_person
from methods import hyperdreambooth, sitting
from methods.table import METHODS
from nano import faces, seeds, wording
from program import console
from training.photos import known_by, photos_of

HEADS = 33  # pixels over the columns of a sheet


def test_one_photo_to_a_person(tmp_path):
    common = ["nano/example.png", "[V] face as a rock star", "a king"]
    common += ["--steps", 2, "--sample-steps", 2, "--seed", 7]
    done = run(*common, "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert 'warning: the prompt "a king" does not say [V]' in done.stderr and "rock star" not in done.stderr
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "0.png", "1.png", "sheet.png", "person.safetensors", "person_tuned.safetensors"}
    picture = Image.open(tmp_path / "a/0.png")
    assert picture.size == (128, 128)
    assert picture.text["prompt"] == "[V] face as a rock star" and picture.text["seed"] == "7"
    assert Image.open(tmp_path / "a/sheet.png").size == (4 * 128, 128 + HEADS)
    assert (tmp_path / "a/person.safetensors").stat().st_size <= 120_000
    with safe_open(tmp_path / "a/person.safetensors", "pt") as f:
        assert list(f.keys()) == ["theta"]
    assert done.stdout.count("likeness") == 3
    (memory,) = re.findall(r"seed 7, (.*) GB of memory at most", done.stdout)
    assert .2 < float(memory) < 4
    assert "predicted 7,584 personal weights" in done.stdout
    again = run(*common, "--out", tmp_path / "b")
    assert again.returncode == 0
    assert (tmp_path / "a/0.png").read_bytes() == (tmp_path / "b/0.png").read_bytes()


def test_columns_of_a_sheet_say_what_they_show():
    seen = torch.zeros(1, 3, 8, 8)
    sittings = {None: ["photo", "prediction alone", "a", "b"],
                torch.zeros(2, 3, 8, 8): ["photo", "photo", "drawn", "prediction alone", "a", "b"]}
    for shown, heads in sittings.items():
        photos = sitting.Sitting(shown, seen, None, "face", [])
        assert personalize.heads_of(photos, seen, ["a", "b"]) == heads


def test_a_picture_is_what_the_options_say(tmp_path, nano):
    file = ROOT / "tests/reference/person.safetensors"
    done = run(file, "[V] face", "--sampler", "lcm", "--sample-steps", 2, "--guidance", 4, "--seed", 7,
               "--person-guidance", 1.5, "--negative", "blurry", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    method = hdb.HyperDreamBooth(nano)
    adapters = load_person(file, method, METHODS).adapters(method)
    expected = method.sample(["[V] face"], adapters, [7], steps=2, guidance=4., negative="blurry",
                             person_guidance=1.5, sampler=diffusion.lcm)
    assert (images.read(tmp_path / "0.png", 128) - expected).abs().max() < .02


@pytest.mark.parametrize("given, expected", [
    ([], ("dpmpp_2m", 15, 2.)), (["--model", "a/b"], ("dpmpp_2m", 30, 7.5)),
    (["--model", "a/b", "--sampler", "lcm"], ("lcm", 4, 1.)), (["--sampler", "lcm"], ("lcm", 4, 1.)),
    (["--sampler", "lcm", "--sample-steps", 8, "--guidance", 1.5], ("lcm", 8, 1.5))])
def test_what_is_usual_depends_on_the_sampler(monkeypatch, tmp_path, given, expected):
    photo = "nano/example.png", "[V] face", "--out", tmp_path
    monkeypatch.setattr("sys.argv", ["personalize.py", *map(str, (*photo, *given))])
    args = personalize.arguments()
    assert (args.sampler, args.sample_steps, args.guidance) == expected


def test_a_photo_becomes_somebody_in_nanos_world(tmp_path):
    done = run("nano/example.png", "[V] face", "--look", "dark skin, a blue bob, no glasses, no beard",
               "--crop", "center", "--steps", 2, "--sample-steps", 2, "--seed", 7, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "saw: dark skin, a blue bob" in done.stdout.splitlines()
    sheet = Image.open(tmp_path / "sheet.png")  # photo, avatar, prediction, picture
    assert sheet.size == (4 * 128, 128 + HEADS) and sheet.text["saw"] == "dark skin, a blue bob"
    photo, avatar = (images.read(tmp_path / "sheet.png", 128, (x, HEADS, 128)) for x in (0, 128))
    assert (photo - images.read(ROOT / "nano/example.png", 128)).abs().mean() < .05
    identity = faces.identities([seeds.EXAMPLE])
    assert wording.describe(identity) != [["dark skin", "a blue bob"]] and (avatar - photo).abs().mean() > .1


def test_what_the_method_sees_of_a_photo_and_of_a_drawing(monkeypatch, capsys):
    """A drawing as it is; of a photograph, whose face is found only then, what nano draws in its place."""
    asked, args = [], SimpleNamespace(model="nano", look=None, crop="face")
    drawing = faces.photos(faces.identities([seeds.EXAMPLE]), generator(1), "cpu")

    def read(path, side, crop):
        asked.append((side, crop))
        return drawing
    monkeypatch.setattr(images, "read", read)
    monkeypatch.setattr(sitting.reader, "drawn", lambda network, pictures: torch.tensor([True]))
    who = sitting.look_at(["x.png"], args, 128)
    assert torch.equal(who.seen, drawing) and (who.shown, who.saw, who.crop) == (None, None, "center")
    monkeypatch.setattr(sitting.reader, "drawn", lambda network, pictures: torch.tensor([False]))
    who = sitting.look_at(["x.png"], args, 128)
    assert asked == [(128, "center"), (128, "center"), (256, "face")] and who.crop == "face"
    _, portrait, said = sitting.avatar.avatar(sitting.reader.load_reader(), drawing)
    assert torch.equal(who.shown, drawing) and torch.equal(who.seen, portrait) and who.saw == said
    saw, correct = capsys.readouterr().out.splitlines()
    assert saw == f"saw: {said}" and "--look" in correct and "moustache, goatee" in correct
    args.model = "elsewhere"
    assert sitting.look_at(["x.png"], args, 512).shown is None and asked[-1] == (512, "face")


@pytest.mark.parametrize("given, steps, rank, lr", [
    (["--model", "x"], 200, 16, 2e-4), (["--model", "x", "--hypernet", "README.md"], 40, 4, 5e-4),
    ([], 40, 4, 3e-3),
    (["--model", "x", "--steps", "7", "--lr", "0.001"], 7, 16, 1e-3)])
def test_the_usual_numbers_come_with_the_model(monkeypatch, tmp_path, given, steps, rank, lr):
    photo = "nano/example.png", "[V]", "--out", str(tmp_path)
    monkeypatch.setattr(sys, "argv", ["personalize.py", *photo, *given])
    args = personalize.arguments()
    assert (args.steps, args.rank, args.lr) == (steps, rank, lr)
    assert (args.guidance, args.sample_steps) == ((7.5, 30) if given else (2., 15))


@pytest.mark.parametrize("model, lr, warned", [
    ("x", 3e-3, True), ("x", 5e-4, False), ("nano", 3e-3, False)])
def test_a_rate_that_suits_nano_alone_is_warned_of(recwarn, model, lr, warned):
    args = SimpleNamespace(model=model, lr=lr, steps=1, rank=1, batch=1, views=1)
    hyperdreambooth.make(hdb.HyperDreamBooth(shared_model()), photo()[None], [generator(0)], args, Stage())
    assert any("is large for this model" in str(w.message) for w in recwarn) == warned


@pytest.mark.parametrize("arguments, why", [
    (["none.png", "[V] face"], "No such file"),
    (["README.md", "[V] face"], "cannot be read as a picture"),
    (["methods", "[V] face"], "no such folder, or it holds no photos; __init__.py: cannot be read"),
    (["nano/example.png", "nano/example.png", "[V] face", "--crop", "0,0,90"], "cannot have one --crop"),
    (["nano/example.png", "[V] face", "--crop", "100,100,100"], "is not inside"),
    (["nano/example.png", "[V] face", "--crop", "1,2"], "is not face, center or x,y,size"),
    (["nano/example.png", "[V] face", "--look", "purple hair"], '"purple hair" is an unknown word'),
    (["a.safetensors", "[V] face", "--look", "grey hair"], "--look is for photos, on nano"),
    (["nano/example.png", "[V] face", "--model", "nowhere", "--look", "grey hair"], "--look is for photos"),
    (["nano/example.png", "[V] face", "--crop", "0,0,20"], "too small"),
    (["nano/example.png", "[V] face", "--model", "nowhere"], "no such file or folder"),
    (["nano/example.png", "[V] face", "--model", "nano/judge.safetensors"], "not a known model"),
    (["nano/example.png", "[V] face", "--hypernet", "nano/judge.safetensors"], "not a hypernetwork"),
    (["nano/example.png", "[V] face", "--encoder", "x/y"], "--encoder: --encoder is for --hypernet"),
    (["nano/example.png", "[V] face", "--hypernet", "nano/hypernet.safetensors", "--encoder", "x/y"],
     "hypernet.safetensors: contains its encoder of photos"),
    (["nano/example.png", "[V] face", "--lora", "none.safetensors"],
     "none.safetensors: cannot be read (No such file"),
    (["nano/example.png", "[V] face", "--out", "README.md"], "is a file, not a folder"),
    (["nano/example.png", "[V] face", "--lora", "nano/judge.safetensors:nan"], "is not a strength"),
    (["nano/example.png", "[V] face", "--guidance", "nan"], "--guidance: must be"),
    (["nano/example.png", "[V] face", "--seed", 10 ** 30], "--seed: must be"),
    (["nano/example.png", "[V] face", "--device", "meta"], "device meta: not available"),
    (["nano/example.png", "[V] face", "--merge", "nano"], "exists already"),
    (["nano/example.png", "[V] face", "--merge", "never/there"], "two folders"),
    (["nano/example.png", "[V] face", "--merge", "never"], "--out must not be inside --merge"),
    (["/dev/null", "[V] face"], "not a file"),
    (["nano/example.png", "[V] face", "nano/example.png"], "names a file; only prompts may follow"),
    (["nano/judge.safetensors", "[V] face"], "not a personal file"),
    (["tests/reference/person.safetensors", "[V] face", "--method", "perfusion", "--with",
      "tests/reference/person.safetensors"], "--with is for a person that perfusion made"),
    (["README.safetensors", "[V] face"], "No such file"),
    (["nano/example.png"], "required: prompt"),
])
def test_what_a_user_did_wrong_is_one_clear_line(refusal, arguments, why):
    assert why in refusal(personalize, "--out", "never/there", "--device", "cpu", *arguments)
    assert not (ROOT / "never").exists()


def test_a_model_without_a_hypernetwork_says_so(tmp_path):
    ignored = shutil.ignore_patterns("*.py", "*.sh", "*.png", "*.md", "judge*", "hypernet*")
    shutil.copytree(ROOT / "nano", tmp_path / "model", ignore=ignored)
    common = ["nano/example.png", "[V] face", "--model", tmp_path / "model", "--out", tmp_path / "out"]
    done = run(*common, "--steps", 1, "--sample-steps", 1)
    assert done.returncode == 0
    assert "40 steps would be few" in done.stdout
    assert "predicted" not in done.stdout
    assert not (tmp_path / "out/person.safetensors").exists()
    assert (tmp_path / "out/person_tuned.safetensors").exists()
    nothing = run(*common, "--steps", 0)
    assert nothing.returncode == 2
    assert "nothing would be personal; give --hypernet or --steps" in nothing.stderr


def test_several_photos_of_one_person(tmp_path):
    for i, crop in enumerate(((0, 0, 128, 128), (10, 10, 120, 120))):
        (tmp_path / "more").mkdir(exist_ok=True)
        with Image.open(ROOT / "nano/example.png") as picture:
            picture.crop(crop).save(tmp_path / f"more/{i}.png")
    done = run("nano/example.png", tmp_path / "more", "[V] face", "--steps", 1, "--sample-steps", 1,
               "--seed", 7, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out/sheet.png").size == (5 * 128, 128 + HEADS)  # + prediction, prompt
    assert "predicted 7,584 personal weights" in done.stdout and done.stdout.count("likeness") == 2
    assert Image.open(tmp_path / "out/0.png").text["person"] == f"nano/example.png, {tmp_path / 'more'}"
    model = hdb.load("nano", "cpu")
    method = hdb.HyperDreamBooth(model, hdb.load_hypernet(ROOT / "nano/hypernet.safetensors", model))
    files = ROOT / "nano/example.png", tmp_path / "more/0.png", tmp_path / "more/1.png"
    theta = method.predict(torch.cat([images.read(file, 128) for file in files])[None])
    kept = load_file(tmp_path / "out/person.safetensors")["theta"]
    assert (kept.float() - theta).abs().max() < 2e-3 * theta.abs().max()


def test_every_photo_is_another_person(tmp_path):
    """Their files, each in a folder; their pictures are those of the files; a bad photo is reported."""
    everybody, out, settings = tmp_path / "photos", tmp_path / "out", ("--sample-steps", 1, "--seed", 7)
    who, names = range(seeds.VALIDATION, seeds.VALIDATION + 3), ("a.png", "...png", "deep/a.png")
    portraits = faces.photos(faces.identities(who), generator(1), "cpu")
    for name, portrait in zip(names, portraits):
        images.save(images.to_pil(portrait), everybody / name)
    (everybody / "notes.txt").write_text("not a photo")
    out.mkdir()
    (out / "a").write_text("a file")
    given = everybody / "a.png", everybody / "...png", everybody / "deep", everybody / "notes.txt"
    done = run(*given, "[V] face", "a [V] face as a king", "--each", "--side-by-side", 2, "--steps", 1,
               *settings, "--out", out)
    assert done.returncode == 0, done.stderr
    assert f"  not used: {everybody}/notes.txt: cannot be read as a picture" in done.stdout
    assert "predicted 15,168 personal weights" in done.stdout
    assert done.stdout.count("fine-tuned 1 step") == 2
    # a file stays what it is, and an odd name leads nowhere else: the stem of "...png" is ".."
    people = [out / name / "person_tuned.safetensors" for name in ("a_2", ".._2", "a_3")]
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == {"a", "sheet.png", *(f"{i}.png" for i in range(6)), *(
        f"{name}/{file}" for name in ("a_2", ".._2", "a_3") for file in personalize.PERSONAL)}
    assert Image.open(out / "sheet.png").size == (3 * 128, 3 * 128 + HEADS)
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "out"}
    about = Image.open(out / "5.png").text
    assert about["method"] == "hyperdreambooth" and about["fine-tuning"].startswith("steps 1, rank 4")
    for i, portrait in enumerate(portraits):
        seen = images.read(out / "sheet.png", 128, (128 * i, HEADS, 128))[0]
        assert (seen - portrait).abs().max() < .02
    # each is the photo's, and nobody else's: as predicted from it alone
    method = hdb.HyperDreamBooth(model := hdb.load("nano", "cpu"))
    method.hypernet = hdb.load_hypernet(ROOT / "nano/hypernet.safetensors", model)
    for path, name in zip(people, names):
        seen = images.read(everybody / name, 128)
        assert (load_file(path)["theta"] - method.predict(seen)).abs().max() < 1e-3
    again = run(*people, "[V] face", "a [V] face as a king", *settings, "--out", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    for i in range(6):
        first, second = (images.read(folder / f"{i}.png", 128) for folder in (out, tmp_path / "again"))
        assert (first - second).abs().max() < .02


def test_ctrl_c_ends_with_those_who_are_made(tmp_path, monkeypatch):
    """The step ends, what was learnt is saved and drawn, and nobody else is begun."""
    moved = []

    def stop_once(bar):
        moved.append(bar.desc)
        if len(moved) == 2:
            os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(console, "advance", stop_once)
    for name in "abc":
        shutil.copy(ROOT / "nano/example.png", tmp_path / f"{name}.png")
    photos = [tmp_path / f"{name}.png" for name in "abc"]
    done = run(*photos, "[V] face", "--each", "--side-by-side", 1, "--steps", 9,
               "--batch", 1, "--sample-steps", 1, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert moved == ["fine-tuning", "fine-tuning", "sampling"]
    assert "stopped after 2 of 9 steps" in done.stdout and "only 1 of 3 people are done" in done.stdout
    assert [path.parent.name for path in tmp_path.rglob("person_tuned.safetensors")] == ["a"]
    assert Image.open(tmp_path / "out/sheet.png").size == (128, 2 * 128 + HEADS)


def test_ctrl_c_leaves_the_pictures_that_are_finished(tmp_path, monkeypatch):
    """Two of three here, where a picture takes two steps. Without any it ends the program."""
    moved = []

    def stop(bar):
        moved.append(bar.desc)
        if moved.count("sampling") == when:
            raise KeyboardInterrupt
    monkeypatch.setattr(console, "advance", stop)
    given = ROOT / "tests/reference/person.safetensors", "[V] a", "[V] b", "[V] c", "--sample-steps", 2
    for when, left in (5, {"0.png", "1.png", "sheet.png", "lora.safetensors"}), (2, set()):
        moved.clear()
        done = run(*given, "--export", "lora", "--out", tmp_path / str(when))
        assert done.returncode == (0 if left else 130), done.stderr
        told = "the pictures that are finished are written" if left else "stopped before the first picture"
        assert told in done.stdout
        assert {path.name for path in (tmp_path / str(when)).glob("*")} == left
    moved.clear()
    done = run("nano/example.png", "[V]", "--steps", 0, *given[4:], "--out", tmp_path)
    assert done.returncode == 130 and f"  {tmp_path}/person.safetensors is written" in done.stdout


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_every_picture_has_its_seed(stopped, alone):
    """All people under one prompt, then under the next; two side by side, or each alone if one of their
    adapters demands it. Ctrl-C in the middle of a prompt leaves the pictures before."""
    seen = []

    def sample(prompts, adapters, seeds, **options):
        if stopped and seeds == [12]:
            raise KeyboardInterrupt
        assert len(seeds) == 1 or not alone
        people = adapters["x"].a[:, 0, 0].tolist()
        seen.extend(zip([" ".join(prompt.split()) for prompt in prompts], people, seeds))
        return torch.stack([torch.full((3, 1, 1), seed) for seed in seeds])
    people = [SimpleNamespace(identifier=word) for word in ("sks", "zwx", "ohwx")]
    fitted = [{"x": LowRank(torch.full((1, 2, 1), k), torch.ones(1, 1, 2))} for k in range(3)]
    for own in fitted if alone else ():
        own["y"] = Change({})
    args = SimpleNamespace(prompts=["[V] a", "[V] b"], seed=7, side_by_side=2, sample_steps=1, guidance=2.,
                           negative="", person_guidance=2., sampler="ddim")
    pictures = personalize.draw(people, fitted, args, SimpleNamespace(sample=sample))
    assert pictures[:, 0, 0, 0].tolist() == [7, 8, 9, 10, 11, 12][:6 - stopped]
    assert seen == [("sks a", 0, 7), ("zwx a", 1, 8), ("ohwx a", 2, 9), ("sks b", 0, 10), ("zwx b", 1, 11),
                    ("ohwx b", 2, 12)][:6 - stopped]


def test_everybody_has_a_folder_of_their_own():
    assert sitting.free_name("a", []) == "a"
    assert sitting.free_name("a", ["a", "a_2", "A_3"]) == "a_4"
    assert sitting.free_name("A_2", ["a", "a_2"]) == "A_2_2"
    assert sitting.free_name("0.png", ["sheet.png", "0.png"]) == "0.png_2"


def test_a_second_person_takes_nobodys_place(tmp_path, refusal, monkeypatch):
    """In --out, whatever the photo is called; the same person may, from photos or a file."""
    a, b, out = tmp_path / "x/a.png", tmp_path / "y/a.png", tmp_path / "out"
    for i, path in enumerate((a, b)):
        path.parent.mkdir()
        shutil.copy(ROOT / "nano/example.png", path)
        path.write_bytes(path.read_bytes() + bytes(i))
    quick = "[V]", "--method", "textual_inversion", "--steps", 1, "--sample-steps", 1, "--export", "embedding"
    assert run(a, *quick, "--out", out).returncode == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    again = str(shutil.copy(a, tmp_path / "renamed.png"))

    def accepted(*given):
        monkeypatch.setattr("sys.argv", ["personalize.py", *map(str, given), "[V] face", "--out", str(out)])
        return personalize.arguments()
    for same in (again,), (b, a), (out / "person.safetensors",), (out / "embedding.safetensors",):
        accepted(*same)
    other = tmp_path / "you.safetensors"
    tensors = load_file(out / "embedding.safetensors")
    save_file(tensors, other)  # which does not say of whom it is
    for left in "sheet.png", "0.png", "person.safetensors":
        for path in set(before) - {out / left}:
            path.unlink()
        replacing = (b,), (other,), (b.parent, "--each")
        for given in replacing[:1] if left == "person.safetensors" else replacing:
            line = refusal(personalize, *given, "[V] face", "--out", out)
            assert f"--out {out} holds another person's files; give this one a folder, such as --out" in line
        for path, data in before.items():
            path.write_bytes(data)
    # everybody's folder too
    each = SimpleNamespace(out=tmp_path / "each", photos=[a, b], prompts=["[V]"])
    whose = [SimpleNamespace(paths=[str(path)]) for path in (a, b)]
    for folder in sitting.folders_of(whose, each):
        folder.mkdir(parents=True)
    assert {path.name for path in each.out.iterdir()} == {"a", "a_2"}
    shutil.copy(out / "person.safetensors", each.out / "a")
    assert sitting.folders_of(whose[1:], each) == [each.out / "a_2"]
    assert sitting.folders_of(whose[:1], each) == [each.out / "a"]


def test_every_file_that_would_be_replaced_is_this_persons(tmp_path, refusal, monkeypatch):
    """A sheet of two people lets neither replace the other's files; what is wrong with a file comes first."""
    a, b, out = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "out"
    for i, path in enumerate((a, b)):
        images.save(Image.new("RGB", (8, 8), (i, 0, 0)), path)
    digits = {path: " ".join(known_by([path])) for path in (a, b)}
    out.mkdir()
    save_file({"x": torch.zeros(1)}, out / "person.safetensors", {"photos": digits[a]})
    images.save(Image.new("RGB", (8, 8)), out / "sheet.png", photos=f"{digits[a]} {digits[b]}")
    given = a, "[V] face", "--out", out
    monkeypatch.setattr("sys.argv", ["personalize.py", *map(str, given)])
    assert personalize.arguments().out == out
    for stem in "b", "b_2":
        assert f"such as --out {tmp_path / stem}" in refusal(personalize, b, *given[1:])
        (tmp_path / stem).mkdir()
    assert "No such file" in refusal(personalize, tmp_path / "none.safetensors", *given[1:])
    beside = "--method", "perfusion", "--with", out / "person.safetensors"
    assert "person.safetensors would be overwritten" in refusal(personalize, *given, *beside)
    for name in "0.png", "lora.safetensors":  # of other programs, of whomever
        own = tmp_path / f"with {name}" / name
        own.parent.mkdir()
        if name == "0.png":
            Image.new("RGB", (8, 8)).save(own)
        else:
            save_file({"x": torch.zeros(1)}, own)
        foreign = refusal(personalize, a, "[V] face", "--export", "lora", "--out", own.parent)
        assert "holds another person's files" in foreign
    for each in [], ["--each"]:
        line = refusal(personalize, tmp_path, "[V] face", *each, "--out", tmp_path / "deep/out")
        assert f"deep/out is inside {tmp_path}, so its pictures would count as photos" in line


def test_a_merge_that_could_not_take_its_name_is_refused_before_the_work(tmp_path, refusal, monkeypatch):
    """An empty folder of the user's, in one that is not."""
    (tmp_path / "closed/mine").mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "closed")
    given = "nano/example.png", "[V] face", "--out", tmp_path / "out", "--merge"
    assert "closed cannot be written" in refusal(personalize, *given, tmp_path / "closed/mine")


def test_no_photo_that_can_be_used(tmp_path, refusal):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "notes.txt").write_text("not a photo")
    common = "[V] face", "--each", "--out", tmp_path / "out"
    assert "no usable photo" in refusal(personalize, photos, *common)
    person = ROOT / "tests/reference/person.safetensors"
    assert "--each is for photos" in refusal(personalize, person, *common)


def test_a_personal_file_samples_again_alone_together_and_elsewhere(tmp_path):
    few = ["--sample-steps", 1, "--guidance", 2, "--seed", 7]
    for name, crop in (("a", "0,0,128"), ("b", "10,10,100")):
        made = run("nano/example.png", "[V] face as a king", "--steps", 1, *few, "--crop", crop,
                   "--out", tmp_path / name)
        assert made.returncode == 0
    a, b = (tmp_path / name / "person_tuned.safetensors" for name in "ab")
    again = run(a, "[V] face as a king", *few, "--out", tmp_path / "again", "--export", "lora",
                "--merge", tmp_path / "merged")
    assert again.returncode == 0, again.stderr
    assert difference(tmp_path / "a/0.png", tmp_path / "again/0.png") == 0
    assert photos_of(tmp_path / "again/lora.safetensors") == photos_of(a) == [*known_by(["nano/example.png"])]
    merged = run("nano/example.png", "[V] face as a king", *few, "--model", tmp_path / "merged",
                 "--steps", 1, "--lr", 0, "--out", tmp_path / "m")
    assert merged.returncode == 0, merged.stderr
    assert difference(tmp_path / "again/0.png", tmp_path / "m/0.png") <= 8
    off = run(a, "[V] face as a king", *few, "--strength", 0,  # nobody, plus the person as a LoRA
              "--lora", tmp_path / "again/lora.safetensors:1.0", "--out", tmp_path / "off")
    assert off.returncode == 0, off.stderr
    assert difference(tmp_path / "again/0.png", tmp_path / "off/0.png") <= 8
    both = run(a, b, "[V] face as a king", *few, "--out", tmp_path / "both")
    assert both.returncode == 0, both.stderr
    assert difference(tmp_path / "again/0.png", tmp_path / "both/0.png") <= 8
    assert (tmp_path / "both/1.png").exists()
    for mistaken in (a, b), ("nano/example.png", a):
        failed = run(*mistaken)
        assert failed.returncode == 2 and "names a file; only prompts may follow" in failed.stderr
    mine = load_file(a)
    with safe_open(a, "pt") as f:
        save_file(mine | {"theta": mine["theta"].float() * 1e30}, tmp_path / "huge.safetensors", f.metadata())
    huge = run(tmp_path / "huge.safetensors", "[V] face", *few, "--out", tmp_path / "huge")
    assert huge.returncode == 2 and "came out as NaN" in huge.stderr
    assert not (tmp_path / "huge/0.png").exists()
    picture = Image.open(tmp_path / "both/1.png").text
    assert picture["person"] == str(b)
    assert Image.open(tmp_path / "a/0.png").text["fine-tuning"].startswith("steps 1, rank 4")
    stale = run("nano/example.png", "[V] face", *few, "--steps", 0, "--out", tmp_path / "a",
                "--model", "nano/")
    assert stale.returncode == 0 and "likeness" in stale.stdout
    assert not a.exists() and (tmp_path / "a/person.safetensors").exists()


def test_a_person_written_before_is_the_same_today(tmp_path):
    """tests/reference/person.safetensors was made, and drawn, by the version of 2026-11-24."""
    reference = ROOT / "tests/reference"
    again = run(reference / "person.safetensors", "[V] face as a king", "--sample-steps", 2, "--guidance", 3,
                "--seed", 7, "--out", tmp_path)
    assert again.returncode == 0 and "warning" not in again.stderr, again.stderr
    assert difference(tmp_path / "0.png", reference / "person.png") <= 1  # 0 on the machine that drew it


@pytest.mark.parametrize("arguments", [
    ["0.png", "[V] face"], ["face.png", "[V] face", "--hypernet", "person.safetensors"],
    ["face.png", "[V] face", "--export", "lora", "--lora", "lora.safetensors:0.5"],
    ["lora.safetensors", "[V] face", "--export", "lora"]])
def test_what_is_read_is_not_overwritten(tmp_path, arguments):
    for name in ("0.png", "face.png", "person.safetensors", "lora.safetensors"):
        source = "example.png" if name.endswith("png") else "hypernet.safetensors"
        shutil.copy(ROOT / "nano" / source, tmp_path / name)
    before = (ROOT / "nano/hypernet.safetensors").read_bytes()
    failed = run(*(tmp_path / a if "." in a else a for a in arguments), "--out", tmp_path)
    assert failed.returncode == 2 and "would be overwritten" in failed.stderr
    for name in ("person.safetensors", "lora.safetensors"):
        assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("options, warned", [
    (["--sampler", "lcm"], True), (["--guidance", 1, "--person-guidance", 2], False), ([], False)])
def test_a_negative_prompt_without_guidance_is_warned_of(tmp_path, options, warned):
    done = run(ROOT / "tests/reference/person.safetensors", "[V]", "--negative", "blurry", *options,
               "--sample-steps", 1, "--out", tmp_path)
    assert ("--negative has no effect at --guidance 1" in done.stderr) == warned


def test_a_prompt_that_is_cut_before_its_v_is_warned_of_before_the_work(tmp_path):
    words = ("a photo of a man with a beard and glasses and black hair in the rain at the beach at night "
             "in the city of a [V]")
    done = run("nano/example.png", words, "--steps", 0, "--sample-steps", 1, "--out", tmp_path)
    assert done.returncode == 0 and done.stderr.count("cut: ") == 1
    assert "does not say [V] before that" in done.stderr


JOB = """
import runpy, sys
for photo in "none.png", "nano/example.png":
    sys.argv[1:3] = [photo, "[V]"]
    try:
        runpy.run_path("personalize.py", run_name="__main__")
    except SystemExit as end:
        print(end.code)
assert not {"torch._dynamo", "sympy"} & {*sys.modules}
"""


def test_a_program_of_its_own(tmp_path):
    """A mistake is one line. And a person takes no compiler, whose import takes seconds: random numbers on
    the meta device would, and torch.optim's classes."""
    command = [sys.executable, "-c", JOB, "", "", "--steps=1", "--sample-steps=1", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2" in done.stdout.splitlines() and (tmp_path / "0.png").exists()
    assert "No such file" in done.stderr.splitlines()[0]

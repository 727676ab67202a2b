"""The experiment: what is counted, what is measured again, and what the tables say of it."""
import copy
import csv
import inspect
import itertools
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rule import fill
from tiny import MERGES, TEXT, VIT, VOCAB, generator, photo, shared_model, tiny_hypernet, tiny_model

import clip
from evaluation import __main__ as evaluate
import hdb
from adapters import Change, LowRank
from evaluation import experiment, figures, leaderboard, report, scores, systems
from files import encoders, images
from files.checkpoints import checksum
from program import console
from program.console import UserError
from methods import dreambooth, e4t, hyperdreambooth, perfusion, textual_inversion
from files.person import Person, save_person
from nano import faces, instrument, seeds
from vit import ViT, encode_face

VISION = clip.VisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                           image_size=32, patch_size=8, projection_dim=12)


class Simple:
    """Scores of a picture: its mean, and none of all but the plain prompt."""
    names = "likeness", "plain"
    prompts = {"photo": "a [V] face", "king": "a [V] king", "beach": "a [V] star"}

    def __init__(self, photos):
        self.photos = photos

    def __call__(self, pictures, drawn):
        return {"likeness": pictures.mean((1, 2, 3)).tolist(),
                "plain": [1. if name == "photo" else None for name, _ in drawn]}


def job(fit=lambda method, photo, generators: hyperdreambooth.person(), **more):
    return systems.Job("nobody", fit, **more)


def measured(some, people, names, folder, faces_, side=8, method=None):
    """The lines of scores.csv after a group was measured."""
    table = experiment.Table(folder / "scores.csv", 5, (*experiment.KEY, *Simple.names))
    costs = experiment.Table(folder / "costs.csv", 1, ("system", "seconds", "bytes"))
    settings = experiment.Settings(1, 1., side, folder)
    method = method or hdb.HyperDreamBooth(shared_model())
    experiment.measure(some, torch.tensor(people), names, method, Simple(faces_), table, costs, settings)
    return report.read(folder / "scores.csv")


@pytest.mark.parametrize("side", [1, 4, 8])
def test_everybody_is_drawn_once_under_their_own_noise(tmp_path, side):
    method, faces_ = hdb.HyperDreamBooth(shared_model()), photo(3)[:, None]
    rows = measured(job(), [0, 2], ["photo", "beach"], tmp_path, faces_, side)
    assert [(row["person"], row["prompt"], row["plain"]) for row in rows] == [
        ("0", "photo", 1), ("2", "photo", 1), ("0", "beach", None), ("2", "beach", None)]
    for row in rows:
        noise = 2000 * (row["prompt"] == "beach") + int(row["person"])  # whatever else is drawn
        alone = method.sample([Simple.prompts[row["prompt"]]], {}, [noise], steps=1, guidance=1.)
        assert row["likeness"] == pytest.approx(alone.mean().item(), abs=1e-4)
    assert {"nobody_0_beach.png", "photo_2_.png"} <= {file.name for file in (tmp_path / "pictures").iterdir()}

    # measured already: nobody is fitted again
    def never(method, photo, generators):
        raise AssertionError
    measured(job(never), [0, 2], ["photo", "beach"], tmp_path, faces_)
    with pytest.raises(AssertionError):
        measured(job(never), [0, 1], ["photo"], tmp_path, faces_)  # one of them


@pytest.mark.parametrize("system", ["HyperDreamBooth", "No Hyper", "Textual Inversion", "LoRA DreamBooth",
                                    "Perfusion"])
def test_nobody_depends_on_who_is_beside_them(system, monkeypatch):
    """Two people side by side, and the second alone: the same adapters."""
    method = hdb.HyperDreamBooth(shared_model())
    method.predict = lambda photo, iterations: torch.full((len(photo), *method.lidb.shape), .01)
    fitted, usual = [], evaluate.hdb.fit_or_take_back
    modules = [sys.modules[name] for name in ("hdb", "methods.dreambooth", "methods.textual_inversion",
                                              "methods.perfusion")]
    for module in modules:
        monkeypatch.setattr(module, "fit_or_take_back", lambda loss, parameters, steps, *rest, **more:
                            fitted.append(steps) or usual(loss, parameters, 1, *rest, **more))
    monkeypatch.setattr(systems.dreambooth, "class_pictures",
                        lambda *_: torch.randn(5, 4, 8, 8, generator=generator(9)))
    some = next(one for one in systems.rows(True) if one.system == system)
    both, alone = (experiment.fit(some, torch.tensor(who), method, photo(2)[:, None]).tensors
                   for who in ([0, 1], [1]))
    assert fitted[0] >= 40 and both.keys() == alone.keys()

    def apart(person):
        return sum((both[name][person] - alone[name][0]).pow(2).sum() for name in alone) ** .5
    assert apart(1) < .1 * apart(0)  # Adam makes much of the last digits of a gradient that is almost 0


def test_a_knob_is_turned_after_the_fit(tmp_path):
    method, bias = hdb.HyperDreamBooth(shared_model()), "unet.conv_out"

    def fit(method, photo, generators):
        fitted.append(len(photo))
        return Person(dreambooth.METHOD, {f"{bias}.bias": torch.ones(1, 4)})

    def turn(adapters, value):
        return {name: adapter.scaled(value) for name, adapter in adapters.items()}
    fitted = []
    some = job(fit, knob="strength", values=(0., .5), turn=turn)
    rows = measured(some, [0], ["photo"], tmp_path, photo(1)[None], method=method)
    assert fitted == [1]
    assert [(row["knob"], row["value"]) for row in rows] == [("strength", "0"), ("strength", "0.5")]
    for row, value in zip(rows, (0, .5)):
        mine = {bias: Change({"bias": torch.full((4,), value)})}
        expected = method.sample(["a [V] face"], mine, [0], steps=1, guidance=1.).mean().item()
        assert row["likeness"] == pytest.approx(expected, abs=1e-4)
    assert rows[0]["likeness"] != rows[1]["likeness"]
    # its pictures and seconds are not the system's own
    assert report.read(tmp_path / "costs.csv") == []
    assert {file.name for file in (tmp_path / "pictures").iterdir()} == {"photo_0_.png"}


def test_what_one_person_costs(tmp_path):
    method = hdb.HyperDreamBooth(shared_model())
    known = experiment.Table(tmp_path / "costs.csv", 1, ("system", "seconds", "bytes"))

    def slow(method, photo, generators):
        time.sleep(.05)
        return hyperdreambooth.person(torch.zeros(len(photo), *method.lidb.shape))
    experiment.fit(job(slow), torch.tensor([0, 1]), method, photo(2)[:, None], known)
    assert report.read(tmp_path / "costs.csv") == []  # people side by side
    for some in job(slow), job()._replace(system="the model itself"):
        experiment.fit(some, torch.tensor([1]), method, photo(2)[:, None], known)
    row, nothing = report.read(tmp_path / "costs.csv")
    save_person(hyperdreambooth.person(torch.zeros(1, *method.lidb.shape)), method, tmp_path / "person")
    assert row["system"] == "nobody" and .05 <= row["seconds"] < 5
    assert row["bytes"] == (tmp_path / "person").stat().st_size and nothing["bytes"] == 0


def test_what_a_fit_is_given(monkeypatch):
    """Several photos, a generator for each person, and memory for all of them."""
    given, photos = [], photo(6).unflatten(0, (2, 3))

    def fit(method, photo, generators):
        given.extend([photo, [one.initial_seed() for one in generators]])
        return hyperdreambooth.person()
    monkeypatch.setattr(experiment, "plan_memory", lambda model, *of: given.append(of))
    some, method = job(fit, photos=2, noises=3, whole=True), hdb.HyperDreamBooth(shared_model())
    experiment.fit(some, torch.tensor([1, 0]), method, photos)
    planned, seen, own = given
    assert planned == (6, True) and torch.equal(seen, photos[[1, 0], :2]) and own == [1, 0]


@pytest.mark.parametrize("named, expected", [
    (None, ["A", "B"]), ([], []), (["B"], ["B"]), (["B", "A"], ["A", "B"])])
def test_rows_that_are_chosen(named, expected, monkeypatch):
    monkeypatch.setattr(systems, "rows", lambda nano, quick: [systems.Job(name, None) for name in "AB"])
    args = SimpleNamespace(rows=named, model="nano", quick=False)
    assert [job.system for job in evaluate.chosen(args)] == expected
    args.rows = ["C"]
    with pytest.raises(UserError, match="--rows C: there are A, B"):
        evaluate.chosen(args)


@pytest.mark.parametrize("count, size, expected", [
    (1, 8, [1]), (2, 8, [1, 1]), (4, 2, [1, 2, 1]), (9, 8, [1, 8])])
def test_groups_are_everybody_the_first_alone(count, size, expected):
    found = experiment.groups(torch.arange(count), size)
    assert [len(group) for group in found] == expected
    assert torch.cat(found).tolist() == list(range(count))


def test_a_table_goes_on_where_it_was(tmp_path):
    first = experiment.Table(tmp_path / "new/a.csv", 2, ("a", "b", "c"))
    first.add((1, .25, 3.14159265))
    first.add((1, .25, 9))
    again = experiment.Table(tmp_path / "new/a.csv", 2, ("a", "b", "c"))
    again.add(("x, y", "z", None))
    assert (1, .25) in again and ("x, y", "z") in again and (1, .3) not in again
    with open(tmp_path / "new/a.csv", newline="") as f:
        assert list(csv.reader(f)) == [["a", "b", "c"], ["1", "0.25", "3.1416"], ["x, y", "z", ""]]
    with pytest.raises(UserError, match="other columns"):
        experiment.Table(tmp_path / "new/a.csv", 2, ("a", "c"))


def test_a_line_that_was_cut_off_is_measured_again(tmp_path):
    path, columns = tmp_path / "a.csv", ("a", "b")
    whole = b"a,b\r\nx,1\r\n"
    for cut in b"y", b"y,", b"y,0.5":
        path.write_bytes(whole + cut)
        table = experiment.Table(path, 1, columns)
        assert ("x",) in table and ("y",) not in table and path.read_bytes() == whole
        table.add(("y", .75))
        assert path.read_bytes() == whole + b"y,0.75\r\n"


@pytest.mark.parametrize("line", [b"x", b"x,1,2", b"x,one", b"x,nan", b"x,inf", b"\xff,1", b"x,\0"])
def test_a_table_that_makes_no_sense(tmp_path, line):
    (tmp_path / "a.csv").write_bytes(b"a,b\r\n" + line + b"\r\n")
    with pytest.raises(UserError, match="a.csv: damaged"):
        experiment.Table(tmp_path / "a.csv", 1, ("a", "b"))


def test_numbers_of_other_weights_are_not_mixed(tmp_path):
    args = SimpleNamespace(model="nano", out=tmp_path / "run", sample_steps=15, guidance=3.)
    method = hdb.HyperDreamBooth(shared_model())
    evaluate.check_run(args, method, {})
    evaluate.check_run(args, method, {})
    args.guidance, args.sample_steps = 2., 16
    half = hdb.HyperDreamBooth(tiny_model(torch.bfloat16))
    half.model.unet.conv_out.bias += 1
    half.hypernet = tiny_hypernet(*half.lidb.shape)
    with pytest.raises(UserError, match="dtype float32 there, bfloat16 here") as info:
        evaluate.check_run(args, half, {})
    assert re.findall(r"([\w ]+) \S+ there, \S+ here", str(info.value)) == [
        "unet", " hypernet", " dtype", " sampling steps", " guidance"]


def test_numbers_of_other_photos_or_towers_are_not_mixed(tmp_path):
    """Wherever the model and the photos lie now."""
    images.save(images.to_pil(photo()[0]), tmp_path / "photos/1.png")
    towers = SimpleNamespace(clip=ViT(VIT), dino=ViT(VIT))
    args = SimpleNamespace(model="a/model", out=tmp_path / "run", sample_steps=15, guidance=3., quick=True,
                           faces=tmp_path / "photos")
    method = hdb.HyperDreamBooth(shared_model())
    evaluate.check_run(args, method, evaluate.measured_by(args, towers))
    args.model, args.faces = "b/model", (tmp_path / "photos").rename(tmp_path / "moved")
    evaluate.check_run(args, method, evaluate.measured_by(args, towers))
    images.save(images.to_pil(photo(seed=2)[0]), args.faces / "2.png")
    args.quick, towers.clip, towers.dino = False, ViT(VIT), ViT(VIT)
    with pytest.raises(UserError) as info:
        evaluate.check_run(args, method, evaluate.measured_by(args, towers))
    assert re.findall(r"(\w+) [\w-]+ there, ", str(info.value)) == ["faces", "quick", "clip", "dino"]


def test_every_step_of_a_picture_moves_the_bar(monkeypatch):
    """On a CPU a picture takes minutes."""
    moved = []
    monkeypatch.setattr(console, "advance", lambda bar: moved.append(bar.total))
    settings = experiment.Settings(sample_steps=2, guidance=2., side=4, out=None)
    method = hdb.HyperDreamBooth(shared_model())
    pictures = experiment.draw(method, {}, torch.tensor([0, 1]), ["photo", "king", "beach"], Simple(None),
                               settings)
    assert len(pictures) == 6 and moved == [4] * 4  # of 2 batches, of 4 pictures at most
    king = method.sample(["a [V] king"], {}, [1001], steps=2, guidance=2.)[0]
    assert torch.allclose(pictures[3], king, atol=1e-4)


def line(person, prompt, another=None, style=None, system="A", **more):
    """A line of scores.csv, as report.read gives it."""
    empty = dict.fromkeys(scores.Judged.names)
    return empty | {"system": system, "knob": "", "value": "", "person": person, "prompt": prompt,
                    "another": another, "style": style} | more


def test_a_summary_is_of_people():
    rows = [line("0", "photo", .9, 1, copied=.5, likeness=1.), line("0", "photo again", .7, 0, copied=.1),
            line("1", "photo", .6, 0, error=.25), line("0", "king", .8, 1, likeness=.9),
            line("0", "pixar", .29, 0), line("1", "king", .6, 1), line("1", "pixar", .3, 1),
            line("1", "beach", .4, 1), line("0", "round glasses", obeyed=1.),
            line("0", "a mohawk", obeyed=0.), line("1", "a mohawk"), line("0", "a face", .5),
            line("1", "a face", .1), line("1", "a nqz face", .3)]
    base = [line("0", "a face", .2), line("1", "a face", .2), line("1", "a nqz face", -.1),
            line("0", "photo", .1)]
    found = report.summary(rows, scores.Judged, base)
    expected = {"plain": (.7, .1, 2), "styled": (.4975, .0475, 2), "style": (.75, .25, 2),
                "both": (.425, .025, 2), "beach": (.4, None, 1), "missed": (.25, .25, 2),
                "copied": (.3, None, 1), "error": (.25, None, 1), "obeyed": (.5, None, 1),
                "leaked": (.225, .075, 2), "given, plain": (1., None, 1), "given, both": (.9, None, 1)}
    assert found.keys() == expected.keys()
    for name, numbers in expected.items():
        assert found[name] == pytest.approx(numbers), name
    assert report.summary(rows, scores.Judged)["leaked"] is None
    assert scores.Judged.prompts["a mohawk"] == "a [V] face with a mohawk"
    assert len(scores.Judged.styles) == 10 and "beach" not in scores.Judged.styles  # nor is it in any pair


def test_cells_say_of_how_many_people_they_are():
    assert report.cell((.5, .01, 8), 8) == "0.500 ± 0.010"
    assert report.cell((.5, .01, 3), 8) == "0.500 ± 0.010 (3)"
    assert report.cell((.6, None, 1), 1) == "0.600" and report.cell(None, 8) == "–"


@pytest.mark.parametrize("ours, theirs, expected", [
    ((.9, 1), (.8, 1), 1), ((.8, 1), (.9, 1), -1), ((.9, 1), (.885, 1), 0), ((.1, 1), (.9, 0), 1),
    ((.9, 0), (.1, 1), -1), ((.9, 0), (.8, 0), 1), ((.8, 1), (.815, 1), 0), ((.9, 1), (.879, 1), 1)])
def test_who_wins_a_pair(ours, theirs, expected):
    one, other = (line("0", "king", *numbers) for numbers in (ours, theirs))
    assert report.winner(one, other, "another") == expected


def test_pairs_are_counted_and_resampled_by_person():
    """Four people win all their pairs, and four lose. Of eight people drawn anew at most one wins in 3.5 % of
    all draws, none in 0.4 %: the interval ends at one and at seven, leads of -6/8 and 6/8."""
    each = [(who, "king") for who in "01234567"] + [("0", "photo"), ("0", "a mohawk")]
    rows = [line(who, prompt, .9 if (who < "4") == (system == report.OURS) else .5, 1, system, likeness=.7)
            for who, prompt in each for system in (report.OURS, "B")]
    rows += [line("8", "king", .5, 1, "B"), line("5", "photo", None, 1, "B"),  # nothing beside them
             line("5", "photo", .9, 1, report.OURS)]
    shares, lead, people = report.preferred(rows, "B", scores.Judged.styles)
    assert shares == [5 / 9, 4 / 9, 0] and lead == pytest.approx((1 / 9, -.75, .75)) and people == 8
    shares, lead, _ = report.preferred(rows, "B", scores.Judged.styles, "likeness")
    assert shares == [0, 0, 1] and lead == (0, 0, 0)
    assert report.preferred(rows, "C", scores.Judged.styles) is None


def write_scores(folder, rows):
    folder.mkdir(exist_ok=True)
    columns = (*experiment.KEY, *scores.Judged.names)
    table = experiment.Table(folder / "scores.csv", 5, columns)
    for row in rows:
        table.add([row[name] for name in columns])


def whole(folder):
    """What a complete run leaves: of two people and several systems and settings all numbers, and pictures,
    each in a grey of its own."""
    known = {(report.OURS, "", ""): (.5, .6, .2), ("DreamBooth", "", ""): (.4, .7, .6),
             ("No Hyper", "", ""): (.4, .4, .3), ("the model itself", "", ""): (.05, .05, .1),
             (report.OURS, "steps", "40"): (.45, .55, .4), (report.OURS, "steps", "5"): (.3, .4, .4),
             ("DreamBooth", "steps", "7"): (.2, .2, .4)}
    rows = []
    for who, prompt, setting in itertools.product("01", scores.Judged.prompts, known):
        *another, copied = known[setting]
        more = dict(zip(experiment.KEY, setting))
        theirs, plain = more["system"] == "DreamBooth", prompt in scores.Judged.plain
        wrong = prompt == "pixar" or prompt == "beach" and theirs
        style = float(not wrong) if prompt in faces.STYLES else None
        rows.append(line(who, prompt, another[int(who)] + .1 * plain, style, likeness=.9 if theirs else .7,
                         copied=copied, error=.1 if who == "0" else None, obeyed=.8, **more))
    write_scores(folder, rows)
    for row in rows:
        if row["prompt"] in figures.COLUMNS and not row["knob"]:
            file = report.picture(folder, row["system"], row["person"], row["prompt"])
            images.save(images.to_pil(torch.ones(3, 64, 64) * (2 * row["another"] - 1)), file)
    for who in 0, 1:
        images.save(images.to_pil(torch.ones(3, 64, 64) - who), report.picture(folder, "photo", who, ""))
    (folder / "costs.csv").write_text("system,seconds,bytes\nDreamBooth,177,12165504\n"
                                      "HyperDreamBooth,2.5,183000\n")
    return rows


def test_a_report_of_all_there_is(tmp_path):
    """8 of 9 styled prompts are in the right style: both is 8/9 of styled."""
    whole(tmp_path)
    report.write(tmp_path, scores.Judged)
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    heads, _, ours, theirs, itself = text.split("**Table 1: the systems**")[1].strip().splitlines()[:5]
    assert heads == ("|  | people | plain | styled | style | both | beach | missed | copied | error | "
                     "obeyed | leaked | given, plain | given, both | seconds | KB | paper |")
    assert ours == ("| HyperDreamBooth | 2 | 0.650 ± 0.050 | 0.550 ± 0.050 | 0.889 ± 0.000 | 0.489 ± 0.044 | "
                    "0.550 ± 0.050 | 0.000 ± 0.000 | 0.200 ± 0.000 | 0.100 (1) | 0.800 ± 0.000 | "
                    "0.500 ± 0.050 | 0.700 ± 0.000 | 0.622 ± 0.000 | 2.5 | 183.0 | "
                    ".655 / .473 / .577 / .286 |")
    assert theirs == ("| DreamBooth | 2 | 0.650 ± 0.150 | 0.550 ± 0.150 | 0.889 ± 0.000 | 0.489 ± 0.133 | "
                      "0.000 ± 0.000 | 0.000 ± 0.000 | 0.600 ± 0.000 | 0.100 (1) | 0.800 ± 0.000 | "
                      "0.500 ± 0.150 | 0.900 ± 0.000 | 0.800 ± 0.000 | 177.0 | 12,165.5 | "
                      ".618 / .441 / .546 / .282 |")
    assert itself.startswith("| the model itself | 2 | 0.150 ± 0.000 |") and itself.endswith("| – | – | – |")
    assert ("| DreamBooth | 2 | 50.0% | 50.0% | 0.0% | +0 [-100, +100] | 64.8 % / 23.3 % / 11.9 % | "
            "2, 0.0% / 100.0% / 0.0%, -100 [-100, -100] |") in text
    assert ("| No Hyper | 2 | 100.0% | 0.0% | 0.0% | +100 [+100, +100] | – | "
            "2, 0.0% / 0.0% / 100.0%, +0 [+0, +0] |") in text
    third, steps = (text.split(f"**{title}**")[1].split("**")[0] for title in (
        "Table 3: what the parts do", "HyperDreamBooth, by steps"))
    assert "| No Hyper |" in third and "E4T |" not in third and "steps = 7" not in steps
    assert "| steps = 40 | 2 | 0.600 ± 0.050 |" in steps and "| steps = 5 | 2 | 0.450 ± 0.050 |" in steps
    heads = {cell.strip() for row in text.splitlines() if row.startswith("|  |") for cell in row.split("|")}
    for head in heads - {"", "people"}:  # each is defined where the tables are
        assert f"**{head}**" in scores.ABOUT, head


def test_a_report_of_the_papers_metrics(tmp_path):
    """Without pairs, which need another photo."""
    table = experiment.Table(tmp_path / "scores.csv", 5, (*experiment.KEY, *scores.Paper.names))
    for who, prompt, *numbers in (0, "a [V] face", .5, .6, .25), (0, "x", .3, .6, .35), (1, "x", .2, .8, .2):
        table.add(("No Hyper", "", "", who, prompt, *numbers))
    report.write(tmp_path, scores.Paper)
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert text == ("± is the standard error over people.\n\n**Table 3: what the parts do**\n\n"
                    "|  | people | DINO | CLIP-I | CLIP-T | paper |\n| --- | --- | --- | --- | --- | --- |\n"
                    "| No Hyper | 2 | 0.300 ± 0.100 | 0.700 ± 0.100 | 0.250 ± 0.050 | "
                    ".647 / .392 / .498 / .299 |\n")


def test_figures_of_all_there_is(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(figures, "COLUMNS", ("photo", "king"))  # fewer are faster
    whole(tmp_path)
    sheets, empty = [], figures.sheet
    monkeypatch.setattr(figures, "sheet", lambda *size: sheets.append(empty(*size)) or sheets[-1])
    paths = figures.write(tmp_path, report.write(tmp_path, scores.Judged), scores.Judged)
    assert [path.name for path in paths] == ["style.png", "copied.png", "obeyed.png", "curves.png",
                                             "table_1.png", "table_2.png", "table_3.png"]
    assert all(path.stat().st_size for path in paths)
    assert [path.name for path in paths if images.GENERATED in images.settings(path).values()] == [
        "table_1.png", "table_2.png", "table_3.png"]  # which show people

    # Dots and their errors: HyperDreamBooth, DreamBooth, No Hyper
    both, error = .55 * 8 / 9, .05 * 8 / 9
    for sheet, expected in zip(sheets, ([(8 / 9, .55), (8 / 9, .55), (8 / 9, .4)],
                                        [(.2, both), (.6, both), (.3, .4 * 8 / 9)],
                                        [(.8, both), (.8, both), (.8, .4 * 8 / 9)])):
        (axes,) = sheet.axes
        assert [dot[0].get_xydata()[0] for dot in axes.containers] == [pytest.approx(xy) for xy in expected]
        named = {text.get_text(): text.xy for text in axes.texts}
        assert named == {name: pytest.approx(xy) for name, xy in zip(
            (report.OURS, "DreamBooth", "No Hyper"), expected)}
    bars = [bar.get_segments()[0] for bar in sheets[1].axes[0].containers[0][2]]
    assert bars[0] == pytest.approx(torch.tensor([[.2, both], [.2, both]]).numpy())
    assert bars[1] == pytest.approx(torch.tensor([[.2, both - error], [.2, both + error]]).numpy())

    # A curve, in the order of its knob
    (axes,) = sheets[3].axes
    curve, _, (bars,) = axes.containers[0]
    assert curve.get_xydata() == pytest.approx(torch.tensor([[5, .35 * 8 / 9], [40, .5 * 8 / 9]]).numpy())
    assert axes.get_xlabel() == "steps of fine-tuning"
    assert bars.get_segments()[0][:, 1] == pytest.approx(torch.tensor([.3 * 8 / 9, .4 * 8 / 9]).numpy())

    # A grid: the photo, then the pictures, of each person and system
    shown = [axes.images[0].get_array()[0, 0, 0] / 255 for axes in sheets[5].axes]
    expected = [(1, .6, .5), (1, .5, .4), (.5, .7, .6), (.5, .8, .7)]
    assert [*zip(*[iter(shown)] * 3)] == [pytest.approx(row, abs=.01) for row in expected]


@pytest.mark.parametrize("left", [0, 1, 20])
def test_an_interrupted_run_breaks_nothing(tmp_path, left):
    rows = whole(tmp_path / "whole")
    write_scores(tmp_path / "part", [row | dict.fromkeys(["copied", "error"]) for row in rows[::3][:left]])
    found = report.write(tmp_path / "part", scores.Judged)
    figures.write(tmp_path / "part", found, scores.Judged)
    assert (tmp_path / "part/tables.md").read_text(encoding="utf-8").startswith(scores.ABOUT)


def test_names_in_a_figure_touch_nothing():
    matplotlib = pytest.importorskip("matplotlib")
    figure = figures.sheet(7, 5)
    axes = figure.subplots()
    points = {f"a system of number {i}": (.5 + .01 * i, .5 + .002 * (i % 3)) for i in range(12)}
    axes.plot(*zip(*points.values()), "o")
    figures.name_dots(axes, points)
    figure.draw_without_rendering()
    assert sorted(text.get_text() for text in axes.texts) == sorted(points)
    boxes = [matplotlib.text.Text.get_window_extent(text) for text in axes.texts]  # without their lines
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.x0 > axes.bbox.x1 and box.x1 < figure.bbox.x1 for box in boxes)


def test_a_leaderboard_grows_by_a_row(tmp_path, monkeypatch, capsys):
    whole(tmp_path)
    for what in "first", "second | third":
        leaderboard.main(SimpleNamespace(out=tmp_path, what=what))
    lines = (tmp_path / "leaderboard.md").read_text(encoding="utf-8").splitlines()
    assert lines[-3].startswith("|---") and "| first | 0.489 | 0.200 | 0.800 | 0.500 | 2.5 |" in lines[-2]
    assert "| second / third |" in lines[-1] and lines[0] == "# Leaderboard"
    with pytest.raises(UserError, match="no HyperDreamBooth"):
        leaderboard.main(SimpleNamespace(out=tmp_path / "nowhere", what="x"))


@pytest.fixture
def paper(monkeypatch):
    towers, tokenizer = fill(clip.CLIP(TEXT, VISION)), clip.Tokenizer(VOCAB, MERGES, 12)
    dino = fill(ViT(VIT)).eval()
    monkeypatch.setattr(scores, "load_clip", lambda source, device: (towers, tokenizer))
    monkeypatch.setattr(scores, "load_vit", lambda source, device: dino)
    return scores.Paper(photo(2)[:, None], "clip", "dino", "cpu"), towers, tokenizer, dino


@torch.no_grad()
def test_the_papers_metrics(paper):
    measure, towers, tokenizer, dino = paper
    pictures, measure.photos = photo(2, seed=3), photo(2, seed=4)[:, None]
    found = measure(pictures, [("a [V] face as a rock star", 1), ("a [V] face", 0)])
    photos = measure.photos[[1, 0], 0]
    assert list(found) == ["DINO", "CLIP-I", "CLIP-T"]

    def cosine(a, b):
        return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    one, other = (towers.image_features(clip.preprocess(x, 32)) for x in (pictures, photos))
    words = towers.text_features(tokenizer(["a face as a rock star", "a face"]))
    tokens = [encode_face(dino, x)[:, 0] for x in (pictures, photos)]
    expected = {"CLIP-I": cosine(one, other), "CLIP-T": cosine(one, words), "DINO": cosine(*tokens)}
    for name, value in expected.items():
        torch.testing.assert_close(torch.tensor(found[name]), value)


def test_the_judges_scores(coarse, monkeypatch):
    """Of drawings whose everything is known: the photo itself, another photo, a king, somebody with
    glasses."""
    monkeypatch.setattr(instrument, "STEPS", 20)  # which find a drawing well enough
    monkeypatch.setattr(instrument, "TRIALS", (5,))
    judged = scores.Judged(3, "cpu")
    assert judged.photos.shape == (3, 1 + scores.MORE, 3, 128, 128)
    more = scores.Judged(4, "cpu")  # nobody's photos depend on how many people there are
    assert torch.equal(more.photos[:3], judged.photos)
    who, known = 2, faces.attributes(judged.identity)
    assert [known["glasses"][who], *known["hair_colour"][:2]] == [0, 2, 3]
    one, bespectacled = judged.identity[who:who + 1], judged.identity[who:who + 1].clone()
    bespectacled[:, faces.IDENTITY.index("glasses")] = faces.number("glasses", 1)
    king = faces.photos(one, generator(3), "cpu", torch.tensor([list(faces.STYLES).index("king")]))
    glasses = faces.photos(bespectacled, generator(4), "cpu")
    pictures = torch.cat([judged.photos[who, :1], judged.photos[who, -1:], king, king, glasses])
    drawn = [(name, who) for name in ("photo", "photo again", "king", "pixar", "round glasses")]
    found = judged(pictures, drawn)
    assert found.keys() == set(judged.names)
    assert found["style"] == [1, None, 1, 0, None] and found["obeyed"] == [None] * 4 + [1]
    assert found["likeness"][0] == pytest.approx(1) and .7 < found["another"][0] < .999
    assert found["likeness"][1] < .999 and found["another"][1] == pytest.approx(1)
    assert found["another"][2] > .6
    assert found["copied"][0] > .7 and abs(found["copied"][1]) < .6 and found["copied"][2:] == [None] * 3
    assert found["error"][0] < .2 and found["error"][2:] == [None] * 3

    # The first person's hair is blond, the second's is not
    blond, drawn = judged.photos[0, :1], [("a full beard", 1), ("blond hair", 0), ("blond hair", 1)]
    assert judged(blond.expand(3, -1, -1, -1), drawn)["obeyed"] == [0, None, 1]
    assert torch.equal(judged.identity, faces.identities(range(seeds.TEST, seeds.TEST + 3)))


def test_every_system_of_the_tables_is_there():
    named = {job.system for job in systems.rows(True)}
    assert named == {system for table in report.TABLES.values() for system in table}
    assert {system for table in report.STUDIES.values() for system in table} <= named
    assert {(job.system, job.knob) for job in systems.curves()} == {
        *(("HyperDreamBooth", knob) for knob in ("steps", "rank", "photos", "strength")),
        ("Only Hyper", "passes"), ("DreamBooth", "strength"), ("Perfusion", "beta")}
    assert figures.CURVES.keys() <= {(job.system, job.knob) for job in systems.curves()}


@pytest.mark.parametrize("nano", [True, False])
def test_what_every_row_is_trained_with(nano, monkeypatch):
    """Only Hyper and the model itself are not; No Hyper predicts nothing; k is the number of passes."""
    found, made, given = {}, {}, []

    def learn(model, photo, *, generator, callback, **settings):
        found[some.system] = settings

    def tune(engine, photos, theta, generators, views, steps, rank, lr, callback):
        found[some.system] = {"theta": theta, "views": views, "steps": steps, "rank": rank, "lr": lr}
        return given.append(photos.shape)
    for module in dreambooth, textual_inversion, perfusion, e4t:
        monkeypatch.setattr(module, "learn", learn)
    monkeypatch.setattr(hyperdreambooth, "tune", tune)
    monkeypatch.setattr(dreambooth, "class_pictures", lambda model, *of: of)
    monkeypatch.setattr(systems, "domain", lambda model: {"domain": "nano's"})
    method = SimpleNamespace(model=None, predict=lambda photo, passes: f"{passes} passes")
    for some in systems.rows(nano):
        made[some.system] = some.fit(method, torch.zeros(1, 3, 8, 8), [generator()]).tensors
    ours = {"steps": 40, "rank": 4} | ({"lr": .003, "views": 8} if nano else {"lr": .0005, "views": 1})
    prior = {"prior": (64, 0)}
    assert found == {
        "HyperDreamBooth": ours | {"theta": "None passes"}, "No Hyper": ours | {"theta": None},
        **{f"k = {k}": ours | {"theta": f"{k} passes"} for k in (1, 2, 3)},
        "DreamBooth": prior | {"steps": 1200, "lr": 1e-5 if nano else 1e-6},
        "DreamBooth-Agg-1": prior | {"steps": 400, "lr": 2e-5 if nano else 3e-6},
        "DreamBooth-Agg-2": prior | {"steps": 40, "lr": 5e-5 if nano else 3e-5},
        "LoRA DreamBooth": prior | {"rank": 4} | ({"steps": 400, "lr": 5e-4} if nano else
                                                  {"steps": 800, "lr": 1e-4}),
        "Textual Inversion": {"batch": 2} | ({"steps": 300, "lr": .02} if nano else
                                             {"steps": 5000, "lr": .005}),
        "Perfusion": {"steps": 400} | ({"lr": .1, "embedding_lr": .02, "batch": 4} if nano else
                                       {"lr": .03, "embedding_lr": .006, "batch": 16}),
        "E4T": {"steps": 15, "domain": "nano's"}}
    assert made["Only Hyper"] == {"theta": "None passes"} and made["the model itself"] == {}
    systems.ours(method, torch.zeros(1, 2, 3, 8, 8), [generator()])
    assert given == [(1, 1, 3, 8, 8)] * 5 + [(1, 2, 3, 8, 8)]


def test_what_the_curves_turn():
    """Each curve its own knob. No system is given the photo that `another` measures with."""
    a, b = torch.ones(1, 3, 2), torch.ones(1, 2, 4)
    fitted = {"x": LowRank(a, b), "y": perfusion.Gated(a, a, a, beta=.9, tau=.1)}
    for some in systems.curves():
        value, settings = some.values[-1], getattr(some.fit, "keywords", {})
        assert settings == {"steps": {"steps": value}, "rank": {"rank": value},
                            "passes": {"steps": 0, "iterations": value}}.get(some.knob, {})
        assert some.photos == (value if some.knob == "photos" else 1) <= scores.MORE
        name = {"strength": "x", "beta": "y"}.get(some.knob)
        turned = some.turn({name: fitted.get(name)}, .5)[name]
        assert some.knob != "strength" or torch.equal(turned.b, b / 2)
        assert some.knob != "beta" or turned.beta == .5


def test_rows_that_need_what_is_not_there_are_left_out(capsys):
    method = hdb.HyperDreamBooth(shared_model())
    left = evaluate.able(systems.rows(False), False, method)
    assert [job.system for job in left] == ["DreamBooth", "Textual Inversion", "LoRA DreamBooth", "Perfusion",
                                            "DreamBooth-Agg-1", "DreamBooth-Agg-2", "No Hyper",
                                            "the model itself"]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 6 and said[0].startswith("HyperDreamBooth: left out, because ")


def test_an_official_encoder_is_read_once_if_a_row_predicts(monkeypatch):
    """By all rows and people, and outside the first person's seconds."""
    method = hdb.HyperDreamBooth(shared_model())
    method.hypernet = net = tiny_hypernet(*method.lidb.shape)
    read, vit = [], net.vit
    monkeypatch.setattr(encoders, "load_vit", lambda source, device: read.append((source, device)) or vit)
    net.vit = copy.deepcopy(vit).to("meta")
    net.vit.source, net.vit.checksum_of_file = "some/vit", checksum(vit)
    evaluate.keep_encoder([job(), job(needs="encoder")], method)
    assert not read
    rows = [row for row in systems.rows(nano=False) if row.system in ("Only Hyper", "No Hyper")]
    evaluate.keep_encoder(rows, method)
    for _ in range(2):
        method.predict(photo(2))
    assert read == [("some/vit", torch.device("cpu"))]


@pytest.mark.parametrize("nano, part", [(True, 1), (False, 20)])
def test_quick_takes_fewer_steps_elsewhere(nano, part):
    def steps(quick):
        found = {job.system: job.fit for job in systems.rows(nano, quick)}
        fits = [found[name] for name in found if name not in ("E4T", "Only Hyper", "the model itself")]
        settings = [fit.keywords if hasattr(fit, "keywords") else inspect.getclosurevars(fit).nonlocals
                    for fit in fits]
        return [each["steps"] for each in settings]
    assert steps(True) == [max(1, usual // part) for usual in steps(False)]


def test_a_row_that_fails_is_reported_and_the_next_one_runs(tmp_path, capsys):
    def full(method, photo, generators):
        raise torch.OutOfMemoryError("CUDA out of memory")
    good = systems.Job("good", lambda method, photo, generators: hyperdreambooth.person())
    bad, group = systems.Job("bad", full), torch.tensor([0])
    table = experiment.Table(tmp_path / "scores.csv", 5, (*experiment.KEY, *Simple.names))
    work = [(one, group, ["photo"]) for one in (bad, good, bad)]
    settings = experiment.Settings(1, 1., 8, tmp_path)
    method = hdb.HyperDreamBooth(shared_model())
    failed = evaluate.all_of(work, method, Simple(photo(1)[:, None]), table, None, settings)
    assert failed.keys() == {"bad"} and capsys.readouterr().out.count("bad: CUDA out of memory") == 1
    assert [row["system"] for row in report.read(tmp_path / "scores.csv")] == ["good"]


def test_who_is_measured_under_which_prompts(tmp_path, monkeypatch):
    work, fitted = [], []

    def all_of(some, method, scores, table, costs, settings):
        work.extend((job.system, job.knob, group.tolist(), len(names)) for job, group, names in some)
        assert settings == (7, 3., 8, args.out)
        return failed
    rows = [systems.Job("A", None, quick=4), systems.Job("B", None)]
    monkeypatch.setattr(systems, "rows", lambda nano, quick: rows)
    monkeypatch.setattr(systems, "curves", lambda: [systems.Job("A", None, 3, "steps", (5,))])
    monkeypatch.setattr(hdb, "load", lambda *_: shared_model())
    monkeypatch.setattr(hdb, "load_hypernet", lambda *_: None)
    monkeypatch.setattr(evaluate, "Judged", lambda people, device: SimpleNamespace(
        photos=torch.zeros(people, 1), prompts=dict.fromkeys("abcde"), few="ab", more="c", names=()))
    monkeypatch.setattr(evaluate, "all_of", all_of)
    monkeypatch.setattr(experiment, "fit", lambda job, group, *_: fitted.append((job.system, group.tolist())))
    monkeypatch.setattr(report, "write", lambda out, scores: (out / "tables.md").write_text(""))
    monkeypatch.setattr(figures, "write", lambda *_: [])

    # --quick, whole, and one of two rows failed: its seconds are not measured either
    args = SimpleNamespace(model="nano", device="cpu", dtype=None, hypernet=None, rows=None, sample_steps=7,
                           guidance=3., out=tmp_path / "quick", people=4, few=True, quick=True, curves=False)
    failed = {}
    evaluate.main(args)
    assert work == [("A", "", [0], 3), ("A", "", [1, 2, 3], 3), ("B", "", [0], 3)]
    assert fitted == [("A", [0]), ("B", [0])]
    args.out, args.people, args.few, args.quick, args.curves = tmp_path / "all", 10, False, False, True
    work.clear(), fitted.clear(), failed.update(B="error")
    with pytest.raises(UserError, match="B: failed"):
        evaluate.main(args)
    groups = [0], [*range(1, 9)], [9]
    assert work[:6] == [(system, "", group, 5) for system in "AB" for group in groups]
    assert work[6:] == [("A", "steps", group, 2) for group in ([0, 1, 2], [3, 4, 5], [6, 7])]
    assert fitted == [("A", [0])]


@pytest.fixture
def no_model(monkeypatch):
    def load(*given):
        raise AssertionError("a model is loaded")
    monkeypatch.setattr(hdb, "load", load)


@pytest.mark.parametrize("arguments, why", [
    (["--rows", "Nobody"], "there are HyperDreamBooth"),
    (["--faces", "photos"], "--faces is for a model other than nano"),
    (["--model", "somewhere"], "required: --faces"),
    (["--model", "somewhere", "--faces", "nowhere"], "nowhere: no such folder"),
    (["--model", "somewhere", "--faces", "nano", "--out", "results"], "has results of nano"),
    (["--hypernet", "nowhere.safetensors"], "no such file"),
    (["--people", 0], "--people: must be"),
    (["--out", "README.md"], "is a file")])
def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(refusal, no_model, arguments, why):
    assert why in refusal(evaluate, "--device", "cpu", *arguments)


@pytest.mark.parametrize("given, people, few, curves", [
    ([], 32, False, True), (["--quick"], 4, True, False), (["--quick", "--people", 2], 2, False, False),
    (["--rows"], 32, False, True), (["--rows", "E4T"], 32, False, False), (["--no-curves"], 32, False, False),
    (["--model", "x/some-model", "--faces", "nano"], 32, False, False),
    (["--quick", "--model", "x/some-model", "--faces", "nano"], 1, False, False)])
def test_how_many_people_are_measured(monkeypatch, given, people, few, curves):
    monkeypatch.setattr("sys.argv", ["evaluation", *map(str, given)])
    args = evaluate.arguments()
    assert (args.people, args.few, args.curves) == (people, few, curves)


def test_the_first_photos_of_a_folder_are_measured(tmp_path, monkeypatch):
    for seed in range(3):
        images.save(images.to_pil(photo(seed=seed)[0]), tmp_path / f"{seed}.png")
    monkeypatch.setattr(evaluate, "Paper", lambda *of: of)
    args = SimpleNamespace(faces=tmp_path, people=2, clip="a", dino="b")
    photos, *towers = evaluate.paper(args, shared_model())
    assert photos.shape == (2, 1, 3, 64, 64) and towers == ["a", "b", torch.device("cpu")]
    assert torch.allclose(photos[1], photo(seed=1), atol=.01)


@pytest.mark.parametrize("given, out", [
    ([], "results"), (["--quick"], "runs/quick"), (["--model", "x/some-model", "--faces", "nano"],
                                                  "runs/evaluation_some-model"),
    (["--model", "x/some-model", "--faces", "nano", "--quick"], "runs/evaluation_some-model_quick"),
    (["--out", "elsewhere"], "elsewhere")])
def test_where_results_go(monkeypatch, given, out):
    monkeypatch.setattr("sys.argv", ["evaluation", *given])
    assert evaluate.arguments().out == Path(out)


def test_a_training_has_curves_of_its_own(tmp_path, monkeypatch):
    """Of the lines that people were watched at."""
    pytest.importorskip("matplotlib")
    sheet = figures.sheet(9, 3)
    monkeypatch.setattr(figures, "sheet", lambda *size: sheet)
    log = tmp_path / "training.jsonl"
    watched = {"likeness 1": .5, "likeness photo": .9, "leaked a face": .1, "obeyed": .7}
    lines = {"step": 50, "loss": 1}, {"step": 100} | watched, {"step": 200} | watched | {"obeyed": .8}
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert figures.training(log, tmp_path / "t.png") == tmp_path / "t.png"
    assert images.read(tmp_path / "t.png", 128).std() > .1
    drawn = {line.get_label(): line.get_xydata().tolist() for axes in sheet.axes for line in axes.lines}
    assert drawn["plain, the last"] == [[100, .9], [200, .9]] and len(drawn) == 4
    assert sheet.axes[2].lines[0].get_xydata().tolist() == [[100, .7], [200, .8]]

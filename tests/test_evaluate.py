"""The experiment: what is counted, what is measured again, and what the tables say of it."""
import csv
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from rule import fill
from tiny import MERGES, TEXT, VIT, VOCAB, generator, photo, shared_model

import clip
from evaluation import __main__ as evaluate
import hdb
from adapters import Change
from evaluation import report, scores, systems
from files import images
from program.console import UserError
from files.person import Person, save_person
from nano import faces
from vit import ViT, encode_face

VISION = clip.VisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                           image_size=32, patch_size=8, projection_dim=12)


class Simple:
    """Scores of a picture: its mean, and 1 if the prompt is the plain one."""
    names, plain = ("likeness", "style", "both"), "photo"
    prompts = {"photo": "a [V] face", "king": "a [V] king"}

    def __call__(self, pictures, photos, prompt):
        likeness, right = pictures.mean((1, 2, 3)), torch.full((len(pictures),), float(prompt == "photo"))
        return {"likeness": likeness, "style": right, "both": likeness * right}


def job(fit=lambda method, photo, generator: Person(), **more):
    return systems.Job("nobody", fit, **more)


def settings(folder):
    return SimpleNamespace(out=folder, sample_steps=1, guidance=1.)


def costs(folder):
    return evaluate.Table(folder / "costs.csv", 1, ("system", "seconds", "bytes"))


def table(folder):
    columns = "system", "knob", "value", "person", "prompt", *Simple.names
    return evaluate.Table(folder / "scores.csv", 5, columns)


def test_everybody_is_drawn_once_under_their_own_noise(tmp_path):
    method, faces_ = hdb.HyperDreamBooth(shared_model()), photo(3)[:, None]
    both = job(), torch.tensor([0, 2]), ["photo", "king"], method, faces_, Simple()
    files = table(tmp_path), costs(tmp_path), settings(tmp_path)
    evaluate.measure(*both, *files)
    rows = report.read(tmp_path / "scores.csv")
    assert [(row["person"], row["prompt"]) for row in rows] == [
        ("0", "photo"), ("2", "photo"), ("0", "king"), ("2", "king")]
    for row in rows:
        noise = 1000 * (row["prompt"] == "king") + int(row["person"])
        alone = method.sample([Simple.prompts[row["prompt"]]], {}, [noise], steps=1, guidance=1.)
        assert float(row["likeness"]) == pytest.approx(alone.mean().item(), abs=1e-4)
    assert {"nobody_0_king.png", "photo_2_.png"} <= {file.name for file in (tmp_path / "pictures").iterdir()}

    # measured already: nobody is fitted again
    def never(method, photo, generator):
        raise AssertionError
    files = table(tmp_path), costs(tmp_path), settings(tmp_path)
    evaluate.measure(job(never), *both[1:], *files)
    with pytest.raises(AssertionError):
        evaluate.measure(job(never), torch.tensor([1]), *both[2:], *files)


def test_a_knob_is_turned_after_the_fit(tmp_path):
    model = shared_model()
    bias = "unet.conv_out"

    def fit(method, photo, generator):
        fitted.append(len(photo))
        return Person(tensors={f"{bias}.bias": torch.ones(1, 4)}, made_by="dreambooth")

    def turn(adapters, value):
        return {name: adapter.scaled(value) for name, adapter in adapters.items()}
    fitted = []
    some = job(fit, knob="strength", values=(0., .5), turn=turn)
    method = hdb.HyperDreamBooth(model)
    files = table(tmp_path), costs(tmp_path), settings(tmp_path)
    evaluate.measure(some, torch.tensor([0]), ["photo"], method, photo(1)[None], Simple(), *files)
    rows = report.read(tmp_path / "scores.csv")
    assert fitted == [1]
    assert [(row["knob"], row["value"]) for row in rows] == [("strength", "0"), ("strength", "0.5")]
    for row, value in zip(rows, (0, .5)):
        mine = {bias: Change({"bias": torch.full((4,), value)})}
        expected = method.sample(["a [V] face"], mine, [0], steps=1, guidance=1.).mean().item()
        assert float(row["likeness"]) == pytest.approx(expected, abs=1e-4)
    assert rows[0]["likeness"] != rows[1]["likeness"]


def test_what_one_person_costs(tmp_path):
    method, known = hdb.HyperDreamBooth(shared_model()), costs(tmp_path)

    def slow(method, photo, generator):
        time.sleep(.05)
        return Person(torch.zeros(len(photo), *method.lidb.shape))
    evaluate.fit(job(slow), torch.tensor([0, 1]), method, photo(2)[:, None], known)
    assert report.read(tmp_path / "costs.csv") == []  # people side by side
    evaluate.fit(job(slow), torch.tensor([1]), method, photo(2)[:, None], known)
    (row,) = report.read(tmp_path / "costs.csv")
    save_person(Person(torch.zeros(1, *method.lidb.shape)), method, tmp_path / "person")
    assert row["system"] == "nobody" and .05 <= float(row["seconds"]) < 5
    assert int(row["bytes"]) == (tmp_path / "person").stat().st_size


def test_several_photos_are_given_and_another_judges(tmp_path):
    given, judged, faces_ = [], [], photo(6).unflatten(0, (2, 3))

    def fit(method, photo, generator):
        given.append(photo)
        return Person()

    class Noting(Simple):
        def __call__(self, pictures, photos, prompt):
            judged.append(photos)
            return super().__call__(pictures, photos, prompt)
    some = job(fit, knob="photos", values=(2,), photos=2, judged_by=2)
    files = table(tmp_path), costs(tmp_path), settings(tmp_path)
    method = hdb.HyperDreamBooth(shared_model())
    evaluate.measure(some, torch.tensor([1, 0]), ["photo"], method, faces_, Noting(), *files)
    assert torch.equal(given[0], faces_[[1, 0], :2]) and torch.equal(judged[0], faces_[[1, 0], 2])
    shown = evaluate.drawn(2, "cpu")
    assert shown.shape == (2, 1 + systems.PHOTOS, 3, 128, 128)
    likeness = scores.Judged("cpu")(shown[:, 0], shown[:, systems.PHOTOS], "photo")["likeness"]
    assert (likeness > .7).all() and not torch.equal(shown[:, 0], shown[:, 1])


@pytest.mark.parametrize("named, expected", [
    (None, ["A", "B"]), ([], []), (["B"], ["B"]), (["B", "A"], ["A", "B"])])
def test_rows_that_are_chosen(named, expected):
    jobs = [systems.Job(name, None) for name in "AB"]
    assert [job.system for job in evaluate.chosen(SimpleNamespace(rows=named), jobs)] == expected
    with pytest.raises(UserError, match="--rows C: there are A, B"):
        evaluate.chosen(SimpleNamespace(rows=["C"]), jobs)


@pytest.mark.parametrize("count, size, expected", [
    (1, 8, [1]), (2, 8, [1, 1]), (4, 2, [1, 2, 1]), (9, 8, [1, 8])])
def test_groups_are_everybody_the_first_alone(count, size, expected):
    found = evaluate.groups(count, size)
    assert [len(group) for group in found] == expected
    assert torch.cat(found).tolist() == list(range(count))


def test_a_table_goes_on_where_it_was(tmp_path):
    first = evaluate.Table(tmp_path / "new/a.csv", 2, ("a", "b", "c"))
    first.add((1, .25, 3.14159265))
    first.add((1, .25, 9))
    again = evaluate.Table(tmp_path / "new/a.csv", 2, ("a", "b", "c"))
    again.add(("x, y", "z", 1))
    assert (1, .25) in again and ("x, y", "z") in again and (1, .3) not in again
    with open(tmp_path / "new/a.csv", newline="") as f:
        assert list(csv.reader(f)) == [["a", "b", "c"], ["1", "0.25", "3.1416"], ["x, y", "z", "1"]]
    with pytest.raises(UserError, match="other columns"):
        evaluate.Table(tmp_path / "new/a.csv", 2, ("a", "c"))


def test_a_line_that_was_cut_off_is_measured_again(tmp_path):
    path, columns = tmp_path / "a.csv", ("a", "b")
    whole = b"a,b\r\nx,1\r\n"
    for cut in b"y", b"y,", b"y,0.5":
        path.write_bytes(whole + cut)
        table = evaluate.Table(path, 1, columns)
        assert ("x",) in table and ("y",) not in table and path.read_bytes() == whole
        table.add(("y", .75))
        assert path.read_bytes() == whole + b"y,0.75\r\n"


@pytest.mark.parametrize("line", [b"x", b"x,1,2", b"x,one", b"x,nan", b"x,inf", b"\xff,1", b"x,\0"])
def test_a_table_that_makes_no_sense(tmp_path, line):
    (tmp_path / "a.csv").write_bytes(b"a,b\r\n" + line + b"\r\n")
    with pytest.raises(UserError, match="a.csv: damaged"):
        evaluate.Table(tmp_path / "a.csv", 1, ("a", "b"))


def test_numbers_of_other_weights_are_not_mixed(tmp_path):
    args = SimpleNamespace(out=tmp_path / "run", sample_steps=15, guidance=3., faces=None)
    method = hdb.HyperDreamBooth(shared_model())
    evaluate.check_run(args, method)
    evaluate.check_run(args, method)
    args.guidance = 2.
    with pytest.raises(UserError, match="guidance 3.0 there, 2.0 here"):
        evaluate.check_run(args, method)


def line(person, prompt, likeness, style, system="A", knob="", value=""):
    return {"system": system, "knob": knob, "value": value, "person": person, "prompt": prompt,
            "likeness": likeness, "style": style, "both": likeness * style}


def test_a_summary_is_of_people():
    rows = [line("0", "photo", .9, 1), line("1", "photo", .7, 0), line("0", "king", .8, 1),
            line("0", "pixar", .2, 0), line("1", "king", .6, 1), line("1", "pixar", .4, 1)]
    found = report.summary(rows, scores.Judged)
    expected = {'"a [V] face"': (.8, .1), "styled": (.5, 0), "style": (.75, .25),
                "likeness × style": (.45, .05), "under 0.3": (.25, .25)}
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        assert found[name] == pytest.approx(pair), name


def test_one_person_has_no_error():
    rows = [{"person": "0", "likeness": "0.5"}, {"person": "0", "likeness": "0.7"}]
    assert report.figure(*report.over_people(rows, "likeness")) == "0.600"
    assert report.figure(.5, .01) == "0.500 ± 0.010"


def test_a_report_of_tables_grids_and_a_scatter(tmp_path):
    settings = ("HyperDreamBooth",), ("No Hyper",), ("HyperDreamBooth", "steps", "5")
    rows = [line(who, prompt, .5, 1, *one) for who in "01" for prompt in faces.STYLES for one in settings]
    black = images.to_pil(torch.zeros(3, 64, 64))
    for row in rows:
        images.save(black, report.picture(tmp_path, "photo", row["person"], ""))
        images.save(black, report.picture(tmp_path, row["system"], row["person"], row["prompt"]))
    with open(tmp_path / "scores.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "costs.csv").write_text("system,seconds,bytes\nHyperDreamBooth,2.5,183000\n")
    paths = report.write(tmp_path, scores.Judged)
    names = ["tables.md", "table_1.png", "table_2.png", "table_3.png", "scatter.png"]
    assert [path.name for path in paths] == names
    assert all(path.stat().st_size for path in paths)
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert text.startswith("11 prompts a person")
    third = text.split("**Table 3")[1]
    assert "| HyperDreamBooth | 2 | 0.500 ± 0.000 | 0.500 ± 0.000 | 1.000 ± 0.000 |" in third
    assert "| 2.5 | 183.0 | 0.655 | 0.473 | 0.577 | 0.286 |" in third and "| No Hyper |" in third
    assert "**HyperDreamBooth, by steps**" in text and "| steps = 5 |" in text and "E4T" not in text


@pytest.fixture
def paper(monkeypatch):
    towers, tokenizer = fill(clip.CLIP(TEXT, VISION)), clip.Tokenizer(VOCAB, MERGES, 12)
    dino = fill(ViT(VIT)).eval()
    monkeypatch.setattr(scores, "load_clip", lambda source, device: (towers, tokenizer))
    monkeypatch.setattr(scores, "load_vit", lambda source, device: dino)
    return scores.Paper("clip", "dino", "cpu"), towers, tokenizer, dino


@torch.no_grad()
def test_the_papers_metrics(paper):
    measure, towers, tokenizer, dino = paper
    pictures, photos = photo(2, seed=3), photo(2, seed=4)
    found = measure(pictures, photos, "a [V] face as a rock star")
    assert list(found) == ["DINO", "CLIP-I", "CLIP-T"]

    def cosine(a, b):
        return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    one, other = (towers.image_features(clip.preprocess(x, 32)) for x in (pictures, photos))
    words = towers.text_features(tokenizer(["a face as a rock star"]))
    tokens = [encode_face(dino, x)[:, 0] for x in (pictures, photos)]
    expected = {"CLIP-I": cosine(one, other), "CLIP-T": cosine(one, words), "DINO": cosine(*tokens)}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_face_rec_where_facenet_is_installed(paper, monkeypatch):
    class Detect:
        def __init__(self, image_size, device):
            assert image_size == 160

        def __call__(self, picture):  # (H, W, 3) bytes; the second has no face
            assert picture.shape == (64, 64, 3) and str(picture.dtype) == "uint8"
            crop = torch.tensor(picture / 255.).float().mean() * torch.ones(3, 160, 160)
            return crop if picture.mean() > 9 else None

    class Network(torch.nn.Module):
        def __init__(self, pretrained):
            super().__init__()
            assert pretrained == "vggface2"

        def forward(self, crops):
            return crops.mean((1, 2, 3))[:, None] * torch.ones(512)

    facenet = SimpleNamespace(MTCNN=Detect, InceptionResnetV1=Network)
    monkeypatch.setitem(sys.modules, "facenet_pytorch", facenet)
    measure = scores.Paper("clip", "dino", "cpu")
    pictures = photo(2)
    pictures[1] = -1
    found = measure(pictures, photo(2), "a [V] face")
    assert list(found) == ["Face Rec.", "DINO", "CLIP-I", "CLIP-T"]
    assert found["Face Rec."].tolist() == pytest.approx([1, 0])


def test_the_judges_scores():
    judged = scores.Judged("cpu")
    identity = torch.rand(2, len(faces.IDENTITY), generator=generator(1))
    photos = faces.photos(identity, generator(2), "cpu")
    kings = faces.photos(identity, generator(3), "cpu", torch.full((2,), scores.STYLES.index("king")))
    right, wrong = judged(kings, photos, "king"), judged(kings, photos, "photo")
    assert right["style"].tolist() == [1, 1] and wrong["style"].tolist() == [0, 0]
    assert torch.equal(right["likeness"], judged.judge.likeness(kings, photos))
    assert right["likeness"].min() > .6
    assert torch.equal(right["both"], right["likeness"]) and wrong["both"].tolist() == [0, 0]


def test_every_system_of_the_tables_is_there():
    named = {job.system for job in systems.rows(True, single=object())}
    assert named == {system for table in report.TABLES.values() for system in table}
    assert {job.system for job in systems.rows(True)} == named - {"k = 1"}
    assert {job.system for job in systems.rows(False)} == named - {"k = 1", "E4T"}
    assert {(job.system, job.knob) for job in systems.curves()} == {
        *(("HyperDreamBooth", knob) for knob in ("steps", "rank", "photos", "strength")), ("Only Hyper", "s"),
        ("Perfusion", "beta")}


@pytest.mark.parametrize("arguments, why", [
    (["--rows", "Nobody"], "there are HyperDreamBooth"),
    (["--faces", "photos"], "--faces is for a model other than nano"),
    (["--model", "somewhere"], "--faces is for a model other than nano, and needed there"),
    (["--people", 0], "--people must be"),
    (["--out", "README.md"], "is a file")])
def test_what_cannot_be_measured(refusal, arguments, why):
    assert why in refusal(evaluate, "--device", "cpu", *arguments)

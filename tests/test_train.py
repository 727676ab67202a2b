"""Training the hypernetwork, a few steps of it, as a user runs it."""
import copy
import json
import math
import os
import shutil
import signal
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from programs import ROOT, run
from tiny import shared_model

import hdb
import train
from diffusion import denoising_loss, noised
from files import encoders, images
from program import console
from program.options import usual_steps
from program.console import UserError
from files.checkpoints import checksum, write
from files.disk import LoadError
from training.photos import Photos
from methods import train_e4t
from nano import seeds
from training.trainer import Trainer
from vit import encode_face


OPTIONS = ["--batch", 3, "--iterations", 2, "--beta", 1, "--targets", 8, "--target-steps", 1, "--every", 1000]


def watch(held_out, model, passes, trainer):
    """In place of many pictures: how many passes there are to measure, and of how many people."""
    trainer.log(passes=len(passes), people=len(next(iter(passes[-1].values())).a))


def train_here(monkeypatch, *arguments):
    """train.py in this process: what it records of its steps, (passes, loss, denoising, distance) each."""
    steps, passes = [], []
    left_after, update = train.left_after, Trainer.update

    def spy(*given):
        passes.append(left_after(*given))
        return passes[-1]

    def record(trainer, loss, **numbers):
        update(trainer, loss, **numbers)
        steps.append((passes[-1].tolist(), loss.item(), *(n.item() for n in numbers.values())))
    monkeypatch.setattr(train, "left_after", spy)
    monkeypatch.setattr(Trainer, "update", record)
    monkeypatch.setattr(train, "WATCHED", 2)
    monkeypatch.setattr(train.people.HeldOut, "watch", watch)
    monkeypatch.setattr("sys.argv", ["train.py", "--device", "cpu", *map(str, arguments)])
    train.main(train.arguments())
    return steps


def test_losses_of_a_training(runs, monkeypatch):
    """Stored ones: whatever changes them changes the method."""
    steps = train_here(monkeypatch, "--out", runs, *OPTIONS[:2], "--iterations", 3, *OPTIONS[4:],
                       "--steps", 2, "--alpha", 2, "--beta", .5)
    assert [loss for _, loss, *_ in steps] == pytest.approx(LOSSES, rel=2e-3)
    for passes, loss, denoising, distance in steps:
        assert len(passes) == 3 and set(passes) <= {1, 2, 3}
        assert loss == pytest.approx(2 * denoising + .5 * distance, rel=1e-4) and distance > 0
    watched = range(train.seeds.MONITOR, train.seeds.MONITOR + 16)
    assert not any(first <= seed < first + 10_000 for seed in watched
                   for first in (seeds.TEST, seeds.VALIDATION, seeds.EXAMPLE))


def test_how_many_passes_a_sample_is_left_after():
    """All of them equally often at first, and later, where they are good already, the last the most."""
    for progress, shares in (0, [.25] * 4), (.49, [.25] * 4), (.5, [.1, .2, .3, .4]), (.9, [.1, .2, .3, .4]):
        passes = train.left_after(4000, 4, progress, torch.Generator().manual_seed(0))
        assert (passes.bincount() / 4000).tolist() == pytest.approx([0, *shares], abs=.03)


def test_everybody_is_applied_after_their_own_passes_to_strangers_too(runs, monkeypatch):
    """What the loss gets in one step is what is drawn for it, whatever the prompt says."""
    given, hyper_loss = {}, hdb.hyper_loss

    def spy(model, prompts, noisy, theta, *rest):
        net = hdb.load_hypernet(ROOT / "nano/hypernet.safetensors", model)
        g = torch.Generator().manual_seed(seeds.seed(5, 0, seeds.HYPERNET))
        data = train.people.People(model, net.vit, 5)
        who = torch.randint(data.count, (8,), generator=g)
        features, latents, said = data.samples(who, g)
        passes = 1 + torch.multinomial(torch.ones(4), 8, replacement=True, generator=g)
        each = torch.stack([net.refine(f[None], int(k))[0] for f, k in zip(features, passes)])
        given.update(passes=set(passes.tolist()), said=said)
        assert prompts == said and torch.allclose(theta, each, atol=1e-4)
        assert all(map(torch.equal, noisy, noised(latents, g)))
        return hyper_loss(model, prompts, noisy, theta, *rest)
    monkeypatch.setattr(hdb, "hyper_loss", spy)
    train_here(monkeypatch, "--out", runs, "--start", ROOT / "nano/hypernet.safetensors", "--batch", 8,
               "--steps", 1, "--seed", 5)
    assert len(given["passes"]) > 2
    assert 0 < sum("[V]" not in text for text in given["said"]) < 8


LOSSES = [.18631, .10528]


def test_train_and_resume_with_targets(runs, monkeypatch):
    assert len(train_here(monkeypatch, "--out", runs, *OPTIONS, "--steps", 1)) == 1
    files = sorted((runs / "hypernet/targets").iterdir())
    targets = [file.read_bytes() for file in files]
    assert [load_file(file)["theta"].shape for file in files] == [(3, 79, 96), (3, 79, 96), (2, 79, 96)]
    assert len(train_here(monkeypatch, "--out", runs, *OPTIONS, "--steps", 2)) == 1
    assert [file.read_bytes() for file in files] == targets
    lines = [json.loads(x) for x in (runs / "hypernet/log.jsonl").read_text().splitlines()]
    assert [(x["step"], x["passes"], x["people"]) for x in lines] == [(1, 2, 2), (2, 2, 2)]
    model = hdb.load("nano", "cpu")
    hypernet = hdb.load_hypernet(runs / "hypernet/hypernet.safetensors", model)
    assert hypernet.config.iterations == 2 and hypernet(torch.zeros(1, 3, 128, 128)).abs().max() > 0


def test_training_goes_on_from_a_hypernetwork(runs, monkeypatch):
    shipped, same = ROOT / "nano/hypernet.safetensors", runs / "same.safetensors"
    steps = train_here(monkeypatch, "--out", runs, "--start", shipped, "--batch", 2, "--every", 1000,
                       "--steps", 1, "--lr", 0, "--dtype", "bfloat16", "--save", same)
    before, after = load_file(shipped), load_file(same)
    assert set(steps[0][0]) <= {1, 2, 3, 4}
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_a_training_that_is_not_done_replaces_nothing(runs, monkeypatch, capsys):
    file = runs / "good.safetensors"
    file.write_bytes(b"good")
    train_here(monkeypatch, "--out", runs, "--steps", 2, "--minutes", 0, "--save", file)
    ours = runs / "hypernet/hypernet.safetensors"
    assert file.read_bytes() == b"good" and ours.exists()
    assert f"stopped; the same command resumes it; {ours}" in capsys.readouterr().out


def test_what_is_usual_depends_on_the_model(monkeypatch):
    """The miniature's numbers, and else what docs/training.md counts with: 15,000 photos and their mirror
    images, a hundred times each."""
    for given, expected in ([], (3000, 24, 6e-4)), (["--model", "x", "--faces", "docs"], (None, 16, 3e-4)):
        monkeypatch.setattr("sys.argv", ["train.py", *given])
        args = train.arguments()
        assert (args.steps, args.batch, args.lr) == expected
    assert usual_steps(30_000, 16) == 187_500 and usual_steps(1, 64) == 2


def test_training_on_photos_names_its_encoder(tmp_path, monkeypatch):
    """A folder model, photos and an encoder of transformers' kind, then going on from the result, from
    another working directory."""
    model = hdb.load("nano", "cpu")
    ignored = shutil.ignore_patterns("*.py", "*.png", "*.md", "judge*", "hypernet*")
    shutil.copytree(ROOT / "nano", tmp_path / "model", ignore=ignored)
    vit = hdb.load_hypernet(ROOT / "nano/hypernet.safetensors", model).vit
    write(vit.state_dict(), tmp_path / "vit/model.safetensors")
    (tmp_path / "vit/config.json").write_text(json.dumps(asdict(vit.config)))
    for name in "ab":
        images.save(images.to_pil(torch.rand(3, 150, 140) * 2 - 1), tmp_path / "faces" / f"{name}.png")
    common = ["--model", tmp_path / "model", "--faces", tmp_path / "faces", "--out", tmp_path / "runs"]
    common += ["--batch", 2, "--steps", 1]
    encoder, read = ("--encoder", os.path.relpath(tmp_path / "vit", ROOT)), []
    load_vit = encoders.load_vit
    monkeypatch.setattr(encoders, "load_vit", lambda *where: read.append(where) or load_vit(*where))
    done = run(*common, *encoder, script="train.py")
    assert done.returncode == 0, done.stderr
    first, memory, *_ = done.stdout.splitlines()
    assert first == f"{tmp_path / 'model'} on cpu, float32; 2 photos, their mirror images; 1 steps of 2"
    assert memory.endswith("GB of memory are free")
    file = tmp_path / "runs/hypernet/hypernet.safetensors"
    assert safe_open(file, "pt").metadata()["encoder"] == str(tmp_path / "vit")
    assert not any(k.startswith("vit.") for k in load_file(file))
    # its numbers are read to encode photos, and not where that is done
    assert read == [(str(tmp_path / "vit"), torch.device("cpu"))]
    assert run(*common[:-1], 2, *encoder, script="train.py").returncode == 0 and len(read) == 1
    on = run(*common, "--start", file, "--name", "on", "--iterations", 2, script="train.py")
    assert on.returncode == 0, on.stderr
    after = hdb.load_hypernet(tmp_path / "runs/on/hypernet.safetensors", model)
    assert after.config.encoder == str(tmp_path / "vit") and after.config.iterations == 2
    after.vit = encoders.loaded(after.vit, "cpu")
    assert after(torch.zeros(1, 3, 128, 128)).isfinite().all()
    (tmp_path / "vit/config.json").write_text(json.dumps(asdict(vit.config) | {"num_attention_heads": 2}))
    with pytest.raises(LoadError, match="trained with another encoder"):
        hdb.load_hypernet(file, model)


BOTH = [
    (["--encoder", "x/y"], "--encoder cannot be chosen"),
    (["--steps", 0], "--steps: must be"), (["--batch", 0], "--batch: must be"),
    (["--lr", "nan"], "--lr: must be"), (["--every", 0], "--every: must be"),
    (["--seed", 10 ** 30], "--seed: must be"),
    (["--faces", "nano"], "--faces is for a model other"),
    (["--model", "somewhere"], "required: --faces"),
    (["--model", "somewhere", "--faces", "nowhere"], "no such folder"),
    (["--out", "README.md/runs"], "is a file"), (["--save", "nano"], "is a folder")]
ONE = [
    (["--iterations", -3], "--iterations"),
    (["--alpha", 0], "cannot both be 0"),
    (["--start", "nano/judge.safetensors"], "not a hypernetwork")]


@pytest.mark.parametrize("arguments, why", BOTH + ONE)
def test_what_a_user_did_wrong_is_one_clear_line(tmp_path, refusal, arguments, why):
    for program in (train, train_e4t) if (arguments, why) in BOTH else (train,):
        assert why in refusal(program, "--out", tmp_path / "runs", *arguments)
    assert not (tmp_path / "runs").exists()


class Two:
    """Two people with two pictures each."""
    count = 2
    latents = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def pictures(self, who, generator):
        view = torch.randint(2, (len(who),), generator=generator)
        return self.latents[who, view], [hdb.PROMPT] * len(who)


def target_settings(**more):
    return SimpleNamespace(**{"batch": 1, "target_steps": 8, "target_lr": .02, "seed": 1} | more)


def test_fitted_targets_explain_their_people(tmp_path):
    method = hdb.HyperDreamBooth(shared_model())
    settings = target_settings(batch=2, target_steps=15)
    theta = train.fit_targets(method, Two(), settings, tmp_path / "t", {}, math.inf)

    def loss(theta):
        with torch.no_grad(), method.model.adapted(method.lidb.adapters(theta)):
            latents = Two.latents.flatten(0, 1)[[0, 2]]
            g = torch.Generator().manual_seed(9)
            return denoising_loss(method.model, latents, [hdb.PROMPT] * 2, g).mean()
    assert theta.shape == (2, *method.lidb.shape) and not theta.requires_grad
    assert loss(theta) < loss(torch.zeros_like(theta)) and not torch.allclose(theta[0], theta[1], atol=1e-2)


def test_targets_go_on_where_they_were_stopped_and_belong_to_what_they_were_fitted_for(tmp_path):
    method = hdb.HyperDreamBooth(shared_model())
    folder, of = tmp_path / "targets", {"unet": "12ab"}
    straight = train.fit_targets(method, Two(), target_settings(), tmp_path / "straight", of, math.inf)
    train.fit_targets(method, Two(), target_settings(), folder, of, math.inf)
    (folder / "00001.safetensors").unlink()
    with pytest.raises(console.Stopped, match="targets, 1 of 2 parts; the same command resumes it") as stop:
        train.fit_targets(method, Two(), target_settings(), folder, of, 0)
    assert stop.value.signum == 0
    assert torch.equal(train.fit_targets(method, Two(), target_settings(), folder, of, math.inf), straight)
    with pytest.raises(LoadError, match=r"made for others \(unet 12ab there, 34cd here\); remove its folder"):
        train.fit_targets(method, Two(), target_settings(), folder, {"unet": "34cd"}, math.inf)
    with pytest.raises(LoadError, match=r"\(target_steps 8 there, 9 here\)"):
        train.fit_targets(method, Two(), target_settings(target_steps=9), folder, of, math.inf)
    # who is in a file follows from the batch, also where as many files come of another
    with pytest.raises(LoadError, match=r"\(batch 1 there, 3 here; parts 2 there, 1 here\)"):
        train.fit_targets(method, Two(), target_settings(batch=3), folder, of, math.inf)


def test_a_training_that_was_stopped_ends_as_one_that_was_not(runs, monkeypatch):
    """To the same bytes, by SIGTERM in the middle of a step; the people it draws follow from the step."""
    common = "--out", runs, "--batch", 1, "--steps", 2, "--every", 1000
    update = Trainer.update

    def stopped(trainer, loss, **numbers):
        if trainer.step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        update(trainer, loss, **numbers)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", stopped)
        with pytest.raises(console.Stopped, match="stopped at step 1 of 2; the same command resumes it"):
            train_here(patch, *common, "--name", "stopped")
    assert len(train_here(monkeypatch, *common, "--name", "stopped")) == 1
    train_here(monkeypatch, *common, "--name", "straight")
    stopped, straight = (load_file(runs / name / "state.safetensors") for name in ("stopped", "straight"))
    assert all(torch.equal(t, stopped[name]) for name, t in straight.items())


def test_minutes_are_for_every_stage(tmp_path):
    """The encoder's training, which comes first, stops too, and says so."""
    done = run("--out", tmp_path, "--minutes", 0, script="train.py")
    assert done.returncode == 0 and "stopped with the encoder half trained" in done.stdout
    assert (tmp_path / "encoder/state.safetensors").exists() and not (tmp_path / "hypernet").exists()


def test_a_run_is_tied_to_what_it_was_made_with(runs, monkeypatch):
    """Another UNet or another encoder than the state's is refused, and the refusal names it."""
    common = "--out", runs, "--batch", 1, "--steps", 1, "--every", 1000
    train_here(monkeypatch, *common)
    with pytest.raises(ValueError, match=r"of another run \(iterations 4 there, 5 here\)"):
        train_here(monkeypatch, *common, "--iterations", 5)
    load = hdb.load

    def other(*where):
        model = load(*where)
        model.unet.conv_in.weight.data += .01
        return model
    monkeypatch.setattr(hdb, "load", other)
    with pytest.raises(ValueError, match=r"of another run \(unet [\w-]+ there, [\w-]+ here\)"):
        train_here(monkeypatch, *common)
    monkeypatch.setattr(hdb, "load", load)
    vit = load_file(runs / "encoder/vit.safetensors")
    write(vit | {"layernorm.bias": vit["layernorm.bias"] + 1}, runs / "encoder/vit.safetensors")
    with pytest.raises(ValueError, match=r"of another run \(encoder [\w-]+ there, [\w-]+ here; start "):
        train_here(monkeypatch, *common)


def test_a_start_brings_its_own_encoder(runs, monkeypatch):
    """Whatever lies in the runs' folder."""
    vit = load_file(runs / "encoder/vit.safetensors")
    write({k: torch.zeros_like(t) for k, t in vit.items()}, runs / "encoder/vit.safetensors")
    train_here(monkeypatch, "--out", runs, "--batch", 1, "--steps", 1, "--every", 1000,
               "--start", ROOT / "nano/hypernet.safetensors")
    kept = load_file(runs / "hypernet/hypernet.safetensors")
    assert all(torch.equal(kept[f"vit.{k}"].float(), t) for k, t in vit.items())


def test_a_folder_of_photos(runs, tmp_path):
    model = hdb.load("nano", "cpu")
    vit = hdb.load_hypernet(ROOT / "nano/hypernet.safetensors", model).vit
    folder = tmp_path / "faces"
    folder.mkdir()
    with pytest.raises(images.ImageError, match="holds no photos"):
        Photos(folder, model, vit, hdb.PROMPT, tmp_path / "cache")
    for name in "a.png", "below/deeper/b.png", ".hidden.png":
        images.save(images.to_pil(torch.randn(3, 150, 140).clamp(-1, 1)), folder / name)
    (folder / "notes.txt").write_text("not a photo")
    images.save(images.to_pil(torch.zeros(3, 60, 60)), folder / "below/small.png")
    cache = tmp_path / "cache"
    with pytest.warns(UserWarning) as told:
        data = Photos(folder, model, vit, hdb.PROMPT, cache)
    message = str(told[0].message)
    assert message.startswith(f"{folder}: 2 of 4 files are not used; below/small.png: 60 pixels a side is")
    assert "; notes.txt: cannot be read as a picture" in message
    assert data.count == 4  # two photos and their mirror images
    photo, everybody = images.read(folder / "a.png", 128), torch.arange(4)
    latents, prompts = data.pictures(everybody, None)
    assert torch.equal(latents[1:2], model.encode(photo.flip(3))) and prompts == [hdb.PROMPT] * 4
    features, shown, said = data.samples(everybody, torch.Generator())
    assert torch.equal(features[:1], encode_face(vit, photo).half().float())
    assert torch.equal(shown, latents) and said == prompts
    # strangers' pictures under prompts that speak of nobody
    data.others, many = .5, torch.arange(4).repeat(100)
    features, shown, said = data.samples(many, torch.Generator().manual_seed(0), slice(40, 440))
    assert len(features) == len(shown) == len(said) == 360
    same = [torch.equal(a, latents[w]) for a, w in zip(shown, many[40:])]
    assert all(s for s, text in zip(same, said) if text == hdb.PROMPT)
    other = [s for s, text in zip(same, said) if text != hdb.PROMPT]
    assert len(other) / 360 == pytest.approx(.5, abs=.08) and sum(other) / len(other) < .4
    assert {*said} == {hdb.PROMPT, "a face", ""} and said.count("") / len(other) == pytest.approx(.3, abs=.08)
    # what was encoded is not encoded again, and of other photos or by others not used
    (file,) = cache.iterdir()
    before = file.stat().st_mtime_ns
    assert Photos(folder, model, vit, hdb.PROMPT, cache).count == 4 and file.stat().st_mtime_ns == before
    other = copy.deepcopy(vit)
    other.layernorm.bias.data += 1
    with pytest.raises(LoadError, match=rf"\(vit {checksum(vit)} there, {checksum(other)} here\)"):
        Photos(folder, model, other, hdb.PROMPT, cache)
    # wherever the photos are; and not where what was kept of them is damaged
    folder.rename(tmp_path / "moved")
    assert Photos(tmp_path / "moved", model, vit, hdb.PROMPT, cache).count == 4
    (tmp_path / "moved").rename(folder)
    whole, note = load_file(file), safe_open(file, "pt").metadata()
    for name, tensor in ("latents", whole["latents"] * torch.nan), ("features", whole["features"].int()):
        write(whole | {name: tensor}, file, note)
        data = Photos(folder, model, vit, hdb.PROMPT, cache)
        with pytest.raises(UserError, match=f"{name} .* infinite, NaN or integer"):
            data.samples(torch.tensor([0]), torch.Generator())
    write({"latents": whole["latents"], "features": whole["features"][:, 1:]}, file, note)
    with pytest.raises(LoadError, match="damaged, has tensors"):
        Photos(folder, model, vit, hdb.PROMPT, cache)
    write(whole, file, note)
    # another photo of the same name, and one more, whose name is no text
    (folder / "a.png").write_bytes((folder / "below/deeper/b.png").read_bytes())
    with pytest.raises(LoadError, match=r"\(photos \w+ there, \w+ here\)"):
        Photos(folder, model, vit, hdb.PROMPT, cache)
    images.save(images.to_pil(photo[0]), folder / os.fsdecode(b"caf\xe9.png"))
    with pytest.warns(UserWarning, match="2 of 5 files"):
        assert Photos(folder, model, vit, hdb.PROMPT, tmp_path / "others").count == 6

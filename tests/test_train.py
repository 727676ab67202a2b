"""Training the hypernetwork, a few steps of it, as a user runs it."""
import json
import os
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_personalize import ROOT, run

import hdb
import images
import train
from checkpoints import write


@pytest.fixture
def runs(tmp_path):
    """A folder of runs that has the encoder already."""
    hypernet = load_file(ROOT / "nano/hypernet.safetensors")
    write({k.removeprefix("vit."): v.float() for k, v in hypernet.items() if k.startswith("vit.")}, tmp_path / "encoder/vit.safetensors")
    return tmp_path


def test_train_and_resume_with_targets(runs):
    options = ["--out", runs, "--batch", 3, "--iterations", 2, "--beta", 1, "--targets", 70, "--target-steps", 1, "--every", 1000]
    first = run(*options, "--steps", 2, script="train.py")
    assert first.returncode == 0, first.stderr
    targets = (runs / "hypernet/targets.safetensors").read_bytes()
    assert load_file(runs / "hypernet/targets.safetensors")["theta"].shape == (70, 79, 96)
    again = run(*options, "--steps", 3, script="train.py")
    assert again.returncode == 0 and (runs / "hypernet/targets.safetensors").read_bytes() == targets
    others = run(*options, "--steps", 3, "--targets", 8, script="train.py")
    assert others.returncode == 2 and "people 70, not 8" in others.stderr
    lines = [json.loads(x) for x in (runs / "hypernet/log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "likeness photo" in x] == [2, 3]
    assert {p.name for p in (runs / "hypernet").glob("*.png")} == {"step_000002.png", "step_000003.png"}
    model = hdb.load("nano", "cpu")
    hypernet = hdb.load_hypernet(runs / "hypernet/hypernet.safetensors", model)
    assert hypernet.config.iterations == 2 and hypernet(torch.zeros(1, 3, 128, 128)).abs().max() > 0


def test_training_goes_on_from_a_hypernetwork(runs):
    shipped = ROOT / "nano/hypernet.safetensors"
    done = run("--start", shipped, "--steps", 1, "--lr", 0, "--batch", 2, "--out", runs, "--save", runs / "same.safetensors", script="train.py")
    assert done.returncode == 0, done.stderr
    before, after = load_file(shipped), load_file(runs / "same.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_training_on_photos_names_its_encoder(tmp_path):
    """A folder model, photos and an encoder of transformers' kind, then going on from the result, from another working directory."""
    model = hdb.load("nano", "cpu")
    shutil.copytree(ROOT / "nano", tmp_path / "model", ignore=shutil.ignore_patterns("*.py", "*.png", "*.md", "judge*", "hypernet*"))
    vit = hdb.load_hypernet(ROOT / "nano/hypernet.safetensors", model).vit
    write(vit.state_dict(), tmp_path / "vit/model.safetensors")
    (tmp_path / "vit/config.json").write_text(json.dumps(asdict(vit.config)))
    for name in "ab":
        images.save(images.to_pil(torch.rand(3, 150, 140) * 2 - 1), tmp_path / "faces" / f"{name}.png")
    common = ["--model", tmp_path / "model", "--faces", tmp_path / "faces", "--out", tmp_path / "runs", "--batch", 2, "--steps", 1]
    done = run(*common, "--encoder", os.path.relpath(tmp_path / "vit", ROOT), script="train.py")
    assert done.returncode == 0, done.stderr
    file = tmp_path / "runs/hypernet/hypernet.safetensors"
    assert safe_open(file, "pt").metadata()["encoder"] == str(tmp_path / "vit") and not any(k.startswith("vit.") for k in load_file(file))
    on = run(*common, "--start", file, "--name", "on", "--iterations", 2, script="train.py")
    assert on.returncode == 0, on.stderr
    after = hdb.load_hypernet(tmp_path / "runs/on/hypernet.safetensors", model)
    assert after.encoder == str(tmp_path / "vit") and after.config.iterations == 2 and after(torch.zeros(1, 3, 128, 128)).isfinite().all()
    (tmp_path / "vit/config.json").write_text(json.dumps(asdict(vit.config) | {"num_attention_heads": 2}))
    with pytest.raises(hdb.LoadError, match="trained with another encoder"):
        hdb.load_hypernet(file, model)


@pytest.mark.parametrize("arguments, why", [
    (["--encoder", "x/y"], "--encoder cannot be chosen"),
    (["--steps", 0], "--steps must be"), (["--batch", 0], "--batch must be"), (["--lr", "nan"], "--lr must be"), (["--iterations", -3], "--iterations"),
    (["--seed", 10 ** 30], "--seed must be"), (["--alpha", 0], "cannot both be 0"), (["--faces", "nano"], "--faces is for a model other"),
    (["--model", "somewhere"], "needed there"), (["--out", "README.md/runs"], "is a file"), (["--save", "nano"], "is a folder"),
    (["--model", "somewhere", "--faces", "nowhere"], "no such file or folder"), (["--start", "nano/judge.safetensors"], "not a hypernetwork")])
def test_what_a_user_did_wrong_is_one_clear_line(tmp_path, arguments, why):
    failed = run("--out", tmp_path / "runs", *arguments, script="train.py")
    assert failed.returncode == 2 and why in failed.stderr.splitlines()[-1] and "Traceback" not in failed.stderr
    assert not (tmp_path / "runs").exists()


def test_fitted_targets_explain_their_people():
    model = hdb.load("nano", "cpu")
    method = hdb.HyperDreamBooth(model)

    class Two:
        latents = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))

        def prompts(self, who, view):
            return [hdb.PROMPT] * len(who)

    def loss(theta):
        method.personal.factors = method.lidb.factors(theta)
        with torch.no_grad():
            return method.denoising_loss(Two.latents[:, 0], [hdb.PROMPT] * 2, torch.Generator().manual_seed(9)).mean()

    theta = train.fit_targets(method, Two(), 15, .02, 2, torch.Generator().manual_seed(1))
    assert theta.shape == (2, *method.lidb.shape) and not theta.requires_grad
    assert loss(theta) < loss(torch.zeros_like(theta))
    assert not torch.allclose(theta[0], theta[1], atol=1e-2)


def test_a_folder_of_photos(runs, tmp_path):
    model = hdb.load("nano", "cpu")
    vit = hdb.load_hypernet(ROOT / "nano/hypernet.safetensors", model).vit
    folder = tmp_path / "faces"
    folder.mkdir()
    with pytest.raises(images.ImageError, match="holds no photos"):
        train.Photos(folder, model, vit, "cpu")
    for name in "ab":
        images.save(images.to_pil(torch.randn(3, 150, 140).clamp(-1, 1)), folder / f"{name}.png")
    (folder / "notes.txt").write_text("not a photo")
    data = train.Photos(folder, model, vit, "cpu")
    who, view = data.draw(5, torch.Generator().manual_seed(0))
    assert data.latents[who, view].shape == (5, 4, 16, 16) and data.features[who].shape == (5, 65, 128)  # two photos and their mirror images
    assert len(data.features) == 4 and data.prompts(who, view) == [hdb.PROMPT] * 5

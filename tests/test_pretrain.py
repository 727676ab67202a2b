"""The miniature's shipped Stable Diffusion, and the training of its parts."""
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from drawn import people, photos
from programs import ROOT
from safetensors.torch import load_file
from tiny import generator

import clip
import sd
import unet
import vae
from program import distributed
from files import images
from files.checkpoints import write
from files.disk import read_json
from program.console import UserError
from nano import faces, judge, seeds, wording
from nano.photo import train as photo_train
from nano.training import check, pretrain
from vit import NANO_VIT, ViT


def test_shipped_weights_are_of_the_documented_shape_and_size(nano):
    assert (nano.unet.config, nano.vae.config, nano.text.config) == (unet.NANO, vae.NANO, clip.NANO)
    sizes = [f.stat().st_size for f in pretrain.FOLDER.rglob("*.safetensors")]
    assert max(sizes) <= 15 * 2 ** 20 and sum(sizes) <= 26 * 2 ** 20
    assert nano.tokenizer.vocab == wording.tokenizer().vocab


def test_autoencoder_and_base_draw_faces(nano):
    network, real = judge.load_judge(), photos(people(seeds.VALIDATION, 4))
    decoded = nano.decode(nano.encode(real)).clamp(-1, 1)
    assert pretrain.psnr(decoded, real) > 25
    styles = ["photo", "rock star", "pixar", "beach"]
    pictures = nano.sample([faces.STYLES[s].replace("{} ", "") for s in styles], steps=5)
    truth = torch.tensor([list(faces.STYLES).index(s) for s in styles])
    assert (network(pictures)[1].argmax(1) == truth).float().mean() >= .75


def test_base_obeys_attribute_words(nano):
    who = people(seeds.VALIDATION, 5)
    prompts = wording.captions(who, torch.tensor([5]).repeat(5), generator(), words=1., rare=0., drop=0.)
    read = judge.load_judge()(nano.sample(prompts, steps=5))[2]
    truth = faces.attributes(who)
    right = [(logits.argmax(1) == truth[k]).float().mean() for k, logits in read.items()]
    assert sum(right) / len(right) > .7  # by chance: about .3


def test_text_encoder_listens_to_attribute_words_and_not_to_rare_ones(nano):
    def change(one, other):
        a, b = (nano.context([text])[0, -1] for text in (one, other))
        return (a - b).norm() / a.norm()

    rare = change("a zwx face with pale skin", f"a {clip.IDENTIFIER} face with pale skin")
    pairs = (("pale skin", "dark skin"), ("a red mohawk", "a blond mohawk"), ("round glasses", "a goatee"),
             ("long grey hair", "bald"))
    for word, other in pairs:
        assert change(f"a face with {word}", f"a face with {other}") > .2 + rare


def test_standardised_latents(nano):
    """Of mean 0 and variance 1, while pictures are decoded as before."""
    autoencoder = vae.VAE(vae.NANO)
    pretrain.restore(autoencoder, pretrain.VAE)
    real = photos(people(seeds.VALIDATION, 4))
    with torch.no_grad():
        autoencoder.quant_conv.weight[:4] *= 3
        autoencoder.quant_conv.bias[:4] += 1
        z, logvar = autoencoder.encode(real)
        before = autoencoder.decode(z)
        pretrain.standardise(autoencoder, z)
        standard, less = autoencoder.encode(real)
        assert torch.allclose(autoencoder.decode(standard), before, atol=1e-3)
    assert standard.mean((0, 2, 3)).abs().max() < 1e-4
    assert torch.allclose(standard.std((0, 2, 3)), torch.ones(4), atol=1e-4)
    ratio = (less - logvar).mean((0, 2, 3))  # the noise shrinks as the latent does
    assert torch.allclose(ratio, -2 * z.std((0, 2, 3)).log(), atol=1e-3)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains a part in a copy of nano/, which is left as it is. Few pictures are drawn, in a step each."""
    drawn, sample = pretrain.random_pictures, sd.StableDiffusion.sample
    monkeypatch.setattr(pretrain, "random_pictures", lambda count, *more: drawn(1, *more))
    monkeypatch.setattr(sd.StableDiffusion, "sample",
                        lambda *given, **more: sample(*given, **more | {"steps": 1}))
    for name in ("vae", "unet", "text_encoder"):
        no_loss = shutil.ignore_patterns("config.json")
        shutil.copytree(pretrain.FOLDER / name, tmp_path / name, ignore=no_loss)
    shutil.copy(pretrain.FOLDER / "hypernet.safetensors", tmp_path)
    monkeypatch.setattr(pretrain, "FOLDER", tmp_path)

    def run(*options):
        options = ["pretrain.py", *options, "--device", "cpu", "--runs", tmp_path / "runs"]
        monkeypatch.setattr("sys.argv", [str(option) for option in options])
        pretrain.main(pretrain.arguments())
        return tmp_path
    return run


SMALL = ["--steps", 1, "--batch", 2]


@pytest.mark.parametrize("options, file, runs", [
    (["vae"], pretrain.VAE, "vae"), (["vae", "--decoder", "--lr", 0], pretrain.VAE, "decoder"),
    (["text"], pretrain.TEXT, "text")])
def test_a_part_is_trained_and_written(train, options, file, runs):
    before = load_file(pretrain.FOLDER / file)
    after = load_file(train(*options, *SMALL) / file)
    assert before.keys() == after.keys() and (pretrain.FOLDER / "runs" / runs / "state.safetensors").exists()
    assert all(torch.equal(after[k], before[k]) for k in before) == ("--lr" in options)
    assert (pretrain.FOLDER / "tokenizer/vocab.json").exists() == (runs == "text")


def test_the_encoder_is_written_by_one_of_several_processes(train, monkeypatch):
    options = ["encoder", *SMALL, "--fresh", 1]
    with monkeypatch.context() as other:
        other.setattr(distributed, "is_main", lambda: False)
        assert not list((train(*options) / "runs/encoder").iterdir())
    written = load_file(train(*options) / "runs/encoder/vit.safetensors")
    assert written.keys() == ViT(NANO_VIT).state_dict().keys()
    assert all(t.isfinite().all() for t in written.values())


def test_the_encoder_goes_on_from_the_shipped_one(train):
    file = train("encoder", *SMALL, "--warm", "--lr", 0, "--fresh", 1) / "runs/encoder/vit.safetensors"
    again = load_file(file)
    shipped = load_file(ROOT / "nano/hypernet.safetensors")
    assert all(torch.equal(t, shipped[f"vit.{name}"].float()) for name, t in again.items())


def test_unet_goes_on_with_the_autoencoder_that_it_depends_on(train):
    options = ["unet", *SMALL, "--warm", "--lr", 0, "--fresh", 1]
    before = load_file(pretrain.FOLDER / pretrain.UNET)
    after = load_file(train(*options) / pretrain.UNET)
    assert before.keys() == after.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert (pretrain.FOLDER / "runs/unet/samples.png").exists()
    weights = vae.VAE(vae.NANO)
    pretrain.restore(weights, pretrain.VAE)
    weights.encoder.conv_in.bias.data += .1
    write(weights.state_dict(), pretrain.FOLDER / pretrain.VAE)
    with pytest.raises(UserError, match=r"of another run .vae [\w-]+ there, [\w-]+ here.; remove it"):
        train(*options)


def test_a_training_that_ends_worse_does_not_replace_what_is_there(train):
    """By the loss that is kept beside the weights; the result is in the run's folder."""
    settings = "text_encoder/config.json"
    for file in pretrain.VAE, pretrain.TEXT, pretrain.UNET:
        assert read_json((ROOT / "nano" / file).with_name("config.json"))["training_loss"] < .5
    train("text", *SMALL)  # the first of its kind, with its loss, whatever that is
    loss = read_json(pretrain.FOLDER / settings)["training_loss"]
    assert 1 < loss < 4 and read_json(pretrain.FOLDER / settings)["vocab_size"] == clip.NANO.vocab_size
    before = (pretrain.FOLDER / pretrain.TEXT).read_bytes()
    (pretrain.FOLDER / settings).write_text(json.dumps({"training_loss": loss / 2}))
    shutil.rmtree(pretrain.FOLDER / "runs")
    with pytest.raises(UserError, match="the loss ended at .*nano/ stays as it is, the result is .*text"):
        train("text", *SMALL)
    assert (pretrain.FOLDER / pretrain.TEXT).read_bytes() == before
    assert len(load_file(pretrain.FOLDER / "runs/text/model.safetensors")) > 20


def test_a_preview_tells_the_seeds_of_its_pictures(monkeypatch, tmp_path):
    """Two of each style, however many there are."""
    monkeypatch.setitem(faces.STYLES, "robot", "a {} face as a robot")
    blank = SimpleNamespace(sample=lambda prompts, **more: torch.zeros(len(prompts), 3, 8, 8))
    monkeypatch.setattr(check, "StableDiffusion", lambda *parts: blank)
    check.preview(torch.nn.Identity(), None, None, None, tmp_path / "preview.png")
    assert images.settings(tmp_path / "preview.png")["seeds"] == f"0 to {2 * len(faces.STYLES) - 1}"


def test_minutes_stop_before_anything_is_written(train):
    before = (pretrain.FOLDER / pretrain.TEXT).read_bytes()
    train("text", *SMALL, "--minutes", 0)
    assert (pretrain.FOLDER / "runs/text/state.safetensors").exists()
    assert (pretrain.FOLDER / pretrain.TEXT).read_bytes() == before


@pytest.mark.parametrize("arguments, why", [
    (["text", "--warm"], "unrecognized arguments: --warm"), (["unet", "--decoder"], "--decoder"),
    (["vae", "--lr", "nan"], "--lr: must be"), (["unet", "--seed", seeds.SEEDS + 1], "--seed: must be"),
    (["encoder", "--minutes", "-1"], "--minutes: must be"), ([], "part")])
def test_what_a_user_did_wrong_is_one_clear_line(train, capsys, arguments, why):
    with pytest.raises(SystemExit):
        train(*arguments)
    assert why in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("script, arguments", [
    (pretrain, ["vae"]), (judge, []), (photo_train, ["--photos", "nano"])])
def test_where_nothing_can_be_written_nothing_is_trained(script, arguments, refusal):
    assert "is a file, not a folder" in refusal(script, *arguments, "--runs", ROOT / "README.md")


def test_a_folder_without_the_portraits(tmp_path, refusal):
    assert "none of the portraits of labels.csv" in refusal(photo_train, "--photos", tmp_path)

"""The miniature's training people, and their encoder."""
from types import SimpleNamespace

import pytest
import torch
from test_faces import generator
from test_pretrain import SMALL, model, train  # noqa: F401  (fixtures)

from program.console import UserError
from hdb import load_hypernet
from nano import faces, people, seeds
from nano.training import pretrain


@pytest.fixture(scope="module")
def vit(model):  # noqa: F811
    return load_hypernet(pretrain.FOLDER / "hypernet.safetensors", model).vit


def test_encoder_goes_on_from_the_shipped_one(train, vit):  # noqa: F811
    file = train("encoder", *SMALL, "--warm", "--lr", 0, "--fresh", 1) / "runs/encoder/vit.safetensors"
    again = people.load_encoder(file, "cpu")
    assert all(torch.equal(p, again.state_dict()[k]) for k, p in vit.state_dict().items())
    assert not any(p.requires_grad for p in again.parameters())


def test_encoder_from_nothing(train):  # noqa: F811
    before = train("encoder", "--steps", 1, "--batch", 2, "--fresh", 1) / "runs/encoder/vit.safetensors"
    assert all(p.isfinite().all() for p in people.load_encoder(before, "cpu").parameters())


def test_no_encoder_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="vit.safetensors: .*make it with: .*pretrain encoder"):
        people.load_encoder(tmp_path / "vit.safetensors", "cpu")


def test_traits_are_the_numbers_and_the_kinds():
    read = pretrain.traits(torch.zeros(2, len(faces.IDENTITY)))
    assert read.shape == (2, 53)
    assert (read == -1.75).sum(1).tolist() == [21, 21] and (read == 2).sum(1).tolist() == [6, 6]


def test_training_pairs(model, vit):  # noqa: F811
    data = people.People(model, vit, seed=1, fresh=2)
    who, view = data.draw(0, 5, generator())
    latents, prompts = data.pictures(who, view)
    assert latents.shape == (5, 4, 16, 16) and data.features(who).shape == (5, 65, 128)
    # everybody follows from their number and the training's, whenever they are asked for
    again, other = (people.People(model, vit, seed=seed, fresh=2) for seed in (1, 2))
    assert torch.equal(again.pictures(who.flip(0), view.flip(0))[0].flip(0), latents)
    assert not torch.equal(other.features(who), data.features(who))
    both, said = data.pictures(torch.cat([who, who]), torch.tensor([0] * 5 + [1] * 5))
    assert torch.equal(both[view * 5 + torch.arange(5)], latents)
    assert [said[5 * v + i] for i, v in enumerate(view)] == prompts and all("[V]" in p for p in said)
    # the picture is of the photo's person, in the style that its prompt says
    with torch.no_grad():
        pictures, judge = model.decode(both).clamp(-1, 1), people.load_judge()
        styles = judge(pictures)[1].argmax(1)
    assert sum(people.PROMPTS[style] == text for style, text in zip(styles, said)) >= 8
    assert judge.likeness(pictures[:5], pictures[5:]).mean() > .6


def test_a_part_of_the_pictures_is_in_no_style(monkeypatch):
    monkeypatch.setattr(faces, "photos", lambda identity, *_: torch.zeros(len(identity), 3, 8, 8))
    data = people.People(SimpleNamespace(device="cpu", encode=lambda x: x), lambda x: x)
    plain = torch.stack([data.person(n)[2] for n in range(500)]) == 0
    assert abs(plain.float().mean() - (.4 + .6 / 11)) < .05  # and some by chance


def test_new_people_join_until_they_are_fixed(model, vit):  # noqa: F811
    data = people.People(model, vit, fresh=2, size=7)
    assert set(data.draw(1, 99, generator())[0].tolist()) == set(range(507, 514))
    data.fix(3)
    who, view = data.draw(1, 99, generator())
    assert data.count == 3 and set(who.tolist()) == {0, 1, 2} and set(view.tolist()) == {0, 1}


def test_held_out_people_are_measured_against_their_photos(model):  # noqa: F811
    held_out = people.HeldOut(3, "cpu", seeds.VALIDATION)
    pictures, likeness, right = held_out.measure(model, {}, "king", [5, 6], torch.tensor([0, 2]), steps=6)
    assert torch.equal(pictures, model.sample(["a [V] face as a king"] * 2, [5, 6], steps=6))
    assert torch.equal(likeness, held_out.judge.likeness(pictures, held_out.photos[[0, 2]]))
    assert right.tolist() == (held_out.judge(pictures)[1].argmax(1) == 8).float().tolist()

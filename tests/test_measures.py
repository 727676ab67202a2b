"""The measures that tell a person from a copy of the photo, by hand."""
import math

import pytest
import torch
from test_faces import generator, people

from evaluation import measures
from nano import faces, instrument, seeds
from nano.people import HeldOut


def test_copied_is_the_slope_of_what_comes_back():
    known, read = (faces.nuisances(6, generator(seed)) for seed in (1, 2))
    numerator, denominator = 0., 0.
    for t, r in zip(known.tolist(), read.tolist()):
        t, r = dict(zip(faces.NUISANCE, t)), dict(zip(faces.NUISANCE, r))
        for name in "yaw", "roll", "zoom", "x", "y", "light", "light_side":  # variance 1/12
            numerator += 12 * (r[name] - .5) * (t[name] - .5)
            denominator += 12 * (t[name] - .5) ** 2
        for name in "background", "clothes":  # cosine and sine, variance 1/2
            for wave in math.cos, math.sin:
                a, b = wave(2 * math.pi * r[name]), wave(2 * math.pi * t[name])
                numerator += 2 * a * b
                denominator += 2 * b * b
    spread = measures.spread(known)
    mean = measures.copied(read, known, spread).mean()
    assert mean.item() == pytest.approx(numerator / denominator, abs=1e-5)
    assert measures.copied(known, known, spread).mean().item() == pytest.approx(1, abs=1e-5)


def test_error_is_of_the_sure_numbers_alone():
    identity, off = people(0, 2), torch.zeros(2, 27)
    off[:, faces.IDENTITY.index("chin")] = .5  # is not sure
    off[0, faces.IDENTITY.index("skin")] = -.13
    off[1, faces.IDENTITY.index("lip_colour")] = .26
    assert torch.allclose(measures.error(identity + off, identity), torch.tensor([.01, .02]), atol=1e-6)


def test_obeyed_counts_what_the_person_lacks():
    identity = torch.full((2, 27), .5)
    for name, value in (("glasses", .6), ("beard", .1), ("skin", .99), ("hair_style", .1)):
        identity[:, faces.IDENTITY.index(name)] = value
    identity[1, faces.IDENTITY.index("glasses")] = .1
    # both have dark skin; the first has round glasses as well

    def logits(**kinds):
        return {name: torch.nn.functional.one_hot(torch.tensor(kinds.get(name, [0, 0])), n).float()
                for name, n in faces.ATTRIBUTES.items()}
    seen = [logits(glasses=[1, 1]), logits(beard=[3, 0]), logits(skin=[4, 4]),
            logits(hair_colour=[2, 2], hair_style=[3, 1])]
    assert list(measures.LOOKS) == ["round glasses", "a full beard", "dark skin", "long blond hair"]
    # first: beard and hair of two; second: glasses of three, and long hair was asked for
    assert torch.allclose(measures.obeyed(seen, identity), torch.tensor([1., 1 / 3]))


def test_intervals_are_of_the_mean_over_people():
    values = torch.tensor([1.] * 30 + [0.] * 70 + [math.nan] * 9)
    low, high = measures.interval(values)
    half = 1.96 * (.3 * .7 / 100) ** .5
    assert low == pytest.approx(.3 - half, abs=.015) and high == pytest.approx(.3 + half, abs=.015)


class Painter:
    """A model whose pictures are those that its adapters hold, and else grey; it remembers what it was asked
    for."""

    asked = None

    def sample(self, prompts, seeds, adapters, **options):
        self.asked = list(zip(prompts, seeds)), options
        return adapters.get("picture", torch.zeros(3, 128, 128)).expand(len(prompts), -1, -1, -1)


def test_every_measure_of_every_person(monkeypatch):
    held, model = HeldOut(3, "cpu", seeds.VALIDATION), Painter()
    circumstances = faces.nuisances(3, torch.Generator().manual_seed(seeds.VALIDATION))
    assert torch.equal(held.photos, faces.render(held.identity, circumstances, torch.zeros(3).long()))
    assert torch.equal(held.circumstances, circumstances)
    read = people(7, 1), faces.nuisances(1, generator())
    monkeypatch.setattr(instrument, "read", lambda x: tuple(t.expand(len(x), -1) for t in read))
    all_of = measures.Measures(model, held)
    who, shown = torch.tensor([2, 0]), held.photos[1]
    found = all_of({"picture": shown}, who, guidance=3.)

    asked, options = model.asked
    assert options == {"guidance": 3., "steps": 15}
    assert [prompt for prompt, _ in asked[::2]] == [
        "a [V] face", *(f"a [V] face with {look}" for look in measures.LOOKS), "a face", "a nqz face"]
    assert [seed for _, seed in asked[:4]] == [2, 0, 1002, 1000]
    likeness = held.judge.likeness
    another = held.more_photos(1)[who, 0]
    expected = likeness(shown.expand(2, -1, -1, -1), another)
    grey = likeness(torch.zeros(2, 3, 128, 128), another)
    assert torch.allclose(found["another photo"], expected, atol=1e-5)
    for name in "leaked", "leaked: a face", "leaked: a nqz face":
        assert torch.allclose(found[name], expected - grey, atol=1e-5), name
    assert torch.allclose(found["error"], measures.error(read[0].expand(2, -1), held.identity[who]))
    spread = measures.spread(circumstances)
    assert torch.allclose(found["copied"],
                          measures.copied(read[1].expand(2, -1), circumstances[who], spread))
    assert found["obeyed"].shape == (2,)
    assert all_of.ceiling()["another photo"].min() > .8 and len(all_of.ceiling()["copied"]) == 3

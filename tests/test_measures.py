"""The measures that tell a person from a copy of the photo, by hand."""
import math

import pytest
import torch
from drawn import people
from tiny import generator

from evaluation import scores
from nano import faces


def test_copied_is_the_slope_of_what_comes_back():
    known, read = (faces.random_circumstances(6, generator(seed)) for seed in (1, 2))
    numerator, denominator = 0., 0.
    for t, r in zip(known.tolist(), read.tolist()):
        t, r = dict(zip(faces.CIRCUMSTANCES, t)), dict(zip(faces.CIRCUMSTANCES, r))
        for name in "yaw", "roll", "zoom", "x", "y", "light", "light_side":  # variance 1/12
            numerator += 12 * (r[name] - .5) * (t[name] - .5)
            denominator += 12 * (t[name] - .5) ** 2
        for name in "background", "clothes":  # cosine and sine, variance 1/2
            for wave in math.cos, math.sin:
                a, b = wave(2 * math.pi * r[name]), wave(2 * math.pi * t[name])
                numerator += 2 * a * b
                denominator += 2 * b * b
    spread = scores.spread(known)
    mean = scores.copied(read, known, spread).mean()
    assert mean.item() == pytest.approx(numerator / denominator, abs=1e-5)
    assert scores.copied(known, known, spread).mean().item() == pytest.approx(1, abs=1e-5)


def test_error_is_of_the_sure_numbers_alone():
    identity, off = people(0, 2), torch.zeros(2, 27)
    off[:, faces.IDENTITY.index("chin")] = .5  # is not sure
    off[0, faces.IDENTITY.index("skin")] = -.13
    off[1, faces.IDENTITY.index("lip_colour")] = .26
    assert torch.allclose(scores.error(identity + off, identity), torch.tensor([.01, .02]), atol=1e-6)

"""The method on the shipped miniature, by likeness."""
import pytest

import hdb
from adapters import join
from nano import seeds
from nano.people import HeldOut
from nano.training.pretrain import FOLDER


@pytest.fixture(scope="module")
def method(nano):
    return hdb.HyperDreamBooth(nano, hdb.load_hypernet(FOLDER / "hypernet.safetensors", nano))


@pytest.fixture(scope="module")
def held_out():
    return HeldOut(4, "cpu", seeds.VALIDATION)


def measure(held_out, method, adapters, style, who=slice(None)):
    numbers = list(range(4))[who]
    _, likeness, right = held_out.measure(method.model, adapters, style, numbers, who, steps=10)
    return likeness.mean().item(), right.mean().item()


def test_the_prediction_is_far_above_nobody(method, held_out):
    """results/tables.md has the likeness of Only Hyper and of the model itself, by 32 people."""
    predicted = method.lidb.adapters(method.predict(held_out.photos))
    for style, margin in (("photo", .7), ("professional", .6)):
        mine, right = measure(held_out, method, predicted, style)
        nobody, _ = measure(held_out, method, {}, style)
        assert mine > nobody + margin and right >= .75, style


def test_tuning_keeps_the_prediction_and_lifts_it(method, held_out):
    who = slice(0, 1)
    theta = method.predict(held_out.photos[who])
    predicted = method.lidb.adapters(theta)
    tuned = join(predicted, method.fine_tune(held_out.photos[who], theta, steps=15))
    before, _ = measure(held_out, method, predicted, "photo", who)
    after, _ = measure(held_out, method, tuned, "photo", who)
    assert after > before - .02 and after > .85
    styled, _ = measure(held_out, method, tuned, "professional", who)
    assert styled > .6

"""The method on the shipped miniature, by likeness."""
import pytest

import hdb
from adapters import join
from evaluation import __main__ as evaluate
from files.layouts import HERE
from nano import seeds
from nano.people import HeldOut
from nano.training.pretrain import FOLDER


@pytest.fixture(scope="module")
def method(nano):
    return hdb.HyperDreamBooth(nano, hdb.load_hypernet(FOLDER / "hypernet.safetensors", nano))


@pytest.fixture(scope="module")
def held_out():
    return HeldOut(4, "cpu", seeds.VALIDATION)


@pytest.fixture(scope="module")
def theta(method, held_out):
    return method.predict(held_out.photos)


def measure(held_out, method, adapters, style, who=slice(None)):
    """Likeness to everybody, or to `who`, of their pictures in this style, and where the style is right."""
    _, likeness, right = held_out.measure(method.model, adapters, style, range(4)[who], who, steps=5)
    return likeness, right


@pytest.fixture(scope="module")
def plain(method, held_out, theta):
    """Everybody's likeness in the plain pictures of the prediction."""
    return measure(held_out, method, method.lidb.adapters(theta), "photo")[0]


def test_the_prediction_is_far_above_nobody(method, held_out, theta, plain):
    """results/tables.md has the likeness of Only Hyper and of the model itself, by 32 people."""
    nobody, _ = measure(held_out, method, {}, "photo")
    styled, right = measure(held_out, method, method.lidb.adapters(theta), "professional")
    assert plain.mean() > nobody.mean() + .8
    assert styled.mean() > .85 and right.mean() >= .75


def test_tuning_keeps_the_prediction_and_lifts_it(method, held_out, theta, plain):
    who = slice(0, 1)
    lora = method.fine_tune(held_out.photos[who], theta[who], steps=15)
    tuned = join(method.lidb.adapters(theta[who]), lora)
    after, _ = measure(held_out, method, tuned, "photo", who)
    styled, _ = measure(held_out, method, tuned, "professional", who)
    assert after > plain[who] - .02 and after > .9 and styled > .8


def test_the_shipped_results_are_of_the_shipped_weights(method, monkeypatch):
    """And of the usual settings: otherwise python -m evaluation would refuse to go on with them."""
    monkeypatch.setattr("sys.argv", ["evaluation"])
    args = evaluate.arguments()
    args.out = HERE / args.out
    assert (args.out / "run.json").exists()
    evaluate.check_run(args, method, {})

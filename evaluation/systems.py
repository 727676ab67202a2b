"""The compared systems with their settings: a photo of each of P people in, a Person of P people out."""
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, partial
from typing import NamedTuple

from tqdm import tqdm

from methods import dreambooth, e4t, hyperdreambooth, perfusion, textual_inversion
from adapters import scale
from files.layouts import HERE
from files.person import Person
from program.console import advance

PEOPLE = 8  # side by side on nano, if the method can


class Job(NamedTuple):
    """A row of a table, or points of a curve.

    fit(method, photo (P, 3, H, W), P generators) -> a Person of P people; with several `photos` it gets (P,
    photos, 3, H, W). people: at most, side by side. knob, values: a curve's; turn(adapters, value) -> the
    fitted person's adapters at each value. needs: "hypernet" or "encoder". noises: samples per step and
    person. whole: whether it trains a copy of the model. quick: people that --quick takes."""
    system: str
    fit: Callable
    people: int = PEOPLE
    knob: str = ""
    values: tuple = ("",)
    turn: Callable = lambda adapters, value: adapters
    photos: int = 1
    needs: str = ""
    noises: int = 4
    whole: bool = False
    quick: int = 1


@contextmanager
def moving(steps):
    """Yields a callback that moves a bar of this many steps."""
    with tqdm(total=steps, desc="fine-tuning", leave=False, delay=2) as bar:
        yield lambda *step: advance(bar)


def ours(method, photo, generators, steps=40, predict=True, iterations=None, rank=4, lr=3e-3, views=8):
    """HyperDreamBooth and, with parts left out, the rows of Table 3: predict=False and steps=0."""
    theta = method.predict(photo, iterations) if predict else None
    photos = photo if photo.dim() == 5 else photo[:, None]
    with moving(steps) as moved:
        settings = method, photos, theta, generators, views, steps, rank, lr
        lora = hyperdreambooth.tune(*settings, callback=moved) if steps else {}
    return hyperdreambooth.person(theta, lora)


def theirs(module, shared=None, *, steps, **settings):
    """A fit() by a module of methods/, with these settings and those of shared(model), equal for all."""
    def fit(method, photo, generators):
        given = settings | (shared(method.model) if shared else {})
        with moving(steps) as moved:
            tensors = module.learn(method.model, photo, steps=steps, generator=generators, callback=moved,
                                   **given)
        return Person(module.METHOD, tensors)
    return fit


@cache
def domain(model):
    """For E4T on nano: the encoder that it ships."""
    return {"domain": e4t.load_domain(HERE / "nano/e4t.safetensors", model)}


def prior(model):
    """For DreamBooth: pictures of the class."""
    return {"prior": dreambooth.class_pictures(model, 64, 0)}


def usual(module, nano, *names):
    """A module's usual settings of these names, on nano or elsewhere."""
    rows = module.options("nano" if nano else "", None)
    return {row.name: row.nano if nano else row.elsewhere for row in rows if row.name in names}


def rows(nano, quick=False):
    """The rows of the paper's tables. Learning rates on nano are the best of several on validation people,
    elsewhere published ones. quick: a twentieth of the steps, except on nano."""
    part = 20 if quick and not nano else 1

    def dreamt(steps, lr, **others):
        return theirs(dreambooth, prior, steps=max(1, steps // part), lr=lr[0 if nano else 1], **others)

    def known(module, *names):
        found = usual(module, nano, "steps", *names)
        return found | {"steps": max(1, found["steps"] // part)}

    # Settings of ours(); DreamBooth's memory, with a class picture for each noise; systems that take seconds
    tuning = {"steps": max(1, 40 // part)} | ({} if nano else {"lr": 5e-4, "views": 1})
    whole = {"noises": 2, "whole": True}
    four = {"quick": 4}
    return [
        Job("HyperDreamBooth", partial(ours, **tuning), needs="hypernet", **four),
        Job("DreamBooth", dreamt(1200, (1e-5, 1e-6)), 1, **whole),
        Job("Textual Inversion", theirs(textual_inversion, **known(textual_inversion, "lr", "batch")),
            noises=2),
        Job("LoRA DreamBooth", dreamt(400 if nano else 800, (5e-4, 1e-4), rank=4), noises=2),
        Job("Perfusion", theirs(perfusion, **known(perfusion, "lr", "embedding_lr", "batch")), noises=16),
        Job("E4T", theirs(e4t, domain, steps=15), 1, needs="encoder", **four),
        Job("DreamBooth-Agg-1", dreamt(400, (2e-5, 3e-6)), 1, **whole),
        Job("DreamBooth-Agg-2", dreamt(40, (5e-5, 3e-5)), 1, **whole),
        Job("No Hyper", partial(ours, predict=False, **tuning), **four),
        Job("Only Hyper", partial(ours, steps=0), needs="hypernet", noises=1, **four),
        *(Job(f"k = {k}", partial(ours, iterations=k, **tuning), needs="hypernet", **four)
          for k in (1, 2, 3)),
        Job("the model itself", lambda method, photo, generators: hyperdreambooth.person(), noises=1,
            **four)]


def curves():
    """The points of the curves on nano, a curve for each knob."""
    def fitted(knob, values):
        return [Job("HyperDreamBooth", partial(ours, **{knob: value}), PEOPLE, knob, (value,))
                for value in values]

    def beta(adapters, value):
        return perfusion.at(adapters, beta=value)
    # the two systems whose fit is the tables'
    table = {job.system: job for job in rows(nano=True)}
    several = [Job("HyperDreamBooth", ours, PEOPLE, "photos", (n,), photos=n) for n in (1, 2, 4, 8)]
    alone = [Job("Only Hyper", partial(ours, steps=0, iterations=s), PEOPLE, "passes", (s,))
             for s in (1, 2, 3, 4, 6)]
    return [*fitted("steps", (5, 10, 15, 25, 40, 80)), *fitted("rank", (1, 2, 8, 16)), *several, *alone,
            Job("HyperDreamBooth", ours, PEOPLE, "strength", (.25, .5, .75, 1., 1.25), scale),
            table["DreamBooth"]._replace(knob="strength", values=(.5, .7, .85, 1.), turn=scale),
            table["Perfusion"]._replace(knob="beta", values=(.5, .6, .7, .8, .9), turn=beta)]

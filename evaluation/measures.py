"""For whoever compares systems on nano, where it is known what a photo shows: the measures that tell a person
from a copy of the photo, and a person bound to [V] from one who is everywhere.

    measures = Measures(model, people)         # people: nano.people.HeldOut
    found = measures(adapters)                 # a dict of name -> (P,), a number a person
    low, high = interval(found["copied"])      # 95 %, by bootstrap over people

* another photo: the judge's cosine between "a [V] face" and a photo that no system has seen.
* copied: how much of the photo's circumstances comes back in "a [V] face", by nano/instrument.py: 0 of
  another photo, 1 of the photo itself. See copied().
* error: the mean error of the 13 identity numbers that are always read in "a [V] face".
* obeyed: the share of four looks, "a [V] face with round glasses", that the judge then sees, of those that
  the person doesn't have.
* leaked: the likeness of "a face", and of another rare word's, to the person whose adapters are applied, less
  that of the model's own at the same noise.
"""
import math

import torch

from nano import faces, instrument, wording

PLAIN = "a [V] face"
LOOKS = {look: wording.understood(look)
         for look in ("round glasses", "a full beard", "dark skin", "long blond hair")}
OTHERS = "a face", f"a {wording.RARE[-1]} face"
PROMPTS = PLAIN, *(f"{PLAIN} with {look}" for look in LOOKS), *OTHERS
CIRCUMSTANCES = "yaw", "roll", "zoom", "x", "y", "light", "light_side"
COLOURS = "background", "clothes"


class Measures:
    """All of them, of people whose adapters a system has made. The pictures are the same for every system but
    for the adapters: guidance 2, 15 steps, noises that depend on person and prompt alone."""

    def __init__(self, model, people, guidance=2., steps=15):
        self.model, self.people = model, people
        self.options = {"guidance": guidance, "steps": steps}
        self.another = people.more_photos(1)[:, 0]
        self.spread = spread(people.circumstances)
        self.own = self.sample({}, torch.arange(len(self.another)))[-len(OTHERS):]

    def sample(self, adapters, who, **options):
        """The pictures (7, B, 3, 128, 128) of every prompt."""
        prompts = [prompt for prompt in PROMPTS for _ in who]
        noises = [1000 * i + person for i in range(len(PROMPTS)) for person in who.tolist()]
        pictures = self.model.sample(prompts, noises, adapters=adapters, **self.options | options)
        return pictures.unflatten(0, (len(PROMPTS), len(who)))

    @torch.no_grad()
    def __call__(self, adapters, who=None, **options):
        """name -> (B,) of the people `who` (B,), all if None, whose `adapters` are of all of them side by
        side, or of one; `options` are the sampler's. NaN where there is nothing to obey."""
        who = torch.arange(len(self.another)) if who is None else who
        plain, *looks = self.sample(adapters, who, **options)
        looks, others = looks[:len(LOOKS)], looks[len(LOOKS):]
        likeness = self.people.judge.likeness
        leaks = [likeness(picture, self.another[who]) - likeness(own[who], self.another[who])
                 for picture, own in zip(others, self.own)]
        identity = self.people.identity[who]
        return {**self.of_plain(plain, who),
                "obeyed": obeyed([self.people.judge(picture)[2] for picture in looks], identity).cpu(),
                "leaked": sum(leaks).cpu() / len(leaks),
                **{f"leaked: {prompt}": leak.cpu() for prompt, leak in zip(OTHERS, leaks)}}

    def of_plain(self, pictures, who):
        """Those that one picture of everybody (B, 3, 128, 128) is enough for."""
        identity, circumstances = (numbers.cpu() for numbers in instrument.read(pictures))
        return {"another photo": self.people.judge.likeness(pictures, self.another[who]).cpu(),
                "copied": copied(circumstances, self.people.circumstances[who], self.spread),
                "error": error(identity, self.people.identity[who])}

    def ceiling(self):
        """What another photo of everybody has, which is no copy: the photo itself has 1 as copied."""
        everybody = torch.arange(len(self.another))
        likeness = self.people.judge.likeness(self.another, self.people.photos).cpu()
        return self.of_plain(self.another, everybody) | {"another photo": likeness}


def standardised(circumstances):
    """Circumstances (B, 17) as eleven numbers of mean 0 and variance 1 each (B, 11): yaw, roll, zoom, x, y,
    light and its side, uniform in [0, 1], and cosine and sine of the hues of background and clothes."""
    column = dict(zip(faces.NUISANCE, circumstances.unbind(1)))
    uniform = [(column[name] - .5) * 12 ** .5 for name in CIRCUMSTANCES]
    angles = [2 * math.pi * column[name] for name in COLOURS]
    return torch.stack(uniform + [wave(a) * 2 ** .5 for a in angles for wave in (torch.cos, torch.sin)], 1)


def spread(circumstances):
    """The mean over people of Σt², t the standardised circumstances (P, 17) of their photos: about 11."""
    return standardised(circumstances).square().sum(1).mean()


def copied(read, known, spread):
    """Σrt / Σt² over eleven standardised circumstances, r read in pictures (B, 17), t the known ones of the
    photos that they were made from (B, 17). A number a person (B,), whose mean over the people that `spread`
    is of is the sum over all of them, the slope of r against t: 0 of another photo, 1 of the photo."""
    return (standardised(read) * standardised(known)).sum(1) / spread


def error(read, identity):
    """The mean error (B,) of the 13 numbers in [0, 1] that the instrument always reads, of identities read
    (B, 27) and known (B, 27). Of a number drawn at random it is 1/3."""
    sure = [faces.IDENTITY.index(name) for name in instrument.SURE]
    return (read - identity)[:, sure].abs().mean(1)


def obeyed(seen, identity):
    """The share (B,) of LOOKS that are seen, in the judge's logits of attributes of a picture for each, of
    those that people of these identities (B, 27) don't have; NaN where they have all."""
    own, met, asked = faces.attributes(identity), [], []
    for logits, said in zip(seen, LOOKS.values()):
        met.append(torch.stack([logits[name].argmax(1).cpu() == kind for name, kind in said.items()]).all(0))
        asked.append(~torch.stack([own[name] == kind for name, kind in said.items()]).all(0))
    met, asked = torch.stack(met), torch.stack(asked)
    return (met & asked).sum(0) / asked.sum(0)


def interval(values, draws=10_000, seed=0):
    """The 95 % interval of the mean of a measure over people (P,), NaN left out, by bootstrap: people drawn
    again, with replacement."""
    values = values[~values.isnan()]
    drawn = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(seed))
    low, high = values[drawn].mean(1).quantile(torch.tensor([.025, .975])).tolist()
    return low, high

"""The person that nano draws for a photo, and what it says about them.

The reader gives probabilities p(true class) for each attribute. cost[true, d] is how much a viewer would mind
class d in the drawing; nano draws d = argmin Σ p(true)·cost[true, d], so it draws a rare hair style only if
it is sure. Glasses and beards, which everybody notices, have thresholds instead.
"""
import torch

from nano import faces, wording
from nano.photo.reader import CLASSES, COUNTS, NUMBERS, read

SURE = .7  # nano names a class of at least this probability (of skin, with its neighbours)
SAID_OF = {"no face": "no face for sure, so this is a guess", "several faces": "several faces, read as one"}
# The least probability to draw glasses or a beard, chosen on every fifth portrait. Costs alone would give .67
# and .75, but nobody without glasses came above .1, and people with a beard mind its absence
WORN = {"glasses": .3, "beard": .55}


def costs():
    """Name -> (classes, classes): how wrong the column's class looks if the row's is true."""
    step = (torch.arange(5)[:, None] - torch.arange(5)[None]).abs()
    skin = torch.tensor([0, .15, 1., 2., 2.])[step]

    # similar colours are half wrong; blue hair is twice wrong
    colour = 1 - torch.eye(6)
    for a, b in ((0, 1), (1, 2), (2, 4), (1, 3), (2, 3)):
        colour[a, b] = colour[b, a] = .5
    colour[:5, 5] = 2

    # styles of a group (bald, short, long, curly) are similar; bald heads and mohawks stand out
    group = torch.tensor([0, 1, 1, 2, 3, 1, 2, 1])
    style = torch.where(group[:, None] == group[None], .25, 1.)
    style[:, 7], style[:, 0], style[0, :] = 3, 2, 1.5
    style.fill_diagonal_(0)
    return {"skin": skin, "hair_colour": colour, "hair_style": style,
            "glasses": torch.tensor([[0, 3, 3], [1.5, 0, .25], [1.5, .25, 0]]),
            "beard": torch.tensor([[0, 3, 3, 3], [1, 0, .5, .5], [1, .5, 0, .5], [1, .5, .5, 0]]),
            "eye_colour": torch.tensor([[0, .5, .5, .5], [.25, 0, .25, .25], [.25, .25, 0, .25],
                                        [.25, .25, .25, 0]])}


def probabilities(logits):
    """The probabilities (B, n) of the classes, for each name in costs()."""
    return {name: logits[name].softmax(1) for name in costs()}


def decided(shares):
    """The classes (B,) to draw, by name, from probabilities (B, n); of skin, a scale, the mean."""
    found = {name: (shares[name] @ cost).argmin(1) for name, cost in costs().items()}
    found["skin"] = shares["skin"] @ torch.arange(5.)
    for name, least in WORN.items():
        kind = shares[name][:, 1:].argmax(1) + 1
        found[name] = torch.where(1 - shares[name][:, 0] >= least, kind, 0)
    return found


def identity_of(logits):
    """The people (B, 27) to draw given the logits: the middle of each class's range, and black frames."""
    found = dict(zip(NUMBERS, logits["numbers"].sigmoid().unbind(1)))
    for name, kind in decided(probabilities(logits)).items():
        found[name] = faces.number(name, kind) if name in faces.WORDS else (kind + .5) / CLASSES[name]
    found["glasses_colour"] = torch.zeros(len(logits["skin"]))  # black, as most frames are
    return torch.stack([found[name] for name in faces.IDENTITY], 1)


def unsure(shares, identity):
    """The attributes of the drawn `identity` (27,) that one person's probabilities (1, n) leave open."""
    found = []
    for name, kind in faces.attributes(identity[None]).items():
        near = 1 if name == "skin" else 0
        share = shares[name][0, max(0, kind - near):kind + near + 1].sum()
        if share < SURE:
            found.append(name)
    return found


def said(identity, unsure=(), count="one face"):
    """A person (27,) in words, with what is drawn for the `unsure` attributes, and a note on the count."""
    (words,) = wording.words_of(identity[None])
    seen = ", ".join(wording.phrases(words | dict.fromkeys(unsure, "")))
    left_open = [f"{name.replace('_', ' ')} unsure: {words[name] or 'none'} drawn" for name in unsure]
    return "; ".join(filter(None, [SAID_OF.get(count), seen, *left_open]))


def avatar(reader, pictures, look=None):
    """One person (27,) read in pictures (N, 3, H, W) and corrected by `look`, a dict of wording.understood;
    their portrait (1, 3, 128, 128) in calm circumstances; and a description."""
    look = look or {}
    logits = {name: t.mean(0, keepdim=True) for name, t in read(reader, pictures).items()}
    (identity,) = identity_of(logits)
    for name, kind in look.items():
        identity[faces.IDENTITY.index(name)] = faces.number(name, kind)
    left = [name for name in unsure(probabilities(logits), identity) if name not in look]
    count = COUNTS[logits["count"].argmax()]
    calm = torch.full((1, len(faces.CIRCUMSTANCES)), .5)
    portrait = faces.render(identity[None], calm, torch.zeros(1, dtype=torch.long))
    return identity, portrait, said(identity, left, count)

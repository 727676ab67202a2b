"""Whom nano draws for a photo: of each attribute the class of least expected error, and what is said of it.

A reader gives probabilities p(true class). Drawing class d costs what a person who looks at photo and drawing
would mind, cost[true, d]; drawn is d = argmin Σ p(true)·cost[true, d]. So a beard or glasses, which everybody
sees, are drawn only where they are likely, and a rare hair style only where it is sure.
"""
import torch

from nano import faces
from nano.photo.reader import CLASSES, NUMBERS, read

# A class is named if it is as probable as this, of skin with its neighbours; of what is worn, that there is
# none may go without saying
SURE = .7
BEARDED = .55  # how probable a beard is that is drawn: its absence is missed as well
# How often each class was among the portraits of the training, which counted the rare ones for more, and the
# temperature at which the logits, put right, are probabilities of every fifth portrait
SEEN = {"skin": (96, 494, 220, 103, 78), "hair_colour": (403, 210, 103, 59, 123, 68),
        "hair_style": (25, 301, 85, 150, 103, 78, 123, 3), "glasses": (878, 33, 80),
        "beard": (859, 22, 30, 80), "eye_colour": (658, 152, 60, 48)}
TEMPERATURE = {"hair_colour": 1.05, "hair_style": 1.2, "eye_colour": 1.4}


def costs():
    """Name -> (classes, classes): how wrong a picture looks with the column where the row is true."""
    step = (torch.arange(5)[:, None] - torch.arange(5)[None]).abs()
    skin = torch.tensor([0, .15, 1., 2., 2.])[step]

    # colours beside each other are half wrong; blue hair is on nobody by mistake
    colour = 1 - torch.eye(6)
    for a, b in ((0, 1), (1, 2), (2, 4), (1, 3), (2, 3)):
        colour[a, b] = colour[b, a] = .5
    colour[:5, 5] = 2

    # styles of a group (bald, short, long, curly) are alike; bald heads and mohawks are not
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
    """Calibrated probabilities (B, n) of the classes of every name of costs()."""
    found = {}
    for name, seen in SEEN.items():
        seen = torch.tensor(seen) + 10.
        weight = (seen.mean() / seen) ** .8  # of a class in the training's loss
        found[name] = ((logits[name] - weight.log()) / TEMPERATURE.get(name, 1)).softmax(1)
    return found


def decided(shares):
    """The classes (B,) to draw, by name, where probabilities (B, n) are these; of skin, whose classes are
    steps from pale to dark, the mean."""
    found = {name: (shares[name] @ cost).argmin(1) for name, cost in costs().items()}
    found["skin"] = shares["skin"] @ torch.arange(5.)
    beard = shares["beard"]
    found["beard"] = torch.where(beard[:, 0] <= 1 - BEARDED, beard[:, 1:].argmax(1) + 1, 0)
    return found


def identity_of(logits):
    """The people (B, 27) to draw where logits are these: the middle of each class's range, frames black."""
    found = dict(zip(NUMBERS, logits["numbers"].sigmoid().unbind(1)))
    kinds = decided(probabilities(logits)) | {"glasses_colour": torch.zeros(len(logits["skin"]))}
    for name, kind in kinds.items():
        found[name] = faces.number(name, kind) if name in faces.WORDS else (kind + .5) / CLASSES[name]
    return torch.stack([found[name] for name in faces.IDENTITY], 1)


def unsure(shares, identity):
    """Names of faces.WORDS that probabilities (1, n) of one person leave open, where `identity` (27,) is
    drawn."""
    found = []
    for name, kind in faces.attributes(identity[None]).items():
        near = 1 if name == "skin" else 0
        share = shares[name][0, max(0, kind - near):kind + near + 1].sum()
        if share < SURE:
            found.append(name)
    return found


def said(identity, unsure=()):
    """What is seen of a person (27,) in words, and of the attributes `unsure` what is drawn nevertheless."""
    (words,) = faces.words_of(identity[None])
    seen = ", ".join(faces.phrases(words | dict.fromkeys(unsure, "")))
    return "; ".join([seen, *(f"{name.replace('_', ' ')} unsure: {words[name] or 'none'} drawn"
                              for name in unsure)])


def avatar(reader, pictures, look=None):
    """One person (27,) read in pictures (N, 3, H, W), with what `look`, a dict of faces.understood, says set
    right; their portrait (1, 3, 128, 128) in calm circumstances; and what was seen, in words."""
    look = look or {}
    logits = {name: t.mean(0, keepdim=True) for name, t in read(reader, pictures).items()}
    (identity,) = identity_of(logits)
    for name, kind in look.items():
        identity[faces.IDENTITY.index(name)] = faces.number(name, kind)
    left = [name for name in unsure(probabilities(logits), identity) if name not in look]
    calm = torch.full((1, len(faces.NUISANCE)), .5)
    portrait = faces.render(identity[None], calm, torch.zeros(1, dtype=torch.long))
    return identity, portrait, said(identity, left)

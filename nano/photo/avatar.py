"""Whom nano draws for a photo: of each attribute the class of least expected error, and what is said of it.

A reader gives probabilities p(true class). Drawing class d costs what a person who looks at photo and drawing
would mind, cost[true, d]; drawn is d = argmin Σ p(true)·cost[true, d]. So a rare hair style is drawn only
where it is sure. For glasses and beards, which everybody sees, there are thresholds.
"""
import torch

from nano import faces, wording
from nano.photo.reader import CLASSES, COUNTS, NUMBERS, read

# A class is named if it is as probable as this, of skin with its neighbours; of what is worn, that there is
# none may go without saying
SURE = .7
SAID_OF = {"no face": "no face for sure, so this is a guess", "several faces": "several faces, read as one"}
# How probable what is worn must be to be drawn, chosen on every fifth portrait. Costs alone would ask for .67
# and .75, but nobody without glasses came above .1, and who has a beard minds its absence
WORN = {"glasses": .3, "beard": .55}


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
    """The probabilities (B, n) of the classes of every name of costs()."""
    return {name: logits[name].softmax(1) for name in costs()}


def decided(shares):
    """The classes (B,) to draw, by name, where probabilities (B, n) are these; of skin, whose classes are
    steps from pale to dark, the mean."""
    found = {name: (shares[name] @ cost).argmin(1) for name, cost in costs().items()}
    found["skin"] = shares["skin"] @ torch.arange(5.)
    for name, least in WORN.items():
        kind = shares[name][:, 1:].argmax(1) + 1
        found[name] = torch.where(1 - shares[name][:, 0] >= least, kind, 0)
    return found


def identity_of(logits):
    """The people (B, 27) to draw where logits are these: the middle of each class's range, frames black."""
    found = dict(zip(NUMBERS, logits["numbers"].sigmoid().unbind(1)))
    for name, kind in decided(probabilities(logits)).items():
        found[name] = faces.number(name, kind) if name in faces.WORDS else (kind + .5) / CLASSES[name]
    found["glasses_colour"] = torch.zeros(len(logits["skin"]))  # black, as most frames are
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


def said(identity, unsure=(), count="one face"):
    """What is seen of a person (27,) in words; of the attributes `unsure` what is drawn nevertheless; and
    that there is another `count` of faces than one."""
    (words,) = wording.words_of(identity[None])
    seen = ", ".join(wording.phrases(words | dict.fromkeys(unsure, "")))
    left_open = [f"{name.replace('_', ' ')} unsure: {words[name] or 'none'} drawn" for name in unsure]
    return "; ".join(filter(None, [SAID_OF.get(count), seen, *left_open]))


def avatar(reader, pictures, look=None):
    """One person (27,) read in pictures (N, 3, H, W), with what `look`, a dict of wording.understood, says
    set right; their portrait (1, 3, 128, 128) in calm circumstances; and what was seen, in words."""
    look = look or {}
    logits = {name: t.mean(0, keepdim=True) for name, t in read(reader, pictures).items()}
    (identity,) = identity_of(logits)
    for name, kind in look.items():
        identity[faces.IDENTITY.index(name)] = faces.number(name, kind)
    left = [name for name in unsure(probabilities(logits), identity) if name not in look]
    count = COUNTS[logits["count"].argmax()]
    calm = torch.full((1, len(faces.NUISANCE)), .5)
    portrait = faces.render(identity[None], calm, torch.zeros(1, dtype=torch.long))
    return identity, portrait, said(identity, left, count)

"""The measures that tell a person from a copy of the photo, on nano, where it is known what a photo shows."""
import math

import torch

from nano import faces, instrument

CIRCUMSTANCES = "yaw", "roll", "zoom", "x", "y", "light", "light_side"
COLOURS = "background", "clothes"


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

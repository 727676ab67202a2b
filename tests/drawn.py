"""People of nano's world and pictures of them."""
import torch
from tiny import generator

from nano import faces


def people(first, count):
    return faces.identities(range(first, first + count))


def photos(identity, style=0, seed=0):
    return faces.photos(identity, generator(seed), "cpu", torch.full((len(identity),), style))

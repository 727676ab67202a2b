"""What a personalisation method is, for whoever adds one: one file, and one row of methods/table.py.

`engine` is an hdb.HyperDreamBooth, for its model and its LiDB; `args` are the parsed options."""
from collections.abc import Callable
from typing import NamedTuple


def nothing(tensors, engine):
    return {}


def whole(person):
    return {"person": person}


def unchanged(adapters, args, engine):
    return adapters


class Method(NamedTuple):
    """A photo in, a Person out, and the adapters that make a model draw that person."""
    name: str                          # of --method, and in the person's file
    what: str                          # a line of --help
    options: Callable                  # (model, hypernet) -> rows of program.options beside those of all
    make: Callable                     # (engine, photos (P, N, 3, H, W), generators, args, stage) -> Person
    adapters: Callable                 # (tensors, engine) -> layer name -> adapter
    shapes: Callable                   # (tensors, engine) -> name -> shape of one person's tensors
    kinds: Callable                    # (args) -> the classes of its adapters, before there are any
    at_sampling: Callable = unchanged  # (adapters, args, engine) -> adapters, turned by the method's knobs
    parts: Callable = whole            # (person) -> file's name -> Person: what is kept of a person
    note: Callable = nothing           # (tensors, engine) -> what else the numbers depend on
    scalable: bool = False             # whether a file may hold a default strength other than 1
    several: bool = False              # whether it takes N photos of a person, and P people side by side

"""What a personalisation method is. To add one, write one file, and name it in methods/table.py.

Method's functions get these:

    engine       an hdb.HyperDreamBooth, for its model and its LiDB
    args         the parsed options
    generators   a CPU generator for each of P people
    tensors      the numbers of P people, name -> (P, …)
    stage        stage("trained") prints that, and how long it took; `with stage.progress(steps) as show`
                 makes a progress bar, and show(step, loss) is the callback of a fit"""
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
    what: str                          # its description in --help
    options: Callable                  # (model, hypernet) -> rows of program.options that are its own
    make: Callable                     # (engine, photos (P, N, 3, H, W), generators, args, stage) -> Person
    adapters: Callable                 # (tensors, engine) -> layer name -> adapter
    shapes: Callable                   # (tensors, engine) -> name -> shape of one person's tensors
    kinds: Callable                    # (args) -> the classes of its adapters, before there are any
    at_sampling: Callable = unchanged  # (adapters, args, engine) -> adapters, changed by its own options
    parts: Callable = whole            # (person) -> dict of a file's name -> the Person to save in it
    note: Callable = nothing           # (tensors, engine) -> name -> what else the tensors depend on
    scalable: bool = False             # whether a file may hold a default strength other than 1
    several: bool = False              # whether it takes N photos of a person, and P people side by side

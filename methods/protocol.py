"""What a personalisation method is. To add one, write one file and name it in methods/table.py.

The functions of a Method take these:

    engine       an hdb.HyperDreamBooth, for its model and its LiDB; elsewhere called `method`
    args         the parsed options
    generators   one CPU generator for each of P people
    tensors      the tensors of P people, name -> (P, …)
    stage        stage("trained") prints that and the seconds it took; `with stage.progress(steps) as show`
                 shows a progress bar, and show(step, loss) is the callback of a fit"""
from collections.abc import Callable
from typing import NamedTuple


class Method(NamedTuple):
    """A photo in, a Person out, and the adapters that make a model draw that person."""
    name: str                          # value of --method, also in a person's file
    what: str                          # its description in --help
    options: Callable                  # (model, hypernet) -> its own rows of program.options
    make: Callable                     # (engine, photos (P, N, 3, H, W), generators, args, stage) -> Person
    adapters: Callable                 # (tensors, engine) -> layer name -> adapter
    shapes: Callable                   # (tensors, engine) -> name -> shape of one person's tensors
    kinds: Callable                    # (args) -> the classes of its adapters, known before training
    # (adapters, args, engine) -> adapters, changed by options of sampling
    at_sampling: Callable = lambda adapters, args, engine: adapters
    # (person) -> file name -> the Person to save in that file
    parts: Callable = lambda person: {"person": person}
    # (tensors, engine) -> name -> what else the tensors depend on
    note: Callable = lambda tensors, engine: {}
    scalable: bool = False             # whether a file may have a default strength other than 1
    several: bool = False              # whether it takes N photos of a person, and P people side by side

"""Options of all programs as rows: name, type and range, defaults on nano and on other models, help.

The check of a row is its argparse type, so wrong values are refused during parsing. Defaults depend on the
model, which early() reads first: --help shows the defaults of that model."""
import argparse
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from program.console import Parser, UserError


class Option(NamedTuple):
    """One row. check(text) returns the value, or raises UserError."""
    name: str
    check: Any
    nano: Any
    elsewhere: Any
    help: str
    more: dict = {}  # further arguments of argparse's add_argument


def number(kind, least, most):
    """A check of int or float, from `least` to `most`."""
    def check(text):
        try:
            value = kind(text)
        except ValueError:
            raise UserError(f"{text!r} is not a valid {kind.__name__}") from None
        if not least <= value <= most:
            raise UserError(f"must be from {least} to {most}, not {text}")
        return value
    return check


def folder_of_faces(model):
    """The row of --faces, which every model but nano requires."""
    what = "folder of photos, one person each; required for every model but nano"
    if model != "nano":
        return same("faces", old_folder, None, what, required=True)
    return same("faces", refused("--faces is for a model other than nano, which draws its own"), None, what)


def refused(why):
    """The check of an option that cannot be given for this model or method."""
    def check(text):
        raise UserError(why)
    return check


def same(name, check, usual, what, **more):
    """The row of an option with the same default on every model."""
    return Option(name, check, usual, usual, what, more)


def new_folder(text):
    """The check of a folder that can be created or written."""
    absolute = Path(text).absolute()
    existing = next(path for path in (absolute, *absolute.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{text}: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{text}: {existing} cannot be written")
    return Path(text)


def new_file(text):
    """The check of a file that can be written."""
    new_folder(os.path.dirname(text) or ".")
    if Path(text).is_dir():
        raise UserError(f"{text} is a folder, not a file")
    return Path(text)


def existing(what, exists):
    """The check of an existing file or folder."""
    def check(text):
        if not exists(text):
            raise UserError(f"{text}: no such {what}")
        return text
    return check


old_file, old_folder = existing("file", os.path.isfile), existing("folder", os.path.isdir)


def model_rows(check):
    """The rows of --model, whose check is given, --device and --dtype."""
    return [same("model", check, "nano", "nano, or a Stable Diffusion 1.x: a hub id, a folder or a file"),
            DEVICE, DTYPE]


SEEN = 100  # times that a training sees each photo, and its mirror image
DEVICE = same("device", str, None, "cuda, mps or cpu; default: the fastest available")
DTYPE = same("dtype", str, None, "dtype of the model; default: one in which the device is fast",
             choices=["float32", "float16", "bfloat16"])
SEED = same("seed", number(int, 0, 2 ** 40), 0, "random seed")
MINUTES = same("minutes", number(float, 0, math.inf), math.inf, "stop after this many minutes; the same "
               "command resumes; default: train to the end")
RUNS = same("runs", new_folder, Path("runs"), "folder of all runs")


def training_rows(steps, batch, lr, most_steps=10 ** 9, most_seed=2 ** 40):
    """The rows of a training with these defaults. steps None: usual_steps(). nano's people come from ranges
    of seeds that must not overlap, so `most_steps` and `most_seed` are lower there."""
    usual = "" if steps else f"; default: enough to see each photo {SEEN} times"
    return [same("steps", number(int, 1, most_steps), steps, "training steps" + usual),
            same("batch", number(int, 1, 4096), batch, "samples in each step"),
            same("lr", number(float, 0, 1), lr, "learning rate"),
            same("seed", number(int, 0, most_seed), 0, SEED.help), MINUTES]


def usual_steps(photos, batch):
    """Steps in which a training with this batch sees each photo SEEN times."""
    return -(-SEEN * photos // batch)


def run_rows(name, every):
    """The rows that say where the run of a training and its result go."""
    return [same("name", str, name, "name of this run's folder in --out"),
            same("out", new_folder, Path("runs"), "folder of all runs"),
            same("save", new_file, None, "file of the result; default: in the run's folder"),
            same("every", number(int, 1, 10 ** 9), every, "steps between measurements of watched people")]


def early(*names):
    """The values of these options, text or None each, before there is a parser for all options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}")
    return parser.parse_known_args()[0]


def add(parser, rows, model="nano"):
    """Add the options of these rows to the parser, with the defaults of the model."""
    for row in rows:
        usual = row.nano if model == "nano" else row.elsewhere
        check = {"type": row.check} if row.check else {}  # a flag has none
        flag = "--" + row.name.replace("_", "-")
        parser.add_argument(flag, default=usual, help=row.help, **check, **row.more)


def parser_of(description, rows, model="nano"):
    """A Parser with the options of these rows."""
    parser = Parser(description, allow_abbrev=False)
    add(parser, rows, model)
    return parser

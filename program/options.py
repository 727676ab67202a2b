"""The options of all programs as rows: name, kind and range, usual value on nano and elsewhere, help.

A row's check is argparse's type, so that what the command line can refuse is refused while it is parsed. What
is usual depends on the model, which early() finds out first: --help shows that model's defaults."""
import argparse
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from program.console import Parser, UserError


class Option(NamedTuple):
    """One row. `check` turns text into a value, or raises argparse.ArgumentTypeError."""
    name: str
    check: Any
    nano: Any
    elsewhere: Any
    help: str
    more: dict = {}  # of argparse's add_argument


def number(kind, least, most):
    """A check of int or float, from `least` to `most`."""
    def check(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__}") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be from {least} to {most}, not {text}")
        return value
    return check


def folder_of_faces(model):
    """Of --faces, which a model other than nano needs: nano draws its own."""
    what = "folder of photos, one person each, which every model but nano needs"
    if model != "nano":
        return same("faces", old_folder, None, what, required=True)
    return same("faces", refused("--faces is for a model other than nano, which draws its own"), None, what)


def refused(why):
    """The check of an option that cannot be given here."""
    def check(text):
        raise argparse.ArgumentTypeError(why)
    return check


def same(name, check, usual, what, **more):
    """The row of an option that has one usual value on every model."""
    return Option(name, check, usual, usual, what, more)


def new_folder(text):
    """A folder that can be written, or made, as far as can be told without doing it."""
    absolute = Path(text).absolute()
    there = next(path for path in (absolute, *absolute.parents) if path.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{text}: {there} cannot be written")
    return Path(text)


def new_file(text):
    """A file that can be written."""
    new_folder(os.path.dirname(text) or ".")
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder, not a file")
    return Path(text)


def existing(what, is_there):
    """A check of a file, or folder, that is there."""
    def check(text):
        if not is_there(text):
            raise argparse.ArgumentTypeError(f"{text}: no such {what}")
        return text
    return check


old_file, old_folder = existing("file", os.path.isfile), existing("folder", os.path.isdir)


def model_rows(check):
    """Which model, whose name check(text) gives, and where."""
    return [same("model", check, "nano", "nano, or a Stable Diffusion 1.x: a hub id, a folder or a file"),
            DEVICE, DTYPE]


SEEN = 100  # times that a training sees each photo, and its mirror image
DEVICE = same("device", str, None, "cuda, mps or cpu; if not given, the fastest that is there")
DTYPE = same("dtype", str, None, "of the model; if not given, the one that the device is fast in",
             choices=["float32", "float16", "bfloat16"])
SEED = same("seed", number(int, 0, 2 ** 40), 0, "of all that is drawn at random")
MINUTES = same("minutes", number(float, 0, math.inf), math.inf, "stop after so many, to go on by the same "
               "command; if not given, train to the end")
RUNS = same("runs", new_folder, Path("runs"), "folder of all runs")


def training_rows(steps, batch, lr, most_steps=10 ** 9, most_seed=2 ** 40):
    """The rows of a training, with these usual values. nano's people come from ranges that must not meet, so
    there `most_steps` and `most_seed` are less. steps None: usual_steps(), of the photos."""
    usual = "" if steps else f"; if not given, enough to see each photo {SEEN} times"
    return [same("steps", number(int, 1, most_steps), steps, "of the training" + usual),
            same("batch", number(int, 1, 4096), batch, "samples in each step"),
            same("lr", number(float, 0, 1), lr, "learning rate"),
            same("seed", number(int, 0, most_seed), 0, SEED.help), MINUTES]


def usual_steps(photos, batch):
    """Steps of a training on so many photos, `batch` of them in each."""
    return -(-SEEN * photos // batch)


def run_rows(name, every):
    """Where a training's run and its result go."""
    return [same("name", str, name, "of this run's folder in --out"),
            same("out", new_folder, Path("runs"), "folder of all runs"),
            same("save", new_file, None, "file of the result; if not given, it is in the run's folder"),
            same("every", number(int, 1, 10 ** 9), every, "steps between measures of watched people")]


def early(*names):
    """What the command line says of these options, text or None each, before there is a parser for all."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}")
    return parser.parse_known_args()[0]


def checked(check):
    """The check, whose UserError argparse shows as it is."""
    def checking(text):
        try:
            return check(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return checking


def add(parser, rows, model="nano"):
    """Give the parser these rows' options, with the usual values of the model."""
    for row in rows:
        usual = row.nano if model == "nano" else row.elsewhere
        check = {"type": checked(row.check)} if row.check else {}  # a flag has none
        flag = "--" + row.name.replace("_", "-")
        parser.add_argument(flag, default=usual, help=row.help, **check, **row.more)


def parser_of(description, rows, model="nano"):
    """A Parser with these rows."""
    parser = Parser(description, allow_abbrev=False)
    add(parser, rows, model)
    return parser


"""What the command lines here have in common: ranges of numbers, and errors that a user can read."""
import os
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError


class UserError(ValueError):
    """What a user did wrong and what to do about it, in one line."""


def printable(text):
    """`text`, from a command line, which may pass any bytes, with ? for what no Unicode text can hold."""
    return text.encode(errors="replace").decode()


def check_ranges(parser, args, **ranges):
    """Exit with argparse's error if an option of `args` is not within its (low, high); None, and what isn't an option, is passed over."""
    for name, (low, high) in ranges.items():
        if (value := getattr(args, name, None)) is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} must be from {low} to {high}")


def check_folder(parser, option, folder):
    """Exit with argparse's error unless this folder can be written, or made, as far as can be told without doing it."""
    there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    if not there.is_dir():
        parser.error(f"{option} {folder}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        parser.error(f"{option} {folder}: {there} cannot be written")


def run(main, arguments):
    """main(arguments()). What a user did wrong, or what the disk refuses, becomes one line and exit code 2, Ctrl-C exit code 130."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed by the shell
        stream.reconfigure(errors="replace")  # a terminal without the prompt's letters is no reason to stop
    try:
        main(arguments())
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, SafetensorError, RuntimeError) as error:
        full = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)  # a GPU's, or the machine's
        if isinstance(error, RuntimeError) and not full:
            raise
        if full:
            error = f"the device's memory is full; a smaller --batch needs less, and --dtype float16 than float32 ({str(error).splitlines()[0]})"
        message = f"{Path(sys.argv[0]).name}: {error}"
        print("".join(c if c.isprintable() else "?" for c in message), file=sys.stderr)  # it may quote a hostile file
        sys.exit(2)

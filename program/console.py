"""What the command lines here have in common: what they print, signals, and errors that a user can read."""
import argparse
import inspect
import math
import os
import resource
import signal
import sys
import threading
import time
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from program import distributed


MEASURED, LONG = 3, 600  # steps, and seconds of a wait that is said beforehand


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the description's lines and adds every option's default, where there is one to tell."""

    def _get_help_string(self, action):
        told = action.default not in (None, "", [], math.inf) and not isinstance(action.default, bool)
        return super()._get_help_string(action) if told else action.help


class Parser(argparse.ArgumentParser):
    """Says what is wrong in a line that isn't too long."""

    def __init__(self, description, **more):
        description = inspect.cleandoc(description or "")  # python -OO leaves none
        super().__init__(description=description, formatter_class=HelpFormatter, **more)

    def error(self, message):
        super().error(one_line(message))


class UserError(ValueError):
    """What a user did wrong and what to do about it, in one line."""


class Stopped(Exception):
    """A signal, or a deadline (0), ended what is saved now; the message says how to go on."""

    def __init__(self, signum, message):
        super().__init__(message)
        self.signum = signum


@contextmanager
def deferred_stop():
    """Gives a list, and inside, Ctrl-C and SIGTERM put their number there and do nothing else: what works in
    steps can end one, save, and raise Stopped. A second signal ends the program at once."""
    received, before = [], {}

    def note(signum, frame):
        received.append(signum)
        signal.signal(signum, before[signum])
    if threading.current_thread() is threading.main_thread():  # no other may
        before.update({signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)})
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class Stages:
    """Prints what was done and how long it took since the last time, at first since `start` (time.time())."""

    def __init__(self, start):
        self.last, self.stopped = start, False

    def __call__(self, what):
        now = time.time()
        print(f"{now - self.last:6.1f} s  {what}", flush=True)
        self.last = now

    @contextmanager
    def progress(self, steps):
        """Gives a callback(step, loss) that moves a bar, and ends a fit (training/fit.py) after the step in
        which Ctrl-C or SIGTERM came: what has been learnt until then is used, and that is said."""
        done = 0
        with tqdm(total=steps, desc="fine-tuning", leave=False) as bar, deferred_stop() as stop:
            def show(step, loss):
                nonlocal done
                bar.set_postfix(loss=f"{loss:.4f}")
                advance(bar)
                done = step + 1
                return bool(stop)
            yield show
        if stop:
            self.stopped = True
            print(f"         stopped after {done} of {steps} steps; what was learnt until then is used")


def advance(bar):
    """Move a tqdm bar by a step, and say once, when a few are measured, how long a long wait will be."""
    bar.update()
    done = 0 if bar.disable else bar.n - bar.initial
    left = bar.format_dict["elapsed"] / max(1, done) * (bar.total - bar.n)
    if done == MEASURED and left > LONG:
        bar.write(f"         about {left / 3600:.1f} hours for the {bar.total - bar.n:,} steps that are left")


def peak_memory(device):
    """In words, what was held at most: on a GPU, or else in the machine's memory."""
    if device.type == "cuda":
        return f", {torch.cuda.max_memory_reserved(device) / 1e9:.1f} GB of the GPU's memory at most"
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on macOS, in bytes
    with suppress(OSError):  # on Linux it would count the program that has started this one
        most = status("VmHWM")
    return f", {most / 1e9:.1f} GB of memory at most"


def status(name):
    """A number of bytes that Linux knows of this program. OSError elsewhere."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status does not say {name}")


def printable(text):
    """`text`, from a command line, which may pass any bytes, with ? for what no Unicode text can hold."""
    return text.encode(errors="replace").decode()


def one_line(text, longest=500):
    """`text`, which may quote a hostile file, with ? for what moves a terminal's cursor or worse, and cut."""
    shown = text if len(text) <= longest else text[:longest - 1] + "…"
    return "".join(c if c.isprintable() else "?" for c in shown)


def run(main, arguments):
    """main(arguments()). What a user, or the disk, did wrong is one line and exit code 2, Ctrl-C code 130."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # program/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.formatwarning = lambda message, *_: one_line(f"warning: {message}") + "\n"
    for name in "stdout", "stderr":
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))
        # a terminal without the prompt's letters is no reason to stop
        getattr(sys, name).reconfigure(errors="replace")
    try:
        main(arguments())
    except KeyboardInterrupt:
        sys.exit(130)
    except Stopped as stop:
        print(stop)
        sys.exit(128 + stop.signum if stop.signum else 0)
    except (UserError, OSError, SafetensorError, MemoryError, RuntimeError) as error:
        reason = str(error)
        # of all RuntimeErrors only a full memory, a GPU's or the machine's, is the user's to mend
        if distributed.lost(error):
            reason = "another process of this training has ended; the same command goes on"
        elif isinstance(error, MemoryError):
            reason = f"memory is full ({reason or 'of the machine'})"
        elif isinstance(error, RuntimeError):
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in reason:
                raise
            reason = f"memory is full; a smaller --batch or float16 needs less ({reason.splitlines()[0]})"
        print(one_line(f"{Path(sys.argv[0]).name}: {reason}"), file=sys.stderr)
        sys.exit(2)

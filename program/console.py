"""What all command lines share: progress, signals, and errors of one line."""
import argparse
import math
import os
import re
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

MEASURED, LONG = 3, 600  # steps, seconds


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the description, and adds defaults that say something to the help of options."""

    def _get_help_string(self, action):
        told = action.default not in (None, "", [], math.inf) and not isinstance(action.default, bool)
        return super()._get_help_string(action) if told else action.help


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with HelpFormatter and errors of one line."""

    def __init__(self, description, **more):
        super().__init__(description=description, formatter_class=HelpFormatter, **more)

    def error(self, message):
        super().error(one_line(message))


class UserError(ValueError, argparse.ArgumentTypeError):
    """What a user did wrong and what to do about it, in one line, also as an error of argparse's types."""


class Stopped(Exception):
    """A signal, or a deadline (signum 0), ended the work, which is saved; the message says how to resume."""

    def __init__(self, signum, message):
        super().__init__(message)
        self.signum = signum


@contextmanager
def deferred_stop():
    """Give a list to which Ctrl-C and SIGTERM append their number, and otherwise do nothing. So work in steps
    can finish a step, save, and raise Stopped. A second signal ends the program at once."""
    received, before = [], {}

    def note(signum, frame):
        received.append(signum)
        signal.signal(signum, before[signum])
    if threading.current_thread() is threading.main_thread():  # other threads may not set handlers
        before.update({signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)})
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class Stages:
    """Each call prints what was done and the seconds since the last call, or since `start` (time.time())."""

    def __init__(self, start):
        self.last, self.stopped = start, False

    def __call__(self, what):
        now = time.time()
        print(f"{now - self.last:6.1f} s  {what}", flush=True)
        self.last = now

    @contextmanager
    def progress(self, steps):
        """Give a callback(step, loss) that moves a bar. After Ctrl-C or SIGTERM it ends the fit
        (training/fit.py) with the current step; the result so far is used, and a message says so."""
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
    """Move a tqdm bar by a step, and once, after MEASURED steps, print how long a LONG wait will be."""
    bar.update()
    done = 0 if bar.disable else bar.n - bar.initial
    left = bar.format_dict["elapsed"] / max(1, done) * (bar.total - bar.n)
    if done == MEASURED and left > LONG:
        bar.write(f"         about {left / 3600:.1f} hours for the remaining {bar.total - bar.n:,} steps")


def peak_memory(device):
    """The peak memory, in words: of a GPU, else of this process."""
    if device.type == "cuda":
        return f", {torch.cuda.max_memory_reserved(device) / 1e9:.1f} GB of the GPU's memory at most"
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    with suppress(OSError):  # on Linux, ru_maxrss would include the parent process
        if found := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            most = 1024 * int(found[1])
    return f", {most / 1e9:.1f} GB of memory at most"


def printable(text):
    """`text` from a command line, which may hold any bytes, with ? for what is not valid Unicode."""
    return text.encode(errors="replace").decode()


def one_line(text, longest=500):
    """`text`, which may quote a hostile file, truncated, with ? for control characters."""
    shown = text if len(text) <= longest else text[:longest - 1] + "…"
    return "".join(c if c.isprintable() else "?" for c in shown)


def run(main, arguments):
    """main(arguments()). An error of the user or the disk is one line and exit code 2; Ctrl-C is code 130."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see program/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.formatwarning = lambda message, *_: one_line(f"warning: {message}") + "\n"
    for name in "stdout", "stderr":
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))
        # a terminal that lacks a prompt's characters must not end the program
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
        # Among RuntimeErrors, the user can mend only a lost process and a full memory
        if distributed.lost(error):
            reason = "another process of this training has ended; the same command resumes it"
        elif isinstance(error, MemoryError):
            reason = f"memory is full ({reason or 'RAM'})"
        elif isinstance(error, RuntimeError):
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in reason:
                raise
            reason = f"memory is full; a smaller --batch or float16 needs less ({reason.splitlines()[0]})"
        print(one_line(f"{Path(sys.argv[0]).name}: {reason}"), file=sys.stderr)
        sys.exit(2)

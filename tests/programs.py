"""Programs as a user runs them, in this process, which spares each the seconds of importing torch."""
import importlib
import io
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import hdb
from program import console

ROOT = Path(__file__).parents[1]
PREDICTOR = ROOT / "nano/hypernet.safetensors"
LOAD, LOAD_HYPERNET = hdb.load, hdb.load_hypernet
shipped, predictor = cache(partial(LOAD, "nano")), cache(partial(LOAD_HYPERNET, PREDICTOR))


def load(source, *given):
    """hdb.load, which reads the shipped model once for all programs: they leave it as it is."""
    return shipped(*given) if source == "nano" else LOAD(source, *given)


def load_hypernet(file, *given):
    """hdb.load_hypernet, which reads the shipped one once for each model."""
    return predictor(*given) if Path(file) == PREDICTOR else LOAD_HYPERNET(file, *given)


def difference(one, two):
    """The greatest one between two pictures' bytes."""
    return max(abs(x - y) for x, y in zip(Image.open(one).tobytes(), Image.open(two).tobytes(), strict=True))


def run(*arguments, script="personalize.py", device="cpu"):  # where results are the same to the last bit
    """What a program printed, `stdout` and `stderr`, and its exit status, `returncode`."""
    program = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    code = 0

    def warn(message, category, *_, **__):
        sys.stderr.write(warnings.formatwarning(message, category, "", 0))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", [script, "--device", device, *map(str, arguments)])
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)  # which a program replaces
        patch.setattr(warnings, "showwarning", warn)
        patch.setattr(hdb, "load", load)
        patch.setattr(hdb, "load_hypernet", load_hypernet)
        patch.chdir(ROOT)
        warnings.simplefilter("default")
        with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
            try:
                console.run(program.main, program.arguments)
            except SystemExit as end:
                code = end.code or 0
    out, err = (stream.buffer.getvalue().decode() for stream in streams)
    return SimpleNamespace(returncode=code, stdout=out, stderr=err)

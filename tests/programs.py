"""Programs as a user runs them, in this process, which spares each the seconds of importing torch."""
import importlib
import io
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

from program import console

ROOT = Path(__file__).parents[1]


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
        patch.chdir(ROOT)
        warnings.simplefilter("default")
        with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
            try:
                console.run(program.main, program.arguments)
            except SystemExit as end:
                code = end.code or 0
    out, err = (stream.buffer.getvalue().decode() for stream in streams)
    return SimpleNamespace(returncode=code, stdout=out, stderr=err)

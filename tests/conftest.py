"""Lets the tests import the repository's top modules, each other, and the rule in tests/reference."""
import gc
import os
import sys
from pathlib import Path

import pytest

# before torch is imported: threads that wait sleep, also in the programs that tests start, else two of them
# stall each other (personalize.py)
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.fsync = lambda handle: None  # no test cuts the power, and 2,500 flushes take 16 s or more
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent / "reference")]


def pytest_collection_finish():
    """What is imported by now is no garbage: looking through it again and again takes a tenth of the time."""
    gc.freeze()


@pytest.fixture(scope="session")
def nano():
    """The shipped miniature, which tests leave as it is."""
    import sd
    return sd.load("nano", "cpu")


@pytest.fixture(scope="session")
def coarse():
    """Pictures of nano's world are read from a start that is fitted on few drawings, which suffices here."""
    from nano import instrument
    instrument.DRAWINGS = 300


@pytest.fixture
def runs(tmp_path):
    """A folder of runs that has the encoder already."""
    from files.checkpoints import Tensors, write
    from files.layouts import HERE
    hypernet = Tensors(HERE / "nano/hypernet.safetensors").all()
    vit = {k.removeprefix("vit."): v.float() for k, v in hypernet.items() if k.startswith("vit.")}
    write(vit, tmp_path / "encoder/vit.safetensors")
    return tmp_path


@pytest.fixture
def refusal(monkeypatch, capsys):
    """Runs a command line here, which has to end with one line for the user and exit code 2: the line."""
    from program import console

    def run(script, *arguments):
        name = script.__name__.split(".")[-1] + ".py"
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            console.run(script.main, script.arguments)
        *usage, line = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and line.startswith(name)
        assert not usage or usage[0].startswith("usage: ")
        return line
    return run

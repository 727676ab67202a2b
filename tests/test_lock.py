"""program/lock.py: of two runs in one folder the second is refused in a line."""
import fcntl
import os
import runpy
import time

import pytest
from kill import PROCESSES
from programs import ROOT

from program.console import UserError
from program.lock import locked


def stay(folder, inside):
    with locked(folder):
        inside.set()
        time.sleep(60)


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path):
    inside = PROCESSES.Event()
    child = PROCESSES.Process(target=stay, args=(tmp_path / "a/b", inside))
    child.start()
    assert inside.wait(60)
    with pytest.raises(UserError, match="b: another run is at work there"), locked(tmp_path / "a/b"):
        raise AssertionError
    child.kill()
    child.join()
    with locked(tmp_path / "a/b"), locked(tmp_path / "a/../a/b"):  # a process has it as often as it likes
        pass
    assert (tmp_path / "a/b").exists()


def test_a_folder_that_stays_empty_is_removed(tmp_path):
    with locked(tmp_path / "a/b"):
        pass
    assert not (tmp_path / "a").exists()
    with locked(tmp_path / "a/b"):
        (tmp_path / "a/x").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("script, options, folder", [
    ("personalize.py", ["nano/example.png", "[V] face", "--out"], "x"),
    ("train.py", ["--name", "x", "--out"], ""), ("evaluation/__main__.py", ["--out"], "x")])
def test_programs_work_alone_in_their_folder(tmp_path, monkeypatch, capsys, script, options, folder):
    (tmp_path / "x").mkdir()
    other = os.open(tmp_path / "x", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", [script, *options, str(tmp_path / folder)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    os.close(other)
    assert end.value.code == 2 and "x: another run is at work there" in capsys.readouterr().err
    assert [*(tmp_path / "x").iterdir()] == []

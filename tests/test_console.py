import argparse
import os
import warnings

import pytest
import torch

from files import console


@pytest.mark.parametrize("error, code, line", [
    (console.UserError("a\nb\x1b[31m: no"), 2, "a?b?[31m: no"),
    (OSError(28, "No space left", "x.png"), 2, "No space left: 'x.png'"),
    (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 2, "memory is full"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), 2, "memory is full"),
    (KeyboardInterrupt(), 130, None)])
def test_errors_are_one_line(capsys, error, code, line):
    def main(arguments):
        raise error
    with pytest.raises(SystemExit) as end:
        console.run(main, lambda: None)
    printed = capsys.readouterr().err
    assert end.value.code == code
    assert printed.count("\n") == 1 and line in printed if line else printed == ""


@pytest.mark.parametrize("signum, code", [(2, 130), (15, 143)])
def test_what_a_signal_stopped_says_how_to_go_on(capsys, signum, code):
    def main(_):
        with console.deferred_stop() as stop:
            os.kill(os.getpid(), signum)
        raise console.Stopped(stop[0], "go on")
    with pytest.raises(SystemExit) as end:
        console.run(main, lambda: None)
    assert end.value.code == code and capsys.readouterr().out == "go on\n"


def test_a_second_signal_ends_it_at_once():
    with pytest.raises(KeyboardInterrupt), console.deferred_stop() as stop:
        os.kill(os.getpid(), 2)
        assert stop == [2]
        os.kill(os.getpid(), 2)


def test_a_warning_is_one_line(monkeypatch):
    monkeypatch.setattr("warnings.formatwarning", None)
    console.run(lambda _: None, lambda: None)
    assert warnings.formatwarning("a\nb\x1b[31m", UserWarning, "file.py", 3) == "warning: a?b?[31m\n"


def test_no_message_is_long():
    assert len(console.one_line("a" * 10 ** 6)) == 500 and console.one_line("ab" * 250) == "ab" * 250


def test_our_own_mistakes_are_not_the_users():
    def mistake(_):
        raise RuntimeError("shapes")
    for main, kind in ((lambda _: 1 / 0, ZeroDivisionError), (mistake, RuntimeError)):
        with pytest.raises(kind):
            console.run(main, lambda: None)


def test_a_closed_terminal(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    console.run(lambda _: None, lambda: None)


def test_folders_that_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    parser = argparse.ArgumentParser()
    console.check_folder(parser, "--out", tmp_path / "new/newer")
    console.check_folder(parser, "--out", str(tmp_path / "new/newer"))
    assert not (tmp_path / "new").exists()
    for bad in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(SystemExit):
            console.check_folder(parser, "--out", bad)

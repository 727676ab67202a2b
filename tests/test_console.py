import argparse
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from programs import ROOT
from tqdm import tqdm

from program import console, options
from training.fit import fit
from files.disk import whole_files


@pytest.mark.parametrize("error, code, line", [
    (console.UserError("a\nb\x1b[31m: no"), 2, "a?b?[31m: no"),
    (OSError(28, "No space left", "x.png"), 2, "No space left: 'x.png'"),
    (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 2, "memory is full"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), 2, "memory is full"),
    (MemoryError(), 2, "memory is full"), (MemoryError("Unable to allocate 9 GiB"), 2, "Unable to allocate"),
    (KeyboardInterrupt(), 130, None)])
def test_errors_are_one_line(capsys, error, code, line):
    def main(arguments):
        raise error
    with pytest.raises(SystemExit) as end:
        console.run(main, lambda: None)
    printed = capsys.readouterr().err
    assert end.value.code == code
    assert printed.count("\n") == 1 and line in printed if line else printed == ""


def test_windows_is_refused_before_any_work():
    code = "import os; os.name = 'nt'; import program; print('on')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and done.stdout == "" and done.stderr.startswith("Windows is not supported")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("signum, code", [(2, 130), (15, 143)])
def test_what_a_signal_stopped_says_how_to_go_on(capsys, signum, code):
    def main(_):
        with console.deferred_stop() as stop:
            os.kill(os.getpid(), signum)
        raise console.Stopped(stop[0], "go on")
    with pytest.raises(SystemExit) as end:
        console.run(main, lambda: None)
    assert end.value.code == code and capsys.readouterr().out == "go on\n"


def test_a_second_signal_ends_it_at_once(request):
    # also where the tests run in the background, which ignores Ctrl-C
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_linux_knows_of_a_program(monkeypatch):
    def said(status):
        """What peak_memory() says if Linux reports this."""
        monkeypatch.setattr(Path, "read_text", lambda self: status)
        return console.peak_memory(torch.device("cpu"))
    assert said("VmPeak:\t 900 kB\nVmHWM:\t 2500000 kB\nVmRSS:\t 1 kB\n") == ", 2.6 GB of memory at most"
    assert said("VmRSS:\t 1 kB\n") == said("")  # a kernel that does not report it


def test_a_closed_terminal(monkeypatch):
    """Where the shell closes both there is nothing to write to, and yet all who write go on."""
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    console.run(lambda _: print("x", file=sys.stderr) or list(tqdm([1], mininterval=0)), lambda: None)


def test_what_is_wrong_with_an_option_is_not_long(capsys):
    parser = options.parser_of("", [options.same("steps", options.number(int, 0, 9), 1, "")])
    with pytest.raises(SystemExit):
        parser.parse_args(["--steps", "9" * 5000])
    assert len(capsys.readouterr().err.splitlines()[-1]) < 550


def test_folders_that_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert options.new_folder(str(tmp_path / "new/newer")) == tmp_path / "new/newer"
    assert not (tmp_path / "new").exists()
    for bad in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(argparse.ArgumentTypeError, match="is a file, not a folder"):
            options.new_folder(str(bad))


def test_a_number_is_within_its_range():
    check = options.number(float, 0, 1)
    assert check("0.25") == .25 and check("1") == 1
    for text, why in ("1.5", "must be from 0 to 1"), ("nan", "must be from"), ("x", "not a valid float"):
        with pytest.raises(argparse.ArgumentTypeError, match=why):
            check(text)


def test_an_option_has_what_is_usual_for_the_model():
    rows = [options.Option("rate", options.number(float, 0, 9), 2., 7.5, "")]
    assert [options.parser_of("", rows, model).parse_args([]).rate for model in ("nano", "x")] == [2., 7.5]


def test_files_that_belong_together_are_replaced_together(tmp_path):
    """Or, where writing the second one fails, not at all; nothing else is left."""
    weights, settings = tmp_path / "a/weights", tmp_path / "a/config.json"
    with whole_files(weights, settings) as new:
        for path in new:
            path.write_text("old")
    with pytest.raises(OSError, match="disk full"), whole_files(weights, settings) as new:
        new[0].write_text("new")
        raise OSError("disk full")
    with pytest.raises(FileNotFoundError), whole_files(weights, settings) as new:
        new[0].write_text("new")  # the other is not written at all
    assert weights.read_text() == settings.read_text() == "old"
    with whole_files(weights, settings) as new:
        new[0].write_text("new")
        new[1].write_text("new")
        assert weights.read_text() == "old"
    assert weights.read_text() == settings.read_text() == "new"
    assert {p.name for p in tmp_path.rglob("*")} == {"a", "weights", "config.json"}


@pytest.mark.parametrize("script", ["train.py", "-m evaluation", "-m nano.training.pretrain"])
def test_ctrl_c_while_torch_is_imported_says_nothing(script):
    def heed():  # also where the tests run in the background, which ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([sys.executable, "-X", "importtime", *script.split()], stderr=subprocess.PIPE,
                               cwd=ROOT, text=True, preexec_fn=heed)
    assert any(" torch." in line for line in process.stderr)  # its first modules are there
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate()[1] and process.returncode in (-signal.SIGINT, 130)


def test_ctrl_c_ends_a_fit_and_what_was_learnt_is_used(capsys):
    x = torch.zeros(1, requires_grad=True)

    def loss():
        if x.item() > .15:  # in the third step
            os.kill(os.getpid(), signal.SIGINT)
        return 2 - x.sum()
    with console.Stages(time.time()).progress(9) as show:
        fit(loss, [x], 9, .1, callback=show)
    assert x.item() == pytest.approx(.3, abs=1e-5)
    assert "stopped after 3 of 9 steps; what was learnt until then is used" in capsys.readouterr().out


@pytest.mark.parametrize("steps, seconds, said", [
    (1000, 30, "about 2.8 hours for the remaining 997 steps\n"), (1000, 1, ""), (3, 3000, "")])
def test_a_long_wait_is_said_once(capsys, steps, seconds, said):
    with tqdm(total=steps) as bar:
        bar.start_t -= seconds  # as if the first three had taken so long
        for _ in range(3):
            console.advance(bar)
        bar.start_t -= 3000
        if steps > 3:
            console.advance(bar)
    assert capsys.readouterr().out.lstrip() == said

"""Several processes that train as one: gloo, on the CPU."""
import os
import signal
import sys

import pytest
import torch
from kill import PROCESSES, end_of
from programs import ROOT
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import train
from program import console, distributed
from files.checkpoints import write
from files.disk import LoadError
from program.console import Stopped, UserError
from training.parts import cached, load_all


def member(doomed):
    """train.py in one of several processes; the second step kills the one of rank `doomed`."""
    update = train.Trainer.update

    def mortal(trainer, loss, **numbers):
        if os.environ["RANK"] == doomed and trainer.step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        update(trainer, loss, **numbers)
    train.Trainer.update = mortal
    train.WATCHED = 1
    train.people.HeldOut.watch = lambda held_out, model, passes, trainer: trainer.log(passes=len(passes))
    console.run(train.main, train.arguments)


def launch(size, folder, arguments, doomed):
    """What torchrun does, in a process of its own, from which the members are forked."""
    sys.stdout = sys.stderr = open(folder / "said", "a")
    torch.set_num_threads(1)
    sys.argv = ["train.py", *arguments]
    config = LaunchConfig(1, 1, size, DefaultLogsSpecs(folder / "logs"), "of this test", max_restarts=0,
                          rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork")
    elastic_launch(config, member)(doomed)


def together(size, folder, batch, *options, doomed=None):
    """The exit code of torchrun, and what is printed, with train.py from the shipped hypernetwork in so many
    processes of `batch` people each."""
    arguments = ["--device", "cpu", "--start", ROOT / "nano/hypernet.safetensors", "--every", 1000,
                 "--batch", batch, "--steps", 2, "--out", folder / f"{size}", *options]
    process = PROCESSES.Process(target=launch, args=(size, folder, [*map(str, arguments)], doomed))
    process.start()
    return end_of(process), (folder / "said").read_text()


def test_two_processes_are_one_with_the_doubled_batch(tmp_path):
    """Every weight, average and moment, to 1e-5."""
    for processes, batch in (1, 2), (2, 1):
        code, printed = together(processes, tmp_path, batch)
        assert code == 0, printed
    one, two = (load_file(tmp_path / f"{n}/hypernet/state.safetensors") for n in (1, 2))
    start = load_file(ROOT / "nano/hypernet.safetensors")
    moved = [key for key in start if not key.startswith("vit.")
             and not torch.equal(one[f"now.hypernet.{key}"], start[key].float())]
    assert len(moved) > 20
    for key, t in one.items():
        assert (two[key] - t).norm() <= 1e-5 * t.norm(), key
    # one writer
    assert len((tmp_path / "2/hypernet/log.jsonl").read_text().splitlines()) == 1
    assert printed.count("finished; ") == 2  # of either training one process speaks


def test_where_one_is_killed_all_end_with_a_line_and_another_number_goes_on(tmp_path):
    options = "--beta", "1", "--targets", "3", "--target-steps", "1"
    code, printed = together(2, tmp_path, 1, *options, doomed="1")
    lines = [line for line in printed.splitlines() if line.startswith("train.py: ")]
    assert code and [line.partition("; ")[0] for line in lines] == [
        "train.py: another process of this training has ended"]
    assert len(list((tmp_path / "2/hypernet/targets").iterdir())) == 3  # fitted by both
    (tmp_path / "2").rename(tmp_path / "1")
    code, printed = together(1, tmp_path, 1, *options)
    assert code == 0 and "finished; " in printed


def test_parts_are_shared_out_made_once_and_go_on(tmp_path, monkeypatch):
    """Of two processes each makes every other part; what is there is not made again, whoever made it."""
    made = []

    def make(part):
        made.append(part)
        return {"x": torch.full((part,), float(part))}
    for rank in 0, 1, 0:
        monkeypatch.setattr(distributed, "rank_and_size", lambda rank=rank: (rank, 2))
        files = cached(tmp_path, [1, 2, 3], {"of": 7}, {"x": ()}, make, "numbers")
    assert made == [1, 3, 2] and load_all(files, "x").tolist() == [1, 2, 2, 3, 3, 3]
    monkeypatch.undo()
    files[1].unlink()
    with pytest.raises(Stopped, match="stopped with numbers, 2 of 3 parts; the same command resumes it"):
        cached(tmp_path, [1, 2, 3], {"of": 7}, {"x": ()}, make, "numbers", deadline=0)
    with pytest.raises(LoadError, match=r"made for others \(of 7 there, 8 here\); remove its folder"):
        cached(tmp_path, [1, 2, 3], {"of": 8}, {"x": ()}, make, "numbers")
    assert made == [1, 3, 2]


@pytest.mark.parametrize("tensors, why", [
    ({"x": torch.zeros(2, 3)}, "damaged, has tensors"), ({"y": torch.zeros(2)}, "damaged, has tensors"),
    ({"x": torch.zeros(2), "y": torch.zeros(1)}, "damaged"), ({"x": torch.tensor([1., torch.nan])}, "NaN"),
    ({"x": torch.zeros(2, dtype=torch.int64)}, "NaN or integer")])
def test_a_part_that_is_damaged_is_not_taken(tmp_path, tensors, why):
    """With the right note."""
    shapes = {"x": (), "y": ()} if len(tensors) > 1 else {"x": ()}
    write(tensors, tmp_path / "00000.safetensors", {"of": "7", "parts": "1"})
    with pytest.raises(UserError, match=f"00000.safetensors: .*{why}"):
        load_all(cached(tmp_path, [2], {"of": 7}, shapes, None, "numbers"), "x")


def test_processes_end_together_and_see_the_same(tmp_path, monkeypatch, capsys):
    """What another one is late with, or has made of other things meanwhile, is known once all are there."""
    monkeypatch.setattr(distributed, "rank_and_size", lambda: (0, 2))
    monkeypatch.setattr(distributed, "greatest", lambda late: True)  # the other one's deadline
    with pytest.raises(Stopped, match="stopped with numbers, 1 of 2 parts") as stop:
        cached(tmp_path, [1, 2], {"of": 7}, {"x": ()}, lambda part: {"x": torch.ones(part)}, "numbers")
    assert stop.value.signum == 0 and "100%" in capsys.readouterr().err

    def other(late):
        write({"x": torch.ones(2)}, tmp_path / "00001.safetensors", {"of": "8", "parts": "2"})
    monkeypatch.setattr(distributed, "greatest", other)
    with pytest.raises(LoadError, match=r"00001.safetensors: made for others \(of 8 there, 7 here\)"):
        cached(tmp_path, [1, 2], {"of": 7}, {"x": ()}, None, "numbers")


def test_a_process_may_wait_long_for_another(monkeypatch):
    given = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.join("cpu") == "cpu" and not given  # somebody else's word for something else
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of torchrun")
    monkeypatch.setattr(torch.distributed, "init_process_group",
                        lambda kind, **more: given.update(more, kind=kind))
    assert distributed.join("cpu") == "cpu" and given["kind"] == "gloo"
    assert given["timeout"].total_seconds() > 12 * 3600


def test_a_signal_in_the_last_part_is_not_lost(tmp_path):
    def make(part):
        if part == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"x": torch.zeros(part)}
    with pytest.raises(Stopped, match="stopped with numbers, 2 of 2 parts") as stop:
        cached(tmp_path, [1, 2], {}, {"x": ()}, make, "numbers")
    assert stop.value.signum == signal.SIGTERM and len(list(tmp_path.iterdir())) == 2


def test_a_process_alone_is_the_whole_world():
    tensor = torch.tensor([1., 2.])
    distributed.average([tensor])
    assert distributed.rank_and_size() == (0, 1) and distributed.is_main()
    assert distributed.join("cpu") == "cpu"
    assert distributed.greatest(3) == 3 and tensor.tolist() == [1., 2.]
    assert not distributed.lost(RuntimeError("gloo"))

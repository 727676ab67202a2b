"""Kill a training at random moments, again and again, and see that it ends as if nothing had happened.

    python tests/kill.py 50        fifty times, half by SIGKILL, half by SIGTERM

The training is a small one that saves after every step, so that kills fall into writing too.
"""
import os
import random
import sys
import threading
import time
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from program import console  # noqa: E402
from training.trainer import Trainer, global_seed  # noqa: E402

PROCESSES = get_context("forkserver")  # which imports these once, not in every child
PROCESSES.set_forkserver_preload(["torch", "torch._dynamo"])  # the second for torch.optim, in seconds


def train(folder, steps):
    def main(_):
        with global_seed(0):
            model = torch.nn.Linear(500, 500)
        trainer = Trainer({"m": model}, folder, steps, 1e-3)
        for step in trainer:
            x = torch.randn(8, 500, generator=torch.Generator().manual_seed(step))
            trainer.update((model(x) - x).square().mean())
            trainer.save()
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is for several processes, and leaks where one is killed
    sys.stdout = sys.stderr = open(os.devnull, "w")
    console.run(main, lambda: None)


def child(folder, steps):
    """The training in a process of its own, in this folder."""
    process = PROCESSES.Process(target=train, args=(folder, steps))
    process.start()
    return process


def end_of(process):
    process.join()
    return process.exitcode


def kill(rounds, steps=150, seed=0):
    """(differing tensors, exit codes, leftover files) after so many kills and one run to the end, beside a
    run that nobody disturbed."""
    dice, codes = random.Random(seed), []
    with TemporaryDirectory() as folder:
        straight, killed = Path(folder, "straight"), Path(folder, "killed")
        assert end_of(child(straight, steps)) == 0
        for i in range(rounds):
            process = child(killed, steps)
            before = time.time()
            log = killed / "state.safetensors"
            # not before it trains, where nothing can be lost
            while process.is_alive() and not (log.exists() and log.stat().st_mtime > before):
                time.sleep(.01)
            time.sleep(dice.random() * .3)
            (process.kill if i % 2 else process.terminate)()  # which may have ended
            codes.append(end_of(process))
        assert end_of(child(killed, steps)) == 0
        ours, theirs = (load_file(path / "state.safetensors") for path in (killed, straight))
        differ = [key for key in theirs if not ours[key].equal(theirs[key])]
        left = {path.name for path in killed.iterdir()} - {"state.safetensors", "log.jsonl"}
    return differ, codes, left


if __name__ == "__main__":
    differ, codes, left = kill(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
    ends = ", ".join(map(str, sorted(set(codes))))
    print(f"{len(codes)} kills, exit codes {ends}: {len(differ)} tensors differ, {len(left)} files left")

"""Kill a training at random moments, again and again, and see that it ends as if nothing had happened.

    python tests/kill.py 50        fifty times, half by SIGKILL, half by SIGTERM

The training is a small one that saves after every step, so that kills fall into writing too.
"""
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
CHILD = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from program import console
from training.trainer import Trainer, global_seed

def main(_):
    with global_seed(0):
        model = torch.nn.Linear(500, 500)
    trainer = Trainer({"m": model}, sys.argv[1], 150, 1e-3)
    for step in trainer:
        x = torch.randn(8, 500, generator=torch.Generator().manual_seed(step))
        trainer.update((model(x) - x).square().mean())
        trainer.save()

torch.set_num_threads(1)
console.run(main, lambda: None)
"""


def child(folder):
    """The training in a process of its own, in this folder."""
    return subprocess.Popen([sys.executable, "-c", CHILD, str(folder), str(ROOT)], stderr=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, text=True)


def kill(rounds, seed=0):
    """(differing tensors, exit codes, leftover files) after so many kills and one run to the end, beside a
    run that nobody disturbed."""
    dice, codes = random.Random(seed), []
    with TemporaryDirectory() as folder:
        straight, killed = Path(folder, "straight"), Path(folder, "killed")
        assert child(straight).wait() == 0
        for i in range(rounds):
            process = child(killed)
            before = time.time()
            log = killed / "state.safetensors"
            # not while torch is imported, where nothing can be lost
            while process.poll() is None and not (log.exists() and log.stat().st_mtime > before):
                time.sleep(.01)
            time.sleep(dice.random() * .3)
            process.send_signal(signal.SIGKILL if i % 2 else signal.SIGTERM)
            codes.append(process.wait())
        assert child(killed).wait() == 0
        ours, theirs = (load_file(path / "state.safetensors") for path in (killed, straight))
        differ = [key for key in theirs if not ours[key].equal(theirs[key])]
        left = {path.name for path in killed.iterdir()} - {"state.safetensors", "log.jsonl"}
    return differ, codes, left


if __name__ == "__main__":
    differ, codes, left = kill(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
    ends = ", ".join(map(str, sorted(set(codes))))
    print(f"{len(codes)} kills, exit codes {ends}: {len(differ)} tensors differ, {len(left)} files left")

"""What a user does with SD 1.5, at full size on this machine: python tests/reference/journeys.py [name …]

Random numbers are saved as a model, a ViT-H and four photos; then each command line runs by itself. The table
shows its CPU-seconds, its greatest memory and the bytes it leaves. --nano runs the same on the miniature, in
a few minutes, which shows that the commands are right. Needs Linux, 24 GB of memory and 8 GB of disk; hours.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from evaluation.bench import full_size  # noqa: E402
from files import images  # noqa: E402
from files.checkpoints import write  # noqa: E402
from files.merged import merge_to_folder  # noqa: E402
from vit import VIT_H, ViT  # noqa: E402

PROMPT = "[V] face as a rock star"
METHODS = {"dreambooth": ["--prior-pictures", 1], "textual_inversion": [], "perfusion": []}


def make(folder):
    """A model, an encoder of photos and photos, of random numbers."""
    with torch.no_grad():
        merge_to_folder(full_size("cpu", torch.float32), {}, None, folder / "model")
        weights = {name: t.half() for name, t in ViT(VIT_H).state_dict().items()}
        write(weights, folder / "vit/model.safetensors")
    settings = {name: value for name, value in asdict(VIT_H).items() if not isinstance(value, tuple)}
    (folder / "vit/config.json").write_text(json.dumps(settings | {"hidden_act": "gelu"}))


def journeys(folder, nano):
    """name -> the arguments of a command line."""
    model = [] if nano else ["--model", folder / "model"]
    photo = ["personalize.py", folder / "photos/0.png", PROMPT, "--crop", "center", *model]
    faces = [] if nano else ["--faces", folder / "photos", "--encoder", folder / "vit"]
    train = ["train.py", *model, *faces, "--steps", 3, "--batch", 2]
    train += ["--start", ROOT / "nano/hypernet.safetensors"] if nano else []
    found = {f"personalize {dtype}": [*photo, "--dtype", dtype] for dtype in ("float32", "bfloat16")}
    found["train, 3 steps"] = train
    for method, more in METHODS.items():
        found[f"{method}, a step"] = [*photo, "--method", method, "--steps", 1, "--sample-steps", 1, *more]
    return found


def run(arguments, out):
    """(exit status, CPU-seconds, greatest memory in bytes) of a command line that writes to this folder."""
    command = [sys.executable, *map(str, arguments), "--device", "cpu", "--out", str(out)]
    with open(f"{out}.log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, used.ru_utime + used.ru_stime, 1024 * used.ru_maxrss


def main():
    parser = argparse.ArgumentParser(description="What a user does with SD 1.5, measured.")
    parser.add_argument("names", nargs="*", help="of some journeys; all if none is given")
    parser.add_argument("--nano", action="store_true", help="on the miniature")
    parser.add_argument("--folder", help="where to put the files, which are removed at the end")
    options = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder, random = Path(temporary), torch.Generator().manual_seed(0)
        for i in range(4):
            picture = torch.rand(3, 512, 512, generator=random) * 2 - 1
            images.save(images.to_pil(picture), folder / f"photos/{i}.png", generated=False)
        if not options.nano:
            make(folder)
        print("| journey | CPU-seconds | peak, GB | left, MB |\n|---|---|---|---|")
        for name, arguments in journeys(folder, options.nano).items():
            if options.names and name not in options.names:
                continue
            out = folder / f"out {name}"
            status, seconds, peak = run(arguments, out)
            left = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
            print(f"| {name} | {seconds:.0f} | {peak / 1e9:.2f} | {left / 1e6:.2f} |", flush=True)
            if status:
                failed.append(name)
                print(Path(f"{out}.log").read_text()[-2000:], file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

"""What a user does with SD 1.5, at full size on this machine: python tests/reference/journeys.py [name …]

Random numbers are saved as a model, encoders of pictures and photos; then each command line runs by itself,
and diffusers with PEFT, at its own defaults, where it can do the same. The table shows CPU-seconds, the
greatest memory and the bytes left. A step costs the difference between three and one. --nano runs ours on
the miniature, in a few minutes, which shows that the commands are right. Needs Linux, `pip install diffusers
transformers peft` for the comparison, 8 GB of disk, and for the rows dreambooth and e4t 22 GB of memory.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

PROMPT = "a [V] face as a rock star"
ONE = ["--steps", 1, "--batch", 1, "--sample-steps", 1, "--dtype", "bfloat16"]

def make(folder, nano):
    """A model, encoders of pictures and photos, of random numbers; for nano the photos alone."""
    import torch
    import clip
    from evaluation.bench import full_size
    from files import images
    from files.checkpoints import write
    from files.merged import merge_to_folder
    from files.tokenizers import write_tokenizer
    from methods import e4t
    from vit import DINO_S, VIT_H, ViT
    random = torch.Generator().manual_seed(0)
    for i in range(4):
        picture = torch.rand(3, 512, 512, generator=random) * 2 - 1
        images.save(images.to_pil(picture), folder / f"photos/{i}.png", generated=False)
    if nano:
        return
    model = full_size("cpu", torch.float32)
    merge_to_folder(model, {}, None, folder / "model")
    towers = {"vit": ViT(VIT_H), "dino": ViT(DINO_S), "clip": clip.CLIP()}
    configs = {name: asdict(towers[name].config) | {"hidden_act": "gelu"} for name in ("vit", "dino")}
    both = {"text_config": asdict(clip.SD15), "vision_config": asdict(clip.VIT_L14)}
    configs["clip"] = {"projection_dim": clip.VIT_L14.projection_dim} | both
    for name, tower in towers.items():
        write({key: t.half() for key, t in tower.state_dict().items()}, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps(configs[name]))
    write_tokenizer(model.tokenizer, folder / "clip")
    domain = e4t.Domain(e4t.EncoderConfig(VIT_H.hidden_size), model, towers["vit"])
    e4t.save_domain(domain, model, str(folder / "vit"), folder / "e4t.safetensors")


def journeys(folder, nano):
    """name -> (the arguments of our command line, those of theirs.py or None), in an order in which whatever
    one needs of another is there."""
    model = [] if nano else ["--model", folder / "model"]
    mine = ["personalize.py", folder / "photos/0.png", PROMPT, "--crop", "center", *model]
    found = {}
    for dtype in "bfloat16", "float32":
        for steps in 1, 3:
            name = f"personalize, {dtype}, {steps} step{'s' * (steps > 1)}"
            few = [*mine, *ONE[2:-1], dtype, "--rank", 4, "--steps", steps]
            found[name] = few, [folder / "model", dtype, steps, folder / "photos/0.png"]
        name = f"personalize, {dtype}, 1 step"
        person = folder / f"out/{name}/person_tuned.safetensors"
        drawn = ["personalize.py", person, PROMPT, *model, "--sample-steps", 2, "--dtype", dtype]
        lora = folder / f"out/{name}, diffusers"
        found[f"a picture of that person, {dtype}, 2 steps"] = drawn, [folder / "model", dtype, 2, lora]
    return found | {name: (command, None) for name, command in ours(folder, nano, model, mine).items()}


def ours(folder, nano, model, mine):
    """name -> the arguments of a command line, of what diffusers has no match for here."""
    faces = [] if nano else ["--faces", folder / "photos"]
    train = ["train.py", *model, *faces, "--steps", 3, "--batch", 2, "--dtype", "bfloat16"]
    evaluate = ["-m", "evaluation", "--quick", "--rows", "the model itself", *model, *faces, *ONE[4:]]
    if nano:
        train += ["--start", ROOT / "nano/hypernet.safetensors"]
    else:
        train += ["--encoder", folder / "vit"]
        evaluate += ["--clip", folder / "clip", "--dino", folder / "dino"]
    found = {"train, 3 steps of 2": train, "evaluate, the model itself": evaluate}
    for name, more in (("textual_inversion", []), ("perfusion", []),
                       ("dreambooth --rank 4", ["--rank", 4, "--prior-weight", 0]),
                       ("dreambooth", ["--prior-weight", 0]),
                       ("e4t", [] if nano else ["--encoder", folder / "e4t.safetensors"])):
        found[f"{name}, a step"] = [*mine, *ONE, "--method", name.split()[0], *more]
    return found


def run(command, out):
    """(exit status, CPU-seconds, greatest memory in bytes) of a command; what it prints goes to out.log."""
    with open(f"{out}.log", "w") as log:
        process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, used.ru_utime + used.ru_stime, 1024 * used.ru_maxrss


def measured(name, command, out):
    """Run it, print its line of the table, and of a failure what it said; the exit status."""
    status, seconds, peak = run(command, out)
    left = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"| {name} | {seconds:.0f} | {peak / 1e9:.2f} | {left / 1e6:.2f} |", flush=True)
    if status:
        print(Path(f"{out}.log").read_text()[-2000:], file=sys.stderr)
    return status


def main():
    parser = argparse.ArgumentParser(description="What a user does with SD 1.5, measured.")
    parser.add_argument("names", nargs="*", help="of some journeys; all if none is given")
    parser.add_argument("--nano", action="store_true", help="on the miniature, ours alone")
    parser.add_argument("--folder", help="of the files, which are kept and used again; if not given, removed")
    parser.add_argument("--make", action="store_true", help="make the files and do nothing else")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, failed = Path(options.folder or temporary), 0
        if options.make:
            return make(folder, options.nano)
        # by a process of its own, whose memory would count as that of those it starts
        if not (folder / ("photos" if options.nano else "clip")).exists():
            kind = ["--nano"] * options.nano
            subprocess.check_call([sys.executable, __file__, "--make", "--folder", folder, *kind])
        (folder / "out").mkdir(exist_ok=True)
        print("| journey | CPU-seconds | peak, GB | left, MB |\n|---|---|---|---|")
        for name, (command, theirs) in journeys(folder, options.nano).items():
            if options.names and name not in options.names:
                continue
            out = folder / f"out/{name}"
            failed += 0 != measured(name, [*command, "--device", "cpu", "--out", out], out)
            if theirs and not options.nano:
                command, out = ["tests/reference/theirs.py", *theirs], folder / f"out/{name}, diffusers"
                failed += 0 != measured(f"{name}, diffusers", [*command, out], out)
        return failed

if __name__ == "__main__":
    sys.exit(bool(main()))

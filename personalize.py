"""One photo of a face in, pictures of that person out.

    python personalize.py nano/example.png "[V] face as a rock star"
    python personalize.py me.jpg "a Pixar character of a [V] face" "[V] face as a king" --model stable-diffusion-v1-5/stable-diffusion-v1-5

Writes to --out one PNG per prompt, sheet.png (photo | prediction alone | prompts), person.safetensors (the LiDB weights) and
person_tuned.safetensors (the same with the LoRA of the fine-tuning).
"""
import argparse
import sys
import time
import warnings
from pathlib import Path

START = time.time()  # importing torch takes a while, and the times printed below should be what a user waits

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import hdb  # noqa: E402
import images  # noqa: E402
from person import Person, PersonError, save_person  # noqa: E402

NANO = Path(__file__).parent / "nano"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=type("", (argparse.RawDescriptionHelpFormatter,
                                                                                    argparse.ArgumentDefaultsHelpFormatter), {}))
    parser.add_argument("photo", help="a picture of one face")
    parser.add_argument("prompts", nargs="+", metavar="prompt", help='with [V] for the person: "[V] face as a rock star"')
    parser.add_argument("--model", default="nano", help="nano, a hub id, a folder or a .safetensors file of a Stable Diffusion 1.x")
    parser.add_argument("--hypernet", help="file of train.py; nano brings its own, without one there is no prediction")
    parser.add_argument("--crop", type=crop, metavar="X,Y,SIZE", help="square of the photo to use, in pixels; its central square if not given")
    parser.add_argument("--steps", type=int, default=40, help="of fine-tuning; 0: prediction alone")
    parser.add_argument("--rank", type=int, default=4, help="of the LoRA that is fine-tuned")
    parser.add_argument("--lr", type=float, default=4e-3, help="of fine-tuning")
    parser.add_argument("--sample-steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4., help="classifier-free guidance scale")
    parser.add_argument("--negative", default="", help="what to avoid")
    parser.add_argument("--seed", type=int, help="drawn, and printed, if not given")
    parser.add_argument("--out", default="out", type=Path)
    parser.add_argument("--device", help="cuda, mps or cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    return parser.parse_args()


def crop(text):
    try:
        x, y, size = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not three whole numbers x,y,size") from None
    return x, y, size


def main(args):
    stage = Stages()
    if args.seed is None:
        args.seed = torch.seed() % 2 ** 31
    for prompt in args.prompts:
        if "[V]" not in hdb.canonical(prompt):
            print(f'warning: the prompt "{prompt}" does not say [V], so it will not show the person', file=sys.stderr)
    images.read(args.photo, images.SMALLEST, args.crop)  # a bad photo is reported before gigabytes are loaded
    model = hdb.load(args.model, args.device, args.dtype and getattr(torch, args.dtype))
    photo = images.read(args.photo, 8 * model.unet.config.sample_size, args.crop).to(model.device)
    file = args.hypernet or (NANO / "hypernet.safetensors" if args.model == "nano" else None)
    method = hdb.HyperDreamBooth(model, file and hdb.load_hypernet(file, model))
    stage(f"loaded {args.model} on {model.device}, {str(model.dtype).removeprefix('torch.')}")

    theta = None
    if method.hypernet:
        theta = method.predict(photo)
        stage(f"predicted {theta.numel():,} personal weights from {args.photo}")
    factors = method.lidb.factors(theta) if theta is not None else {}
    person = Person(theta, {}, base=args.model)
    if args.steps:
        model.unet.gradient_checkpointing = model.device.type != "cpu"
        with tqdm(total=args.steps, desc="fine-tuning", leave=False) as bar:
            relaxed = method.fine_tune(photo, theta, args.steps, args.rank, args.lr, generator=torch.Generator().manual_seed(args.seed),
                                       callback=lambda step, loss: (bar.set_postfix(loss=f"{loss:.4f}"), bar.update()))
        person = Person(theta, relaxed, base=args.model)
        stage(f"fine-tuned {args.steps} steps at rank {args.rank}, learning rate {args.lr:g}")

    seeds = [args.seed + i for i in range(len(args.prompts))]
    settings = {"sampler": "DPM-Solver++(2M)", "steps": args.sample_steps, "guidance": args.guidance, "negative": args.negative}
    sample = lambda prompts, factors, seeds: method.sample(prompts, factors, seeds, args.sample_steps, args.guidance, args.negative)
    pictures = torch.cat([sample([p], person.factors(method.lidb), [s]) for p, s in
                          tqdm(list(zip(args.prompts, seeds)), desc="sampling", leave=False)])
    predicted = sample([hdb.PROMPT], factors, seeds[:1]) if theta is not None else photo.new_empty(0, *photo.shape[1:])
    stage(f"sampled {len(pictures) + len(predicted)} pictures in {args.sample_steps} steps")

    args.out.mkdir(parents=True, exist_ok=True)
    for i, (prompt, seed, picture) in enumerate(zip(args.prompts, seeds, pictures)):
        images.save(images.to_pil(picture), args.out / f"{i}.png", prompt=prompt, seed=seed, model=args.model, **settings)
    images.save(images.sheet(torch.cat([photo.cpu(), predicted.cpu(), pictures.cpu()]), 1 + len(predicted) + len(pictures)),
                args.out / "sheet.png", prompt=" | ".join(args.prompts), seed=args.seed, model=args.model, **settings)
    save_person(person, method, args.out / "person_tuned.safetensors")
    if theta is not None:
        save_person(person, method, args.out / "person.safetensors", lidb_only=True)
    for path in sorted(args.out.glob("*")):
        print(f"  {path}  {path.stat().st_size / 1000:.1f} KB")
    if args.model == "nano":
        from nano import judge
        referee = judge.load()
        everything = torch.cat([predicted, pictures]).cpu()
        scores = referee.likeness(everything, photo.cpu().expand(len(everything), -1, -1, -1)).tolist()
        for name, score in zip(["prediction alone"] * len(predicted) + args.prompts, scores):
            print(f"  likeness {score:+.2f}  {name}")
    stage(f"done, seed {args.seed}")


class Stages:
    """Prints what was done and how long it took since the last time."""

    def __init__(self):
        self.last = START

    def __call__(self, what):
        now = time.time()
        print(f"{now - self.last:6.1f} s  {what}" + (f" ({now - START:.1f} s in all)" if what.startswith("done") else ""), flush=True)
        self.last = now


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        main(arguments())
    except (images.ImageError, hdb.LoadError, PersonError) as error:
        sys.exit(print(f"personalize.py: {error}", file=sys.stderr) or 2)

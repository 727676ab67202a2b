"""One photo of a face in, pictures of that person out; or a personal file made before, which needs no fitting.

    python personalize.py nano/example.png "[V] face as a rock star"
    python personalize.py me.jpg "a Pixar character of a [V] face" "[V] face as a king" --model stable-diffusion-v1-5/stable-diffusion-v1-5
    python personalize.py out/person_tuned.safetensors "a [V] face at the beach" --strength 0.8
    python personalize.py me.safetensors you.safetensors "a professional photo of a [V] face"

Writes to --out one PNG per prompt (and person), sheet.png and, from a photo, person.safetensors (the LiDB weights) and
person_tuned.safetensors (the same with the LoRA of the fine-tuning). sheet.png shows the photo, the prediction alone, then the prompts.
"""
import argparse
import os
import secrets
import sys
import time
import warnings
from pathlib import Path

START = time.time()  # importing torch takes a while, and the times printed below should be what a user waits
# Threads that wait for one another spin by default, which starves the one whose core another program is using: on two cores, one of them
# busy, forty steps took minutes. To sleep after a short spin costs a few per cent on a free machine. OpenMP reads this as torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import checkpoints  # noqa: E402
import console  # noqa: E402
import hdb  # noqa: E402
import images  # noqa: E402
from export import export_lora, free, load_lora, merge_to_folder  # noqa: E402
from lidb import join, scale  # noqa: E402
from person import Person, PersonError, is_person, load_person, save_person, stack  # noqa: E402

NANO = Path(__file__).parent / "nano"
PERSONAL = ("person.safetensors", "person_tuned.safetensors")  # LiDB's part alone, and with the LoRA of the fine-tuning


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=type("", (argparse.RawDescriptionHelpFormatter,
                                                                                    argparse.ArgumentDefaultsHelpFormatter), {}))
    parser.add_argument("photo", help="a picture of one face, or a personal file (.safetensors)")
    parser.add_argument("prompts", nargs="+", metavar="prompt", help='with [V] for the person: "[V] face as a rock star"; '
                        "further personal files may stand before the first")
    parser.add_argument("--model", type=hdb.model_name, default="nano", help="nano, a hub id, a folder or a .safetensors file of a Stable Diffusion 1.x")
    parser.add_argument("--hypernet", help="file of train.py; nano brings its own, without one there is no prediction")
    parser.add_argument("--crop", type=crop, metavar="X,Y,SIZE", help="square of the photo to use, in pixels; its central square if not given")
    parser.add_argument("--steps", type=int, default=40, help="of fine-tuning; 0: prediction alone")
    parser.add_argument("--rank", type=int, default=4, help="of the LoRA that is fine-tuned")
    parser.add_argument("--lr", type=float, default=3e-3, help="of fine-tuning")
    parser.add_argument("--batch", type=int, default=4, help="of fine-tuning: noises of the photo a step")
    parser.add_argument("--sample-steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3., help="classifier-free guidance scale")
    parser.add_argument("--negative", default="", help="what to avoid")
    parser.add_argument("--strength", type=float, default=1., help="of the personal weights at sampling, 0 to 1.5: likeness against editability")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:SCALE]", help="somebody else's LoRA beside the person; repeatable")
    parser.add_argument("--export", choices=["lora"], help="also write lora.safetensors, with --strength and --lora in it, "
                        "for diffusers, ComfyUI and A1111")
    parser.add_argument("--merge", metavar="FOLDER", help="also write the model with the person merged in, in the hub's layout")
    parser.add_argument("--seed", type=int, help="drawn, and printed, if not given")
    parser.add_argument("--out", default="out", type=Path)
    parser.add_argument("--device", help="cuda, mps or cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    args = parser.parse_args()
    personal = lambda text: text.endswith(".safetensors") or is_person(text)
    args.people = [args.photo] if personal(args.photo) else []
    while args.people and len(args.prompts) > 1 and personal(args.prompts[0]):
        args.people.append(args.prompts.pop(0))
    args.prompts, args.negative = [console.printable(p) for p in args.prompts], console.printable(args.negative)
    for prompt in args.prompts:
        if personal(prompt) or os.path.isfile(prompt):
            parser.error(f"{prompt} stands where a prompt is expected, after the photo or the personal files")
    console.check_ranges(parser, args, steps=(0, 100_000), rank=(1, 320), lr=(0, 1), batch=(1, 1024), sample_steps=(1, 999), guidance=(-100, 100),
                         strength=(0, 1.5), seed=(0, 2 ** 40))
    console.check_folder(parser, "--out", args.out)
    if args.merge is not None:
        free(args.merge)
        console.check_folder(parser, "--merge", args.merge)
        if Path(args.merge).resolve() in (args.out.resolve(), *args.out.resolve().parents):
            parser.error("--merge and --out must be two folders, --out not in the other")
    if len(args.people) > 1 and (args.export or args.merge):
        parser.error("--export and --merge take one person")
    count = len(args.prompts) * max(1, len(args.people))
    outputs = ["sheet.png", *(f"{i}.png" for i in range(count)), *(["lora.safetensors"] if args.export else []), *([] if args.people else PERSONAL)]
    for given in (args.photo, *args.people, *(lora(text)[0] for text in args.lora), args.hypernet):
        if given and Path(given).resolve() in [(args.out / name).resolve() for name in outputs]:
            parser.error(f"{given} would be overwritten; give another folder with --out")
    return args


def crop(text):
    try:
        x, y, size = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not three whole numbers x,y,size") from None
    return x, y, size


def main(args):
    stage = Stages()
    if args.seed is None:
        args.seed = secrets.randbelow(2 ** 31)
    for prompt in args.prompts:
        if "[V]" not in hdb.canonical(prompt):
            print(f'warning: the prompt "{prompt}" does not say [V], so it will not show the person', file=sys.stderr)
    if not args.people:
        images.read(args.photo, images.SMALLEST, args.crop)  # what is no photo or person is reported before gigabytes are loaded
    for path in args.people:
        checkpoints.read(Path(path))
    model = hdb.load(args.model, args.device, args.dtype and getattr(torch, args.dtype))
    file = args.hypernet or (NANO / "hypernet.safetensors" if args.model == "nano" else None)
    method = hdb.HyperDreamBooth(model, file and hdb.load_hypernet(file, model))
    stage(f"loaded {args.model} on {model.device}, {str(model.dtype).removeprefix('torch.')}")

    style = join(*(load_lora(path, model, strength) for path, strength in map(lora, args.lora)))
    warn_of_cuts(args, model.tokenizer)
    photo, written = None, []
    if args.people:
        people = [load_person(path, method) for path in args.people]
        stage(f"read {', '.join(args.people)}")
    else:
        photo = images.read(args.photo, 8 * model.unet.config.sample_size, args.crop).to(model.device)
        people = [fit(method, photo, args, stage)]
        written = save(people[0], method, args.out)
    factors = join(scale(stack([p.factors(method.lidb) for p in people]), args.strength), style)

    predicted, pictures = draw(method, people, factors, args)
    stage(f"sampled {len(pictures) + len(predicted)} pictures in {args.sample_steps} steps")
    shown = torch.cat([x.cpu() for x in (photo, predicted, pictures) if x is not None and len(x)])
    written += write_pictures(pictures, shown, len(shown) if photo is not None else len(people), settings(args, model), args)
    if args.export:
        export_lora(factors, args.out / "lora.safetensors", {"modelspec.trigger_phrase": people[0].identifier})
        written.append(args.out / "lora.safetensors")
    if args.merge:
        merge_to_folder(method, factors, args.model if Path(args.model).is_dir() and args.model != "nano" else None, args.merge)
        print(f"  {args.merge}/  the model with the person merged in")
    if args.export or args.merge:
        print(f'  in other programs the prompt says "{people[0].identifier}" where it says [V] here')
    for path in written:
        print(f"  {path}  {path.stat().st_size / 1000:.1f} KB")
    if args.model == "nano" and photo is not None:
        from nano import judge
        scores = judge.load().likeness(shown[1:], photo.cpu().expand(len(shown) - 1, -1, -1, -1)).tolist()
        for name, score in zip(["prediction alone"] * len(predicted) + args.prompts, scores):
            print(f"  likeness {score:+.2f}  {name}")
    stage(f"done, seed {args.seed}")


def warn_of_cuts(args, tokenizer):
    """Warn of prompts that are too long, once and not again at every picture, and of those that lose their [V] by it."""
    tokenizer([*map(hdb.named, args.prompts), args.negative])
    warnings.filterwarnings("ignore", "prompt is longer")
    for prompt in args.prompts:
        before, v, _ = hdb.canonical(prompt).partition("[V]")
        if v and len(tokenizer.tokens(hdb.named(before + v))) > tokenizer.max_length - 2:
            print(f'warning: the prompt "{prompt}" is cut and does not say [V] before that, so it will not show the person', file=sys.stderr)


def fit(method, photo, args, stage):
    """Photo to Person: predict, then fine-tune."""
    theta, relaxed = None, {}
    if method.hypernet:
        theta = method.predict(photo)
        stage(f"predicted {theta.numel():,} personal weights from {args.photo}")
    if args.steps:
        method.model.unet.gradient_checkpointing = sum(p.numel() for p in method.model.unet.parameters()) > 1e8  # the miniature has room
        with tqdm(total=args.steps, desc="fine-tuning", leave=False) as bar:
            relaxed = method.fine_tune(photo, theta, args.steps, args.rank, args.lr, args.batch, torch.Generator().manual_seed(args.seed),
                                       callback=lambda step, loss: (bar.set_postfix(loss=f"{loss:.4f}"), bar.update()))
        if not all(t.isfinite().all() for pair in relaxed.values() for t in pair):
            raise PersonError(f"fine-tuning ended in infinite numbers; lower --lr, which is {args.lr:g}")
        stage(f"fine-tuned {args.steps} steps at rank {args.rank}, learning rate {args.lr:g}")
    if theta is None and not relaxed:
        raise PersonError("neither a hypernetwork nor fine-tuning steps: nothing would be personal; give --hypernet or --steps")
    kept = lambda t: t.half().float()  # as the file keeps them, so that the pictures are the same again from there
    return Person(theta if theta is None else kept(theta), {k: (kept(a), kept(b)) for k, (a, b) in relaxed.items()}, base=args.model,
                  basis_seed=method.lidb.seed)


def save(person, method, out):
    """Write what there is of a new person and return the paths. What isn't there now may be somebody else's, from another run, and goes."""
    written = []
    for name, lidb_only, known in zip(PERSONAL, (True, False), (person.theta is not None, person.relaxed)):
        if known:
            save_person(person, method, out / name, lidb_only)
            written.append(out / name)
    for stale in {out / name for name in PERSONAL} - set(written):
        stale.unlink(missing_ok=True)
    return written


def draw(method, people, factors, args):
    """The picture of the prediction alone, of a photo that has one, or [], and the pictures of every prompt, of all people each."""
    def sample(prompt, factors, first):
        prompts = [hdb.named(prompt, person.identifier) for person in people]
        seeds = range(first, first + len(people))
        return method.sample(prompts, factors, seeds, args.sample_steps, args.guidance, args.negative)
    predicted = []
    if not args.people and people[0].theta is not None:
        predicted = sample(hdb.PROMPT, method.lidb.factors(people[0].theta), args.seed)
    pictures = [sample(prompt, factors, args.seed + i * len(people)) for i, prompt in enumerate(tqdm(args.prompts, desc="sampling", leave=False))]
    pictures = torch.cat(pictures)
    if not pictures.isfinite().all():
        raise PersonError("a picture came out as NaN: the personal weights, --strength or --guidance are too large for this model or dtype")
    return predicted, pictures


def settings(args, model):
    """What all pictures of a run have in common, for their PNG files."""
    common = {"model": args.model, "sampler": "DPM-Solver++(2M)", "steps": args.sample_steps, "guidance": args.guidance, "negative": args.negative,
              "strength": args.strength, "dtype": str(model.dtype).removeprefix("torch.")}
    if args.lora:
        common["lora"] = ", ".join(args.lora)
    if not args.people:
        common |= {"crop": args.crop or "central square", "hypernet": args.hypernet or "the model's own, if any", "fine-tuning": "none"}
    if not args.people and args.steps:
        common["fine-tuning"] = f"{args.steps} steps, rank {args.rank}, learning rate {args.lr:g}, batch {args.batch}"
    return common


def write_pictures(pictures, shown, columns, common, args):
    """Write every picture and the sheet of all `shown`, with their settings, and return the paths."""
    whose, paths = args.people or [args.photo], []
    for i, picture in enumerate(pictures):
        paths.append(args.out / f"{i}.png")
        images.save(images.to_pil(picture), paths[-1], prompt=args.prompts[i // len(whose)], person=whose[i % len(whose)], seed=args.seed + i, **common)
    images.save(images.sheet(shown, columns), args.out / "sheet.png", prompt=" | ".join(args.prompts), person=" | ".join(whose), seed=args.seed, **common)
    return [args.out / "sheet.png", *paths]


def lora(text):
    """"style.safetensors:0.8" -> its path and strength."""
    path, _, strength = text.rpartition(":")
    if Path(text).exists() or not Path(path).is_file():
        return text, 1.
    try:
        if abs(number := float(strength)) <= 100:
            return path, number
    except ValueError:
        pass
    raise PersonError(f"--lora {text}: {strength!r} is no strength")


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
    console.run(main, arguments)

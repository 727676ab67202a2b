"""One photo of a face in, pictures of that person out; or a personal file made before, and nothing is fitted.

    python personalize.py nano/example.png "[V] face as a rock star"
    python personalize.py me.jpg "[V] face as a king" --model stable-diffusion-v1-5/stable-diffusion-v1-5
    python personalize.py out/person_tuned.safetensors "a [V] face at the beach" --strength 0.8
    python personalize.py me.safetensors you.safetensors "a professional photo of a [V] face"

Writes to --out one PNG per prompt (and person), sheet.png and, from a photo, person.safetensors (the LiDB
weights) and person_tuned.safetensors (the same with the LoRA of the fine-tuning). sheet.png shows the photo,
the prediction alone, then the prompts.
"""
import argparse
import os
import secrets
import time
import warnings
from pathlib import Path

START = time.time()  # importing torch takes a while, and the times printed below should be what a user waits
# Threads that wait for one another spin by default, which starves the one whose core another program is using
# (on two cores, one of them busy, forty steps took minutes). To sleep after a short spin costs a few per cent
# on a free machine. OpenMP reads this as torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import hdb  # noqa: E402
from edits import LowRank, canonical, join, named, scale, stack  # noqa: E402
from files import console, images  # noqa: E402
from files.checkpoints import open_tensors  # noqa: E402
from files.layouts import HERE, model_name  # noqa: E402
from files.lora import export_lora, load_lora  # noqa: E402
from files.merged import free_folder, merge_to_folder  # noqa: E402
from files.person import Person, PersonError, is_person, load_person, save_person  # noqa: E402
from nano.judge import load_judge  # noqa: E402

PERSONAL = "person.safetensors", "person_tuned.safetensors"  # LiDB's part alone, and with the LoRA


def arguments():
    parser = console.parser(__doc__, model_name)
    parser.add_argument("photo", help="a picture of one face, or a personal file (.safetensors)")
    parser.add_argument("prompts", nargs="+", metavar="prompt", help='with [V] for the person: "[V] face as '
                        'a rock star"; further personal files may stand before')
    parser.add_argument("--hypernet", help="file of train.py, to predict with; nano brings its own")
    parser.add_argument("--crop", type=square, metavar="X,Y,SIZE", help="in pixels; its centre if none")
    parser.add_argument("--steps", type=int, default=40, help="of fine-tuning; 0: prediction alone")
    parser.add_argument("--rank", type=int, default=4, help="of the LoRA that is fine-tuned")
    parser.add_argument("--lr", type=float, default=3e-3, help="of fine-tuning")
    parser.add_argument("--batch", type=int, default=4, help="of fine-tuning: noises of the photo a step")
    parser.add_argument("--sample-steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3., help="classifier-free guidance scale")
    parser.add_argument("--negative", type=console.printable, default="", help="what to avoid")
    parser.add_argument("--strength", type=float, default=1., help="of the person, from 0 to 1.5")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:SCALE]",
                        help="somebody else's LoRA beside the person; repeatable")
    parser.add_argument("--export", choices=["lora"], help="also write lora.safetensors, with --strength and "
                        "--lora in it, for diffusers, ComfyUI and A1111")
    parser.add_argument("--merge", metavar="FOLDER", help="also write the model with the person merged in")
    parser.add_argument("--seed", type=int, help="drawn, and printed, if not given")
    parser.add_argument("--out", default="out", type=Path)
    args = parser.parse_args()

    # personal files may be several, before the prompts
    args.people = [args.photo] if is_personal(args.photo) else []
    while args.people and len(args.prompts) > 1 and is_personal(args.prompts[0]):
        args.people.append(args.prompts.pop(0))
    args.prompts = [console.printable(prompt) for prompt in args.prompts]
    for prompt in args.prompts:
        if is_personal(prompt) or os.path.isfile(prompt):
            parser.error(f"{prompt} stands where a prompt is expected, after the photo or the personal files")
    args.seed = secrets.randbelow(2 ** 31) if args.seed is None else args.seed

    # nothing is out of range, or would be written where it cannot or must not be
    console.check_ranges(parser, args, steps=(0, 100_000), rank=(1, 320), lr=(0, 1), batch=(1, 1024),
                         seed=(0, 2 ** 40), sample_steps=(1, 999), guidance=(-100, 100), strength=(0, 1.5))
    console.check_folder(parser, "--out", args.out)
    if args.merge is not None:
        free_folder(args.merge)
        console.check_folder(parser, "--merge", args.merge)
        if Path(args.merge).resolve() in (args.out.resolve(), *args.out.resolve().parents):
            parser.error("--merge and --out must be two folders, --out not in the other")
    if len(args.people) > 1 and (args.export or args.merge):
        parser.error("--export and --merge take one person")

    outputs = ["sheet.png", *(f"{i}.png" for i in range(len(args.prompts) * max(1, len(args.people))))]
    outputs += ["lora.safetensors"] if args.export else []
    outputs += [] if args.people else PERSONAL
    written = [(args.out / name).resolve() for name in outputs]
    loras = [lora_and_strength(text)[0] for text in args.lora]
    for given in (args.photo, *args.people, *loras, args.hypernet):
        if given and Path(given).resolve() in written:
            parser.error(f"{given} would be overwritten; give another folder with --out")
    return args


def is_personal(text):
    return text.endswith(".safetensors") or is_person(text)


def square(text):
    try:
        x, y, size = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not three whole numbers x,y,size") from None
    return x, y, size


def lora_and_strength(text):
    """"style.safetensors:0.8" -> its path and strength."""
    path, _, strength = text.rpartition(":")
    if Path(text).exists() or not Path(path).is_file():
        return text, 1.
    try:
        if abs(float(strength)) <= 100:
            return path, float(strength)
    except ValueError:
        pass
    raise PersonError(f"--lora {text}: {strength!r} is no strength")


def main(args):
    # what is no photo or person is reported before gigabytes are loaded
    for path in args.people:
        open_tensors(path)
    if not args.people:
        images.read(args.photo, images.SMALLEST, args.crop)
    stage = Stages()
    model = hdb.load(args.model, args.device, args.dtype and getattr(torch, args.dtype))
    file = args.hypernet or (HERE / "nano/hypernet.safetensors" if args.model == "nano" else None)
    method = hdb.HyperDreamBooth(model, file and hdb.load_hypernet(file, model))
    stage(f"loaded {args.model} on {model.device}, {str(model.dtype).removeprefix('torch.')}")
    styles = [load_lora(path, model, strength) for path, strength in map(lora_and_strength, args.lora)]
    warn(args, model.tokenizer)

    # the person, or people
    photo, written = None, []
    if args.people:
        people = [load_person(path, method) for path in args.people]
        stage(f"read {', '.join(args.people)}")
    else:
        photo = images.read(args.photo, 8 * model.unet.config.sample_size, args.crop).to(model.device)
        people = [make_person(method, photo, args, stage)]
        written = save(people[0], method, args.out)
    edits = join(scale(stack([person.factors(method.lidb) for person in people]), args.strength), *styles)

    # the pictures
    predicted, pictures = draw(method, people, edits, args)
    stage(f"sampled {len(pictures) + len(predicted)} pictures in {args.sample_steps} steps")
    shown = torch.cat([x.cpu() for x in (photo, predicted, pictures) if x is not None and len(x)])
    columns = len(people) if photo is None else len(shown)
    written += write_pictures(pictures, shown, columns, model, args)

    # the person for other programs
    if args.export:
        written.append(args.out / "lora.safetensors")
        export_lora(edits, written[-1], {"modelspec.trigger_phrase": people[0].identifier})
    if args.merge:
        source = args.model if Path(args.model).is_dir() and args.model != "nano" else None
        merge_to_folder(model, edits, source, args.merge)
        print(f"  {args.merge}/  the model with the person merged in")
    if args.export or args.merge:
        print(f'  in other programs the prompt says "{people[0].identifier}" where it says [V] here')
    for path in written:
        print(f"  {path}  {path.stat().st_size / 1000:.1f} KB")
    if args.model == "nano" and photo is not None:  # the miniature has a judge
        scores = load_judge().likeness(shown[1:], photo.cpu().expand(len(shown) - 1, -1, -1, -1))
        for name, score in zip(["prediction alone"] * len(predicted) + args.prompts, scores.tolist()):
            print(f"  likeness {score:+.2f}  {name}")
    stage(f"done, seed {args.seed}")


def warn(args, tokenizer):
    """Warn of prompts that don't say [V] or are too long, once and not again at every picture."""
    tokenizer([*map(named, args.prompts), args.negative])
    warnings.filterwarnings("ignore", "prompt is longer")
    for prompt in args.prompts:
        before, v, _ = canonical(prompt).partition("[V]")
        cut = len(tokenizer.tokens(named(before + v))) > tokenizer.max_length - 2
        if not v or cut:
            what = "is cut and does not say [V] before that" if v else "does not say [V]"
            warnings.warn(f'the prompt "{prompt}" {what}, so it will not show the person', stacklevel=1)


def make_person(method, photo, args, stage):
    """Photo to Person: predict, then fine-tune."""
    theta, relaxed = None, {}
    if method.hypernet:
        theta = method.predict(photo)
        stage(f"predicted {theta.numel():,} personal weights from {args.photo}")
    elif not args.steps:
        raise PersonError("neither a hypernetwork nor fine-tuning steps: nothing would be personal; give "
                          "--hypernet or --steps")
    else:
        print(f"         no hypernetwork for {args.model}: no prediction, fine-tuning alone")
    if args.steps:
        with tqdm(total=args.steps, desc="fine-tuning", leave=False) as bar:
            def show(step, loss):
                bar.set_postfix(loss=f"{loss:.4f}")
                bar.update()
            generator = torch.Generator().manual_seed(args.seed)
            settings = args.steps, args.rank, args.lr, args.batch
            relaxed = method.fine_tune(photo, theta, *settings, generator, show)
        if not all(t.isfinite().all() for pair in relaxed.values() for t in pair):
            raise PersonError(f"fine-tuning ended in infinite numbers; lower --lr, which is {args.lr:g}")
        stage(f"fine-tuned {args.steps} steps at rank {args.rank}, learning rate {args.lr:g}")

    def kept(t):  # as the file keeps it, so that the pictures are the same again from there
        return t.half().float()
    relaxed = {name: LowRank(kept(a), kept(b)) for name, (a, b) in relaxed.items()}
    return Person(None if theta is None else kept(theta), relaxed, method.basis_seed, args.model)


def save(person, method, out):
    """Write what there is of a new person and return the paths. What is left of another run goes: it may be
    somebody else."""
    written = []
    for name, lidb_only, known in zip(PERSONAL, (True, False), (person.theta is not None, person.relaxed)):
        if known:
            save_person(person, method, out / name, lidb_only)
            written.append(out / name)
        else:
            (out / name).unlink(missing_ok=True)
    return written


def draw(method, people, edits, args):
    """The prediction's picture, of a photo that has one, or [], and every prompt's, of all people each."""
    def sample(prompt, edits, first):
        prompts = [named(prompt, person.identifier) for person in people]
        seeds = range(first, first + len(people))
        return method.sample(prompts, edits, seeds, steps=args.sample_steps, guidance=args.guidance,
                             negative=args.negative)
    predicted = []
    if not args.people and people[0].theta is not None:
        predicted = sample(hdb.PROMPT, method.lidb.factors(people[0].theta), args.seed)
    pictures = torch.cat([sample(prompt, edits, args.seed + i * len(people))
                          for i, prompt in enumerate(tqdm(args.prompts, desc="sampling", leave=False))])
    if not pictures.isfinite().all():
        raise PersonError("a picture came out as NaN: the personal weights, --strength or --guidance are too "
                          "large for this model or dtype")
    return predicted, pictures


def write_pictures(pictures, shown, columns, model, args):
    """Write every picture, and the sheet of all `shown`, with the settings of the run; return the paths."""
    settings = {"model": args.model, "sampler": "DPM-Solver++(2M)", "steps": args.sample_steps,
                "guidance": args.guidance, "negative": args.negative, "strength": args.strength,
                "dtype": str(model.dtype).removeprefix("torch.")}
    if args.lora:
        settings["lora"] = ", ".join(args.lora)
    if not args.people:
        tuning = f"{args.steps} steps, rank {args.rank}, learning rate {args.lr:g}, batch {args.batch}"
        settings |= {"crop": args.crop or "central square", "fine-tuning": tuning if args.steps else "none",
                     "hypernet": args.hypernet or "the model's own, if any"}
    whose, paths = args.people or [args.photo], [args.out / "sheet.png"]
    for i, picture in enumerate(pictures):
        paths.append(args.out / f"{i}.png")
        images.save(images.to_pil(picture), paths[-1], prompt=args.prompts[i // len(whose)],
                    person=whose[i % len(whose)], seed=args.seed + i, **settings)
    images.save(images.sheet(shown, columns), paths[0], prompt=" | ".join(args.prompts),
                person=" | ".join(whose), seed=args.seed, **settings)
    return paths


class Stages:
    """Prints what was done and how long it took since the last time."""

    def __init__(self):
        self.last = START

    def __call__(self, what):
        now = time.time()
        in_all = f" ({now - START:.1f} s in all)" if what.startswith("done") else ""
        print(f"{now - self.last:6.1f} s  {what}{in_all}", flush=True)
        self.last = now


if __name__ == "__main__":
    console.run(main, arguments)

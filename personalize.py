"""One photo of a face in, pictures of that person out; or a personal file made before, and nothing is fitted.

    python personalize.py nano/example.png "[V] face as a rock star"
    python personalize.py me.jpg "[V] face as a king" --model stable-diffusion-v1-5/stable-diffusion-v1-5
    python personalize.py a.jpg b.jpg more/ "[V] face as a king"    # photos, or folders, of one person
    python personalize.py out/person_tuned.safetensors "a [V] face at the beach" --strength 0.8
    python personalize.py me.safetensors you.safetensors "a professional photo of a [V] face"
    python personalize.py photos/ "[V] face as a rock star" --each     # every photo is another person

Writes to --out one PNG per prompt (and person), sheet.png and, from a photo, person.safetensors (the LiDB
weights) and person_tuned.safetensors (the same with the LoRA of the fine-tuning). sheet.png shows the photo,
the prediction alone, then the prompts. With --each every person's files are in a folder of the photo's name,
and sheet.png has a column for each. nano knows drawn people alone: of a photograph it says what it saw, draws
that person, and goes on with the drawing, which the sheet shows too.

The systems that the paper compares with have the same command line: python -m methods.dreambooth,
.textual_inversion, .perfusion, .e4t.
"""
import argparse
import itertools
import os
import sys
import time
import warnings
from functools import partial
from pathlib import Path

from program import START, console

import torch
from tqdm import tqdm

import hdb
from methods.arguments import PERSONAL, check_kinds, parsed
from methods import registry, textual_inversion  # noqa: F401
from adapters import LowRank, canonical, join, with_identifier, scale, stack
from files import images
from files.checkpoints import finite, open_tensors, whole_files
from program.console import UserError
from files.layouts import HERE
from files.lora import export_lora, load_lora
from files.merged import merge_to_folder
from training.parts import split
from files.person import MAKERS, OURS, Person, load_person, save_person
from training.photos import read_photos
from nano import faces
from nano.judge import load_judge
from nano.photo import avatar, reader

# On nano, elsewhere, the least, the most, what it is
NUMBERS = {"steps": (40, 40, 0, 100_000, "of fine-tuning; 0: prediction alone; 200 without a hypernetwork"),
           "rank": (4, 4, 1, 320, "of the LoRA that is fine-tuned; 16 without a hypernetwork"),
           "lr": (3e-3, 5e-4, 0, 1, "learning rate of fine-tuning"),
           "batch": (4, 4, 1, 1024, "of fine-tuning: noises of the photo a step")}
# Fine-tuning alone has the whole way to go: what is published for LoRAs of one photo, 80 to 200 steps
ALONE = {"steps": 200, "rank": 16, "lr": 2e-4}


def options(parser):
    """This method's options that are no numbers."""
    parser.add_argument("--hypernet", help="file of train.py, to predict with; nano brings its own")


def maker_of(method):
    """The module that makes persons by this method, with options and ranges of its own: this one or
    another."""
    return MAKERS.get(method, sys.modules[__name__])


def arguments(method=OURS):
    """What the command line of this method says."""
    return parsed(maker_of(method), method)


def main(args):
    maker = maker_of(args.method)
    # what is no photo or person, or can't be had, is reported before gigabytes are loaded
    for path in args.people:
        open_tensors(path)
    if not args.people:
        check_kinds(args, maker.kinds(args))
        if not args.each and len(photos_of(args, images.SMALLEST, "center")) > 1 and args.method != OURS:
            raise UserError(f"{args.method} takes one photo")
    stage = console.Stages(START)
    model = hdb.load(args.model, args.device, args.dtype and getattr(torch, args.dtype))
    file = args.hypernet or (HERE / "nano/hypernet.safetensors" if args.model == "nano" else None)
    method = hdb.HyperDreamBooth(model, file and hdb.load_hypernet(file, model))
    stage(f"loaded {args.model} on {model.device}, {str(model.dtype).removeprefix('torch.')}")
    styles = join(*(load_lora(path, model, strength) for path, strength in args.lora))
    warn(args, model.tokenizer)

    # the person, or people
    seen, photo, written = None, None, []
    if args.each:
        seen = fit_each(args, method, stage)
    if args.people:
        people = [read_person(path, method) for path in args.people]
        stage(f"read {', '.join(args.people)}")
    else:
        seen, photo = sitter(args, 8 * model.unet.config.sample_size)
        photo = photo.to(model.device)
        person = maker.make_person(method, photo if len(photo) == 1 else photo[None], args, stage)
        if not all(map(finite, person.stored().values())):
            raise UserError(f"fine-tuning ended in infinite numbers; lower --lr, which is {args.lr:g}")
        # as the file keeps it, so that the pictures are the same again from there
        people = [person.map(lambda t: t.half().float())]
        written = save(people[0], method, args.out)
    adapters = [person.adapters(method) for person in people]
    check_kinds(args, {type(adapter) for mine in adapters for adapter in mine.values()})
    if args.strength != 1:
        adapters = [scale(mine, args.strength) for mine in adapters]
    if hasattr(maker, "turn"):
        adapters = [maker.turn(mine, args, method) for mine in adapters]

    # the pictures
    with model.adapted(styles):
        predicted, pictures = draw(method, people, adapters, args)
    stage(f"sampled {len(pictures) + len(predicted)} pictures in {args.sample_steps} steps")
    shown = torch.cat([x.cpu() for x in (seen, photo, predicted, pictures) if x is not None and len(x)])
    columns = len(people) if photo is None else len(shown)
    written += write_pictures(pictures, shown, columns, model, args)

    if args.export or args.merge:
        whole = join(adapters[0], styles) if styles else adapters[0]
        written += for_other_programs(model, people[0], whole, args)
    for path in written:
        print(f"  {path}  {path.stat().st_size / 1000:.1f} KB")
    if args.model == "nano" and photo is not None:  # the miniature has a judge
        drawn, judge = torch.stack([*predicted, *pictures]).cpu(), load_judge()
        scores = torch.stack([judge.likeness(drawn, one.expand_as(drawn)) for one in photo.cpu()]).mean(0)
        for name, score in zip(["prediction alone"] * len(predicted) + args.prompts, scores.tolist()):
            print(f"  likeness {score:+.2f}  {name}")
    seconds = time.time() - START
    stage(f"done, {seconds:.1f} s in all, seed {args.seed}{console.peak_memory(model.device)}")


def fit_each(args, method, stage):
    """Make everybody's personal file, some people side by side, and name them in args.people; what the method
    saw of them (P, 3, H, W). A photo that can't be used is reported. UserError where none can."""
    used, folders, sitters, side = [], [], [], 8 * method.model.unet.config.sample_size
    pictures = [f"{i}.png" for i in range(len(args.photos) * len(args.prompts))]
    # names that stay free: of no folder of one's own, of what is written, of files that are there
    taken = [".", "..", "sheet.png", *pictures, *(p.name for p in args.out.glob("*") if not p.is_dir())]

    def of(paths):
        return argparse.Namespace(**vars(args) | {"photos": paths})
    for path in args.photos:
        try:
            _, photo = sitter(of([path]), side)
        except images.ImageError as error:
            print(console.one_line(f"  not used: {error}"))
        else:
            taken.append(free_name(Path(path).stem, taken))
            folders.append(args.out / taken[-1])
            used.append(path)
            sitters.append(photo)
    if not sitters:
        raise UserError(f"{', '.join(args.photos)[:200]}: no photo that can be used")
    sitters, few = torch.cat(sitters).to(method.model.device), args.side_by_side
    for paths, outs, photo in zip(split(used, few), split(folders, few), sitters.split(few)):
        made = maker_of(args.method).make_person(method, photo, of(paths), stage)
        for i, out in enumerate(outs):
            person = made.map(lambda t, i=i: t[i:i + 1])
            args.people.append(str(save(person, method, out)[-1]))
    return sitters


def free_name(stem, taken):
    """`stem`, or with the first number that makes it none of the names `taken`, in capitals or not."""
    names = itertools.chain([stem], (f"{stem}_{i}" for i in itertools.count(2)))
    return next(name for name in names if name.casefold() not in map(str.casefold, taken))


def photos_of(args, side, crop):
    """All photos of the person (N, 3, side, side), cut as images.read does; a crop in pixels goes before."""
    crop = args.crop if isinstance(args.crop, tuple) else crop
    every = (read_photos(path, side, crop) if os.path.isdir(path) else [images.read(path, side, crop)]
             for path in args.photos)
    return torch.cat([photo for some in every for photo in some])


def sitter(args, side):
    """Pictures (N, 3, side, side) of the person: photos that the method doesn't see, or None, and what it
    sees. nano knows drawn people alone: it reads a photo, says what it saw, and draws that person."""
    if args.model != "nano":
        return None, photos_of(args, side, args.crop)
    network, pictures = reader.load_reader(), photos_of(args, side, "center")
    if args.look is None and reader.drawn(network, pictures).all():
        args.crop = args.crop if isinstance(args.crop, tuple) else "center"
        return None, pictures
    photos = photos_of(args, 2 * side, args.crop)
    _, portrait, args.saw = avatar.avatar(network, photos, args.look)
    print(f"saw: {args.saw}\n     wrong? say it with --look, in words of {faces.vocabulary_text()}")
    return reader.shrunk(photos, side), portrait


def read_person(path, method):
    """The Person in a personal file, or in an embedding that textual inversion has learnt anywhere."""
    embedding = textual_inversion.is_embedding(path)
    return textual_inversion.load_embedding(path, method.model) if embedding else load_person(path, method)


def warn(args, tokenizer):
    """Warn of prompts that don't say [V] or are too long, once and not again at every picture; and of a rate
    that suits nano alone."""
    if args.model != "nano" and args.photos and args.method == OURS and args.lr > NUMBERS["lr"][1]:
        warnings.warn(f"--lr {args.lr:g} is large for this model; 2e-4 to 5e-4 are usual", stacklevel=1)
    tokenizer([*map(with_identifier, args.prompts), args.negative])
    warnings.filterwarnings("ignore", "prompt is longer")
    for prompt in args.prompts:
        before, v, _ = canonical(prompt).partition("[V]")
        cut = len(tokenizer.tokens(with_identifier(before + v))) > tokenizer.max_length - 2
        if not v or cut:
            what = "is cut and does not say [V] before that" if v else "does not say [V]"
            warnings.warn(f'the prompt "{prompt}" {what}, so it will not show the person', stacklevel=1)


def kinds(args):
    """What the adapters of a person made here are."""
    return [LowRank]


def make_person(method, photo, args, stage):
    """Photo to Person: predict, then fine-tune."""
    theta, lora = None, {}
    if method.hypernet:
        theta = method.predict(photo)
        stage(f"predicted {theta.numel():,} personal weights from {', '.join(args.photos)}")
    elif not args.steps:
        raise UserError("neither a hypernetwork nor fine-tuning steps: nothing would be personal; give "
                        "--hypernet or --steps")
    else:
        print(f"         no hypernetwork for {args.model}, so fine-tuning alone, for which 40 steps are few: "
              f"{args.steps} steps at rank {args.rank}")
    if args.steps:
        generator = torch.Generator().manual_seed(args.seed)
        settings = args.steps, args.rank, args.lr, args.batch
        with stage.progress(args.steps) as show:
            lora = method.fine_tune(photo, theta, *settings, generator, show)
        stage(f"fine-tuned {args.steps} steps at rank {args.rank}, learning rate {args.lr:g}")
    return Person(theta, lora, method.basis_seed, args.model)


def save(person, method, out):
    """Write what there is of a new person and return the paths. What is left of another run goes: it may be
    somebody else."""
    alone, tuned = (out / name for name in PERSONAL)
    known = {alone: person.theta is not None or person.tensors, tuned: person.lora}
    written = [path for path, there in known.items() if there]
    with whole_files(*written) as temporary:
        for path, new in zip(written, temporary):
            save_person(person, method, new, lidb_only=path == alone)
    for path in known.keys() - set(written):
        path.unlink(missing_ok=True)
    return written


def draw(method, people, adapters, args):
    """The prediction's picture, of a photo that has one, or [], and every prompt's, of all people each."""
    def sample(prompt, who, mine, first):
        prompts = [with_identifier(prompt, people[i].identifier) for i in who]
        return method.sample(prompts, mine, [first + i for i in who], steps=args.sample_steps,
                             guidance=args.guidance, negative=args.negative,
                             person_guidance=args.person_guidance)
    # low-rank people share a batch
    everybody = list(range(len(people)))
    groups = [([i], adapters[i]) for i in everybody]
    if all(isinstance(adapter, LowRank) for mine in adapters for adapter in mine.values()):
        groups = [(few, stack([adapters[i] for i in few])) for few in split(everybody, args.side_by_side)]
    predicted = []
    if not args.people and people[0].theta is not None:
        predicted = sample(hdb.PROMPT, [0], method.lidb.adapters(people[0].theta), args.seed)
    pictures = torch.cat([sample(prompt, who, mine, args.seed + i * len(people))
                          for i, prompt in enumerate(tqdm(args.prompts, desc="sampling", leave=False))
                          for who, mine in groups])
    if not pictures.isfinite().all():
        raise UserError("a picture came out as NaN: the personal weights, --strength or --guidance are too "
                        "large for this model or dtype")
    return predicted, pictures


def write_pictures(pictures, shown, columns, model, args):
    """Write every picture, and the sheet of all `shown`, with the settings of the run; return the paths."""
    settings = {"model": args.model, "sampler": "DPM-Solver++(2M)", "steps": args.sample_steps,
                "guidance": args.guidance, "person guidance": args.person_guidance,
                "negative": args.negative, "strength": args.strength,
                "dtype": str(model.dtype).removeprefix("torch.")}
    if args.lora:
        settings["lora"] = ", ".join(f"{path}:{strength:g}" for path, strength in args.lora)
    if args.saw:
        settings["saw"] = args.saw
    if args.photos:
        tuning = ", ".join(f"{name} {getattr(args, name)}" for name in maker_of(args.method).NUMBERS)
        settings |= {"crop": args.crop, "method": args.method, "fine-tuning": tuning,
                     "hypernet": args.hypernet or "the model's own, if any"}
    whose, paths = args.people or [", ".join(args.photos)], [args.out / "sheet.png"]
    for i, picture in enumerate(pictures):
        paths.append(args.out / f"{i}.png")
        images.save(images.to_pil(picture), paths[-1], prompt=args.prompts[i // len(whose)],
                    person=whose[i % len(whose)], seed=args.seed + i, **settings)
    images.save(images.sheet(shown, columns), paths[0], prompt=" | ".join(args.prompts),
                person=" | ".join(whose), seed=args.seed, **settings)
    return paths


def for_other_programs(model, person, adapters, args):
    """Write what --export and --merge ask for of this person, whose adapters are these, and say how it is
    used; return the paths of the files."""
    word, paths = person.identifier, []
    if args.export:
        paths.append(args.out / f"{args.export}.safetensors")
    if args.export == "lora":
        export_lora(adapters, paths[0], {"modelspec.trigger_phrase": word})
    if args.export == "embedding":
        word = textual_inversion.TOKEN
        textual_inversion.save_embedding(person.tensors, paths[0])
    if args.merge:
        source = args.model if Path(args.model).is_dir() and args.model != "nano" else None
        merge_to_folder(model, adapters, source, args.merge)
        print(f"  {args.merge}/  the model with the person merged in")
    print(f'  in other programs the prompt says "{word}" where it says [V] here')
    return paths


def command(name=OURS):
    """The command line of the method `name`."""
    console.run(main, partial(arguments, name))


if __name__ == "__main__":
    command()

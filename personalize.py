"""One photo of a face in, pictures of that person out; or pictures from a personal file, without training.

    python personalize.py nano/example.png "a [V] face as a rock star"
    python personalize.py me.jpg "a [V] face" --out me --model stable-diffusion-v1-5/stable-diffusion-v1-5
    python personalize.py a.jpg b.jpg more/ "a [V] face as a king"    # photos, or folders, of one person
    python personalize.py out/person_tuned.safetensors "a [V] face at the beach" --strength 0.8
    python personalize.py me.safetensors you.safetensors "a professional photo of a [V] face"
    python personalize.py photos/ "a [V] face as a rock star" --each     # each photo shows another person
    python personalize.py nano/example.png "a [V] face as a king" --method dreambooth

Writes to --out one PNG per prompt (and person), sheet.png and, from a photo, person.safetensors (the
predicted weights, or another method's) and person_tuned.safetensors (the same plus the fine-tuned LoRA). It
does not replace another person's files there. sheet.png shows the photo, the prediction alone, then the
prompts. With --each every person's files go to a folder named after the photo, and sheet.png has a column for
each. nano knows only drawn people: it says what it saw in a photograph, draws that person, and continues with
the drawing, which the sheet also shows."""
import time
import warnings
from dataclasses import replace
from pathlib import Path

from program import START, console, lock
from clip import canonical, with_identifier

import torch
from tqdm import tqdm

import hdb
from adapters import Change, LowRank, join, scale, stack
from diffusion import SAMPLERS
from files import images
from files.checkpoints import finite
from files.disk import whole_files
from files.layouts import HERE
from files.lora import export_lora, load_lora
from files.merged import merge_to_folder
from files.person import is_person, load_person, save_person
from methods import command_line, hyperdreambooth, textual_inversion
from methods.command_line import PERSONAL, check_kinds
from methods.sitting import folders_of, sit
from methods.table import METHODS
from nano.judge import load_judge
from program.console import UserError
from program.memory import plan_memory
from training.parts import split
from training.photos import known_by, photos_of


def main(args):
    stage = console.Stages(START)
    engine = load(args, stage)
    styles = join(*(load_lora(path, engine.model, strength) for path, strength in args.lora))
    warn_of_prompts(args, engine.model.tokenizer)

    # The people: read from their files, or made from photos
    sittings = [] if args.people else sit(args, engine.model)
    if sittings:
        people, written = make_people(sittings, args, engine, stage)
        sittings = sittings[:len(people)]
    else:
        people, written = [read_person(path, engine) for path in args.people], []
        stage(f"read {', '.join(args.people)}")

    # Their pictures, side by side where that is possible
    adapters = [turned(person, args, engine) for person in people]
    try:
        with engine.model.adapted(styles):
            predicted = draw_prediction(people, args, engine) if sittings and not args.each else []
            pictures = draw(people, adapters, args, engine)
    except KeyboardInterrupt:
        print("\n".join(["stopped before the first picture", *(f"  {path} is written" for path in written)]))
        raise
    stage(f"sampled {len(pictures) + len(predicted)} pictures in {args.sample_steps} steps")

    # The files
    written += write_pictures(predicted, pictures, people, sittings, args, engine.model)
    if args.export or args.merge:
        whole = join(adapters[0], styles) if styles else adapters[0]
        written += write_for_other_programs(people[0], whole, args, engine.model)
    for path in written:
        print(f"  {path}  {path.stat().st_size / 1000:.1f} KB")
    if args.model == "nano" and sittings and not args.each:
        print_likeness(predicted, pictures, sittings[0].seen, args)
    stage(f"done, {time.time() - START:.1f} s in all, seed {args.seed}"
          f"{console.peak_memory(engine.model.device)}")


def arguments():
    """The parsed command line."""
    return command_line.arguments(__doc__)


def load(args, stage):
    """The hdb.HyperDreamBooth around the model, with a hypernetwork if there is one."""
    model = hdb.load(args.model, args.device, args.dtype and getattr(torch, args.dtype))
    file = getattr(args, "hypernet", None)
    if args.model == "nano" and not file:
        file = HERE / "nano/hypernet.safetensors"
    encoder = getattr(args, "face_encoder", None)
    engine = hdb.HyperDreamBooth(model, file and hdb.load_hypernet(file, model, encoder))
    stage(f"loaded {args.model} on {model.device}, {str(model.dtype).removeprefix('torch.')}")
    return engine


def warn_of_prompts(args, tokenizer):
    """Warn of prompts that lack [V] or are too long: once, not at every picture."""
    tokenizer([*map(with_identifier, args.prompts), args.negative])
    warnings.filterwarnings("ignore", "prompt is longer")
    if args.negative and args.guidance == args.person_guidance == 1:
        warnings.warn("--negative has no effect at --guidance 1", stacklevel=1)
    for prompt in args.prompts:
        before, v, _ = canonical(prompt).partition("[V]")
        cut = len(tokenizer.tokens(with_identifier(before + v))) > tokenizer.max_length - 2
        if not v or cut:
            what = "is cut and does not say [V] before that" if v else "does not say [V]"
            warnings.warn(f'the prompt "{prompt}" {what}, so it will not show the person', stacklevel=1)


def make_people(sittings, args, engine, stage):
    """Each sitting's Person, by --method, and the paths of their files. It rounds tensors to half precision,
    as in the file, so the file gives the same pictures. UserError for NaN or infinity."""
    method, people, written = METHODS[args.method], [], []
    folders = folders_of(sittings, args) if args.each else [args.out]
    together = args.side_by_side if method.several else 1
    for some, outs in zip(split(sittings, together), split(folders, together)):
        # Plan the memory and make these people, side by side
        photos = torch.stack([sitting.seen for sitting in some]).to(engine.model.device)
        generators = [hdb.seeded(args.seed) for _ in some]
        noises = getattr(args, "batch", 1) * len(some) * (2 if getattr(args, "prior_weight", 0) else 1)
        plan = plan_memory(engine.model, noises, Change in method.kinds(args))
        if args.model != "nano":
            print(f"         {plan}")
        made = method.make(engine, photos, generators, args, stage)
        if not all(map(finite, made.tensors.values())):
            raise UserError(f"fine-tuning ended in infinite numbers; lower --lr, which is {args.lr:g}")

        # Save each of them
        for i, (sitting, out) in enumerate(zip(some, outs)):
            rounded = {name: t[i:i + 1].half().float() for name, t in made.tensors.items()}
            person = replace(made, tensors=rounded, photos=" ".join(sorted(known_by(sitting.paths))))
            written += save(person, engine, out)
            people.append(person)
        if stage.stopped and len(people) < len(sittings):
            print(f"         only {len(people)} of {len(sittings)} people are done; drawing them")
            break
    return people, written


def save(person, engine, out):
    """Write a new person in its method's parts, and remove other old parts. Returns the paths."""
    parts = {f"{name}.safetensors": part for name, part in person.method.parts(person).items()}
    with whole_files(*(out / name for name in parts)) as temporary:
        for part, new in zip(parts.values(), temporary):
            save_person(part, engine, new)
        for name in set(PERSONAL) - parts.keys():
            (out / name).unlink(missing_ok=True)
    return [out / name for name in parts]


def read_person(path, engine):
    """The Person in a personal file, or in an embedding of textual inversion, from any program."""
    if is_person(path):
        person = load_person(path, engine, METHODS)
    else:
        person = textual_inversion.load_embedding(path, engine.model)
    return replace(person, photos=" ".join(photos_of(path)))


def turned(person, args, engine):
    """The person's adapters at --strength and at the method's own settings. UserError if impossible."""
    adapters = person.adapters(engine)
    check_kinds(args, {type(adapter) for adapter in adapters.values()})
    if args.strength != 1:
        adapters = scale(adapters, args.strength)
    return METHODS[args.method].at_sampling(adapters, args, engine)


def sample(prompt, people, adapters, seeds, args, engine, bar):
    """One picture of each person, (P, 3, H, W). Each step of the sampler moves the bar."""
    prompts = [with_identifier(prompt, person.identifier) for person in people]
    return engine.sample(prompts, adapters, seeds, steps=args.sample_steps, guidance=args.guidance,
                         negative=args.negative, person_guidance=args.person_guidance,
                         sampler=SAMPLERS[args.sampler], callback=lambda *step: console.advance(bar))


def draw_prediction(people, args, engine):
    """The picture (1, 3, H, W) of the first person's prediction alone; [] without a prediction."""
    alone = hyperdreambooth.prediction(people[0])
    if not alone.tensors:
        return []
    with tqdm(total=args.sample_steps, desc="the prediction alone", leave=False) as bar:
        return sample(hdb.PROMPT, [alone], alone.adapters(engine), [args.seed], args, engine, bar)


def draw(people, adapters, args, engine):
    """Every prompt's picture of every person: (prompts · P, 3, H, W); after Ctrl-C the finished ones, if any.
    UserError for NaN."""
    numbers = list(range(len(people)))
    groups = [([i], adapters[i]) for i in numbers]
    if all(isinstance(adapter, LowRank) for own in adapters for adapter in own.values()):
        groups = [(few, stack([adapters[i] for i in few])) for few in split(numbers, args.side_by_side)]
    pictures, total = [], len(args.prompts) * len(groups) * args.sample_steps
    try:
        with tqdm(total=total, desc="sampling", leave=False) as bar:
            for i, prompt in enumerate(args.prompts):
                for few, own in groups:
                    seeds = [args.seed + i * len(people) + k for k in few]
                    pictures.append(sample(prompt, [people[k] for k in few], own, seeds, args, engine, bar))
    except KeyboardInterrupt:
        if not pictures:
            raise
        print("         stopped; the pictures that are finished are written")
    pictures = torch.cat(pictures)
    if not pictures.isfinite().all():
        raise UserError("a picture came out as NaN: the personal weights, --strength or --guidance are too "
                        "large for this model or dtype")
    return pictures


def settings_of(sittings, args, model):
    """name -> value of every setting that changes this run's pictures."""
    settings = {"model": args.model, "sampler": args.sampler, "steps": args.sample_steps,
                "guidance": args.guidance, "person guidance": args.person_guidance,
                "negative": args.negative, "strength": args.strength,
                "dtype": str(model.dtype).removeprefix("torch.")}
    if args.lora:
        settings["lora"] = ", ".join(f"{path}:{strength:g}" for path, strength in args.lora)
    if sittings and sittings[0].saw:
        settings["saw"] = sittings[0].saw
    if sittings:
        rows = METHODS[args.method].options(args.model, getattr(args, "hypernet", None))
        tuning = {row.name: getattr(args, row.more.get("dest", row.name)) for row in rows}
        settings |= {"crop": sittings[0].crop, "method": args.method,
                     "hypernet": tuning.pop("hypernet", None) or "the model's own, if any",
                     "encoder": tuning.pop("encoder", None) or "the method's own, if any",
                     "fine-tuning": ", ".join(f"{name} {value}" for name, value in tuning.items())}
    return settings


def write_pictures(predicted, pictures, people, sittings, args, model):
    """Write all pictures and their sheet with the settings of the run. Returns the paths."""
    settings, paths = settings_of(sittings, args, model), [args.out / "sheet.png"]
    whose = args.people or [", ".join(sitting.paths) for sitting in sittings]
    photos = [person.photos for person in people]
    for i, picture in enumerate(pictures):
        paths.append(args.out / f"{i}.png")
        who, prompt = i % len(people), args.prompts[i // len(people)]
        images.save(images.to_pil(picture), paths[-1], prompt=prompt, person=whose[who], photos=photos[who],
                    seed=args.seed + i, **settings)
    shown = [x for sitting in sittings for x in (sitting.shown, sitting.seen) if x is not None]
    if args.each:
        shown = [torch.cat([sitting.seen for sitting in sittings])]
    every = torch.cat([x.cpu() for x in (*shown, predicted, pictures) if len(x)])
    heads = heads_of(sittings[0], predicted, args.prompts) if sittings and not args.each else whose
    images.save(images.sheet(every, len(heads), heads), paths[0], prompt=" | ".join(args.prompts),
                person=" | ".join(whose), photos=" ".join(photos), seed=args.seed, **settings)
    return paths


def heads_of(sitting, predicted, prompts):
    """The column heads of one person's sheet."""
    photos, drawn = (sitting.seen, []) if sitting.shown is None else (sitting.shown, ["drawn"])
    return ["photo"] * len(photos) + drawn + ["prediction alone"] * len(predicted) + prompts


def write_for_other_programs(person, adapters, args, model):
    """Write a person with these adapters as --export and --merge ask. Returns the files' paths."""
    word, paths = person.identifier, []
    if args.export:
        paths.append(args.out / f"{args.export}.safetensors")
    if args.export == "lora":
        export_lora(adapters, paths[0], {"modelspec.trigger_phrase": word, "photos": person.photos})
    if args.export == "embedding":
        word = textual_inversion.TOKEN
        textual_inversion.save_embedding(person.tensors, paths[0], photos=person.photos)
    if args.merge:
        source = args.model if Path(args.model).is_dir() and args.model != "nano" else None
        merge_to_folder(model, adapters, source, args.merge, few_steps=args.sampler == "lcm")
        print(f"  {args.merge}/  the model with the person merged in")
    print(f'  in other programs the prompt says "{word}" where it says [V] here')
    return paths


def print_likeness(predicted, pictures, seen, args):
    """Print the mean likeness of each picture to the photos, by nano's judge."""
    drawn, judge = torch.stack([*predicted, *pictures]).cpu(), load_judge()
    scores = torch.stack([judge.likeness(drawn, one.expand_as(drawn)) for one in seen.cpu()]).mean(0)
    for name, score in zip(["prediction alone"] * len(predicted) + args.prompts, scores.tolist()):
        print(f"  likeness {score:+.2f}  {name}")


if __name__ == "__main__":
    console.run(lock.alone(main, lambda args: args.out), arguments)

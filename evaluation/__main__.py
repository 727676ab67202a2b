"""The paper's experiment again: every system on the same people, prompts and noises.

    python -m evaluation                # on nano: 32 test people, 18 pictures each, and the curves; hours
    python -m evaluation --quick            # 1 to 4 people, 13 pictures each, no curves: ten minutes
    python -m evaluation --rows "Only Hyper" Perfusion --people 8
    python -m evaluation --model stable-diffusion-v1-5/stable-diffusion-v1-5 --faces photos/

On nano the judge and the instrument measure who is in each picture and what it shows (evaluation/scores.py);
other models get the paper's metrics. --out gets scores.csv, a line for each picture; costs.csv, seconds and
bytes for one person alone; and made from these, tables.md, figures, and a grid of pictures of the first
people for each table. It never measures a line twice: the same command resumes a stopped run, and other rows
can follow. It reports a row that fails, and runs the next one.
"""
import itertools
import json
from pathlib import Path

from program import console
from program.lock import alone
from program.memory import fitting

import torch
from tqdm import tqdm

import hdb
from evaluation import experiment, figures, report, systems
from evaluation.scores import Judged, Paper
from files.checkpoints import checksum
from files.disk import read_json, write_text
from files.encoders import loaded
from files.layouts import HERE, model_name
from program.options import (Option, early, folder_of_faces, model_rows, new_folder, number, old_file,
                             parser_of, same)
from training.parts import differences
from training.photos import check_outside, content, photo_files, read_photos


def main(args):
    print(f"results go to {args.out}/")
    model = hdb.load(args.model, args.device, args.dtype and getattr(torch, args.dtype))
    nano = args.model == "nano"
    file = args.hypernet or (HERE / "nano/hypernet.safetensors" if nano else None)
    method = hdb.HyperDreamBooth(model, file and hdb.load_hypernet(file, model))
    scores = Judged(args.people, model.device) if nano else paper(args, model)
    check_run(args, method, {} if nano else measured_by(args, scores))
    jobs = able(chosen(args), nano, method)
    keep_encoder(jobs, method)

    # Every system fits every person, and draws them under every prompt
    side = systems.PEOPLE if nano else 1
    settings = experiment.Settings(args.sample_steps, args.guidance, side, args.out)
    names = [*scores.few, *scores.more] if args.quick else [*scores.prompts]
    people = torch.arange(len(scores.photos))
    work = [(job, group, names) for job in jobs
            for group in experiment.groups(people[:job.quick] if args.few else people,
                                           fitting(model, job.noises, job.people))]
    if args.curves:
        few = people[:systems.PEOPLE]
        work += [(job, group, [*scores.few]) for job in systems.curves() for group in few.split(job.people)]
    table = experiment.Table(args.out / "scores.csv", len(experiment.KEY), (*experiment.KEY, *scores.names))
    costs = experiment.Table(args.out / "costs.csv", 1, ("system", "seconds", "bytes"))
    failed = all_of(work, method, scores, table, costs, settings)

    # Costs of systems that an earlier call scored without measuring them
    for job in tqdm(jobs, desc="costs"):
        if (job.system,) not in costs and job.system not in failed:
            experiment.fit(job, torch.tensor([0]), method, scores.photos, costs)
    found = report.write(args.out, scores)
    for path in (args.out / "tables.md", *figures.write(args.out, found, scores)):
        print(f"  {path}")
    print((args.out / "tables.md").read_text(encoding="utf-8"))
    if failed:
        raise console.UserError(f"{', '.join(failed)}: failed, see above; the same command tries again")


def all_of(work, *rest):
    """Measure all of `work`. Returns system -> error for those that failed, whose other work it skips."""
    failed = {}
    with tqdm(total=sum(len(group) for _, group, _ in work), unit="person") as bar:
        for job, group, names in work:
            bar.set_description(" ".join(map(str, (job.system, job.knob, *job.values[:1]))))
            try:
                if job.system not in failed:
                    experiment.measure(job, group, names, *rest)
            except (RuntimeError, ValueError) as error:
                failed[job.system] = error
                tqdm.write(console.one_line(f"{job.system}: {error}"))
            bar.update(len(group))
    return failed


def measured_by(args, scores):
    """name -> what else the numbers for photos depend on, wherever it lies."""
    return {"faces": content(photo_files(args.faces)), "quick": args.quick, "clip": checksum(scores.clip),
            "dino": checksum(scores.dino)}


def check_run(args, method, more):
    """Write what the numbers depend on, `more` included, to run.json, or compare. UserError if a setting
    differs."""
    settings = {"model": args.model, "hypernet": checksum(method.hypernet) if method.hypernet else "none",
                "dtype": str(method.model.dtype).removeprefix("torch."), "faces": None,
                "sampling steps": args.sample_steps, "guidance": args.guidance} | more
    ours = {name: str(value) for name, value in (method.model.checksums | settings).items()}
    file = args.out / "run.json"
    args.out.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        write_text(json.dumps(ours, indent=2) + "\n", file)
    elif differ := differences(read_json(file) | {"model": args.model}, ours):  # its name may differ
        raise console.UserError(f"{args.out}: other settings there ({'; '.join(differ)}); give another --out")


def paper(args, model):
    """The paper's metrics, for the first photos of the folder."""
    side = 8 * model.unet.config.sample_size
    photos = [*itertools.islice(read_photos(args.faces, side), args.people)]
    return Paper(torch.stack(photos).to(model.device), args.clip, args.dino, model.device)


def chosen(args):
    """The jobs that --rows names; all without --rows, none for an empty one. UserError for an unknown row."""
    jobs = systems.rows(args.model == "nano", args.quick)
    names = [job.system for job in jobs]
    if unknown := set(args.rows or ()) - set(names):
        raise console.UserError(f"--rows {', '.join(sorted(unknown))}: there are {', '.join(names)}")
    return [job for job in jobs if job.system in (names if args.rows is None else args.rows)]


def able(jobs, nano, method):
    """The jobs that have what they need. It prints which it leaves out."""
    there = {"": True, "hypernet": method.hypernet is not None, "encoder": nano}
    for job in jobs:
        if not there[job.needs]:
            print(f"{job.system}: left out, because {method.model.name} has no {job.needs}")
    return [job for job in jobs if there[job.needs]]


def keep_encoder(jobs, method):
    """Load the hypernetwork's encoder of photos for the whole run, if a job predicts. Otherwise every group
    of people would read an official one again, within the seconds that a person takes."""
    if any(job.needs == "hypernet" for job in jobs):
        method.hypernet.vit = loaded(method.hypernet.vit, method.model.device)


def arguments():
    model = model_name(early("model").model or "nano")
    parser = parser_of(__doc__, [
        *model_rows(model_name), folder_of_faces(model),
        same("quick", None, False, "few people, fewer prompts, no curves; on other models than nano "
             "a twentieth of all steps", action="store_true"),
        same("people", number(int, 1, 10 ** 6), None, "how many; default: 32, or with --quick 1, and "
             "4 of nano's for systems that take seconds"),
        same("rows", str, None, "systems to measure, without curves; with no name, the curves alone; "
             "default: all, with curves", nargs="*"),
        same("no-curves", None, True, "measure the tables alone", action="store_false", dest="curves"),
        same("hypernet", old_file, None, "file of train.py, to predict with; default: nano's own; other "
             "models then leave out the systems that predict"),
        Option("sample_steps", number(int, 1, 999), 15, 30, "steps of the sampler"),
        Option("guidance", number(float, -100, 100), 2., 7.5, "scale of the sampler's guidance"),
        same("clip", str, "openai/clip-vit-large-patch14", "CLIP for CLIP-I and CLIP-T"),
        same("dino", str, "facebook/dino-vits16", "ViT for DINO"),
        same("out", new_folder, None, "folder of the results; default: results/ (runs/quick with --quick) "
             "for nano, else runs/evaluation_ and the model's name")], model)
    args = parser.parse_args()
    nano = args.model == "nano"
    args.curves = args.curves and nano and not (args.quick or args.rows)
    args.few = args.quick and nano and not args.people
    args.people = args.people or (4 if args.few else 1 if args.quick else 32)
    named = "results" if nano else f"runs/evaluation_{Path(args.model).stem}"
    args.out = args.out or Path("runs/quick" if args.quick and nano else named + "_quick" * args.quick)
    check_before_loading(parser, args)
    return args


def check_before_loading(parser, args):
    """Refuse unknown rows, missing photos and another model's --out before gigabytes are loaded."""
    chosen(args)
    if args.faces:
        photo_files(args.faces)
        check_outside(args.out, args.faces)
    if (args.out / "run.json").exists():
        there = read_json(args.out / "run.json").get("model", "nano")
        if there != args.model and "nano" in (there, args.model):
            parser.error(f"--out {args.out} has results of {there}; give another folder")


if __name__ == "__main__":
    console.run(alone(main, lambda args: args.out), arguments)

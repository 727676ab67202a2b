"""The paper's experiment, measured again: every system on the same people, prompts and noises.

    python -m evaluation             # on nano: 32 test people, 11 prompts, and the curves; hours on two cores
    python -m evaluation --quick         # 1 person, 6 prompts, no curves: ten minutes
    python -m evaluation --rows "Only Hyper" Perfusion --people 8
    python -m evaluation --model stable-diffusion-v1-5/stable-diffusion-v1-5 --faces photos/

On nano the judge says of every picture whose it is and in which style (evaluation/scores.py); elsewhere the
paper's metrics are computed. --out gets scores.csv, a line for each picture; costs.csv, seconds and bytes of
one person alone; and from these tables.md, scatter.png and, with pictures of the first people, a grid for
each table. What is measured already is not measured again: a run that was stopped goes on by the same
command, and other rows can be added.
"""
import csv
import itertools
import json
import math
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from program import console

import torch
from tqdm import tqdm

import hdb
from evaluation import report, systems
from evaluation.scores import Judged, Paper
from files import images
from files.checkpoints import checksum, read_json, refusing, write_text
from files.layouts import HERE, model_name
from training.parts import differences
from files.person import save_person
from training.photos import read_photos
from nano import seeds
from nano.people import HeldOut

CURVE_PROMPTS = "photo", "pixar", "bark", "rock star", "professional", "king"  # nano's, of curves and --quick
NUMBERS = {"sample_steps": (15, 30, 1, 999, "of the sampler"),
           "guidance": (2., 7.5, -100, 100, "of the sampler")}
SHOWN = 4  # people whose pictures are kept for the grids


def main(args):
    model = hdb.load(args.model, args.device, args.dtype and getattr(torch, args.dtype))
    nano = args.model == "nano"
    file = args.hypernet or (HERE / "nano/hypernet.safetensors" if nano else None)
    method = hdb.HyperDreamBooth(model, file and hdb.load_hypernet(file, model))
    single = args.single and hdb.HyperDreamBooth(model, hdb.load_hypernet(args.single, model))
    photos = drawn(args.people, model.device) if nano else faces(args, model)
    scores = Judged(model.device) if nano else Paper(args.clip, args.dino, model.device)
    jobs = chosen(args, systems.rows(nano, single))
    check_run(args, method)

    # every system makes every person, every person is drawn by every prompt
    prompts = [*scores.prompts]
    if args.quick:
        prompts = [name for name in prompts if name in CURVE_PROMPTS] if nano else prompts[:6]
    work = [(job, group, prompts) for job in jobs for group in groups(len(photos), job.people)]
    if args.curves:
        few = torch.arange(min(len(photos), systems.PEOPLE))
        work += [(job, few, CURVE_PROMPTS) for job in systems.curves()]
    table = Table(args.out / "scores.csv", 5, ("system", "knob", "value", "person", "prompt", *scores.names))
    costs = Table(args.out / "costs.csv", 1, ("system", "seconds", "bytes"))
    with tqdm(total=sum(len(group) for _, group, _ in work), unit="person") as bar:
        for job, group, some in work:
            bar.set_description(" ".join(map(str, (job.system, job.knob, *job.values[:1]))))
            measure(job, group, some, method, photos, scores, table, costs, args)
            bar.update(len(group))

    # what was measured by another call, without costs
    for job in tqdm(jobs, desc="costs"):
        if (job.system,) not in costs:
            fit(job, torch.tensor([0]), method, photos, costs)
    for path in report.write(args.out, scores):
        print(f"  {path}")
    print((args.out / "tables.md").read_text(encoding="utf-8"))


def groups(count, size):
    """Of so many people the first alone, to be timed, the others side by side."""
    return [group for group in (torch.arange(1), *torch.arange(1, count).split(size)) if len(group)]


@torch.no_grad()
def measure(job, group, prompts, method, photos, scores, table, costs, args):
    """Fit the people of `group` by one system, sample every prompt at every value of its knob, and add the
    scores to the table."""
    keys = {(job.system, job.knob, value, person, prompt)
            for value in job.values for person in group.tolist() for prompt in prompts}
    if all(key in table for key in keys):
        return
    adapters = fit(job, group, method, photos, costs).adapters(method)
    for value in job.values:
        mine = job.turn(adapters, value)
        for prompt in prompts:
            # everybody's noise depends on the prompt and on who it is alone
            noises = [1000 * list(scores.prompts).index(prompt) + who for who in group.tolist()]
            pictures = method.sample([scores.prompts[prompt]] * len(group), mine, noises,
                                     steps=args.sample_steps, guidance=args.guidance)
            found = scores(pictures, photos[group, job.judged_by], prompt)
            for i, who in enumerate(group.tolist()):
                numbers = (found[name][i].item() for name in scores.names)
                table.add((job.system, job.knob, value, who, prompt, *numbers))
                if who < SHOWN and not job.knob:
                    file = report.picture(args.out, job.system, who, prompt)
                    images.save(images.to_pil(pictures[i]), file)
    for who in group.tolist():
        if who < SHOWN:
            file = report.picture(args.out, "photo", who, "")
            images.save(images.to_pil(photos[who, 0]), file, generated=False)


def fit(job, group, method, photos, costs):
    """The Person of P people; of one alone, seconds and the file's bytes are added to `costs`."""
    start = time.perf_counter()
    given = photos[group, 0] if job.photos == 1 else photos[group, :job.photos]
    person = job.fit(method, given, torch.Generator().manual_seed(int(group[0])))
    seconds, size = time.perf_counter() - start, 0
    if len(group) == 1 and not job.knob:
        if person.stored():
            with TemporaryDirectory() as folder:
                save_person(person, method, Path(folder, "person"))
                size = Path(folder, "person").stat().st_size
        costs.add((job.system, seconds, size))
    return person


class Table:
    """A CSV file that grows by a line at a time. The first `key` columns, as text, say what a line is of,
    numbers follow; what has a line is `in` the table. The last line, if it was cut off, is measured again.
    UserError for a file with other columns, or lines that make no sense."""

    def __init__(self, path, key, columns):
        self.path, self.key, rows = path, key, []
        if path.exists():
            with refusing(f"{path}: damaged; mend it, or give another folder with --out"):
                whole, end, cut = path.read_bytes().decode().rpartition("\n")
                rows = [tuple(row) for row in csv.reader(whole.splitlines())]
                if rows[:1] != [columns]:
                    raise console.UserError(f"{path}: has other columns; give another folder with --out")
                if any(len(row) != len(columns) or not all(map(math.isfinite, map(float, row[key:])))
                       for row in rows[1:]):
                    raise ValueError("a line is no row of numbers")
            if cut:
                write_text(whole + end, path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.write(columns)
        self.known = {row[:key] for row in rows}

    def __contains__(self, key):
        return texts(key) in self.known

    def add(self, row):
        """Add a line, unless there is one of its kind."""
        row = texts(row)
        if row[:self.key] not in self.known:
            self.known.add(row[:self.key])
            self.write(row)

    def write(self, row):
        with open(self.path, "a", newline="", encoding="utf-8") as f:
            csv.writer(f).writerow(row)


def texts(row):
    return tuple(f"{x:.5g}" if isinstance(x, float) else str(x) for x in row)


def check_run(args, method):
    """Write what the numbers depend on to run.json, or compare. UserError where they are another run's."""
    settings = {"hypernet": checksum(method.hypernet) if method.hypernet else "none",
                "sampling steps": args.sample_steps, "guidance": args.guidance, "faces": args.faces}
    ours = {name: str(value) for name, value in (method.model.checksums | settings).items()}
    file = args.out / "run.json"
    args.out.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        write_text(json.dumps(ours, indent=2) + "\n", file)
    elif differ := differences(read_json(file), ours):
        raise console.UserError(f"{args.out}: measured otherwise ({'; '.join(differ)}); give another --out")


def drawn(people, device):
    """Photos (P, N, 3, H, W) of test people; the curve over photos needs all."""
    held = HeldOut(people, device, seeds.TEST)
    return torch.cat([held.photos[:, None], held.more_photos(systems.PHOTOS)], 1)


def faces(args, model):
    """The first photos (P, 1, 3, H, W) of the folder."""
    side = 8 * model.unet.config.sample_size
    return torch.stack([*itertools.islice(read_photos(args.faces, side), args.people)]).to(model.device)


def chosen(args, jobs):
    """The jobs that --rows names, all if it isn't given, none if it names nothing."""
    names = [job.system for job in jobs]
    if unknown := set(args.rows or ()) - set(names):
        raise console.UserError(f"--rows {', '.join(sorted(unknown))}: there are {', '.join(names)}")
    return [job for job in jobs if job.system in (names if args.rows is None else args.rows)]


def arguments():
    parser = console.model_parser(__doc__, model_name)
    parser.add_argument("--faces", help="folder of photos, one person each, for a model other than nano")
    parser.add_argument("--quick", action="store_true", help="1 person, 6 prompts; to runs/quick")
    parser.add_argument("--people", type=int, help="how many; 32 if not given")
    parser.add_argument("--rows", nargs="*", help="of the tables; all if not given; of nothing: curves alone")
    parser.add_argument("--no-curves", dest="curves", action="store_false", help="the tables alone")
    parser.add_argument("--hypernet", help="file of train.py, to predict with; nano brings its own")
    parser.add_argument("--single", help='file of train.py --iterations 1, for the row "k = 1"')
    console.add_numbers(parser, NUMBERS)
    parser.add_argument("--clip", default="openai/clip-vit-large-patch14", help="of CLIP-I and CLIP-T")
    parser.add_argument("--dino", default="facebook/dino-vits16", help="of DINO")
    parser.add_argument("--out", type=Path, help="folder of the results; results/ if not given")
    args = parser.parse_args()
    console.check_faces(parser, args)
    console.complete_numbers(parser, args, NUMBERS)
    console.check_ranges(parser, args, people=(1, 10 ** 6))
    args.curves = args.curves and args.model == "nano" and not (args.quick or args.rows)
    args.people = args.people or (1 if args.quick else 32)
    args.out = args.out or Path("runs/quick" if args.quick else "results")
    console.check_folder(parser, "--out", args.out)
    return args


if __name__ == "__main__":
    console.run(main, arguments)

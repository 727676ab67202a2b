"""The experiment for one system: fit people, draw every prompt, score the pictures, add a line for each to a
table. Each person has their own generator and noises, so no result depends on the other people."""
import csv
import math
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from tqdm import tqdm

from evaluation import report
from files import images
from files.disk import read_text, refusing, write_text
from files.person import save_person
from program import console
from program.memory import plan_memory
from training.parts import split

SHOWN = 4  # people whose pictures are kept for the grids
KEY = "system", "knob", "value", "person", "prompt"


class Settings(NamedTuple):
    """The sampler's steps and guidance; pictures to draw side by side; the folder of the results."""
    sample_steps: int
    guidance: float
    side: int
    out: Path


def groups(people, size):
    """The people (P,) in groups of at most this size; the first person is alone, to be timed."""
    return [group for group in (people[:1], *people[1:].split(size)) if len(group)]


@torch.no_grad()
def measure(job, group, names, method, scores, table, costs, settings):
    """Fit the people of `group` by one system, draw the prompts of these names at every value of its knob,
    and add the scores to the table. It does nothing if they are all there."""
    keys = {(job.system, job.knob, value, person, name)
            for value in job.values for person in group.tolist() for name in names}
    if all(key in table for key in keys):
        return
    adapters = fit(job, group, method, scores.photos, costs).adapters(method)
    for value in job.values:
        pictures = draw(method, job.turn(adapters, value), group, names, scores, settings)
        drawn = [(name, who) for name in names for who in group.tolist()]
        found = scores(pictures, drawn)
        for i, (name, who) in enumerate(drawn):
            table.add((job.system, job.knob, value, who, name, *(found[score][i] for score in scores.names)))
            if who < SHOWN and not job.knob:
                keep(pictures[i], settings.out, job.system, who, name)
    for who in group.tolist():
        if who < SHOWN:
            keep(scores.photos[who, 0], settings.out, "photo", who, "")


def keep(picture, out, system, who, name):
    """Save a picture for the grids."""
    file = report.picture(out, system, who, name)
    images.save(images.to_pil(picture), file, generated=system != "photo")


def fit(job, group, method, photos, costs=None):
    """The Person of a group of people (P,). For one person alone it adds seconds and bytes to `costs`."""
    start = time.perf_counter()
    given = photos[group, 0] if job.photos == 1 else photos[group, :job.photos]
    generators = [torch.Generator().manual_seed(who) for who in group.tolist()]
    plan_memory(method.model, len(group) * job.noises, job.whole)
    person = job.fit(method, given, generators)
    seconds, size = time.perf_counter() - start, 0
    if costs is not None and len(group) == 1 and not job.knob:
        if person.tensors:
            with TemporaryDirectory() as folder:
                save_person(person, method, Path(folder, "person"))
                size = Path(folder, "person").stat().st_size
        costs.add((job.system, seconds, size))
    return person


def draw(method, adapters, group, names, scores, settings):
    """Pictures (prompts · P, 3, H, W), from noise that depends on the prompt and the person alone."""
    listed, pictures = [*scores.prompts], []
    batches = split(names, max(1, settings.side // len(group)))
    total = len(batches) * settings.sample_steps
    with tqdm(total=total, desc="steps of pictures", leave=False, delay=2) as bar:
        for batch in batches:
            each = [(name, who) for name in batch for who in group.tolist()]
            noises = [1000 * listed.index(name) + who for name, who in each]
            prompts = [scores.prompts[name] for name, _ in each]
            pictures.append(method.sample(prompts, adapters, noises, steps=settings.sample_steps,
                                          guidance=settings.guidance,
                                          callback=lambda *step: console.advance(bar)))
    return torch.cat(pictures)


class Table:
    """A CSV file that grows line by line. The first `key` columns identify a line, the others are numbers or
    empty. It drops a last line that was cut off. UserError for other columns, or damaged lines."""

    def __init__(self, path, key, columns):
        self.path, self.key, rows = path, key, []
        if path.exists():
            with refusing(f"{path}: damaged; mend it, or give another folder with --out"):
                whole, end, cut = read_text(path).rpartition("\n")
                rows = [tuple(row) for row in csv.reader(whole.splitlines())]
                if rows[:1] != [tuple(columns)]:
                    raise console.UserError(f"{path}: has other columns; give another folder with --out")
                numbers = [cell for row in rows[1:] for cell in row[key:] if cell]
                if any(len(row) != len(columns) for row in rows) or not all(
                        math.isfinite(float(cell)) for cell in numbers):
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
        """Add a line, unless its key is there."""
        row = texts(row)
        if row[:self.key] not in self.known:
            self.known.add(row[:self.key])
            self.write(row)

    def write(self, row):
        with open(self.path, "a", newline="", encoding="utf-8") as f:
            csv.writer(f).writerow(row)


def texts(row):
    """A row's cells as text: numbers with five digits, None as ""."""
    return tuple("" if x is None else f"{x:.5g}" if isinstance(x, float) else str(x) for x in row)

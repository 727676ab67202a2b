"""Long work in parts, each in a file that is made once: stopped work resumes, in any number of processes."""
import time
from pathlib import Path

import torch
from tqdm import tqdm

from program import distributed
from files.checkpoints import Tensors, alike, check_numbers, write
from files.disk import LoadError
from program.console import Stopped, deferred_stop


def differences(there, here):
    """In words, the differences of two dicts name -> text."""
    return [f"{name} {there.get(name, 'not known')} there, {here.get(name, 'none')} here"
            for name in here | there if not alike(there.get(name), here.get(name))]


def split(things, size):
    """A list as lists of this size; the last may be shorter."""
    return [things[i:i + size] for i in range(0, len(things), size)]


def cached(folder, parts, depends_on, shapes, make, what, deadline=float("inf")):
    """The files of all `parts` in this folder. make(part) -> tensors makes missing ones; of several
    processes, each makes a share. depends_on: name -> what the parts depend on; shapes: name -> shape of a
    row of each tensor. LoadError for files that depend on something else or are damaged. Stopped, after a
    part, by a signal or the deadline (time.time())."""
    rank, size = distributed.rank_and_size()
    files = [Path(folder, f"{i:05d}.safetensors") for i in range(len(parts))]
    depends_on = {name: str(value) for name, value in depends_on.items()} | {"parts": str(len(parts))}
    check(files, depends_on, shapes)

    def stopped(signum):
        done = sum(file.exists() for file in files)
        where = f"stopped with {what}, {done} of {len(parts)} parts"
        return Stopped(signum, f"{where}; the same command resumes it")
    late = False
    with deferred_stop() as stop:
        for i, (file, part) in enumerate(zip(tqdm(files, desc=what, disable=rank > 0), parts)):
            if not file.exists() and i % size == rank:
                if late := time.time() > deadline:
                    break
                write(make(part), file, depends_on)
            if stop:
                raise stopped(stop[0])
    if distributed.greatest(late):  # waits for all processes
        raise stopped(0)
    check(files, depends_on, shapes)  # the files of other processes too
    return files


def check(files, depends_on, shapes):
    """LoadError if an existing file depends on something else, or if its tensors are not rows of these
    shapes, equally many of each. A file may be without tensors."""
    for file in filter(Path.exists, files):
        part = Tensors(file)
        if differ := differences(part.note, depends_on):
            others = "; ".join(differ)
            raise LoadError(f"{file}: made for others ({others}); remove its folder, or use those settings")
        rows = next(iter(part.shapes.values()), ())[:1]
        if part.shapes and part.shapes != {name: rows + tuple(row) for name, row in shapes.items()}:
            raise LoadError(f"{file}: damaged, has tensors {part.shapes}; remove it to have it made again")


def load_all(files, name):
    """The tensors of this name in all files, concatenated. UserError for NaN or infinity."""
    parts = {file: Tensors(file)[name] for file in files}
    for file, tensor in parts.items():
        check_numbers({name: tensor}, file)
    return torch.cat([*parts.values()])

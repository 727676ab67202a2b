"""Long work in parts, each a file, made once: stopped, killed, or of several processes, it goes on."""
import time
from pathlib import Path

import torch
from tqdm import tqdm

from program import distributed
from files.checkpoints import Tensors, alike, check_numbers, write
from files.disk import LoadError
from program.console import Stopped, deferred_stop


def differences(there, here):
    """In words, what of two dicts, name -> text, differs or stands in one alone."""
    return [f"{name} {there.get(name, 'not known')} there, {here.get(name, 'none')} here"
            for name in here | there if not alike(there.get(name), here.get(name))]


def split(things, size):
    """A list in lists of this size, the last as long as it is."""
    return [things[i:i + size] for i in range(0, len(things), size)]


def cached(folder, parts, depends_on, shapes, make, what, deadline=float("inf")):
    """The files of all `parts` in this folder, made where they aren't there yet: make(part) -> tensors.
    Each of several processes makes some of them.

    depends_on: name -> what they depend on; shapes: name -> shape of a row of each tensor; LoadError where
    files are of something else, or damaged. Stopped, after a part, by a signal or deadline (time.time())."""
    rank, size = distributed.rank_and_size()
    files = [Path(folder, f"{i:05d}.safetensors") for i in range(len(parts))]
    depends_on = {name: str(value) for name, value in depends_on.items()} | {"parts": str(len(parts))}
    check(files, depends_on, shapes)

    def stopped(signum):
        done = sum(file.exists() for file in files)
        return Stopped(signum, f"stopped with {what}, {done} of {len(parts)} parts; the same command goes on")
    late = False
    with deferred_stop() as stop:
        for i, (file, part) in enumerate(zip(tqdm(files, desc=what, disable=rank > 0), parts)):
            if not file.exists() and i % size == rank:
                if late := time.time() > deadline:
                    break
                write(make(part), file, depends_on)
            if stop:
                raise stopped(stop[0])
    if distributed.greatest(late):  # known when all are here
        raise stopped(0)
    check(files, depends_on, shapes)  # what the others have made meanwhile, of what they see
    return files


def check(files, depends_on, shapes):
    """LoadError where one of those files that are there was made of something else, or has other tensors than
    these, as many rows of each; without rows it may be without tensors."""
    for file in filter(Path.exists, files):
        part = Tensors(file)
        if differ := differences(part.note, depends_on):
            others = "; ".join(differ)
            raise LoadError(f"{file}: made for others ({others}); remove its folder, or go on as before")
        rows = next(iter(part.shapes.values()), ())[:1]
        if part.shapes and part.shapes != {name: rows + tuple(row) for name, row in shapes.items()}:
            raise LoadError(f"{file}: damaged, has tensors {part.shapes}; remove it, and it is made again")


def load_all(files, name):
    """The tensor of this name in all files, one after the other. UserError for NaN or infinity."""
    parts = {file: Tensors(file)[name] for file in files}
    for file, tensor in parts.items():
        check_numbers({name: tensor}, file)
    return torch.cat([*parts.values()])

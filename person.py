"""One person in a file.

    save_person(person, method, "me.safetensors")
    person = load_person("me.safetensors", method)
    pictures = method.sample(["a [V] face as a king"], person.factors(method.lidb))

A personal file holds LiDB's numbers and, after rank-relaxed fine-tuning, a LoRA beside them. export.py takes the person to other programs.
"""
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

import checkpoints
from checkpoints import write
from console import UserError
from hdb import IDENTIFIER
from lidb import join, scale

FORMAT, VERSION = "hdb-person", "1"


class PersonError(UserError):
    """What is wrong with a personal file or a LoRA and what to do about it, in one line for the user."""


@dataclass
class Person:
    """One person: LiDB's `theta` (1, layers, r(a + b)), float32, or None, and the LoRA factors `relaxed` of the fine-tuning, or {}."""
    theta: torch.Tensor | None = None
    relaxed: dict = field(default_factory=dict)
    basis_seed: int = 0               # of the LiDB that theta belongs to
    base: str = ""                    # the model, as it was called when the person was made
    identifier: str = IDENTIFIER      # what [V] stood for
    scale: float = 1.0                # default strength
    date: str = field(default_factory=lambda: date.today().isoformat())

    def factors(self, lidb):
        """Name -> (A (1, in, r), B (1, r, out)) of both together, at the default strength."""
        return scale(join({} if self.theta is None else lidb.factors(self.theta), self.relaxed), self.scale)


def save_person(person, method, path, lidb_only=False, dtype=torch.float16):
    """Write `person` to a safetensors file in `dtype`; lidb_only: without the LoRA of the fine-tuning, a few KB.

    method: the hdb.HyperDreamBooth that the person was made with. The file says which layers and which basis its numbers are for.
    PersonError if person isn't one person of this method, has nothing to write or numbers that dtype can't hold.
    """
    tensors = {} if person.theta is None else {"theta": person.theta}
    if not lidb_only:
        tensors |= {f"{name}.{ab}": t for name, pair in person.relaxed.items() for ab, t in zip("AB", pair)}
    if not tensors:
        raise PersonError(f"{path}: nothing to write, the person has no {'LiDB' if lidb_only else 'personal'} weights")
    tensors = {key: t.detach().to(dtype) for key, t in tensors.items()}
    if person.basis_seed != method.lidb.seed:
        raise PersonError(f"{path}: the person's basis has seed {person.basis_seed}, this method's {method.lidb.seed}")
    check(tensors, method, path)
    about = {"base": person.base, "identifier": person.identifier, "scale": repr(float(person.scale)), "date": person.date}
    write(tensors, path, {"format": FORMAT, "version": VERSION} | about | belongs_to(method))


def load_person(path, method):
    """The Person in a file of save_person, float32, on the device of method, an hdb.HyperDreamBooth.

    PersonError if the file is none, is damaged, or belongs to other layers or another basis than method's. That the layers have the
    same names and shapes doesn't make it the same model: `base` says what it was.
    """
    tensors, note = read(path)
    if note.get("format") != FORMAT:
        raise PersonError(f"{path}: not a personal file; a LoRA or a model is given in another place")
    if note.get("version") != VERSION:
        raise PersonError(f"{path}: of version {note.get('version')}, this program reads version {VERSION}")
    ours, whose = belongs_to(method), f"{path}: made for {note.get('base') or 'a model without name'}, "
    differ = [key for key in ours if note.get(key) != ours[key]]
    if "layers" in differ or "layer_set" in differ:
        raise PersonError(f"{whose}whose personal layers are other than {method.model.name}'s (there {note.get('layer_set')}; here "
                          f"{ours['layer_set']}); give the model with --model")
    if differ and differ != ["basis_checksum"]:
        raise PersonError(whose + "with another basis: " + ", ".join(f"{key} {note.get(key)}, here {ours[key]}" for key in differ))
    if differ:
        raise PersonError(f"{whose}and seed {ours['basis_seed']} made another basis there than here (checksums "
                          f"{note.get('basis_checksum')} and {ours['basis_checksum']}): the file was altered, or this torch "
                          "draws other random numbers")
    check(tensors, method, path)
    if not tensors:
        raise PersonError(f"{path}: empty")
    try:
        strength = float(note["scale"])
        about = dict(base=note["base"], identifier=note["identifier"], scale=strength, date=note["date"])
    except (KeyError, ValueError) as error:
        raise PersonError(f"{path}: damaged metadata ({error!r})") from None
    if not -10 <= strength <= 10:
        raise PersonError(f"{path}: damaged metadata (scale {strength})")
    tensors = {key: t.float().to(method.model.device) for key, t in tensors.items()}
    names = [name for name in method.layers if f"{name}.A" in tensors]
    return Person(tensors.get("theta"), {n: (tensors[f"{n}.A"], tensors[f"{n}.B"]) for n in names}, method.lidb.seed, **about)


def is_person(path):
    """Whether `path` is a file of save_person, by its header alone. False, not an error, for anything else."""
    try:
        with safe_open(path if Path(path).is_file() else "", "pt") as f:
            return (f.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def belongs_to(method):
    """What the numbers mean: metadata about the layers, by names and shapes, and about the basis."""
    shapes = "".join(f"{name} {m.in_features} {m.out_features}\n" for name, m in method.layers.items())
    kinds = Counter(re.split(r"(?:blocks|layers)\.\d+\.", name)[-1] for name in method.layers)
    lidb = method.lidb
    basis = {"a": lidb.a, "b": lidb.b, "r": lidb.rank, "basis_seed": lidb.seed, "basis_checksum": lidb.checksum}
    return {"layers": f"{zlib.crc32(shapes.encode()):08x}", "layer_set": ", ".join(f"{n} {kind}" for kind, n in kinds.items()),
            **{key: str(value) for key, value in basis.items()}}


def check(tensors, method, path):
    """PersonError unless these are one person's numbers for method's layers."""
    shapes = {"theta": (1, *method.lidb.shape)}
    for name, m in method.layers.items():
        missing = [key for key in (f"{name}.A", f"{name}.B") if key not in tensors]
        if len(missing) == 1:
            raise PersonError(f"{path}: {missing[0]} is missing")
        if not missing:
            rank = max(1, *tensors[f"{name}.A"].shape[2:], 0)
            shapes |= {f"{name}.A": (1, m.in_features, rank), f"{name}.B": (1, rank, m.out_features)}
    for key, t in tensors.items():
        if tuple(t.shape) != shapes.get(key):
            raise PersonError(f"{path}: {key} has shape {tuple(t.shape)}, expected {shapes.get(key, 'no such tensor')}")
    check_numbers(tensors, path)


def check_numbers(tensors, path):
    for key, t in tensors.items():
        if not t.is_floating_point() or not t.float().isfinite().all():
            raise PersonError(f"{path}: {key} ({t.dtype}) holds numbers that are infinite, NaN or no fractions")


def read(path):
    """All tensors of a safetensors file, on the CPU, and its metadata. PersonError if it is damaged or something else."""
    try:
        with checkpoints.read(Path(path)) as f:
            return {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}
    except (checkpoints.LoadError, OSError, SafetensorError, RuntimeError) as error:
        raise PersonError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def stack(people):
    """A list of factors, of one person or several each, to the factors of all of them in order: one per picture of a batch.

    Where ranks differ, or somebody has no factors for a layer, zeros fill up. {} is nobody in particular, the model as it is.
    """
    counts = [len(next(iter(factors.values()))[0]) if factors else 1 for factors in people]
    stacked = {}
    for name in dict.fromkeys(name for factors in people for name in factors):
        a, b = next(factors[name] for factors in people if name in factors)
        nothing = (a.new_zeros(1, a.shape[1], 1), b.new_zeros(1, 1, b.shape[2]))
        pairs = [factors.get(name) or tuple(t.expand(n, -1, -1) for t in nothing) for n, factors in zip(counts, people)]
        rank = max(a.shape[2] for a, _ in pairs)
        stacked[name] = (torch.cat([F.pad(a, (0, rank - a.shape[2])) for a, _ in pairs]),
                         torch.cat([F.pad(b, (0, 0, 0, rank - b.shape[1])) for _, b in pairs]))
    return stacked

"""One person in a file: LiDB's numbers and, after rank-lora fine-tuning, a LoRA beside them; or whatever
another method has made of a photo."""
import re
import warnings
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date

import torch

from adapters import IDENTIFIER, LowRank, join, scale
from files.checkpoints import alike, finite, open_tensors, outline, read_tensors, refusing, write
from program.console import UserError

FORMAT, VERSION, OURS = "hdb-person", "1", "hyperdreambooth"
LONGEST_WORD = 500
MAKERS = {}  # made_by -> another method's module, with adapters(tensors, model) and shapes(model, tensors)


@dataclass
class Person:
    """One person: LiDB's `theta` (1, layers, r(a + b)), float32, or None, and the LoRA beside it or {}; or,
    made by another method, its `tensors`."""
    theta: torch.Tensor | None = None
    lora: dict = field(default_factory=dict)  # layer -> LowRank
    basis_seed: int = 0                          # of the LiDB that theta belongs to
    base: str = ""                               # the model, as it was called when the person was made
    identifier: str = IDENTIFIER                 # what [V] stood for
    scale: float = 1.0                           # default strength
    date: str = field(default_factory=lambda: date.today().isoformat())
    made_by: str = OURS
    tensors: dict = field(default_factory=dict)  # name -> (1, …)

    def adapters(self, method):
        """What makes the model of `method`, an hdb.HyperDreamBooth, this person's, at the default
        strength."""
        if self.made_by != OURS:
            return MAKERS[self.made_by].adapters(self.tensors, method.model)
        predicted = {} if self.theta is None else method.lidb.adapters(self.theta)
        return scale(join(predicted, self.lora), self.scale)

    def map(self, change):
        """The same person with change(tensor) for every tensor."""
        theta = None if self.theta is None else change(self.theta)
        lora = {name: LowRank(*map(change, adapter)) for name, adapter in self.lora.items()}
        tensors = {name: change(t) for name, t in self.tensors.items()}
        return replace(self, theta=theta, lora=lora, tensors=tensors)

    def stored(self, lidb_only=False):
        """name -> tensor, as in a file; lidb_only: without the LoRA."""
        found = {} if self.theta is None else {"theta": self.theta}
        if not lidb_only:
            found |= {f"{name}.{ab}": t for name, pair in self.lora.items() for ab, t in zip("AB", pair)}
        return found | self.tensors


def save_person(person, method, path, lidb_only=False, dtype=torch.float16):
    """Write `person`, made for the model of `method`, an hdb.HyperDreamBooth, to a safetensors file in
    `dtype`; lidb_only: without LoRA, a few KB. UserError for nobody, another basis, numbers dtype can't
    hold."""
    tensors = {key: t.detach().to(dtype) for key, t in person.stored(lidb_only).items()}
    if person.theta is not None and (here := method.lidb.seed) != person.basis_seed:
        raise UserError(f"{path}: the person's basis has seed {person.basis_seed}, this method's {here}")
    check_person(tensors, method, path, person.made_by, "nothing to write, the person has no such weights")
    check_numbers(tensors, path)
    about = {"base": person.base, "identifier": person.identifier, "date": person.date}
    about["scale"] = repr(float(person.scale))
    write(tensors, path, about | belongs_to(method, person.made_by, "theta" in tensors))


def load_person(path, method):
    """The Person in a file of save_person, float32, on the device of `method`. UserError if it is none, is
    damaged, or belongs to other layers or another basis than method's; a warning if only the weights, or in a
    file without their checksums the model's name, are others."""
    outlined, note = outline(path)
    made_by = note.get("made_by", OURS)
    model, ours = method.model, belongs_to(method, made_by, "theta" in outlined)
    differ = {key: f"{key} {note.get(key)}, here {ours[key]}" for key in ours
              if not alike(note.get(key), ours[key])}
    weights = [differ.pop(part) for part in ("unet", "text") if part in differ]
    made, other = f"made for {note.get('base') or 'a model without name'}, ", ", ".join(differ.values())
    for wrong, what in (
            ("format" in differ, "not a personal file; a LoRA or a model is given in another place"),
            (made_by not in (OURS, *MAKERS), f"made by {made_by}, a method that is not known here"),
            ("version" in differ, f"of version {note.get('version')}, this program reads version {VERSION}"),
            ("layers" in differ, f"{made}whose personal layers are other than {model.name}'s (there "
             f"{note.get('layer_set')}; here {ours['layer_set']}); give the model with --model"),
            (differ.keys() == {"basis_checksum"}, f"{made}and seed {note.get('basis_seed')} made another "
             f"basis there than here ({other}): the file was altered, or torch draws other random numbers"),
            (differ, f"{made}with another basis: {other}")):
        if wrong:
            raise UserError(f"{path}: {what}")
    check_person(outlined, method, path, made_by, "empty")
    with refusing(f"{path}: damaged metadata"):
        about = {key: note[key] for key in ("base", "identifier", "date")} | {"scale": float(note["scale"])}
        if not -10 <= about["scale"] <= 10 or made_by != OURS and about["scale"] != 1:
            raise ValueError(f"scale {about['scale']}")
        word = about["identifier"]  # or several, which prompts have room for
        if not word.strip() or not word.isprintable() or len(word) > LONGEST_WORD:
            raise ValueError(f"identifier {word[:50]!r}")
    tensors, _ = read_tensors(path)
    check_numbers(tensors, path)

    # a model with the same layers can still be another one; files were once written without checksums
    if not note.keys() & {"unet", "text"}:
        weights = ["by its name"] if note["base"] not in ("", model.name) else []
    if weights:
        warnings.warn(f"{path}: {made}used with {model.name}, which is another model ({'; '.join(weights)}): "
                      "the likeness may be lost", stacklevel=2)
    tensors = {key: t.float().to(model.device) for key, t in tensors.items()}
    if made_by != OURS:
        return Person(tensors=tensors, made_by=made_by, **about)
    names = [name for name in method.layers if f"{name}.A" in tensors]
    lora = {name: LowRank(tensors[f"{name}.A"], tensors[f"{name}.B"]) for name in names}
    return Person(tensors.get("theta"), lora, method.lidb.seed, **about)


def is_person(path):
    """Whether `path` is a file of save_person, by its header alone. False, and no error, for all else."""
    with suppress(OSError, ValueError):
        return (open_tensors(path).metadata() or {}).get("format") == FORMAT
    return False


def belongs_to(method, made_by, in_basis):
    """Metadata that says what the numbers mean: layers, by names and shapes, LiDB's basis if some are in it
    (else it isn't made, which takes seconds at full size), and the weights."""
    checksums = method.model.checksums
    widths = "".join(f"{name} {m.in_features} {m.out_features}\n" for name, m in method.layers.items())
    kinds = Counter(re.split(r"(?:blocks|layers)\.\d+\.", name)[-1] for name in method.layers)
    found = {"format": FORMAT, "version": VERSION, "layers": f"{zlib.crc32(widths.encode()):08x}",
             "layer_set": ", ".join(f"{count} {kind}" for kind, count in kinds.items())}
    if made_by == OURS and in_basis:
        lidb = method.lidb
        found |= {"a": lidb.a, "b": lidb.b, "r": lidb.rank, "basis_seed": lidb.seed,
                  "basis_checksum": lidb.checksum}
    if made_by != OURS:
        found["made_by"] = made_by
    found |= {part: checksums[part] for part in ("unet", "text")}
    return {key: str(value) for key, value in found.items()}


def lora_shapes(layers, tensors):
    """name -> shape of one person's A and B of all `layers` that `tensors` have either of, at A's rank."""
    expected = {}
    for name, m in layers.items():
        if {f"{name}.A", f"{name}.B"} & tensors.keys():
            rank = max([1, *tensors.get(f"{name}.A", torch.empty(0)).shape[2:]])
            expected |= {f"{name}.A": (1, m.in_features, rank), f"{name}.B": (1, rank, m.out_features)}
    return expected


def check_person(tensors, method, path, made_by, empty):
    """UserError unless these have the shapes of one person's for method's model; `empty`: that there are
    none."""
    if not tensors:
        raise UserError(f"{path}: {empty}")
    if made_by == OURS:
        expected = {"theta": (1, *method.lidb.shape)} if "theta" in tensors else {}
        expected |= lora_shapes(method.layers, tensors)
    else:
        expected = MAKERS[made_by].shapes(method.model, tensors)
    if absent := expected.keys() - tensors.keys():
        raise UserError(f"{path}: {min(absent)} is missing")
    for key, t in tensors.items():
        there, needed = tuple(t.shape), expected.get(key, "no such tensor")
        if there != needed:
            raise UserError(f"{path}: {key} has shape {there}, expected {needed}")


def check_numbers(tensors, path, empty=None):
    """UserError unless all tensors hold finite fractions; `empty`, if given, is said if there are none."""
    if empty and not tensors:
        raise UserError(f"{path}: {empty}")
    for key, t in tensors.items():
        if not t.is_floating_point() or not finite(t.float()):
            raise UserError(f"{path}: {key} ({t.dtype}) has numbers that are infinite, NaN or no fractions")

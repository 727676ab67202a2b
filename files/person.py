"""Save and load a person: the tensors that a method made from a photo, and the model that they belong to."""
import re
import warnings
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import torch

from clip import IDENTIFIER
from adapters import scale
from files.checkpoints import Tensors, alike, check_numbers, write
from files.disk import refusing
from program.console import UserError

FORMAT, VERSION, OURS = "hdb-person", "1", "hyperdreambooth"
LONGEST_WORD = 500


@dataclass
class Person:
    """One person, or P people side by side, made by `method`, a methods.protocol.Method."""
    method: Any
    tensors: dict = field(default_factory=dict)  # name -> (P, …), float32
    base: str = ""                               # name of the model that the person was made for
    identifier: str = IDENTIFIER                 # the word that [V] stands for
    scale: float = 1.0                           # default strength
    date: str = field(default_factory=lambda: date.today().isoformat())
    basis_seed: int | None = None                # seed of the LiDB basis of its θ, if it has θ
    photos: str = ""                             # checksums of the photos, which identify the person

    def adapters(self, engine):
        """The adapters that make the model of `engine`, an hdb.HyperDreamBooth, draw this person."""
        made = self.method.adapters(self.tensors, engine)
        return made if self.scale == 1 else scale(made, self.scale)


def save_person(person, engine, path):
    """Write one `person`, made for the model of `engine`, an hdb.HyperDreamBooth, to a safetensors file in
    float16. UserError for a person without tensors, another basis, and numbers that float16 cannot hold."""
    tensors = {key: t.detach().half() for key, t in person.tensors.items()}
    if person.basis_seed not in (None, engine.basis_seed):
        raise UserError(f"{path}: the person's basis has seed {person.basis_seed}, this method's "
                        f"{engine.basis_seed}")
    check_person(tensors, engine, path, person.method, "nothing to write, the person has no such weights")
    check_numbers(tensors, path)
    check_about(path, person.method, person.identifier, person.scale)
    about = {"base": person.base, "identifier": person.identifier, "date": person.date,
             "photos": person.photos, "scale": repr(float(person.scale))}
    write(tensors, path, about | belongs_to(engine, person.method, tensors))


def load_person(path, engine, methods):
    """The Person in a file of save_person, in float32, on the engine's device. methods: name -> Method.

    UserError for another or a damaged file, and for a person of other layers or another basis than the
    engine's. A warning if only the weights differ, or, in an old file without checksums, the model's name."""
    file = Tensors(path)
    outlined, note = file.outlines(), file.note
    if note.get("format") != FORMAT:
        raise UserError(f"{path}: not a personal file; give a LoRA with --lora and a model with --model")
    note = {"made_by": OURS} | note  # older files do not say it
    if (made_by := note["made_by"]) not in methods:
        raise UserError(f"{path}: made by {made_by}, which is not {' or '.join(methods)}")

    # Was it made for this model?
    method, model = methods[made_by], engine.model
    ours = belongs_to(engine, method, outlined)
    differ = {key: f"{key} {note.get(key)}, here {ours[key]}" for key in ours
              if not alike(note.get(key), ours[key])}
    weights = [differ.pop(part) for part in ("unet", "text") if part in differ]
    made = f"made for {note.get('base') or 'a model without a name'}"
    if differ:
        raise UserError(f"{path}: {made}, and does not fit {model.name} here: {'; '.join(differ.values())}; "
                        "give the --model and --hypernet that it was made with")
    check_person(outlined, engine, path, method, "empty")
    with refusing(f"{path}: damaged metadata"):
        about = {key: note[key] for key in ("base", "identifier", "date")} | {"scale": float(note["scale"])}
    check_about(path, method, about["identifier"], about["scale"])
    tensors = file.all()
    check_numbers(tensors, path)

    # Another model can have the same layers. Old files have no checksums, only its name
    if not note.keys() & {"unet", "text"}:
        weights = ["by its name"] if note["base"] not in ("", model.name) else []
    if weights:
        warnings.warn(f"{path}: {made}, used with {model.name}, which is another model "
                      f"({'; '.join(weights)}); the likeness may be lost", stacklevel=2)
    return Person(method, {key: t.float().to(model.device) for key, t in tensors.items()}, **about)


def is_person(path):
    """Whether `path` is a file of save_person, by its header alone. False, never an error, for others."""
    with suppress(OSError, ValueError):
        return Tensors(path).note.get("format") == FORMAT
    return False


def belongs_to(engine, method, tensors):
    """Metadata: the layers, what the method's numbers depend on (a basis), and checksums of the weights."""
    widths = "".join(f"{name} {m.in_features} {m.out_features}\n" for name, m in engine.layers.items())
    kinds = Counter(re.split(r"(?:blocks|layers)\.\d+\.", name)[-1] for name in engine.layers)
    found = {"format": FORMAT, "version": VERSION, "layers": f"{zlib.crc32(widths.encode()):08x}",
             "layer_set": ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
             "made_by": method.name}
    checksums = engine.model.checksums
    found |= method.note(tensors, engine) | {part: checksums[part] for part in ("unet", "text")}
    return {key: str(value) for key, value in found.items()}


def lora_shapes(layers, tensors):
    """name -> shape of one person's A and B for `layers` with A or B in `tensors`, at the rank of A."""
    expected = {}
    for name, m in layers.items():
        if {f"{name}.A", f"{name}.B"} & tensors.keys():
            rank = max([1, *tensors.get(f"{name}.A", torch.empty(0)).shape[2:]])
            expected |= {f"{name}.A": (1, m.in_features, rank), f"{name}.B": (1, rank, m.out_features)}
    return expected


def check_person(tensors, engine, path, method, empty):
    """UserError unless these are one person's shapes for the engine's model; `empty`: the error for none."""
    if not tensors:
        raise UserError(f"{path}: {empty}")
    with refusing(f"{path}: no person of {method.name} has such shapes"):
        expected = method.shapes(tensors, engine)
    if absent := expected.keys() - tensors.keys():
        raise UserError(f"{path}: {min(absent)} is missing")
    for key, t in tensors.items():
        found, needed = tuple(t.shape), expected.get(key, "no such tensor")
        if found != needed:
            raise UserError(f"{path}: {key} has shape {found}, expected {needed}")


def check_about(path, method, identifier, strength):
    """UserError for an identifier that cannot stand in a prompt, or an impossible default strength."""
    if not identifier.strip() or not identifier.isprintable() or len(identifier) > LONGEST_WORD:
        raise UserError(f"{path}: {identifier[:50]!r} cannot be what [V] stands for")
    if not -10 <= strength <= 10 or not method.scalable and strength != 1:
        raise UserError(f"{path}: a scale of {strength} is not possible")

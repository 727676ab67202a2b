"""One person in a file: the tensors that a method has made of a photo, and whose model they belong to."""
import re
import warnings
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
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
    """One person, or P of them side by side, as `method`, a methods.protocol.Method, has made them."""
    method: Any
    tensors: dict = field(default_factory=dict)  # name -> (P, …), float32
    base: str = ""                               # the model, as it was called when the person was made
    identifier: str = IDENTIFIER                 # what [V] stood for
    scale: float = 1.0                           # default strength
    date: str = field(default_factory=lambda: date.today().isoformat())
    basis_seed: int | None = None                # of the LiDB basis that its θ belongs to, if it has one
    photos: str = ""                             # digits of each photo's file, by which a person is known

    def adapters(self, engine):
        """What makes the model of `engine`, an hdb.HyperDreamBooth, draw this person."""
        made = self.method.adapters(self.tensors, engine)
        return made if self.scale == 1 else scale(made, self.scale)

    def map(self, change):
        """The same person with change(tensor) for every tensor."""
        return replace(self, tensors={name: change(t) for name, t in self.tensors.items()})


def save_person(person, engine, path, dtype=torch.float16):
    """Write one `person`, made for the model of `engine`, an hdb.HyperDreamBooth, to a safetensors file in
    `dtype`. UserError for a person without tensors, another basis, and numbers that dtype can't hold."""
    tensors = {key: t.detach().to(dtype) for key, t in person.tensors.items()}
    if person.basis_seed not in (None, engine.basis_seed):
        raise UserError(f"{path}: the person's basis has seed {person.basis_seed}, this method's "
                        f"{engine.basis_seed}")
    check_person(tensors, engine, path, person.method, "nothing to write, the person has no such weights")
    check_numbers(tensors, path)
    check_about(path, person.method, person.identifier, person.scale)
    about = {"base": person.base, "identifier": person.identifier, "date": person.date}
    about["photos"] = person.photos
    about["scale"] = repr(float(person.scale))
    write(tensors, path, about | belongs_to(engine, person.method, tensors))


def load_person(path, engine, methods):
    """The Person in a file of save_person, float32, on the engine's device. methods: those known, by name.

    UserError if it is none, is damaged, or belongs to other layers or another basis than the engine's; a
    warning if only the weights, or in a file without their checksums the model's name, are others."""
    file = Tensors(path)
    outlined, note = file.outlines(), file.note
    if note.get("format") != FORMAT:
        raise UserError(f"{path}: not a personal file; a LoRA or a model is given in another place")
    note = {"made_by": OURS} | note  # which older files do not say
    if (made_by := note["made_by"]) not in methods:
        raise UserError(f"{path}: made by {made_by}, which is not {' or '.join(methods)}")
    method, model = methods[made_by], engine.model
    ours = belongs_to(engine, method, outlined)
    differ = {key: f"{key} {note.get(key)}, here {ours[key]}" for key in ours
              if not alike(note.get(key), ours[key])}
    weights = [differ.pop(part) for part in ("unet", "text") if part in differ]
    made, other = f"made for {note.get('base') or 'a model without name'}, ", ", ".join(differ.values())
    for wrong, what in (
            ("version" in differ, f"of version {note.get('version')}, this program reads version {VERSION}"),
            ("layers" in differ, f"{made}whose personal layers are other than {model.name}'s (there "
             f"{note.get('layer_set')}; here {ours['layer_set']}); give the model with --model"),
            (differ.keys() == {"basis_checksum"}, f"{made}and seed {note.get('basis_seed')} made another "
             f"basis there than here ({other}): the file was altered, or torch draws other random numbers"),
            (differ, f"{made}with another basis: {other}")):
        if wrong:
            raise UserError(f"{path}: {what}")
    check_person(outlined, engine, path, method, "empty")
    with refusing(f"{path}: damaged metadata"):
        about = {key: note[key] for key in ("base", "identifier", "date")} | {"scale": float(note["scale"])}
    check_about(path, method, about["identifier"], about["scale"])
    tensors = file.all()
    check_numbers(tensors, path)

    # a model with the same layers can still be another one; files were once written without checksums
    if not note.keys() & {"unet", "text"}:
        weights = ["by its name"] if note["base"] not in ("", model.name) else []
    if weights:
        warnings.warn(f"{path}: {made}used with {model.name}, which is another model ({'; '.join(weights)}): "
                      "the likeness may be lost", stacklevel=2)
    return Person(method, {key: t.float().to(model.device) for key, t in tensors.items()}, **about)


def is_person(path):
    """Whether `path` is a file of save_person, by its header alone. False, and no error, for all else."""
    with suppress(OSError, ValueError):
        return Tensors(path).note.get("format") == FORMAT
    return False


def belongs_to(engine, method, tensors):
    """Metadata that says what the numbers mean: layers, the method's own (a basis), checksums of weights."""
    widths = "".join(f"{name} {m.in_features} {m.out_features}\n" for name, m in engine.layers.items())
    kinds = Counter(re.split(r"(?:blocks|layers)\.\d+\.", name)[-1] for name in engine.layers)
    found = {"format": FORMAT, "version": VERSION, "layers": f"{zlib.crc32(widths.encode()):08x}",
             "layer_set": ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
             "made_by": method.name}
    checksums = engine.model.checksums
    found |= method.note(tensors, engine) | {part: checksums[part] for part in ("unet", "text")}
    return {key: str(value) for key, value in found.items()}


def lora_shapes(layers, tensors):
    """name -> shape of one person's A and B of all `layers` that `tensors` have either of, at A's rank."""
    expected = {}
    for name, m in layers.items():
        if {f"{name}.A", f"{name}.B"} & tensors.keys():
            rank = max([1, *tensors.get(f"{name}.A", torch.empty(0)).shape[2:]])
            expected |= {f"{name}.A": (1, m.in_features, rank), f"{name}.B": (1, rank, m.out_features)}
    return expected


def check_person(tensors, engine, path, method, empty):
    """UserError unless these have one person's shapes for the engine's model; `empty`: said of none."""
    if not tensors:
        raise UserError(f"{path}: {empty}")
    with refusing(f"{path}: shapes that no person of {method.name} has"):
        expected = method.shapes(tensors, engine)
    if absent := expected.keys() - tensors.keys():
        raise UserError(f"{path}: {min(absent)} is missing")
    for key, t in tensors.items():
        there, needed = tuple(t.shape), expected.get(key, "no such tensor")
        if there != needed:
            raise UserError(f"{path}: {key} has shape {there}, expected {needed}")


def check_about(path, method, identifier, strength):
    """UserError for an identifier that no prompt can say, or a default strength that is none."""
    if not identifier.strip() or not identifier.isprintable() or len(identifier) > LONGEST_WORD:
        raise UserError(f"{path}: {identifier[:50]!r} cannot be what [V] stands for")
    if not -10 <= strength <= 10 or not method.scalable and strength != 1:
        raise UserError(f"{path}: a scale of {strength} is not possible")

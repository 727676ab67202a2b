"""From files to modules, strictly and lazily: every tensor of the files has its place and every place its tensor, or one line says which hasn't.

Modules are built on the meta device, which holds shapes and no numbers, and tensors go one by one from their file to their place, so the
weights are in memory once and no random initialisation is computed to be thrown away. And back into files, whole or not at all.
"""
import json
import os
import re
from dataclasses import fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from console import UserError, printable

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
VAE_ATTENTION = re.compile(r"(en|de)coder\.mid_block\.attentions\.0\.to_.*weight")  # 1×1 convolutions (c, c, 1, 1) in single files


class LoadError(UserError):
    """What is wrong with a model's files and what to do about it, in one line for the user."""


def read_settings(config, file):
    """A config dataclass from a config.json; a field that isn't there, such as scaling_factor in old files, has SD 1.5's value."""
    return configure(config(), read_json(file), file)


def configure(config, found, file):
    """The config dataclass with the fields that are in the dict `found` taken from there, lists as tuples. LoadError, naming the file, for
    a value of another type than the one in `config`, or a number that no size or scale can be."""
    found = {f.name: found[f.name] for f in fields(config) if f.name in found}
    found = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
    for name, value in found.items():
        layers = "layers" in name or name in ("depth", "iterations")
        if not fits(value, getattr(config, name), 1000 if layers else 1_000_000):
            raise LoadError(f"{file}: {name} cannot be {value!r}")
    return replace(config, **found)


def fits(value, usual, limit):
    """Whether a setting is of the type of the usual one, a number positive (in a list, not negative) and below the limit, which no model
    comes near: to build what a hostile file asks for could take hours."""
    if isinstance(usual, tuple):
        return isinstance(value, tuple) and all(fits(v, usual[0], limit) or v == 0. for v in value)
    if isinstance(usual, (int, float)):
        return isinstance(value, (int, type(usual))) and not isinstance(value, bool) and 0 < value < limit
    return isinstance(value, type(usual))


def refuse(found, implemented, file):
    """LoadError for a setting in the dict `found` that is not as in `implemented`, name -> the one value that our code stands for."""
    for key, value in implemented.items():
        if found.get(key, value) != value:
            raise LoadError(f"{file}: {key} is {found[key]!r}; only {value!r} is implemented")


def read_json(file):
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise LoadError(f"{file}: not readable as a JSON dictionary ({error})") from None


def read(file):
    """Open a safetensors file with safe_open, or raise a LoadError that says what it is instead."""
    if Path(file).exists() and not Path(file).is_file():  # reading a pipe might never end
        raise LoadError(f"{file}: not a file")
    try:
        with open(file, "rb") as f:
            head = f.read(9)  # the header's length in 8 bytes, then the header, a JSON dictionary
    except OSError as error:
        raise LoadError(f"{file}: {error.strerror}") from None
    if file.suffix in PICKLES or head.startswith((b"PK", b"\x80")) and head[8:] != b"{":
        raise LoadError(f"{file}: a pickle, which could run any code when read; download or convert it as .safetensors")
    try:
        # pread copies each tensor out. The pages of a memory map would count as memory beside the copy in another dtype, and the weights
        # would change, or the program crash, when the file does.
        return safe_open(file, "pt", backend="pread")
    except (SafetensorError, OSError) as error:
        what = f"damaged or truncated ({error})" if head[8:] == b"{" else "not safetensors, whatever its name" if head else "empty"
        raise LoadError(f"{file}: {what}; download it again") from None


class NoInit(TorchFunctionMode):
    """Skips initialisers. They would compute nothing on the meta device, but normal_ imports a compiler for that: seconds and 70 MB."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) != "torch.nn.init":
            return function(*args, **(kwargs or {}))


def module(kind, config, files, rename, device, dtype):
    """kind(config) with the tensors of `files`: rename(key) is our name for a key there, None for one that isn't needed."""
    try:
        with torch.device("meta"), NoInit():  # names and shapes, no memory
            built = kind(config)
    except (LookupError, TypeError, ValueError, RuntimeError, ArithmeticError, AssertionError) as error:
        raise LoadError(f"{files[0].parent}: no {kind.__name__} with these settings can be built ({error!r})") from None
    shapes = {name: tuple(p.shape) for name, p in built.state_dict().items()}
    keys = {}  # our name -> file and key; all are looked up before gigabytes are read
    for file in files:
        with read(file) as f:
            for key in f.keys():
                try:
                    name = rename(key)
                except (KeyError, ValueError):
                    name = key
                if name is None:
                    continue
                shape = tuple(f.get_slice(key).get_shape())
                if name not in shapes or name in keys:
                    raise LoadError(f"{file}: surplus tensor {key} of shape {shape}, expected none")
                if VAE_ATTENTION.fullmatch(name) and shape[2:] == (1, 1):
                    shape = shape[:2]
                if shape != shapes[name]:
                    raise LoadError(f"{file}: tensor {key} has shape {shape}, expected {shapes[name]}")
                keys[name] = file, key
    if missing := [name for name in shapes if name not in keys]:
        more = f" (and {len(missing) - 1} more)" if missing[1:] else ""
        raise LoadError(f"{files[0]}: no tensor for {missing[0]}, expected shape {shapes[missing[0]]}{more}")
    found = {}
    for file in files:
        with read(file) as f:
            found |= {name: f.get_tensor(key).view(shapes[name]).to(device, dtype) for name, (where, key) in keys.items() if where == file}
    built.load_state_dict(found, assign=True)
    return built


def write(tensors, path, metadata=None):
    """Save tensors as a safetensors file at `path`, with its folder, so that nobody ever sees half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        note = metadata and {k: printable(v) for k, v in metadata.items()}
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, note)
        os.umask(mask := os.umask(0))
        temporary.chmod(0o666 & ~mask)  # as any other file; safetensors writes them for the owner alone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

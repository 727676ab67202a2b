"""From files to modules, strictly, and back: what is missing, surplus or misshapen is named in one line.
The weights are in memory once: a module is built without numbers and takes tensors one by one from files."""
import glob
import json
import os
import re
import shutil
import zlib
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from program.console import UserError, printable

# of settings that say how often something is built, and how large a picture is
LIMITS = {"layers_per_block": 64, "num_hidden_layers": 64, "depth": 64, "iterations": 64, "sample_size": 1000}
LARGEST_TEXT = 10  # megabytes, of headers too; CLIP's tokenizer.json has two
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
CHECKSUM = re.compile("([0-9a-f]{8})(?:-([0-9a-f]{8}))?")
# these are 1×1 convolutions (c, c, 1, 1) in single files
VAE_ATTENTION = re.compile(r"(en|de)coder\.mid_block\.attentions\.0\.to_.*weight")


class LoadError(UserError):
    """What is wrong with a model's files and what to do about it, in one line for the user."""


@contextmanager
def refusing(what):
    """Where a file is made sense of: whatever goes wrong inside is a LoadError that says `what` is wrong. A
    UserError, which says more, passes, and a full memory, which is no fault of the file."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # nobody can list what odd contents lead to
        raise LoadError(f"{what} ({error!r})") from None


def configure(config, found, file):
    """The config dataclass with its fields that are in the dict `found` taken from there, lists as tuples.
    LoadError, naming the file, for another type than in `config` or a number no size or scale can be."""
    taken = {}
    for name in vars(config).keys() & found.keys():
        value, usual = found[name], getattr(config, name)
        value = tuple(value) if isinstance(value, list) else value
        if not fits(value, usual, LIMITS.get(name, 1_000_000)):
            raise LoadError(f"{file}: {name} cannot be {value!r}")
        taken[name] = value
    return replace(config, **taken)


def fits(value, usual, limit):
    """Whether a setting is of the usual one's type, a number positive (in a list, not negative) and below the
    limit, which no model comes near: to build what a hostile file asks for could take hours."""
    if isinstance(usual, tuple):
        short = isinstance(value, tuple) and len(value) < 9  # levels
        return short and all(fits(v, usual[0], limit) or v == 0. for v in value)
    if isinstance(usual, (int, float)):
        return isinstance(value, (int, type(usual))) and not isinstance(value, bool) and 0 < value < limit
    return isinstance(value, type(usual))


def require_settings(found, implemented, file):
    """LoadError for a setting in the dict `found` that is not the one value for it in `implemented`."""
    for key, value in implemented.items():
        if found.get(key, value) != value:
            raise LoadError(f"{file}: {key} is {found[key]!r}; only {value!r} is implemented")


def read_text(file):
    """The text in a file. LoadError for one that is larger than any that belongs to a model."""
    if Path(file).stat().st_size > LARGEST_TEXT * 10 ** 6:
        raise LoadError(f"{file}: larger than {LARGEST_TEXT} MB, which no such file is")
    return Path(file).read_text(encoding="utf-8")


def read_json(file):
    """The dictionary in a JSON file. LoadError if there is none."""
    with refusing(f"{file}: not readable as a JSON dictionary"):
        return dict(json.loads(read_text(file)))


def open_tensors(file):
    """Open a safetensors file with safe_open, or raise a LoadError that says what it is instead."""
    file = Path(file)
    if file.exists() and not file.is_file():  # reading a pipe might never end
        raise LoadError(f"{file}: not a file")
    # the header's length in 8 bytes, then the header, a JSON dictionary
    try:
        with open(file, "rb") as f:
            head = f.read(9)
    except OSError as error:
        raise LoadError(f"{file}: {error.strerror}") from None
    has_header = head[8:] == b"{"
    if has_header and int.from_bytes(head[:8], "little") > LARGEST_TEXT * 10 ** 6:
        raise LoadError(f"{file}: a header of more than {LARGEST_TEXT} MB, which no such file has")
    if file.suffix in PICKLES or head.startswith((b"PK", b"\x80")) and not has_header:
        raise LoadError(f"{file}: a pickle, which could run any code; download or convert it as .safetensors")
    # pread copies each tensor out: a memory map's pages would count as memory beside the copy in another
    # dtype, and the weights would change, or the program crash, when the file does
    try:
        return safe_open(file, "pt", backend="pread")
    except (SafetensorError, OSError) as error:
        what = f"damaged or truncated ({error})" if has_header else "not safetensors" if head else "empty"
        raise LoadError(f"{file}: {what}; download or make it again") from None


def outline(file):
    """As read_tensors(), but the tensors without their numbers: enough to refuse what would take long."""
    with refusing(f"{file}: damaged"):
        f = open_tensors(file)
        shapes = {key: f.get_slice(key).get_shape() for key in f.keys()}
        return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}, f.metadata() or {}


def read_tensors(file):
    """All tensors of a safetensors file, on the CPU, and its metadata. LoadError if it is damaged."""
    with refusing(f"{file}: damaged"):
        f = open_tensors(file)
        return {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}


class NoInit(TorchFunctionMode):
    """Skips initialisers, which do nothing on the meta device; but normal_ imports a compiler, 70 MB."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) != "torch.nn.init":
            return function(*args, **(kwargs or {}))


def build(kind, config, files, rename, device, dtype, *more):
    """kind(config, *more) with the tensors of `files`, frozen and in eval mode. rename(key): our name for a
    key there, None if not needed, KeyError if unknown. LoadError for impossible settings, or a tensor that is
    missing or surplus."""
    what = f"{Path(files[0]).parent}: no {kind.__name__} with these settings can be built"
    with refusing(what), torch.device("meta"), NoInit():
        module = kind(config, *more)
    # all names are looked up before gigabytes are read
    shapes = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    missing, places = dict(shapes), {}
    for file in files:
        tensors = open_tensors(file)
        for key in tensors.keys():
            name = key
            with suppress(KeyError):
                name = rename(key)
            if name is None:
                continue
            shape, expected = tuple(tensors.get_slice(key).get_shape()), missing.pop(name, "none")
            if VAE_ATTENTION.fullmatch(name) and shape[2:] == (1, 1):
                shape = shape[:2]
            if shape != expected:
                what = f"surplus tensor {key} of" if expected == "none" else f"tensor {key} has"
                raise LoadError(f"{file}: {what} shape {shape}, expected {expected}")
            places[name] = tensors, key
    if missing:
        name, shape = next(iter(missing.items()))
        rest = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise LoadError(f"{files[0]}: no tensor for {name}, expected shape {shape}{rest}")
    weights, stored = {}, {}
    for name, (tensors, key) in places.items():
        tensor = tensors.get_tensor(key)
        if not tensor.is_floating_point():
            stored = str(tensor.dtype).removeprefix("torch.")
            raise LoadError(f"{files[0]}: tensor {key} is {stored}, quantised; give a file of floats")
        stored[name] = some_of(tensor)
        tensor = tensor.view(shapes[name]).to(device, dtype)
        if not finite(tensor):  # asked before the layout changes, which would make it three times as slow
            raise LoadError(f"{files[0]}: tensor {key} holds NaN or numbers too large for {dtype}")
        # kernels with their channels side by side, and so feature maps, as transformers over pixels want
        # them: fewer copies, a tenth less time
        layout = torch.channels_last if len(shapes[name]) == 4 else torch.preserve_format
        weights[name] = tensor.to(memory_format=layout)
    module.load_state_dict(weights, assign=True)
    stored = [stored[name] for name in shapes]
    module.checksum_of_file = digits(shapes, [t.to(dtype) for t in stored], stored)
    return module.eval().requires_grad_(False)


def finite(tensor):
    """Whether all numbers of a tensor are numbers, in one pass and no memory."""
    return tensor.numel() == 0 or all(bound.isfinite() for bound in tensor.aminmax())


def checksum(module):
    """Digits that tell a module's weights from others, of names, shapes and up to 4096 numbers a tensor; see
    alike(). Eight count the numbers in bfloat16, eight in float16, as they were in the file that build() has
    read, if they are still those."""
    state = module.state_dict()
    shapes, numbers = {name: tuple(t.shape) for name, t in state.items()}, map(some_of, state.values())
    ours = digits(shapes, [*numbers])
    read = getattr(module, "checksum_of_file", "")
    return read if read[:8] == ours[:8] else ours


def alike(one, other):
    """Whether two values of checksum() are of the same weights: a file has the same digits in float32 and
    bfloat16, and in float32 and float16; files were once written with the first eight alone."""
    found = [CHECKSUM.fullmatch(str(text)) for text in (one, other)]
    return one == other or all(found) and any(a in found[1].groups() for a in found[0].groups() if a)


def some_of(tensor):
    """Up to 4096 of a tensor's numbers, copied, so that they don't hold the rest."""
    return tensor.flatten()[::tensor.numel() // 4096 + 1].clone()


def digits(shapes, loaded, stored=None):
    """The digits of checksum() for `shapes`, name -> shape, and some numbers of each tensor: as a module has
    them and, if those are others, as its file has them."""
    start = zlib.crc32(repr([(name, *shape) for name, shape in shapes.items()]).encode())

    def sum_of(numbers, dtype):
        together = torch.cat([t.to(dtype).cpu() for t in numbers])
        return zlib.crc32(together.view(torch.uint8).numpy(), start)
    return f"{sum_of(loaded, torch.bfloat16):08x}-{sum_of(stored or loaded, torch.float16):08x}"


@contextmanager
def whole_files(*paths):
    """Temporary paths near `paths`, whose folders are made, that take their places when the block ends:
    whole, all or none, and on the disk before their names are, so that nobody sees half of a file, or a new
    one beside the old one that belongs to another, where a disk is full, a program killed or power cut."""
    # each in a folder, as safetensors leaves files of its own beside its
    temporary = {path: path.with_name(f"{path.name}.{os.getpid()}.tmp") / path.name
                 for path in map(Path, paths)}
    try:
        for path, new in temporary.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            # what a run that was killed has left goes
            for old in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
                pid = old.name.split(".")[-2]
                if pid.isdecimal() and not alive(int(pid)):
                    shutil.rmtree(old, ignore_errors=True)
            new.parent.mkdir(exist_ok=True)
        yield [*temporary.values()]
        for new in temporary.values():
            sync(new)
        for path, new in temporary.items():
            new.replace(path)
        for parent in {path.parent for path in temporary}:
            sync(parent)
    finally:
        for new in temporary.values():
            shutil.rmtree(new.parent, ignore_errors=True)


def alive(pid):
    """Whether a process of this number runs."""
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)  # somebody else's
    return True


def sync(path):
    """Have the disk hold what was written to a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    with suppress(OSError):  # some file systems cannot, of folders
        os.fsync(handle)
    os.close(handle)


def write(tensors, path, metadata=None):
    """Save tensors as a safetensors file at `path`, as whole_files does."""
    with whole_files(path) as (temporary,):
        note = metadata and {k: printable(v) for k, v in metadata.items()}
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, note)
        # as readable as any other file; safetensors writes for the owner alone
        temporary.chmod(temporary.parent.stat().st_mode & 0o666)


def write_text(text, path):
    """Write a text file, as whole_files does."""
    with whole_files(path) as (temporary,):
        temporary.write_text(text, encoding="utf-8")

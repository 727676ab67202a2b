"""From files to modules, strictly, and back: what is missing, surplus or misshapen is named in one line.
The weights are in memory once: a module is built without numbers and takes tensors one by one from files."""
import json
import re
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch.overrides import TorchFunctionMode

from files.disk import LARGEST_TEXT, LoadError, refusing, regular, whole_files
from program.console import UserError, printable

# of settings that say how often something is built, and how large a picture is
LIMITS = {"layers_per_block": 64, "num_hidden_layers": 64, "depth": 64, "iterations": 64, "sample_size": 1000}
MOST = 20_000  # tensors of a file
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}  # safetensors' names
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
CHECKSUM = re.compile("([0-9a-f]{8})(?:-([0-9a-f]{8}))?")
# these are 1×1 convolutions (c, c, 1, 1) in single files
VAE_ATTENTION = re.compile(r"(en|de)coder\.mid_block\.attentions\.0\.to_.*weight")


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


class Tensors:
    """A safetensors file, opened once and read as it is asked for: `note`, its metadata, `shapes`,
    name -> tuple, and its tensors by name, on the CPU. Another file in its place changes nothing here.
    LoadError for what is none, which says what it is, and for a damaged one, now or when it is read."""

    def __init__(self, path):
        self.path = path
        with refusing(f"{path}: cannot be read"), regular(path) as file:
            # the header's length in 8 bytes, then the header, a JSON dictionary
            head = file.read(9)
            length = int.from_bytes(head[:8], "little")
            if head[8:] != b"{":
                pickled = head.startswith((b"PK", b"\x80")) or Path(path).suffix in PICKLES
                what = "not safetensors" if head else "empty"
                what = "a pickle, which could run any code" if pickled else what
                raise LoadError(f"{path}: {what}; download or convert it as .safetensors")
            if length > LARGEST_TEXT * 10 ** 6:
                raise LoadError(f"{path}: a header of more than {LARGEST_TEXT} MB, which no such file has")
            with refusing(f"{path}: damaged or truncated, download or make it again"):
                # pread copies each tensor out: a memory map's pages would count as memory beside the copy in
                # another dtype, and the weights would change, or the program crash, when the file does
                self.file = safe_open(f"/dev/fd/{file.fileno()}", "pt", backend="pread")
                self.note = self.file.metadata() or {}
                if len(self.file.keys()) > MOST:
                    raise LoadError(f"{path}: {len(self.file.keys())} tensors, more than any such file has")
                self.shapes = {key: tuple(self.file.get_slice(key).get_shape()) for key in self.file.keys()}

    def __getitem__(self, key):
        with refusing(f"{self.path}: damaged"):
            return self.file.get_tensor(key)

    def row(self, key, i):
        """Row i of a tensor, as a batch of one."""
        with refusing(f"{self.path}: damaged"):
            return self.file.get_slice(key)[i:i + 1]

    def outlines(self):
        """name -> tensor without its numbers: enough to refuse what would take long."""
        return {key: torch.empty(shape, device="meta") for key, shape in self.shapes.items()}

    def all(self):
        """name -> tensor."""
        return {key: self[key] for key in self.shapes}


class NoInit(TorchFunctionMode):
    """Skips initialisers, which do nothing on the meta device; but normal_ imports a compiler, 70 MB."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) != "torch.nn.init":
            return function(*args, **(kwargs or {}))


def build(kind, config, files, rename, device, dtype, *more):
    """kind(config, *more) with the tensors of `files`, frozen and in eval mode. rename(key): our name for a
    key, None if not needed, KeyError if unknown. LoadError for impossible settings or other tensors."""
    what = f"{Path(files[0]).parent}: no {kind.__name__} with these settings can be built"
    with refusing(what), torch.device("meta"), NoInit():
        module = kind(config, *more)
    shapes = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    weights, stored = {}, {}
    for name, (tensors, key) in places_of(shapes, files, rename).items():
        tensor = tensors[key]
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise LoadError(f"{files[0]}: tensor {key} is {kind}, quantised; give a file of floats")
        stored[name] = some_of(tensor)
        tensor = tensor.view(shapes[name]).to(device, dtype)
        # asked before the layout changes, which would make it three times as slow
        if not tensor.is_meta and not finite(tensor):
            raise LoadError(f"{files[0]}: tensor {key} holds NaN or numbers too large for {dtype}")
        # kernels with their channels side by side, and so feature maps, as transformers over pixels want
        # them: fewer copies, a tenth less time
        layout = torch.channels_last if len(shapes[name]) == 4 else torch.preserve_format
        weights[name] = tensor.to(memory_format=layout)
    module.load_state_dict(weights, assign=True)
    stored = [stored[name] for name in shapes]
    module.checksum_of_file = digits(shapes, [t.to(dtype) for t in stored], stored)
    return module.eval().requires_grad_(False)


def places_of(shapes, files, rename):
    """Where build() finds all names of `shapes`, before gigabytes are read: name -> (Tensors, key)."""
    missing, places = dict(shapes), {}
    for file in files:
        tensors = Tensors(file)
        for key, shape in tensors.shapes.items():
            name = key
            with suppress(KeyError):
                name = rename(key)
            if name is None:
                continue
            expected = missing.pop(name, "none")
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
    return places


def finite(tensor):
    """Whether all numbers of a tensor are numbers, in one pass and no memory."""
    return tensor.numel() == 0 or all(bound.isfinite() for bound in tensor.aminmax())


def checksum(module):
    """Digits that tell a module's weights from others, of names, shapes and up to 4096 numbers a tensor,
    eight in bfloat16 and eight in float16, as in the file that build() has read, if they are still those or
    were left there (on the meta device)."""
    state, read = module.state_dict(), getattr(module, "checksum_of_file", "")
    there = {name: t for name, t in state.items() if not t.is_meta}
    if not there:
        return read
    shapes, numbers = {name: tuple(t.shape) for name, t in there.items()}, map(some_of, there.values())
    ours = digits(shapes, [*numbers])
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
    """The digits of checksum() for `shapes` and some numbers of each tensor, as loaded and in the file."""
    start = zlib.crc32(repr([(name, *shape) for name, shape in shapes.items()]).encode())

    def sum_of(numbers, dtype):
        together = torch.cat([t.to(dtype).cpu() for t in numbers])
        return zlib.crc32(together.view(torch.uint8).numpy(), start)
    return f"{sum_of(loaded, torch.bfloat16):08x}-{sum_of(stored or loaded, torch.float16):08x}"


def check_numbers(tensors, path, empty=None):
    """UserError unless all tensors hold finite fractions; `empty`, if given, is said if there are none."""
    if empty and not tensors:
        raise UserError(f"{path}: {empty}")
    for key, t in tensors.items():
        if not t.is_floating_point() or not finite(t.float()):
            raise UserError(f"{path}: {key} ({t.dtype}) has numbers that are infinite, NaN or no fractions")


def write(tensors, path, metadata=None):
    """Save tensors as a safetensors file at `path`, as whole_files does. The same tensors and metadata give
    the same bytes, which safetensors itself, whose metadata comes in any order, doesn't promise."""
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))  # so that all are aligned
    note = {key: printable(value) for key, value in sorted((metadata or {}).items())}
    header, end = {"__metadata__": note} if note else {}, 0
    for key in order:
        t = tensors[key]
        start, end = end, end + t.nbytes
        header[key] = {"dtype": DTYPES[t.dtype], "shape": [*t.shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole_files(path) as (temporary,), open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            file.write(tensors[key].detach().cpu().reshape(-1).view(torch.uint8).numpy())

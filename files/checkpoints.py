"""Read safetensors files, build modules from them, and write them.

A missing, surplus or misshapen tensor is a LoadError of one line. Weights are in memory only once: build()
makes a module on the meta device and gives it tensors from the file one by one."""
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

# Limits of settings that count layers or passes, and of the size of pictures
LIMITS = {"layers_per_block": 64, "num_hidden_layers": 64, "depth": 64, "iterations": 64, "sample_size": 1000}
MOST = 20_000  # tensors in a file
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}  # header names
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
CHECKSUM = re.compile("([0-9a-f]{8})(?:-([0-9a-f]{8}))?")
# In single files these weights are 1×1 convolutions (c, c, 1, 1)
VAE_ATTENTION = re.compile(r"(en|de)coder\.mid_block\.attentions\.0\.to_.*weight")


def configure(config, found, file):
    """A copy of the dataclass `config` with values from the dict `found`. Unknown keys are ignored; lists
    become tuples. LoadError, naming `file`, for a value of another type or out of range."""
    taken = {}
    for name in vars(config).keys() & found.keys():
        value, usual = found[name], getattr(config, name)
        value = tuple(value) if isinstance(value, list) else value
        if not fits(value, usual, LIMITS.get(name, 1_000_000)):
            raise LoadError(f"{file}: {name} cannot be {value!r}")
        taken[name] = value
    return replace(config, **taken)


def fits(value, usual, limit):
    """Whether a setting has the type of the `usual` one and, if a number, is positive (in a list, or 0) and
    below `limit`. No model comes near a limit, but a hostile file could take hours to build."""
    if isinstance(usual, tuple):
        short = isinstance(value, tuple) and len(value) < 9  # no model has more levels
        return short and all(fits(v, usual[0], limit) or v == 0. for v in value)
    if isinstance(usual, (int, float)):
        return isinstance(value, (int, type(usual))) and not isinstance(value, bool) and 0 < value < limit
    return isinstance(value, type(usual))


def require_settings(found, implemented, file):
    """LoadError if a setting in the dict `found` differs from the only value that is `implemented`."""
    for key, value in implemented.items():
        if found.get(key, value) != value:
            raise LoadError(f"{file}: {key} is {found[key]!r}; only {value!r} is implemented")


class Tensors:
    """A safetensors file, opened once and read on demand: `note` is its metadata, `shapes` maps name ->
    tuple, and self[name] is a tensor on the CPU. Replacing the file later has no effect. LoadError, now or
    when a tensor is read, for a damaged file or one of another format, which the message names."""

    def __init__(self, path):
        self.path = path
        with refusing(f"{path}: cannot be read"), regular(path) as file:
            # the length of the header in 8 bytes, then the header, a JSON dictionary
            head = file.read(9)
            length = int.from_bytes(head[:8], "little")
            if head[8:] != b"{":
                pickled = head.startswith((b"PK", b"\x80")) or Path(path).suffix in PICKLES
                what = "a pickle, which may run code" if pickled else "not safetensors" if head else "empty"
                raise LoadError(f"{path}: {what}; download or convert it as .safetensors")
            if length > LARGEST_TEXT * 10 ** 6:
                raise LoadError(f"{path}: its header has more than {LARGEST_TEXT} MB; download it again")
            with refusing(f"{path}: damaged or truncated, download or make it again"):
                # pread copies every tensor. Pages of a memory map would use memory beside the converted copy,
                # and if the file changed, the weights would change too, or the program would crash.
                self.file = safe_open(f"/dev/fd/{file.fileno()}", "pt", backend="pread")
                self.note = self.file.metadata() or {}
                if len(self.file.keys()) > MOST:
                    raise LoadError(f"{path}: {len(self.file.keys())} tensors; at most {MOST} are read")
                self.shapes = {key: tuple(self.file.get_slice(key).get_shape()) for key in self.file.keys()}

    def __getitem__(self, key):
        with refusing(f"{self.path}: damaged"):
            return self.file.get_tensor(key)

    def row(self, key, i):
        """Row i of a tensor (n, …) as (1, …)."""
        with refusing(f"{self.path}: damaged"):
            return self.file.get_slice(key)[i:i + 1]

    def outlines(self):
        """name -> tensor on the meta device: enough to check a file before its numbers are read."""
        return {key: torch.empty(shape, device="meta") for key, shape in self.shapes.items()}

    def all(self):
        """name -> tensor."""
        return {key: self[key] for key in self.shapes}


class NoInit(TorchFunctionMode):
    """Skip initialisers. On the meta device they have no effect, but normal_ imports a compiler of 70 MB."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) != "torch.nn.init":
            return function(*args, **(kwargs or {}))


def build(kind, config, files, rename, device, dtype, *more, layout=torch.channels_last):
    """The module kind(config, *more) with the tensors of `files`, frozen, in eval mode. rename(key): our name
    for a key, None if not needed, KeyError if unknown. layout: of kernels. LoadError for impossible settings
    or other tensors."""
    what = f"{Path(files[0]).parent}: cannot build a {kind.__name__} with these settings"
    with refusing(what), torch.device("meta"), NoInit():
        module = kind(config, *more)
    shapes = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    weights, stored = {}, {}
    for name, (tensors, key) in places_of(shapes, files, rename).items():
        tensor = tensors[key]
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise LoadError(f"{files[0]}: tensor {key} is quantised ({kind}); give a file of floats")
        stored[name] = some_of(tensor)
        tensor = tensor.view(shapes[name]).to(device, dtype)
        # checked before the layout changes: afterwards it would take three times as long
        if not tensor.is_meta and not finite(tensor):
            raise LoadError(f"{files[0]}: tensor {key} holds NaN or numbers too large for {dtype}")
        # With channels-last kernels, feature maps have the layout that attention over pixels needs: fewer
        # copies, a tenth less time
        weights[name] = tensor.to(memory_format=layout if tensor.dim() == 4 else torch.preserve_format)
    module.load_state_dict(weights, assign=True)
    stored = [stored[name] for name in shapes]
    module.checksum_of_file = digits(shapes, [t.to(dtype) for t in stored], stored)
    return module.eval().requires_grad_(False)


def places_of(shapes, files, rename):
    """name -> (Tensors, key) of every tensor that build() needs, checked before gigabytes are read."""
    missing, places = dict(shapes), {}
    for file in files:
        tensors = Tensors(file)
        for key, shape in tensors.shapes.items():
            name = key
            with suppress(KeyError):
                name = rename(key)
            if name is None:
                continue

            # Each of our tensors once, in its shape
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
    """Whether a tensor holds no NaN or infinity; one pass, without a copy."""
    return tensor.numel() == 0 or all(bound.isfinite() for bound in tensor.aminmax())


def checksum(module):
    """A checksum of a module's weights: a CRC of names, shapes and up to 4096 numbers of each tensor, rounded
    to bfloat16, then one of the same in float16. It is that of the file which build() read, if the weights
    have not changed since or are on the meta device."""
    state, read = module.state_dict(), getattr(module, "checksum_of_file", "")
    loaded = {name: t for name, t in state.items() if not t.is_meta}
    if not loaded:
        return read
    now = digits({name: tuple(t.shape) for name, t in loaded.items()}, [*map(some_of, loaded.values())])
    return read if read[:8] == now[:8] else now


def alike(one, other):
    """Whether two values of checksum() belong to the same weights, perhaps in another dtype: rounding float32
    weights keeps one of the two CRCs. Old files have the first CRC only."""
    found = [CHECKSUM.fullmatch(str(text)) for text in (one, other)]
    return one == other or all(found) and any(a in found[1].groups() for a in found[0].groups() if a)


def some_of(tensor):
    """A copy of up to 4096 of a tensor's numbers; a view would keep the whole tensor in memory."""
    return tensor.flatten()[::tensor.numel() // 4096 + 1].clone()


def digits(shapes, loaded, stored=None):
    """checksum() from names, shapes and some_of() each tensor, as loaded and, if they differ, as stored."""
    start = zlib.crc32(repr([(name, *shape) for name, shape in shapes.items()]).encode())

    def sum_of(numbers, dtype):
        together = torch.cat([t.to(dtype).cpu() for t in numbers])
        return zlib.crc32(together.view(torch.uint8).numpy(), start)
    return f"{sum_of(loaded, torch.bfloat16):08x}-{sum_of(stored or loaded, torch.float16):08x}"


def check_numbers(tensors, path, empty=None):
    """UserError unless all tensors are finite floats. If `empty` is given, it is the error for no tensors."""
    if empty and not tensors:
        raise UserError(f"{path}: {empty}")
    for key, t in tensors.items():
        if not t.is_floating_point() or not finite(t.float()):
            raise UserError(f"{path}: {key} ({t.dtype}) holds numbers that are infinite, NaN or integer")


def write(tensors, path, metadata=None):
    """Write a safetensors file by whole_files. Equal tensors and metadata give equal bytes."""
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))  # which aligns them all
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

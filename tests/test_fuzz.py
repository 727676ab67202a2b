"""Whatever a file holds: it is read as what it is, or refused in one line.

    FUZZ=20000 FUZZ_SEED=7 python -m pytest tests/test_fuzz.py      other inputs, and more

Every input is a good file with a few of these done to it: bytes changed, cut, doubled or swapped; or of a
safetensors file the header alone, its JSON with another key, shape, dtype, offset or note.
"""
import json
import os
import random
import resource
import struct
import warnings
from functools import cache

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from small import write_folder
from personal import LAYER, method, someone
from tiny import shared_model, tiny_hypernet

from clip import with_identifier
import hdb
import sd
from files import images
from program.console import UserError, one_line, printable
from files.hypernetwork import load_hypernet, save_hypernet
from files.lora import export_lora, load_lora
from methods.table import METHODS
from files.person import load_person, save_person
from training.trainer import Trainer

COUNT, SEED = int(os.environ.get("FUZZ", 60)), int(os.environ.get("FUZZ_SEED", 0))  # inputs for each format
ODD = [None, True, -1, 0, 2 ** 70, 1e400, "", "x" * 9000, "\x1b[2J", "a\nb", [], {}, [1] * 3000, "F64", "I8",
       {"a": {"b": []}}]


def mutated(data, dice):
    """`data` with one to four things done to it."""
    data = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        at, far = (dice.randrange(len(data) + 1) for _ in range(2))
        first, last = min(at, far), max(at, far)
        what = dice.randrange(6)
        if what == 0 and at < len(data):
            data[at] = dice.randrange(256)
        elif what == 1:
            del data[first:dice.choice([last, first + 1])]
        elif what == 2:
            data[at:at] = dice.randbytes(dice.choice([1, 8, 300]))
        elif what == 3:
            data[at:at] = data[first:last][:2000]
        elif what == 4:
            data[at:at + 4] = struct.pack("<f", dice.choice([float("nan"), float("inf"), -1e38, 0.]))
        else:
            data = data[:dice.randrange(len(data) + 1)]
    return bytes(data)


def reheaded(data, dice):
    """A safetensors file with one to three entries of its header changed, its length kept right."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + length])
    for _ in range(dice.randint(1, 3)):
        key = dice.choice([*header])
        entry, odd = header[key], dice.choice(ODD)
        inner = dice.choice([*entry]) if isinstance(entry, dict) and entry else None
        what = dice.randrange(5)
        if what == 0 and len(header) > 1:
            del header[key]
        elif what == 1:
            header[dice.choice([key[:-1], key + "x", str(odd)])] = entry
        elif what == 2 and inner is not None:
            entry[inner] = dice.choice([odd, str(odd), json.dumps(odd)])
        elif what == 3 and inner is not None and isinstance(entry[inner], list) and entry[inner]:
            entry[inner][0] = dice.choice([0, 1, entry[inner][0] + 1, -1, 2 ** 62])
        else:
            header[key] = odd
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length:]


@cache
def good(folder):
    """Name -> the file, or folder, of each format, and what reads it."""
    model, ours = method().model, shared_model()
    save_person(someone(), method(), folder / "person.safetensors")
    export_lora(someone().adapters(method()), folder / "lora.safetensors", {"title": "me"})
    side = {"A": torch.ones(2, 16), "B": torch.ones(16, 2)}
    save_file({f"{LAYER}.lora_{which}.weight": t for which, t in side.items()},
              folder / "peft.safetensors", {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 3})})
    net = tiny_hypernet(*hdb.HyperDreamBooth(ours).lidb.shape)
    save_hypernet(net, ours, folder / "hypernet.safetensors")
    state(folder / "run").save()
    Image.effect_noise((90, 80), 60).convert("RGB").save(folder / "photo.jpg", exif=Image.Exif())
    Image.effect_noise((90, 80), 60).convert("P").save(folder / "photo.png")
    write_folder(folder / "model")

    def whole(path):
        return sd.load(path.parents[1], "cpu")
    return {"person": ("person.safetensors", lambda path: load_person(path, method(), METHODS)),
            "lora": ("lora.safetensors", lambda path: load_lora(path, model)),
            "peft": ("peft.safetensors", lambda path: load_lora(path, model)),
            "hypernet": ("hypernet.safetensors", lambda path: load_hypernet(path, ours)),
            "state": ("run/state.safetensors", lambda path: state(path.parent)),
            "jpeg": ("photo.jpg", lambda path: images.read(path, 64)),
            "png": ("photo.png", lambda path: images.read(path, 64)),
            "config": ("model/unet/config.json", whole),
            "scheduler": ("model/scheduler/scheduler_config.json", whole),
            "vocabulary": ("model/tokenizer/vocab.json", whole),
            "weights": ("model/vae/diffusion_pytorch_model.safetensors", whole)}


def state(folder):
    return Trainer({"m": torch.nn.Linear(3, 2)}, folder, 50, .1, depends_on={"a": 1})


FORMATS = ("person", "lora", "peft", "hypernet", "state", "jpeg", "png", "config", "scheduler", "vocabulary",
           "weights")


@pytest.mark.parametrize("name", FORMATS)
def test_files_are_read_or_refused_in_one_line(tmp_path_factory, name):
    folder, dice = tmp_path_factory.mktemp("fuzz"), random.Random(f"{name} {SEED}")
    file, read = good(folder)[name]
    path, taken = folder / file, 0
    data = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read(path)  # as it is
    slow = name in ("config", "scheduler", "vocabulary", "weights")  # a whole model is read each time
    count = COUNT // 6 if slow else COUNT
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        change = reheaded if file.endswith("safetensors") and dice.random() < .5 else mutated
        path.write_bytes(change(data, dice))
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                read(path)
            taken += 1
            assert all(len(one_line(str(warning.message))) <= 500 for warning in told)
        except (UserError, SafetensorError, OSError) as error:
            assert len(one_line(str(error))) <= 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KB
    path.write_bytes(data)
    assert taken < count


def test_prompts_are_tokens_or_refused():
    dice, tokenizer = random.Random(SEED), shared_model().tokenizer
    for _ in range(COUNT):
        codes = [dice.choice([dice.randrange(32, 127), dice.randrange(0x110000)]) for _ in range(60)]
        text = "".join(map(chr, codes))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ids = tokenizer([with_identifier(printable(text + dice.choice(["", "[V]", " [v] face"])))])
        assert ids.shape == (1, 12) and 0 <= ids.min() and ids.max() < len(tokenizer.vocab)

"""The drawing in README: arrows point down only, networks stand on torch alone. And a rule of all rooms."""
import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import torch

import hdb
from files import images
from files.disk import read_json
from files.layouts import HERE
from files.lora import export_lora, load_lora
from files.merged import merge_to_folder
from methods import hyperdreambooth
from methods.table import METHODS
from files.person import is_person, load_person, save_person
from training.photos import Photos
from files.tokenizers import vocabulary_in, write_tokenizer
from training.trainer import Trainer

ROOT = Path(__file__).parents[1]
ROOMS = [{"attention"}, {"unet", "clip", "vae", "vit"}, {"adapters", "diffusion"}, {"program"},
         {"lidb", "hypernet"}, {"files"}, {"training"}, {"sd"}, {"hdb"}, {"nano"}, {"methods"},
         {"evaluation"}, {"personalize", "train", "tour"}, {"docs"}]
FLOOR = {name: floor for floor, names in enumerate(ROOMS) for name in names}


def imports(file):
    """The top names of all modules that a file imports, but for those of what it does as a program."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not isinstance(node, ast.If)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_arrows_point_down_only():
    rooms = [name for floor in ROOMS for name in floor]
    files = [*ROOT.glob("*.py"), *(file for name in rooms for file in ROOT.glob(f"{name}/*.py"))]
    rooms = {file: file.stem if file.parent == ROOT else file.parent.name for file in files}
    assert set(rooms.values()) == FLOOR.keys()  # a new module needs its place in README and above
    up = [(str(file.relative_to(ROOT)), name) for file, room in rooms.items() for name in imports(file)
          if name in FLOOR and name != room and FLOOR[name] >= FLOOR[room]]
    assert up == []


def modules():
    """name -> the names of our own modules that it imports."""
    files = [file for file in ROOT.rglob("*.py")
             if not {"tests", ".venv"} & set(file.relative_to(ROOT).parts)]
    ours = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    found = {}
    for name, file in ours.items():
        tree, found[name] = ast.parse(file.read_text(encoding="utf-8")), set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found[name] |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[name] &= ours.keys()
    return found


def test_no_module_imports_itself_in_a_circle():
    TopologicalSorter(modules()).prepare()  # CycleError, which names the circle


def test_programs_import_program_before_torch():
    """OpenMP reads its setting when torch is loaded, and Ctrl-C then ends a program without a traceback."""
    programs = [file for file in ROOT.rglob("*.py")
                if "console.run(" in file.read_text(encoding="utf-8") and "tests" not in file.parts]
    for file in programs:
        found = (node for node in ast.parse(file.read_text(encoding="utf-8")).body
                 if isinstance(node, (ast.Import, ast.ImportFrom)))
        names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in found]
        first = next(name for name in names if name.split(".")[0] not in sys.stdlib_module_names)
        assert first == "program", file


def test_networks_import_torch_alone():
    for name in ROOMS[0] | ROOMS[1] | ROOMS[2]:
        allowed = {"torch", "attention", *sys.stdlib_module_names}
        assert set(imports(ROOT / f"{name}.py")) <= allowed, name


def test_paths_may_be_text(tmp_path):
    """Of every public function that takes one: str(path) does what path does."""
    method, folder = hdb.HyperDreamBooth(hdb.load("nano", "cpu")), str(tmp_path)
    write_tokenizer(method.model.tokenizer, folder)
    assert [file.name for file in vocabulary_in(folder)] == ["vocab.json", "merges.txt"]
    adapters = method.lidb.adapters(torch.zeros(1, *method.lidb.shape))
    export_lora(adapters, f"{folder}/lora.safetensors")
    assert load_lora(f"{folder}/lora.safetensors", method.model).keys() == adapters.keys()
    person = hyperdreambooth.person(torch.zeros(1, *method.lidb.shape))
    save_person(person, method, f"{folder}/me.safetensors")
    assert is_person(f"{folder}/me.safetensors")
    assert load_person(f"{folder}/me.safetensors", method, METHODS).tensors.keys() == {"theta"}
    merge_to_folder(method.model, adapters, f"{HERE}/nano", f"{folder}/merged")
    assert hdb.load(f"{folder}/merged", "cpu").checksums == method.model.checksums
    assert read_json(f"{folder}/merged/unet/config.json")["sample_size"] == 16
    vit = hdb.load_hypernet(f"{HERE}/nano/hypernet.safetensors", method.model).vit
    images.save(images.to_pil(torch.zeros(3, 64, 64)), f"{folder}/photos/a.png")
    assert images.read(f"{folder}/photos/a.png", 64).shape == (1, 3, 64, 64)
    assert Photos(f"{folder}/photos", method.model, vit, "a face", f"{folder}/cache").count == 2
    assert Trainer({"vit": vit.requires_grad_()}, f"{folder}/run", 1, .1).step == 0

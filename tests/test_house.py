"""The drawing in README: arrows point down only, and the networks stand on torch alone."""
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = [{"unet", "clip", "vae", "vit"}, {"edits", "diffusion"}, {"lidb", "hypernet"}, {"files"},
         {"trainer", "sd"}, {"hdb"}, {"nano"}, {"personalize", "train", "evaluate"}]
FLOOR = {name: floor for floor, names in enumerate(ROOMS) for name in names}


def imports(file):
    """The top names of all modules that a file imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_arrows_point_down_only():
    files = [*ROOT.glob("*.py"), *ROOT.glob("files/*.py"), *ROOT.glob("nano/*.py")]
    rooms = {file: file.stem if file.parent == ROOT else file.parent.name for file in files}
    assert set(rooms.values()) == FLOOR.keys()  # a new module needs its place in README and above
    up = [(str(file.relative_to(ROOT)), name) for file, room in rooms.items() for name in imports(file)
          if name in FLOOR and name != room and FLOOR[name] >= FLOOR[room]]
    assert up == []


def test_networks_import_torch_alone():
    for name in ROOMS[0] | ROOMS[1]:
        allowed = {"torch", *sys.stdlib_module_names}
        assert set(imports(ROOT / f"{name}.py")) <= allowed, name

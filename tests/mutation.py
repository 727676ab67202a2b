"""Mutation testing of the method, for development: python tests/mutation.py FOLDER [mutant …]

Needs mutmut (pip install mutmut==3.8.1), half an hour, and FOLDER, outside the repository, for a copy in
which decorators are calls, as mutmut leaves decorated functions alone. In FOLDER `mutmut results` lists what
survived, `mutmut show NAME` what that is. A second run in FOLDER does only functions that changed; after
changes to tests, name the mutants, such as "hdb.*".
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import libcst as cst

ROOT = Path(__file__).parents[1]
MUTATED = "adapters", "lidb", "hypernet", "diffusion", "sd", "hdb", "training/fit", "training/trainer"
SETTINGS = {
    "source_paths": [f"{name}.py" for name in MUTATED],
    "also_copy": [p.name for p in ROOT.glob("*.py")] + [
        "files", "nano", "training", "program", "methods", "pytest.ini"],
    "pytest_add_cli_args_test_selection": [f"tests/test_{Path(name).name}.py" for name in MUTATED],
    "do_not_mutate_patterns": [r"raise \w+\("],  # what messages say
    "process_isolation": "forkserver",           # as torch has threads
    "timeout_multiplier": 5.}
FASTEST_FIRST = """

def pytest_collection_modifyitems(items):
    import json
    stats = Path("mutmut-stats.json")
    seconds = json.loads(stats.read_text())["duration_by_test"] if stats.exists() else {}
    items.sort(key=lambda item: seconds.get(item.nodeid, 0))
"""


class Undecorate(cst.CSTTransformer):
    """@d def f -> def f; f = d(f)."""

    def leave_FunctionDef(self, _, function):
        name = value = cst.Name(function.name.value)
        for decorator in reversed(function.decorators):
            value = cst.Call(decorator.decorator, [cst.Arg(value)])
        after = cst.SimpleStatementLine([cst.Assign([cst.AssignTarget(name)], value)])
        plain = function.with_changes(decorators=())
        return cst.FlattenSentinel([plain, after] if function.decorators else [plain])


folder, mutants = Path(sys.argv[1]), sys.argv[2:]
shutil.copytree(ROOT, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", "__pycache__"))
for name in MUTATED:
    file = folder / f"{name}.py"
    file.write_text(cst.parse_module(file.read_text()).visit(Undecorate()).code)
with open(folder / "tests/conftest.py", "a") as f:
    f.write(FASTEST_FIRST)
settings = "".join(f"{key} = {json.dumps(value)}\n" for key, value in SETTINGS.items())
(folder / "pyproject.toml").write_text(f"[tool.mutmut]\n{settings}")
once = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "2000"}
subprocess.run([Path(sys.executable).with_name("mutmut"), "run", "--max-children", "1", *mutants], cwd=folder,
               env=os.environ | once)

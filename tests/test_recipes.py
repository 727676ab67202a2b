"""docs/recipes.md: its diffs still fit the code."""
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_each_place_that_a_recipe_changes_is_there_once():
    text = Path(ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    diffs = "".join(re.findall("```diff\n(.*?)```", text, re.S))
    files = re.findall("^--- (.*)\n((?:(?!--- ).*\n)*)", diffs, re.M)
    assert len(files) == 10
    for file, changes in files:
        for change in changes.split("@@\n"):
            before = "".join(line[1:] for line in change.splitlines(True) if line[0] in " -")
            assert (ROOT / file).read_text(encoding="utf-8").count(before) == 1, (file, before)

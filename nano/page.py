"""The page that tour.py writes about itself: each step's text, its picture, and what it printed."""
import time
from itertools import takewhile
from pathlib import Path

from program import START

import torch
import torch.nn.functional as F

from files import images
from files.layouts import HERE

HEAD = """# The tour

Read this if you want the paper from end to end, with what each step makes. [tour.py](../tour.py) writes this
page, numbers and pictures included: run `python tour.py` and compare.
"""


def steps_of(file):
    """What precedes the first "# %%" line of `file`; then (title, text, code) of each step."""
    before, *steps = file.read_text(encoding="utf-8").split("\n# %% ")
    found = []
    for step in steps:
        title, *lines = step.strip().splitlines()
        text = [line.removeprefix("# ") for line in takewhile(lambda line: line.startswith("#"), lines)]
        found.append((title, "\n".join(text), "\n".join(lines[len(text):])))
    return before, found


class Page:
    """tour.md, with its pictures in tour/: in docs/, or with `fast` in out/."""

    def __init__(self, file, fast):
        self.folder = Path("out") if fast else HERE / "docs"
        (self.folder / "tour").mkdir(parents=True, exist_ok=True)
        self.steps, self.parts, self.said = steps_of(file)[1], [HEAD], []

    def say(self, text, numbers=None):
        """Print a line, which the page shows too; numbers: name -> number, added to it."""
        if numbers:
            text += " – " + ", ".join(f"{name}: {number:.2f}" for name, number in numbers.items())
        if not self.said:
            print(self.steps[len(self.parts) - 1][0])
        print(f"  {text}")
        self.said.append(text)

    def show(self, title, columns):
        """Save and return a step's picture, and add the step to the page. columns: head -> (rows, 3, H,
        W)."""
        number = len(self.parts)
        file = self.folder / f"tour/{number}.png"
        sheet = images.sheet(torch.stack([*columns.values()], 1).flatten(0, 1), len(columns), [*columns])
        images.save(sheet, file)
        heading, text, _ = self.steps[number - 1]
        said = "\n".join(self.said)
        self.parts.append(f"## {heading}\n\n{text}\n\n![{title}](tour/{file.name})\n\n```\n{said}\n```\n")
        self.said = []
        (self.folder / "tour.md").write_text("\n".join(self.parts), encoding="utf-8")
        print(f"  {file}, after {time.time() - START:.0f} s")
        return sheet


def to_scale(matrices, pixels=4):
    """head -> picture (1, 3, H, W) of each of the matrices, name -> matrix, in grey, `pixels` a number."""
    side, columns = 6 + max(size for matrix in matrices.values() for size in matrix.shape), {}
    for name, matrix in matrices.items():
        rows, width = matrix.shape
        grey = matrix / matrix.abs().max()
        padded = F.pad(grey, (3, side - width - 3, 3, side - rows - 3), value=1.)
        picture = padded.repeat_interleave(pixels, 0).repeat_interleave(pixels, 1)
        columns[f"{name} {rows} x {width}"] = picture.expand(1, 3, -1, -1)
    return columns

"""What the steps of tour.py share, and the page that it writes about itself: of every step its text, its
picture and what it printed."""
import inspect
from pathlib import Path

import torch.nn.functional as F

import hdb
from files import images
from files.layouts import HERE

HEAD = """# The tour

Read this if you want the paper from end to end, with what each step makes. [tour.py](../tour.py) writes this
page, numbers and pictures included: run `python tour.py` and compare.
"""


class Tour:
    """The model, the method, and the page: tour.md in `folder`, with its pictures in tour/. Steps leave here
    what later ones need."""

    def __init__(self, folder, fast):
        self.folder, self.parts, self.fast = Path(folder), [HEAD], fast
        (self.folder / "tour").mkdir(parents=True, exist_ok=True)
        self.count, self.steps = (2, 1) if fast else (8, 15)  # people; of the sampler
        self.model = hdb.load("nano", "cpu")
        hypernet = hdb.load_hypernet(HERE / "nano/hypernet.safetensors", self.model)
        self.method = hdb.HyperDreamBooth(self.model, hypernet)

    def draw(self, prompt, adapters, count=1):
        """Pictures (count, 3, H, W) of the prompt, always from the same noises."""
        return self.model.sample([prompt] * count, steps=self.steps, adapters=adapters)

    def likeness(self, pictures):
        """Their mean likeness to the photos of the first people, one each."""
        return self.judge.likeness(pictures, self.photos[:len(pictures)]).mean().item()

    def say(self, line):
        """Print a line, which the page shows too."""
        print(f"  {line}")
        self.said.append(line)

    def show(self, title, pictures, heads):
        """The step's picture: these (B, 3, H, W), under a head for each column."""
        images.save(images.sheet(pictures, len(heads), heads), self.file)
        self.picture = f"![{title}](tour/{self.file.name})"

    def start(self, number):
        """What comes next belongs to the step of this number."""
        self.file, self.said = self.folder / f"tour/{number}.png", []

    def take(self, number, step):
        """Run one step, and put its docstring, its picture and what it said on the page."""
        title, _, text = inspect.getdoc(step).partition("\n\n")
        self.start(number)
        print(f"{number}. {title}")
        step(self)
        said = "\n".join(self.said)
        self.parts.append(f"## {number}. {title}\n\n{text}\n\n{self.picture}\n\n```\n{said}\n```\n")
        (self.folder / "tour.md").write_text("\n".join(self.parts), encoding="utf-8")


def to_scale(matrix, side, pixels=4):
    """A matrix as a grey picture (3, pixels · side, pixels · side) with a white margin."""
    rows, columns = matrix.shape
    grey = matrix / matrix.abs().max().clamp(min=1e-9)
    padded = F.pad(grey, (3, side - columns - 3, 3, side - rows - 3), value=1.)
    return padded.repeat_interleave(pixels, 0).repeat_interleave(pixels, 1).expand(3, -1, -1)

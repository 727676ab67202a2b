"""The figures of README and docs. Development only: it needs matplotlib.

    python -m docs.figures          # the same commit gives the same bytes

pipeline.png, lidb.png, world.png, modules.png, gap.png, training.png. The experiment (python -m evaluation)
and the tour draw their own.
"""
import json
import runpy
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from evaluation.figures import training
from files import images
from files.layouts import HERE
from nano import faces, seeds

HERE_DOCS = Path(__file__).parent
COLOURS = {"given": "#e8e8e8", "frozen": "#cfe3f7", "learnt": "#f9d9b8", "result": "#d5edd0"}


def sheet(width, height):
    """An empty figure of this size in inches, and its axes without a frame, one unit an inch."""
    figure = Figure((width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes, x, y, width, height, text, kind, size=9):
    """A labelled box with its lower left corner at (x, y)."""
    axes.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=.06",
                                  fc=COLOURS[kind], ec="#555555", lw=.8))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, linespacing=1.35)


def arrow(axes, start, end, text="", above=.1):
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#333333", "lw": 1})
    middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + above
    axes.text(*middle, text, ha="center", va="bottom", fontsize=7.5)


def pipeline():
    """The pipeline from photo to picture, with the shapes on SD 1.5 and on nano."""
    figure, axes = sheet(10, 3.6)
    box(axes, .1, 2.2, 1.2, .8, "photo\n3×512×512\n(3×128×128)", "given", 8)
    box(axes, 1.9, 2.2, 1.3, .8, "ViT encoder\nonce", "frozen")
    box(axes, 3.9, 2.2, 1.6, .8, "decoder\na token a layer\ns = 4 passes", "learnt")
    box(axes, 6.3, 2.2, 1.4, .8, "θ\n192×150 numbers\n(79×96)", "result")
    box(axes, 8.5, 2.2, 1.4, .8, "LiDB, Eq. 1\nΔW of each\nof 192 (79) layers", "frozen")
    for left, right, text in ((1.3, 1.9, ""), (3.2, 3.9, "f"), (5.5, 6.3, "Eq. 3"), (7.7, 8.5, "")):
        arrow(axes, (left, 2.6), (right, 2.6), text, .03)
    axes.annotate("", (4.3, 3.0), (5.1, 3.0), arrowprops={"arrowstyle": "-|>", "color": "#333333",
                                                          "connectionstyle": "arc3,rad=.7"})
    axes.text(4.7, 3.32, "its own last estimate", ha="center", fontsize=7.5)
    box(axes, .1, .5, 1.9, .8, "fine-tuning, 40 steps\na LoRA of rank 4\non the photo", "learnt")
    box(axes, 3.2, .5, 2.5, .8, "Stable Diffusion\nW + ΔW + A·B\nfrozen W", "frozen")
    box(axes, 7.2, .5, 2.4, .8, "“a [V] face as a rock star”\na picture of the person", "result")
    arrow(axes, (2.0, .9), (3.2, .9), "A·B", .03)
    arrow(axes, (5.7, .9), (7.2, .9), "sampler", .03)
    arrow(axes, (.7, 2.2), (.7, 1.3))
    axes.plot((9.2, 9.2, 4.4), (2.2, 1.75, 1.75), color="#333333", lw=1)
    arrow(axes, (4.4, 1.76), (4.4, 1.3))
    axes.text(6.8, 1.8, "ΔW stays as predicted", ha="center", fontsize=7.5)
    for i, (kind, text) in enumerate((("frozen", "frozen"), ("learnt", "trained"), ("result", "result"))):
        axes.add_patch(Rectangle((.1 + i * 1.1, .1), .2, .15, fc=COLOURS[kind], ec="#555555", lw=.6))
        axes.text(.37 + i * 1.1, .175, text, va="center", fontsize=8)
    axes.text(9.9, .175, "shapes on SD 1.5, in brackets on nano", ha="right", va="center", fontsize=8)
    return figure


def lidb():
    """The matrices of Eq. 1 for a layer of 320 by 320, to scale, and ΔW."""
    figure, axes = sheet(9, 3.2)
    unit, top = 2.3 / 320, 2.75
    parts = [("ΔW\n320×320", 320, 320, "given"), ("=", 0, 0, ""), ("A_aux\n320×100", 320, 100, "frozen"),
             ("·", 0, 0, ""), ("A_train\n100×1", 100, 1, "learnt"), ("·", 0, 0, ""),
             ("B_train\n1×50", 1, 50, "learnt"), ("·", 0, 0, ""), ("B_aux\n50×320", 50, 320, "frozen")]
    at = .2
    for text, rows, columns, kind in parts:
        if not kind:
            axes.text(at + .1, top - .5, text, fontsize=14, ha="center", va="center")
            at += .35
            continue
        width, height = max(columns * unit, .03), max(rows * unit, .03)
        axes.add_patch(Rectangle((at, top - height), width, height, fc=COLOURS[kind], ec="#555555", lw=.8))
        axes.text(at + width / 2, top + .08, text, ha="center", va="bottom", fontsize=8.5)
        at += max(width, .5) + .12
    axes.text(4.2, .7, "blue, frozen: a seed makes them again\norange, trained: 150 numbers a layer,\n"
              "28,800 in 192 layers of SD 1.5;\na rank-1 LoRA has 385,344", fontsize=9)
    return figure


def world():
    """The world: rows of pictures that differ in one attribute of a person or one circumstance of a photo."""
    identity = faces.identities([seeds.EXAMPLE]).repeat(6, 1)
    calm = torch.full((6, len(faces.CIRCUMSTANCES)), .5)
    rows = []
    for name in ("hair_style", "hair_colour", "skin", "beard", "glasses"):
        people = identity.clone()
        people[:, faces.IDENTITY.index(name)] = (torch.arange(6) + .5) / 6
        rows.append((name.replace("_", " "), people, calm))
    for name in ("yaw", "smile", "light", "background"):
        photo = calm.clone()
        photo[:, faces.CIRCUMSTANCES.index(name)] = (torch.arange(6) + .5) / 6
        rows.append((name, identity, photo))
    figure = Figure((6.4, 8.4), layout="constrained")
    for line, (name, people, photo) in zip(figure.subplots(len(rows), 6), rows):
        for axes, picture in zip(line, faces.render(people, photo, torch.zeros(6, dtype=torch.long))):
            axes.imshow(images.to_pil(picture))
            axes.set(xticks=[], yticks=[])
        kind = "a person" if people is not identity else "a photo"
        line[0].set_ylabel(f"{name}\n({kind})", fontsize=8)
    return figure


def modules():
    """The modules of tests/test_house.py, floor by floor, with lines for their imports."""
    house = runpy.run_path(str(HERE / "tests/test_house.py"))
    figure, axes = sheet(8, .62 * len(house["ROOMS"]) + .3)
    places = {}
    for y, floor in enumerate(house["ROOMS"]):
        for i, name in enumerate(sorted(floor)):
            x = 4 + (i - (len(floor) - 1) / 2) * 1.5
            x += (-1) ** y * 1.1 * (len(floor) == 1)  # two columns keep the lines apart
            places[name] = x, .35 + .62 * y
    for name, (x, y) in places.items():
        files = (HERE / name).glob("*.py") if (HERE / name).is_dir() else [HERE / f"{name}.py"]
        below = {other for file in files for other in house["imports"](file)}
        for other in sorted(below & places.keys() - {name}):
            axes.plot((x, places[other][0]), (y, places[other][1]), color="#bbbbbb", lw=.6, zorder=0)
        folder = (HERE / name).is_dir()
        box(axes, x - .65, y - .17, 1.3, .34, f"{name}/" if folder else f"{name}.py",
            "given" if folder else "learnt", 8.5)
    return figure


def gap():
    """Likeness against the gap that training/watched.py logs, over a training on nano, and its steps."""
    lines = [json.loads(line) for line in (HERE / "results/gap.jsonl").read_text().splitlines()]
    figure = Figure((6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([line["gap"] for line in lines], [line["likeness photo"] for line in lines], ".-")
    for line in lines:
        if line["step"] % 120 == 0:
            axes.annotate(f"{line['step']} steps", (line["gap"], line["likeness photo"]), (6, -9),
                          textcoords="offset points", fontsize=8)
    axes.set(xlabel="gap: denoising loss under another person's θ − under one's own",
             ylabel="likeness to the photo")
    axes.grid(alpha=.3)
    return figure


def main():
    for draw in pipeline, lidb, world, modules, gap:
        path = HERE_DOCS / f"{draw.__name__}.png"
        draw().savefig(path, dpi=110, metadata={"Software": None})
        print(path)
    print(training(HERE / "results/training.jsonl", HERE_DOCS / "training.png"))


if __name__ == "__main__":
    main()

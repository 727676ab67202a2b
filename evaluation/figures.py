"""The report's figures: dots for the systems, curves for the knobs, grids of pictures. Development only: they
need matplotlib."""
import io
import json
import textwrap

from PIL import Image

from evaluation.report import TABLES, picture
from files import images

# file -> the numbers across and up, and their labels
DOTS = {"style.png": ("style", "styled", "share of styled pictures in the right style",
                      "likeness to another photo, styled"),
        "copied.png": ("copied", "both", "copied from the photo given (1: all of its circumstances)",
                       "likeness to another photo × style"),
        "obeyed.png": ("obeyed", "both", "share of looks that are drawn when asked for",
                       "likeness to another photo × style")}
CURVES = {("HyperDreamBooth", "steps"): "steps of fine-tuning", ("HyperDreamBooth", "rank"): "rank",
          ("HyperDreamBooth", "strength"): "strength", ("Only Hyper", "passes"): "passes, prediction alone"}
# The panels of a training's log: the start of its lines' names, and its title
LEARNT = {"likeness": "likeness", "leaked": "likeness without [V]", "obeyed": "looks drawn when asked for"}
NAMES = {f"likeness {k}": f"plain, after pass {k}" for k in (1, 2, 3)} | {"likeness photo": "plain, the last"}
COLUMNS = "photo", "pixar", "bark", "rock star", "king", "beach", "round glasses"


def write(folder, found, scores):
    """Write the figures that have data; return their paths, [] without matplotlib. found: of report.write."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        print(f"no figures: {error}")
        return []
    listed = dict.fromkeys(system for systems in TABLES.values() for system in systems)
    main = {system: found[system, "", ""] for system in listed if (system, "", "") in found}
    paths = [dots(main, folder / name, *axes) for name, axes in DOTS.items()]
    paths.append(curves(found, folder / "curves.png"))
    for title, systems in TABLES.items():
        number = title.split(":")[0].lower().replace(" ", "_")
        here = [system for system in systems if system in main]
        paths.append(grid(folder, here, scores, folder / f"{number}.png"))
    return [path for path in paths if path]


def sheet(width, height):
    """An empty figure of this size in inches."""
    from matplotlib.figure import Figure
    return Figure((width, height), layout="constrained")


def dots(main, file, across, up, xlabel, ylabel):
    """A dot ± a standard error for each system that has both numbers; the axes end at the outermost dots."""
    # the model itself is far from all others, the passes would hide each other, and one person has no error
    shown = {system: values for system, values in main.items()
             if system != "the model itself" and not system.startswith("k = ")}
    points = {system: (values[across], values[up]) for system, values in shown.items()
              if values.get(across) and values.get(up) and values[up][2] > 1}
    if len(points) < 2:
        return None
    figure = sheet(7, 5)
    axes = figure.subplots()
    for system, ((x, x_error, _), (y, y_error, _)) in points.items():
        ours = system == "HyperDreamBooth"
        axes.errorbar(x, y, y_error or 0, x_error or 0, "o", color="C3" if ours else "C0", elinewidth=1)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.margins(.12)
    axes.grid(alpha=.3)
    name_dots(axes, {system: (x[0], y[0]) for system, (x, y) in points.items()})
    figure.savefig(file, dpi=110)
    return file


def name_dots(axes, points):
    """Write the names of points, name -> (x, y), in a column beside the axes, with lines to their dots."""
    ordered = sorted(points, key=lambda name: points[name][1])
    for i, name in enumerate(ordered):
        beside = 1.08, (i + .5) / len(ordered)
        line = {"arrowstyle": "-", "color": "grey", "lw": .5, "relpos": (0, .5)}
        axes.annotate(name, points[name], beside, textcoords="axes fraction", va="center", arrowprops=line)


def curves(found, file):
    """A panel for each knob: likeness × style against its value, ± a standard error."""
    panels = {key: {float(value): numbers["both"] for (*setting, value), numbers in found.items()
                    if tuple(setting) == key and numbers.get("both")} for key in CURVES}
    panels = {key: dict(sorted(points.items())) for key, points in panels.items() if points}
    if not panels:
        return None
    figure = sheet(3 * len(panels), 2.8)
    for axes, (key, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        middles, errors, _ = zip(*points.values())
        axes.errorbar([*points], middles, [error or 0 for error in errors], fmt="o-", capsize=2)
        axes.set(xlabel=CURVES[key])
        axes.grid(alpha=.3)
    figure.axes[0].set(ylabel="likeness to another photo × style")
    figure.savefig(file, dpi=110)
    return file


def training(log, file):
    """Curves of what train.py measured on watched people, from its log.jsonl."""
    watched = [line for line in map(json.loads, log.read_text().splitlines()) if "obeyed" in line]
    figure = sheet(9, 3)
    for axes, (start, title) in zip(figure.subplots(1, 3), LEARNT.items()):
        for name in watched[-1]:
            if name.startswith(start):
                axes.plot([line["step"] for line in watched], [line[name] for line in watched], ".-",
                          label=NAMES.get(name, name.removeprefix(f"{start} ")))
        axes.set(xlabel="steps", title=title)
        axes.legend(fontsize=7)
        axes.grid(alpha=.3)
    figure.savefig(file, dpi=110)
    return file


def grid(folder, systems, scores, file, people=2):
    """The first people's pictures, a row for each person and system. None without two rows."""
    names = [name for name in COLUMNS if name in scores.prompts] or [*scores.prompts][:len(COLUMNS)]
    rows = [(who, system) for who in range(people) for system in systems
            if all(picture(folder, system, who, name).exists() for name in names)]
    if len(rows) < 2:
        return None
    figure = sheet(1.3 * (len(names) + 1) + 1.4, 1.3 * len(rows) + .5)
    panels = figure.subplots(len(rows), len(names) + 1, squeeze=False)
    for line, (who, system) in zip(panels, rows):
        files = [picture(folder, "photo", who, ""), *(picture(folder, system, who, name) for name in names)]
        for axes, shown in zip(line, files):
            axes.imshow(images.to_pil(images.read(shown, 128)[0]))
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(f"{system}\nperson {who + 1}", rotation=0, ha="right", va="center", fontsize=9)
    for axes, name in zip(panels[0], ("photo given", *(scores.prompts[name] for name in names))):
        axes.set_title(textwrap.fill(name, 20), fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    images.save(Image.open(drawn), file)  # which marks it as generated
    return file

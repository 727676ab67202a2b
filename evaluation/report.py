"""From scores.csv and costs.csv: tables in Markdown, a grid of pictures for each, and a scatter of likeness
against style with every knob as a curve."""
import csv
from collections import defaultdict
from math import isnan
from pathlib import Path
from statistics import mean, stdev

import torch
from PIL import Image, ImageDraw, ImageFont

from files import images
from files.checkpoints import write_text

# The paper's: Face Rec., DINO, CLIP-I, CLIP-T
PAPER = {"HyperDreamBooth": (.655, .473, .577, .286), "DreamBooth": (.618, .441, .546, .282),
         "Textual Inversion": (.623, .289, .472, .277), "DreamBooth-Agg-1": (.615, .323, .431, .313),
         "DreamBooth-Agg-2": (.616, .360, .467, .302), "No Hyper": (.647, .392, .498, .299),
         "Only Hyper": (.631, .414, .501, .298), "k = 1": (.648, .464, .570, .288)}
METRICS = "Face Rec.", "DINO", "CLIP-I", "CLIP-T"
TABLES = {"Table 1, the systems": ("HyperDreamBooth", "DreamBooth", "Textual Inversion", "LoRA DreamBooth",
                                   "Perfusion", "E4T", "the model itself"),
          "Table 2, DreamBooth in fewer steps": ("HyperDreamBooth", "DreamBooth", "DreamBooth-Agg-1",
                                                 "DreamBooth-Agg-2"),
          "Table 3, what the parts do": ("HyperDreamBooth", "No Hyper", "Only Hyper", "k = 1")}
MISS = .3  # a likeness below: somebody else
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#ff7f0e", "#7f7f7f", "#17becf",
           "#bcbd22", "#000000", "#3a6", "#a36")


def read(path):
    """The lines of a CSV file as dicts."""
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def over_people(rows, name):
    """The mean of a score over people, of each the mean of their pictures; and its standard error."""
    each = defaultdict(list)
    for row in rows:
        each[row["person"]].append(float(row[name]))
    means = [mean(values) for values in each.values()]
    return mean(means), stdev(means) / len(means) ** .5 if len(means) > 1 else float("nan")


def summary(rows, scores):
    """heading -> (mean, standard error) over people of a system's pictures, all of one setting."""
    plain = [row for row in rows if row["prompt"] == scores.plain]
    styled = [row for row in rows if row["prompt"] != scores.plain]
    if "likeness" not in scores.names:
        return {name: over_people(rows, name) for name in scores.names}
    missed = [{"person": row["person"], "missed": float(row["likeness"]) < MISS} for row in styled]
    return {'"a [V] face"': over_people(plain, "likeness"), "styled": over_people(styled, "likeness"),
            "style": over_people(styled, "style"), "likeness × style": over_people(styled, "both"),
            f"under {MISS}": over_people(missed, "missed")}


def write(folder, scores):
    """Write tables.md, scatter.png and the grids into `folder`; the paths of what was written."""
    rows, costs = read(folder / "scores.csv"), {row["system"]: row for row in read(folder / "costs.csv")}
    settings = defaultdict(list)
    for row in rows:
        settings[row["system"], row["knob"], row["value"]].append(row)
    found = {key: summary(some, scores) for key, some in settings.items()}
    # each once, in the order of the tables, so that the colours stay
    listed = dict.fromkeys(system for systems in TABLES.values() for system in systems)
    main = {system: found[system, "", ""] for system in listed if (system, "", "") in found}
    count = {key: len({row["person"] for row in some}) for key, some in settings.items()}
    prompts = {row["prompt"] for row in rows if not row["knob"]}
    parts = [f"{len(prompts)} prompts a person; ± is the standard error over people."]
    paths = [folder / "tables.md"]
    for title, systems in TABLES.items():
        here = [system for system in systems if system in main]
        if here:
            people = {system: count[system, "", ""] for system in here}
            parts += [f"**{title}**", table({system: main[system] for system in here}, people, costs)]
            number = title.split(",")[0].lower().replace(" ", "_")
            paths += grid(folder, here, scores, folder / f"{number}.png")
    curves = {key: values for key, values in found.items() if key[1]}
    for system, knob in dict.fromkeys(key[:2] for key in curves):
        here = [key for key in curves if key[:2] == (system, knob)]
        points = {f"{knob} = {key[2]}": curves[key] for key in here}
        people = {f"{knob} = {key[2]}": count[key] for key in here}
        parts += [f"**{system}, by {knob}**", table(points, people, {})]
    write_text("\n\n".join(parts) + "\n", folder / "tables.md")
    if "likeness" in scores.names:
        scatter(main, curves, folder / "scatter.png")
        paths.append(folder / "scatter.png")
    return paths


def table(rows, people, costs):
    """Markdown of name -> summary, with how many people it is of, seconds and size where they are known, and
    the paper's figures."""
    paper = any(name in PAPER for name in rows)
    heads = ["", "people", *next(iter(rows.values()))] + (["seconds", "KB"] if costs else [])
    heads += [f"paper: {metric}" if metric == METRICS[0] else metric for metric in METRICS] if paper else []
    lines = [heads, ["---"] * len(heads)]
    for name, values in rows.items():
        line = [name, str(people[name]), *(figure(*pair) for pair in values.values())]
        if costs:
            seconds, size = (float(costs[name][key]) if name in costs else 0 for key in ("seconds", "bytes"))
            line += [f"{seconds:.1f}", f"{size / 1000:,.1f}"]
        if paper:
            line += [f"{value:.3f}" for value in PAPER.get(name, ())] or ["–"] * len(METRICS)
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(value, error):
    """A mean and its standard error, in words; of one person alone there is none."""
    return f"{value:.3f}" if isnan(error) else f"{value:.3f} ± {error:.3f}"


def picture(folder, system, person, prompt):
    """Where a picture for the grids is kept."""
    return Path(folder, "pictures", "_".join((system, str(person), prompt)).replace(" ", "-") + ".png")


def grid(folder, systems, scores, path, people=2, prompts=5):
    """A row for each system: of the first people, photo and pictures of the first prompts. Writes a PNG and
    gives [path], or [] where pictures are missing."""
    names = [*scores.prompts][:prompts]
    rows = [[picture(folder, "photo", who, "") if name is None else picture(folder, system, who, name)
             for who in range(people) for name in (None, *names)] for system in systems]
    if not all(file.exists() for row in rows for file in row):
        return []
    sheet = torch.cat([images.read(file, 128) for row in rows for file in row])
    drawn = images.sheet(sheet, len(rows[0]))
    labelled = Image.new("RGB", (drawn.width + 170, drawn.height), "white")
    labelled.paste(drawn, (170, 0))
    for i, system in enumerate(systems):
        ImageDraw.Draw(labelled).text((6, 128 * i + 54), system, "black", ImageFont.load_default(16))
    images.save(labelled, path)
    return [path]


def scatter(main, curves, path, side=900, edge=70):
    """Styled likeness (up) against style accuracy (right), a dot for each system, a line for each knob."""
    image = Image.new("RGB", (side, side), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)

    def at(values):
        style, likeness = values["style"][0], values["styled"][0]
        return edge + style * (side - 2 * edge), side - edge - max(0, likeness) * (side - 2 * edge)

    # axes, with a grid
    for i in range(0, 11, 2):
        x, y = at({"style": (i / 10,), "styled": (i / 10,)})
        draw.line([(x, edge), (x, side - edge)], "#ddd")
        draw.line([(edge, y), (side - edge, y)], "#ddd")
        draw.text((x - 10, side - edge + 8), f"{i / 10:.1f}", "black", font)
        draw.text((edge - 36, y - 9), f"{i / 10:.1f}", "black", font)
    draw.text((side / 2 - 60, side - 30), "style accuracy", "black", font)
    draw.text((10, 20), "likeness on styled prompts", "black", font)

    labels = []
    for colour, (system, knob) in zip(COLOURS[::-1], dict.fromkeys(key[:2] for key in curves)):
        points = [(at(values), key[2]) for key, values in curves.items() if key[:2] == (system, knob)]
        draw.line([point for point, _ in points], colour, 2)
        for (x, y), _ in points:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], colour)
        point, value = points[0]
        labels.append((point, f"{system}: {knob} {value}", colour))
    for colour, (system, values) in zip(COLOURS, main.items()):
        x, y = at(values)
        draw.ellipse([x - 6, y - 6, x + 6, y + 6], colour)
        labels.append(((x, y), system, colour))

    # names to the left of their points, from the top down, apart
    lowest = 0
    for (x, y), text, colour in sorted(labels, key=lambda label: label[0][1]):
        lowest = max(lowest + 17, y - 8)
        draw.text((x - 10 - draw.textlength(text, font), lowest), text, colour, font)
    images.save(image, path)

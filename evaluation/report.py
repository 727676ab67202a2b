"""Makes tables.md from a folder's scores.csv and costs.csv. A system that was measured only in part gets a
line of the numbers that are there."""
import csv
import random
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from files.disk import read_text, write_text

# The paper's: Face Rec., DINO, CLIP-I, CLIP-T
PAPER = {"HyperDreamBooth": (.655, .473, .577, .286), "DreamBooth": (.618, .441, .546, .282),
         "Textual Inversion": (.623, .289, .472, .277), "DreamBooth-Agg-1": (.615, .323, .431, .313),
         "DreamBooth-Agg-2": (.616, .360, .467, .302), "No Hyper": (.647, .392, .498, .299),
         "Only Hyper": (.631, .414, .501, .298), "k = 1": (.648, .464, .570, .288)}
OURS = "HyperDreamBooth"
TABLES = {"Table 1: the systems": (OURS, "DreamBooth", "Textual Inversion", "LoRA DreamBooth", "Perfusion",
                                   "E4T", "the model itself"),
          "Table 2: DreamBooth in fewer steps": (OURS, "DreamBooth", "DreamBooth-Agg-1", "DreamBooth-Agg-2"),
          "Table 3: what the parts do": (OURS, "No Hyper", "Only Hyper", "k = 1", "k = 2", "k = 3")}
# The paper's votes in %: for HyperDreamBooth, for the other, for neither
STUDIES = {"Table 4: preferred for identity and style": {"DreamBooth": (64.8, 23.3, 11.9),
                                                         "Textual Inversion": (70.6, 21.6, 7.8)},
           "Table 5: preferred, against E4T": {"E4T": (60.0, 37.5, 2.5)},
           "The same against the systems that the paper leaves out": {
               "LoRA DreamBooth": None, "Perfusion": None, "No Hyper": None, "Only Hyper": None}}
MISS = .3      # a likeness below this is another person's
LEVEL = .02    # a difference in likeness within which a pair is undecided
RESAMPLES = 2000


def read(path):
    """The lines of a CSV file as dicts, with numbers as floats and empty cells as None; [] without a file."""
    if not Path(path).exists():
        return []
    lines = csv.DictReader(read_text(path).splitlines())
    texts = {"system", "knob", "value", "person", "prompt"}
    return [{name: cell if name in texts else float(cell) if cell else None for name, cell in line.items()}
            for line in lines]


def over_people(pairs):
    """(mean, standard error, people) of pairs (person, number or None): the mean over people of each one's
    mean. The error of one person is None. None without numbers."""
    each = defaultdict(list)
    for person, number in pairs:
        if number is not None:
            each[person].append(number)
    means = [mean(numbers) for numbers in each.values()]
    if not means:
        return None
    return mean(means), stdev(means) / len(means) ** .5 if len(means) > 1 else None, len(means)


def summary(rows, scores, base=()):
    """heading -> over_people() of a system's pictures. base: rows of the model itself, for `leaked`."""
    if "another" not in scores.names:
        return {name: over_people((row["person"], row[name]) for row in rows) for name in scores.names}
    plain = [row for row in rows if row["prompt"] in scores.plain]
    styled = [row for row in rows if row["prompt"] in scores.styles and row["prompt"] not in scores.plain]
    unseen = [row for row in rows if row["prompt"] == scores.unseen]
    others = [row for row in rows if row["prompt"] in scores.others]
    own = {(row["person"], row["prompt"]): row["another"] for row in base}

    def of(some, name, number=lambda row, likeness: likeness):
        """over_people() of number(row, value) in the rows that have a value of this name."""
        return over_people((row["person"], number(row, row[name])) for row in some if row[name] is not None)

    def in_style(row, likeness):
        return likeness * row["style"]

    def missed(row, likeness):
        return float(likeness < MISS)

    def leaked(row, likeness):
        before = own.get((row["person"], row["prompt"]))
        return None if before is None else likeness - before
    return {"plain": of(plain, "another"), "styled": of(styled, "another"), "style": of(styled, "style"),
            "both": of(styled, "another", in_style), "beach": of(unseen, "another", in_style),
            "missed": of(styled, "another", missed), "copied": of(plain, "copied"),
            "error": of(plain, "error"), "obeyed": of(rows, "obeyed"),
            "leaked": of(others, "another", leaked),
            "given, plain": of(plain, "likeness"), "given, both": of(styled, "likeness", in_style)}


def winner(ours, theirs, by):
    """1 if the first of two rows, of one person, prompt and noise, is preferred, -1 if the second is, 0 if
    neither: a picture out of style loses to one in style; else the greater likeness `by` wins."""
    if ours["style"] != theirs["style"]:
        return 1 if ours["style"] > theirs["style"] else -1
    apart = ours[by] - theirs[by]
    return 0 if abs(apart) < LEVEL else 1 if apart > 0 else -1


def preferred(rows, other, prompts, by="another"):
    """The votes over all pairs of pictures of OURS and another system, by the likeness `another` or
    `likeness`: shares (ours, theirs, neither); the lead with its 95 % interval by bootstrap over people; the
    number of people. None without a pair."""
    known = {(row["system"], row["person"], row["prompt"]): row for row in rows
             if row["prompt"] in prompts and row[by] is not None}
    each = defaultdict(list)
    for (system, person, prompt), row in known.items():
        if system == OURS and (against := known.get((other, person, prompt))):
            each[person].append(winner(row, against, by))
    if not each:
        return None
    votes = [vote for own in each.values() for vote in own]
    leads = [mean(own) for own in each.values()]
    chance = random.Random(0)
    again = sorted(mean(chance.choices(leads, k=len(leads))) for _ in range(RESAMPLES))
    low, high = again[int(.025 * RESAMPLES)], again[int(.975 * RESAMPLES)]
    shares = [votes.count(vote) / len(votes) for vote in (1, -1, 0)]
    return shares, (mean(votes), low, high), len(leads)


def write(folder, scores):
    """Write tables.md to `folder`. Returns (system, knob, value) -> summary, for the figures."""
    rows, costs = read(folder / "scores.csv"), {row["system"]: row for row in read(folder / "costs.csv")}
    settings = defaultdict(list)
    for row in rows:
        settings[row["system"], row["knob"], row["value"]].append(row)
    base = settings.get(("the model itself", "", ""), ())
    found = {key: summary(some, scores, base) for key, some in settings.items()}
    plain = {system: values for (system, knob, _), values in found.items() if not knob}

    # The paper's tables 1 to 3, then its user studies, then our curves
    parts = [scores.about]
    for title, systems in TABLES.items():
        here = {system: plain[system] for system in systems if system in plain}
        if here:
            parts += list(filter(None, [f"**{title}**", table(here, costs), scores.seen]))
    if "another" in scores.names:
        main = [row for row in rows if not row["knob"]]
        for title, systems in STUDIES.items():
            pairs = {system: [preferred(main, system, scores.styles, by) for by in ("another", "likeness")]
                     for system in systems}
            if any(found for both in pairs.values() for found in both):
                parts += [f"**{title}**", study(pairs, systems)] + [PAIRS] * title.startswith("Table")
    for system, knob in dict.fromkeys(key[:2] for key in found if key[1]):
        points = {f"{knob} = {key[2]}": values for key, values in found.items() if key[:2] == (system, knob)}
        parts += [f"**{system}, by {knob}**", table(points, {})]
    write_text("\n\n".join(parts) + "\n", folder / "tables.md")
    return found


PAIRS = f"""Each pair has two pictures of one person from the same prompt and noise, for "a [V] face" and the
nine styled prompts. A picture in the right style beats one in a wrong style. Otherwise the one with more
likeness to another photo wins; within {LEVEL:g} neither does. Lead: ours minus theirs in percentage points,
with a 95 % interval by bootstrap over people. The last column uses likeness to the photo given, which rewards
copying it."""


def markdown(heads, lines):
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines))


def table(rows, costs):
    """Markdown of name -> summary, with seconds and size if known, and the paper's numbers."""
    paper = any(name in PAPER for name in rows)
    names = [name for name in next(iter(rows.values())) if any(values[name] for values in rows.values())]
    heads = ["", "people", *names] + ["seconds", "KB"] * bool(costs) + ["paper"] * paper
    lines = []
    for name, values in rows.items():
        people = max(value[2] for value in values.values() if value)
        lines.append([name, str(people), *(cell(values[column], people) for column in names)])
        if costs:
            known = costs.get(name, {"seconds": None, "bytes": None})
            lines[-1] += [cost(known["seconds"], 1, "{:.1f}"), cost(known["bytes"], 1e3, "{:,.1f}")]
        if paper:
            lines[-1].append(" / ".join(f"{value:.3f}".lstrip("0") for value in PAPER.get(name, ())) or "–")
    return markdown(heads, lines)


def cell(value, people):
    """A mean and its standard error as text, with the number of people if it differs from the row's."""
    if value is None:
        return "–"
    middle, error, count = value
    text = f"{middle:.3f}" if error is None else f"{middle:.3f} ± {error:.3f}"
    return text if count == people else f"{text} ({count})"


def cost(number, unit, form):
    return "–" if number is None else form.format(number / unit)


def study(pairs, papers):
    """Markdown of system -> preferred() by another photo and by the photo given."""
    heads = ["against", "people", "ours", "theirs", "neither", "lead", "paper: ours / theirs / neither",
             "by the photo given: people, ours / theirs / neither, lead"]
    lines = []
    for system, found in pairs.items():
        if any(found):
            another, (people, *shares, lead) = map(votes, found)
            paper = " / ".join(f"{share:.1f} %" for share in papers[system] or ()) or "–"
            lines.append([system, *another, paper, f"{people}, {' / '.join(shares)}, {lead}"])
    return markdown(heads, lines)


def votes(found):
    """The result of preferred() as texts: people, ours, theirs, neither, lead."""
    if found is None:
        return ["–"] * 5
    shares, interval, people = found
    lead, low, high = (f"{round(100 * part):+d}" for part in interval)
    return [str(people), *(f"{share:.1%}" for share in shares), f"{lead} [{low}, {high}]"]


def picture(folder, system, person, prompt):
    """The file of a picture for the grids."""
    return Path(folder, "pictures", "_".join((system, str(person), prompt)).replace(" ", "-") + ".png")

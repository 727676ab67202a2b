"""The reader's accuracy: visible errors of its drawings, and counts of false and missed attributes."""
from pathlib import Path

import torch

from files import images
from nano import faces
from nano.photo.avatar import costs, identity_of
from nano.photo.labels import truth_of
from nano.photo.reader import STORED, drawn, read

GROSS = 2  # with this visible error or more, a drawing shows another person


def visible(found, truth):
    """The visible error (B,) of drawing the classes found, name -> (B,), by `costs`. Unlabelled attributes
    cost nothing (but a mohawk does), and missing sunglasses, truth["sun"], costs half."""
    error = torch.zeros(len(truth["skin"]))
    for name, cost in costs().items():
        known = truth[name] >= 0
        part = torch.where(known, cost[truth[name].clamp(min=0), found[name]], 0.)
        if name == "hair_style":
            part = torch.where(~known & (found[name] == 7), 3., part)
        if name == "glasses":
            part = torch.where(truth["sun"], part / 2, part)
        error += part
    return error


def figures(found, truth):
    """Name -> figure for pictures with these classes found: means as floats, counts as "3/217"."""
    def share(hit, of):
        return f"{int((hit & of).sum())}/{int(of.sum())}"
    error = visible(found, truth)
    clear = (truth["glasses"] > 0) & ~truth["sun"]
    return {"pictures": len(error), "visible error": error.mean().item(),
            "gross": share(error >= GROSS, error >= 0),
            "false glasses": share(found["glasses"] > 0, truth["glasses"] == 0),
            "missed glasses": share(found["glasses"] == 0, clear),
            "false beards": share(found["beard"] > 0, truth["beard"] == 0),
            "missed beards": share(found["beard"] == 0, truth["beard"] > 0),
            "skin within a step": share((found["skin"] - truth["skin"]).abs() <= 1, truth["skin"] >= 0),
            "hair colour": balanced(found["hair_colour"] == truth["hair_colour"], truth["hair_colour"]),
            "hair style": balanced(found["hair_style"] == truth["hair_style"], truth["hair_style"])}


def balanced(hit, kind, least=10):
    """The share of hits (N,), averaged over the classes in `kind` (N,) that have `least` examples."""
    shares = [hit[kind == k].float().mean() for k in kind.unique() if k >= 0 and (kind == k).sum() >= least]
    return torch.stack(shares).mean().item() if shares else float("nan")


def report(model, pictures, truth):
    """Print the figures for unseen portraits (N, 3, H, W), of all and by skin."""
    found = truth_of(identity_of(read(model, pictures)))
    del found["numbers"]
    rows = [torch.ones(len(pictures), dtype=torch.bool), *(truth["skin"] == s for s in range(5))]
    columns = [figures(*({name: t[row] for name, t in some.items()} for some in (found, truth)))
               for row in rows]
    print(f"{'':20s}" + "".join(f"{name:>9s}" for name in ("all", *faces.SKIN_WORDS)))
    for name in columns[0]:
        shown = (f"{column[name]:.3f}" if isinstance(column[name], float) else column[name]
                 for column in columns)
        print(f"{name:20s}" + "".join(f"{value:>9}" for value in shown))
    print(f"taken for drawings: {int(drawn(model, pictures).sum())}/{len(pictures)}")


def bearded(model, folder):
    """The number of portraits in a folder that nano draws with a beard, as "0/100"."""
    files = sorted(Path(folder).iterdir())
    found = [truth_of(identity_of(read(model, images.read(file, STORED))))["beard"] > 0 for file in files]
    return f"{sum(map(int, found))}/{len(files)}"

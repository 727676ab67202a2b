"""The labels of 1,239 portraits of people who do not exist. portraits.py recovers the pictures.

labels.csv has a row for each portrait. Labelled by eye: skin from 0 (pale) to 4 (dark), and words of faces.py
for hair, glasses and beard ("hidden": unknown, "sun": sunglasses). From face landmarks: shapes, as ranks
among all portraits, like the colours. soft_labels.safetensors has, row by row, probabilities (1239, n) of the
classes by probes on DINOv2 ViT-S/14 (Oquab et al., arXiv 2304.07193), fitted without that row.
"""
import csv
from pathlib import Path

import torch

from files import images
from files.checkpoints import Tensors
from nano import faces
from nano.photo.reader import CLASSES, NUMBERS, STORED
from program.console import UserError

TABLE = Path(__file__).with_name("labels.csv")
SOFT = Path(__file__).with_name("soft_labels.safetensors")
UNKNOWN = -1  # an unlabelled class or number
EYES = "brown", "blue", "green", "grey"


def rows_of():
    """The rows of labels.csv, as dicts."""
    with open(TABLE, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def labelled(folder):
    """The labelled portraits in a folder: pictures (N, 3, 192, 192) as bytes; labels, as from truth_of_rows;
    soft labels (N, n) by name; and a mask (N,) of every fifth row, for measuring."""
    rows = rows_of()
    there = [i for i, row in enumerate(rows) if Path(folder, row["file"]).is_file()]
    if not there:
        raise UserError(f"{folder}: none of the portraits of labels.csv; get them by nano/photo/portraits.py")
    read = [images.read(Path(folder, rows[i]["file"]), STORED) for i in there]
    pictures = ((torch.cat(read) + 1) * 127.5).round().byte()
    soft = {name: t[there].float() for name, t in Tensors(SOFT).all().items()}
    return pictures, truth_of_rows([rows[i] for i in there]), soft, torch.tensor(there) % 5 == 0


def truth_of_rows(rows):
    """name -> the labels in rows of labels.csv: classes (N,), "numbers" (N, 20), "sun" (N,), sunglasses."""
    truth = {name: torch.tensor([class_of(name, row[name]) for row in rows]) for name in CLASSES}
    truth["sun"] = torch.tensor([row["glasses"] == "sun" for row in rows])
    truth["numbers"] = torch.tensor([[float(row.get(name) or UNKNOWN) for name in NUMBERS] for row in rows])
    return truth


def class_of(name, said):
    """The class of a word in labels.csv, UNKNOWN if it names none; ValueError for an unknown skin."""
    if name == "skin":
        return range(CLASSES[name]).index(int(said))
    if name == "eye_colour":
        return EYES.index(said) if said else UNKNOWN
    said = {"sun": "square"}.get(said, said)
    words = faces.WORDS[name][-faces.ATTRIBUTES[name]:]
    found = [i for i, word in enumerate(words) if said in word.split()]
    return found[0] if found else 0 if said == "none" else UNKNOWN


def truth_of(identity):
    """The labels of drawn people (B, 27), as from truth_of_rows, without "sun"."""
    eyes = faces.choice(identity[:, faces.IDENTITY.index("eye_colour")], CLASSES["eye_colour"])
    numbers = identity[:, [faces.IDENTITY.index(name) for name in NUMBERS]]
    return faces.attributes(identity) | {"eye_colour": eyes, "numbers": numbers}

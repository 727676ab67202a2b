"""Recover the portraits of labels.csv: find them on the public sheets that they were cut from.

    git clone --depth 1 https://github.com/SelfishGene/SFHQ-dataset
    git clone --depth 1 https://github.com/SelfishGene/SFHQ-T2I-dataset
    python -m nano.photo.portraits SFHQ-dataset/images SFHQ-T2I-dataset/figures --out portraits

This repository contains no picture of a face. labels.csv has a fingerprint of each portrait: 128 bits that
say where brightness rises on a 9×9 grid. The script compares all of them with every square of a sheet, of
every place and size. Two megapixels of a sheet take one core half a minute.
"""
from pathlib import Path

from program import console

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from nano.photo.labels import rows_of
from program.console import UserError

CELL, GRID = 3, 9        # pixels per cell in the comparison, and cells per side
SMALLEST, STEP = 120, 1.04  # side of the smallest square in pixels, and the factor to the next size
ALIKE = 112              # a portrait and its square agree in this many bits of 128; strangers in about 64
SIDE = 256


def fingerprints(grey):
    """The fingerprints (128, H', W') in ±1 of all 27×27 squares of a picture (H, W), by their top left
    corner: the signs of the differences between neighbouring cells, to the right and downwards."""
    means = F.avg_pool2d(grey[None, None], CELL, 1)[0, 0]
    right, down = means[:, CELL:] - means[:, :-CELL], means[CELL:] - means[:-CELL]
    height, width = (n - CELL * GRID + 1 for n in grey.shape)
    parts = [signs[CELL * i:CELL * i + height, CELL * j:CELL * j + width]
             for signs in (right, down) for i in range(GRID - 1) for j in range(GRID - 1)]
    return torch.where(torch.stack(parts) > 0, 1., -1.)


def bits_of(digits):
    """A fingerprint in labels.csv, 32 hexadecimal digits, as (128,) in ±1."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8))
    return torch.from_numpy(bits).float() * 2 - 1


def shrunk(picture, width, height):
    """The brightness (height, width) of a PIL image."""
    small = picture.convert("L").resize((width, height), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).float()


@torch.no_grad()
def find(sheet, wanted):
    """The best square of a PIL image for each fingerprint (N, 128): equal bits (N,), left, top, side (N,
    3)."""
    agree, places = torch.zeros(len(wanted)), torch.zeros(len(wanted), 3)
    side = float(SMALLEST)
    while side <= min(sheet.size):
        scale = CELL * GRID / side
        found = fingerprints(shrunk(sheet, *(round(n * scale) for n in sheet.size)))
        across = found.shape[2]
        for first, columns in enumerate(found.flatten(1).split(2 ** 16, 1)):
            score, where = (wanted @ columns).max(1)
            where = where + first * 2 ** 16
            score = (score + wanted.shape[1]) / 2
            place = torch.stack([where % across / scale, where // across / scale,
                                 torch.full(where.shape, side)], 1)
            places[score > agree] = place[score > agree]
            agree = torch.maximum(agree, score)
        side *= STEP
    return agree, places


def main(args):
    rows = rows_of()
    wanted = torch.stack([bits_of(row["fingerprint"]) for row in rows])
    best = torch.zeros(len(rows))
    Image.MAX_IMAGE_PIXELS = None  # sheets are large
    args.out.mkdir(parents=True, exist_ok=True)
    sheets = [file for folder in args.sheets for file in sorted(folder.iterdir())
              if file.suffix.lower() in (".jpg", ".jpeg", ".png")]
    if not sheets:
        raise UserError("no sheets (.jpg, .png) in these folders")
    for file in tqdm(sheets, desc="sheets"):
        sheet = Image.open(file).convert("RGB")
        agree, places = find(sheet, wanted)
        for i in ((agree >= ALIKE) & (agree > best)).nonzero().flatten().tolist():
            x, y, side = places[i].tolist()
            square = sheet.crop([round(v) for v in (x, y, x + side, y + side)])
            square.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(args.out / rows[i]["file"], quality=95)
        best = torch.maximum(best, agree)
    print(f"{int((best >= ALIKE).sum())} of {len(rows)} portraits found, in {args.out}")


def arguments():
    parser = console.Parser(__doc__)
    parser.add_argument("sheets", nargs="+", type=Path, help="folders of the sheets")
    parser.add_argument("--out", type=Path, default="portraits", help="folder of the portraits")
    args = parser.parse_args()
    for folder in args.sheets:
        if not folder.is_dir():
            parser.error(f"{folder}: no such folder")
    console.check_folder(parser, "--out", args.out)
    return args


if __name__ == "__main__":
    console.run(main, arguments)

"""What nano sees in a photo: the person in its world who looks most like it, or that it drew the picture.

One small convolutional network reads a picture (B, 3, 64, 64) in [-1, 1]: the 27 numbers of faces.py, whether
it was drawn by faces.py, and where in it the head is. train.py trains it, avatar.py decides what to draw.
"""
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from files.checkpoints import build
from nano import faces

FILE = Path(__file__).parents[1] / "reader.safetensors"
WIDTHS = 32, 64, 128, 192
SIDE, STORED = 64, 128  # pixels of what is read, and of what is kept to train on
CLASSES = faces.ATTRIBUTES | {"eye_colour": len(faces.EYES), "glasses_colour": len(faces.FRAMES)}
NUMBERS = [name for name in faces.IDENTITY if name not in CLASSES]
HEADS = CLASSES | {"numbers": len(NUMBERS), "frame": 3, "drawn": 1}
DRAWN = -1.5   # the logit between photos (up to -2.2) and drawings (from -.9), of which training sees fewer


class Block(nn.Module):
    """Half the side, another width, and a residual convolution."""

    def __init__(self, before, after):
        super().__init__()
        self.down, self.norm = nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after)
        self.conv, self.norm2 = nn.Conv2d(after, after, 3, 1, 1), nn.GroupNorm(8, after)

    def forward(self, x):
        x = F.silu(self.norm(self.down(x)))
        return x + F.silu(self.norm2(self.conv(x)))


class Reader(nn.Module):
    def __init__(self, widths=WIDTHS):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, 2, 1)
        self.blocks = nn.Sequential(*map(Block, widths[:-1], widths[1:]))
        # what is seen, wherever it is; a thousand portraits would be learnt by heart from more than that
        self.heads = nn.ModuleDict({name: nn.Linear(widths[-1], n) for name, n in HEADS.items()})
        self.heads["frame"] = nn.Linear(8 * 16, HEADS["frame"])
        self.places = nn.Conv2d(widths[-1], 8, 1)

    def forward(self, x):
        """Pictures (B, 3, 64, 64) -> a dict of logits (B, n) of CLASSES; "numbers" (B, 20), logits of those
        of NUMBERS; "frame" (B, 3), the portrait's centre (x, y) in [-1, 1] and log of its half side;
        "drawn" (B, 1), the logit of being a drawing."""
        h = self.blocks(F.silu(self.stem(x)))
        what, where = F.dropout(h.mean((2, 3)), .3, self.training), self.places(h).flatten(1)
        return {name: head(where if name == "frame" else what) for name, head in self.heads.items()}


def load_reader(device="cpu"):
    """The shipped network, frozen."""
    return build(Reader, WIDTHS, [FILE], str, device, torch.float32)


def view(pictures, x, y, zoom, angle=None):
    """What a square of half side `zoom` about (x, y), each (B,), turned by `angle`, shows of pictures
    (B, 3, H, W) whose own half side is 1: (B, 3, 64, 64). Beyond the border they are mirrored."""
    angle = torch.zeros_like(zoom) if angle is None else angle
    c, s = zoom * angle.cos(), zoom * angle.sin()
    rows = torch.stack([torch.stack([c, -s, x], 1), torch.stack([s, c, y], 1)], 1)
    grid = F.affine_grid(rows, (len(pictures), 3, SIDE, SIDE), align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)


@torch.no_grad()
def drawn(reader, pictures):
    """Whether each of pictures (B, 3, H, W) in [-1, 1] was drawn by faces.py."""
    middle, whole = torch.zeros(len(pictures)), torch.ones(len(pictures))
    return reader(view(shrunk(pictures, STORED), middle, middle, whole))["drawn"][:, 0] > DRAWN


@torch.no_grad()
def read(reader, pictures):
    """Logits (B, n), as of Reader, of pictures (B, 3, H, W) in [-1, 1] of one head each, not far from the
    middle: it is found in two looks, the second at what the first one found; then four looks, of two sizes
    and mirrored, are averaged."""
    small = shrunk(pictures, STORED)
    x, y, half = (torch.full((len(small),), value) for value in (0., 0., 1.))
    for _ in range(2):
        dx, dy, log = reader(view(small, x, y, half))["frame"].unbind(1)
        x, y = (x + half * dx).clamp(-.6, .6), (y + half * dy).clamp(-.6, .6)
        half = (half * log.exp()).clamp(.3, 1.3)
    looks = [view(small, x, y, half * size) for size in (.95, 1.08)]
    looks = [reader(turned) for look in looks for turned in (look, look.flip(3))]
    return {name: torch.stack([look[name] for look in looks]).mean(0) for name in HEADS}


def shrunk(pictures, side):
    return F.interpolate(pictures.float(), (side, side), mode="bilinear", antialias=True)

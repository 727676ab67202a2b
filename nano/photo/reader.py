"""The reader of photos: finds the person in nano's world who looks most like a photo.

The first two thirds of EfficientNet-lite0 (Tan & Le, arXiv 1905.11946; see NOTICE), a convolutional network
trained on a million photos, encode a picture (B, 3, 128, 128) in [-1, 1]. Linear heads then read 26 of the 27
numbers of faces.py, six of them as classes; whether faces.py drew the picture; how many faces there are; and
where the head is. train.py trains the network, avatar.py decides what to draw.
"""
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from files.checkpoints import build
from nano import faces

FILE = Path(__file__).parents[1] / "reader.safetensors"
SIDE, STORED = 128, 192  # sides in pixels: of the network's input, and of stored training pictures
# For each stage: kernel, stride of its first block, expansion, width, blocks
STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3),
          (5, 2, 6, 192, 1))
FEATURES = 2 * STAGES[4][3] + STAGES[5][3]
CLASSES = faces.ATTRIBUTES | {"eye_colour": len(faces.EYES)}
NUMBERS = [name for name in faces.IDENTITY if name not in (*CLASSES, "glasses_colour")]
COUNTS = "no face", "one face", "several faces"
HEADS = CLASSES | {"numbers": len(NUMBERS), "frame": 3, "drawn": 1, "count": len(COUNTS)}
PLACES = 8 * 64  # eight maps of 8×8 that locate the head
DRAWN = -1.      # the threshold between the logits of photos (up to -3) and drawings (from 1)


class Conv(nn.Module):
    """A convolution with TensorFlow's "same" padding, which adds an odd pixel at the end, and ReLU6."""

    def __init__(self, before, after, kernel, stride=1, groups=1, act=True):
        super().__init__()
        self.c, self.act = nn.Conv2d(before, after, kernel, stride, groups=groups), act

    def forward(self, x):
        kernel, stride, side = self.c.kernel_size[0], self.c.stride[0], x.shape[-1]
        padding = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        first, last = padding // 2, padding - padding // 2
        x = self.c(F.pad(x, (first, last, first, last)))
        return F.relu6(x) if self.act else x


class Block(nn.Module):
    """An inverted residual: a 1×1 convolution to more channels, a filter per channel, and 1×1 back."""

    def __init__(self, before, after, kernel, stride, expansion):
        super().__init__()
        width = before * expansion
        wider = [Conv(before, width, 1)] if expansion > 1 else []
        self.body = nn.Sequential(*wider, Conv(width, width, kernel, stride, width),
                                  Conv(width, after, 1, act=False))
        self.residual = stride == 1 and before == after

    def forward(self, x):
        return x + self.body(x) if self.residual else self.body(x)


def stage(before, kernel, stride, expansion, width, blocks):
    first = Block(before, width, kernel, stride, expansion)
    return nn.Sequential(first, *(Block(width, width, kernel, 1, expansion) for _ in range(blocks - 1)))


class Reader(nn.Module):
    def __init__(self, stages=STAGES):
        super().__init__()
        self.stem = Conv(3, 32, 3, 2)
        widths = [32, *(row[3] for row in stages)]
        self.stages = nn.ModuleList(stage(before, *row) for before, row in zip(widths, stages))
        self.norm, self.places = nn.LayerNorm(FEATURES), nn.Conv2d(stages[4][3], 8, 1)
        self.heads = nn.ModuleDict({name: nn.Linear(PLACES if name == "frame" else FEATURES, n)
                                    for name, n in HEADS.items()})
        # heads start at zero, and learn faster than the layers below
        nn.init.constant_(self.norm.weight, 2.5)
        for head in self.heads.values():
            nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)

    def forward(self, x):
        """Pictures (B, 3, 128, 128) -> name -> logits (B, n) of CLASSES; "numbers" (B, 20), logits of
        NUMBERS; "frame" (B, 3), the portrait's centre (x, y) in [-1, 1] and log of its half side; "drawn" (B,
        1), the logit of being a drawing; "count" (B, 3), logits of COUNTS."""
        return self.late(self.early(x))

    def early(self, x):
        """The stem and three stages: pictures -> (B, 40, 16, 16). Training may freeze them."""
        x = self.stem(x)
        for some in self.stages[:3]:
            x = some(x)
        return x

    def late(self, h):
        """The rest of forward."""
        for some in self.stages[3:5]:
            h = some(h)                                                                  # (B, 112, 8, 8)
        seen = torch.cat([h.mean((2, 3)), h.amax((2, 3)), self.stages[5](h).mean((2, 3))], 1)
        what, where = F.dropout(self.norm(seen), .3, self.training), self.places(h).flatten(1)
        return {name: head(where if name == "frame" else what) for name, head in self.heads.items()}


def load_reader():
    """The shipped network, frozen, on the CPU."""
    return build(Reader, STAGES, [FILE], str, "cpu", torch.float32)


def view(pictures, x, y, zoom, angle=None):
    """Squares (B, 3, 128, 128) cut from pictures (B, 3, H, W): centre (x, y), half side `zoom`, each (B,),
    turned by `angle`. A picture's own half side is 1; beyond its border it is mirrored."""
    angle = torch.zeros_like(zoom) if angle is None else angle
    c, s = zoom * angle.cos(), zoom * angle.sin()
    rows = torch.stack([torch.stack([c, -s, x], 1), torch.stack([s, c, y], 1)], 1)
    grid = F.affine_grid(rows, (len(pictures), 3, SIDE, SIDE), align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)


def whole(reader, pictures):
    """The reader's output for whole pictures (B, 3, H, W)."""
    middle, all_ = torch.zeros(len(pictures)), torch.ones(len(pictures))
    return reader(view(shrunk(pictures, STORED), middle, middle, all_))


@torch.no_grad()
def drawn(reader, pictures):
    """Whether each of pictures (B, 3, H, W) in [-1, 1] was drawn by faces.py."""
    return whole(reader, pictures)["drawn"][:, 0] > DRAWN


@torch.no_grad()
def read(reader, pictures):
    """Reader's logits (B, n) for pictures (B, 3, H, W) in [-1, 1] of one head near the middle each. Two looks
    find the head; four, of two sizes and mirrored, are averaged. "drawn" and "count" are of the whole
    picture."""
    small, first = shrunk(pictures, STORED), whole(reader, pictures)
    x, y, half = (torch.full((len(small),), value) for value in (0., 0., 1.))
    for _ in range(2):
        dx, dy, log = reader(view(small, x, y, half))["frame"].unbind(1)
        x, y = (x + half * dx).clamp(-.6, .6), (y + half * dy).clamp(-.6, .6)
        half = (half * log.exp()).clamp(.3, 1.3)
    looks = [view(small, x, y, half * size) for size in (.95, 1.08)]
    looks = [reader(turned) for look in looks for turned in (look, look.flip(3))]
    found = {name: torch.stack([look[name] for look in looks]).mean(0) for name in HEADS}
    return found | {name: first[name] for name in ("drawn", "count")}


def shrunk(pictures, side):
    return F.interpolate(pictures.float(), (side, side), mode="bilinear", antialias=True)

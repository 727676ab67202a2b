"""Train the reader of photos.

    python -m nano.photo.train --photos FOLDER    train nano/reader.safetensors and print how well it reads
    python -m nano.photo.train --photos FOLDER --steps 0      the figures alone

It learns from drawings, whose numbers are known, under heavy photographic noise, and from a folder of
portraits with labels.csv: the words of faces.py (skin 0-4, hair_colour, hair_style, glasses, beard), shapes
as ranks in [0, 1], median colours of skin, iris and lips.
"""
import csv
from pathlib import Path

import torch
import torch.nn.functional as F
from files import images
from program import console
from files.checkpoints import refusing, write
from files.layouts import device_and_dtype
from nano import faces, seeds
from nano.photo.reader import (
    CLASSES, FILE, NUMBERS, STORED, Reader, load_reader, view)
from nano.photo.report import UNKNOWN, report
from training.trainer import Trainer, seeded


def truth_of(identity):
    """The labels of people (B, 27): a dict of classes (B,) and "numbers" (B, 20)."""
    numbers = identity[:, [faces.IDENTITY.index(name) for name in NUMBERS]]
    colours = {name: faces.choice(identity[:, faces.IDENTITY.index(name)], CLASSES[name])
               for name in CLASSES.keys() - faces.ATTRIBUTES.keys()}
    return faces.attributes(identity) | colours | {"numbers": numbers}


def labelled(folder):
    """A folder of portraits with labels.csv: pictures (N, 3, 128, 128) as bytes, and their labels as of
    truth_of, UNKNOWN where the table leaves them open."""
    with open(Path(folder, "labels.csv"), newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    pictures = torch.cat([images.read(Path(folder, row["file"]), STORED) for row in rows])
    truth = {name: torch.tensor([class_of(name, row[name]) for row in rows]) for name in faces.ATTRIBUTES}
    truth["eye_colour"] = torch.tensor([eye_colour(row) for row in rows])
    truth["glasses_colour"] = torch.full((len(rows),), UNKNOWN)
    truth["sun"] = torch.tensor([row["glasses"] == "sun" for row in rows])

    # numbers: ranks, and colours' ranks among all
    numbers = {name: torch.tensor([float(row[name]) for row in rows]) for name in NUMBERS if name in rows[0]}
    for name, part, low, high in (("undertone", "skin", "b", "r"), ("lip_colour", "lip", "g", "r")):
        ratio = [float(row[f"{part}_{high}"]) / (float(row[f"{part}_{low}"]) + 1) for row in rows]
        numbers[name] = torch.tensor(ratio).argsort().argsort() / len(rows)
    if "freckles" in numbers:
        numbers["freckles"] = numbers["freckles"] * .5 + .35
    open_ = torch.full((len(rows),), float(UNKNOWN))
    truth["numbers"] = torch.stack([numbers.get(name, open_) for name in NUMBERS], 1)
    return ((pictures + 1) * 127.5).round().byte(), truth


def class_of(name, said):
    """The class that a word of labels.csv is, UNKNOWN if none."""
    if name == "skin":
        return int(said)
    said = {"sun": "square"}.get(said, said)
    words = faces.WORDS[name][-faces.ATTRIBUTES[name]:]
    found = [i for i, word in enumerate(words) if said in word.split()]
    return found[0] if found else 0 if said == "none" else UNKNOWN


def eye_colour(row):
    """The class of eyes of a median colour: most are too dark to be anything but brown."""
    if not row["iris_r"]:
        return UNKNOWN
    r, g, b = (float(row[f"iris_{c}"]) for c in "rgb")
    total = r + g + b + 1
    blue, green = (b - r) / total, (g - (r + b) / 2) / total
    return 1 if blue > .06 else 2 if green > .04 else 3 if blue > -.04 and total > 180 else 0


def photographed(x, generator, strength):
    """Pictures (B, 3, H, W) in other light: gain, contrast, a colour cast, a lamp from one side, blur, noise
    and a covered patch, each by `strength` (B,) of its usual size."""
    device = generator.device

    def draw(*shape):
        uniform = torch.rand(len(x), *shape, generator=generator, device=device) * 2 - 1
        return uniform * strength.view(-1, *[1] * len(shape))
    axis = torch.linspace(-1, 1, x.shape[-1], device=device)
    lamp = draw(1, 1, 1) * axis.view(1, 1, 1, -1) + draw(1, 1, 1) * axis.view(1, 1, -1, 1)
    light = 1 + .25 * draw(1, 1, 1) + .08 * draw(3, 1, 1) + .2 * lamp
    x = ((x + 1) / 2).clamp(0, 1) ** (.3 * draw(1, 1, 1)).exp() * light * 2 - 1

    # half of them blurred, some grain, a patch of some colour over a third
    blurred = F.interpolate(F.avg_pool2d(x, 3, 2, 1), x.shape[-2:], mode="bilinear")
    x = x.lerp(blurred, draw(1, 1, 1).clamp(min=0))
    grain = torch.randn(x.shape, generator=generator, device=device) * .08 * draw(1, 1, 1).abs()
    coarse = torch.randn(len(x), 3, 12, 12, generator=generator, device=device)
    coarse = coarse * .15 * draw(1, 1, 1).clamp(min=0)
    x = x + grain + F.interpolate(coarse, x.shape[-2:], mode="bilinear")
    cx, cy, rx, ry = draw(4).split(1, 1)
    inside = ((axis - cx).abs()[:, None, :] < rx.abs()[:, None] * .4) & (
        (axis - cy).abs()[:, :, None] < ry.abs()[:, None] * .4)
    covered = inside[:, None] & (draw(1, 1, 1) > .4)
    return torch.where(covered, draw(3, 1, 1), x).clamp(-1, 1)


def looks(pictures, generator, strength):
    """Random views (B, 3, 64, 64) of byte pictures (B, 3, 128, 128), and where in them the whole of each
    picture, which is a portrait, is (B, 3), as Reader's "frame"."""
    x = pictures.float() / 127.5 - 1
    chance = torch.rand(len(x), 6, generator=generator, device=generator.device)
    x = torch.where(chance[:, 0].view(-1, 1, 1, 1) < .5, x, x.flip(3))
    # most looks are close to the frame, as the second ones are
    near = torch.where(chance[:, 1] < .6, .4, 1.)
    dx, dy, log, angle = near * (2 * chance[:, 2:] - 1).T * torch.tensor([.22, .22, .3, .25]).to(x)[:, None]
    zoom = (log + .04).exp()
    c, s = angle.cos(), angle.sin()
    frame = torch.stack([-(c * dx + s * dy) / zoom, -(-s * dx + c * dy) / zoom, -zoom.log()], 1)
    return photographed(view(x, dx, dy, zoom, angle), generator, strength), frame


def losses(found, truth, frame, is_drawing, weights):
    """Name -> mean loss of each head, over what is known; a class counts by `weights`, its rarity."""
    known = truth["numbers"] >= 0
    numbers = (found["numbers"].sigmoid() - truth["numbers"]).square()[known].mean() * 4
    each = {name: F.cross_entropy(found[name], truth[name], weights[name], ignore_index=UNKNOWN,
                                  label_smoothing=.05) for name in CLASSES}
    sure = is_drawing >= 0
    told = F.binary_cross_entropy_with_logits(found["drawn"][sure, 0], is_drawing[sure])
    return each | {"numbers": numbers, "frame": (found["frame"] - frame).square().mean() * 10, "drawn": told}


def rarity(classes, count):
    """The weights (count,) of classes that are as frequent as in `classes` (N,)."""
    seen = torch.bincount(classes[classes >= 0], minlength=count).float() + 10
    return (seen.mean() / seen) ** .8


def train(args, photos, truth):
    generator = torch.Generator().manual_seed(seeds.READER)
    identity = torch.rand(args.drawings, len(faces.IDENTITY), generator=generator)
    styles = torch.randint(len(faces.STYLES), (args.drawings,), generator=generator)
    drawings = ((faces.photos(identity, generator, "cpu", styles) + 1) * 127.5).round().byte()
    of_drawings = truth_of(identity)
    weights = {name: rarity(truth[name], n) for name, n in CLASSES.items()}
    with seeded(args.seed):
        model = Reader()

    # from here on everything happens on the device
    device = args.device
    generator, model = torch.Generator(device), model.to(device)
    photos, drawings = photos.to(device), drawings.to(device)
    truth, of_drawings, weights = ({name: t.to(device) for name, t in some.items()}
                                   for some in (truth, of_drawings, weights))
    trainer = Trainer({"reader": model}, Path(args.runs) / "reader", args.steps, args.lr,
                      weight_decay=.1, depends_on={"photos": args.photos, "seed": args.seed})
    quarter = args.batch // 4
    for step in trainer:
        # Photos, and a quarter drawings, half of them as if photographed, half hardly changed
        generator.manual_seed(seeds.seed(args.seed, step, seeds.READER))
        who = torch.randint(len(photos), (args.batch - quarter,), generator=generator, device=device)
        whom = torch.randint(len(drawings), (quarter,), generator=generator, device=device)
        pictures = torch.cat([photos[who], drawings[whom]])
        strength, is_drawing = (torch.full((args.batch,), value, device=device) for value in (.6, 0.))
        strength[-quarter // 2:], is_drawing[-quarter // 2:] = .15, 1
        is_drawing[-quarter:-quarter // 2] = UNKNOWN
        x, frame = looks(pictures, generator, strength)
        labels = {name: torch.cat([truth[name][who], of_drawings[name][whom]]) for name in of_drawings}
        with seeded(step):  # dropout draws from the global generator
            found = model(x)
        each = losses(found, labels, frame, is_drawing, weights)
        shown = {name: each[name] for name in ("hair_style", "glasses", "beard", "frame")}
        trainer.update(sum(each.values()), **shown)
    trainer.average()
    write({k: v.half().cpu() for k, v in model.state_dict().items()}, FILE)


def arguments():
    parser = console.Parser(__doc__)
    parser.add_argument("--photos", required=True, help="folder of portraits with labels.csv; every fifth is "
                        "kept to measure by")
    usual = {"steps": 2000, "batch": 64, "drawings": 2000, "lr": 2e-3, "seed": 0, "runs": "runs"}
    for option, value in usual.items():
        parser.add_argument(f"--{option}", type=type(value), default=value, help="of the training")
    parser.add_argument("--device", help="cuda, mps or cpu")
    args = parser.parse_args()
    console.check_ranges(parser, args, steps=(0, seeds.STEPS), batch=(8, 4096), lr=(0, 1),
                         drawings=(8, 10 ** 6), seed=(0, seeds.SEEDS))
    console.check_folder(parser, "--runs", args.runs)
    args.device, _ = device_and_dtype(args.device, torch.float32)
    return args


def main(args):
    with refusing(f"{args.photos}: not a folder of portraits with their labels.csv"):
        photos, truth = labelled(args.photos)
    held = torch.arange(len(photos)) % 5 == 0
    if args.steps:
        train(args, photos[~held], {name: t[~held] for name, t in truth.items()})
    report(load_reader(), photos[held].float() / 127.5 - 1, {name: t[held] for name, t in truth.items()})


if __name__ == "__main__":
    console.run(main, arguments)

"""Train the reader of photos.

    python -m nano.photo.train --photos FOLDER             train nano/reader.safetensors, print its accuracy
    python -m nano.photo.train --photos FOLDER --steps 0   print the accuracy alone

FOLDER holds the portraits of labels.csv, which portraits.py recovers. Training continues the shipped file or
--start: a reader, or EfficientNet-lite0's weights alone, under the names of reader.py. It learns from
portraits, from drawings with known numbers, and from pictures of no face or several.
"""
from pathlib import Path
from typing import NamedTuple

from program import console

import torch
import torch.nn.functional as F

from files.checkpoints import Tensors, write
from files.layouts import device_and_dtype
from nano import faces, seeds
from nano.photo.labels import labelled, truth_of
from nano.photo.reader import CLASSES, FILE, NUMBERS, STORED, Reader, load_reader, read, shrunk
from nano.photo.report import bearded, report
from nano.photo.views import faceless, looks, together
from program.options import DEVICE, RUNS, number, old_file, old_folder, parser_of, same
from training.trainer import Trainer, global_seed

SMOOTHING = .03
SOFT = .5            # the soft label's weight in a target; the hard one has the rest
MIXED = 1 / 3        # the share of portraits that are blended with another
ODD = 400            # pictures of no face, and as many of several
SHAPES = 4.          # weight of the numbers' loss
FRAME = 10.          # weight of the frame's loss


def targets_of(truth, soft=None):
    """Name -> probabilities (N, n) to learn: of the hard label, the soft one or their mean; else zeros."""
    targets = {}
    for name, count in CLASSES.items():
        known = (truth[name] >= 0)[:, None]
        hard = F.one_hot(truth[name].clamp(min=0), count) * (1 - SMOOTHING) + SMOOTHING / count
        if soft and name in soft:
            targets[name] = torch.where(known, hard.lerp(soft[name], SOFT), soft[name])
        else:
            targets[name] = hard * known
    return targets


def losses(found, targets, frame, drawing, count):
    """Name -> the mean loss of each head over known labels. targets: name -> (B, n) probabilities, zeros if
    unknown, and "numbers" (B, 20), NaN if unknown, like frame (B, 3); drawing (B,): 1 or 0, NaN if either is
    right; count (B,): indices of COUNTS."""
    each = {name: F.cross_entropy(found[name], targets[name]) for name in CLASSES}
    numbers, known = targets["numbers"], targets["numbers"].isfinite()
    each["numbers"] = (found["numbers"].sigmoid() - numbers)[known].square().mean() * SHAPES
    each["frame"] = (found["frame"] - frame)[frame.isfinite()].square().mean() * FRAME
    sure = drawing.isfinite()
    each["drawn"] = F.binary_cross_entropy_with_logits(found["drawn"][sure, 0], drawing[sure])
    each["count"] = F.cross_entropy(found["count"], count)
    return each


class Source(NamedTuple):
    """Samples for a share of every batch: byte pictures, and how often each is drawn; targets for losses();
    the strength of `photographed`; 1 for drawings, 0 for photos, NaN for either; an index of COUNTS."""
    share: float
    pictures: torch.Tensor
    often: torch.Tensor
    targets: dict
    strength: float
    drawing: float
    count: int


def sources_of(photos, often, targets, drawings, generator):
    """All samples: portraits, no face, several faces, drawings as if photographed, drawings as they are."""
    identity = torch.rand(drawings, len(faces.IDENTITY), generator=generator)
    styles = torch.randint(len(faces.STYLES), (drawings,), generator=generator)
    drawn = faces.photos(identity, generator, "cpu", styles)
    drawn = ((shrunk(drawn, STORED) + 1) * 127.5).round().byte()
    truth = truth_of(identity)
    of_drawings = targets_of(truth) | {"numbers": truth["numbers"]}

    some = photos[torch.randint(len(photos), (5 * ODD,), generator=generator)]
    none, several = faceless(some[:ODD], generator), together(some[ODD:], generator)
    left_open = {name: torch.zeros(ODD, count) for name, count in CLASSES.items()}
    left_open["numbers"] = torch.full((ODD, len(NUMBERS)), torch.nan)
    odd, all_ = torch.ones(ODD), torch.ones(drawings)
    return [Source(11 / 16, photos, often, targets, .6, 0, 1),
            Source(1 / 32, none, odd, left_open, .6, 0, 0), Source(1 / 32, several, odd, left_open, .6, 0, 2),
            Source(1 / 8, drawn, all_, of_drawings, .6, torch.nan, 1),
            Source(1 / 8, drawn, all_, of_drawings, .15, 1, 1)]


def batch_of(sources, size, generator):
    """Pictures (B, 3, 128, 128) and what losses() takes beside the network's output."""
    picked, targets, given = [], [], []
    for source in sources:
        rows = torch.multinomial(source.often, round(size * source.share), True, generator=generator)
        picked.append(source.pictures[rows])
        targets.append({name: t[rows] for name, t in source.targets.items()})
        given.append(torch.tensor([[source.strength, source.drawing, source.count]]).expand(len(rows), 3))
    strength, drawing, count = torch.cat(given).unbind(1)
    x, frame = looks(torch.cat(picked), generator, strength)
    frame[count != 1] = torch.nan
    targets = {name: torch.cat([some[name] for some in targets]) for name in targets[0]}

    # mixup (Zhang et al., arXiv 1710.09412): blend some of the portraits, the first source, with another
    portraits = len(picked[0])
    mix = torch.rand(portraits, 2, generator=generator)
    part = torch.zeros(len(x))
    part[:portraits] = torch.where(mix[:, 0] < MIXED, mix[:, 1] / 2, 0)
    other = torch.arange(len(x))
    other[:portraits] = other[:portraits].roll(1)
    x = x.lerp(x[other], part[:, None, None, None])
    frame[part > 0] = torch.nan
    targets = {name: torch.where(part[:, None] > 0, t.lerp(t[other], part[:, None]), t)
               for name, t in targets.items()}
    return x, targets, frame, drawing, count.long()


def train(args, photos, truth, soft):
    generator = torch.Generator().manual_seed(seeds.READER)
    numbers = torch.where(truth["numbers"] < 0, torch.nan, truth["numbers"])
    often = torch.bincount(truth["skin"])[truth["skin"]] ** -.5  # dark faces are few, and are read worse
    targets = targets_of(truth, soft) | {"numbers": numbers}
    sources = sources_of(photos, often, targets, args.drawings, generator)
    model = Reader()
    tensors = Tensors(args.start).all()
    model.load_state_dict({name: t.float() for name, t in tensors.items()}, strict=False)
    for module in (model.stem, model.stages[:3]):
        module.requires_grad_(args.thaw)
    model = model.to(args.device, memory_format=torch.channels_last)
    trainer = Trainer({"reader": model}, Path(args.runs) / "reader", args.steps, args.lr, weight_decay=.05,
                      depends_on={"start": args.start, "seed": args.seed, "thaw": args.thaw})
    for step in trainer:
        generator.manual_seed(seeds.seed(args.seed, step, seeds.READER))
        x, targets, *others = batch_of(sources, args.batch, generator)
        x, *others = (t.to(args.device) for t in (x, *others))
        targets = {name: t.to(args.device) for name, t in targets.items()}
        with global_seed(step):  # dropout draws from the global generator
            found = model(x.contiguous(memory_format=torch.channels_last))
        each = losses(found, targets, *others)
        shown = {name: each[name] for name in ("hair_style", "glasses", "beard", "frame")}
        trainer.update(sum(each.values()), **shown)
    trainer.average()
    return model.eval().cpu()


def calibrate(model, photos, truth):
    """Divide each attribute's logits, in its head, by the temperature of least cross-entropy."""
    found = read(model, photos)
    for name in CLASSES:
        known = truth[name] >= 0
        logits, kinds = found[name][known], truth[name][known]
        loss = {t: F.cross_entropy(logits / t, kinds).item() for t in torch.linspace(.4, 2.5, 43).tolist()}
        temperature = min(loss, key=loss.get)
        for p in model.heads[name].parameters():
            p.data /= temperature


def arguments():
    parser = parser_of(__doc__, [
        same("photos", old_folder, None, "folder of the labelled portraits; every fifth is kept to measure",
             required=True),
        same("women", old_folder, None, "folder of portraits of women, to count beards drawn on them; "
             "default: none"),
        same("start", old_file, str(FILE), "file of weights to continue"),
        same("thaw", None, False, "also train the first three stages, which otherwise stay frozen",
             action="store_true"),
        same("steps", number(int, 0, seeds.STEPS), 1000, "training steps; 0: print the accuracy alone"),
        same("batch", number(int, 32, 4096), 64, "pictures in each step"),
        same("drawings", number(int, 8, 10 ** 6), 1500, "drawings to train on as well"),
        same("lr", number(float, 0, 1), 5e-4, "learning rate"),
        same("seed", number(int, 0, seeds.SEEDS), 0, "random seed"), RUNS, DEVICE])
    args = parser.parse_args()
    args.device, _ = device_and_dtype(args.device, torch.float32)
    return args


def main(args):
    photos, truth, soft, held = labelled(args.photos)
    kept, kept_truth = photos[held].float() / 127.5 - 1, {name: t[held] for name, t in truth.items()}
    if args.steps:
        model = train(args, photos[~held], *({name: t[~held] for name, t in some.items()}
                                             for some in (truth, soft)))
        calibrate(model, kept, kept_truth)
        write({name: t.half() for name, t in model.state_dict().items()}, FILE)
    model = load_reader()
    report(model, kept, kept_truth)
    if args.women:
        print(f"beards on women: {bearded(model, args.women)}")


if __name__ == "__main__":
    console.run(main, arguments)

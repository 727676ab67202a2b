"""The miniature's referee: who is in a picture, in which style, with which attributes. Trained apart from everything that it judges.

    python nano/judge.py            train nano/judge.safetensors and print its accuracy on people it has not seen

One small convolutional network reads a picture (B, 3, 128, 128) in [-1, 1]. Its embedding is trained with InfoNCE (van den Oord et al.,
1807.03748) between two pictures of a person that differ in style and circumstances; linear heads beside it read style and attributes.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).parents[1]))
import console  # noqa: E402
import sd  # noqa: E402
from checkpoints import write  # noqa: E402
from nano import faces  # noqa: E402
from trainer import Trainer, seeded  # noqa: E402

FILE = Path(__file__).with_name("judge.safetensors")


class Judge(nn.Module):
    def __init__(self, widths=(24, 48, 96, 160), dim=64):
        super().__init__()
        a, b, c, d = widths
        conv = lambda i, o, s: nn.Sequential(nn.Conv2d(i, o, 3, s, 1), nn.GroupNorm(8, o), nn.SiLU())
        self.trunk = nn.Sequential(conv(3, a, 2), conv(a, b, 2), conv(b, c, 2), conv(c, c, 1), conv(c, d, 2), conv(d, d, 1), conv(d, d, 1))
        self.embed = nn.Linear(d * 16, dim)
        self.style = nn.Linear(d * 16, len(faces.STYLES))
        self.attributes = nn.ModuleDict({k: nn.Linear(d * 16, n) for k, n in faces.ATTRIBUTES.items()})

    def forward(self, x):
        """Pictures (B, 3, 128, 128) -> unit embedding (B, 64), style logits (B, 11), dict of attribute logits."""
        h = self.trunk(F.avg_pool2d(x, 2)).flatten(1)
        return F.normalize(self.embed(h), dim=1), self.style(h), {k: head(h) for k, head in self.attributes.items()}

    @torch.no_grad()
    def likeness(self, pictures, photos):
        """Cosine (B,) between the identities of pictures and photos (B, 3, H, W): about .95 for one person, 0 for strangers."""
        a, b = (self(F.interpolate(x.float(), (128, 128), mode="area") if x.shape[-1] != 128 else x.float())[0] for x in (pictures, photos))
        return (a * b).sum(1)


def load(device="cpu"):
    with seeded(0):
        model = Judge()
    model.load_state_dict({k: v.float() for k, v in load_file(FILE).items()})
    return model.eval().requires_grad_(False).to(device)


def views(identity, count, generator, device):
    """`count` pictures each of people (P, 27), every one in its own style: uint8 (P, count, 3, 128, 128) and styles (P, count)."""
    style = torch.randint(len(faces.STYLES), (len(identity), count), generator=generator)
    nuisance = faces.nuisances(style.numel(), generator)
    many = identity.repeat_interleave(count, 0).to(device).split(512), nuisance.to(device).split(512), style.flatten().to(device).split(512)
    pictures = torch.cat([((faces.render(*part) + 1) * 127.5).round().byte() for part in zip(*many)])
    return pictures.unflatten(0, style.shape), style


def train(args):
    generator = torch.Generator().manual_seed(777_000_000 + args.seed)  # no seed of the base's or the hypernetwork's people
    with seeded(args.seed):
        model = Judge().to(args.device)
    temperature = nn.ParameterDict({"log": nn.Parameter(torch.tensor(2.3, device=args.device))})
    identity = torch.rand(args.people, len(faces.IDENTITY), generator=generator)
    pictures, styles = views(identity, 3, generator, args.device)
    truth = {k: v.to(args.device) for k, v in faces.attributes(identity).items()}
    trainer = Trainer({"judge": model, "temperature": temperature}, Path(args.runs) / "judge", args.steps, args.lr)
    for step in trainer:
        generator.manual_seed(args.seed * 1_000_003 + step)
        who = torch.randperm(len(pictures), generator=generator)[:args.batch].to(args.device)
        pair = torch.rand(args.batch, 3, generator=generator).argsort(1)[:, :2].to(args.device)
        x = pictures[who[:, None], pair].flatten(0, 1).float() / 127.5 - 1
        z, style, attributes = model(x)
        logits = z[::2] @ z[1::2].T * temperature["log"].exp()
        target = torch.arange(args.batch, device=args.device)
        who2 = who.repeat_interleave(2)
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        reading = sum(F.cross_entropy(a, truth[k][who2]) for k, a in attributes.items()) / len(attributes)
        naming = F.cross_entropy(style, styles.to(args.device)[who[:, None], pair].flatten())
        trainer.update(contrast + .5 * reading + .25 * naming, contrast=contrast, reading=reading, naming=naming)
    trainer.average()
    write({k: v.half() for k, v in model.state_dict().items()}, FILE)


@torch.no_grad()
def report(device, people=256):
    """Print verification within each style (two pictures of one person or of two people), likeness, style and attribute accuracy."""
    model, generator = load(device), torch.Generator().manual_seed(1)
    identity = faces.identities(range(10_000_000, 10_000_000 + people))
    truth, hits = faces.attributes(identity), {k: [] for k in ("style", *faces.ATTRIBUTES)}
    same, other = [], []
    for s, name in enumerate(faces.STYLES):
        style = torch.full((people,), s)
        two = [torch.cat([faces.render(i.to(device), faces.nuisances(len(i), generator).to(device), t.to(device)) for i, t in
                          zip(identity.split(128), style.split(128))]) for _ in range(2)]
        (a, styles, attributes), (b, _, _) = model(two[0]), model(two[1])
        same.append((a * b).sum(1).cpu())
        other.append((a * b.roll(1, 0)).sum(1).cpu())
        hits["style"].append((styles.argmax(1).cpu() == s).float().mean())
        for k, logits in attributes.items():
            hits[k].append((logits.argmax(1).cpu() == truth[k]).float().mean())
    grid = torch.linspace(0, 1, 101)[:, None]
    threshold = grid[((torch.cat(same) > grid).float().mean(1) + (torch.cat(other) <= grid).float().mean(1)).argmax()].item()
    for name, s, o in zip(faces.STYLES, same, other):
        accuracy = ((s > threshold).float().mean() + (o <= threshold).float().mean()).item() / 2
        print(f"{name:13s} verification {accuracy:.3f}   one person {s.mean():.2f}   strangers {o.mean():+.2f}")
    print(f"threshold {threshold:.2f}; accuracy: " + ", ".join(f"{k} {torch.stack(v).mean():.3f}" for k, v in hits.items()))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--people", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=48, help="people a step, two pictures each")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--device")
    args = parser.parse_args()
    console.check_ranges(parser, args, steps=(1, 10 ** 6), people=(2, 10 ** 6), batch=(2, 4096), lr=(0, 1), seed=(0, faces.SEEDS))
    if args.batch > args.people:
        parser.error(f"--batch {args.batch} is more than the --people {args.people}")
    args.device, _ = sd.place(args.device, torch.float32)
    return args


def main(args):
    train(args)
    report(args.device)


if __name__ == "__main__":
    console.run(main, arguments)

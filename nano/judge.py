"""nano's judge: who is in a picture, in which style, with which attributes.

    python -m nano.judge        train nano/judge.safetensors and print its accuracy on unseen people

One small convolutional network reads a picture (B, 3, 128, 128) in [-1, 1]. InfoNCE (van den Oord et al.,
1807.03748) trains its embedding on pairs of pictures of a person in different styles and circumstances;
linear heads read style and attributes. It is trained apart from everything that it judges.
"""
import time
from pathlib import Path

from program import console

import torch
import torch.nn as nn
import torch.nn.functional as F
from files.checkpoints import build, write
from files.layouts import device_and_dtype
from nano import faces, seeds
from program.options import DEVICE, RUNS, number, parser_of, same, training_rows
from training.trainer import Trainer, global_seed

FILE = Path(__file__).with_name("judge.safetensors")
WIDTHS = 24, 48, 96, 160


class Judge(nn.Module):
    def __init__(self, widths=WIDTHS, dim=64):
        super().__init__()
        a, b, c, d = widths
        layers = [(3, a, 2), (a, b, 2), (b, c, 2), (c, c, 1), (c, d, 2), (d, d, 1), (d, d, 1)]
        blocks = ((nn.Conv2d(i, o, 3, stride, 1), nn.GroupNorm(8, o), nn.SiLU()) for i, o, stride in layers)
        self.trunk = nn.Sequential(*(nn.Sequential(*block) for block in blocks))
        self.embed = nn.Linear(d * 16, dim)
        self.style = nn.Linear(d * 16, len(faces.STYLES))
        self.attributes = nn.ModuleDict({k: nn.Linear(d * 16, n) for k, n in faces.ATTRIBUTES.items()})

    def forward(self, x):
        """Pictures (B, 3, 128, 128) -> unit embedding (B, 64), logits of style (B, 11) and of attributes."""
        h = self.trunk(F.avg_pool2d(x, 2)).flatten(1)
        embedding, style = F.normalize(self.embed(h), dim=1), self.style(h)
        return embedding, style, {k: head(h) for k, head in self.attributes.items()}

    @torch.no_grad()
    def likeness(self, pictures, photos):
        """The cosine (B,) between identities in pictures and photos: about .95 for one person, 0 for two."""
        both = (F.interpolate(x.float(), (128, 128), mode="area") for x in (pictures, photos))
        one, other = (self(x)[0] for x in both)
        return (one * other).sum(1)


def load_judge(device="cpu"):
    """The shipped judge, frozen."""
    return build(Judge, WIDTHS, [FILE], str, device, torch.float32)


def train(args):
    # A fixed crowd: three pictures of each person, each in a random style
    generator = torch.Generator().manual_seed(seeds.JUDGE + args.seed)
    identity = torch.rand(args.people, len(faces.IDENTITY), generator=generator)
    styles = torch.randint(len(faces.STYLES), (args.people, 3), generator=generator)
    many = zip(identity.repeat_interleave(3, 0).split(512), styles.flatten().split(512))
    drawn = (faces.photos(who, generator, args.device, style) for who, style in many)
    pictures = torch.cat([((x + 1) * 127.5).round().byte() for x in drawn]).unflatten(0, styles.shape)
    truth = {k: v.to(args.device) for k, v in faces.attributes(identity).items()}

    with global_seed(args.seed):
        model = Judge().to(args.device)
    temperature = nn.ParameterDict({"log": nn.Parameter(torch.tensor(2.3, device=args.device))})
    modules, of = {"judge": model, "temperature": temperature}, {"people": args.people, "seed": args.seed}
    trainer = Trainer(modules, Path(args.runs) / "judge", args.steps, args.lr, depends_on=of,
                      deadline=time.time() + 60 * args.minutes)
    for step in trainer:
        # Two of the three pictures of some people
        generator.manual_seed(seeds.seed(args.seed, step))
        who = torch.randperm(len(pictures), generator=generator)[:args.batch].to(args.device)
        pair = torch.rand(args.batch, 3, generator=generator).argsort(1)[:, :2].to(args.device)
        x = pictures[who[:, None], pair].flatten(0, 1).float() / 127.5 - 1
        z, style, attributes = model(x)

        # Each picture must find its partner among all others; the heads read style and attributes
        logits = z[::2] @ z[1::2].T * temperature["log"].exp()
        target = torch.arange(args.batch, device=args.device)
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        twice = who.repeat_interleave(2)
        reading = sum(F.cross_entropy(a, truth[k][twice]) for k, a in attributes.items()) / len(attributes)
        naming = F.cross_entropy(style, styles.to(args.device)[who[:, None], pair].flatten())
        loss = contrast + .5 * reading + .25 * naming
        trainer.update(loss, contrast=contrast, reading=reading, naming=naming)
    trainer.average()
    write({k: v.half() for k, v in model.state_dict().items()}, FILE)


@torch.no_grad()
def report(device, people=256):
    """Print how well the judge tells one person from two within each style, and how well the heads read."""
    model, generator = load_judge(device), torch.Generator().manual_seed(1)
    identity = faces.identities(range(seeds.VALIDATION, seeds.VALIDATION + people))
    hits, same, other = {k: [] for k in ("style", *faces.ATTRIBUTES)}, [], []
    for s in range(len(faces.STYLES)):
        style = torch.full((people,), s)
        one, two = (model(faces.photos(identity, generator, device, style)) for _ in range(2))
        same.append((one[0] * two[0]).sum(1).cpu())
        other.append((one[0] * two[0].roll(1, 0)).sum(1).cpu())
        truth = {"style": style, **faces.attributes(identity)}
        for k, logits in {"style": one[1], **one[2]}.items():
            hits[k].append(logits.argmax(1).cpu() == truth[k])

    # The best threshold between one person and two
    same, other = torch.stack(same), torch.stack(other)  # (styles, people)
    grid = torch.linspace(0, 1, 101)
    right = [(same > t).float().mean() + (other <= t).float().mean() for t in grid]
    threshold = grid[torch.stack(right).argmax()]
    for name, s, o in zip(faces.STYLES, same, other):
        sure = ((s > threshold).float().mean() + (o <= threshold).float().mean()) / 2
        print(f"{name:13s} verification {sure:.3f}   one person {s.mean():.2f}   strangers {o.mean():+.2f}")
    accuracies = ", ".join(f"{k} {torch.stack(v).float().mean():.3f}" for k, v in hits.items())
    print(f"threshold {threshold:.2f}; accuracy: {accuracies}")


def arguments():
    parser = parser_of(__doc__, [
        *training_rows(1000, 48, 2e-3, seeds.STEPS, seeds.SEEDS), RUNS, DEVICE,
        same("people", number(int, 2, 10 ** 6), 5000, "people to train on, with three pictures each")])
    args = parser.parse_args()
    if args.batch > args.people:
        parser.error(f"--batch {args.batch} is more than the --people {args.people}")
    args.device, _ = device_and_dtype(args.device, torch.float32)
    return args


def main(args):
    train(args)
    report(args.device)


if __name__ == "__main__":
    console.run(main, arguments)

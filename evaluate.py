"""Measure the miniature: autoencoder, base model, and the method on people whom nothing has seen.

    python evaluate.py [base] [people]

Likeness is the cosine of the judge's embeddings of a picture and of the one photo given; beside it always
stands the share of pictures whose style the judge recognises, because copying the photo is a likeness too. ±
is the standard error over people.
"""
import argparse
import time
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file

import hdb
from edits import LowRank, join
from files import console
from files.checkpoints import write
from files.layouts import HERE
from nano import faces, seeds
from nano.judge import load_judge
from nano.people import HeldOut
from nano.pretrain import psnr

STYLES = "photo", "selfie", "pixar", "bark", "rock star", "professional"


@torch.no_grad()
def measure_base(model, args):
    """Autoencoder, style accuracy of samples, attribute accuracy of captioned samples."""
    judge, generator, count = load_judge(), torch.Generator().manual_seed(2), 16
    first = seeds.VALIDATION
    identity = faces.identities(range(first, first + count * len(faces.STYLES)))
    style = torch.arange(len(faces.STYLES)).repeat_interleave(count)
    real = faces.photos(identity, generator, "cpu", style)
    decoded = torch.cat([model.decode(model.encode(x)) for x in real.split(16)]).clamp(-1, 1)
    print(f"autoencoder: {psnr(decoded, real):.2f} dB PSNR, likeness through it "
          f"{judge.likeness(decoded, real).mean():.2f}")
    for name, words in ("style words only", 0.), ("attribute words", 1.):
        prompts = faces.captions(identity, style, generator, words=words, rare=0., drop=0.)
        settings = args.sample_steps, args.guidance
        pictures = [model.sample(prompts[i:i + 16], range(i, i + 16), *settings)
                    for i in range(0, len(prompts), 16)]
        _, styles, attributes = judge(torch.cat(pictures))
        right = (styles.argmax(1) == style).float()
        worst = min((right[style == i].mean().item(), name) for i, name in enumerate(faces.STYLES))
        print(f"base, {name}: style accuracy {right.mean():.3f} (worst: {worst[1]} {worst[0]:.2f})")
    truth = faces.attributes(identity)
    hits = {kind: (logits.argmax(1) == truth[kind]).float() for kind, logits in attributes.items()}
    hits["hair_colour"] = hits["hair_colour"][truth["hair_style"] > 0]  # captions don't name a bald person's
    hits = {kind: hit.mean().item() for kind, hit in hits.items()}
    print("base, attribute accuracy: " + ", ".join(f"{kind} {hit:.3f}" for kind, hit in hits.items())
          + f", mean {sum(hits.values()) / len(hits):.3f}")


def measure_people(method, args):
    """The rows of the paper's Table 3, measured."""
    held_out = HeldOut(args.people, "cpu", seeds.TEST)
    groups = torch.arange(args.people).split(8)

    def tune(theta):
        parts = [method.fine_tune(held_out.photos[g], None if theta is None else theta[g], args.steps)
                 for g in groups]
        relaxed = {k: LowRank(*map(torch.cat, zip(*(part[k] for part in parts)))) for k in parts[0]}
        return join({} if theta is None else method.lidb.factors(theta), relaxed)

    theta = method.predict(held_out.photos)
    rows = {"prediction + fine-tuning": lambda: tune(theta),
            "base": dict,
            "prediction only": lambda: method.lidb.factors(theta),
            "fine-tuning only": lambda: tune(None),
            "prediction only, s = 1": lambda: method.lidb.factors(method.predict(held_out.photos, 1)),
            "s = 1 + fine-tuning": lambda: tune(method.predict(held_out.photos, 1))}
    if unknown := set(args.rows or ()) - set(rows):
        raise console.UserError(f"--rows {', '.join(unknown)}: only {', '.join(rows)}")
    heads = "".join(f"{style:>14s}" for style in STYLES)
    print(f"{args.people} people, likeness / style accuracy\n{'':26s}{heads}   styled mean")
    folder = Path(args.runs) / f"evaluation_{args.people}_{checksum_of(args)}"
    for name in args.rows or rows:
        start, edits = time.time(), rows[name]()
        scores, styles = measure_row(method.model, held_out, edits, groups, args)
        mean = scores[:, 1:].mean(1)
        cells = "".join(f"{s:9.2f}/{r:.2f}" for s, r in zip(scores.mean(0), styles.mean(0)))
        print(f"{name:26s}{cells}   {mean.mean():.3f} ± {error(mean):.3f} / {styles[:, 1:].mean():.2f}"
              f"   (photo ± {error(scores[:, 0]):.3f}; {time.time() - start:.0f} s)", flush=True)
        write({"plain": scores[:, 0], "styled": mean}, folder / f"{name}.safetensors")

    # the same people and noise in every row, so the difference is known better than either
    measured = {name: folder / f"{name}.safetensors" for name in rows}
    measured = {name: load_file(file) for name, file in measured.items() if file.exists()}
    best = measured.pop("prediction + fine-tuning", None)
    for name, row in measured.items() if best else ():
        leads = {kind: best[kind] - row[kind] for kind in best}
        words = [f"{kind} {lead.mean():+.3f} ± {error(lead):.3f}" for kind, lead in leads.items()]
        print(f"full method − {name}: {', '.join(words)}")


def measure_row(model, held_out, edits, groups, args):
    """Likeness and style accuracy (people, STYLES) of everybody's edits."""
    scores, styles = (torch.zeros(args.people, len(STYLES)) for _ in range(2))
    for i, style in enumerate(STYLES):
        for g in groups:
            mine = {k: LowRank(a[g], b[g]) for k, (a, b) in edits.items()}
            noises = [1000 * i + int(j) for j in g]
            _, scores[g, i], styles[g, i] = held_out.measure(
                model, mine, style, noises, g, steps=args.sample_steps, guidance=args.guidance)
    return scores, styles


def error(values):
    """The standard error of their mean."""
    return values.std() / len(values) ** .5


def checksum_of(args):
    """Of weights and settings: rows may be measured by several calls, and other ones are another folder."""
    weights = [*sorted(HERE.glob("nano/*/*.safetensors")), HERE / "nano/judge.safetensors", args.hypernet]
    settings = repr((args.steps, args.sample_steps, args.guidance)).encode()
    return f"{zlib.crc32(b''.join(w.read_bytes() for w in weights) + settings):08x}"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=console.HelpFormatter)
    parser.add_argument("parts", nargs="*", help="base, people, or both, which is the same as none")
    parser.add_argument("--people", type=int, default=64)
    parser.add_argument("--rows", nargs="*", help="of the people's table; all if not given")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--sample-steps", type=int, default=15)
    parser.add_argument("--guidance", type=float, default=3.)
    parser.add_argument("--runs", default="runs", help="folder that keeps every row's likenesses")
    parser.add_argument("--hypernet", type=Path, default=HERE / "nano/hypernet.safetensors")
    args = parser.parse_args()
    if unknown := set(args.parts) - {"base", "people"}:
        parser.error(f"{', '.join(unknown)}: only base and people can be measured")
    console.check_folder(parser, "--runs", args.runs)
    console.check_ranges(parser, args, people=(2, 10 ** 6), steps=(1, 100_000), sample_steps=(1, 999),
                         guidance=(-100, 100))
    return args


def main(args):
    model = hdb.load("nano", "cpu")
    if "base" in args.parts or not args.parts:
        measure_base(model, args)
    if "people" in args.parts or not args.parts:
        measure_people(hdb.HyperDreamBooth(model, hdb.load_hypernet(args.hypernet, model)), args)


if __name__ == "__main__":
    console.run(main, arguments)

"""Measure the miniature: autoencoder, base model, and the method on people it has never seen.   python evaluate.py [base] [people]

Likeness is the cosine of the judge's embeddings of a picture and of the one photo given; beside it always stands the share of pictures whose
style the judge recognises, because copying the photo is a likeness too. ± is the standard error over people.
"""
import argparse
import time
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file

import console
import hdb
from checkpoints import write
from lidb import join
from nano import faces, judge
from nano.people import HeldOut, photos
from nano.pretrain import psnr

STYLES = ("photo", "selfie", "pixar", "bark", "rock star", "professional")


@torch.no_grad()
def base(method, args):
    """Autoencoder, style accuracy of samples, attribute accuracy of captioned samples."""
    referee, model = judge.load(), method.model
    generator = torch.Generator().manual_seed(2)
    count = 16
    identity = faces.identities(range(20_000_000, 20_000_000 + count * len(faces.STYLES)))
    style = torch.arange(len(faces.STYLES)).repeat_interleave(count)
    real = photos(identity, generator, "cpu", style)
    decoded = torch.cat([model.decode(model.encode(x)) for x in real.split(16)]).clamp(-1, 1)
    print(f"autoencoder: {psnr(decoded, real):.2f} dB PSNR, likeness through it {referee.likeness(decoded, real).mean():.2f}")
    for name, words in (("style words only", 0.), ("attribute words", 1.)):
        prompts = faces.captions(identity, style, generator, words=words, rare=0., drop=0.)
        pictures = torch.cat([method.sample(prompts[i:i + 16], seeds=list(range(i, i + len(prompts[i:i + 16]))), steps=args.sample_steps,
                                            guidance=args.guidance) for i in range(0, len(prompts), 16)])
        z, styles, attributes = referee(pictures)
        right = (styles.argmax(1) == style).float()
        print(f"base, {name}: style accuracy {right.mean():.3f} (worst: {min((round(right[style == i].mean().item(), 2), s) for i, s in enumerate(faces.STYLES))})")
        if words:
            truth = faces.attributes(identity)
            hits = {k: (a.argmax(1) == truth[k]).float() for k, a in attributes.items()}
            hits["hair_colour"] = hits["hair_colour"][truth["hair_style"] > 0]  # captions don't name a bald person's
            hits = {k: v.mean().item() for k, v in hits.items()}
            print("base, attribute accuracy: " + ", ".join(f"{k} {v:.3f}" for k, v in hits.items()) + f", mean {sum(hits.values()) / len(hits):.3f}")


def people(method, args):
    """The rows of the paper's Table 3, measured."""
    held_out = HeldOut(args.people, "cpu")
    groups = torch.arange(args.people).split(8)

    def tune(theta):
        parts = [method.fine_tune(held_out.photos[g], None if theta is None else theta[g], args.steps, generator=torch.Generator().manual_seed(0))
                 for g in groups]
        relaxed = {k: tuple(torch.cat([p[k][i] for p in parts]) for i in (0, 1)) for k in parts[0]}
        return join({} if theta is None else method.lidb.factors(theta), relaxed)

    theta = method.predict(held_out.photos)
    rows = {"prediction + fine-tuning": lambda: tune(theta),
            "base": lambda: {},
            "prediction only": lambda: method.lidb.factors(theta),
            "fine-tuning only": lambda: tune(None),
            "prediction only, s = 1": lambda: method.lidb.factors(method.predict(held_out.photos, 1)),
            "s = 1 + fine-tuning": lambda: tune(method.predict(held_out.photos, 1))}
    if unknown := set(args.rows or ()) - set(rows):
        raise console.UserError(f"--rows {', '.join(unknown)}: only {', '.join(rows)}")
    print(f"{args.people} people, likeness / style accuracy\n{'':26s}" + "".join(f"{s:>14s}" for s in STYLES) + "   styled mean")
    # a file of likenesses for every row, as rows may be measured by several calls; other weights or settings are another folder
    weights = [*sorted(Path(__file__).parent.glob("nano/*/*.safetensors")), Path(__file__).parent / "nano/judge.safetensors", args.hypernet]
    settings = b"".join(w.read_bytes() for w in weights) + repr((args.steps, args.sample_steps, args.guidance)).encode()
    folder = Path(args.runs) / f"evaluation_{args.people}_{zlib.crc32(settings):08x}"
    for name in args.rows or rows:
        start, factors, scores, styles = time.time(), rows[name](), [], []
        for i, style in enumerate(STYLES):
            likeness, right = [], []
            for g in groups:
                mine = {k: (a[g], b[g]) for k, (a, b) in factors.items()}
                _, alike, good = held_out.measure(method, mine, style, [1000 * i + int(j) for j in g], g, steps=args.sample_steps,
                                                  guidance=args.guidance)
                likeness.append(alike)
                right.append(good)
            scores.append(torch.cat(likeness))
            styles.append(torch.cat(right))
        scores, styles = torch.stack(scores, 1), torch.stack(styles, 1)  # (people, styles)
        mean = scores[:, 1:].mean(1)
        print(f"{name:26s}" + "".join(f"{s.mean():9.2f}/{r.mean():.2f}" for s, r in zip(scores.T, styles.T))
              + f"   {mean.mean():.3f} ± {mean.std() / len(mean) ** .5:.3f} / {styles[:, 1:].mean():.2f}"
              + f"   (photo ± {scores[:, 0].std() / len(mean) ** .5:.3f}; {time.time() - start:.0f} s)", flush=True)
        write({"plain": scores[:, 0], "styled": mean}, folder / f"{name}.safetensors")
    measured = {name: load_file(folder / f"{name}.safetensors") for name in rows if (folder / f"{name}.safetensors").exists()}
    best = measured.pop("prediction + fine-tuning", None)
    for name in measured if best is not None else ():  # the same people and noise in every row, so the difference is known better than either
        differences = [f"{kind} {d.mean():+.3f} ± {d.std() / len(d) ** .5:.3f}" for kind in best for d in [best[kind] - measured[name][kind]]]
        print(f"full method − {name}: {', '.join(differences)}")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("parts", nargs="*", help="base, people, or both, which is the same as none")
    parser.add_argument("--people", type=int, default=64)
    parser.add_argument("--rows", nargs="*", help="of the people's table; all if not given")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--sample-steps", type=int, default=15)
    parser.add_argument("--guidance", type=float, default=3.)
    parser.add_argument("--runs", default="runs", help="folder that keeps the likenesses of every row measured")
    parser.add_argument("--hypernet", type=Path, default=Path(__file__).with_name("nano") / "hypernet.safetensors")
    args = parser.parse_args()
    if unknown := set(args.parts) - {"base", "people"}:
        parser.error(f"{', '.join(unknown)}: only base and people can be measured")
    console.check_folder(parser, "--runs", args.runs)
    console.check_ranges(parser, args, people=(2, 10 ** 6), steps=(1, 100_000), sample_steps=(1, 999), guidance=(-100, 100))
    return args


def main(args):
    model = hdb.load("nano", "cpu")
    if "base" in args.parts or not args.parts:
        base(hdb.HyperDreamBooth(model), args)
    if "people" in args.parts or not args.parts:
        people(hdb.HyperDreamBooth(model, hdb.load_hypernet(args.hypernet, model)), args)


if __name__ == "__main__":
    console.run(main, arguments)

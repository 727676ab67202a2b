"""Measure nano itself: its autoencoder, and whether it draws what a caption says.

    python -m nano.training.check

Also the previews and the PSNR that pretrain.py logs.
"""
from copy import deepcopy

from program import console

import torch

import hdb
from files import images
from nano import faces, seeds, wording
from nano.judge import load_judge
from sd import StableDiffusion


def random_pictures(count, generator, device):
    """Random people in random styles: (pictures (count, 3, 128, 128), identity, style)."""
    identity = torch.rand(count, len(faces.IDENTITY), generator=generator)
    style = torch.randint(len(faces.STYLES), (count,), generator=generator)
    return faces.photos(identity, generator, device, style), identity, style


def psnr(a, b):
    """Mean over pictures in [-1, 1] of the peak signal-to-noise ratio, dB."""
    return (10 * torch.log10(4 / (a.clamp(-1, 1) - b).pow(2).mean((1, 2, 3)))).mean().item()


def preview(model, text, words, autoencoder, path):
    """Save two guided samples of every style, one with attribute words, to `path`."""
    who = faces.identities(range(seeds.MONITOR, seeds.MONITOR + len(faces.STYLES)))
    style = torch.arange(len(faces.STYLES))
    generator = torch.Generator().manual_seed(0)
    prompts = [p for said in (0., 1.) for p in wording.captions(who, style, generator, said, 0., 0.)]
    now = StableDiffusion("nano", deepcopy(model), text, words, autoencoder)  # it freezes its parts
    sheet = images.sheet(now.sample(prompts, guidance=3., steps=20), len(style))
    last = len(prompts) - 1
    images.save(sheet, path, prompts=" | ".join(prompts), seeds=f"0 to {last}", guidance=3, steps=20)


@torch.no_grad()
def main(args):
    """Print the autoencoder's PSNR, and the accuracy of style and attributes in samples of captions."""
    model = hdb.load("nano", "cpu")
    judge, generator, count = load_judge(), torch.Generator().manual_seed(2), 16
    first = seeds.VALIDATION
    identity = faces.identities(range(first, first + count * len(faces.STYLES)))
    style = torch.arange(len(faces.STYLES)).repeat_interleave(count)

    # The autoencoder
    real = faces.photos(identity, generator, "cpu", style)
    decoded = torch.cat([model.decode(model.encode(x)) for x in real.split(16)]).clamp(-1, 1)
    print(f"autoencoder: {psnr(decoded, real):.2f} dB PSNR, likeness through it "
          f"{judge.likeness(decoded, real).mean():.2f}")

    # The UNet, by captions without attributes and with them
    for name, words in ("style words only", 0.), ("attribute words", 1.):
        prompts = wording.captions(identity, style, generator, words=words, rare=0., drop=0.)
        pictures = [model.sample(prompts[i:i + 16], range(i, i + 16)) for i in range(0, len(prompts), 16)]
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


if __name__ == "__main__":
    console.run(main, console.Parser(__doc__).parse_args)

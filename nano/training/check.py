"""Measure the miniature before anybody is in it: its autoencoder, and whether it draws what a caption says.

    python -m nano.training.check
"""

import torch
import hdb
from program import console
from program.options import number, parser_of, same
from nano import faces, seeds, wording
from nano.judge import load_judge
from nano.training.pretrain import psnr


@torch.no_grad()
def main(args):
    """Autoencoder, style accuracy of samples, attribute accuracy of captioned samples."""
    model = hdb.load("nano", "cpu")
    judge, generator, count = load_judge(), torch.Generator().manual_seed(2), 16
    first = seeds.VALIDATION
    identity = faces.identities(range(first, first + count * len(faces.STYLES)))
    style = torch.arange(len(faces.STYLES)).repeat_interleave(count)
    real = faces.photos(identity, generator, "cpu", style)
    decoded = torch.cat([model.decode(model.encode(x)) for x in real.split(16)]).clamp(-1, 1)
    print(f"autoencoder: {psnr(decoded, real):.2f} dB PSNR, likeness through it "
          f"{judge.likeness(decoded, real).mean():.2f}")
    for name, words in ("style words only", 0.), ("attribute words", 1.):
        prompts = wording.captions(identity, style, generator, words=words, rare=0., drop=0.)
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


def arguments():
    return parser_of(__doc__, [
        same("sample_steps", number(int, 1, 999), 15, "of the sampler"),
        same("guidance", number(float, -100, 100), 2., "classifier-free guidance scale")]).parse_args()


if __name__ == "__main__":
    console.run(main, arguments)

"""The miniature's answer to a folder of face photos: people for train.py, and people that it never sees."""
from pathlib import Path

import torch
from tqdm import tqdm

from files import images
from files.checkpoints import build
from program.console import UserError
from nano import faces, seeds
from nano.judge import load_judge
from training.trainer import Pool
from vit import NANO_VIT, ViT

STYLES = list(faces.STYLES)
PROMPTS = [caption.format("[V]") for caption in faces.STYLES.values()]
PLAIN = .4  # the share of a training's pictures that are in no style


def load_encoder(file, device):
    """The ViT that pretrain.py wrote to `file`, frozen, in float32. UserError where there is none."""
    if not Path(file).exists():
        raise UserError(f"{file}: no encoder here; make it with: python -m nano.training.pretrain encoder")
    return build(ViT, NANO_VIT, [Path(file)], str, device, torch.float32)


class People:
    """Pairs for Eq. 2: features of a photo of a person, and the latent of another picture of them in some
    style, with its prompt. `fresh` people join at every step, and the `size` that came last are drawn from.
    `seed`: the training's."""
    views = 2  # pictures of a person

    def __init__(self, model, vit, seed=0, size=30_000, fresh=4):
        self.model, self.vit, self.seed = model, vit, seed
        self.pool = Pool(self.person, 512, fresh, size)

    @torch.no_grad()
    def person(self, n):
        """Features (n, d), fp16, latents (views, 4, h, w) and styles (views,) of the person number n."""
        generator = torch.Generator().manual_seed(seeds.row(self.seed, n))
        identity = torch.rand(1, len(faces.IDENTITY), generator=generator)
        styles = torch.randint(len(STYLES), (self.views,), generator=generator)
        styles[torch.rand(self.views, generator=generator) < PLAIN] = 0
        features = self.vit(faces.photos(identity, generator, self.model.device)).half()
        again = identity.expand(self.views, -1)
        latents = self.model.encode(faces.photos(again, generator, self.model.device, styles))
        return features[0], latents, styles

    def fix(self, count):
        """`count` people and no others from now on: those that targets are fitted for."""
        self.pool.first, self.pool.fresh = count, 0

    @property
    def count(self):
        """How many people there are at the start, and in all once they are fixed."""
        return self.pool.first

    def draw(self, step, count, generator):
        """The numbers (count,) of people that there are at this step, and of their views."""
        who = self.pool.draw(step, count, generator)
        return who, torch.randint(self.views, (count,), generator=generator)

    def features(self, who):
        """Of photos of these people: (B, n, d), float32."""
        return self.pool[who][0].float()

    def pictures(self, who, view):
        """Latents (B, 4, h, w) of the pictures `view` (B,) of people `who` (B,), and their prompts."""
        _, latents, styles = self.pool[who]
        each = torch.arange(len(who))
        return latents[each, view], [PROMPTS[style] for style in styles[each, view]]


class HeldOut:
    """`count` people that no training sees, of seeds from `first` on, and what the judge says of pictures."""

    def __init__(self, count, device, first):
        self.judge = load_judge(device)
        self.identity = faces.identities(range(first, first + count))
        self.first, self.device = first, device
        self.circumstances = faces.nuisances(count, torch.Generator().manual_seed(first))  # of the photos
        self.photos = faces.photos(self.identity, torch.Generator().manual_seed(first), device)

    def more_photos(self, count):
        """`count` further photos (P, count, 3, 128, 128) of everybody."""
        generator = torch.Generator().manual_seed(self.first + 1)
        return torch.stack([faces.photos(self.identity, generator, self.device) for _ in range(count)], 1)

    @torch.no_grad()
    def measure(self, model, adapters, style, noises, who=slice(None), **options):
        """Pictures of everybody, or of `who`, in one style by the model under `adapters`, their likeness (B,)
        to the photos, and 1 where the style is right (B,). `noises` are seeds, `options` the sampler's."""
        real, index = self.photos[who], STYLES.index(style)
        pictures = model.sample([PROMPTS[index]] * len(real), noises, adapters=adapters, **options)
        right = self.judge(pictures)[1].argmax(1) == index
        return pictures, self.judge.likeness(pictures, real), right.float()

    def watch(self, model, adapters, trainer):
        """Log the likeness and style accuracy of everybody's pictures under `adapters`, and draw them."""
        noises, columns, numbers = range(len(self.photos)), [self.photos], {}
        for style in "photo", "rock star", "pixar":
            pictures, likeness, right = self.measure(model, adapters, style, noises, steps=12)
            columns.append(pictures)
            numbers |= {f"likeness {style}": likeness.mean().item(), f"style {style}": right.mean().item()}
        trainer.log(**numbers)
        tqdm.write(", ".join(f"{k} {v:.2f}" for k, v in numbers.items()))
        rows = torch.stack(columns, 1).flatten(0, 1)
        images.save(images.sheet(rows, 16), trainer.out / f"step_{trainer.step:06d}.png", **numbers)

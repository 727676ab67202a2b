"""The miniature's answer to a folder of face photos: people for train.py, and people that it never sees."""
from pathlib import Path

import torch

from files.checkpoints import build
from files.console import UserError
from nano import faces
from nano.faces import photos
from nano.judge import load_judge
from trainer import Ring
from vit import NANO_VIT, ViT

STYLES = list(faces.STYLES)
PROMPTS = [caption.format("[V]") for caption in faces.STYLES.values()]


def load_encoder(file, device):
    """The ViT that pretrain.py wrote to `file`, frozen, in float32. UserError where there is none."""
    if not Path(file).exists():
        raise UserError(f"{file}: no encoder here; make it with: python nano/pretrain.py encoder")
    return build(ViT, NANO_VIT, [Path(file)], str, device, torch.float32).eval().requires_grad_(False)


class People:
    """Pairs for Eq. 2: features of a photo of a person, and the latent of another picture of them in some
    style, with its prompt. A share `plain` of the pictures, `views` a person, is in no style. The `size`
    people that came last are kept, and `fresh` join with every draw."""

    def __init__(self, model, vit, device, plain=.4, size=30_000, fresh=4, views=2):
        self.model, self.vit, self.device = model, vit, device
        self.plain, self.fresh, self.views = plain, fresh, views
        self.pool = Ring(size)

    @property
    def features(self):
        return self.pool.columns[0][:len(self.pool)]  # (P, n, d), fp16

    @property
    def latents(self):
        return self.pool.columns[1][:len(self.pool)]  # (P, views, 4, h, w)

    @torch.no_grad()
    def add(self, count, generator):
        identity = torch.rand(count, len(faces.IDENTITY), generator=generator)
        styles = torch.randint(len(STYLES), (count, self.views), generator=generator)
        styles[torch.rand(styles.shape, generator=generator) < self.plain] = 0
        features = self.vit(photos(identity, generator, self.device)).half()
        again = identity.repeat_interleave(self.views, 0)
        latents = self.model.encode(photos(again, generator, self.device, styles.flatten()))
        self.pool.add(features, latents.unflatten(0, styles.shape), styles)

    def fix(self, count, generator):
        """`count` people and no others from now on: those that targets are fitted for."""
        for start in range(0, count, 64):
            self.add(min(64, count - start), generator)
        self.fresh = 0

    def prompts(self, who, view):
        """The prompts of pictures `view` (B,) of people `who` (B,)."""
        return [PROMPTS[style] for style in self.pool.columns[2][who, view]]

    def draw(self, count, generator):
        """Indices (count,) of people and of their views; some new people join first."""
        if self.fresh:
            for few in [self.fresh] if len(self.pool) else [64] * 8:
                self.add(few, generator)
        who = torch.randint(len(self.pool), (count,), generator=generator)
        return who, torch.randint(self.views, (count,), generator=generator)


class HeldOut:
    """`count` people that no training sees, of seeds from `first` on, and what the judge says of pictures."""

    def __init__(self, count, device, first):
        self.judge = load_judge(device)
        self.identity = faces.identities(range(first, first + count))
        self.first, self.device = first, device
        self.photos = photos(self.identity, torch.Generator().manual_seed(first), device)

    def again(self, count):
        """`count` further photos (P, count, 3, 128, 128) of everybody."""
        generator = torch.Generator().manual_seed(self.first + 1)
        return torch.stack([photos(self.identity, generator, self.device) for _ in range(count)], 1)

    @torch.no_grad()
    def measure(self, model, edits, style, seeds, who=slice(None), **options):
        """Pictures of everybody, or of `who`, in one style by the model under `edits`, their likeness (B,) to
        the photos, and 1 where the style is right (B,). `options` are the sampler's."""
        real, index = self.photos[who], STYLES.index(style)
        with model.edited(edits):
            pictures = model.sample([PROMPTS[index]] * len(real), seeds=seeds, **options)
        right = self.judge(pictures)[1].argmax(1) == index
        return pictures, self.judge.likeness(pictures, real), right.float()

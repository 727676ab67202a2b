"""The miniature's answer to a folder of face photos: rendered people for train.py, and the encoder that has learnt to look at them."""
from pathlib import Path

import torch
import torch.nn.functional as F

from checkpoints import module, write
from hypernet import NANO_VIT, ViT
from nano import faces
from trainer import Ring, Trainer, seeded

CATEGORIES = {"hair_style": len(faces.HAIR_STYLES), "hair_colour": len(faces.HAIR_WORDS), "eye_colour": len(faces.EYES), "beard": 6,
              "glasses": 4, "glasses_colour": len(faces.FRAMES)}


def photos(identity, generator, device, style=None):
    style = torch.zeros(len(identity), dtype=torch.long) if style is None else style
    return faces.render(identity.to(device), faces.nuisances(len(identity), generator).to(device), style.to(device))


def traits(identity):
    """What the encoder learns to read: the continuous numbers of people (P, 27) and their categories as one-hot vectors -> (P, 53)."""
    number = [identity[:, i:i + 1] * 3.5 - 1.75 for i, k in enumerate(faces.IDENTITY) if k not in CATEGORIES]
    kind = [F.one_hot(faces.choice(identity[:, faces.IDENTITY.index(k)], n), n).float() * 2 for k, n in CATEGORIES.items()]
    return torch.cat(number + kind, 1)


def encoder(runs, device, steps=3000, batch=64, fresh=24, lr=1.5e-3, seed=0, start=None):
    """A ViT pre-trained to read identities off photos: the miniature's stand-in for the paper's ViT-H, which has seen 14 million pictures.

    Made once and kept in `runs`; each step draws `fresh` new photos into a pool and learns from `batch` of it. Two linear heads read: one
    sees every patch in its place, which teaches what is small and local (glasses, a beard), one their mean, which makes patches compare
    notes (the face's width). start: a ViT's weights to go on from.
    """
    width, count, file = NANO_VIT.hidden_size, traits(torch.zeros(1, len(faces.IDENTITY))).shape[1], Path(runs) / "encoder/vit.safetensors"
    with seeded(seed):
        vit = ViT(NANO_VIT).to(device)
        heads = torch.nn.ModuleDict({"mean": torch.nn.Linear(width, count), "places": torch.nn.Linear(width * (vit.embeddings.side ** 2 + 1), count)})
    if not file.exists():
        if start:
            vit.load_state_dict(start)
        trainer = Trainer({"vit": vit, "heads": heads.to(device)}, file.parent, steps, lr, muon=True)
        pool = Ring(32_000)
        for step in trainer:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step + 200_000_000)
            identity = torch.rand(fresh if len(pool) else 16 * fresh, len(faces.IDENTITY), generator=generator)
            pool.add(((photos(identity, generator, device) + 1) * 127.5).round().byte(), traits(identity).to(device))
            pixels, truth = pool[torch.randint(len(pool), (batch,), generator=generator)]
            features = vit(pixels.float() / 127.5 - 1)
            mean = (heads["mean"](features.mean(1)) - truth).pow(2).mean()
            places = (heads["places"](features.flatten(1)) - truth).pow(2).mean()
            trainer.update(mean + places, mean=mean, places=places)
        trainer.average()
        write(vit.state_dict(), file)
    return module(ViT, NANO_VIT, [file], lambda key: key, device, torch.float32).eval().requires_grad_(False)


class People:
    """Pairs for Eq. 2: the features of one photo of a person, and the latent of another picture of them in some style, with its prompt."""

    def __init__(self, model, vit, device, plain=.4, size=30_000, fresh=4, views=2):
        self.model, self.vit, self.device, self.plain, self.fresh, self.views = model, vit, device, plain, fresh, views
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
        styles = torch.randint(len(faces.STYLES), (count, self.views), generator=generator)
        styles[torch.rand(styles.shape, generator=generator) < self.plain] = 0
        features = self.vit(photos(identity, generator, self.device)).half()
        latents = self.model.encode(photos(identity.repeat_interleave(self.views, 0), generator, self.device, styles.flatten()))
        self.pool.add(features, latents.unflatten(0, styles.shape), styles)

    def fix(self, count, generator):
        """`count` people and no others from now on: those that targets are fitted for."""
        for start in range(0, count, 64):
            self.add(min(64, count - start), generator)
        self.fresh = 0

    def prompts(self, who, view):
        styles = self.pool.columns[2][who, view].tolist()
        return [list(faces.STYLES.values())[s].format("[V]") for s in styles]

    def draw(self, count, generator):
        """Indices (count,) of people and of their views; some new people join first."""
        if self.fresh:
            for few in [self.fresh] if len(self.pool) else [64] * 8:
                self.add(few, generator)
        return torch.randint(len(self.pool), (count,), generator=generator), torch.randint(self.views, (count,), generator=generator)


class HeldOut:
    """People that no training sees, and the judge's opinion of their pictures."""

    def __init__(self, count, device, first=10_000_000):
        from nano import judge
        self.judge = judge.load(device)
        self.identity = faces.identities(range(first, first + count))
        self.photos = photos(self.identity, torch.Generator().manual_seed(first), device)

    @torch.no_grad()
    def measure(self, method, factors, style, seeds, who=slice(None), **options):
        """Pictures of everybody, or of these, in one style, their likeness (B,) to the photos and whether the style is right (B,)."""
        photos = self.photos[who]
        pictures = method.sample([faces.STYLES[style].format("[V]")] * len(photos), factors, seeds, **options)
        right = self.judge(pictures)[1].argmax(1) == list(faces.STYLES).index(style)
        return pictures, self.judge.likeness(pictures, photos), right.float()

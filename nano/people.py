"""nano's counterpart of a folder of face photos: people for train.py, and people that it never sees."""

import torch
from tqdm import tqdm

from adapters import LowRank
from files import images
from nano import faces, seeds, wording
from nano.judge import load_judge
from training.photos import Photos
from training.watched import WatchedPhotos

STYLES = list(faces.STYLES)
PROMPTS = [wording.caption(style, "[V]") for style in range(len(STYLES))]
PLAIN = .4  # this share of training pictures is plain; of the others some are by chance
UNSEEN = "beach"  # no hypernetwork or E4T encoder trains in this style, so that it can be tested
# The share of samples that show another person under a prompt without [V]: there the weights must do nothing
OTHERS = .3
NOBODY = .25  # the share of empty prompts among these
RARE = wording.RARE[1:-4]  # the rare words in them; the last four are kept for tests
LOOKS = .2   # the share of samples with one attribute changed, in words and in the picture
BARE = .25   # the share of prompts without their article, as people type them: "[V] face as a king"
# Attributes and categories that prompts ask for to measure obedience
ASKED = ("glasses", 1), ("beard", 3), ("hair_colour", 2), ("hair_style", 7)


class People:
    """Samples for Eq. 2, drawn anew at every step. A sample is a photo of a person, and a picture to denoise
    with its prompt: the same person in some style; in a share `looks`, with a changed attribute that the
    prompt mentions; in a share `others`, another person under a prompt without [V]. seed: the training's."""

    def __init__(self, model, vit, seed=0, others=OTHERS, looks=LOOKS):
        self.model, self.vit, self.seed, self.others, self.looks = model, vit, seed, others, looks
        self.count, self.told = seeds.ROWS, "people whom nano draws"

    def identity(self, who):
        """The people with these numbers (B,): (B, 27)."""
        return faces.identities(seeds.row(self.seed, n) for n in who.tolist())

    def drawn(self, *of):
        """Pictures (B, 3, 128, 128) of these identities, circumstances and styles, on the model's device."""
        return faces.render(*(t.to(self.model.device) for t in of))

    def styles(self, count, generator):
        """Random styles (count,)."""
        seen = torch.tensor([i for i, style in enumerate(STYLES) if style != UNSEEN])
        style = seen[torch.randint(len(seen), (count,), generator=generator)]
        style[torch.rand(count, generator=generator) < PLAIN] = 0
        return style

    @torch.no_grad()
    def pictures(self, who, generator):
        """Latents (B, 4, h, w) of a picture of each of these people in a random style, and its prompts."""
        style = self.styles(len(who), generator)
        circumstances = faces.random_circumstances(len(who), generator)
        latents = self.model.encode(self.drawn(self.identity(who), circumstances, style))
        return latents, [PROMPTS[s] for s in style]

    @torch.no_grad()
    def samples(self, who, generator, mine=slice(None)):
        """Features (B, n, d) of a photo of each of these people, latents (B, 4, h, w) to denoise, and
        prompts. mine: the slice of the samples to return."""
        count, identity = len(who), self.identity(who)
        style, kind = self.styles(count, generator), torch.rand(count, generator=generator)
        circumstances = faces.random_circumstances(2 * count, generator).unflatten(0, (2, count))
        other, altered = kind < self.others, kind >= 1 - self.looks
        looks, phrases = wording.changed(identity, generator)
        strangers = torch.rand(identity.shape, generator=generator)
        captions = wording.captions(strangers, style, generator, words=.4, rare=.7, drop=NOBODY, names=RARE)
        target = torch.where(altered[:, None], looks, identity)
        target[other] = strangers[other]
        ours = [wording.caption(s, "[V]", [phrase] if a else [])
                for s, a, phrase in zip(style, altered, phrases)]
        prompts = [theirs if o else our for o, theirs, our in zip(other, captions, ours)]
        bare = torch.rand(count, generator=generator) < BARE
        prompts = [prompt.removeprefix("a ") if b else prompt for b, prompt in zip(bare, prompts)]
        # the photo, which is plain, and the picture
        both = torch.stack([identity, target]), circumstances, torch.stack([torch.zeros_like(style), style])
        photo, picture = self.drawn(*(t[:, mine].flatten(0, 1) for t in both)).chunk(2)
        return self.vit(photo), self.model.encode(picture), prompts[mine]


def to_train_on(args, model, vit, prompt, cache, deadline, watched, others=OTHERS, looks=LOOKS, apart=0):
    """(the samples of a training, the people to measure meanwhile or None): on nano People and `watched`
    held-out people, elsewhere Photos of --faces, encoded to `cache`, of which `apart` are kept to measure."""
    if args.model == "nano":
        people = People(model, vit, args.seed, others=others, looks=looks)
        return people, HeldOut(watched, model.device, seeds.MONITOR)
    photos = Photos(args.faces, model, vit, prompt, cache, deadline, others, apart)
    return photos, photos.watched


class HeldOut:
    """`count` people whom no training sees, with seeds from `first` on, and the judge's measurements."""

    def __init__(self, count, device, first):
        self.judge = load_judge(device)
        self.identity = faces.identities(range(first, first + count))
        self.first, self.device = first, device
        # the same numbers as in faces.photos
        self.circumstances = faces.random_circumstances(count, torch.Generator().manual_seed(first))
        self.photos = faces.photos(self.identity, torch.Generator().manual_seed(first), device)

    def more_photos(self, count):
        """`count` more photos of each person, (P, count, 3, 128, 128), whoever else there is."""
        photos = []
        for i, person in enumerate(self.identity):
            generator = torch.Generator().manual_seed(self.first + seeds.STEPS + i)
            photos.append(faces.photos(person.expand(count, -1), generator, self.device))
        return torch.stack(photos)

    @torch.no_grad()
    def measure(self, model, adapters, style, noises, who=slice(None), **options):
        """Pictures of all people, or of `who`, in one style by the model with `adapters`; their likeness (B,)
        to the photos; and 1 where the style is right (B,). noises: seeds; options: the sampler's."""
        real, index = self.photos[who], STYLES.index(style)
        pictures = model.sample([PROMPTS[index]] * len(real), noises, adapters=adapters, **options)
        right = self.judge(pictures)[1].argmax(1) == index
        return pictures, self.judge.likeness(pictures, real), right.float()

    @torch.no_grad()
    def losses(self, model, adapters):
        """name -> (), all people's losses, as for photos (training/watched.py); {} if not all is low-rank."""
        if not all(isinstance(adapter, LowRank) for adapter in adapters.values()):
            return {}
        found = WatchedPhotos(None, model.encode(self.photos), PROMPTS[0]).losses(model, adapters)
        return {name: torch.tensor(value) for name, value in found.items()}

    @torch.no_grad()
    def watch(self, model, passes, trainer):
        """Log measurements of all people's pictures, and save some of them. passes: the adapters after each
        pass; only the likeness is measured for all, the rest for the last. leaked: the likeness that they add
        to pictures of a prompt without [V]. obeyed: how often the judge sees a look that the prompt asks for,
        among people who lack it."""
        last, noises, columns, numbers, obeyed = passes[-1], range(len(self.photos)), [self.photos], {}, []

        def draw(prompt, adapters):
            return model.sample([prompt] * len(noises), noises, adapters=adapters, steps=12)
        for k, adapters in enumerate(passes[:-1], 1):
            numbers[f"likeness {k}"] = self.measure(model, adapters, "photo", noises, steps=12)[1]
        for style in "photo", "rock star", "pixar", UNSEEN:
            pictures, likeness, right = self.measure(model, last, style, noises, steps=12)
            columns.append(pictures)
            numbers |= {f"likeness {style}": likeness, f"both {style}": likeness * right}

        # What leaks into prompts without [V], and whether looks are obeyed
        for name in "", wording.RARE[-1]:
            prompt = wording.caption(0, name)
            found = [self.judge.likeness(draw(prompt, adapters), self.photos) for adapters in (last, {})]
            numbers[f"leaked {prompt}"] = found[0] - found[1]
        for name, kind in ASKED:
            pictures = draw(wording.caption(0, "[V]", [wording.phrase(name, kind)]), last)
            seen = self.judge(pictures)[2][name].argmax(1).cpu() == kind
            obeyed.append(seen[faces.attributes(self.identity)[name] != kind].float())

        # The log and the pictures
        numbers |= {"obeyed": torch.cat(obeyed)} | self.losses(model, last)
        numbers = {name: values.mean().item() for name, values in numbers.items()}
        trainer.log(**numbers)
        tqdm.write(", ".join(f"{k} {v:.3g}" for k, v in numbers.items()))
        rows = torch.stack(columns, 1).flatten(0, 1)
        images.save(images.sheet(rows, 20), trainer.out / f"step_{trainer.step:06d}.png", **numbers)

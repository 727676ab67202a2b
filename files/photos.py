"""A folder of face photos, one person each, as training pairs for Eq. 2."""
import os
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

from files import images
from vit import encode_face


def read_photos(folder, side, crop="center"):
    """Every picture in a folder and those below it, by path, as images.read gives it, all cut alike: yields
    (1, 3, side, side). Names what it skipped in a warning at the end. ImageError for a folder that isn't
    there or holds none."""
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file() and not p.name.startswith("."))
    skipped = []
    for file in tqdm(files, desc="photos", delay=1):
        try:
            photo = images.read(file, side, crop)
        except images.ImageError as error:
            skipped.append(str(error).removeprefix(f"{folder}{os.sep}"))
        else:
            yield photo
    if len(skipped) == len(files):
        raise images.ImageError(f"{folder}: no such folder, or it holds no photos{told(skipped)}")
    if skipped:
        count = f"{len(skipped)} of {len(files)} files are not used"
        warnings.warn(f"{folder}: {count}{told(skipped)}", stacklevel=2)


def told(skipped):
    """The first few reasons."""
    return "".join(f"; {reason}" for reason in skipped[:3]) + ("; …" if skipped[3:] else "")


class Photos:
    """The photos' features (P, n, d), on the CPU, latents (P, 1, 4, h, w) and `prompt`. A mirrored one counts
    as another person's. ImageError for a folder that isn't there or holds none; others are skipped."""

    def __init__(self, folder, model, vit, prompt):
        self.prompt, features, latents = prompt, [], []
        for photo in read_photos(folder, 8 * model.unet.config.sample_size):
            photo = photo.to(model.device)
            for view in photo, photo.flip(3):
                features.append(encode_face(vit, view).half().cpu())  # of 15,000 people they would fill a GPU
                latents.append(model.encode(view))
        self.features, self.latents = torch.cat(features), torch.stack(latents)

    def fix(self, count, generator):
        """The people that targets are fitted for: all of them."""

    def prompts(self, who, view):
        """The prompts of pictures `view` (B,) of people `who` (B,)."""
        return [self.prompt] * len(who)

    def draw(self, count, generator):
        """Indices (count,) of people and of their pictures."""
        who = torch.randint(len(self.latents), (count,), generator=generator)
        return who, torch.zeros(count, dtype=torch.long)

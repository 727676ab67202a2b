"""A folder of face photos, one person each, as training pairs for Eq. 2."""
from pathlib import Path

import torch
from tqdm import tqdm

from files import images
from vit import encode_face

ENDS = ".jpg", ".jpeg", ".png", ".webp", ".bmp"


def photo_files(folder):
    """The paths of all photos in a folder, by name. ImageError for one that isn't there or holds none."""
    files = sorted(p for p in Path(folder).glob("[!.]*") if p.suffix.lower() in ENDS)
    if not files:
        raise images.ImageError(f"{folder}: no such folder, or it holds no photos ({', '.join(ENDS)})")
    return files


class Photos:
    """The photos' features (P, n, d), on the CPU, latents (P, 1, 4, h, w) and `prompt`. A mirrored one counts
    as another person's. ImageError for a folder that isn't there or holds none, and for a bad photo."""

    def __init__(self, folder, model, vit, prompt):
        self.prompt, features, latents = prompt, [], []
        for file in tqdm(photo_files(folder), desc="photos"):
            photo = images.read(file, 8 * model.unet.config.sample_size).to(model.device)
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

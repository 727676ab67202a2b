"""A folder of face photos, one person each, as training pairs for Eq. 2."""
import os
import warnings
import zlib
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm

from files import images
from files.checkpoints import Tensors, check_numbers, checksum
from files.disk import regular
from files.encoders import loaded
from training.parts import cached, split
from training.watched import WatchedPhotos
from vit import encode_face

PART = 64  # photos in a file of the cache
EMPTY = .3  # of the prompts that speak of nobody, the empty ones
# What programs keep for themselves
HIDDEN = ".", "@eaDir", "@Recycle", "#recycle", "#snapshot", "$RECYCLE.BIN", "__MACOSX", "lost+found", \
    "Thumbs.db", "desktop.ini"


def photo_files(folder):
    """Every file in a folder and those below it, links followed, by path; a file alone. HIDDEN are passed
    over; a folder that cannot be read is a warning, one that isn't there or holds no photos ImageError."""
    if Path(folder).is_file():
        return [Path(folder)]
    found, wrong, been = [], [], set()
    for path, folders, names in os.walk(folder, onerror=wrong.append, followlinks=True):
        real = os.path.realpath(path)
        folders[:] = [] if real in been else sorted(f for f in folders if not f.startswith(HIDDEN))
        found += [] if real in been else [Path(path, n) for n in names if not n.startswith(HIDDEN)]
        been.add(real)
    wrong = [f"{error.filename}: {error.strerror}" for error in wrong]
    if not found:
        raise no_photos(folder, wrong)
    if wrong:
        warnings.warn(f"{folder}: not all of it can be read{told(wrong)}", stacklevel=2)
    return sorted(found)


def content(files):
    """8 hex digits of what is in these files, wherever they are."""
    digits = 0
    for file in tqdm(files, desc="photos compared", delay=1):
        with suppress(OSError), regular(file) as data:  # what isn't to be read says so when it is a photo
            for part in iter(lambda: data.read(2 ** 20), b""):
                digits = zlib.crc32(part, digits)
    return f"{digits:08x}"


def known_by(paths):
    """The digits of every photo in these files and folders: what a person is known by."""
    return {content([file]) for path in paths for file in photo_files(path)}


def photos_of(path):
    """The digits of the photos that a picture or a personal file was made of; where it does not say, of a
    personal file its own, of a picture none."""
    if Path(path).suffix == ".png":
        return images.settings(path).get("photos", "").split()
    with suppress(OSError, ValueError):  # what is none is said elsewhere
        return Tensors(path).note.get("photos", content([path])).split()
    return []


def no_photos(folder, skipped=()):
    """The ImageError for a folder that isn't there or holds none."""
    return images.ImageError(f"{folder}: no such folder, or it holds no photos{told(skipped)}")


def read_photos(folder, side, crop="face", files=None):
    """Every picture in a folder and those below it, by path, or of these `files`, as images.read gives it,
    all cut alike: yields (1, 3, side, side). What it skipped, and what images.read warns of, is named in a
    warning each at the end; see photo_files()."""
    some = photo_files(folder) if files is None else files
    skipped, odd = [], []
    for file in tqdm(some, desc="photos", delay=1, leave=files is None):
        try:
            with warnings.catch_warnings(record=True) as noted:
                warnings.simplefilter("always")
                photo = images.read(file, side, crop)
        except images.ImageError as error:
            skipped.append(str(error).removeprefix(f"{folder}{os.sep}"))
        else:
            odd += [str(warning.message).removeprefix(f"{folder}{os.sep}") for warning in noted[:1]]
            yield photo
    if files is None and len(skipped) == len(some):
        raise no_photos(folder, skipped)
    for found, what in (skipped, "files are not used"), (odd, "photos are used, but"):
        if found:
            warnings.warn(f"{folder}: {len(found)} of {len(some)} {what}{told(found)}", stacklevel=2)


def told(skipped):
    """The first few reasons."""
    return "".join(f"; {reason}" for reason in skipped[:3]) + ("; …" if skipped[3:] else "")


class Photos:
    """The photos' features (P, n, d), latents (P, 4, h, w) and `prompt`, in files in `cache`, where they are
    encoded once. A mirrored photo counts as another person's. The last `apart` photos, a quarter of
    all at most, are no part of it but in `watched`, or that is None where they are not two. ImageError for a
    folder that isn't there or holds no photos; others are skipped."""

    def __init__(self, folder, model, vit, prompt, cache, deadline=float("inf"), others=0., apart=0):
        self.model, self.prompt, self.others = model, prompt, others
        files, small = photo_files(folder), model.unet.config.sample_size
        side = 8 * small
        self.content = content(files)

        encoder = lru_cache(1)(lambda: loaded(vit, model.device))

        @torch.no_grad()
        def encoded(some):
            features, latents = [], []
            for photo in read_photos(folder, side, files=some):
                for view in photo, photo.flip(3):
                    features.append(encode_face(encoder(), view.to(model.device)).half())
                    latents.append(model.encode(view))
            return {"features": torch.cat(features), "latents": torch.cat(latents)} if features else {}
        of = {"photos": self.content, "side": side, "vit": checksum(vit), "vae": checksum(model.vae),
              "crop": "face" if images.detector() else "center"}
        seen = vit.config
        shapes = {"features": (1 + (seen.image_size // seen.patch_size) ** 2, seen.hidden_size),
                  "latents": (4, small, small)}
        parts = map(Tensors, cached(cache, split(files, PART), of, shapes, encoded, "photos", deadline))
        # a part may have no photo in it
        self.rows = [(part, i) for part in parts if part.shapes for i in range(part.shapes["latents"][0])]
        if not self.rows:
            raise no_photos(folder)
        apart = min(apart, len(self.rows) // 8)
        self.watched, last = None, len(self.rows) - 2 * apart * (apart > 1)
        if apart > 1:  # without their mirror images
            which = torch.arange(last, len(self.rows), 2)
            features, latents = (self.read(name, which) for name in ("features", "latents"))
            self.watched = WatchedPhotos(features.float(), latents.to(model.dtype), prompt)
        self.rows = self.rows[:last]
        self.count = len(self.rows)
        kept = f" and {apart} to be watched" if self.watched else ""
        self.told = f"{self.count // 2:,} photos, their mirror images{kept}"

    def fix(self, count):
        """The people that targets are fitted for: all of them."""

    def pictures(self, who, generator):
        """Latents (B, 4, h, w) of these people, and their prompts."""
        return self.read("latents", who).to(self.model.dtype), [self.prompt] * len(who)

    def samples(self, who, generator, mine=slice(None)):
        """Features (B, n, d), float32, of these people's photos, latents (B, 4, h, w) to denoise and their
        prompts; of so many that are drawn, those that are `mine`. In a share `others` the latent is another
        person's, and the prompt speaks of nobody, or is empty."""
        strangers = torch.randint(self.count, (len(who),), generator=generator)
        other = torch.rand(len(who), generator=generator) < self.others
        empty = torch.rand(len(who), generator=generator) < EMPTY
        shown = torch.where(other, strangers, who)
        nobody = self.prompt.replace("[V] ", "")
        prompts = [self.prompt if not o else "" if e else nobody for o, e in zip(other, empty)]
        features = self.read("features", who[mine]).float()
        return features, self.read("latents", shown[mine]).to(self.model.dtype), prompts[mine]

    def read(self, name, who):
        """From the files: 15,000 people would fill most memories. UserError for NaN or infinity."""
        rows = []
        for part, i in (self.rows[n] for n in who.tolist()):
            rows.append(part.row(name, i))
            check_numbers({name: rows[-1]}, part.path)
        return torch.cat(rows).to(self.model.device)

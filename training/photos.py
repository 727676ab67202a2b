"""A folder of face photos, one of each person, as training pairs for Eq. 2."""
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
from program.console import UserError
from training.parts import cached, split
from training.watched import WatchedPhotos
from vit import encode_face

PART = 64  # photos in one file of the cache
EMPTY = .3  # share of empty prompts among those without [V]
# Beginnings of names of files and folders that are not the user's
HIDDEN = ".", "@eaDir", "@Recycle", "#recycle", "#snapshot", "$RECYCLE.BIN", "__MACOSX", "lost+found", \
    "Thumbs.db", "desktop.ini"


def photo_files(folder):
    """All files in a folder and its subfolders, sorted, links followed, without HIDDEN ones; or a file alone.
    A warning for unreadable subfolders; ImageError for a folder that is missing or has no files."""
    if Path(folder).is_file():
        return [Path(folder)]
    found, errors, visited = [], [], set()
    for path, folders, names in os.walk(folder, onerror=errors.append, followlinks=True):
        real = os.path.realpath(path)
        folders[:] = [] if real in visited else sorted(f for f in folders if not f.startswith(HIDDEN))
        found += [] if real in visited else [Path(path, n) for n in names if not n.startswith(HIDDEN)]
        visited.add(real)
    reasons = [f"{error.filename}: {error.strerror}" for error in errors]
    if not found:
        raise no_photos(folder, reasons)
    if reasons:
        warnings.warn(f"{folder}: not all of it can be read{told(reasons)}", stacklevel=2)
    return sorted(found)


def check_outside(out, folder):
    """UserError if the folder `out`, where a program writes, is inside a folder of photos."""
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
        raise UserError(f"{out} is inside {folder}, so its pictures would count as photos; give a folder "
                        "elsewhere with --out")


def content(files):
    """A checksum of the contents of these files, 8 hex digits."""
    digits = 0
    for file in tqdm(files, desc="photos compared", delay=1):
        with suppress(OSError), regular(file) as data:  # read_photos() reports unreadable files
            for part in iter(lambda: data.read(2 ** 20), b""):
                digits = zlib.crc32(part, digits)
    return f"{digits:08x}"


def known_by(paths):
    """The checksums of all photos in these files and folders, which identify a person."""
    return {content([file]) for path in paths for file in photo_files(path)}


def photos_of(path):
    """The checksums of the photos that a picture or personal file was made from; if it does not say, its own
    checksum."""
    with suppress(OSError, ValueError):  # other code reports unreadable files
        note = images.settings(path) if Path(path).suffix == ".png" else Tensors(path).note
        return note.get("photos", content([path])).split()
    return []


def no_photos(folder, reasons=()):
    """The ImageError for a missing folder or one without usable photos."""
    return images.ImageError(f"{folder}: no such folder, or it holds no photos{told(reasons)}")


def read_photos(folder, side, crop="face", files=None):
    """Yields images.read(file, side, crop), (1, 3, side, side), for these `files` or else
    photo_files(folder). At the end one warning names skipped files, and one the photos that images.read
    warned of. ImageError if no file of the folder is usable."""
    some = photo_files(folder) if files is None else files
    skipped, odd = [], []
    for file in tqdm(some, desc="photos", delay=1, leave=files is None):
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                photo = images.read(file, side, crop)
        except images.ImageError as error:
            skipped.append(str(error).removeprefix(f"{folder}{os.sep}"))
        else:
            odd += [str(warning.message).removeprefix(f"{folder}{os.sep}") for warning in caught[:1]]
            yield photo
    if files is None and len(skipped) == len(some):
        raise no_photos(folder, skipped)
    for found, what in (skipped, "files are not used"), (odd, "photos are used with a warning"):
        if found:
            warnings.warn(f"{folder}: {len(found)} of {len(some)} {what}{told(found)}", stacklevel=2)


def told(reasons):
    """The first three reasons, as text."""
    return "".join(f"; {reason}" for reason in reasons[:3]) + ("; …" if reasons[3:] else "")


class Photos:
    """Features (P, n, d), latents (P, 4, h, w) and `prompt` of all usable photos in a folder, encoded once
    into files in `cache`. A mirrored photo counts as another person. The last `apart` photos, at most a
    quarter, are left out and are in `watched`, which is None for fewer than two. ImageError for a missing
    folder or one without usable photos."""

    def __init__(self, folder, model, vit, prompt, cache, deadline=float("inf"), others=0., apart=0):
        check_outside(cache, folder)
        self.model, self.prompt, self.others = model, prompt, others
        files, small = photo_files(folder), model.unet.config.sample_size
        side = 8 * small
        self.content = content(files)

        encoder = lru_cache(1)(lambda: loaded(vit, model.device))  # only if photos have to be encoded

        @torch.no_grad()
        def encoded(part):
            features, latents = [], []
            for photo in read_photos(folder, side, files=part):
                for view in photo, photo.flip(3):
                    features.append(encode_face(encoder(), view.to(model.device)).half())
                    latents.append(model.encode(view))
            return {"features": torch.cat(features), "latents": torch.cat(latents)} if features else {}
        of = {"photos": self.content, "side": side, "vit": checksum(vit), "vae": checksum(model.vae),
              "crop": "face" if images.detector() else "center"}
        tokens = 1 + (vit.config.image_size // vit.config.patch_size) ** 2
        shapes = {"features": (tokens, vit.config.hidden_size), "latents": (4, small, small)}
        parts = map(Tensors, cached(cache, split(files, PART), of, shapes, encoded, "photos", deadline))
        # a part may have no usable photo
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

    def pictures(self, who, generator):
        """Latents (B, 4, h, w) of the people with numbers `who`, and B prompts."""
        return self.read("latents", who).to(self.model.dtype), [self.prompt] * len(who)

    def samples(self, who, generator, mine=slice(None)):
        """The samples `mine` of those for the people with numbers `who`: features (B, n, d) of their photos,
        in float32, latents (B, 4, h, w) to denoise, and prompts. In a share `others` of samples, the latent
        is a stranger's and the prompt lacks [V] or is empty."""
        strangers = torch.randint(self.count, (len(who),), generator=generator)
        other = torch.rand(len(who), generator=generator) < self.others
        empty = torch.rand(len(who), generator=generator) < EMPTY
        shown = torch.where(other, strangers, who)
        nobody = self.prompt.replace("[V] ", "")
        prompts = [self.prompt if not o else "" if e else nobody for o, e in zip(other, empty)]
        features = self.read("features", who[mine]).float()
        return features, self.read("latents", shown[mine]).to(self.model.dtype), prompts[mine]

    def read(self, name, who):
        """Rows of a tensor, from the files: all would not fit into memory. UserError for NaN or infinity."""
        rows = []
        for part, i in (self.rows[n] for n in who.tolist()):
            rows.append(part.row(name, i))
            check_numbers({name: rows[-1]}, part.path)
        return torch.cat(rows).to(self.model.device)

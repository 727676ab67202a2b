"""Prepare the photos that a person is made from. nano first turns photographs into drawings."""
import itertools
import os
from pathlib import Path
from typing import NamedTuple

import torch

from files import images
from nano import wording
from nano.photo import avatar, reader
from program.console import UserError, one_line
from training.photos import known_by, photos_of, read_photos


class Sitting(NamedTuple):
    """The photos of one person."""
    shown: torch.Tensor | None  # (N, 3, H, W), for the sheet; None: the same as `seen`
    seen: torch.Tensor          # (N, 3, H, W), the method's input
    saw: str | None             # what nano read in a photograph, in words
    crop: str                   # the --crop that was used
    paths: list                 # the files and folders


def sit(args, model):
    """The Sittings: of one person or, with --each, of every usable photo. UserError if there is none."""
    side, sittings = 8 * model.unet.config.sample_size, []
    if not args.each:
        return [look_at(args.photos, args, side)]
    for path in args.photos:
        try:
            sittings.append(look_at([path], args, side))
        except images.ImageError as error:
            print(one_line(f"  not used: {error}"))
    if not sittings:
        raise UserError(f"{', '.join(args.photos)[:200]}: no usable photo; see the reasons above")
    return sittings


def look_at(paths, args, side):
    """The Sitting of one person. nano knows only drawings, so it draws what it sees in a photograph."""
    if args.model != "nano":
        return Sitting(None, read(paths, side, args.crop), None, args.crop, paths)
    center = args.crop if isinstance(args.crop, tuple) else "center"
    network, pictures = reader.load_reader(), read(paths, side, center)
    if args.look is None and reader.drawn(network, pictures).all():
        return Sitting(None, pictures, None, center, paths)
    photos = read(paths, 2 * side, args.crop)
    _, portrait, saw = avatar.avatar(network, photos, args.look)
    print(f"saw: {saw}\n     to correct it, use --look with words from: {wording.vocabulary_text()}")
    return Sitting(reader.shrunk(photos, side), portrait, saw, args.crop, paths)


def read(paths, side, crop):
    """All photos in these files and folders, by images.read: (N, 3, side, side)."""
    every = (read_photos(path, side, crop) if os.path.isdir(path) else [images.read(path, side, crop)]
             for path in paths)
    return torch.cat([photo for some in every for photo in some])


def folders_of(sittings, args):
    """A folder in --out for each person, named after the photo, with a number if that name is taken."""
    pictures = [f"{i}.png" for i in range(len(args.photos) * len(args.prompts))]
    taken = [".", "..", "sheet.png", *pictures, *(p.name for p in args.out.glob("*") if not p.is_dir())]
    held = {path.parent.name: {*photos_of(path)} for path in args.out.glob("*/person*.safetensors")}
    for sitting in sittings:
        own = known_by(sitting.paths)
        others = [name for name, photos in held.items() if not photos & own]
        taken.append(free_name(Path(sitting.paths[0]).stem, [*taken, *others]))
    return [args.out / name for name in taken[-len(sittings):]]


def free_name(stem, taken):
    """The first of stem, stem_2, stem_3, … that is not in `taken`, ignoring case."""
    names = itertools.chain([stem], (f"{stem}_{i}" for i in itertools.count(2)))
    return next(name for name in names if name.casefold() not in map(str.casefold, taken))

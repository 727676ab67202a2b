"""Pictures: photos to square tensors, tensors to PNG files that carry their settings, and contact sheets."""
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin

from files.console import UserError, printable

SMALLEST, LARGEST = 64, 12_000  # pixels a side
REASONS = {FileNotFoundError: "no such file", IsADirectoryError: "a folder, not a photo",
           Image.DecompressionBombError: f"too large to be a photo; at most {LARGEST} pixels a side"}


class ImageError(UserError):
    """Why a file cannot be used as a photo, in one line for the user."""


def read(path, side, crop=None):
    """The photo at `path` as (1, 3, side, side) in [-1, 1]: turned as its EXIF says, in RGB, transparency
    over white, its central square, or the square `crop` = (x, y, size) in pixels, resized. ImageError for
    what is no picture, too small, too large, or a crop outside."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise ImageError(f"{path}: not a file; save the photo into one")  # reading a pipe may never end
    try:
        quiet = warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning)
        with quiet, Image.open(path) as file:  # LARGEST is the limit here
            if max(file.size) > LARGEST:
                raise Image.DecompressionBombError
            image = to_rgb(ImageOps.exif_transpose(file))
    except Exception as error:  # PIL's decoders raise many kinds for damaged files
        damage = (str(error) or type(error).__name__).splitlines()[0]
        reason = REASONS.get(type(error), f"cannot be read as a picture ({damage})")
        raise ImageError(f"{path}: {reason}") from None
    width, height = image.size
    size = min(width, height)
    x, y, size = crop or ((width - size) // 2, (height - size) // 2, size)
    if x < 0 or y < 0 or size <= 0 or x + size > width or y + size > height:
        raise ImageError(f"{path}: the crop {x},{y},{size} does not lie inside its {width}×{height} pixels")
    if size < SMALLEST:
        raise ImageError(f"{path}: {size} pixels a side is too small for a face; at least {SMALLEST}")
    image = image.crop((x, y, x + size, y + size)).resize((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_rgb(image):
    """8-bit RGB from a PIL image of any mode, transparency laid over white."""
    # 16 and 32 bit grey, which PIL would clip instead of scaling
    if image.mode.startswith("I") or image.mode == "F":
        values, transparent = np.asarray(image, dtype=np.float64), image.info.get("transparency")
        greatest = values.max(initial=0, where=np.isfinite(values))
        whites = (1, 255, 65535, 2 ** 31 - 1) if image.mode == "F" else (255, 65535, 2 ** 31 - 1)
        white = next((white for white in whites if greatest <= 1.1 * white), greatest)
        values = np.where(values == transparent, 1, np.nan_to_num(values / white, posinf=1))
        image = Image.fromarray((values * 255).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pil(picture):
    """One picture (3, H, W) in [-1, 1] as a PIL image."""
    values = ((picture.detach().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def save(image, path, **settings):
    """Write a PIL image as PNG with its settings as text chunks, so that a picture tells how it was made."""
    info = PngImagePlugin.PngInfo()
    for key, value in settings.items():
        info.add_itxt(key, printable(str(value)))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        image.save(temporary, "PNG", pnginfo=info)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sheet(pictures, columns):
    """Pictures (B, 3, H, W) in [-1, 1] as one PIL image, row by row, the rest of the last row white."""
    missing = -len(pictures) % columns
    full = torch.cat([pictures.cpu(), torch.ones(missing, *pictures.shape[1:])])
    rows = [torch.cat(list(row), dim=2) for row in full.split(columns)]
    return to_pil(torch.cat(rows, dim=1))

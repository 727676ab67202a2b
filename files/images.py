"""Pictures: photos to square tensors, tensors to PNG files that carry their settings, and contact sheets."""
import io
import os
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, PngImagePlugin

from files.console import UserError, printable

with suppress(ImportError):  # optional: what iPhones write
    from pillow_heif import register_heif_opener
    register_heif_opener()

SMALLEST, LARGEST = 64, 12_000  # pixels a side
REASONS = {FileNotFoundError: "no such file", IsADirectoryError: "a folder, not a photo",
           NotImplementedError: "an HEIC photo; pip install pillow-heif to have those read",
           Image.DecompressionBombError: f"too large to be a photo; at most {LARGEST} pixels a side"}

# EXIF's orientation -> what puts the picture upright
TURNS = dict(zip(range(2, 9), (
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90)))


class ImageError(UserError):
    """Why a file cannot be used as a photo, in one line for the user."""


def read(path, side, crop=None):
    """The photo at `path` as (1, 3, side, side) in [-1, 1]: turned as its EXIF says, in sRGB, transparency
    over white, its central square, or the square `crop` = (x, y, size) in pixels, resized. ImageError for
    what is no picture, too small, too large, or a crop outside."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise ImageError(f"{path}: not a file; save the photo into one")  # reading a pipe may never end
    try:
        # LARGEST is the limit here, and damage either raises or does no harm
        with warnings.catch_warnings(action="ignore"), Image.open(path) as file:
            if max(file.size) > LARGEST:
                raise Image.DecompressionBombError
            image = in_srgb(upright(file), file.info.get("icc_profile"))
    except Exception as error:  # PIL's decoders raise many kinds for damaged files
        damage = (str(error) or type(error).__name__).splitlines()[0]
        kind = NotImplementedError if is_heic(path) else type(error)
        reason = REASONS.get(kind, f"cannot be read as a picture ({damage})")
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


def is_heic(path):
    """Whether this looks like a photo that Pillow alone cannot read, by its first bytes."""
    with suppress(OSError), open(path, "rb") as file:
        return file.read(12)[4:] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftyphevc")
    return False


def upright(image):
    """The picture turned as its EXIF says. Only the orientation is looked at: whatever else is damaged there
    does no harm."""
    turn = None
    with suppress(Exception):  # Pillow's parsers raise many kinds
        turn = TURNS.get(image.getexif().get(0x0112))
    return image.copy() if turn is None else image.transpose(turn)


def in_srgb(image, profile):
    """8-bit RGB of a PIL image whose numbers mean the colours that an ICC profile, bytes or None, says. A
    damaged profile, or one of another kind of picture, is as none."""
    with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
        source = profile and ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = source and {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(source.profile.xcolor_space.strip())
        if mode == "RGB":
            image = to_rgb(image)
        if mode == image.mode:
            image = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return to_rgb(image)


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

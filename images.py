"""Pictures in and out: any photo to a square tensor, tensors to PNG files that carry their settings, and contact sheets."""
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin

from console import UserError, printable

SMALLEST, LARGEST = 64, 12_000  # pixels a side


class ImageError(UserError):
    """Why a file cannot be used as a photo, in one line for the user."""


def read(path, side, crop=None):
    """The photo at `path` as (1, 3, side, side) in [-1, 1]: turned as its EXIF says, in RGB, transparency over white, its central square or
    the square `crop` = (x, y, size) in pixels, resized. Raises ImageError for what is no picture, too small, too large, or a crop outside."""
    try:
        if Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir():
            raise ImageError(f"{path}: not a file; save the photo into one")  # a pipe can be read once, and may never end
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # LARGEST is the limit here
            file = Image.open(path)
        with file:
            if max(file.size) > LARGEST:
                raise ImageError(f"{path}: {file.width}×{file.height} pixels is too large; at most {LARGEST} a side")
            image = to_rgb(ImageOps.exif_transpose(file))
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{path}: a folder, not a photo") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{path}: too large to be a photo") from None
    except Exception as error:  # PIL's decoders raise many kinds for damaged files
        raise ImageError(f"{path}: cannot be read as a picture ({str(error).splitlines()[0] if str(error) else type(error).__name__})") from None
    if crop is None:
        size = min(image.size)
        x, y = (image.width - size) // 2, (image.height - size) // 2
    else:
        x, y, size = crop
        if x < 0 or y < 0 or size <= 0 or x + size > image.width or y + size > image.height:
            raise ImageError(f"{path}: the crop {x},{y},{size} does not lie inside its {image.width}×{image.height} pixels")
    if size < SMALLEST:
        raise ImageError(f"{path}: {size} pixels a side is too small for a face; at least {SMALLEST} are needed")
    image = image.crop((x, y, x + size, y + size)).resize((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_rgb(image):
    """8-bit RGB from any mode, transparency laid over white."""
    if image.mode.startswith("I") or image.mode == "F":  # 16 and 32 bit grey, which PIL would clip instead of scaling
        values, transparent = np.asarray(image, dtype=np.float64), image.info.get("transparency")
        greatest = values.max(initial=0, where=np.isfinite(values))
        whites = (1, 255, 65535, 2 ** 31 - 1) if image.mode == "F" else (255, 65535, 2 ** 31 - 1)
        white = next((white for white in whites if greatest <= 1.1 * white), greatest)
        values = np.where(values == transparent, 1, np.nan_to_num(values / white, posinf=1))
        image = Image.fromarray((values * 255).clip(0, 255).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pil(picture):
    """One picture (3, H, W) in [-1, 1] as a PIL image."""
    return Image.fromarray(((picture.detach().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


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

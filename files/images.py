"""Read photos as square tensors; write PNG files with their settings, and contact sheets."""
import io
import os
import warnings
from contextlib import contextmanager, suppress
from functools import cache
from textwrap import wrap

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFile, ImageFont, ImageOps, PngImagePlugin

from files import colours
from files.disk import refusing, regular, whole_files
from program.console import UserError, printable

with suppress(ImportError):  # optional, for the photos of iPhones
    from pillow_heif import register_heif_opener
    register_heif_opener()

# What cameras, phones and browsers write. Other formats may have slow decoders or run a program
FORMATS = "JPEG", "MPO", "PNG", "WEBP", "HEIF", "AVIF", "TIFF", "GIF", "BMP", "JPEG2000"
HEIC = b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftyphevc"
RAW = ".dng", ".nef", ".nrw", ".cr2", ".cr3", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw"
SMALLEST = 64          # pixels on a side of the square
ENOUGH = 2048          # pixels on the shorter side; larger pictures are reduced to this or a little more
MEANS = "L", "LA", "RGB", "RGBA", "CMYK", "I", "F"  # modes that can be averaged
# Megapixels that take at most 5 s and 500 MB, measured: any picture; a JPEG decoded at a lower resolution;
# more than one byte for each of three colours; formats whose decoders make several copies
LARGEST, LARGEST_JPEG, LARGEST_RICH, LARGEST_HEAVY = 50, 120, 35, 24
LARGEST_FILE = 6 * LARGEST  # megabytes: two bytes for each of three colours
SCANS = 40             # of a progressive JPEG; each goes through the whole picture
ROOM = 1.8  # width of a portrait, head and shoulders, in widths of the detected face, brow to chin

# XMP in IPTC's vocabulary that marks a picture as generated, as article 50 of the EU's AI Act requires
GENERATED = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>
</rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>"""


class ImageError(UserError):
    """Why a file cannot be used as a photo, in one line for the user."""


def read(path, side, crop="center"):
    """The photo at `path` as (1, 3, side, side) in [-1, 1]: upright by its EXIF, in sRGB, transparency over
    white. crop: the square to take, which is the "center", one around the largest "face", or (x, y, size) in
    pixels. Of a truncated JPEG the rest is used, with a warning. ImageError if the file is no picture, too
    small or too large, or if the square is not inside the picture or not complete."""
    with refusing(f"{path}: cannot be read as a picture", ImageError):
        image, whole = opened(path, reduced=not isinstance(crop, tuple))
        width, height = image.size
        size = min(width, height)
        if crop == "face":
            crop = about_face(image, path) or "center"
        if crop == "center":
            crop = (width - size) // 2, (height - size) // 2, size
        x, y, size = crop
        if x < 0 or y < 0 or size <= 0 or x + size > width or y + size > height:
            raise ImageError(f"{path}: the crop {x},{y},{size} is not inside its {width}×{height} pixels")
        if size < SMALLEST:
            raise ImageError(f"{path}: {size} pixels a side is too small for a face; at least {SMALLEST}")
        image = in_srgb(smaller(image.crop((x, y, x + size, y + size))), path)
        if not whole and ends_grey(image):
            raise ImageError(f"{path}: truncated, and part of the face is missing; copy or download it again")
        image = image.resize((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def opened(path, reduced):
    """(the picture at `path` as an upright PIL image, whether it is complete); only a JPEG may be truncated.
    `reduced`: decode a large picture at a lower resolution. Raises what PIL raises, and ImageError."""
    # PIL's warnings are ignored: check() has the limits, and harmful damage raises
    with regular(path, LARGEST_FILE) as data, warnings.catch_warnings(action="ignore"):
        head, cicp = data.read(2 ** 16), b""  # the head tells the format and, in AVIF and HEIC, the colours
        data.seek(0)
        if head[4:12] in HEIC and "HEIF" not in formats():
            raise ImageError(f"{path}: an HEIC photo; pip install pillow-heif to read it")
        if head.startswith(b"\x89PNG"):
            data, cicp = colours.bare_png(data)

        # Checked before it is decoded
        file = Image.open(data, formats=formats())
        check(file, path, data, reduced)
        if reduced:
            file.draft(None, (ENOUGH, ENOUGH))
        try:
            with muted():
                file.load()
        except OSError:
            if file.format not in ("JPEG", "MPO") or ImageFile.LOAD_TRUNCATED_IMAGES:
                raise
        else:
            icc = None if cicp else file.info.get("icc_profile")
            file.info |= {"icc_profile": icc, "colours": None if icc else colours.said(file, cicp, head)}
            image = file.convert("I") if file.mode.startswith("I;") else file
            image = smaller(image) if reduced else image
            with suppress(Exception):  # Pillow raises many kinds of errors for damaged EXIF
                ImageOps.exif_transpose(image, in_place=True)
            return image, True

    # Truncated: read it again, as far as it goes
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        image, _ = opened(path, reduced)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    warnings.warn(f"{path}: truncated; the part that is there is used", stacklevel=4)
    return image, False


@cache
def formats():
    """The FORMATS that Pillow can read here. It imports its plugins at the first call."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@contextmanager
def muted():
    """Inside, what C libraries write to stderr is discarded: libtiff reports damage in a thousand lines."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def check(file, path, data, reduced):
    """ImageError for the PIL file `file`, opened from `data`, if its first picture is a thumbnail, or if it
    would take too much time or memory to decode."""
    tags, progressive = getattr(file, "tag_v2", {}), "progressive" in file.info
    thumbnail = 50706 in tags or tags.get(254, 0) & 1 or tags.get(255) == 2
    if thumbnail or str(path).lower().endswith(RAW):
        raise ImageError(f"{path}: a camera's RAW, or it begins with a thumbnail; export it as a JPEG")
    most = LARGEST if file.mode in ("1", "L", "RGB") else LARGEST_RICH
    if file.format in ("JPEG", "MPO") and reduced and not progressive:
        most = LARGEST_JPEG
    if file.format in ("WEBP", "JPEG2000"):
        most = LARGEST_HEAVY
    tile = tags.get(322, 0) * tags.get(323, 0)  # a TIFF's tile is decoded as a whole
    slow = any(decoder in Image.DECODERS for decoder, *_ in file.tile)  # decoders written in Python
    if progressive:
        data.seek(0)
        slow = sum(part.count(b"\xff\xda") for part in iter(lambda: data.read(2 ** 20), b"")) > SCANS
    if slow or max(file.width * file.height, tile) > most * 10 ** 6:
        raise ImageError(f"{path}: too large; at most {LARGEST} megapixels, {LARGEST_JPEG} as a JPEG without "
                         f"--crop X,Y,SIZE, {LARGEST_HEAVY} as a WebP")


def smaller(image):
    """A PIL image reduced to about ENOUGH pixels, if its mode can be averaged."""
    times = min(image.size) // ENOUGH
    return image.reduce(times) if times > 1 and image.mode in MEANS else image


def ends_grey(image):
    """Whether an RGB image has a border of the grey that stands for missing data of a JPEG."""
    grey = np.all(np.asarray(image) == 128, axis=2)
    return bool(grey[:2].all() or grey[-2:].all() or grey[:, :2].all() or grey[:, -2:].all())


@cache
def detector():
    """OpenCV's face detector, loaded at the first call, or None if OpenCV is not installed."""
    with suppress(ImportError):
        from cv2 import CascadeClassifier, data
        return CascadeClassifier(data.haarcascades + "haarcascade_frontalface_alt.xml")
    return None


def about_face(image, path):
    """The square (x, y, size) of a portrait, head and shoulders, around the largest face in a PIL image.
    None, with a warning, if there is no face or no OpenCV."""
    finder = detector()
    if finder is None:
        warnings.warn(f'{path}: the central square is used; pip install "opencv-python-headless<5" to have '
                      "the face found, or give --crop", stacklevel=3)
        return None
    small = to_rgb(image, path).convert("L")
    small.thumbnail((640, 640))
    grey = np.array(small)
    least = max(24, min(grey.shape) // 10)
    found = sorted(finder.detectMultiScale(grey, 1.1, 4, minSize=(least, least)), key=lambda box: box[2])
    if not len(found):
        warnings.warn(f"{path}: no face found; the central square is used, or give --crop", stacklevel=3)
        return None
    if len(found) > 1:
        warnings.warn(f"{path}: {len(found)} faces; the largest is used, or give --crop", stacklevel=3)

    # The portrait is ROOM faces wide, with the face a little below its middle, and inside the picture
    scale = image.width / small.width
    x, y, face, _ = (int(n) * scale for n in found[-1])
    size = min(ROOM * face, *image.size)
    corner = x + face / 2 - size / 2, y + face / 2 - size * .523
    x, y = (min(max(0, at), whole - size) for at, whole in zip(corner, image.size))
    return int(x), int(y), int(size)


def in_srgb(image, path):
    """A PIL image in 8-bit sRGB, converted from its ICC profile or from what colours.said() found. A damaged
    profile, or one for another kind of picture, is ignored."""
    info = image.info
    image = image if image.mode in ("L", "CMYK") else to_rgb(image, path)
    with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
        source = ImageCms.ImageCmsProfile(io.BytesIO(info.get("icc_profile") or b""))
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    image = to_rgb(image, path)
    return colours.in_srgb(image, *info["colours"]) if info.get("colours") else image


def to_rgb(image, path):
    """A PIL image of any mode in 8-bit RGB, transparency over white. If every pixel is transparent, which
    some programs write by mistake, the colours are shown, with a warning."""
    # 16- and 32-bit grey is scaled; PIL would clip it
    if image.mode.startswith("I") or image.mode == "F":
        values, transparent = np.asarray(image, dtype=np.float32), image.info.get("transparency")
        greatest = values.max(initial=0, where=np.isfinite(values))
        whites = (1, 255, 65535, 2 ** 31 - 1) if image.mode == "F" else (255, 65535, 2 ** 31 - 1)
        white = next((white for white in whites if greatest <= 1.1 * white), greatest)
        values = np.where(values == transparent, 1, np.nan_to_num(values / white, posinf=1))
        image = Image.fromarray((values * 255).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][1]:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        else:
            warnings.warn(f"{path}: every pixel is transparent; its colours are shown", stacklevel=4)
    return image.convert("RGB")


def to_pil(picture):
    """One picture (3, H, W) in [-1, 1] as a PIL image."""
    values = ((picture.detach().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def save(image, path, generated=True, **settings):
    """Write a PIL image as PNG with its settings as text and, if it was generated, the mark GENERATED."""
    info = PngImagePlugin.PngInfo()
    if generated:
        info.add_itxt("XML:com.adobe.xmp", GENERATED)
    for key, value in settings.items():
        info.add_itxt(key, printable(str(value)))
    with whole_files(path) as (temporary,):
        image.save(temporary, "PNG", pnginfo=info)


def settings(path):
    """The settings that save() wrote into a picture, or {} if they cannot be read."""
    with suppress(Exception), regular(path, LARGEST_FILE) as data:  # PIL's errors have no common base
        return dict(Image.open(data, formats=["PNG"]).text)
    return {}


def sheet(pictures, columns, heads=()):
    """Pictures (B, 3, H, W) in [-1, 1] as one PIL image, row by row; the rest of the last row is white.
    `heads` stand above the columns, in two lines at most."""
    missing = -len(pictures) % columns
    full = torch.cat([pictures.cpu(), torch.ones(missing, *pictures.shape[1:])])
    rows = [torch.cat(list(row), dim=2) for row in full.split(columns)]
    image = to_pil(torch.cat(rows, dim=1))
    if not heads:
        return image
    width, size = pictures.shape[3], max(10, pictures.shape[3] // 11)
    labelled = Image.new("RGB", (image.width, image.height + 3 * size), "white")
    labelled.paste(image, (0, 3 * size))
    draw, font = ImageDraw.Draw(labelled), ImageFont.load_default(size)
    for i, head in enumerate(heads):
        lines = "\n".join(wrap(printable(head), 2 * width // size, max_lines=2, placeholder="…"))
        draw.text((i * width + width // 2, 3 * size - 3), lines, "black", font, "md", align="center")
    return labelled

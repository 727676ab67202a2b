"""Convert colours to sRGB that are not described by an ICC profile, but by codes of ITU-T H.273 (PNG's cICP,
the nclx box of AVIF and HEIC), by PNG's gAMA and cHRM, or by EXIF's mark of Adobe RGB.

A curve takes the stored numbers to linear light v. Then v' = M_sRGB⁻¹ · W · M · v, where M is the matrix RGB
→ XYZ of the primaries, and W takes their white to that of sRGB (Bradford)."""
import io
import re
import struct
import zlib
from contextlib import suppress

import numpy as np
from PIL import Image, PngImagePlugin

PngImagePlugin.MAX_TEXT_CHUNK = 10 ** 7  # bytes of an ICC profile in a PNG; bare_png() leaves out all texts


def decoded(v):
    """The curve of sRGB."""
    return np.where(v <= .04045, v / 12.92, ((v + .055) / 1.055) ** 2.4)


def power(exponent):
    return lambda v: v ** exponent


D65 = .3127, .3290
# x, y of white, red, green and blue
SRGB, ADOBE = (*D65, .64, .33, .30, .60, .15, .06), (*D65, .64, .33, .21, .71, .15, .06)
PRIMARIES = {1: SRGB, 2: SRGB, 4: (.310, .316, .67, .33, .21, .71, .14, .08),
             5: (*D65, .64, .33, .29, .60, .15, .06), 6: (*D65, .63, .34, .31, .595, .155, .07),
             7: (*D65, .63, .34, .31, .595, .155, .07), 9: (*D65, .708, .292, .170, .797, .131, .046),
             11: (.314, .351, .68, .32, .265, .69, .15, .06), 12: (*D65, .68, .32, .265, .69, .15, .06),
             22: (*D65, .63, .34, .295, .605, .155, .077)}
# As in browsers, the curves of video count as that of sRGB. PQ and HLG are missing: they are refused
CURVES = dict.fromkeys((1, 2, 6, 13, 14, 15), decoded) | {4: power(2.2), 5: power(2.8), 8: power(1)}
BRADFORD = np.array([[.8951, .2664, -.1614], [-.7502, 1.7135, .0367], [.0389, -.0685, 1.0296]])
# PNG's chunks that are always kept, and those that are kept if their checksum is right and their data have
# this form: PIL refuses a picture with malformed colours
CRITICAL = b"IHDR", b"PLTE", b"IDAT", b"IEND"
KEPT = {b"tRNS": b".*", b"eXIf": b".*", b"iCCP": rb"[^\0]*\0\0.*", b"sRGB": b".+", b"gAMA": b".{4}.*",
        b"cHRM": b".{32}"}


def bare_png(data):
    """The visible part of a PNG, as a file, and its cICP chunk, or b"". Other chunks, such as texts of any
    length, and malformed chunks are left out."""
    kept, cicp = [data.read(8)], b""
    while head := data.read(8):
        name, body = head[4:], data.read(int.from_bytes(head[:4], "big") + 4)
        right = zlib.crc32(name + body[:-4]) == int.from_bytes(body[-4:], "big")
        if name in CRITICAL or right and name in KEPT and re.fullmatch(KEPT[name], body[:-4], re.DOTALL):
            kept += head, body
        if right and name == b"cICP":
            cicp = body[:-4]
    return io.BytesIO(b"".join(kept)), cicp


def said(image, cicp, head):
    """(primaries, curve) of a PIL image whose file begins with `head` and, if it is a PNG, has the chunk
    `cicp` or b""; None for sRGB. ValueError for codes that are not in the tables above."""
    primaries, curve = SRGB, decoded
    codes, at = cicp[:2], head.find(b"colrnclx")
    if at >= 0 and image.format in ("AVIF", "HEIF"):
        codes = struct.unpack_from(">HH", head, at + 8)
    if len(codes) == 2 and not (codes[0] in PRIMARIES and codes[1] in CURVES):
        raise ValueError(f"its colours, H.273's {codes[0]}/{codes[1]}, are not known here; save it in sRGB")
    if len(codes) == 2:
        primaries, curve = PRIMARIES[codes[0]], CURVES[codes[1]]
    elif is_adobe(image):
        primaries, curve = ADOBE, power(563 / 256)
    elif "srgb" not in image.info:
        # as libpng shows them on a screen with the usual gamma of 2.2
        gamma = image.info.get("gamma", 0)
        if .01 < gamma < 10 and abs(gamma * 2.2 - 1) > .01:
            def curve(v):
                return decoded(v ** (1 / (2.2 * gamma)))
        primaries = image.info.get("chromaticity", SRGB)
    return None if primaries == SRGB and curve is decoded else (primaries, curve)


def is_adobe(image):
    """Whether EXIF marks an image as Adobe RGB: by its colour space, or by rule R03 of DCF."""
    with suppress(Exception):  # Pillow raises many kinds of errors for damaged EXIF
        exif = image.getexif()
        return exif.get_ifd(0x8769).get(0xA001) == 2 or "R03" in str(exif.get_ifd(0xA005).get(1))
    return False


def in_srgb(image, primaries, curve):
    """A PIL image in RGB with these primaries and curve, in sRGB. Impossible primaries count as sRGB's."""
    theirs, ours = to_xyz(primaries), to_xyz(SRGB)
    if theirs is None:
        theirs = ours
    whites = [BRADFORD @ m.sum(1) for m in (ours, theirs)]
    adapted = np.linalg.inv(BRADFORD) @ np.diag(whites[0] / whites[1]) @ BRADFORD @ theirs
    light = curve(np.linspace(0, 1, 256)).astype(np.float32)[np.asarray(image)]
    light = (light @ (np.linalg.inv(ours) @ adapted).T.astype(np.float32)).clip(0, 1)
    encoded = np.where(light <= .0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - .055)
    return Image.fromarray((encoded * 255).round().astype(np.uint8))


def to_xyz(primaries):
    """The matrix RGB → XYZ (3, 3) of primaries (white, red, green, blue), or None if they are impossible."""
    with np.errstate(all="ignore"), suppress(np.linalg.LinAlgError):
        x, y = np.array(primaries).reshape(4, 2).T
        xyz = np.stack([x / y, np.ones(4), (1 - x - y) / y])
        matrix = xyz[:, 1:] * np.linalg.solve(xyz[:, 1:], xyz[:, 0])
        if np.linalg.cond(matrix) < 1000:
            return matrix
    return None

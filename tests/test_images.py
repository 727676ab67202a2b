import os
import struct
import warnings
import zlib
from contextlib import suppress
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile, features
from PIL.TiffImagePlugin import IFDRational

from files import images


def picture(path, mode="RGB", size=(90, 80), **options):
    """Left half red, right half blue, in any mode."""
    array = np.zeros((size[1], size[0], 3), np.uint8)
    array[:, :size[0] // 2, 0] = array[:, size[0] // 2:, 2] = 255
    image = Image.fromarray(array).convert(mode)
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode, name", [
    ("RGB", "a.png"), ("RGB", "a.jpg"), ("RGBA", "a.png"), ("P", "a.png"), ("CMYK", "a.jpg"),
    ("RGB", "a.webp"), ("RGB", "a.bmp"), ("P", "a.gif"), ("YCbCr", "a.jpg")])
def test_modes(tmp_path, mode, name):
    photo = images.read(picture(tmp_path / name, mode), 64)
    assert photo.shape == (1, 3, 64, 64) and photo.dtype == torch.float32 and photo.abs().max() <= 1
    assert photo[0, 0, :, :20].mean() > .8 and photo[0, 2, :, 44:].mean() > .8
    assert photo[0, 0, :, 44:].mean() < -.7
    assert torch.equal(images.read(str(tmp_path / name), 64), photo)


@pytest.mark.parametrize("mode", ["L", "1", "LA", "I;16", "I", "F"])
def test_grey_of_any_depth(tmp_path, mode):
    ramp = np.tile(np.linspace(0, 1, 80), (80, 1))
    if mode in ("I;16", "I"):
        image = Image.fromarray((ramp * 65535).astype(np.uint16 if mode == "I;16" else np.int32))
    elif mode == "F":
        image = Image.fromarray((ramp * 65535).astype(np.float32))
    else:
        image = Image.fromarray((ramp * 255).astype(np.uint8)).convert(mode)
    name = tmp_path / ("a.tiff" if mode in ("I", "F") else "a.png")
    image.save(name)
    photo = images.read(name, 64)
    assert torch.equal(photo[:, 0], photo[:, 1])
    assert photo[..., :8].mean() < -.7 and photo[..., -8:].mean() > .7 and abs(photo.mean()) < .1


def test_a_pixel_that_is_no_number(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 80, dtype=np.float32), (80, 1))
    ramp[3, 3] = np.nan
    Image.fromarray(ramp).save(tmp_path / "a.tiff")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        photo = images.read(tmp_path / "a.tiff", 64)
    assert photo[..., -8:].mean() > .7 and abs(photo.mean()) < .1


@pytest.mark.parametrize("white, kind", [
    (1, np.float32), (1.05, np.float32), (260, np.float32), (2 ** 31 - 1, np.int32), (1e12, np.float32)])
def test_grey_of_any_white(tmp_path, white, kind):
    Image.fromarray((np.tile(np.linspace(0, 1, 80), (80, 1)) * white).astype(kind)).save(tmp_path / "a.tiff")
    photo = images.read(tmp_path / "a.tiff", 64)
    assert photo[..., :8].mean() < -.7 and photo[..., -8:].mean() > .7 and abs(photo.mean()) < .1


def test_transparent_sixteen_bit_grey_is_white(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 80).astype(np.uint16), (80, 1))
    Image.fromarray(ramp).save(tmp_path / "a.png", transparency=0)
    photo = images.read(tmp_path / "a.png", 64)
    assert photo[..., 0].mean() > .5 and photo[..., 4].mean() < -.7


def test_a_large_photo_is_no_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90 * 80 - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images.read(picture(tmp_path / "a.png"), 64)


@pytest.mark.parametrize("limit, mode, name, settings", [
    ("LARGEST", "RGB", "a.png", {}), ("LARGEST_RICH", "RGBA", "a.png", {}),
    ("LARGEST_RICH", "I;16", "a.png", {}), ("LARGEST_RICH", "CMYK", "a.tiff", {}),
    ("LARGEST_HEAVY", "RGB", "a.webp", {}), ("LARGEST_JPEG", "RGB", "a.jpg", {}),
    ("LARGEST_JPEG", "CMYK", "a.jpg", {}), ("LARGEST", "RGB", "a.jpg", {"progressive": True}),
    ("LARGEST_RICH", "CMYK", "a.jpg", {"progressive": True})])
def test_the_most_pixels_of_each_kind(tmp_path, monkeypatch, limit, mode, name, settings):
    Image.new(mode, (80, 70), *["white"] * (mode == "RGBA")).save(tmp_path / name, **settings)
    for other in {"LARGEST", "LARGEST_JPEG", "LARGEST_RICH", "LARGEST_HEAVY"} - {limit}:
        monkeypatch.setattr(images, other, 0)
    images.read(tmp_path / name, 64)
    monkeypatch.setattr(images, limit, .0055)
    with pytest.raises(images.ImageError, match="too large"):
        images.read(tmp_path / name, 64)


def test_files_that_are_small_and_take_for_ever(tmp_path):
    """A progressive JPEG of many scans, a run-length BMP, which is decoded in Python, a TIFF's huge tile."""
    picture(tmp_path / "few.jpg", progressive=True)
    data = (tmp_path / "few.jpg").read_bytes()
    last = data[data.rindex(b"\xff\xda"):-2]
    (tmp_path / "many.jpg").write_bytes(data[:-2] + 50 * last + data[-2:])
    images.read(tmp_path / "few.jpg", 64)

    header = struct.pack("<IiiHHIIiiII", 40, 80, 80, 1, 8, 1, 4, 0, 0, 256, 0)  # compression 1: runs
    body = header + bytes(1024) + b"\0\1"
    (tmp_path / "runs.bmp").write_bytes(b"BM" + struct.pack("<IHHI", 14 + len(body), 0, 0, 1078) + body)

    tags = {256: 80, 257: 80, 258: 8, 259: 8, 262: 1, 277: 1, 322: 24_000, 323: 24_000, 324: 200, 325: 10}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags))
    (tmp_path / "tile.tiff").write_bytes(head + entries + bytes(300))
    for name in "many.jpg", "runs.bmp", "tile.tiff":
        with pytest.raises(images.ImageError, match="too large"):
            images.read(tmp_path / name, 64)


@pytest.mark.parametrize("name", ["a.ppm", "a.eps", "a.ico", "a.tga"])
def test_what_is_no_photo(tmp_path, name):
    Image.new("RGB", (80, 80)).save(tmp_path / name)
    with pytest.raises(images.ImageError, match="cannot be read as a picture"):
        images.read(tmp_path / name, 64)


def test_a_crop_of_a_large_picture_is_made_smaller(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "ENOUGH", 64)
    noise = np.random.default_rng(0).integers(0, 65535, (300, 300), np.uint16)
    Image.fromarray(noise).save(tmp_path / "a.png")
    seen, before = [], images.in_srgb
    monkeypatch.setattr(images, "in_srgb", lambda image, path: seen.append(image.size) or before(image, path))
    images.read(tmp_path / "a.png", 64, (10, 20, 256))
    images.read(tmp_path / "a.png", 64)
    assert seen == [(64, 64), (75, 75)]


@pytest.mark.parametrize("name, factor", [("a.jpg", 4), ("a.png", 4), ("b.png", 1)])
def test_no_more_is_decoded_than_is_needed(tmp_path, monkeypatch, name, factor):
    """Of a large picture a fraction, unless the crop counts its pixels."""
    monkeypatch.setattr(images, "ENOUGH", 64)
    mode = "P" if factor == 1 else "RGB"  # pixels that are no colours have no mean
    path = picture(tmp_path / name, mode, size=(80 * 4, 70 * 4))
    image, whole = images.opened(path, reduced=True)
    assert image.size == (80 * 4 // factor, 70 * 4 // factor) and whole
    assert images.opened(path, reduced=False)[0].size == (320, 280)
    photo = images.read(path, 64)
    assert photo[0, 0, :, :20].mean() > .8 and photo[0, 2, :, 44:].mean() > .8
    assert images.read(path, 64, (160, 0, 160))[0, 2].mean() > .9


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_that_was_cut_off(tmp_path, orientation):
    """It is used if what is missing lies outside the square, and refused otherwise."""
    noise = np.random.default_rng(0).integers(0, 255, (60, 30, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise).resize((120, 240)).save(tmp_path / "a.jpg", exif=exif)
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "most.jpg").write_bytes(data[:len(data) * 85 // 100])
    (tmp_path / "half.jpg").write_bytes(data[:len(data) // 2])
    with pytest.warns(UserWarning, match="most.jpg: truncated; the part that is there is used"):
        most = images.read(tmp_path / "most.jpg", 64)
    assert torch.equal(most, images.read(tmp_path / "a.jpg", 64))
    with pytest.warns(UserWarning), pytest.raises(images.ImageError, match="part of the face is missing"):
        images.read(tmp_path / "half.jpg", 64)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    (tmp_path / "head.jpg").write_bytes(data[:100])
    with pytest.raises(images.ImageError, match="cannot be read as a picture"):
        images.read(tmp_path / "head.jpg", 64)
    Image.fromarray(noise).resize((120, 240)).save(tmp_path / "a.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:9000])
    with pytest.raises(images.ImageError, match="cannot be read as a picture"):
        images.read(tmp_path / "half.png", 64)


def test_transparent_is_white(tmp_path):
    image = Image.new("RGBA", (80, 80), (255, 0, 0, 0))
    image.putpixel((0, 79), (255, 0, 0, 255))
    image.save(tmp_path / "a.png")
    assert (images.read(tmp_path / "a.png", 64)[..., :60, 9:] == 1).all()


@pytest.mark.parametrize("mode, name", [
    ("RGBA", "a.png"), ("LA", "a.png"), ("RGBA", "a.webp"), ("P", "a.png")])
def test_a_picture_that_is_all_transparent_shows_its_colours(tmp_path, mode, name):
    """As programs write it that mean nothing by it."""
    image = Image.new("RGBA", (80, 80), (120, 120, 120, 0)).convert(mode)
    image.save(tmp_path / name, **{"lossless": True, "exact": True} if name == "a.webp" else {})
    with pytest.warns(UserWarning, match=f"{name}: every pixel is transparent"):
        assert ((images.read(tmp_path / name, 64) + 1) * 127.5 - 120).abs().max() < 1


def test_exif_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned a quarter clockwise: the left half goes up
    photo = images.read(picture(tmp_path / "a.jpg", exif=exif), 64)
    assert photo[0, 0, :20].mean() > .8 and photo[0, 2, 44:].mean() > .8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_beside_damaged_exif(tmp_path, orientation):
    """The same picture, stored in eight ways. Another tag has a fraction without a denominator."""
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 80, 3), np.uint8))
    away = dict(zip(range(2, 9), (
        Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
        Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90, Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_270)))
    stored = upright if orientation == 1 else upright.transpose(away[orientation])
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = orientation, IFDRational(72)
    blob = exif.tobytes()
    stored.save(tmp_path / "a.png", exif=blob.replace((72).to_bytes(4, "little"), (0).to_bytes(4, "little")))
    upright.save(tmp_path / "b.png")
    assert torch.equal(images.read(tmp_path / "a.png", 64), images.read(tmp_path / "b.png", 64))


def test_exif_that_is_not_to_be_read_is_none(tmp_path):
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "b.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(40))
    assert torch.equal(images.read(tmp_path / "a.jpg", 64), images.read(tmp_path / "b.jpg", 64))


def swapped_profile():
    """sRGB, with the primaries of red and green changed over."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")


@pytest.mark.parametrize("mode, name", [
    ("RGB", "a.png"), ("RGBA", "a.png"), ("P", "a.png"), ("RGB", "a.tiff")])
def test_a_colour_profile_is_honoured(tmp_path, mode, name):
    plain = Image.new("RGB", (80, 80), (40, 120, 60))
    stored = plain.quantize(2) if mode == "P" else plain.convert(mode)
    stored.save(tmp_path / name, icc_profile=swapped_profile())
    photo = (images.read(tmp_path / name, 64) + 1) * 127.5
    assert (photo - torch.tensor([120., 40, 60]).view(3, 1, 1)).abs().max() <= 1.01


@pytest.mark.parametrize("profile", [b"", b"nothing", swapped_profile()[:200], swapped_profile()[:-400]])
def test_a_damaged_profile_is_as_none(tmp_path, profile):
    Image.new("RGB", (80, 80), (40, 120, 60)).save(tmp_path / "a.png", icc_profile=profile)
    photo = (images.read(tmp_path / "a.png", 64) + 1) * 127.5
    assert (photo - torch.tensor([40., 120, 60]).view(3, 1, 1)).abs().max() <= 1.01


def test_a_profile_of_another_kind_of_picture_is_as_none(tmp_path):
    Image.new("L", (80, 80), 90).save(tmp_path / "a.png", icc_profile=swapped_profile())  # of three colours
    photo = (images.read(tmp_path / "a.png", 64) + 1) * 127.5
    assert (photo - 90).abs().max() <= 1.01


def test_a_heic_photo_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    monkeypatch.setattr(images, "formats", lambda: ["JPEG"])
    with pytest.raises(images.ImageError, match="HEIC photo; pip install pillow-heif"):
        images.read(tmp_path / "a.heic", 64)


def chunk(name, body, crc=None):
    """A PNG's chunk, with its checksum or another."""
    crc = zlib.crc32(name + body) if crc is None else crc
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)


def with_chunks(path, *chunks, after=False, image=None, **options):
    """A PNG with these chunks before its picture, or after it."""
    (image or Image.new("RGB", (80, 80), (210, 160, 130))).save(path, "PNG", **options)
    data = path.read_bytes()
    at = data.index(b"IEND" if after else b"IDAT") - 4
    path.write_bytes(data[:at] + b"".join(chunks) + data[at:])
    return path


def colour(path):
    """The colour in the middle of what is read, in bytes."""
    return ((images.read(path, 64)[0, :, 32, 32] + 1) * 127.5).round().int().tolist()


LONG = zlib.compress(b"x" * 2_000_000)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name, body", [
    (b"zTXt", b"a\0\0" + LONG), (b"iTXt", b"a\0\1\0\0\0" + LONG), (b"tEXt", b"a\0" + b"x" * 100)])
def test_text_of_any_length_is_no_reason(tmp_path, name, body, after):
    assert colour(with_chunks(tmp_path / "a.png", chunk(name, body), after=after)) == [210, 160, 130]


@pytest.mark.parametrize("name, body", [
    (b"tEXt", b"a\0b"), (b"gAMA", struct.pack(">I", 100_000)), (b"pHYs", bytes(9)), (b"iCCP", b"a\0\0bad"),
    (b"cICP", bytes((12, 13, 0, 1))), (b"eXIf", b"MM"), (b"tRNS", bytes(6))])
def test_what_has_a_wrong_checksum_and_does_not_matter_is_left_out(tmp_path, name, body):
    assert colour(with_chunks(tmp_path / "a.png", chunk(name, body, crc=7))) == [210, 160, 130]


@pytest.mark.parametrize("name, body", [
    (b"gAMA", b"\0\1"), (b"cHRM", bytes(31)), (b"sRGB", b""), (b"iCCP", b""), (b"iCCP", b"a\0\1" + LONG)])
def test_malformed_colours_with_a_right_checksum_are_left_out(tmp_path, name, body):
    assert colour(with_chunks(tmp_path / "a.png", chunk(name, body))) == [210, 160, 130]


def test_a_profile_of_more_than_a_megabyte(tmp_path):
    padded = swapped_profile() + bytes(2 * 10 ** 6)
    padded = struct.pack(">I", len(padded)) + padded[4:]
    packed = chunk(b"iCCP", b"a\0\0" + zlib.compress(padded))
    path = with_chunks(tmp_path / "a.png", packed)
    assert colour(path) == pytest.approx([160, 210, 130], abs=1)
    assert images.opened(path, reduced=False)[0].info["icc_profile"] == padded


CHROMA = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)  # Display P3's


@pytest.mark.parametrize("chunks, right", [
    ([(b"cICP", bytes((12, 13, 0, 1)))], [219, 157, 125]),        # Display P3
    ([(b"cICP", bytes((1, 13, 0, 1)))], [210, 160, 130]),
    ([(b"cICP", bytes((9, 13, 0, 1)))], [237, 152, 124]),         # BT.2020
    ([(b"gAMA", struct.pack(">I", 100_000))], [233, 206, 188]),   # linear: (c / 255)^(1 / 2.2)
    ([(b"gAMA", struct.pack(">I", 45_455))], [210, 160, 130]),
    ([(b"gAMA", struct.pack(">I", 0))], [210, 160, 130]),
    ([(b"gAMA", struct.pack(">I", 45_455)), (b"cHRM", CHROMA)], [219, 157, 125]),
    ([(b"cHRM", bytes(32))], [210, 160, 130]), ([(b"cHRM", b"\xff" * 32)], [210, 160, 130]),
    ([(b"sRGB", b"\0"), (b"gAMA", struct.pack(">I", 100_000)), (b"cHRM", CHROMA)], [210, 160, 130]),
    ([(b"cICP", bytes((1, 13, 0, 1))), (b"gAMA", struct.pack(">I", 100_000))], [210, 160, 130])])
def test_colours_that_a_png_says(tmp_path, chunks, right):
    assert colour(with_chunks(tmp_path / "a.png", *(chunk(*one) for one in chunks))) == right


def test_another_white_becomes_ours(tmp_path):
    """ProPhoto's primaries, by published matrices: RGB to XYZ, Bradford's D50 to D65, XYZ to sRGB."""
    chroma = struct.pack(">8I", 34567, 35850, 73470, 26530, 15960, 84040, 3660, 10)
    for given, right in ((180, 160, 150), (200, 155, 148)), ((255, 255, 255), (255, 255, 255)):
        image = Image.new("RGB", (80, 80), given)
        said = with_chunks(tmp_path / "a.png", chunk(b"cHRM", chroma), image=image)
        assert colour(said) == pytest.approx(right, abs=1)


def test_which_of_two_ways_to_say_colours_goes_before(tmp_path):
    p3 = chunk(b"cICP", bytes((12, 13, 0, 1)))
    assert colour(with_chunks(tmp_path / "a.png", p3, icc_profile=swapped_profile())) == [219, 157, 125]
    gamma = chunk(b"gAMA", struct.pack(">I", 100_000))
    both = with_chunks(tmp_path / "b.png", gamma, icc_profile=swapped_profile())
    assert colour(both) == pytest.approx([160, 210, 130], abs=1)


def test_colours_that_are_hdr_are_refused(tmp_path):
    for codes in (9, 16), (9, 18), (99, 13):
        with pytest.raises(images.ImageError, match=f"H.273's {codes[0]}/{codes[1]}, are not known"):
            images.read(with_chunks(tmp_path / "a.png", chunk(b"cICP", bytes((*codes, 0, 1)))), 64)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
@pytest.mark.parametrize("codes, profile, right", [
    (None, {}, (210, 160, 130)), ((12, 13), {}, (219, 157, 125)),
    ((9, 16), {"icc_profile": swapped_profile()}, (160, 210, 130))])
def test_colours_that_an_avif_says(tmp_path, codes, profile, right):
    path = tmp_path / "a.avif"
    Image.new("RGB", (80, 80), (210, 160, 130)).save(path, quality=100, subsampling="4:4:4", **profile)
    data = path.read_bytes()
    at = data.index(b"colrnclx") + 8
    path.write_bytes(data[:at] + struct.pack(">HH", *codes) + data[at + 4:] if codes else data)
    assert colour(path) == pytest.approx(right, abs=2)


@pytest.mark.parametrize("said", [{0xA001: 0xFFFF, 0xA005: {1: "R03", 2: b"0100"}}, {0xA001: 2}])
def test_exifs_mark_of_adobe_rgb(tmp_path, said):
    for found, right in (said, [227, 161, 130]), ({0xA001: 1, 0xA005: {1: "R98"}}, [210, 160, 130]):
        exif = Image.Exif()
        exif[0x8769] = found
        Image.new("RGB", (80, 80), (210, 160, 130)).save(tmp_path / "a.png", exif=exif)
        assert colour(tmp_path / "a.png") == right  # by published matrices: RGB to XYZ, XYZ to sRGB


@pytest.mark.parametrize("tags", [{254: 1}, {255: 2}, {50706: b"\1\4\0\0"}, {}])
def test_a_camera_s_raw_is_not_its_thumbnail(tmp_path, tags):
    Image.new("RGB", (80, 80)).save(tmp_path / "a.tiff")
    images.read(tmp_path / "a.tiff", 64)
    name = "a.tiff" if tags else "a.NEF"
    Image.new("RGB", (80, 80)).save(tmp_path / name, "TIFF", tiffinfo=tags)
    with pytest.raises(images.ImageError, match=f"{name}: a camera's RAW, or it begins with a thumbnail"):
        images.read(tmp_path / name, 64)


@pytest.mark.parametrize("name", ["a.webp", "a.jpg", "a.png", "a.tiff"])
def test_a_file_far_larger_than_its_picture_is_not_read(tmp_path, name):
    picture(tmp_path / name)
    os.truncate(tmp_path / name, 3 * 10 ** 9)  # sparse: no disk is used
    with pytest.raises(images.ImageError, match=f"{name}: .*larger than 300 MB"):
        images.read(tmp_path / name, 64)


def test_damage_is_one_line_wherever_it_shows(tmp_path, capfd):
    """In the picture's conversion too, and whatever libraries in C print."""
    palette = Image.effect_noise((80, 80), 60).convert("P")
    with_chunks(tmp_path / "a.png", chunk(b"tRNS", bytes(range(256)) + b"\1\2"), image=palette)
    Image.effect_noise((80, 80), 60).convert("1").save(tmp_path / "a.tiff", compression="group4")
    data = bytearray((tmp_path / "a.tiff").read_bytes())
    data[20:400] = b"\x55" * 380
    (tmp_path / "a.tiff").write_bytes(data)
    for name in "a.png", "a.tiff":
        with suppress(images.ImageError):
            images.read(tmp_path / name, 64)
    assert capfd.readouterr().err == ""


def test_centre_and_chosen_crop(tmp_path):
    path = picture(tmp_path / "a.png", size=(300, 100))  # the centre square is half red, half blue
    assert abs(images.read(path, 64)[0, 0].mean()) < .1
    assert images.read(path, 64, (0, 10, 90))[0, 0].mean() > .95
    for crop in [(250, 0, 90), (-1, 0, 90), (0, 0, 101), (0, 0, 0)]:
        with pytest.raises(images.ImageError, match="is not inside its 300×100"):
            images.read(path, 64, crop)


class Detector:
    """Finds these boxes (x, y, width, height) of a picture 640 pixels wide."""

    def __init__(self, *boxes):
        self.boxes = boxes

    def detectMultiScale(self, grey, *_, minSize):
        assert grey.shape == (480, 640) and minSize == (48, 48)
        return self.boxes


@pytest.mark.parametrize("boxes, square, said", [
    ([(200, 200, 100, 100)], (320, 311, 360), None),
    ([(400, 200, 80, 80), (200, 200, 100, 100), (0, 0, 50, 50)], (320, 311, 360), "3 faces; the largest"),
    ([(0, 0, 100, 100)], (0, 0, 360), None),                # in a corner: moved inside
    ([(100, 100, 300, 300)], (20, 0, 960), None),           # larger than the picture: all of its height
    ([], (160, 0, 960), "no face found; the central square"),
    (None, (160, 0, 960), "pip install \"opencv-python-headless<5\"")])
def test_the_square_about_the_largest_face(tmp_path, monkeypatch, boxes, square, said):
    noise = np.random.default_rng(0).integers(0, 255, (960, 1280, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "detector", lambda: None if boxes is None else Detector(*boxes))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        photo = images.read(tmp_path / "a.png", 64, "face")
    assert torch.equal(photo, images.read(tmp_path / "a.png", 64, square))
    assert [said in str(warning.message) for warning in told] == [True] * (said is not None)
    centre = images.read(tmp_path / "a.png", 64, (160, 0, 960))
    assert torch.equal(images.read(tmp_path / "a.png", 64), centre)


def test_refusals_are_one_line(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.jpg").touch()
    picture(tmp_path / "whole.png", size=(200, 200))
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    picture(tmp_path / "small.png", size=(40, 300))
    Image.new("1", (images.LARGEST * 10 ** 6 // 70 + 1, 70)).save(tmp_path / "huge.png")
    for name, why in [
            ("text.png", "cannot be read"), ("empty.jpg", "cannot be read"), ("half.png", "cannot be read"),
            ("none.png", "No such file"), ("small.png", "too small"), ("huge.png", "too large"),
            (".", "Is a directory")]:
        with pytest.raises(images.ImageError, match=why) as error:
            images.read(tmp_path / name, 64)
        assert "\n" not in str(error.value)


def test_png_carries_its_settings(tmp_path):
    path = tmp_path / "deep" / "a.png"
    images.save(images.to_pil(torch.zeros(3, 8, 8)), str(path), prompt="a [V] face — naïve", seed=3)
    back = Image.open(path)
    assert back.text.pop("XML:com.adobe.xmp")
    assert back.text == {"prompt": "a [V] face — naïve", "seed": "3"}
    assert back.getpixel((0, 0)) == (128, 128, 128)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.png"]


def test_sheet():
    sheet = images.sheet(torch.full((3, 3, 4, 4), -1.), 2)
    assert sheet.size == (8, 8)
    assert sheet.getpixel((1, 5)) == (0, 0, 0) and sheet.getpixel((7, 7)) == (255, 255, 255)


def itxt(png, keyword):
    """The texts of a PNG's uncompressed iTXt chunks with this keyword, read without PIL."""
    found, at = [], 8
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at:at + 8])
        if kind == b"iTXt":
            name, rest = png[at + 8:at + 8 + length].split(b"\0", 1)
            language, translated, text = rest[2:].split(b"\0", 2)
            found += [text.decode()] if name.decode() == keyword and rest[0] == 0 else []
        at += 12 + length
    return found


def test_every_picture_but_a_photo_says_to_machines_that_it_is_generated(tmp_path):
    for name, options in ("made", {"prompt": "a face"}), ("photo", {"generated": False}):
        images.save(images.to_pil(torch.zeros(3, 8, 8)), tmp_path / f"{name}.png", **options)
    assert itxt((tmp_path / "photo.png").read_bytes(), "XML:com.adobe.xmp") == []
    (packet,) = itxt((tmp_path / "made.png").read_bytes(), "XML:com.adobe.xmp")
    described = ElementTree.fromstring(packet)[0][0]
    space = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
    kind = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    assert described.get(f"{space}DigitalSourceType") == kind
    assert packet.startswith("<?xpacket begin") and packet.endswith('<?xpacket end="w"?>')


def test_a_sheet_says_what_its_columns_are():
    """The first column's head is long and stays over it, the second has none; the pictures are below."""
    pictures = torch.zeros(2, 3, 64, 64)
    plain = np.array(images.sheet(pictures, 2))
    labelled = np.array(images.sheet(pictures, 2, ["a face with so many words that they need to be cut", ""]))
    height = len(labelled) - len(plain)
    assert height > 20 and (labelled[height:] == plain).all()
    dark = (labelled[:height] < 128).any((0, 2))
    assert dark[:64].any() and not dark[64:].any() and not dark[:1].any()

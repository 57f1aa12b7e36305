import io
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxcls.data.images import FORMATS, MAX_SCANS, SUFFIXES, decode, read_bytes
from jaxcls.errors import ImageError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encode(image, format_, **options):
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def row(mode, *pixels):
    """One row of pixels."""
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    return image


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def smooth(height, width):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(
        np.stack([255 * x // width, 255 * y // height, 255 * (x + y) // (height + width)], -1).astype(
            np.uint8
        )
    )


def oriented(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def png_chunk(kind, body):
    return struct.pack(">L", len(body)) + kind + body + zlib.crc32(kind + body).to_bytes(4)


def png(width, height, depth, colour_type, rows, *chunks):
    header = struct.pack(">LLBBBBB", width, height, depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + line for line in rows))
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + b"".join(chunks)
        + png_chunk(b"IDAT", pixels)
        + png_chunk(b"IEND", b"")
    )


def tiff(entries, tail=b"", order="<"):
    """A TIFF of one directory at byte 8; `entries` are (tag, kind, count, value or offset)."""
    packed = b"".join(
        struct.pack(order + "HHL", *entry[:3])
        + (struct.pack(order + "HH", entry[3], 0) if entry[1] == 3 else struct.pack(order + "L", entry[3]))
        for entry in sorted(entries)
    )
    magic = b"II*\0" if order == "<" else b"MM\0*"
    head = magic + struct.pack(order + "LH", 8, len(entries)) + packed + bytes(4)
    return head + tail


def outcome(data, **options):
    """The picture, or the `ImageError`; anything else is raised, a slow answer included."""
    start = time.thread_time()
    try:
        result = decode(data, **options)
    except ImageError as error:
        result = error
    assert time.thread_time() - start < 1
    # Where warnings are errors, one that Pillow gives would show here.
    assert not isinstance(getattr(result, "__cause__", None), Warning), result
    return result


def refusal(data, **options):
    with pytest.raises(ImageError) as caught:
        decode(data, name="photo", **options)
    assert str(caught.value) == f"photo: {caught.value.reason}"
    return caught.value.reason


# What each kind of pixel becomes.

RULES = {
    "grey": (encode(row("L", 0, 77, 255), "PNG"), [(0,) * 3, (77,) * 3, (255,) * 3]),
    "1-bit": (encode(row("1", 0, 1), "PNG"), [(0,) * 3, WHITE]),
    "rgb": (encode(row("RGB", RED, (1, 2, 3)), "PNG"), [RED, (1, 2, 3)]),
    "alpha": (encode(row("RGBA", (*RED, 255), (9, 9, 9, 0), (0, 0, 0, 51)), "PNG"), [RED, WHITE, (204,) * 3]),
    "grey alpha": (encode(row("LA", (40, 255), (40, 0), (0, 204)), "PNG"), [(40,) * 3, WHITE, (51,) * 3]),
    "1-bit key": (encode(row("1", 0, 1), "PNG", transparency=0), [WHITE, WHITE]),
    "2-bit key": (
        png(4, 1, 2, 0, [b"\x1b"], png_chunk(b"tRNS", b"\0\1")),
        [(0,) * 3, WHITE, (170,) * 3, WHITE],
    ),
    "4-bit key": (png(2, 1, 4, 0, [b"\x05"], png_chunk(b"tRNS", b"\0\0")), [WHITE, (85,) * 3]),
    "8-bit key": (encode(row("L", 5, 6), "PNG", transparency=5), [WHITE, (6,) * 3]),
    "rgb key": (encode(row("RGB", RED, BLUE), "PNG", transparency=RED), [WHITE, BLUE]),
    "16-bit": (png(3, 1, 16, 0, [b"\0\xff\x12\x34\xff\xff"]), [(0,) * 3, (0x12,) * 3, WHITE]),
    "16-bit key": (
        png(2, 1, 16, 0, [b"\x12\x34\x12\x35"], png_chunk(b"tRNS", b"\x12\x34")),
        [WHITE, (0x12,) * 3],
    ),
    "16-bit rgb": (png(1, 1, 16, 2, [b"\x01\xff\x02\xff\x03\xff"]), [(1, 2, 3)]),
    "16-bit rgb key": (
        png(2, 1, 16, 2, [b"\1\0\2\0\3\0" + b"\4\0\5\0\6\0"], png_chunk(b"tRNS", b"\1\0\2\0\3\0")),
        [WHITE, (4, 5, 6)],
    ),
    "tiff 16-bit": (
        encode(Image.fromarray(np.array([[255, 0x1234]], np.uint16)), "TIFF"),
        [(0,) * 3, (0x12,) * 3],
    ),
    "tiff int32": (
        encode(Image.fromarray(np.array([[-5, 0x1234, 70000]], np.int32)), "TIFF"),
        [(0,) * 3, (0x12,) * 3, WHITE],
    ),
    "tiff float": (
        encode(Image.fromarray(np.array([[-1, 0.1, 0.5, 2, np.nan, np.inf]], np.float32)), "TIFF"),
        [(0,) * 3, (26,) * 3, (128,) * 3, WHITE, (0,) * 3, WHITE],
    ),
    "tiff cmyk": (
        encode(row("CMYK", (0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255), (0, 0, 102, 51)), "TIFF"),
        [WHITE, (0, 255, 255), (0, 0, 0), (204, 204, 122)],
    ),
    "bmp": (encode(row("RGB", RED, (1, 2, 3)), "BMP"), [RED, (1, 2, 3)]),
    "webp": (encode(row("RGBA", (*RED, 255), (*BLUE, 0)), "WEBP", lossless=True), [RED, WHITE]),
}


@pytest.mark.parametrize("rule", RULES)
def test_each_kind_of_pixel_has_its_rule(rule):
    data, expected = RULES[rule]
    images = decode(data)
    assert images.dtype == np.uint8
    assert images.flags.c_contiguous
    assert images.flags.writeable
    assert images.tolist() == [[list(pixel) for pixel in expected]]


@pytest.mark.parametrize("transparency", [0, b"\x00\xff\x80"])
def test_palette_transparency_is_laid_over_white(transparency):
    image = row("P", 0, 1, 2)
    image.putpalette([*RED, *GREEN, 0, 0, 0])
    alpha = np.array([0, 255, 128 if isinstance(transparency, bytes) else 255])[:, None] / 255
    expected = np.array([RED, GREEN, (0, 0, 0)]) * alpha + 255 * (1 - alpha)
    np.testing.assert_allclose(
        decode(encode(image, "PNG", transparency=transparency))[0], expected, atol=0.51
    )


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 6), colour) for colour in (RED, GREEN, BLUE)]
    for format_ in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if format_ == "WEBP" else {}
        data = encode(frames[0], format_, save_all=True, append_images=frames[1:], **options)
        assert (decode(data) == RED).all(), format_
        assert decode(data).shape == (6, 8, 3)


def test_gif_transparency_and_comment():
    image = row("P", 0, 1)
    image.putpalette([*RED, *GREEN])
    data = encode(image, "GIF", transparency=0, comment=b"," * 600)
    assert decode(data).tolist() == [[[255, 255, 255], [0, 255, 0]]]


def test_bytes_before_a_gif_frame_that_mean_nothing():
    image = row("P", 0, 1)
    image.putpalette([*RED, *GREEN])
    data = encode(image, "GIF", transparency=0)
    frame = data.rindex(b",\0\0\0\0\2\0\1\0")
    assert decode(data[:frame] + b"\0\1x\xff" + data[frame:]).tolist() == [[[255, 255, 255], [0, 255, 0]]]
    assert "holds no picture" in refusal(data[:frame] + b";" + data[frame:])
    assert "holds no picture" in refusal(data[:13])


def test_multi_picture_jpeg_is_its_first_picture():
    first = encode(smooth(40, 60), "JPEG")
    several = encode(
        Image.open(io.BytesIO(first)), "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))]
    )
    assert b"MPF\0" in several
    assert Image.open(io.BytesIO(several)).format == "MPO"
    np.testing.assert_allclose(decode(several).astype(int), decode(first).astype(int), atol=8)


def test_cmyk_jpeg_is_inverted_as_adobe_writes_it():
    colours = {(0, 0, 0, 0): WHITE, (255, 0, 0, 0): (0, 255, 255), (0, 102, 0, 51): (204, 122, 204)}
    for cmyk, rgb in colours.items():
        pixels = decode(encode(Image.new("CMYK", (16, 16), cmyk), "JPEG", quality=100))
        np.testing.assert_allclose(pixels.astype(int), np.broadcast_to(rgb, (16, 16, 3)), atol=3)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
def test_compressed_tiff(compression):
    image = smooth(40, 60)
    tolerance = 8 if compression == "jpeg" else 0
    pixels = decode(encode(image, "TIFF", compression=compression))
    np.testing.assert_allclose(pixels.astype(int), np.asarray(image).astype(int), atol=tolerance)


def test_formats_are_recognised_by_content():
    assert FORMATS == ("JPEG", "PNG", "WebP", "BMP", "GIF", "TIFF")
    assert all(re.fullmatch(r"\.[a-z]+", suffix) for suffix in SUFFIXES)
    for format_ in FORMATS:
        assert decode(encode(smooth(20, 30), format_)).shape == (20, 30, 3)
    assert "known format" in refusal(encode(smooth(20, 30), "PPM"))
    assert "known format" in refusal(encode(smooth(20, 30), "ICO"))


# Orientation. Each corner of the upright picture has its own colour.

UPRIGHT = np.array([[RED, RED, GREEN], [BLUE, BLUE, WHITE]], np.uint8)
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.swapaxes(0, 1),
    6: np.rot90(UPRIGHT),
    7: UPRIGHT[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90(UPRIGHT, -1),
}


@pytest.mark.parametrize("format_", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", STORED)
def test_orientation_is_applied(format_, orientation):
    image = Image.fromarray(np.kron(STORED[orientation], np.ones((16, 16, 1), np.uint8)))
    options = {"lossless": True} if format_ == "WEBP" else {"quality": 95} if format_ == "JPEG" else {}
    data = encode(image, format_, exif=oriented(orientation), **options)
    for short_side in (None, 4):
        pixels = decode(data, short_side=short_side)
        side = pixels.shape[0] // 2
        np.testing.assert_allclose(pixels[side // 2 :: side, side // 2 :: side].astype(int), UPRIGHT, atol=12)


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"II",
        b"II*\0\xff\xff\xff\xff",
        b"MM\0*\0\0\0\x08\xff\xff",
        b"MM\0*\0\0\0\x08\0\1" + struct.pack(">HHL4s", 271, 2, 2**31, b"\xff" * 4),
        b"MM\0*\0\0\0\x08\0\1" + struct.pack(">HHL4s", 274, 2, 1, b"6\0\0\0"),
        b"MM\0*\0\0\0\x08\0\1" + struct.pack(">HHLHH", 274, 3, 1, 9, 0),
    ],
)
def test_damaged_exif_does_not_spoil_the_picture(exif):
    image = smooth(20, 30)
    for format_ in ("JPEG", "PNG", "WEBP"):
        np.testing.assert_array_equal(
            decode(encode(image, format_, exif=b"Exif\0\0" + exif)), decode(encode(image, format_))
        )


def test_orientation_in_a_cut_off_directory_still_counts():
    exif = b"MM\0*\0\0\0\x08\0\x09" + struct.pack(">HHLHH", 274, 3, 1, 6, 0)
    assert decode(encode(smooth(20, 30), "JPEG", exif=b"Exif\0\0" + exif)).shape == (30, 20, 3)


# Reduced decoding.


def test_short_side_rule():
    for seed, (height, width) in enumerate(
        [(16, 16), (127, 300), (128, 129), (255, 256), (333, 250), (512, 640)]
    ):
        for orientation in (1, 6):
            data = encode(noise(height, width, seed), "JPEG", exif=oriented(orientation))
            short = min(height, width)
            for short_side in (1, 7, 8, 16, 31, 32, 33, 63, 64, 65, 128, 255, 256, 1000):
                scale = next((s for s in (8, 4, 2) if short // s >= 2 * short_side), 1)
                expected = (-(-height // scale), -(-width // scale))
                assert (
                    decode(data, short_side=short_side).shape[:2]
                    == expected[:: 1 if orientation == 1 else -1]
                )


def test_reduced_picture_resizes_to_the_same():
    image = smooth(700, 900)
    data = encode(image, "JPEG", quality=95)
    full, reduced = (
        np.asarray(
            Image.fromarray(decode(data, short_side=side)).resize((112, 87), Image.Resampling.BILINEAR)
        )
        for side in (None, 87)
    )
    assert decode(data, short_side=87).shape == (175, 225, 3)
    assert np.abs(full.astype(int) - reduced.astype(int)).max() <= 2


def test_short_side_leaves_other_formats_whole():
    for format_ in ("PNG", "WEBP", "TIFF", "GIF", "BMP"):
        assert decode(encode(smooth(64, 80), format_), short_side=4).shape == (64, 80, 3)


# Limits.


def bombs():
    side = 60000
    jpeg = bytearray(encode(Image.new("L", (16, 16)), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    bmp = bytearray(encode(Image.new("L", (16, 16)), "BMP"))
    bmp[18:26] = struct.pack("<LL", side, side)
    gif = bytearray(encode(Image.new("L", (16, 16)), "GIF"))
    gif[6:10] = struct.pack("<HH", side, side)
    wide_frame = bytearray(encode(Image.new("L", (16, 16)), "GIF"))
    at = wide_frame.rindex(b",\0\0\0\0\x10\0\x10\0")
    # Between Pillow's warning and its error.
    wide_frame[at + 5 : at + 9] = struct.pack("<HH", 10000, 12000)
    late_frame = wide_frame[:at] + bytes(5) + wide_frame[at:]
    extended = b"VP8X" + struct.pack("<LL", 10, 0x10) + 2 * (16382).to_bytes(3, "little")
    lossless = bytearray(encode(Image.new("RGB", (16, 16)), "WEBP", lossless=True))
    lossless[21:25] = (16382 | 16382 << 14).to_bytes(4, "little")
    lossy = bytearray(encode(Image.new("RGB", (16, 16)), "WEBP"))
    lossy[26:30] = struct.pack("<HH", 16383, 16383)
    tile = [
        (256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 5), (262, 3, 1, 1), (277, 3, 1, 1),
        (322, 4, 1, 40000), (323, 4, 1, 40000), (324, 4, 1, 8), (325, 4, 1, 64),
    ]  # fmt: skip
    strip = [
        (256, 4, 1, side),
        (257, 4, 1, side),
        (258, 3, 1, 8),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (279, 4, 1, 9),
    ]
    return {
        "png": png(side, side, 8, 2, [b""]),
        "png, long": png(1, 2**31 - 1, 8, 0, [b""]),
        "jpeg": bytes(jpeg),
        "bmp": bytes(bmp),
        "gif": bytes(gif),
        "gif frame": bytes(wide_frame),
        "gif frame behind nothing": bytes(late_frame),
        "webp": b"RIFF" + struct.pack("<L", 4 + len(extended)) + b"WEBP" + extended,
        "webp, lossless": bytes(lossless),
        "webp, lossy": bytes(lossy),
        "tiff": tiff(strip, bytes(100)),
        "tiff, big-endian": tiff(strip, bytes(100), ">"),
        "tiff tile": tiff(tile, bytes(100)),
    }


@pytest.mark.parametrize("bomb", bombs())
def test_size_is_checked_before_pixels_are_decoded(bomb):
    data = bombs()[bomb]
    assert len(data) < 5000
    resident = resident_bytes()
    tracemalloc.start()
    start = time.thread_time()
    assert "pixels; at most" in refusal(data)
    assert time.thread_time() - start < 0.5
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert resident_bytes() - resident < 64 * 2**20


def resident_bytes():
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def test_longest_side():
    assert decode(png(65535, 1, 8, 0, [bytes(65535)])).shape == (1, 65535, 3)
    assert "65,535 along a side" in refusal(png(65536, 1, 8, 0, [bytes(65536)]))


def test_max_pixels_is_inclusive():
    for format_ in FORMATS:
        data = encode(smooth(20, 30), format_)
        assert decode(data, max_pixels=600).shape == (20, 30, 3)
        assert "20" in refusal(data, max_pixels=599)


def test_pillows_own_limit_is_respected_and_left_alone(monkeypatch):
    data = encode(smooth(20, 30), "TIFF")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert "at most 500 are decoded" in refusal(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode(data).shape == (20, 30, 3)
    assert Image.MAX_IMAGE_PIXELS is None


def test_jpeg_of_very_many_scans():
    data = encode(smooth(64, 64), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    num_scans = data.count(b"\xff\xda")
    allowed = data[:-2] + data[last:-2] * (MAX_SCANS - num_scans) + b"\xff\xd9"
    assert decode(allowed).shape == (64, 64, 3)
    # What follows the picture does not count.
    assert decode(allowed + b"\0\2" + data[last:-2] * 50).shape == (64, 64, 3)
    assert "scans" in refusal(data[:-2] + data[last:-2] * (MAX_SCANS + 1 - num_scans) + b"\xff\xd9")


# Damage.


@pytest.mark.parametrize("format_", FORMATS)
def test_cut_short(format_):
    image = noise(40, 60).quantize(64) if format_ == "GIF" else noise(40, 60)
    data = encode(image, format_)
    for length in [*range(40), *range(40, len(data) - 40, 97), len(data) // 2]:
        with pytest.raises(ImageError):
            decode(data[:length])
    for length in range(max(0, len(data) - 8), len(data)):
        try:
            decode(data[:length])
        except ImageError:
            continue
        # Only bytes that hold no pixels may be missing.
        assert format_ in ("GIF", "JPEG", "TIFF"), format_


def test_not_an_image():
    assert refusal(b"") == "the file is empty"
    assert "known format" in refusal(b"<html>404 Not Found</html>")
    assert "known format" in refusal(bytes(1000))
    assert "PNG" in refusal(b"\x89PNG\r\n\x1a\n")
    assert "truncated" in refusal(encode(noise(40, 60), "JPEG")[:2000])


def test_sides_of_zero():
    for side in ((0, 5), (5, 0)):
        refusal(png(*side, 8, 0, [b""]))
        refusal(tiff([(256, 4, 1, side[0]), (257, 4, 1, side[1]), (273, 4, 1, 8), (279, 4, 1, 9)], bytes(99)))


def test_tiff_tags_that_pillow_would_warn_about():
    pixels = bytes(range(16))
    offset = 8 + 2 + 12 * 8 + 4
    whole = [
        (256, 3, 1, 4), (257, 3, 1, 4), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, offset), (277, 3, 1, 1),
        (279, 4, 1, 16),
    ]  # fmt: skip
    harmless = [
        (270, 2, 2**30, 2**31),
        (282, 5, 9, 8),
        (305, 2, 100, 2**32 - 4),
        (34665, 4, 1, 2**31),
        (306, 99, 3, 3),
    ]
    for entry in harmless:
        data = tiff([*whole, entry], pixels)
        assert decode(data)[..., 0].tobytes() == pixels
    for tag in (256, 257, 262, 277):
        assert f"tag {tag}" in refusal(tiff([e if e[0] != tag else (tag, 4, 9, 8) for e in whole], pixels))
    shared = [(tag, 4, 30, 8) for tag in (320, 324, 325)]
    assert "overlap" in refusal(tiff([*whole, *shared], pixels))
    assert "repeats" in refusal(tiff([*whole, (277, 3, 1, 1)], pixels))
    assert "overlap" in refusal(b"II*\0" + struct.pack("<L", 4) + bytes(200))
    assert "channels" in refusal(tiff([e if e[0] != 277 else (277, 3, 1, 60000) for e in whole], pixels))


def test_metadata_does_not_matter():
    bulky = png_chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(2**24)))
    bad_animation = png_chunk(b"acTL", struct.pack(">LL", 0, 0))
    for chunk in (bulky, bad_animation, png_chunk(b"iCCP", b"junk"), png_chunk(b"teXt", b"\xff" * 9)):
        assert decode(png(2, 1, 8, 0, [b"\x05\x06"], chunk)).tolist() == [[[5] * 3, [6] * 3]]


SEEDS = {
    "jpeg": encode(smooth(24, 32), "JPEG", exif=oriented(6)),
    "progressive": encode(smooth(24, 32), "JPEG", progressive=True),
    "cmyk": encode(smooth(24, 32).convert("CMYK"), "JPEG"),
    "mpo": encode(smooth(24, 32), "MPO", save_all=True, append_images=[smooth(24, 32)]),
    "png": encode(smooth(24, 32).convert("RGBA"), "PNG", exif=oriented(6)),
    "apng": encode(smooth(24, 32), "PNG", save_all=True, append_images=[noise(24, 32)]),
    "webp": encode(smooth(24, 32), "WEBP", exif=oriented(6)),
    "bmp": encode(smooth(24, 32).quantize(16), "BMP"),
    "gif": encode(noise(24, 32), "GIF", save_all=True, append_images=[smooth(24, 32)]),
    "tiff": encode(smooth(24, 32), "TIFF", exif=oriented(6)),
    "tiff float": encode(Image.fromarray(np.eye(24, dtype=np.float32)), "TIFF"),
    "tiff packed": encode(smooth(24, 32), "TIFF", compression="packbits"),
}


@pytest.mark.parametrize("seed", SEEDS)
def test_random_damage_gives_a_picture_or_an_image_error(seed):
    rng = np.random.default_rng(7)
    outcomes = set()
    for trial in range(250):
        data = bytearray(SEEDS[seed])
        directory = max(0, len(data) - 300) if seed.startswith("tiff") else 0
        for _ in range(1 + trial % 4):
            at = (
                rng.integers(directory, min(len(data), directory + 400))
                if trial % 3
                else rng.integers(len(data))
            )
            data[at] = rng.choice([0, 1, 127, 255, rng.integers(256)])
        result = outcome(bytes(data), short_side=[None, 6][trial % 2])
        outcomes.add(type(result))
        if isinstance(result, np.ndarray):
            assert result.dtype == np.uint8
            assert result.shape[2:] == (3,)
    assert outcomes == {np.ndarray, ImageError}


# Files.


def test_read_bytes(tmp_path):
    data = encode(smooth(64, 80), "JPEG")
    path = tmp_path / "photo.png"
    path.write_bytes(data)
    assert read_bytes(path) == read_bytes(str(path)) == data


def test_what_cannot_be_read(tmp_path):
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    large = tmp_path / "large.bmp"
    with large.open("wb") as file:
        file.truncate(2**30)
    for path, reason in [
        (tmp_path / "missing.jpg", "cannot be read: No such file"),
        (tmp_path, "not a regular file"),
        (pipe, "not a regular file"),
        (large, "1,073,741,824 bytes"),
        ("a\0b", "cannot be read"),
    ]:
        with pytest.raises(ImageError, match=reason) as caught:
            read_bytes(path)
        assert caught.value.name == str(path)


# The whole.


def test_threads_give_the_same_bytes_and_touch_no_global_state():
    data = [*SEEDS.values(), encode(noise(200, 300), "JPEG"), b"", SEEDS["png"][:300], SEEDS["tiff"][:-50]]

    def fingerprint(item):
        result = outcome(item, short_side=20)
        return result.reason if isinstance(result, ImageError) else result.tobytes()

    filters = list(warnings.filters)
    alone = [fingerprint(item) for item in data]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(fingerprint, data * 20)) == alone * 20
    assert warnings.filters == filters


def test_import_does_not_load_jax():
    code = "import sys, jaxcls.data.images; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Other people's files.


def archive(shared, name):
    """(path in the archive, content) of every file."""
    with tarfile.open(shared / "data/images_odd" / name) as tar:
        for member in tar:
            if member.isfile():
                yield member.name.split("/", 1)[1], tar.extractfile(member).read()


def test_png_suite(shared):
    files = dict(archive(shared, "pngsuite.tar.gz"))
    pictures = {name[4:-4]: data for name, data in files.items() if re.fullmatch(r"png/.*\.png", name)}
    damaged = {name for name in pictures if name.startswith("x")}
    assert (len(pictures), len(damaged)) == (175, 14)
    for name, data in pictures.items():
        if name in damaged:
            refusal(data)
            continue
        pixels = decode(data)
        reference = np.array(json.loads(files[f"json/{name}.json"])).reshape(*pixels.shape[:2], 4)
        is_deep = name.endswith("16")
        rgb, alpha = np.split((reference >> 8 if is_deep else reference).astype(float), [3], axis=2)
        expected = rgb * (alpha / 255) + 255 * (1 - alpha / 255)
        # Exact but for the rounding of the blend.
        np.testing.assert_allclose(pixels, expected, atol=0.51, err_msg=name)


def test_exif_orientation_examples(shared):
    files = dict(archive(shared, "exif_orientation.tar.gz"))
    for kind, shape in (("Landscape", (1200, 1800, 3)), ("Portrait", (1800, 1200, 3))):
        upright = decode(files[f"{kind}_1.jpg"]).astype(int)
        assert upright.shape == shape
        for orientation in range(9):
            pixels = decode(files[f"{kind}_{orientation}.jpg"])
            assert pixels.shape == shape
            # The nine were compressed one by one, and each carries its number as a caption.
            assert np.abs(pixels - upright).mean() < 5
            small = decode(files[f"{kind}_{orientation}.jpg"], short_side=300)
            assert small.shape == (shape[0] // 2, shape[1] // 2, 3)


def test_damaged_jpegs(shared):
    """Decoded or refused, never anything else, and quickly."""
    files = list(archive(shared, "jpeg_corpus.tar.gz"))
    outcomes = [outcome(data) for _, data in files]
    errors = [result for result in outcomes if isinstance(result, ImageError)]
    assert len(outcomes) == 5250  # two are texts
    assert sum(error.reason.startswith("not an image") for error in errors) == 1023
    # A smaller picture is asked for in vain where the file cannot be scaled, but never costs the picture.
    lossless = [data for name, data in files if "/lossless/" in name]
    assert all(isinstance(outcome(data, short_side=4), type(outcome(data))) for data in lossless)
    assert len(lossless) == 210
    # 787 with Pillow 13.0 and libjpeg-turbo 3.2: how much damage is forgiven is theirs to say.
    assert 700 < len(outcomes) - len(errors) < 900

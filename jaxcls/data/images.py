"""Encoded image -> uint8 RGB [H, W, 3], whatever the file holds.

What becomes of each kind of pixel:

| in the file | in the array |
| --- | --- |
| grey | the same value in all three channels; 1-bit is 0 or 255 |
| palette | the palette's colours |
| transparency (alpha channel, palette alpha, one transparent colour) | laid over white |
| 16 bits per channel | the high byte |
| 32-bit integers (TIFF) | as 16-bit, clipped to [0, 65535] |
| floats (TIFF) | [0, 1] times 255, rounded and clipped; NaN is 0 |
| CMYK and YCCK (in JPEG inverted, as Adobe writes it) | (1 - C)(1 - K), (1 - M)(1 - K), (1 - Y)(1 - K) |
| several frames or pages | the first; of an animated PNG, the still picture |
| EXIF orientation | applied |
| colour profile, gamma | not applied |
| anything else (Lab, 12-bit JPEG, BigTIFF, ...) | `ImageError` |

Any number of threads may decode at once. `warnings.catch_warnings` acts on the
whole process, so Pillow's warnings are not silenced but avoided: its plugins get
files without the parts that they would warn about. Only libtiff, from C, may
still write a line on a damaged TIFF to the standard error stream.
"""

import re
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, TiffTags
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from jaxcls.errors import ImageError

SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
"""Lower-case file suffixes that count as images."""

MAX_FILE_BYTES = 512 * 2**20
"""`read_bytes` refuses larger files: 40 megapixels of uncompressed 16-bit RGBA are 320 MB."""

MAX_PIXELS = 40_000_000
"""Height times width above which an image is refused, unless the caller says otherwise."""

MAX_SIDE = 65535
"""Longest side, in pixels: JPEG's own limit."""

MAX_SCANS = 100
"""Passes over the picture in one JPEG. Cameras write 1, progressive encoders about 10."""


def read_bytes(path: str | Path) -> bytes:
    """The content of an image file, for `decode`.

    Raises:
        ImageError: it cannot be read, is no regular file, or exceeds `MAX_FILE_BYTES`.
    """
    name = str(path)
    try:
        # Looked at before it is opened: opening a named pipe would wait for its writer.
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(name, "not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise ImageError(name, f"{status.st_size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
        return Path(path).read_bytes()
    except OSError as error:
        raise ImageError(name, f"cannot be read: {error.strerror}") from error
    except ValueError as error:  # a null character in the path
        raise ImageError(name, f"cannot be read: {error}") from error


def encode(picture: Image.Image, format_: str) -> bytes:
    """A picture as a file: "JPEG" of quality 95, colours at full resolution (4:4:4), or "PNG", without loss.

    Colours at half the resolution, averaged once more, would be off by some levels.
    """
    file = BytesIO()
    options = {"quality": 95, "subsampling": "4:4:4"} if format_ == "JPEG" else {}
    picture.save(file, format_, **options)
    return file.getvalue()


def is_image(data: bytes) -> bool:
    """Whether `data` begins as one of `FORMATS` does; `decode` shows whether the rest is sound."""
    return _find_format(data) is not None


def format_name(data: bytes) -> str:
    """The one of `FORMATS` that `data` begins as.

    Raises:
        ImageError: it begins as none of them does.
    """
    return _require_format(data, "").name


@dataclass(frozen=True)
class Photo:
    """A photo before its pixels are decoded.

    Attributes:
        size: height and width, upright, at full scale.
        decode: `decode(short_side)`, to be called once: the pixels as RGB, upright, scaled as by the function
            `decode`.
    """

    size: tuple[int, int]
    decode: Callable[[int | None], Image.Image]


def open_photo(data: bytes, *, name: str = "", max_pixels: int = MAX_PIXELS) -> Photo:
    """Look at a JPEG, PNG, WebP, BMP, GIF or TIFF; its size may decide how many of its pixels are needed.

    Args:
        data: the encoded image; its content decides the format.
        name: path or record key, for the error.
        max_pixels: height times width above which an image is refused, before any pixel is decoded.
            `PIL.Image.MAX_IMAGE_PIXELS` is respected too.

    Raises:
        ImageError: for anything that is not a sound image within the limits; where that shows only as the
            pixels are decoded, from `Photo.decode`.
    """
    if not data:
        raise ImageError(name, "the file is empty")
    format_ = _require_format(data, name)
    limit = min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels)
    with _image_errors(name, format_):
        image = format_.plugin(BytesIO(format_.prepare(data, limit)))
        _check_size(*image.size, limit)
        if format_.name != "JPEG":  # others come in full, and may say how they are turned at their end
            image.load()
        exif = data if format_.name == "TIFF" else image.info.get("exif", b"")
        turn = _TURNS.get(_orientation(exif))
        width, height = image.size

    def decode(short_side: int | None) -> Image.Image:
        with _image_errors(name, format_), image:
            # A lossless JPEG has no quantisation table, and cannot be scaled.
            if short_side and getattr(image, "quantization", None):
                image.draft(None, (2 * short_side, 2 * short_side))
            image.load()
            return _to_rgb(image if turn is None else image.transpose(turn))

    return Photo((width, height) if turn in _SIDEWAYS else (height, width), decode)


def decode(
    data: bytes, *, name: str = "", short_side: int | None = None, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decode a JPEG, PNG, WebP, BMP, GIF or TIFF to RGB.

    Args:
        data, name, max_pixels: as in `open_photo`.
        short_side: pixels that the caller will resize the short side to. A JPEG is then decoded at 1/8, 1/4
            or 1/2, the smallest that leaves the short side at twice `short_side` or more, so that the
            resize still averages over enough pixels. Other formats, and smaller pictures, come in full.

    Returns:
        uint8 [H, W, 3], C-contiguous and writable.

    Raises:
        ImageError: for anything that is not a complete, sound image within the limits.
    """
    return np.array(open_photo(data, name=name, max_pixels=max_pixels).decode(short_side))


@contextmanager
def _image_errors(name: str, format_: "_Format") -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        raise ImageError(name, error.reason) from error.__cause__
    # On damaged files Pillow raises nearly every kind of exception.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ImageError(name, f"damaged or unsupported {format_.name}: {reason}") from error


def _check_size(width: int, height: int, limit: int) -> None:
    if max(width, height) > MAX_SIDE:
        raise ImageError("", f"{width} x {height} pixels; at most {MAX_SIDE:,} along a side are decoded")
    if width * height > limit:
        raise ImageError(
            "", f"{width} x {height} = {width * height:,} pixels; at most {limit:,} are decoded (max_pixels)"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        return _grey(np.rint(255 * np.clip(np.nan_to_num(np.asarray(image)), 0, 1)))
    if image.mode.startswith("I"):
        values = np.asarray(image)
        transparent = values == image.info.get("transparency", -1)
        return _grey(np.where(transparent, 255, np.clip(values, 0, 65535) >> 8))
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        image = Image.new("RGB", picture.size, "white")
        image.paste(picture, mask=picture)
    # Where nothing is to be converted, `convert` copies.
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what sets the picture upright."""
_SIDEWAYS = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)


# TIFF directories. EXIF data is a small TIFF; Pillow's own reader warns about every flaw.


class _Entry(NamedTuple):
    tag: int
    kind: int
    num_values: int
    value: bytes
    """The values where they fit into these four bytes, else their offset in the file."""


_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
_INTEGERS = {1: "B", 3: "H", 4: "L"}
_STRINGS = (1, 2, 7)
"""Kinds that Pillow reads as one value however long they are."""
_KIND_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_PIXEL_TAGS = frozenset(
    [256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 338, 339,
     347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 532]
)  # fmt: skip
"""What decoding depends on. Resolution, comments, EXIF, further pages and the like are left out."""
_ORIENTATION, _SAMPLES_PER_PIXEL, _TILE_WIDTH, _TILE_LENGTH = 274, 277, 322, 323


def _read_directory(tiff: bytes) -> tuple[str, int, Iterator[_Entry]]:
    """The byte order, the offset of the first directory, and its entries."""
    order = _ORDERS[tiff[:4]]
    (start,) = struct.unpack_from(order + "L", tiff, 4)
    (num_entries,) = struct.unpack_from(order + "H", tiff, start)
    offsets = range(start + 2, start + 2 + 12 * num_entries, 12)
    return order, start, (_Entry(*struct.unpack_from(order + "HHL4s", tiff, at)) for at in offsets)


def _integer(order: str, entry: _Entry) -> int:
    return struct.unpack_from(order + _INTEGERS[entry.kind], entry.value)[0]


def _orientation(exif: bytes) -> int:
    try:
        order, _, entries = _read_directory(exif.removeprefix(b"Exif\0\0"))
        return next((_integer(order, entry) for entry in entries if entry.tag == _ORIENTATION), 1)
    except (KeyError, struct.error):  # damaged metadata does not make the picture unusable
        return 1


# What each plugin is given: `prepare(data, limit) -> data`.


def _prepare_tiff(data: bytes, limit: int) -> bytes:
    """Keep of the first directory the tags that make pixels, and nothing after it."""
    order, start, entries = _read_directory(data)
    kept = [entry for entry in entries if entry.tag in _PIXEL_TAGS]
    sizes = [entry.num_values * _KIND_BYTES.get(entry.kind, len(data) + 1) for entry in kept]
    for entry, size in zip(kept, sizes, strict=True):
        outside = size > 4 and struct.unpack(order + "L", entry.value)[0] + size > len(data)
        surplus = TiffTags.lookup(entry.tag).length == 1 and entry.num_values != 1
        if outside or (surplus and entry.kind not in _STRINGS):
            raise ImageError("", f"damaged TIFF: impossible value of tag {entry.tag}")
    is_repeated = len({entry.tag for entry in kept}) < len(kept)
    if start < 8 or sum(sizes) > len(data) or is_repeated:
        raise ImageError("", "damaged TIFF: its directory overlaps or repeats itself")
    numbers = {entry.tag: _integer(order, entry) for entry in kept if entry.kind in _INTEGERS}
    if numbers.get(_SAMPLES_PER_PIXEL, 1) > 6:
        raise ImageError("", f"unsupported TIFF: {numbers[_SAMPLES_PER_PIXEL]} channels")
    # A tile is held in memory whole, and may be larger than the picture.
    _check_size(numbers.get(_TILE_WIDTH, 1), numbers.get(_TILE_LENGTH, 1), max(limit, _TILE_PIXELS))
    body = b"".join(struct.pack(order + "HHL4s", *entry) for entry in kept)
    directory = struct.pack(order + "H", len(kept)) + body + bytes(4)
    return data[:start] + directory + data[start + len(directory) :]


_TILE_PIXELS = 2**22


def _prepare_jpeg(data: bytes, limit: int) -> bytes:
    """Refuse a JPEG of so many scans that a small file takes minutes."""
    num_scans, at = 0, 2
    while marker := _JPEG_SEGMENT.search(data, at):
        if marker[0] == b"\xff\xd9":  # end of the picture; a second one or a video may follow
            break
        num_scans += marker[0] == b"\xff\xda"
        if num_scans > MAX_SCANS:
            raise ImageError("", f"JPEG of more than {MAX_SCANS} scans")
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
    return data


# 0xff00 is a 0xff among the coded pixels, 0xffd0 to 0xffd7 are restarts.
_JPEG_SEGMENT = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")


def _prepare_png(data: bytes, limit: int) -> bytes:
    """Keep the chunks that make pixels and the EXIF data; check every checksum: Pillow skips the pixels'."""
    chunks, start, kind = [data[:8]], 8, b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">L4s", data, start)
        chunk = data[start : start + 12 + length]
        start += 12 + length
        if start > len(data):
            raise ImageError("", "damaged PNG: the file is cut short")
        is_ancillary = kind[0] & 0x20
        if is_ancillary and kind not in (b"tRNS", b"eXIf"):
            continue
        if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:]):
            raise ImageError("", f"damaged PNG: wrong checksum in {kind!r}")
        chunks.append(_scale_transparent_colour(chunk, *data[24:26]) if kind == b"tRNS" else chunk)
    return b"".join(chunks)


def _scale_transparent_colour(chunk: bytes, depth: int, colour_type: int) -> bytes:
    """Put the transparent colour on the 8-bit scale of the pixels, which is all that Pillow scales."""
    values: np.ndarray = np.frombuffer(chunk[8:-4], np.uint8)
    if (colour_type, depth) in ((_PNG_GREY, 2), (_PNG_GREY, 4)):
        values = values.view(">u2") * (255 // (2**depth - 1))
    elif (colour_type, depth) == (_PNG_RGB, 16):
        values = values.view(">u2") >> 8
    else:
        return chunk
    body = b"tRNS" + values.astype(">u2").tobytes()
    return chunk[:4] + body + zlib.crc32(body).to_bytes(4)


_PNG_GREY, _PNG_RGB = 0, 2


def _prepare_gif(data: bytes, limit: int) -> bytes:
    """Keep the palette, the first frame and its transparency; a frame may be larger than the screen."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    screen = data[: 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)]
    control, at = b"", len(screen)
    # Bytes that mean nothing may stand between, and decoders pass over them.
    while (mark := _GIF_MARK.search(data, at)) and mark[0] == b"!":
        at = mark.start()
        if data[at + 1 : at + 3] == b"\xf9\x04":
            control = data[at : at + 7] + b"\0"
        at += 2
        while num_bytes := data[at]:
            at += 1 + num_bytes
        at += 1
    if mark is None or mark[0] == b";":
        raise ImageError("", "damaged GIF: it holds no picture")
    at = mark.start()
    left, top, frame_width, frame_height = struct.unpack_from("<4H", data, at + 1)
    _check_size(max(width, left + frame_width), max(height, top + frame_height), limit)
    return screen + control + data[at:]


_GIF_MARK = re.compile(rb"[!,;]")
"""Of an extension, a picture, and the end."""


def _prepare_webp(data: bytes, limit: int) -> bytes:
    """Check the size: libwebp makes room for the pixels as soon as a file is opened."""
    chunk = data[12:16]
    if chunk == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    elif chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    _check_size(width, height, limit)
    return data


class _JpegFile(JpegImageFile):
    """Pillow looks for the resolution in the EXIF data, and warns where that is damaged."""

    def getexif(self) -> Image.Exif:
        return Image.Exif()


@dataclass(frozen=True)
class _Format:
    name: str
    magic: re.Pattern[bytes]
    prepare: Callable[[bytes, int], bytes]
    plugin: type[ImageFile]


_FORMATS = (
    _Format("JPEG", re.compile(rb"\xff\xd8\xff"), _prepare_jpeg, _JpegFile),
    _Format("PNG", re.compile(rb"\x89PNG\r\n\x1a\n"), _prepare_png, PngImageFile),
    _Format("WebP", re.compile(rb"RIFF.{4}WEBP", re.DOTALL), _prepare_webp, WebPImageFile),
    _Format("BMP", re.compile(rb"BM"), lambda data, limit: data, BmpImageFile),
    _Format("GIF", re.compile(rb"GIF8[79]a"), _prepare_gif, GifImageFile),
    _Format("TIFF", re.compile(rb"II\*\0|MM\0\*"), _prepare_tiff, TiffImageFile),
)


def _find_format(data: bytes) -> _Format | None:
    return next((format_ for format_ in _FORMATS if format_.magic.match(data)), None)


def _require_format(data: bytes, name: str) -> _Format:
    format_ = _find_format(data)
    if format_ is None:
        raise ImageError(name, f"not an image in a known format ({', '.join(FORMATS)})")
    return format_


FORMATS = tuple(format_.name for format_ in _FORMATS)
"""The formats tried, recognised by content and not by suffix."""

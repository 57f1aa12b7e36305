"""Small pictures of photos, as many and as good as a number of bytes allows."""

import base64
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

from jaxcls.data.dataset import Dataset
from jaxcls.errors import ImageError
from jaxcls.progress import show_progress

TYPE = "image/webp"
SIZES = ((384, 80), (320, 78), (256, 75), (192, 72), (144, 68), (112, 64), (88, 60), (64, 50))
"""The longer side in pixels, and WebP's quality: the first that fits is taken."""
NUM_SAMPLED = 24
"""Photos from which the size is told."""
CHUNK = 256
"""Photos encoded at a time, by all cores."""


@dataclass(frozen=True)
class Thumbnails:
    """Pictures of N photos in base64.

    Attributes:
        side: of the longer side, at most, in pixels.
        encoded: N texts; None for a photo that cannot be read or found no room.
        num_left_out: of those that found none.
    """

    side: int
    encoded: tuple[str | None, ...]
    num_left_out: int

    @property
    def num_embedded(self) -> int:
        """How many there are."""
        return sum(text is not None for text in self.encoded)


def make_thumbnails(dataset: Dataset, order: Sequence[int], max_bytes: int) -> Thumbnails:
    """Thumbnails that take `max_bytes` at most, those of the photos that come first in `order` if not of all.

    Args:
        dataset: N photos.
        order: positions of those that can be read.
        max_bytes: of all base64 texts with their quotes and commas.
    """
    side, quality = _choose_size(dataset, order, max_bytes)
    encoded: list[str | None] = [None] * len(dataset)
    left, num_tried = max_bytes - len("null,") * len(dataset), 0
    for index, text in show_progress(_encode_all(dataset, order, side, quality), "thumbnails", len(order)):
        if left < (needed := _num_bytes(text)):
            break
        encoded[index] = text
        left -= needed
        num_tried += 1
    return Thumbnails(side, tuple(encoded), len(order) - num_tried)


def encode(dataset: Dataset, index: int, side: int, quality: int) -> bytes:
    """Photo `index` as WebP, its longer side `side` pixels at most.

    Raises:
        ImageError: it cannot be read.
    """
    image = dataset.photo(index).decode(side)
    image.thumbnail((side, side), Image.Resampling.BILINEAR)
    file = BytesIO()
    image.save(file, "WEBP", quality=quality)
    return file.getvalue()


def _choose_size(dataset: Dataset, order: Sequence[int], max_bytes: int) -> tuple[int, int]:
    sampled = order[:: max(1, len(order) // NUM_SAMPLED)]
    for side, quality in SIZES:
        texts = [text for _, text in _encode_all(dataset, sampled, side, quality)]
        if sum(map(_num_bytes, texts)) * len(order) * 1.1 <= max_bytes * max(1, len(sampled)):
            return side, quality
    return SIZES[-1]


def _encode_all(
    dataset: Dataset, order: Sequence[int], side: int, quality: int
) -> Iterator[tuple[int, str | None]]:
    """Positions and texts, a chunk at a time: whoever stops early leaves the rest undone."""

    def text(index: int) -> str | None:
        try:
            return base64.b64encode(encode(dataset, index, side, quality)).decode()
        except ImageError:
            return None

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(order), CHUNK):
            chunk = order[start : start + CHUNK]
            yield from zip(chunk, pool.map(text, chunk), strict=True)


def _num_bytes(text: str | None) -> int:
    return 0 if text is None else len(text) + len('"",')

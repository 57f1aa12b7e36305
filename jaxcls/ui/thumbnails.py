"""Small pictures of photos, as many and as good as a number of bytes allows."""

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

from jaxcls.data.dataset import Dataset
from jaxcls.errors import ImageError
from jaxcls.progress import map_threads

TYPE = "image/webp"
SIZES = ((384, 80), (320, 78), (256, 75), (192, 72), (144, 68), (112, 64), (88, 60), (64, 50))
"""The longer side in pixels, and WebP's quality: the first that fits is taken."""
NUM_SAMPLED, MARGIN = 64, 1.2
"""Photos from which the size of all is told, and by how much the others may exceed them."""


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
    for side, quality in SIZES[:-1]:
        if _seem_to_fit(dataset, order, max_bytes, side, quality):
            thumbnails = _fill(dataset, order, max_bytes, side, quality)
            if not thumbnails.num_left_out:
                return thumbnails
    return _fill(dataset, order, max_bytes, *SIZES[-1])


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


def _seem_to_fit(dataset: Dataset, order: Sequence[int], max_bytes: int, side: int, quality: int) -> bool:
    sampled = order[:: max(1, len(order) // NUM_SAMPLED)]
    num_bytes = sum(map(_num_bytes, _encode_all(dataset, sampled, side, quality)))
    return num_bytes * len(order) * MARGIN <= max_bytes * len(sampled)


def _fill(dataset: Dataset, order: Sequence[int], max_bytes: int, side: int, quality: int) -> Thumbnails:
    encoded: list[str | None] = [None] * len(dataset)
    left, num_tried = max_bytes - len("null,") * len(dataset), 0
    # Left early, the iterator leaves the rest undone.
    for index, text in zip(order, _encode_all(dataset, order, side, quality, "thumbnails"), strict=False):
        if left < (needed := _num_bytes(text)):
            break
        encoded[index] = text
        left -= needed
        num_tried += 1
    return Thumbnails(side, tuple(encoded), len(order) - num_tried)


def _encode_all(
    dataset: Dataset, order: Sequence[int], side: int, quality: int, description: str | None = None
) -> Iterator[str | None]:
    def text(place: int) -> str | None:
        try:
            return base64.b64encode(encode(dataset, order[place], side, quality)).decode()
        except ImageError:
            return None

    return map_threads(text, len(order), description)


def _num_bytes(text: str | None) -> int:
    return 0 if text is None else len(text) + len('"",')

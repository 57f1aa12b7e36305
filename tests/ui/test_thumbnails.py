"""Thumbnails against the budget that they are given."""

import base64
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from conftest import draw
from examples import make_photos
from PIL import Image

from jaxcls.data.source import MemorySource
from jaxcls.errors import ImageError
from jaxcls.ui.thumbnails import SIZES, encode, make_thumbnails


def decoded(text: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(text)))


def with_large_photos(num_images: int):
    return replace(
        make_photos(num_images),
        source=MemorySource([np.asarray(draw(i, (500, 300))) for i in range(num_images)]),
    )


def num_bytes(thumbnails) -> int:
    return sum(len("null,") if text is None else len(f'"{text}",') for text in thumbnails.encoded)


def test_with_room_they_are_large_and_show_the_photo():
    photos = with_large_photos(3)
    thumbnails = make_thumbnails(photos, [0, 1, 2], 10**6)
    assert (thumbnails.side, thumbnails.num_embedded, thumbnails.num_left_out) == (SIZES[0][0], 3, 0)
    image = decoded(thumbnails.encoded[1])
    assert (image.format, image.size) == ("WEBP", (384, 230))
    original = Image.fromarray(photos.image(1)).resize(image.size)
    assert np.abs(np.asarray(image, float) - np.asarray(original, float)).mean() < 6


def test_they_shrink_until_they_fit():
    photos = with_large_photos(6)
    sides = []
    for room in (10**6, 40_000, 12_000):
        thumbnails = make_thumbnails(photos, range(6), room)
        assert num_bytes(thumbnails) <= room
        assert thumbnails.num_embedded == 6
        sides.append(thumbnails.side)
    assert sides[0] > sides[1] > sides[2]


@pytest.mark.parametrize("room", [0, 100, 3_000])
def test_beyond_that_the_first_in_order_are_embedded(room):
    photos = with_large_photos(6)
    order = [4, 2, 0, 1, 3, 5]
    thumbnails = make_thumbnails(photos, order, room)
    assert thumbnails.side == SIZES[-1][0]
    assert num_bytes(thumbnails) <= max(room, len("null,") * 6)
    kept = [i for i in order if thumbnails.encoded[i] is not None]
    assert kept == order[: len(kept)]
    assert len(kept) < 6
    assert (len(kept) > 0) == (room == 3_000)
    assert thumbnails.num_left_out == 6 - len(kept)


def test_a_photo_that_turns_out_unreadable_has_none():
    photos = make_photos(3)
    photos = replace(photos, source=MemorySource([photos.source[0], b"no photo", photos.source[2]]))
    thumbnails = make_thumbnails(photos, [0, 1, 2], 10**6)
    assert [text is None for text in thumbnails.encoded] == [False, True, False]
    assert thumbnails.num_left_out == 0
    with pytest.raises(ImageError, match="known format"):
        encode(photos, 1, 64, 50)


def test_no_photo_needs_no_room():
    assert make_thumbnails(make_photos(2), [], 100).encoded == (None, None)


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (20, 10)])
def test_odd_shapes(size):
    photo = np.zeros((size[1], size[0], 3), np.uint8)
    photos = replace(make_photos(1), source=MemorySource([photo]))
    image = decoded(make_thumbnails(photos, [0], 10**6).encoded[0])
    assert max(image.size) == min(384, max(size))

"""Similarities of drawn pictures and their copies, next to those of other pictures."""

import io

import numpy as np
import pytest
from conftest import draw
from PIL import Image, ImageEnhance, ImageFilter

from jaxcls.data.alignment import outlines, similarity, thumbnail


def compare(first, second):
    first, second = thumbnail(first)[None], thumbnail(second)[None]
    forward, backward = similarity(first, second), similarity(second, first)
    assert (forward.shape, forward.dtype) == ((1,), np.float32)
    assert forward[0] == pytest.approx(backward[0], abs=0.03)
    return forward[0]


def recompress(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def crop(image, left, top, right, bottom):
    """Without these shares of its sides."""
    width, height = image.size
    return image.crop(
        (int(left * width), int(top * height), int((1 - right) * width), int((1 - bottom) * height))
    )


COPIES = {
    "itself": lambda image: image,
    "half as large": lambda image: image.resize((80, 60)),
    "twice as large": lambda image: image.resize((320, 240)),
    "square": lambda image: image.resize((120, 120)),
    "recompressed": lambda image: recompress(image, 30),
    "cropped at one edge": lambda image: crop(image, 0.08, 0, 0, 0),
    "cropped at a corner": lambda image: crop(image, 0.08, 0.06, 0, 0),
    "cropped all around": lambda image: crop(image, 0.08, 0.08, 0.08, 0.08),
    "brightened": lambda image: ImageEnhance.Brightness(image).enhance(1.5),
    "darkened": lambda image: ImageEnhance.Brightness(image).enhance(0.6),
    "with more contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.5),
}


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("seed", range(3))
def test_copies_are_similar(kind, seed):
    assert compare(draw(seed), COPIES[kind](draw(seed))) > 0.93


@pytest.mark.parametrize("seed", range(5))
def test_other_pictures_are_not(seed):
    assert compare(draw(seed), draw(seed + 100)) < 0.5


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        lambda image: image.rotate(90),
        lambda image: crop(image, 0.4, 0, 0, 0),
        lambda image: Image.fromarray(np.asarray(image)[..., ::-1].copy()),
        lambda image: Image.blend(image, draw(50), 0.5),
    ],
    ids=["mirrored", "turned", "a part", "red and blue exchanged", "two pictures in one"],
)
def test_what_is_no_copy_is_not_similar(change):
    assert compare(draw(0), change(draw(0))) < 0.9


def test_plain_pictures_are_similar_to_none():
    noise = np.random.default_rng(0).integers(126, 129, (2, 60, 60, 3), np.uint8)
    plain = [
        Image.new("RGB", (60, 60), "white"),
        Image.new("RGB", (60, 60), "navy"),
        *map(Image.fromarray, noise),
    ]
    for first in plain:
        for second in plain:
            assert compare(first, second) < 0.5 or first is second
    assert compare(plain[0], plain[0]) == compare(plain[0], plain[1]) == 0


def test_a_zoomed_outline_is_that_of_the_middle():
    image = draw(1, (480, 480)).filter(ImageFilter.GaussianBlur(12))
    middle = image.crop((40, 40, 440, 440))
    (zoomed,), (expected,) = (
        outlines(thumbnail(image)[None], zoom=1.2), outlines(thumbnail(middle)[None])
    )  # fmt: skip
    assert expected.std() > 0.3
    np.testing.assert_allclose(zoomed[3:-3, 3:-3], expected[3:-3, 3:-3], atol=0.25)
    assert abs(outlines(thumbnail(image)[None])[0] - expected)[3:-3, 3:-3].max() > 0.5


def test_many_pairs_are_as_each_alone():
    thumbnails = np.stack([thumbnail(draw(seed)) for seed in range(4)])
    other = np.stack([thumbnail(crop(draw(seed), 0.05, 0, 0, 0.05)) for seed in (0, 5, 2, 3)])
    alone = [similarity(a[None], b[None])[0] for a, b in zip(thumbnails, other, strict=True)]
    np.testing.assert_allclose(similarity(thumbnails, other), alone, atol=1e-3)
    assert similarity(thumbnails[:0], other[:0]).shape == (0,)

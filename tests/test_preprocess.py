"""Preprocess against torchvision's size rule worked by Pillow alone, and hand-worked pixels."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxcls.errors import UsageError
from jaxcls.preprocess import Preprocess


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def assert_within_one_level(view, expected):
    """Pillow rounds between its two passes, whose order depends on the shapes."""
    assert view.shape == expected.shape
    assert np.abs(view.astype(int) - expected).max() <= 1


def resize_then_center_crop(image, resize, crop, resample):
    """torchvision's `Resize(resize)` and `CenterCrop(crop)`, by Pillow."""
    height, width = image.shape[:2]
    if width <= height:
        new_width, new_height = resize, int(resize * height / width)
    else:
        new_width, new_height = int(resize * width / height), resize
    resized = Image.fromarray(image).resize((new_width, new_height), resample)
    top = round((new_height - crop) / 2.0)
    left = round((new_width - crop) / 2.0)
    return np.asarray(resized.crop((left, top, left + crop, top + crop)))


@pytest.mark.parametrize(
    ("height", "width"),
    [(64, 64), (97, 61), (61, 97), (33, 200), (200, 33), (480, 640), (1, 1), (3, 2), (1, 50), (639, 10)],
)
@pytest.mark.parametrize(
    ("size", "crop_fraction", "short_side"), [(32, 0.875, 36), (33, 0.875, 37), (31, 0.9, 34), (24, 1.0, 24)]
)
def test_the_evaluation_view_is_torchvisions(height, width, size, crop_fraction, short_side):
    preprocess = Preprocess(size=size, crop_fraction=crop_fraction)
    assert preprocess.short_side == short_side
    image = noise(height, width)
    view = preprocess.resize_and_crop(image)
    assert view.dtype == np.uint8
    assert view.flags.c_contiguous
    expected = resize_then_center_crop(image, short_side, size, Image.Resampling.BILINEAR)
    assert_within_one_level(view, expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_interpolations_are_pillows(interpolation):
    view = Preprocess(size=28, interpolation=interpolation).resize_and_crop(noise(90, 70))
    expected = resize_then_center_crop(noise(90, 70), 32, 28, Image.Resampling[interpolation.upper()])
    assert_within_one_level(view, expected)


def test_the_usual_sizes():
    assert Preprocess().short_side == 256
    assert Preprocess(size=500).short_side == 571
    assert Preprocess(size=224, crop_fraction=0.95).short_side == 235


@pytest.mark.parametrize("shape", [(1, 65535), (65535, 1)])
def test_of_a_strip_only_the_centre_is_resized(shape):
    """Resized whole it would take gigabytes."""
    image = np.zeros((*shape, 3), np.uint8)
    image.reshape(-1, 3)[32766:32769] = 200
    start = time.thread_time()
    view = Preprocess(size=28).resize_and_crop(image)
    assert time.thread_time() - start < 0.5
    np.testing.assert_array_equal(view, np.full((28, 28, 3), 200, np.uint8))


@pytest.mark.parametrize(
    "view",
    [Preprocess(size=28).resize_and_crop, lambda p: Preprocess(size=28).crop_box(p, (3.5, 2, 61, 50.2))],
)
def test_arrays_and_pillows_pictures_give_the_same(view):
    image = noise(70, 90)
    np.testing.assert_array_equal(view(Image.fromarray(image)), view(image), strict=True)


def test_crop_box_takes_that_part_alone():
    image = noise(20, 30)
    np.testing.assert_array_equal(
        Preprocess(size=6).crop_box(image, (10, 4, 16, 10)), image[4:10, 10:16], strict=True
    )


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_normalize_gives_hand_worked_values(convert):
    preprocess = Preprocess(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    images = np.zeros((2, 1, 2, 3), np.uint8)
    images[0, 0, 0] = [255, 255, 255]
    images[1, 0, 1] = [51, 102, 153]
    pixels = preprocess.normalize(convert(images))
    assert pixels.dtype == np.float32
    assert pixels.shape == (2, 1, 2, 3)
    expected = np.full((2, 1, 2, 3), [-1, -1, 0], np.float32)
    expected[0, 0, 0] = [1, 3, 0.5]
    expected[1, 0, 1] = [-0.6, 0.6, 0.3]
    np.testing.assert_allclose(pixels, expected, rtol=1e-6, atol=1e-7)


def test_normalize_is_the_same_in_numpy_and_jitted_and_as_torchvision_has_it():
    images = noise(8, 8)[None]
    pixels = Preprocess().normalize(images)
    np.testing.assert_allclose(jax.jit(Preprocess().normalize)(images), pixels, atol=1e-6)
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    np.testing.assert_allclose(pixels, ((tensor - mean) / std).permute(0, 2, 3, 1).numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, "image size 0"),
        ({"crop_fraction": 0}, r"crop_fraction 0: must lie in \(0, 1\]"),
        ({"crop_fraction": 1.01}, "crop_fraction 1.01"),
        ({"crop_fraction": float("nan")}, "crop_fraction nan"),
        ({"interpolation": "nearest"}, "'nearest': choose one of bilinear, bicubic, lanczos"),
        ({"mean": (0.5,)}, "three values each"),
        ({"std": (0.1, 0.2)}, "three values each"),
        ({"std": (0.1, 0.0, 0.2)}, "std above 0"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(UsageError, match=message):
        Preprocess(**values)


def test_json_brings_it_back():
    preprocess = Preprocess(size=96, crop_fraction=0.9, interpolation="bicubic", mean=(0.1, 0.2, 0.3))
    restored = Preprocess.from_json(json.loads(json.dumps(preprocess.to_json())))
    assert restored == preprocess
    assert hash(restored) == hash(preprocess)
    assert preprocess.to_json()["size"] == 96

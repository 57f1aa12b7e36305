"""Host augmentation: boxes by their definition, colours against Pillow and hand-worked pixels."""

import math

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from jaxcls.augment.host import Augmentation, adjust_colour, draw_crop_box, random_view
from jaxcls.errors import UsageError
from jaxcls.preprocess import Preprocess


def noise(height, width, seed=0, low=0, high=256):
    return np.random.default_rng(seed).integers(low, high, (height, width, 3), np.uint8)


def test_the_default_is_the_evaluation_view():
    image, preprocess = noise(50, 40), Preprocess(size=16)
    view = random_view(image, preprocess, Augmentation(), np.random.default_rng(0))
    np.testing.assert_array_equal(view, preprocess.resize_and_crop(image))


@pytest.mark.parametrize("augmentation", [Augmentation(flip=True), Augmentation(True, 0.2, 0.4)])
def test_a_view_is_a_function_of_its_generator(augmentation):
    image, preprocess = noise(50, 40), Preprocess(size=16)
    views = [random_view(image, preprocess, augmentation, np.random.default_rng(s)) for s in (*range(8), 0)]
    np.testing.assert_array_equal(views[0], views[-1], strict=True)
    assert len({view.tobytes() for view in views}) == (2 if augmentation.min_crop_area == 1 else 8)
    assert all(view.shape == (16, 16, 3) and view.dtype == np.uint8 for view in views)


def test_half_of_the_views_are_mirrored_exactly():
    image, preprocess = noise(16, 16), Preprocess(size=16, crop_fraction=1.0)
    generator = np.random.default_rng(1)
    num_flipped = 0
    for _ in range(1000):
        view = random_view(image, preprocess, Augmentation(flip=True), generator)
        is_flipped = bool((view == image[:, ::-1]).all())
        assert is_flipped or (view == image).all()
        assert view.flags.c_contiguous
        num_flipped += is_flipped
    assert abs(num_flipped - 500) < 4 * math.sqrt(250)  # four standard deviations


def test_crop_and_flip_see_the_drawn_box():
    """A photo that tells its coordinates shows where the view came from."""
    image = np.zeros((200, 256, 3), np.uint8)
    image[..., 0] = np.arange(256)
    image[..., 1] = np.arange(200)[:, None]
    for seed in range(20):
        left, top, right, bottom = draw_crop_box(np.random.default_rng(seed), 200, 256, 0.1)
        view = random_view(
            image, Preprocess(size=8), Augmentation(min_crop_area=0.1), np.random.default_rng(seed)
        )
        # The centre of a linear ramp's resize is the centre of its box (pixel centres lie at one half).
        assert view[..., 0].mean() == pytest.approx((left + right - 1) / 2, abs=1)
        assert view[..., 1].mean() == pytest.approx((top + bottom - 1) / 2, abs=1)
        assert view[:, -2, 0].mean() - view[:, 1, 0].mean() == pytest.approx((right - left) * 5 / 8, abs=2)


@pytest.mark.parametrize(
    ("height", "width"), [(224, 224), (480, 640), (640, 480), (1, 1), (1, 1000), (1000, 1), (3, 5)]
)
@pytest.mark.parametrize("min_area", [0.08, 0.5, 0.999])
def test_boxes_lie_inside_and_keep_to_their_limits(height, width, min_area):
    generator = np.random.default_rng(2)
    image_ratio = width / height
    for _ in range(300):
        left, top, right, bottom = draw_crop_box(generator, height, width, min_area)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        area = (right - left) * (bottom - top) / (height * width)
        assert min_area - 1e-9 <= area <= 1 + 1e-9
        ratio = (right - left) / (bottom - top)
        # Where the area does not fit at 3/4 to 4/3 the box fills a whole side.
        fills_a_side = math.isclose(right - left, width) or math.isclose(bottom - top, height)
        assert 3 / 4 - 1e-9 <= ratio <= 4 / 3 + 1e-9 or (
            fills_a_side and min(image_ratio, 3 / 4) - 1e-9 <= ratio <= max(image_ratio, 4 / 3) + 1e-9
        )


def test_areas_ratios_and_places_are_spread_evenly():
    generator = np.random.default_rng(3)
    boxes = np.asarray([draw_crop_box(generator, 1000, 1000, 0.1) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    area = (right - left) * (bottom - top) / 1e6
    assert area.mean() == pytest.approx(0.55, abs=0.02)
    assert np.quantile(area, [0.25, 0.75]) == pytest.approx([0.325, 0.775], abs=0.03)
    left, top, right, bottom = boxes[area < 0.7].T  # so small that every ratio fits
    ratio = np.log((right - left) / (bottom - top))
    assert ratio.mean() == pytest.approx(0, abs=0.02)
    assert ratio.std() == pytest.approx(2 * math.log(4 / 3) / math.sqrt(12), rel=0.05)
    assert (left / (1000 - (right - left))).mean() == pytest.approx(0.5, abs=0.02)
    assert (top / (1000 - (bottom - top))).mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("shape", [(1, 1), (1, 1000), (1000, 1), (2, 3)])
def test_tiny_and_narrow_photos_give_views(shape):
    augmentation = Augmentation(flip=True, min_crop_area=0.05, colour_jitter=0.3)
    for seed in range(20):
        view = random_view(noise(*shape), Preprocess(size=8), augmentation, np.random.default_rng(seed))
        assert view.shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("factors", "pixels"),
    [
        # Luma 0.299 R + 0.587 G + 0.114 B of (100, 100, 100) and (200, 0, 100): 100 and 71.2, mean 85.6.
        ((1.0, 1.0, 1.0), [[100, 100, 100], [200, 0, 100]]),
        ((0.5, 1.0, 1.0), [[50, 50, 50], [100, 0, 50]]),
        ((1.5, 1.0, 1.0), [[150, 150, 150], [255, 0, 150]]),
        ((1.0, 0.5, 1.0), [[93, 93, 93], [143, 43, 93]]),  # 92.8, 142.8, 42.8
        ((1.0, 1.0, 0.5), [[100, 100, 100], [136, 36, 86]]),  # 135.6, 35.6, 85.6
        ((1.0, 1.0, 0.0), [[100, 100, 100], [71, 71, 71]]),
        # In this order: (50, 50, 50), (100, 0, 50), mean 42.8; 1.2: 51.44, (111.44, -8.56, 51.44),
        # luma 34.16; 1.1: 51.44, (119.168, -12.832, 53.168).
        ((0.5, 1.2, 1.1), [[51, 51, 51], [119, 0, 53]]),
    ],
)
def test_colours_are_hand_worked(factors, pixels):
    image = np.asarray([[[100, 100, 100], [200, 0, 100]]], np.uint8)
    adjusted = adjust_colour(image, *factors)
    np.testing.assert_array_equal(adjusted, np.asarray([pixels], np.uint8), strict=True)


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.1, 1.4])
@pytest.mark.parametrize(
    ("enhance", "position"),
    [(ImageEnhance.Brightness, 0), (ImageEnhance.Contrast, 1), (ImageEnhance.Color, 2)],
)
def test_colours_are_pillows_within_its_rounding(factor, enhance, position):
    image = noise(30, 40, low=20)
    factors = [1.0, 1.0, 1.0]
    factors[position] = factor
    expected = np.asarray(enhance(Image.fromarray(image)).enhance(factor))
    difference = adjust_colour(image, *factors).astype(int) - expected
    assert np.abs(difference).max() <= 1


def test_factors_of_one_change_no_pixel():
    image = noise(100, 100)
    np.testing.assert_array_equal(adjust_colour(image, 1.0, 1.0, 1.0), image)


def test_colour_factors_stay_within_their_range():
    """On a grey photo only brightness acts, and the view shows its factor."""
    grey = np.full((8, 8, 3), 100, np.uint8)
    generator = np.random.default_rng(4)
    augmentation = Augmentation(colour_jitter=0.3)
    values = [random_view(grey, Preprocess(size=8), augmentation, generator)[0, 0, 0] for _ in range(500)]
    assert 70 <= min(values) < 73
    assert 127 < max(values) <= 130
    assert np.mean(values) == pytest.approx(100, abs=3)


def test_short_side_leaves_the_smallest_crop_as_many_pixels_as_the_network_sees():
    assert Augmentation().short_side(Preprocess()) == 256
    assert Augmentation(min_crop_area=0.25).short_side(Preprocess()) == 448
    assert Augmentation(min_crop_area=0.9).short_side(Preprocess()) == 256
    assert Augmentation(min_crop_area=0.08).short_side(Preprocess()) == 792  # 224 / sqrt(0.08) = 791.96
    for min_area in np.linspace(0.01, 1, 50):
        side = Augmentation(min_crop_area=min_area).short_side(Preprocess(size=100))
        assert min_area * side**2 >= 100**2 - 1e-6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_crop_area": 0.0}, r"min_crop_area 0.0: must lie in \(0, 1\]"),
        ({"min_crop_area": 1.1}, "min_crop_area 1.1"),
        ({"colour_jitter": -0.1}, r"colour_jitter -0.1: must lie in \[0, 1\)"),
        ({"colour_jitter": 1.0}, "colour_jitter 1.0"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(UsageError, match=message):
        Augmentation(**values)

"""Host augmentation: boxes by their definition, colours against Pillow and hand-worked pixels."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from jaxcls.augment.host import Augmentation, Views, adjust_colour, cut_view, draw_boxes, draw_views
from jaxcls.errors import UsageError
from jaxcls.preprocess import Preprocess

STRONG = Augmentation(True, 0.2, 0.4)


def noise(height, width, seed=0, low=0, high=256):
    return np.random.default_rng(seed).integers(low, high, (height, width, 3), np.uint8)


def cut_one(image, augmentation, position=0, size=16, seed=0):
    views = draw_views(seed, position, np.asarray([image.shape[:2]]), augmentation)
    return cut_view(image, Preprocess(size=size), views)


def draw_sizes(num_photos, low=1, high=700):
    return np.random.default_rng(0).integers(low, high, (num_photos, 2))


def test_the_default_is_the_evaluation_view():
    image = noise(50, 40)
    np.testing.assert_array_equal(
        cut_one(image, Augmentation()), Preprocess(size=16).resize_and_crop(image), strict=True
    )


@pytest.mark.parametrize("augmentation", [Augmentation(flip=True), STRONG])
def test_a_view_is_a_function_of_seed_and_position(augmentation):
    image = noise(50, 40)
    views = [cut_one(image, augmentation, position) for position in (*range(8), 0)]
    np.testing.assert_array_equal(views[0], views[-1], strict=True)
    assert len({view.tobytes() for view in views}) == (8 if augmentation.crops else 2)
    assert all(view.shape == (16, 16, 3) and view.dtype == np.uint8 for view in views)
    others = [cut_one(image, augmentation, position, seed=1) for position in range(8)]
    assert [view.tobytes() for view in others] != [view.tobytes() for view in views[:8]]


@pytest.mark.parametrize("first", [0, 1, 10**12])
def test_a_batch_of_views_is_the_views_drawn_alone(first):
    sizes = draw_sizes(5)
    together = draw_views(7, first, sizes, STRONG)
    assert [field.shape for field in together] == [(5, 4), (5,), (5, 3)]
    for i in range(5):
        alone = draw_views(7, first + i, sizes[i : i + 1], STRONG)
        for one, many in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one[0], many[i], strict=True)


def test_positions_and_seeds_share_no_draws():
    boxes = [draw_views(seed, 0, np.full((500, 2), 100), STRONG).boxes for seed in range(3)]
    left, top, right, bottom = np.concatenate(boxes).T
    assert len(np.unique((right - left) * (bottom - top))) == 3 * 500


def test_half_of_the_views_are_mirrored_exactly():
    image = noise(16, 16)
    views = draw_views(1, 0, np.full((1000, 2), 16), Augmentation(flip=True))
    assert abs(views.flips.sum() - 500) < 4 * math.sqrt(250)  # four standard deviations
    preprocess = Preprocess(size=16, crop_fraction=1.0)
    for flip in (True, False):
        view = cut_view(image, preprocess, Views(None, np.asarray([flip]), None))
        np.testing.assert_array_equal(view, image[:, ::-1] if flip else image)
        assert view.flags.c_contiguous


def test_crop_and_flip_see_the_drawn_box():
    """A photo that tells its coordinates shows where the view came from."""
    image = np.zeros((200, 256, 3), np.uint8)
    image[..., 0] = np.arange(256)
    image[..., 1] = np.arange(200)[:, None]
    augmentation = Augmentation(min_crop_area=0.1)
    boxes = draw_views(0, 0, np.full((20, 2), (200, 256)), augmentation).boxes
    for position, (left, top, right, bottom) in enumerate(boxes):
        view = cut_one(image, augmentation, position, size=8)
        # The centre of a linear ramp's resize is the centre of its box (pixel centres lie at one half).
        assert view[..., 0].mean() == pytest.approx((left + right - 1) / 2, abs=1)
        assert view[..., 1].mean() == pytest.approx((top + bottom - 1) / 2, abs=1)
        assert view[:, -2, 0].mean() - view[:, 1, 0].mean() == pytest.approx((right - left) * 5 / 8, abs=2)


@pytest.mark.parametrize(
    ("height", "width"), [(224, 224), (480, 640), (640, 480), (1, 1), (1, 1000), (1000, 1), (3, 5)]
)
@pytest.mark.parametrize("min_area", [0.08, 0.5, 0.999])
def test_boxes_lie_inside_and_keep_to_their_limits(height, width, min_area):
    draws = np.random.default_rng(2).random((300, 4))
    image_ratio = width / height
    for left, top, right, bottom in draw_boxes(draws, np.full((300, 2), (height, width)), min_area):
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


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-53])
def test_extreme_draws_give_boxes_inside(extreme):
    sizes = draw_sizes(200)
    left, top, right, bottom = draw_boxes(np.full((200, 4), extreme), sizes, 0.3).T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= sizes[:, 1]).all()
    assert (bottom <= sizes[:, 0]).all()


def test_areas_ratios_and_places_are_spread_evenly():
    draws = np.random.default_rng(3).random((4000, 4))
    boxes = draw_boxes(draws, np.full((4000, 2), 1000), 0.1)
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
    for position in range(20):
        assert cut_one(noise(*shape), augmentation, position, size=8).shape == (8, 8, 3)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
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
def test_colours_are_hand_worked(factors, pixels, convert):
    image = np.asarray([[[100, 100, 100], [200, 0, 100]]], np.uint8)
    # Beside another one: each image has its own mean.
    images = convert(np.stack([np.full_like(image, 255), image]))
    adjusted = adjust_colour(images, convert(np.asarray([(1, 1, 1), factors], np.float32)))
    np.testing.assert_array_equal(adjusted[1], np.asarray([pixels], np.uint8), strict=True)


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
    adjusted = adjust_colour(image[None], np.asarray([factors], np.float32))[0]
    difference = adjusted.astype(int) - expected
    assert np.abs(difference).max() <= 1


def test_factors_of_one_change_no_pixel():
    image = noise(100, 100)
    np.testing.assert_array_equal(adjust_colour(image[None], np.ones((1, 3), np.float32))[0], image)


def test_colour_factors_stay_within_their_range():
    """On a grey photo only brightness acts, and the view shows its factor."""
    grey = np.full((8, 8, 3), 100, np.uint8)
    augmentation = Augmentation(colour_jitter=0.3)
    values = [cut_one(grey, augmentation, position, size=8)[0, 0, 0] for position in range(500)]
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


def test_scale_at_which_a_view_shows_a_photo():
    views = Views(np.asarray([[10.0, 20, 110, 70]]), None, None)
    assert views.short_side(Preprocess(size=25), (200, 400)) == 100
    assert Views(None, None, None).short_side(Preprocess(size=224), (200, 400)) == 256
    assert views.scaled(np.asarray([[0.5, 0.25]])).boxes.tolist() == [[2.5, 10, 27.5, 35]]

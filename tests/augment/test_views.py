"""Views cut on the device, against Pillow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxcls.augment.host import Augmentation, Views, cut_view, draw_views
from jaxcls.augment.views import cut_views, resize_boxes
from jaxcls.preprocess import Preprocess

B = 48
RESIZE = jax.jit(resize_boxes, static_argnums=(3, 4))
CUT = jax.jit(cut_views, static_argnums=3)
PLAIN = Views(None, None, None)


def draw_photos(low=1, high=160):
    """Noise of many shapes; padded with other noise, which no view may show."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(low, high, (B, 2))
    padded = generator.integers(0, 256, (B, *sizes.max(0), 3), np.uint8)
    return [padded[i, :h, :w] for i, (h, w) in enumerate(sizes)], sizes, padded


def difference(views, others):
    return np.abs(np.asarray(views).astype(int) - others).max()


@pytest.mark.parametrize("size", [7, 100])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("augmentation", [Augmentation(False, 0.05), Augmentation(True, 0.3, 0.2)])
def test_views_are_those_of_the_host_within_two_levels(size, interpolation, augmentation):
    preprocess = Preprocess(size=size, interpolation=interpolation)
    photos, sizes, padded = draw_photos()
    views = draw_views(3, 1000, sizes, augmentation)
    shown = CUT(padded, sizes, views, preprocess)
    assert shown.dtype == jnp.uint8
    one_by_one = [draw_views(3, 1000 + i, sizes[i : i + 1], augmentation) for i in range(B)]
    expected = [cut_view(photo, preprocess, one) for photo, one in zip(photos, one_by_one, strict=True)]
    assert difference(shown, np.stack(expected)) <= 2


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_a_whole_photo_is_resized_as_by_pillow(interpolation):
    """Wide photos: Pillow resizes these along the rows first, as we do."""
    generator = np.random.default_rng(1)
    for height, width, size in ((90, 100, 30), (30, 40, 64)):
        photo = generator.integers(0, 256, (height, width, 3), np.uint8)
        expected = Image.fromarray(photo).resize((size, size), Image.Resampling[interpolation.upper()])
        shown = RESIZE(
            photo[None],
            jnp.asarray([[height, width]]),
            jnp.asarray([[0, 0, width, height]]),
            (size, size),
            interpolation,
        )
        assert difference(shown[0], np.asarray(expected)) <= 1


def test_the_box_is_left_top_right_bottom():
    photo = np.random.default_rng(2).integers(0, 256, (1, 20, 30, 3), np.uint8)
    shown = RESIZE(
        jnp.asarray(photo), jnp.asarray([[20, 30]]), jnp.asarray([[10, 4, 16, 10]]), (6, 6), "bilinear"
    )
    np.testing.assert_array_equal(shown[0], photo[0, 4:10, 10:16])


def test_padding_is_never_seen():
    _, sizes, padded = draw_photos()
    views = draw_views(0, 0, sizes, Augmentation(min_crop_area=0.5))
    preprocess = Preprocess(size=20, interpolation="lanczos")
    inside = [np.arange(n)[None, :] < sizes[:, axis, None] for axis, n in enumerate(padded.shape[1:3])]
    black = np.where(inside[0][:, :, None, None] & inside[1][:, None, :, None], padded, 0)
    shown = [CUT(jnp.asarray(photos), sizes, views, preprocess) for photos in (padded, black)]
    np.testing.assert_array_equal(*shown)


def test_without_anything_to_do_pixels_stay():
    _, sizes, padded = draw_photos()
    np.testing.assert_array_equal(cut_views(jnp.asarray(padded), sizes, PLAIN, Preprocess()), padded)


def test_the_chosen_ones_are_mirrored():
    _, sizes, padded = draw_photos()
    flips = np.arange(B) % 3 == 0
    shown = cut_views(jnp.asarray(padded), sizes, PLAIN._replace(flips=flips), Preprocess())
    np.testing.assert_array_equal(shown[flips], padded[flips][:, :, ::-1])
    np.testing.assert_array_equal(shown[~flips], padded[~flips])

"""Random views cut on the device, from photos that stay there: the twin of `host.cut_view`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcls.augment.host import Views, adjust_colour
from jaxcls.preprocess import Preprocess


def cut_views(photos: jax.Array, sizes: jax.Array, views: Views, preprocess: Preprocess) -> jax.Array:
    """uint8 [B, H, W, 3] -> uint8 [B, size, size, 3], within 2 levels of what `host.cut_view` makes.

    Args:
        photos: padded below and at the right; where `views.boxes` is None, evaluation views as they are.
        sizes: int32 [B, 2], heights and widths without the padding.
        views: what to show of them.
        preprocess: gives size and interpolation.
    """
    images = photos
    if views.boxes is not None:
        size = (preprocess.size, preprocess.size)
        images = resize_boxes(photos, sizes, views.boxes, size, preprocess.interpolation)
    if views.flips is not None:
        images = jnp.where(views.flips.reshape(-1, 1, 1, 1), images[:, :, ::-1], images)
    if views.factors is not None:
        images = adjust_colour(images, views.factors)
    return images


def resize_boxes(
    photos: jax.Array, sizes: jax.Array, boxes: jax.Array, size: tuple[int, int], interpolation: str
) -> jax.Array:
    """Resize a box of each photo, antialiased as Pillow does it: two matrix products, rounded in between.

    Args:
        photos: uint8 [B, H, W, 3], padded below and at the right.
        sizes: int32 [B, 2], heights and widths without the padding.
        boxes: float32 [B, 4], left, top, right, bottom in pixels.
        size: height and width of the result, uint8 [B, height, width, 3].
        interpolation: "bilinear", "bicubic" or "lanczos".
    """
    kernel = _KERNELS[interpolation]
    left, top, right, bottom = boxes.astype(jnp.float32).T
    across = _weights(left, right, sizes[:, 1], photos.shape[2], size[1], kernel)
    down = _weights(top, bottom, sizes[:, 0], photos.shape[1], size[0], kernel)
    columns = _round(jnp.einsum("bow,bhwc->bhoc", across, photos.astype(jnp.float32), precision="highest"))
    return _round(jnp.einsum("boh,bhwc->bowc", down, columns, precision="highest")).astype(jnp.uint8)


def _round(values: jax.Array) -> jax.Array:
    return jnp.clip(jnp.floor(values + 0.5), 0, 255)


def _weights(
    start: jax.Array, stop: jax.Array, length: jax.Array, num_inputs: int, num_outputs: int, kernel: "_Kernel"
) -> jax.Array:
    """float32 [B, num_outputs, num_inputs]: what each input between start and stop adds to each output."""
    scale = ((stop - start) / num_outputs)[:, None]
    centres = start[:, None] + (jnp.arange(num_outputs) + 0.5)[None] * scale
    inputs = jnp.arange(num_inputs)[None, None]
    weights = kernel((inputs + 0.5 - centres[..., None]) / jnp.maximum(scale, 1)[..., None])
    weights = jnp.where(inputs < length[:, None, None], weights, 0)
    return weights / weights.sum(-1, keepdims=True)


def _bilinear(x: jax.Array) -> jax.Array:
    return jnp.maximum(1 - jnp.abs(x), 0)


def _bicubic(x: jax.Array) -> jax.Array:
    """Keys 1981, with a = -1/2."""
    x = jnp.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))


def _lanczos(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(x) < 3, jnp.sinc(x) * jnp.sinc(x / 3), 0)


_Kernel = Callable[[jax.Array], jax.Array]
_KERNELS: dict[str, _Kernel] = {"bilinear": _bilinear, "bicubic": _bicubic, "lanczos": _lanczos}

"""How alike two photos are once one is laid over the other: crop, scale, brightness and compression aside.

Photos are compared as thumbnails, both sides stretched to one length. What is compared is local contrast: the
difference from the surroundings over how much these vary. Plain areas then count little, and brightness does
not count.

One photo is laid over the other by the inverse compositional algorithm (Baker and Matthews, "Lucas-Kanade 20
years on", 2004), first coarsely, then in full. It finds scale and shift of each axis: the place u of the
second photo, from -0.5 at one edge to 0.5 at the other, lies at `scale * u + shift` in the first.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

SIZE = 48
"""Of a thumbnail, in pixels."""
NUM_CELLS = 16
"""Along each side of an outline."""
MIN_OUTLINE_SIMILARITY = 0.85
"""Pairs whose outlines agree less are not looked at more closely."""
MAX_SCALE, MAX_SHIFT = 1.25, 0.12
"""Photos are laid over each other within these limits: a photo and its crop of 8 % from each edge are."""

_FLOOR = 4.0
"""Grey levels; where less than this varies is plain."""
_GREY = np.asarray([0.299, 0.587, 0.114], np.float32)


def thumbnail(image: Image.Image) -> np.ndarray:
    """An RGB picture as uint8 [SIZE, SIZE, 3]."""
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def outlines(thumbnails: np.ndarray, *, zoom: float = 1.0) -> np.ndarray:
    """Thumbnails seen from afar: the local contrast of few, soft cells.

    Args:
        thumbnails: uint8 [N, SIZE, SIZE, 3].
        zoom: above 1, of the middle of the picture alone, 1 / `zoom` of each side.

    Returns:
        float32 [N, NUM_CELLS, NUM_CELLS], within about [-2, 2].
    """
    cells = _bells(_places(NUM_CELLS) / zoom, _places(SIZE), width=0.75 / NUM_CELLS)
    return _local_contrast(cells @ _grey(_channels_first(thumbnails)) @ cells.T, width=3.0)[:, 0]


def similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How the local contrast of pairs of photos correlates, colour by colour, where they overlap.

    Args:
        first: uint8 [P, SIZE, SIZE, 3], thumbnails.
        second: the same of what they are compared with.

    Returns:
        float32 [P] in [-1, 1]; 0 where the outlines differ, and for plain pictures.
    """
    similarities = np.zeros(len(first), np.float32)
    outline, other = outlines(first)[:, None], outlines(second)[:, None]
    overlay = _align(outline, other, _Overlay.identity(len(first)), num_steps=10)
    seen, inside = overlay.apply(outline)
    is_near = _correlation(seen, other, inside) >= MIN_OUTLINE_SIMILARITY
    if is_near.any():
        similarities[is_near] = _similarity_in_full(first[is_near], second[is_near], overlay.select(is_near))
    return similarities


@dataclass(frozen=True, eq=False)
class _Overlay:
    """Where P second photos lie in the first: scale and shift, float32 [P, 2], each of x and y."""

    scale: np.ndarray
    shift: np.ndarray

    @classmethod
    def identity(cls, num_pairs: int) -> "_Overlay":
        return cls(np.ones((num_pairs, 2), np.float32), np.zeros((num_pairs, 2), np.float32))

    def select(self, chosen: np.ndarray) -> "_Overlay":
        return _Overlay(self.scale[chosen], self.shift[chosen])

    def apply(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First photos, float32 [P, C, n, n], as the second show them; and [P, 1, n, n], 1 inside, else 0."""
        size = images.shape[-1]
        places = self.scale[..., None] * _places(size) + self.shift[..., None]
        # Linear interpolation as a matrix: a row has two entries that sum to 1, or to less outside.
        positions = (places + 0.5) * size - 0.5
        weights = np.maximum(0, 1 - np.abs(positions[..., None] - np.arange(size, dtype=np.float32)))
        inside = (weights.sum(-1) > 0.999).astype(np.float32)
        x, y = weights[:, 0, None], weights[:, 1, None]
        return y @ images @ x.swapaxes(2, 3), inside[:, 1, None, :, None] * inside[:, 0, None, None, :]

    def followed_by_inverse(self, scale: np.ndarray, shift: np.ndarray) -> "_Overlay":
        new_scale = self.scale / scale
        return _Overlay(
            np.clip(new_scale, 1 / MAX_SCALE, MAX_SCALE),
            np.clip(self.shift - new_scale * shift, -MAX_SHIFT, MAX_SHIFT),
        )


def _align(first: np.ndarray, second: np.ndarray, overlay: _Overlay, *, num_steps: int) -> _Overlay:
    """Improve an overlay of float32 [P, 1, n, n] images by Gauss-Newton steps."""
    num_pairs, _, size, _ = second.shape
    u = _places(size)
    by_y, by_x = np.gradient(size * second[:, 0], axis=(1, 2))
    slopes = np.stack([by_x * u, by_y * u[:, None], by_x, by_y], axis=1).reshape(num_pairs, 4, size**2)
    hessian = slopes @ slopes.swapaxes(1, 2)
    damping = 2.5e-4 * np.trace(hessian, axis1=1, axis2=2) + 1e-6
    to_step = np.linalg.inv(hessian + damping[:, None, None] * np.eye(4, dtype=np.float32)) @ slopes
    for _ in range(num_steps):
        seen, inside = overlay.apply(first)
        step = (to_step @ ((seen - second) * inside).reshape(num_pairs, size**2, 1))[..., 0]
        overlay = overlay.followed_by_inverse(1 + np.clip(step[:, :2], -0.2, 0.2), step[:, 2:])
    return overlay


def _similarity_in_full(first: np.ndarray, second: np.ndarray, overlay: _Overlay) -> np.ndarray:
    first, second = _match_tones(_channels_first(first), _channels_first(second), overlay)
    contrast, other = (_local_contrast(_blur(_grey(images), 0.8), width=4.5) for images in (first, second))
    overlay = _align(contrast, other, overlay, num_steps=8)
    seen, inside = overlay.apply(first)
    # Outside, as the second: what lies near the edge then has the same surroundings in both.
    seen = np.where(inside > 0, seen, second)
    contrast, other = (_local_contrast(_blur(images, 0.8), width=2.25) for images in (seen, second))
    return _correlation(contrast, other, inside)


def _match_tones(first: np.ndarray, second: np.ndarray, overlay: _Overlay) -> tuple[np.ndarray, np.ndarray]:
    """Both images, float32 [P, 3, n, n], on the second's scale of brightness, and clipped where either is."""
    seen, inside = overlay.apply(first)
    weights = inside * ((np.minimum(seen, second) > 5) & (np.maximum(seen, second) < 250))
    count = _total(weights) + 1e-6
    means = [_total(images * weights) / count for images in (seen, second)]
    spreads = [
        np.sqrt(_total((images - mean) ** 2 * weights) / count + 1)
        for images, mean in zip((seen, second), means, strict=True)
    ]
    gain = np.clip(spreads[1] / spreads[0], 0.4, 2.5)
    offset = means[1] - gain * means[0]
    darkest, brightest = np.maximum(0, offset), np.minimum(255, 255 * gain + offset)
    return np.clip(gain * first + offset, darkest, brightest), np.clip(second, darkest, brightest)


def _local_contrast(images: np.ndarray, *, width: float) -> np.ndarray:
    """Float32 [N, C, n, n]: the difference from the surroundings, `width` pixels wide, over its spread."""
    differences = images - _blur(images, width)
    variance = _blur((differences**2).mean(axis=1, keepdims=True), width)
    return differences / np.sqrt(variance + _FLOOR**2)


def _correlation(first: np.ndarray, second: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Float32 [P], over float32 [P, C, n, n], the mean of each channel aside."""
    count = inside.sum(axis=(2, 3), keepdims=True)
    first, second = (
        (image - (image * inside).sum(axis=(2, 3), keepdims=True) / count) * inside
        for image in (first, second)
    )
    spread = np.sqrt(_total(first**2) * _total(second**2) + 1e-6)
    return (_total(first * second) / spread)[:, 0, 0, 0]


def _total(images: np.ndarray) -> np.ndarray:
    return images.sum(axis=(1, 2, 3), keepdims=True)


def _grey(images: np.ndarray) -> np.ndarray:
    """Float32 [N, 1, n, n] of float32 [N, 3, n, n]."""
    return np.einsum("nchw,c->nhw", images, _GREY)[:, None]


def _channels_first(images: np.ndarray) -> np.ndarray:
    """Float32 [N, 3, n, n] of uint8 [N, n, n, 3]."""
    return images.transpose(0, 3, 1, 2).astype(np.float32)


def _blur(images: np.ndarray, width: float) -> np.ndarray:
    """Gaussian, its standard deviation `width` pixels; the edges see the inside alone."""
    size = images.shape[-1]
    bells = _bells(_places(size), _places(size), width=width / size)
    return bells @ images @ bells.T


def _bells(centres: np.ndarray, places: np.ndarray, *, width: float) -> np.ndarray:
    """Float32 [len(centres), len(places)]: Gaussian weights, each row of sum 1."""
    weights = np.exp(-0.5 * ((centres[:, None] - places) / width) ** 2)
    return weights / weights.sum(axis=1, keepdims=True)


def _places(size: int) -> np.ndarray:
    """Float32 [size]: the middles of pixels, in a picture from -0.5 to 0.5."""
    return (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5

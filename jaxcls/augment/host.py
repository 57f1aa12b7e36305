"""Random views of photos: drawn here for every pipeline, cut here for streamed photos. No JAX.

A view is a pure function of the seed and the position in the data, so that it is
the same wherever it is drawn: one at a time in a worker, or a batch at once.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxcls.errors import UsageError
from jaxcls.preprocess import Picture, Preprocess

MAX_ASPECT_RATIO = 4 / 3
DRAWS_PER_VIEW = 8
PHILOX_BLOCK = 4
"""64-bit draws that a Philox makes at a time, and `advance` counts as one."""


@dataclass(frozen=True)
class Augmentation:
    """Which random views training sees. The default leaves the evaluation view as it is.

    Attributes:
        flip: mirror left and right with probability 1/2.
        min_crop_area: in (0, 1]. Below 1: a random box with a share of the photo's area drawn from
            [min_crop_area, 1] and an aspect ratio from [3/4, 4/3] (Inception's crop, Szegedy et al. 2014).
            1: no random box; the evaluation view's centre crop.
        colour_jitter: brightness, contrast and saturation are scaled by factors from
            [1 - colour_jitter, 1 + colour_jitter]; in [0, 1).
    """

    flip: bool = False
    min_crop_area: float = 1.0
    colour_jitter: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.min_crop_area <= 1:
            raise UsageError(f"min_crop_area {self.min_crop_area}: must lie in (0, 1]")
        if not 0 <= self.colour_jitter < 1:
            raise UsageError(f"colour_jitter {self.colour_jitter}: must lie in [0, 1)")

    @property
    def crops(self) -> bool:
        """Whether the box is random."""
        return self.min_crop_area < 1

    def short_side(self, preprocess: Preprocess) -> int:
        """The short side, in pixels, at which the smallest crop still has as many as the network sees."""
        return max(preprocess.short_side, math.ceil(preprocess.size / math.sqrt(self.min_crop_area)))


class Views(NamedTuple):
    """How B photos are seen. None: nothing of that kind is done to any of them.

    Attributes:
        boxes: float64 [B, 4], the part seen: left, top, right, bottom in the photo's pixels.
            None: the evaluation view's centre crop.
        flips: bool [B], mirrored left and right.
        factors: float32 [B, 3], of brightness, contrast and saturation.
    """

    boxes: Any
    flips: Any
    factors: Any

    def short_side(self, preprocess: Preprocess, size: tuple[int, int]) -> int:
        """The short side, in pixels, of a photo of `size` (H, W) at the scale of its one view (B = 1)."""
        if self.boxes is None:
            return preprocess.short_side
        left, top, right, bottom = self.boxes[0]
        return math.ceil(preprocess.size * min(size) / min(right - left, bottom - top))

    def scaled(self, scales: np.ndarray) -> "Views":
        """The same views of photos resized by the factors float [B, 2], of heights and widths."""
        if self.boxes is None:
            return self
        return self._replace(boxes=(self.boxes * scales[:, [1, 0, 1, 0]]).astype(np.float32))


def draw_views(seed: int, position: int, sizes: np.ndarray, augmentation: Augmentation) -> Views:
    """Draw the views of the photos at positions `position`, `position + 1`, ... of the data.

    Each is a function of seed, position and size alone, in whatever company it is drawn.

    Args:
        seed: of the run, in [0, 2**64).
        position: of the first photo, counted over the whole run.
        sizes: int [B, 2], heights and widths of the photos.
        augmentation: which views to draw.
    """
    philox = np.random.Philox(key=seed)
    philox.advance(position * DRAWS_PER_VIEW // PHILOX_BLOCK)
    draws = np.random.Generator(philox).random((len(sizes), DRAWS_PER_VIEW))
    jitter = augmentation.colour_jitter
    return Views(
        draw_boxes(draws[:, :4], sizes, augmentation.min_crop_area) if augmentation.crops else None,
        draws[:, 4] < 0.5 if augmentation.flip else None,
        (1 + jitter * (2 * draws[:, 5:] - 1)).astype(np.float32) if jitter else None,
    )


def draw_boxes(draws: Any, sizes: Any, min_area: float) -> Any:
    """Turn uniform draws [B, 4] into boxes [B, 4] inside photos of `sizes` [B, 2]; NumPy or JAX arrays.

    An aspect ratio that the area does not allow is clipped to the nearest that it does.
    """
    xp = draws.__array_namespace__()
    heights, widths = xp.asarray(sizes, dtype=draws.dtype).T
    areas = (min_area + draws[:, 0] * (1 - min_area)) * heights * widths
    ratios = MAX_ASPECT_RATIO ** (2 * draws[:, 1] - 1)
    ratios = xp.clip(ratios, areas / heights**2, widths**2 / areas)
    box_widths, box_heights = xp.sqrt(areas * ratios), xp.sqrt(areas / ratios)
    left, top = draws[:, 2] * (widths - box_widths), draws[:, 3] * (heights - box_heights)
    right, bottom = xp.minimum(left + box_widths, widths), xp.minimum(top + box_heights, heights)
    return xp.stack([xp.maximum(left, 0), xp.maximum(top, 0), right, bottom], axis=1)


def cut_view(image: Picture, preprocess: Preprocess, views: Views) -> np.ndarray:
    """The one view of `views` (B = 1) of RGB or uint8 [H, W, 3], as uint8 [size, size, 3]."""
    if views.boxes is None:
        view = preprocess.resize_and_crop(image)
    else:
        view = preprocess.crop_box(image, tuple(views.boxes[0].tolist()))
    if views.flips is not None and views.flips[0]:
        # As whole pixels: their bytes one by one take three times as long.
        view = np.ascontiguousarray(view.view("V3")[:, ::-1]).view(np.uint8)
    if views.factors is not None:
        view = adjust_colour(view[None], views.factors)[0]
    return view


def adjust_colour(images: Any, factors: Any) -> Any:
    """Scale brightness, then contrast about the mean luma, then saturation about each pixel's luma.

    uint8 [B, H, W, 3] by float32 [B, 3] -> uint8 [B, H, W, 3], for NumPy or JAX arrays; a factor of 1
    changes nothing.
    """
    brightness, contrast, saturation = (factors[:, i].reshape(-1, 1, 1, 1) for i in range(3))
    luma = _luma(images.astype(np.float32))
    mean = luma.mean((1, 2, 3), keepdims=True)
    # The three steps multiplied out: each is linear, and the luma of a grey is that grey.
    scale = brightness * contrast
    values = images * (scale * saturation) + luma * (scale * (1 - saturation))
    return (values + mean * (brightness * (1 - contrast))).round().clip(0, 255).astype(np.uint8)


def _luma(values: Any) -> Any:
    return 0.299 * values[..., :1] + 0.587 * values[..., 1:2] + 0.114 * values[..., 2:]

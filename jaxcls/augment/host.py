"""Random views of a photo, drawn and cut on the host while streaming. No JAX.

A view is a pure function of its generator, so that the same seed and position in
the data give the same view wherever it is computed.
"""

import math
from dataclasses import dataclass

import numpy as np

from jaxcls.errors import UsageError
from jaxcls.preprocess import Box, Preprocess

MAX_ASPECT_RATIO = 4 / 3
LUMA = np.asarray([0.299, 0.587, 0.114], np.float32)


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

    def short_side(self, preprocess: Preprocess) -> int:
        """The short side, in pixels, at which the smallest crop still has as many as the network sees."""
        return max(preprocess.short_side, math.ceil(preprocess.size / math.sqrt(self.min_crop_area)))


def random_view(
    image: np.ndarray, preprocess: Preprocess, augmentation: Augmentation, generator: np.random.Generator
) -> np.ndarray:
    """Cut, flip and colour uint8 [H, W, 3] into uint8 [size, size, 3]."""
    if augmentation.min_crop_area < 1:
        box = draw_crop_box(generator, image.shape[0], image.shape[1], augmentation.min_crop_area)
        view = preprocess.crop_box(image, box)
    else:
        view = preprocess.resize_and_crop(image)
    if augmentation.flip and generator.random() < 0.5:
        view = np.ascontiguousarray(view[:, ::-1])
    if augmentation.colour_jitter:
        factors = generator.uniform(1 - augmentation.colour_jitter, 1 + augmentation.colour_jitter, 3)
        view = adjust_colour(view, *factors)
    return view


def draw_crop_box(generator: np.random.Generator, height: int, width: int, min_area: float) -> Box:
    """A random box (left, top, right, bottom) in pixels, inside height x width.

    An aspect ratio that the area does not allow is clipped to the nearest that it does.
    """
    area = generator.uniform(min_area, 1) * height * width
    log_ratio = generator.uniform(-math.log(MAX_ASPECT_RATIO), math.log(MAX_ASPECT_RATIO))
    ratio = float(np.clip(math.exp(log_ratio), area / height**2, width**2 / area))
    box_width, box_height = math.sqrt(area * ratio), math.sqrt(area / ratio)
    left = generator.random() * (width - box_width)
    top = generator.random() * (height - box_height)
    return (max(left, 0.0), max(top, 0.0), min(left + box_width, width), min(top + box_height, height))


def adjust_colour(image: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """Scale brightness, then contrast about the mean luma, then saturation about each pixel's luma.

    uint8 [H, W, 3] -> uint8 [H, W, 3]; a factor of 1 changes nothing.
    """
    values = image.astype(np.float32) * np.float32(brightness)
    mean = (values @ LUMA).mean()
    values = mean + (values - mean) * np.float32(contrast)
    luma = (values @ LUMA)[..., None]
    values = luma + (values - luma) * np.float32(saturation)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)

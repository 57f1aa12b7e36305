"""From a photo of any size to a network's input: the one description used everywhere.

The host part resizes and crops with Pillow and yields uint8; the device part
normalises inside the jitted program. No JAX here: it would slow the start of the
command line, and of data workers, which are new processes.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from jaxcls.errors import UsageError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

SUPPORTS = {"bilinear": 1, "bicubic": 2, "lanczos": 3}
"""Half the width of each filter, in pixels of the smaller picture."""

Box = tuple[float, float, float, float]

Picture = Image.Image | np.ndarray
"""RGB, decoded: Pillow's, whose pixels NumPy can only copy, or uint8 [H, W, 3]."""


@dataclass(frozen=True)
class Preprocess:
    """How a photo becomes a network's input; it travels with the weights.

    Attributes:
        size: height and width of the input, in pixels.
        crop_fraction: the short side is first resized to `size / crop_fraction`, then the centre is cropped.
        interpolation: "bilinear", "bicubic" or "lanczos", antialiased.
        mean, std: per channel (red, green, blue), for values in [0, 1].
    """

    size: int = 224
    crop_fraction: float = 0.875
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"image size {self.size}: must be at least 1 pixel")
        if not 0 < self.crop_fraction <= 1:
            raise UsageError(f"crop_fraction {self.crop_fraction}: must lie in (0, 1]")
        if self.interpolation not in INTERPOLATIONS:
            raise UsageError(
                f"interpolation {self.interpolation!r}: choose one of {', '.join(INTERPOLATIONS)}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UsageError("mean and std: three values each, std above 0")

    @property
    def short_side(self) -> int:
        """The short side, in pixels, of the resized photo before the centre crop."""
        return int(self.size / self.crop_fraction)

    def resize_and_crop(self, image: Picture) -> np.ndarray:
        """The evaluation view: RGB or uint8 [H, W, 3] -> uint8 [size, size, 3].

        The sizes are rounded as torchvision's `Resize` and `CenterCrop` round them. Only what the crop
        keeps is resized: the pixels are theirs within one level.
        """
        picture = _picture(image)
        short = min(picture.size)
        (left, right), (top, bottom) = (self._centre(side, short) for side in picture.size)
        return np.asarray(self._resize(picture, (self.size, self.size), (left, top, right, bottom)))

    def _centre(self, side: int, short: int) -> tuple[float, float]:
        """Where, along one side of a photo, the centre crop begins and ends, in the photo's pixels."""
        resized = int(self.short_side * side / short)
        start = round((resized - self.size) / 2)
        return start * side / resized, (start + self.size) * side / resized

    def crop_box(self, image: Picture, box: Box) -> np.ndarray:
        """Resize the box (left, top, right, bottom; pixels) of a photo to uint8 [size, size, 3].

        Columns first, then rows, rounded in between: the order in which views are cut on a device.
        """
        picture = _picture(image)
        left, top, right, bottom = box
        # Pillow picks its own order by shape. Two calls keep ours, the first on the rows that are seen.
        margin = math.ceil(SUPPORTS[self.interpolation] * max((bottom - top) / self.size, 1)) + 1
        first, last = max(math.floor(top) - margin, 0), min(math.ceil(bottom) + margin, picture.height)
        height = last - first
        rows = picture.crop((0, first, picture.width, last))
        rows = self._resize(rows, (self.size, height), (left, 0, right, height))
        return np.asarray(
            self._resize(rows, (self.size, self.size), (0, top - first, self.size, bottom - first))
        )

    def shrink(self, image: Picture, short_side: int) -> np.ndarray:
        """RGB or uint8 [H, W, 3] with its short side, where longer, resized to `short_side` pixels."""
        picture = _picture(image)
        short = min(picture.size)
        if short <= short_side:
            return np.asarray(picture)
        new_width, new_height = (max(round(short_side * side / short), 1) for side in picture.size)
        return np.asarray(self._resize(picture, (new_width, new_height), (0, 0, *picture.size)))

    def _resize(self, picture: Image.Image, width_height: tuple[int, int], box: Box) -> Image.Image:
        return picture.resize(width_height, INTERPOLATIONS[self.interpolation], box=box)

    def check_images(self, images: Any) -> None:
        """Raise UsageError unless these are uint8 [B, size, size, 3]."""
        expected = (self.size, self.size, 3)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != expected:
            wanted = ", ".join(map(str, expected))
            raise UsageError(f"images must be uint8 [B, {wanted}], not {images.dtype} {list(images.shape)}")

    def normalize(self, images: Any) -> Any:
        """The device part: uint8 [B, H, W, 3] -> float32 [B, H, W, 3], for NumPy or JAX arrays."""
        std = np.asarray(self.std, np.float32).reshape(1, 1, 1, 3)
        mean = np.asarray(self.mean, np.float32).reshape(1, 1, 1, 3)
        return (images.astype(np.float32) / np.float32(255) - mean) / std

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Preprocess":
        """The inverse of `to_json`."""
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def _picture(image: Picture) -> Image.Image:
    return Image.fromarray(image) if isinstance(image, np.ndarray) else image

"""From a photo of any size to a network's input: the one description used everywhere.

The host part resizes and crops with Pillow and yields uint8; the device part
normalises inside the jitted program. No JAX here: it would slow the start of the
command line, and of data workers, which are new processes.
"""

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

MAX_STRIP = 64
"""Long over short side. Only the centre is seen: resized whole, 1 x 65535 pixels would take gigabytes."""

Box = tuple[float, float, float, float]


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

    def resize_and_crop(self, image: np.ndarray) -> np.ndarray:
        """The evaluation view: uint8 [H, W, 3] -> uint8 [size, size, 3].

        The sizes are rounded as torchvision's `Resize` and `CenterCrop` round them. A strip of more
        than 64 times its width is first cut to that about its centre.
        """
        short = min(image.shape[:2])
        height, width = (min(side, MAX_STRIP * short) for side in image.shape[:2])
        above, before = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        image = image[above : above + height, before : before + width]
        resized_height = int(self.short_side * height / short)
        resized_width = int(self.short_side * width / short)
        top = round((resized_height - self.size) / 2)
        left = round((resized_width - self.size) / 2)
        resized = self._resize(image, (resized_width, resized_height), (0, 0, width, height))
        return np.ascontiguousarray(resized[top : top + self.size, left : left + self.size])

    def crop_box(self, image: np.ndarray, box: Box) -> np.ndarray:
        """Resize the box (left, top, right, bottom; pixels) of uint8 [H, W, 3] to uint8 [size, size, 3]."""
        return self._resize(image, (self.size, self.size), box)

    def _resize(self, image: np.ndarray, width_height: tuple[int, int], box: Box) -> np.ndarray:
        return np.asarray(
            Image.fromarray(image).resize(width_height, INTERPOLATIONS[self.interpolation], box=box)
        )

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

"""Random augmentation of a batch on the device: pure functions, vectorised over the batch, jittable.

    augment = Sequential([Fliplr(0.5), Crop(percent=(0, 0.1)), Affine(rotate=(-45, 45))])
    images = jax.jit(augment)(key, images)

An operation (capitalised) holds its options and is called as `operation(key, images)`. It draws values for
each example and hands them to a function (lower case), which takes no key. Operations are frozen and
hashable; a key always gives the same result.

- Images are uint8 [B, H, W, 3] in [0, 255], in and out; results are rounded and clipped.
- A `Range` is a number, for all examples alike, or a pair (low, high) to draw from uniformly.
- Lengths are shares of the height or width, angles are in degrees and clockwise, `p` is a probability,
  `cval` fills with a grey level or a colour (red, green, blue) in [0, 255].
- Boxes are float32 (left, top, right, bottom) in pixels; the centre of the first pixel is (0.5, 0.5).

Names and options are imgaug's where it has the operation. Impossible options, and images of another shape or
dtype, raise `UsageError`. `parse` reads an operation from text.
"""

import ast
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from typing import Annotated, Any, get_type_hints

import jax
import jax.numpy as jnp

from jaxcls.augment.host import adjust_colour, draw_boxes
from jaxcls.augment.views import resize_boxes
from jaxcls.errors import UsageError

Range = float | tuple[float, float]
Colour = int | tuple[int, int, int]

Function = Callable[[jax.Array, jax.Array], jax.Array]

KINDS: dict[Any, tuple[type, tuple[int, ...], str]] = {
    int: (Integral, (1,), "an integer"),
    float: (Real, (1,), "a number"),
    Range: (Real, (1, 2), "a number or a tuple (low, high)"),
    Colour: (Integral, (1, 3), "a grey level or a colour (red, green, blue)"),
}
"""Type of an option -> that of its numbers, how many there may be, and both in words."""


@dataclass(frozen=True)
class _Options:
    """Checks each option annotated with the interval that its numbers must lie in."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            if interval := getattr(hint, "__metadata__", None):
                _require(name, getattr(self, name), hint.__origin__, *interval)


class _Operation(_Options, ABC):
    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        _require_images(images)
        return self._augment(key, images)

    @abstractmethod
    def _augment(self, key: jax.Array, images: jax.Array) -> jax.Array: ...


@dataclass(frozen=True)
class Sequential(_Operation):
    """Apply operations one after the other.

    Attributes:
        children: operations, or any functions of (key, images).
        random_order: draw another order for each batch; every operation then has to keep the shape.
    """

    children: Sequence[Function]
    random_order: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "children", tuple(self.children))
        if not self.children or not all(map(callable, self.children)):
            raise UsageError(f"children {self.children}: give one operation or more")

    def _augment(self, key: jax.Array, images: jax.Array) -> jax.Array:
        num = len(self.children)
        order_key, *keys = jax.random.split(key, num + 1)
        if not self.random_order:
            for child, child_key in zip(self.children, keys, strict=True):
                images = child(child_key, images)
            return images
        order, stacked = jax.random.permutation(order_key, num), jnp.stack(keys)
        branches = [partial(_keeping_shape, child) for child in self.children]

        def apply(position: jax.Array, images: jax.Array) -> jax.Array:
            number = order[position]
            return jax.lax.switch(number, branches, stacked[number], images)

        return jax.lax.fori_loop(0, num, apply, images)


@dataclass(frozen=True)
class Sometimes(_Operation):
    """Apply an operation, which has to keep the shape, to each example with probability `p`."""

    p: Annotated[float, "[0, 1]"]
    child: Function

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.child):
            raise UsageError(f"child {self.child}: give an operation")

    def _augment(self, key: jax.Array, images: jax.Array) -> jax.Array:
        choice_key, child_key = jax.random.split(key)
        chosen = _choose(choice_key, self.p, len(images))
        return jnp.where(_per_image(chosen), _keeping_shape(self.child, child_key, images), images)


@dataclass(frozen=True)
class Fliplr(_Operation):
    """Mirror left and right."""

    p: Annotated[float, "[0, 1]"] = 1.0

    def _augment(self, key: jax.Array, images: jax.Array) -> jax.Array:
        return fliplr(images, _choose(key, self.p, len(images)))


@dataclass(frozen=True)
class Flipud(_Operation):
    """Mirror top and bottom."""

    p: Annotated[float, "[0, 1]"] = 1.0

    def _augment(self, key: jax.Array, images: jax.Array) -> jax.Array:
        return flipud(images, _choose(key, self.p, len(images)))


@dataclass(frozen=True)
class Crop(_Operation):
    """Cut a share off each side, drawn for each side, and resize back to the size before."""

    percent: Annotated[Range, "[0, 0.5)"]

    def _augment(self, key: jax.Array, images: jax.Array) -> jax.Array:
        height, width = images.shape[1:3]
        cut = _draw(key, self.percent, (len(images), 4))
        boxes = jnp.abs(jnp.asarray([[0, 0, 1, 1]]) - cut) * jnp.asarray([[width, height, width, height]])
        return crop_and_resize(images, boxes, (height, width))


@dataclass(frozen=True)
class RandomResizedCrop(_Operation):
    """Cut a random box as `jaxcls.augment.host` draws it, and resize it.

    Attributes:
        size: height and width of the result, in pixels.
        min_area: the box's share of the area is drawn from [min_area, 1], its aspect ratio from [3/4, 4/3].
    """

    size: Annotated[int, "[1, inf)"]
    min_area: Annotated[float, "(0, 1]"] = 0.08

    def _augment(self, key: jax.Array, images: jax.Array) -> jax.Array:
        boxes = draw_boxes(jax.random.uniform(key, (len(images), 4)), _sizes(images), self.min_area)
        return crop_and_resize(images, boxes, (self.size, self.size))


@dataclass(frozen=True)
class Affine(_Operation):
    """Rotate, scale and shear about the centre, in this order, then move; bilinear, not antialiased.

    Attributes:
        scale: of both sides; 2 shows objects twice as large.
        translate_percent: to the right and down, drawn for each of the two.
        rotate: clockwise.
        shear: positive moves the upper part to the right.
        cval: what comes into view from outside the picture.
    """

    scale: Annotated[Range, "(0, inf)"] = 1.0
    translate_percent: Annotated[Range, "[-1, 1]"] = 0.0
    rotate: Annotated[Range, "(-inf, inf)"] = 0.0
    shear: Annotated[Range, "(-90, 90)"] = 0.0
    cval: Annotated[Colour, "[0, 255]"] = 0

    def _augment(self, key: jax.Array, images: jax.Array) -> jax.Array:
        num, height, width, _ = images.shape
        scale_key, translate_key, rotate_key, shear_key = jax.random.split(key, 4)
        scale = _draw(scale_key, self.scale, (num,))
        move = _draw(translate_key, self.translate_percent, (num, 2)) * jnp.asarray([[width, height]])
        angle = jnp.radians(_draw(rotate_key, self.rotate, (num,)))
        slope = jnp.tan(jnp.radians(_draw(shear_key, self.shear, (num,))))
        # The inverse of shear (1, -slope; 0, 1) x scale x rotation (cos, -sin; sin, cos).
        cos, sin = jnp.cos(angle) / scale, jnp.sin(angle) / scale
        inverse = jnp.stack([cos, cos * slope + sin, -sin, cos - sin * slope], -1).reshape(num, 2, 2)
        centre = jnp.asarray([[width / 2, height / 2]])
        offset = centre - jnp.einsum("nij,nj->ni", inverse, centre + move, precision="highest")
        return affine(images, jnp.concatenate([inverse, offset[..., None]], -1), cval=self.cval)


@dataclass(frozen=True)
class ColourJitter(_Operation):
    """Scale brightness, contrast and saturation as `jaxcls.augment.host` does, then turn the hue.

    Attributes:
        brightness, contrast, saturation: factors; 1 changes nothing.
        hue: degrees, 120 turns red into green.
    """

    brightness: Annotated[Range, "[0, inf)"] = 1.0
    contrast: Annotated[Range, "[0, inf)"] = 1.0
    saturation: Annotated[Range, "[0, inf)"] = 1.0
    hue: Annotated[Range, "(-inf, inf)"] = 0.0

    def _augment(self, key: jax.Array, images: jax.Array) -> jax.Array:
        *keys, hue_key = jax.random.split(key, 4)
        factors = (self.brightness, self.contrast, self.saturation)
        drawn = [_draw(k, factor, (len(images),)) for k, factor in zip(keys, factors, strict=True)]
        images = adjust_colour(images, jnp.stack(drawn, axis=1))
        if self.hue in (0, (0, 0)):
            return images
        return turn_hue(images, _draw(hue_key, self.hue, (len(images),)))


@dataclass(frozen=True)
class Grayscale(_Operation):
    """Blend with the picture's luma: `alpha` 1 leaves no colour, 0 changes nothing."""

    alpha: Annotated[Range, "[0, 1]"] = 1.0

    def _augment(self, key: jax.Array, images: jax.Array) -> jax.Array:
        saturation = 1 - _draw(key, self.alpha, (len(images), 1))
        return adjust_colour(images, jnp.pad(saturation, ((0, 0), (2, 0)), constant_values=1))


@dataclass(frozen=True)
class GaussianBlur(_Operation):
    """Blur with a Gaussian of standard deviation `sigma`, in pixels."""

    sigma: Annotated[Range, "[0, inf)"] = (0.0, 3.0)

    def _augment(self, key: jax.Array, images: jax.Array) -> jax.Array:
        return gaussian_blur(images, _draw(key, self.sigma, (len(images),)))


@dataclass(frozen=True)
class AdditiveGaussianNoise(_Operation):
    """Add noise to each pixel, to its channels alike: normal, with a standard deviation of `scale` levels."""

    scale: Annotated[Range, "[0, inf)"] = (0.0, 15.0)

    def _augment(self, key: jax.Array, images: jax.Array) -> jax.Array:
        scale_key, noise_key = jax.random.split(key)
        scale = _draw(scale_key, self.scale, (len(images),))
        return _to_uint8(images + _per_image(scale) * jax.random.normal(noise_key, (*images.shape[:3], 1)))


@dataclass(frozen=True)
class Cutout(_Operation):
    """Fill rectangles (DeVries and Taylor 2017): centres anywhere in the picture, cut off at its border.

    Attributes:
        nb_iterations: how many for each picture.
        size: height and width, drawn for each of the two.
        cval: what fills them.
    """

    nb_iterations: Annotated[int, "[1, inf)"] = 1
    size: Annotated[Range, "(0, 1]"] = 0.2
    cval: Annotated[Colour, "[0, 255]"] = 128

    def _augment(self, key: jax.Array, images: jax.Array) -> jax.Array:
        size_key, place_key = jax.random.split(key)
        sizes = _draw(size_key, self.size, (len(images), self.nb_iterations, 2))
        return cutout(images, _draw_boxes(place_key, sizes, *images.shape[1:3]), cval=self.cval)


class _Mix(_Options, ABC):
    def __call__(
        self, key: jax.Array, images: jax.Array, labels: jax.Array, num_classes: int
    ) -> tuple[jax.Array, jax.Array]:
        _require_images(images)
        if labels.shape != images.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise UsageError(f"labels {labels.dtype} {list(labels.shape)}: must be int32 [{len(images)}]")
        images, weights = self._mix(key, images, jnp.roll(images, 1, axis=0))
        targets = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
        weights = weights[:, None]
        return images, weights * targets + (1 - weights) * jnp.roll(targets, 1, axis=0)

    @abstractmethod
    def _mix(self, key: jax.Array, images: jax.Array, others: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The mixed images, and the weight float32 [B] of the first of each pair."""


@dataclass(frozen=True)
class MixUp(_Mix):
    """Blend each example with the one before it in the batch (Zhang et al. 2018).

    Called as `mix_up(key, images, labels int32 [B], num_classes)`; gives images and targets, float32 [B, K].
    Each example has a weight of its own from Beta(alpha, alpha). The batch has to be shuffled: no other
    partner is drawn.
    """

    alpha: Annotated[float, "(0, inf)"] = 0.2

    def _mix(self, key: jax.Array, images: jax.Array, others: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = jax.random.beta(key, self.alpha, self.alpha, (len(images),))
        blended = _per_image(weights) * images + _per_image(1 - weights) * others
        return _to_uint8(blended), weights


@dataclass(frozen=True)
class CutMix(_Mix):
    """Paste a box from the example before it in the batch into each (Yun et al. 2019).

    Called as `MixUp` is. The box has the picture's aspect ratio, a share of its area from Beta(alpha, alpha),
    and its centre anywhere; the border cuts it off. Targets are weighted by the pixels that came from each.
    """

    alpha: Annotated[float, "(0, inf)"] = 1.0

    def _mix(self, key: jax.Array, images: jax.Array, others: jax.Array) -> tuple[jax.Array, jax.Array]:
        num, height, width, _ = images.shape
        area_key, place_key = jax.random.split(key)
        sides = jnp.sqrt(jax.random.beta(area_key, self.alpha, self.alpha, (num, 1, 1)))
        boxes = _draw_boxes(place_key, jnp.broadcast_to(sides, (num, 1, 2)), height, width)
        pasted = _inside(boxes, height, width)
        return jnp.where(pasted[..., None], others, images), 1 - pasted.mean((1, 2))


def fliplr(images: jax.Array, flipped: jax.Array) -> jax.Array:
    """Mirror left and right those images where `flipped`, bool [B], is true."""
    return jnp.where(_per_image(flipped), images[:, :, ::-1], images)


def flipud(images: jax.Array, flipped: jax.Array) -> jax.Array:
    """Mirror top and bottom those images where `flipped`, bool [B], is true."""
    return jnp.where(_per_image(flipped), images[:, ::-1], images)


def crop_and_resize(images: jax.Array, boxes: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Resize each image's box, float32 [B, 4], to `size` (height, width) as Pillow's antialiased bilinear."""
    return resize_boxes(images, _sizes(images), boxes, size, "bilinear")


def affine(images: jax.Array, matrices: jax.Array, *, cval: Colour = 0) -> jax.Array:
    """Sample each image, bilinearly, where its matrix says; beyond the border lies `cval`.

    The matrices, float32 [B, 2, 3], take (x, y, 1) in the result to (x, y) in the image, both in pixels, as
    `PIL.Image.transform` takes them.
    """
    height, width = images.shape[1:3]
    # A border of cval, to which all that lies outside is moved.
    frame = ((0, 0), (1, 1), (1, 1))
    levels = cval if isinstance(cval, tuple) else (cval,) * 3
    framed = jnp.stack(
        [jnp.pad(images[..., c], frame, constant_values=level) for c, level in enumerate(levels)], -1
    )
    ys, xs = jnp.meshgrid(jnp.arange(height) + 0.5, jnp.arange(width) + 0.5, indexing="ij")
    places = jnp.einsum(
        "nij,jyx->niyx", matrices, jnp.stack([xs, ys, jnp.ones_like(xs)]), precision="highest"
    )
    x = jnp.clip(places[:, 0] + 0.5, 0, width + 1)
    y = jnp.clip(places[:, 1] + 0.5, 0, height + 1)
    first_x, first_y = jnp.floor(x), jnp.floor(y)

    def corner(down: int, right: int) -> jax.Array:
        row = jnp.minimum(first_y.astype(jnp.int32) + down, height + 1)
        column = jnp.minimum(first_x.astype(jnp.int32) + right, width + 1)
        weight = (1 - jnp.abs(y - first_y - down)) * (1 - jnp.abs(x - first_x - right))
        return jax.vmap(lambda image, r, c: image[r, c])(framed, row, column) * weight[..., None]

    return _to_uint8(corner(0, 0) + corner(0, 1) + corner(1, 0) + corner(1, 1))


def turn_hue(images: jax.Array, degrees: jax.Array) -> jax.Array:
    """Add `degrees`, float32 [B], to the hue of HSV; saturation and value stay."""
    # Channel by channel: reductions over an axis of 3 took ten times as long on CPU.
    red, green, blue = jnp.moveaxis(images.astype(jnp.float32), -1, 0)
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    divisor = jnp.maximum(chroma, 1)  # grey pixels have no hue, others a chroma of 1 at least
    # In sixths of a turn.
    hue = jnp.where(
        value == red,
        (green - blue) / divisor,
        jnp.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    hue = (hue + degrees[:, None, None] / 60)[..., None]
    turned = hue + jnp.asarray([5, 3, 1]).reshape(1, 1, 1, 3)
    distance = turned - 6 * jnp.floor(turned / 6)
    lost = jnp.clip(jnp.minimum(distance, 4 - distance), 0, 1)
    return _to_uint8(value[..., None] - chroma[..., None] * lost)


def gaussian_blur(images: jax.Array, sigma: jax.Array) -> jax.Array:
    """Blur with Gaussians of `sigma`, float32 [B], in pixels; what lies beyond the border has no weight."""

    def weights(length: int) -> jax.Array:
        place = jnp.arange(length, dtype=jnp.float32)
        squares = (place[:, None] - place[None]) ** 2
        exponents = squares[None] / (2 * jnp.maximum(sigma, 1e-3) ** 2)[:, None, None]
        return _normalized(jnp.exp(-exponents))

    return _filter(images, weights(images.shape[1]), weights(images.shape[2]))


def cutout(images: jax.Array, boxes: jax.Array, *, cval: Colour = 128) -> jax.Array:
    """Fill the pixels of each image whose centres lie in one of its boxes, float32 [B, N, 4]."""
    inside = _inside(boxes, *images.shape[1:3])
    return jnp.where(inside[..., None], _colour(cval), images)


OPERATIONS: dict[str, type[_Operation]] = {kind.__name__: kind for kind in _Operation.__subclasses__()}
"""What `parse` knows, by name."""

MAX_TEXT = 10_000
"""Characters that `parse` takes: Python's own parser may fail badly on texts that are long and deep."""


def parse(text: str) -> _Operation:
    """The operation that a text describes, such as `Sequential([Fliplr(0.5), Crop(percent=(0, 0.1))])`.

    Nothing is evaluated: names are those of operations and their options, values are numbers, tuples and
    lists. `parse(repr(operation)) == operation`.

    Raises:
        UsageError: anything else, or impossible options.
    """
    shown = text if len(text) <= 200 else f"{text[:200]}..."
    try:
        if len(text) > MAX_TEXT:
            raise UsageError(f"{len(text):,} characters, of {MAX_TEXT:,} at most")
        operation = _read(ast.parse(text.strip(), mode="eval").body)
    except (RecursionError, MemoryError) as error:
        raise UsageError(f"pipeline {shown!r}: nested too deeply") from error
    except (SyntaxError, ValueError, UsageError) as error:
        raise UsageError(f"pipeline {shown!r}: {getattr(error, 'msg', error)}") from error
    if not isinstance(operation, _Operation):
        raise UsageError(f"pipeline {shown!r}: give an operation, such as Fliplr(0.5)")
    return operation


def _read(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Tuple(elts=elements):
            return tuple(map(_read, elements))
        case ast.List(elts=elements):
            return list(map(_read, elements))
        case ast.Call(func=ast.Name(id=name), args=values, keywords=keywords) if name in OPERATIONS:
            options = {str(keyword.arg): _read(keyword.value) for keyword in keywords}
            if len(options) < len(keywords):
                raise UsageError(f"{name}: an option is given twice")
            try:
                return OPERATIONS[name](*map(_read, values), **options)
            except TypeError as error:
                raise UsageError(f"{name}: {str(error).removeprefix(f'{name}.__init__() ')}") from error
    raise UsageError(
        f"{ast.unparse(node)!r} is no number, tuple, list or operation (known are {', '.join(OPERATIONS)})"
    )


def _require(name: str, value: Any, kind: Any, interval: str) -> None:
    """Raise unless all numbers of an option lie in an interval such as "[0, 0.5)"."""
    numbers = value if isinstance(value, tuple) else (value,)
    number, lengths, words = KINDS[kind]
    if len(numbers) not in lengths or not all(isinstance(n, number) for n in numbers):
        raise UsageError(f"{name} {value!r}: give {words}")
    low, high = (float(end) for end in interval[1:-1].split(","))
    ends = [low] * interval.startswith("[") + [high] * interval.endswith("]")
    if not all(low < n < high or n in ends for n in numbers):
        raise UsageError(f"{name} {value}: must lie in {interval}")
    if kind == Range and numbers[0] > numbers[-1]:
        raise UsageError(f"{name} {value}: the lower end comes first")


def _require_images(images: jax.Array) -> None:
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != jnp.uint8:
        raise UsageError(f"images {images.dtype} {list(images.shape)}: must be uint8 [B, H, W, 3]")


def _keeping_shape(child: Function, key: jax.Array, images: jax.Array) -> jax.Array:
    changed = child(key, images)
    if changed.shape != images.shape:
        raise UsageError(f"{child}: turns {images.shape} into {changed.shape}, where the shape has to stay")
    return changed


def _sizes(images: jax.Array) -> jax.Array:
    """int32 [B, 2]: heights and widths, all alike."""
    return jnp.broadcast_to(jnp.asarray([images.shape[1:3]]), (len(images), 2))


def _choose(key: jax.Array, p: float, num: int) -> jax.Array:
    return jax.random.bernoulli(key, float(p), (num,))


def _draw(key: jax.Array, limits: Range, shape: tuple[int, ...]) -> jax.Array:
    low, high = limits if isinstance(limits, tuple) else (limits, limits)
    return jax.random.uniform(key, shape, minval=low, maxval=high)


def _draw_boxes(key: jax.Array, sizes: jax.Array, height: int, width: int) -> jax.Array:
    """Boxes [B, N, 4] of widths and heights `sizes` [B, N, 2], in shares, about centres anywhere."""
    centres = jax.random.uniform(key, sizes.shape)
    shares = jnp.concatenate([centres - sizes / 2, centres + sizes / 2], -1)
    return shares * jnp.asarray([[[width, height, width, height]]])


def _inside(boxes: jax.Array, height: int, width: int) -> jax.Array:
    """bool [B, H, W]: whether a pixel's centre lies in one of the boxes [B, N, 4]."""
    x, y = (jnp.arange(length)[None, None] + 0.5 for length in (width, height))
    left, top, right, bottom = (boxes[..., i, None] for i in range(4))
    across, down = (left <= x) & (x < right), (top <= y) & (y < bottom)
    return (down[..., None] & across[:, :, None]).any(1)


def _normalized(weights: jax.Array) -> jax.Array:
    return weights / weights.sum(-1, keepdims=True)


def _filter(images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Weigh the rows of each image by [B, Y, H] and its columns by [B, X, W]: uint8 [B, Y, X, 3]."""
    return _to_uint8(jnp.einsum("byh,bxw,bhwc->byxc", rows, columns, images.astype(jnp.float32)))


def _colour(cval: Colour) -> jax.Array:
    """uint8 [1, 1, 1, 3]."""
    return jnp.broadcast_to(jnp.asarray(cval, jnp.uint8), (3,)).reshape(1, 1, 1, 3)


def _per_image(values: jax.Array) -> jax.Array:
    return values[:, None, None, None]


def _to_uint8(values: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(values), 0, 255).astype(jnp.uint8)

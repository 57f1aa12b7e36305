"""One convolution and one max pool, lowered as suits platform and shape; training and scoring both use them.

Accelerators run XLA's own operations. On CPU four of those are slow, each by the measurements of
`python -m benchmarks.convolution`, and have a stand-in: 1x1 convolutions, those of very small pictures, the
gradient of a max pool, and (by `compiler_options`) gradients with respect to kernels. Where kernels are
bfloat16 and activations float32, convolutions are sums of products: CPUs that multiply bfloat16 do so at
twice the rate of float32, but XLA uses that in dots alone.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# XLA's CPU compiler hands dots, convolutions and reductions to YNNPACK unless told which. YNNPACK takes 1.4
# to 10 times as long as Eigen for the gradient of a 3x3 kernel, a convolution with a window as large as the
# picture, and longer for the forward convolutions too; its reductions pay, and its dots of bfloat16, which
# Eigen converts to float32. Its dots of float32 take 3 % longer in ResNet-50.
_YNN = "xla_cpu_experimental_ynn_fusion_type"
_CPU_OPTIONS = {_YNN: "LIBRARY_FUSION_TYPE_REDUCE"}
_BFLOAT16_CPU_OPTIONS = {_YNN: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"}


MAX_PATCHES = 4
"""Outputs per picture up to which a convolution is a product of patches on CPU: at 2x2 and 256 channels, 0.9
instead of 22 ms with both gradients; at 4x4 there is no difference, and beyond it is slower."""

MIN_CHANNELS = 16
"""Channels below which a sum of bfloat16 products is slower than a float32 convolution: the stem has 3."""


@cache
def compiler_options(platform: str, *, bfloat16_kernels: bool = False) -> dict[str, Any]:
    """The options to compile a network for a `platform` with; none where this XLA does not know them."""
    if platform != "cpu":
        return {}
    options = _BFLOAT16_CPU_OPTIONS if bfloat16_kernels else _CPU_OPTIONS
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options


def convolve(x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: int = 0) -> jax.Array:
    """Convolve [B, H, W, C] with a kernel [h, w, C, F].

    Args:
        x: the input.
        kernel: square or not, in the dtype of `x`; or bfloat16 where `x` is float32, as suits CPUs: then
            products are of bfloat16 (of few channels, float32), their sums float32.
        stride: along height and width.
        padding: zeros on each of the four sides, as torch pads.

    Returns:
        [B, H', W', F] in the dtype of `x`, where H' = (H + 2 * padding - h) // stride + 1.
    """
    convolution = partial(_convolution, stride=stride, padding=padding)
    if x.dtype == jnp.float32 and kernel.dtype == jnp.bfloat16:
        if x.shape[-1] < MIN_CHANNELS:
            return convolution(x, kernel.astype(x.dtype))
        return _sum_of_products(x, kernel, stride, padding)
    if kernel.shape[:2] == (1, 1) and padding == 0:
        return by_platform(partial(_product, stride=stride), convolution)(x, kernel)
    if math.prod(_output_size(x, kernel, stride, padding)) <= MAX_PATCHES:
        return by_platform(partial(_patch_product, stride=stride, padding=padding), convolution)(x, kernel)
    return convolution(x, kernel)


def max_pool(x: jax.Array) -> jax.Array:
    """The largest of each 3x3 window of [B, H, W, C], at stride 2 with one row and column around it.

    Returns:
        [B, (H + 1) // 2, (W + 1) // 2, C]. Of equal largest values the first has the gradient.
    """
    return by_platform(_max_pool_with_own_gradient, _window_maximum)(x)


def to_bits(x: jax.Array) -> jax.Array:
    """bfloat16 as uint16, to be cut: XLA's CPU compiler would first convert all of it to float32."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def from_bits(x: jax.Array) -> jax.Array:
    """What `to_bits` was given."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def by_platform(on_cpu: Callable[..., Any], elsewhere: Callable[..., Any]) -> Callable[..., Any]:
    """One function of two lowerings, whose gradient is lowered likewise."""

    # Differentiating `platform_dependent` itself would keep the residuals of both.
    @jax.custom_vjp
    def function(*operands: jax.Array) -> Any:
        return lax.platform_dependent(*operands, cpu=on_cpu, default=elsewhere)

    def forward(*operands: jax.Array) -> tuple[jax.Array, Any]:
        return function(*operands), operands

    def backward(operands: Any, gradient: Any) -> Any:
        return lax.platform_dependent(
            gradient, *operands, cpu=_pullback(on_cpu), default=_pullback(elsewhere)
        )

    function.defvjp(forward, backward)
    return function


def _convolution(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    # HIGHEST keeps float32 what it says where an accelerator would round its inputs to 10 bits (TF32).
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )


def _product(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    x = x[:, ::stride, ::stride]
    # As matrices, or XLA transposes the gradient for the kernel's in memory: 645 ms of ResNet-50's step.
    return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], kernel.shape[-1])


def _output_size(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> tuple[int, int]:
    height, width = ((x.shape[i + 1] + 2 * padding - kernel.shape[i]) // stride + 1 for i in range(2))
    return height, width


def _patch_product(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """What each output sees as a row, times the kernel as a matrix."""
    height, width = _output_size(x, kernel, stride, padding)
    around = (padding, padding)
    x = jnp.pad(x, ((0, 0), around, around, (0, 0)))
    patches = [
        x[:, i:, j:][:, ::stride, ::stride][:, :height, :width]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]
    matrix = kernel.reshape(-1, kernel.shape[-1])
    product = jnp.concatenate(patches, axis=-1).reshape(-1, len(matrix)) @ matrix
    return product.reshape(x.shape[0], height, width, kernel.shape[-1])


def _sum_of_products(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """Over the places in the kernel: what the outputs see there, as rows, times the place's matrix."""
    height, width = _output_size(x, kernel, stride, padding)
    around = (padding, padding)
    bits = to_bits(jnp.pad(x.astype(kernel.dtype), ((0, 0), around, around, (0, 0))))
    extent = (x.shape[0], (height - 1) * stride + 1, (width - 1) * stride + 1, x.shape[-1])

    def add(total: jax.Array, place: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        row, column, matrix = place
        seen = lax.dynamic_slice(bits, (0, row, column, 0), extent)[:, ::stride, ::stride]
        rows = from_bits(seen).reshape(-1, seen.shape[-1])
        return total + jnp.matmul(rows, from_bits(matrix), preferred_element_type=jnp.float32), None

    # A loop: unrolled, the network takes twice as long to compile, and is no faster.
    places = np.indices(kernel.shape[:2], np.int32).reshape(2, -1)
    matrices = to_bits(kernel).reshape(-1, *kernel.shape[2:])
    start = jnp.zeros((x.shape[0] * height * width, kernel.shape[-1]), jnp.float32)
    total, _ = lax.scan(add, start, (*places, matrices))
    return total.reshape(x.shape[0], height, width, kernel.shape[-1])


def _pullback(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    return lambda gradient, *operands: jax.vjp(function, *operands)[1](gradient)


def _window_maximum(x: jax.Array) -> jax.Array:
    # A literal, not an array, as its start: only then has this operation a gradient.
    around = ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), around)


@jax.custom_vjp
def _max_pool_with_own_gradient(x: jax.Array) -> jax.Array:
    return _window_maximum(x)


def _max_pool_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    """Each value gathers from the windows that it lies in; XLA's scatter takes five times as long."""
    height, width = gradient.shape[1:3]
    place = jnp.pad(_place_of_maximum(x, height, width), ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=9)
    gradient = jnp.pad(gradient, ((0, 0), (0, 1), (0, 1), (0, 0)))

    def gathered(row: int, column: int) -> jax.Array:
        """The gradient of the values in even (0) or odd (1) rows and columns."""
        total = jnp.zeros((), x.dtype)
        for i, below in _WINDOWS[row]:
            for j, right in _WINDOWS[column]:
                window = (slice(None), slice(below, below + height), slice(right, right + width))
                total += jnp.where(place[window] == 3 * i + j, gradient[window], 0)
        return total

    rows = [jnp.stack([gathered(row, column) for column in (0, 1)], axis=3) for row in (0, 1)]
    B, H, W, C = x.shape
    return (jnp.stack(rows, axis=2).reshape(B, 2 * height, 2 * width, C)[:, :H, :W],)


# Of an even and of an odd row: its place in each window that it lies in, and which window after the first.
_WINDOWS = (((1, 0),), ((2, 0), (0, 1)))


def _place_of_maximum(x: jax.Array, height: int, width: int) -> jax.Array:
    """int32: where in its window, 0 to 8 row by row, the first of the largest values stands."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    values = [x[:, i::2, j::2][:, :height, :width] for i in range(3) for j in range(3)]
    largest, place = values[0], jnp.zeros(values[0].shape, jnp.int32)
    for index, value in enumerate(values[1:], start=1):
        place = jnp.where(value > largest, index, place)
        largest = jnp.maximum(largest, value)
    return place


_max_pool_with_own_gradient.defvjp(lambda x: (_window_maximum(x), x), _max_pool_backward)

"""One convolution and one max pool, lowered as suits platform and shape; training and scoring both use them.

Accelerators run XLA's own convolutions. On CPU three kinds of those are slow, each by the measurements of
`python -m benchmarks.convolution`, and have a stand-in: 1x1 convolutions, those of very small pictures, and
(by `compiler_options`) gradients with respect to kernels. Where kernels are bfloat16 and activations float32,
convolutions are sums of products: CPUs that multiply bfloat16 do so at twice the rate of float32, but XLA
uses that in dots alone.

The gradient of a max pool is our own everywhere. XLA scatters it: one value after another on CPU, on GPUs by
atomic additions, with four int32 indices a window.
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
        return _by_platform(partial(_product, stride=stride), convolution)(x, kernel)
    if math.prod(_output_size(x, kernel, stride, padding)) <= MAX_PATCHES:
        return _by_platform(partial(_patch_product, stride=stride, padding=padding), convolution)(x, kernel)
    return convolution(x, kernel)


def max_pool(x: jax.Array) -> jax.Array:
    """The largest of each 3x3 window of [B, H, W, C], at stride 2 with one row and column around it.

    Returns:
        [B, (H + 1) // 2, (W + 1) // 2, C] in the dtype of `x`. Of equal largest values the first has the
        gradient.
    """
    return _max_pool(x, x.shape[1:3])


def to_bits(x: jax.Array) -> jax.Array:
    """bfloat16 as uint16, to be cut: XLA's CPU compiler would first convert all of it to float32."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def from_bits(x: jax.Array) -> jax.Array:
    """What `to_bits` was given."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


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


def _by_platform(on_cpu: Callable[..., Any], elsewhere: Callable[..., Any]) -> Callable[..., Any]:
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


def _pullback(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    return lambda gradient, *operands: jax.vjp(function, *operands)[1](gradient)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    around = ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), around)


def _max_pool_forward(x: jax.Array, size: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Also where in its window, 0 to 8 row by row, the first of the largest values stands."""
    height, width = ((extent + 1) // 2 for extent in size)
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    values = [x[:, i::2, j::2][:, :height, :width] for i in range(3) for j in range(3)]
    largest, place = values[0], jnp.zeros(values[0].shape, jnp.int8)
    for index, value in enumerate(values[1:], start=1):
        place = jnp.where(value > largest, jnp.int8(index), place)
        largest = jnp.maximum(largest, value)
    return largest, place


def _max_pool_backward(size: tuple[int, int], place: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    """Each value gathers from the windows that it lies in, at most two rows and two columns of them."""
    total = jnp.zeros((), gradient.dtype)
    for below, row in enumerate(_places_in_windows(size[0])):
        for right, column in enumerate(_places_in_windows(size[1])):
            own = np.add.outer(3 * row, column)[None, :, :, None]
            seen, weight = (_at_each_value(windows, below, right, size) for windows in (place, gradient))
            total += jnp.where(seen == own, weight, 0)
    return (total,)


def _places_in_windows(extent: int) -> np.ndarray:
    """int8 [2, extent]: where a row stands in window `row // 2` and in the next, far below 0 if outside."""
    odd = np.arange(extent) % 2 == 1
    return np.where(odd, [[2], [0]], [[1], [-9]]).astype(np.int8)


def _at_each_value(windows: jax.Array, below: int, right: int, size: tuple[int, int]) -> jax.Array:
    """[B, H, W, C]: at row i and column j the entry of window (i // 2 + below, j // 2 + right), 0 outside."""
    B, height, width, C = windows.shape
    windows = jnp.pad(windows[:, below:, right:], ((0, 0), (0, below), (0, right), (0, 0)))
    each = jnp.broadcast_to(windows[:, :, None, :, None], (B, height, 2, width, 2, C))
    return each.reshape(B, 2 * height, 2 * width, C)[:, : size[0], : size[1]]


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)

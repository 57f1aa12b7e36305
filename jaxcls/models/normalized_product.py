"""Batch norm of a 1x1 convolution, without the convolution's own output.

Of `y = x @ W`, n rows, all that batch norm has to know is in x and one C x C matrix: with the mean m of
the rows of x and their second moments S = x' x / n, the mean of y is m W and its variance, channel by
channel, the diagonal of W' (S - m m') W. So the statistics are there before the convolution runs, its
kernel takes the factor, and bias, shortcut and ReLU are added where it is computed: y is neither written
nor read again, nor kept for the backward pass. That needs y only in products with W, which are products of
small matrices too:

    sum of g * y           is the diagonal of W' (x' g)
    gradient of y          is a g + s y + t, with a, s and t by channel (arXiv:1502.03167, 3)
    gradient of W          is (x' g) a + n S W s + n m t'
    gradient of x          is g (W a)' + x (W s W') + t W'

It pays where x has fewer channels than y: S takes C / F of the operations of y itself, and x (W s W') as
many. A training step of ResNet-50 then reads and writes 304 MB an image, and a textbook's 391
(`traffic_h200.json`).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcls.models.architecture import BATCH_NORM_EPSILON
from jaxcls.models.convolution import convolve
from jaxcls.models.normalization import Moments, line_of, wide


def normalize_product(
    x: jax.Array,
    kernel: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    shortcut: jax.Array | None = None,
    *,
    relu: bool = False,
) -> tuple[jax.Array, Moments]:
    """`normalize` of `x` convolved with `kernel`.

    Args:
        x: [B, H, W, C]. The variance loses digits where the mean of `x` is much larger than its deviation.
        kernel: float32 [1, 1, C, F].
        scale, bias: float32 [F].
        shortcut: [B, H, W, F] in the dtype of `x`.
        relu: as for `normalize`.

    Returns:
        [B, H, W, F] in the dtype of `x`, to which kernel and level are rounded, and the mean and biased
        variance, float32 [F], of what the convolution alone would make; no gradient flows through these.
    """
    return _normalize_product(x, kernel, scale, bias, shortcut, relu)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _normalize_product(
    x: jax.Array,
    kernel: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    shortcut: jax.Array | None,
    relu: bool,
) -> tuple[jax.Array, Moments]:
    return _forward(x, kernel, scale, bias, shortcut, relu)[0]


def _forward(
    x: jax.Array,
    kernel: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    shortcut: jax.Array | None,
    relu: bool,
) -> tuple[tuple[jax.Array, Moments], Any]:
    matrix, rows = kernel[0, 0], x.reshape(-1, x.shape[-1])
    x_mean, second_moments = jnp.mean(wide(rows), axis=0), _cross(rows, rows) / len(rows)
    covariance = second_moments - jnp.outer(x_mean, x_mean)
    mean = _exact_product(x_mean[None], matrix)[0]
    variance = jnp.maximum(jnp.sum(matrix * _exact_product(covariance, matrix), axis=0), 0)
    moments = mean, variance
    factor, level = line_of(scale, bias, *moments)
    y = convolve(x, (matrix * factor[None]).astype(x.dtype)[None, None])
    y = y + level.astype(x.dtype)[None, None, None]
    if shortcut is not None:
        y = y + shortcut
    if relu:
        # Without the barrier XLA would convolve once more to know what was cut off.
        y = lax.optimization_barrier(jnp.maximum(y, 0))
    residuals = x, kernel, scale, moments, (x_mean, second_moments), y if relu else None
    # Of the shortcut only whether there is one: it is a sum.
    return (y, moments), (*residuals, None if shortcut is None else ())


def _backward(relu: bool, residuals: Any, gradients: tuple[jax.Array, Moments]) -> tuple[Any, ...]:
    x, kernel, scale, (mean, variance), (x_mean, second_moments), y, shortcut = residuals
    gradient = gradients[0] if y is None else jnp.where(y > 0, gradients[0], 0)
    matrix, rows = kernel[0, 0], x.reshape(-1, x.shape[-1])
    product = _cross(rows, gradient.reshape(-1, gradient.shape[-1]))
    inverse = lax.rsqrt(variance + BATCH_NORM_EPSILON)
    bias_gradient = jnp.sum(wide(gradient), axis=(0, 1, 2))
    scale_gradient = inverse * (jnp.sum(matrix * product, axis=0) - mean * bias_gradient)
    # The gradient of what the convolution alone would make is `factor * gradient + slope * it + level`.
    factor = scale * inverse
    slope = -factor * inverse * scale_gradient / len(rows)
    level = -factor * bias_gradient / len(rows) - slope * mean
    kernel_gradient = product * factor[None] + len(rows) * (
        _exact_product(second_moments, matrix) * slope[None] + jnp.outer(x_mean, level)
    )
    back = (matrix * factor[None]).T.astype(x.dtype)
    again = _exact_product(matrix * slope[None], matrix.T).astype(x.dtype)
    # The sum over all rows is 0, also by the matrices as they were rounded: what is left of it would be the
    # same in every row, and the layers before would add that up.
    constant = -_exact_product(x_mean[None], wide(again)) - _exact_product(
        bias_gradient[None] / len(rows), wide(back)
    )
    parts = convolve(x, again[None, None]), convolve(gradient, back[None, None])
    x_gradient = (wide(parts[0]) + wide(parts[1]) + constant[None, None]).astype(x.dtype)
    return (
        x_gradient,
        kernel_gradient[None, None],
        scale_gradient,
        bias_gradient,
        None if shortcut is None else gradient,
    )


_normalize_product.defvjp(_forward, _backward)


def _cross(a: jax.Array, b: jax.Array) -> jax.Array:
    """The sum over the rows of the outer products of two matrices' rows, in float32 at least."""
    precision = None if a.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), precision=precision, preferred_element_type=dtype)


def _exact_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Of small matrices: in float32, where an accelerator would round their entries to 10 bits."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)

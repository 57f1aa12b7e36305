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

It pays where x has fewer channels than y: S takes C / F of the operations of y itself, and x S W' as many,
while of 362 MB an image that a training step of ResNet-50 would read and write, 302 are left
(`traffic_h200.json`).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcls.models.architecture import BATCH_NORM_EPSILON
from jaxcls.models.convolution import convolve
from jaxcls.models.normalization import Moments, wide


def normalize_product(
    x: jax.Array,
    kernel: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    shortcut: jax.Array | None = None,
    *,
    relu: bool = False,
) -> tuple[jax.Array, Moments]:
    """`normalize` of `x` [B, H, W, C] convolved with `kernel`, float32 [1, 1, C, F].

    Returns:
        [B, H, W, F] in the dtype of `x`, and the mean and biased variance, float32 [F], of what the
        convolution alone would make; no gradient flows through these.
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
    x_mean = jnp.mean(wide(rows), axis=0)
    second = _cross(rows, rows) / len(rows)
    mean = x_mean @ matrix
    covariance = second - jnp.outer(x_mean, x_mean)
    variance = jnp.maximum(jnp.sum(matrix * _small(covariance, matrix), axis=0), 0)
    factor = lax.rsqrt(variance + BATCH_NORM_EPSILON) * scale
    folded = (matrix * factor[None]).astype(x.dtype)
    # By the kernel as it was rounded: its error would move whole channels.
    level = bias - _small(x_mean[None], wide(folded))[0]
    y = convolve(x, folded[None, None]) + level.astype(x.dtype)[None, None, None]
    if shortcut is not None:
        y = y + shortcut
    if relu:
        y = jnp.maximum(y, 0)
    # Without the barrier XLA would convolve once more for the backward pass.
    y = lax.optimization_barrier(y)
    moments = mean, variance
    residuals = x, kernel, scale, moments, (x_mean, second), y if relu else None
    # Of the shortcut only whether there is one: it is a sum.
    return (y, moments), (*residuals, None if shortcut is None else ())


def _backward(relu: bool, residuals: Any, gradients: tuple[jax.Array, Moments]) -> tuple[Any, ...]:
    x, kernel, scale, (mean, variance), (x_mean, second), y, shortcut = residuals
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
        _small(second, matrix) * slope[None] + jnp.outer(x_mean, level)
    )
    back = (matrix * factor[None]).T.astype(x.dtype)
    again = _small(matrix * slope[None], matrix.T).astype(x.dtype)
    constant = _small(level[None], matrix.T)[0].astype(x.dtype)
    x_gradient = (
        convolve(x, again[None, None]) + constant[None, None, None] + convolve(gradient, back[None, None])
    )
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
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), precision=precision, preferred_element_type=wide)


def _small(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)

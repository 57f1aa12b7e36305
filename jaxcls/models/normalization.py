"""Batch norm together with what follows it in a ResNet: a shortcut is added, and ReLU cuts off.

Both are written so that XLA passes over the activations as rarely as it can. By itself it differentiates
batch norm into one pass for each sum, computes the output of a block a second time to know where ReLU cut
it off, and on CPU keeps `x - mean` of every layer. `python -m benchmarks.traffic` counts what an
accelerator would read and write.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcls.models.architecture import BATCH_NORM_EPSILON

Moments = tuple[jax.Array, jax.Array]


def normalize(
    x: jax.Array, scale: jax.Array, bias: jax.Array, shortcut: jax.Array | None = None, *, relu: bool = False
) -> tuple[jax.Array, Moments]:
    """Batch norm by the statistics of `x` itself, then shortcut and ReLU.

    Args:
        x: [B, H, W, C].
        scale, bias: the deviation and mean that each channel is given, float32 [C].
        shortcut: added afterwards, like `x` in shape and dtype.
        relu: then let nothing below zero through.

    Returns:
        [B, H, W, C] in the dtype of `x`, and the mean and biased variance of `x`, float32 [C], through
        which no gradient flows.
    """
    return _normalize(x, scale, bias, shortcut, relu)


def line_of(
    scale: jax.Array, bias: jax.Array, mean: jax.Array, variance: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The factor and level, float32 [C], for which `factor * x + level` is batch norm by these moments."""
    factor = lax.rsqrt(variance + BATCH_NORM_EPSILON) * scale
    return factor, bias - factor * mean


def finish(x: jax.Array, level: jax.Array, shortcut: jax.Array | None, *, relu: bool) -> jax.Array:
    """What is left of batch norm where its factor is in the kernel: the level, then shortcut and ReLU.

    Args:
        x: [B, H, W, C].
        level: float32 [C]; rounded to the dtype of `x`, or cuDNN would not add it within a convolution.
        shortcut: like `x` in shape and dtype.
        relu: let nothing below zero through.

    Returns:
        Like `x`.
    """
    x = _add_level(x, level)
    x = x if shortcut is None else shortcut + x
    return _relu(x) if relu else x


@jax.custom_vjp
def _add_level(x: jax.Array, level: jax.Array) -> jax.Array:
    return x + _row(level.astype(x.dtype))


def _add_level_forward(x: jax.Array, level: jax.Array) -> tuple[jax.Array, None]:
    return _add_level(x, level), None


def _add_level_backward(_: None, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gradient, jnp.sum(wide(gradient), axis=(0, 1, 2))  # not in the dtype of `x`


_add_level.defvjp(_add_level_forward, _add_level_backward)


@jax.custom_vjp
def _relu(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0)


def _relu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    # The output tells as well what was cut off, and is kept anyway: the next convolution needs it.
    y = lax.optimization_barrier(_relu(x))
    return y, y


def _relu_backward(y: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(y > 0, gradient, 0),)


_relu.defvjp(_relu_forward, _relu_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _normalize(
    x: jax.Array, scale: jax.Array, bias: jax.Array, shortcut: jax.Array | None, relu: bool
) -> tuple[jax.Array, Moments]:
    return _forward(x, scale, bias, shortcut, relu)[0]


def _forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, shortcut: jax.Array | None, relu: bool
) -> tuple[tuple[jax.Array, Moments], Any]:
    moments = _moments(x)
    y = _line(x, *line_of(scale, bias, *moments)).astype(x.dtype)
    if shortcut is not None:
        y = shortcut + y
    if relu:
        y = jnp.maximum(y, 0)
    kept = None
    if relu and shortcut is not None:
        # Without the barrier XLA would compute the sum again from both its terms, and read one array more.
        # Where there is no shortcut, `x` tells what was cut off, and is read again anyway.
        kept = y = lax.optimization_barrier(y)
    # Of the shortcut only whether there is one: it is a sum.
    return (y, moments), (x, scale, bias, moments, kept, None if shortcut is None else ())


def _backward(relu: bool, residuals: Any, gradients: tuple[jax.Array, Moments]) -> tuple[Any, ...]:
    """Two passes: sums of the gradient over each channel, then the gradient of `x` (arXiv:1502.03167, 3)."""
    x, scale, bias, (mean, variance), y, shortcut = residuals
    gradient = gradients[0]
    if relu:
        passed = y if y is not None else _line(x, *line_of(scale, bias, mean, variance))
        gradient = jnp.where(passed > 0, gradient, 0)
    shortcut_gradient = None if shortcut is None else gradient
    gradient = wide(gradient)
    inverse = lax.rsqrt(variance + BATCH_NORM_EPSILON)
    bias_gradient = jnp.sum(gradient, axis=(0, 1, 2))
    scale_gradient = jnp.sum(gradient * (x - _row(mean)), axis=(0, 1, 2)) * inverse
    share = 1 / (x.size // x.shape[-1])
    # Not `x - mean`: XLA's CPU compiler would share it with the sum, and keep it in memory.
    slope = -share * scale_gradient * inverse
    level = -share * bias_gradient - slope * mean
    x_gradient = _row(scale * inverse) * (gradient + _line(x, slope, level))
    return x_gradient.astype(x.dtype), scale_gradient, bias_gradient, shortcut_gradient


_normalize.defvjp(_forward, _backward)


def _moments(x: jax.Array) -> Moments:
    """Mean and biased variance, in float32 at least; rounding makes no variance negative."""
    x = wide(x)
    mean = jnp.mean(x, axis=(0, 1, 2))
    return mean, jnp.maximum(jnp.mean(lax.square(x), axis=(0, 1, 2)) - lax.square(mean), 0)


def _line(x: jax.Array, factor: jax.Array, level: jax.Array) -> jax.Array:
    return x * _row(factor) + _row(level)


def wide(x: jax.Array) -> jax.Array:
    """In float32 at least: sums are."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _row(vector: jax.Array) -> jax.Array:
    """[C] as [1, 1, 1, C]."""
    return vector[None, None, None]

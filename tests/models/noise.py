"""Noise as operands, and gradients of what layers make of it."""

import jax
import numpy as np

from jaxcls.models.convolution import compiler_options


def draw(*shape, seed=0):
    """Normally distributed float32."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def pull_back(function, weights, *operands):
    """Of a function to a value and its moments: both, and the gradients of the value's weighted sum."""

    def loss(*operands):
        y, moments = function(*operands)
        return (y * weights).sum(), (y, moments)

    gradient = jax.value_and_grad(loss, argnums=tuple(range(len(operands))), has_aux=True)
    (_, (y, moments)), gradients = jax.jit(gradient, compiler_options=compiler_options("cpu"))(*operands)
    return y, *moments, *gradients

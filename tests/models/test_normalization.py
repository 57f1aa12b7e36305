"""Batch norm and its own gradient against torch and JAX's gradient, and which platform gets which."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcls.models import normalization
from jaxcls.models.convolution import compiler_options
from jaxcls.models.normalization import normalize, normalize_by


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


OPERANDS = 3 * draw(4, 5, 6, 8) + 2, draw(8, seed=1), draw(8, seed=2)
WEIGHTS = draw(4, 5, 6, 8, seed=3)


def operations(text):
    """{name: how many}, calls to functions aside."""
    return Counter(re.findall(r"stablehlo\.(multiply|divide|reduce|rsqrt)\b", text))


def pull_back(function, *operands):
    def loss(*operands):
        y, moments = function(*operands)
        return (y * WEIGHTS).sum(), (y, moments)

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, (y, moments)), gradients = jax.jit(gradient, compiler_options=compiler_options("cpu"))(*operands)
    return y, *moments, *gradients


def test_value_moments_and_gradients_agree_with_torch():
    torch = pytest.importorskip("torch", reason="torch is the oracle")
    x, scale, bias = (torch.from_numpy(operand).double().requires_grad_() for operand in OPERANDS)
    y = torch.nn.functional.batch_norm(x.permute(0, 3, 1, 2), None, None, scale, bias, training=True)
    y = y.permute(0, 2, 3, 1)
    (y * torch.from_numpy(WEIGHTS)).sum().backward()
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2), correction=0)
    expected = (y, mean, variance, x.grad, scale.grad, bias.grad)
    for actual, value in zip(pull_back(normalize, *OPERANDS), expected, strict=True):
        value = value.detach().numpy()
        np.testing.assert_allclose(actual, value, rtol=0, atol=2e-5 * np.abs(value).max())


def test_the_moments_pass_no_gradient_on_any_platform():
    for function in (normalization._normalize, normalization._normalize_with_own_gradient):
        gradient = jax.grad(lambda x, function=function: sum(m.sum() for m in function(x, *OPERANDS[1:])[1]))
        assert not np.asarray(gradient(OPERANDS[0])).any()


def test_in_bfloat16_only_the_values_are_rounded():
    x, scale, bias = OPERANDS
    x = x.astype(jnp.bfloat16)
    y, mean, variance, x_gradient, *others = pull_back(normalize, x, scale, bias)
    assert (y.dtype, x_gradient.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert {leaf.dtype for leaf in (mean, variance, *others)} == {np.dtype(np.float32)}
    expected = pull_back(normalization._normalize, x.astype(np.float32), scale, bias)
    for actual, value in zip((y, mean, variance, x_gradient, *others), expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(actual, np.float32), value, rtol=0, atol=0.02 * np.abs(value).max()
        )


def test_the_moments_given_back_give_the_same_values():
    y, moments = normalize(*OPERANDS)
    np.testing.assert_allclose(normalize_by(*OPERANDS, *moments), y, rtol=0, atol=1e-5)


def test_accelerators_keep_the_gradient_of_xla():
    def text(platform, function):
        def gradient(*operands):
            return jax.vjp(lambda *operands: function(*operands)[0], *operands)[1](WEIGHTS)

        return jax.jit(gradient).trace(*OPERANDS).lower(lowering_platforms=(platform,)).as_text()

    forms = normalization._normalize_with_own_gradient, normalization._normalize
    for platform, form in zip(("cpu", "cuda"), forms, strict=True):
        assert operations(text(platform, normalize)) == operations(text(platform, form))
    assert operations(text("cpu", forms[0])) != operations(text("cpu", forms[1]))

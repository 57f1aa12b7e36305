"""Batch norm, shortcut and ReLU with their own gradients against torch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from noise import draw, pull_back

from jaxcls.models.normalization import finish, line_of, normalize

OPERANDS = 3 * draw(4, 5, 6, 8) + 2, draw(8, seed=1), draw(8, seed=2)
SHORTCUT, WEIGHTS = draw(4, 5, 6, 8, seed=4), draw(4, 5, 6, 8, seed=3)
STATISTICS = draw(8, seed=5), np.exp(draw(8, seed=6))
AFTERWARDS = pytest.mark.parametrize(
    ("with_shortcut", "relu"), [(False, False), (False, True), (True, False), (True, True)]
)


def by_stored(x, scale, bias, shortcut=None, *, relu):
    """What a network does by stored statistics, with a convolution that does nothing."""
    factor, level = line_of(scale, bias, *STATISTICS)
    y = finish((x * factor.reshape(1, 1, 1, -1)).astype(x.dtype), level, shortcut, relu=relu)
    return y, STATISTICS


def torchs(operands, *, relu, stored):
    """The same of torch, in float64."""
    torch = pytest.importorskip("torch", reason="torch is the oracle")
    leaves = [torch.from_numpy(np.asarray(operand)).double().requires_grad_() for operand in operands]
    x, scale, bias, *shortcut = leaves
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2), correction=0)
    if stored:
        mean, variance = (torch.from_numpy(statistic).double() for statistic in STATISTICS)
    y = torch.nn.functional.batch_norm(
        x.permute(0, 3, 1, 2), *((mean, variance) if stored else (None, None)), scale, bias, not stored
    )
    y = sum(shortcut, y.permute(0, 2, 3, 1))
    y = y.relu() if relu else y
    (y * torch.from_numpy(WEIGHTS)).sum().backward()
    return [value.detach().numpy() for value in (y, mean, variance, *(leaf.grad for leaf in leaves))]


@AFTERWARDS
@pytest.mark.parametrize("function", [normalize, by_stored], ids=["batch", "stored"])
def test_value_moments_and_gradients_agree_with_torch(function, with_shortcut, relu):
    operands = (*OPERANDS, SHORTCUT) if with_shortcut else OPERANDS
    expected = torchs(operands, relu=relu, stored=function is by_stored)
    for actual, value in zip(
        pull_back(partial(function, relu=relu), WEIGHTS, *operands), expected, strict=True
    ):
        np.testing.assert_allclose(actual, value, rtol=0, atol=2e-5 * np.abs(value).max())


def test_the_moments_pass_no_gradient():
    gradient = jax.grad(lambda x: sum(moment.sum() for moment in normalize(x, *OPERANDS[1:])[1]))
    assert not np.asarray(gradient(OPERANDS[0])).any()


@AFTERWARDS
@pytest.mark.parametrize("function", [normalize, by_stored], ids=["batch", "stored"])
def test_in_bfloat16_no_gradient_of_a_parameter_is_rounded(function, with_shortcut, relu):
    x, *vectors = OPERANDS
    shortcut = [SHORTCUT] if with_shortcut else []
    rounded = [jnp.asarray(operand, jnp.bfloat16) for operand in (x, *shortcut)]
    arguments = (rounded[0], *vectors, *rounded[1:])
    y, mean, variance, x_gradient, *others = pull_back(partial(function, relu=relu), WEIGHTS, *arguments)
    assert {leaf.dtype for leaf in (y, x_gradient, *others[2:])} == {np.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in (mean, variance, *others[:2])} == {np.dtype(np.float32)}
    expected = pull_back(
        partial(function, relu=relu), WEIGHTS, *(leaf.astype(np.float32) for leaf in arguments)
    )
    for actual, value in zip((y, mean, variance, x_gradient, *others), expected, strict=True):
        error = np.abs(np.asarray(actual, np.float32) - value)
        # Where rounding moves a value across zero, ReLU passes or stops all of its gradient.
        assert np.quantile(error, 0.98) <= 0.02 * np.abs(value).max()


def test_a_level_has_the_sum_of_many_gradients_in_float32():
    """Of 40,000 ones: in bfloat16 a sum of ones ends at 256."""
    x = jnp.zeros((4, 100, 100, 1), jnp.bfloat16)
    gradient = jax.grad(lambda level: finish(x, level, None, relu=False).astype(jnp.float32).sum())
    assert gradient(np.zeros(1, np.float32)) == 40_000


def test_equal_moments_give_equal_values():
    y, moments = normalize(*OPERANDS)
    factor, level = line_of(*OPERANDS[1:], *moments)
    expected = finish(OPERANDS[0] * factor.reshape(1, 1, 1, -1), level, None, relu=False)
    np.testing.assert_allclose(expected, y, rtol=0, atol=1e-5)

"""Batch norm of a 1x1 convolution against torch's two layers, and against our own two."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from noise import draw, pull_back

from jaxcls.models.convolution import convolve
from jaxcls.models.normalization import normalize
from jaxcls.models.normalized_product import normalize_product
from jaxcls.parallel import batch_sharding, make_mesh, replicated

X = np.maximum(draw(4, 5, 6, 8) + 0.5, 0)
OPERANDS = X, draw(1, 1, 8, 12, seed=1), draw(12, seed=2), draw(12, seed=3)
SHORTCUT, WEIGHTS = draw(4, 5, 6, 12, seed=4), draw(4, 5, 6, 12, seed=5)
AFTERWARDS = pytest.mark.parametrize("with_shortcut", [False, True], ids=["", "shortcut"])
RELU = pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])


def in_two(x, kernel, scale, bias, shortcut=None, *, relu):
    return normalize(convolve(x, kernel.astype(x.dtype)), scale, bias, shortcut, relu=relu)


@AFTERWARDS
@RELU
def test_value_moments_and_gradients_agree_with_torch(with_shortcut, relu):
    torch = pytest.importorskip("torch", reason="torch is the oracle")
    operands = (*OPERANDS, SHORTCUT) if with_shortcut else OPERANDS
    leaves = [torch.from_numpy(operand).double().requires_grad_() for operand in operands]
    x, kernel, scale, bias, *shortcut = leaves
    product = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1))
    y = torch.nn.functional.batch_norm(product, None, None, scale, bias, training=True)
    y = sum(shortcut, y.permute(0, 2, 3, 1))
    y = y.relu() if relu else y
    (y * torch.from_numpy(WEIGHTS)).sum().backward()
    moments = product.mean((0, 2, 3)), product.var((0, 2, 3), correction=0)
    expected = [value.detach() for value in (y, *moments)] + [leaf.grad for leaf in leaves]
    for actual, value in zip(
        pull_back(partial(normalize_product, relu=relu), WEIGHTS, *operands), expected, strict=True
    ):
        np.testing.assert_allclose(actual, value, rtol=0, atol=3e-5 * np.abs(value.numpy()).max())


@AFTERWARDS
def test_bfloat16_loses_no_more_than_in_two_steps(with_shortcut):
    """Without ReLU, which cuts off other values where rounding moves one across zero."""
    shortcut = (jnp.asarray(SHORTCUT, jnp.bfloat16),) if with_shortcut else ()
    operands = jnp.asarray(X, jnp.bfloat16), *OPERANDS[1:], *shortcut
    exact = [operand.astype(np.float32) for operand in operands]
    expected = pull_back(partial(in_two, relu=False), WEIGHTS, *exact)
    errors = {}
    for function in (normalize_product, in_two):
        results = pull_back(partial(function, relu=False), WEIGHTS, *operands)
        dtypes = [jnp.bfloat16, *[jnp.float32] * 2, jnp.bfloat16, *[jnp.float32] * 3]
        assert [leaf.dtype for leaf in results[:7]] == dtypes
        errors[function] = [
            np.linalg.norm(np.asarray(actual, np.float32) - value) / np.linalg.norm(value)
            for actual, value in zip(results, expected, strict=True)
        ]
    for ours, theirs in zip(errors[normalize_product], errors[in_two], strict=True):
        assert ours < 1.5 * theirs + 1e-3


def test_bfloat16_adds_the_same_to_no_two_pixels():
    """Sums over many pixels, as the layers before take them, of a gradient with a mean of its own."""
    x = np.maximum(draw(16, 28, 28, 32), 0)
    seen, weights = x[..., :1] > 0.3, draw(16, 28, 28, 128, seed=6) + 0.5
    operands = jnp.asarray(x, jnp.bfloat16), draw(1, 1, 32, 128, seed=1), draw(128, seed=2), draw(128, seed=3)

    def sums(function, *operands):
        def loss(x):
            return (function(x, *operands[1:], relu=False)[0] * weights).sum()

        return np.asarray((jax.jit(jax.grad(loss))(operands[0]) * seen).astype(np.float32).sum((0, 1, 2)))

    exact = sums(in_two, *(operand.astype(np.float32) for operand in operands))
    errors = {
        function: np.linalg.norm(sums(function, *operands) - exact) / np.linalg.norm(exact)
        for function in (normalize_product, in_two)
    }
    assert errors[normalize_product] < 1.5 * errors[in_two] < 0.02


def test_several_devices_share_its_sums():
    operands = draw(8, 4, 4, 8), *OPERANDS[1:]

    def value_and_gradients(*operands):
        (y, moments), pull = jax.vjp(partial(normalize_product, relu=True), *operands)
        return y, moments, pull((y + 1, moments))

    mesh = make_mesh(8)
    assert mesh.size > 1
    whole = (replicated(mesh),) * 3
    several = jax.jit(value_and_gradients, in_shardings=(batch_sharding(mesh), *whole))(*operands)
    for actual, expected in zip(
        jax.tree.leaves(several), jax.tree.leaves(jax.jit(value_and_gradients)(*operands)), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_moments_pass_no_gradient():
    gradient = jax.grad(lambda x: sum(moment.sum() for moment in normalize_product(x, *OPERANDS[1:])[1]))
    assert not np.asarray(gradient(X)).any()

"""The lowerings of a convolution and a max pool against torch, and which platform gets which."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from noise import draw

from jaxcls.models import convolution
from jaxcls.models.convolution import compiler_options, convolve, max_pool


def pull_back(function, *operands):
    """The value of a function and the gradients of its sum weighted by noise, compiled as training is."""

    def run(*operands):
        value, pullback = jax.vjp(function, *operands)
        return value, pullback(jnp.asarray(draw(*value.shape, seed=9)))

    return jax.jit(run, compiler_options=compiler_options("cpu"))(*operands)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("picture", [(11, 14), (1, 1), (2, 2), (3, 4), (4, 1)])
@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(1, 1, 0), (1, 2, 0), (1, 1, 1), (3, 1, 1), (3, 2, 1), (7, 2, 3)]
)
def test_value_and_gradients_agree_with_torch(size, stride, padding, picture):
    torch = pytest.importorskip("torch", reason="torch is the oracle")
    x, kernel = draw(2, *picture, 24), draw(size, size, 24, 32, seed=1)
    value, gradients = pull_back(partial(convolve, stride=stride, padding=padding), x, kernel)

    x_torch = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    kernel_torch = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()).requires_grad_()
    y = torch.nn.functional.conv2d(x_torch, kernel_torch, stride=stride, padding=padding)
    weights = draw(*value.shape, seed=9)
    (y * torch.from_numpy(weights.transpose(0, 3, 1, 2).copy())).sum().backward()
    assert_close(value, y.detach().numpy().transpose(0, 2, 3, 1))
    assert_close(gradients[0], x_torch.grad.numpy().transpose(0, 2, 3, 1))
    assert_close(gradients[1], kernel_torch.grad.numpy().transpose(2, 3, 1, 0))


@pytest.mark.parametrize("picture", [(9, 14), (1, 1), (2, 2)])
@pytest.mark.parametrize(
    ("size", "stride", "padding", "channels"),
    [(1, 1, 0, 24), (1, 2, 0, 24), (3, 1, 1, 24), (3, 2, 1, 24), (7, 2, 3, 3)],
)
def test_bfloat16_kernels_round_the_products_alone(size, stride, padding, channels, picture):
    """As XLA convolves rounded values in float32; few channels are not rounded."""
    x, kernel = draw(2, *picture, channels), jnp.asarray(draw(size, size, channels, 32, seed=1), jnp.bfloat16)
    value = jax.jit(partial(convolve, stride=stride, padding=padding))(x, kernel)
    rounded = x if channels == 3 else jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)
    expected = jax.lax.conv_general_dilated(
        rounded,
        kernel.astype(jnp.float32),
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    assert value.dtype == jnp.float32
    assert_close(value, expected)


def test_other_dtypes_are_not_mixed():
    with pytest.raises(TypeError, match="dtype"):
        convolve(jnp.zeros((1, 4, 4, 24), jnp.bfloat16), jnp.zeros((3, 3, 24, 32)), padding=1)


@pytest.mark.parametrize("shape", [(2, 8, 8, 5), (2, 7, 10, 3), (1, 1, 2, 4)])
def test_max_pool_agrees_with_torch_where_values_are_equal(shape):
    torch = pytest.importorskip("torch", reason="torch is the oracle")
    x = np.random.default_rng(0).integers(-2, 2, shape).astype(np.float32)
    value, (gradient,) = pull_back(max_pool, x)
    x_torch = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    y = torch.nn.functional.max_pool2d(x_torch, 3, 2, padding=1)
    (y * torch.from_numpy(draw(*value.shape, seed=9).transpose(0, 3, 1, 2).copy())).sum().backward()
    np.testing.assert_array_equal(value, y.detach().numpy().transpose(0, 2, 3, 1))
    assert_close(gradient, x_torch.grad.numpy().transpose(0, 2, 3, 1))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_value_and_gradients_keep_the_dtype(dtype):
    value, gradients = jax.eval_shape(
        lambda x, kernel: (convolve(x, kernel), jax.vjp(convolve, x, kernel)[1](convolve(x, kernel))),
        jax.ShapeDtypeStruct((2, 4, 4, 8), dtype),
        jax.ShapeDtypeStruct((1, 1, 8, 16), dtype),
    )
    assert {leaf.dtype for leaf in (value, *gradients)} == {np.dtype(dtype)}


def lowered(platform, function, *operands):
    def run(*operands):
        value, pullback = jax.vjp(function, *operands)
        return value, pullback(value)

    return jax.jit(run).trace(*operands).lower(lowering_platforms=(platform,)).as_text()


def test_accelerators_keep_the_convolutions_of_xla():
    x, kernel = draw(2, 8, 8, 8), draw(1, 1, 8, 16)
    counts = {
        platform: lowered(platform, convolve, x, kernel).count("stablehlo.convolution")
        for platform in ("cpu", "cuda")
    }
    assert counts == {"cpu": 0, "cuda": 3}


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_the_gradient_of_a_max_pool_scatters_nothing(platform):
    text = lowered(platform, max_pool, draw(2, 8, 8, 8))
    assert "scatter" not in text


def test_only_the_cpu_has_compiler_options_and_only_known_ones(monkeypatch):
    compiler_options.cache_clear()
    assert compiler_options("cuda", bfloat16_kernels=True) == {}
    assert compiler_options("cpu") != compiler_options("cpu", bfloat16_kernels=True)
    compiler_options.cache_clear()
    monkeypatch.setattr(convolution, "_CPU_OPTIONS", {"xla_cpu_no_such_option": True})
    assert compiler_options("cpu") == {}
    compiler_options.cache_clear()

"""The scoring form of a ResNet: batch norm folded into the convolutions, as plain functions over arrays.

With stored statistics, batch norm is `y * s + t` for `s = scale / sqrt(var + epsilon)` and
`t = bias - mean * s`, channel by channel. It follows a convolution, which is linear: kernel
`k * s` and bias `t` give the same result in one operation less (Jacob et al., arXiv:1712.05877, 3.2).

All blocks of a stage but its first are alike. Their weights are stacked and `lax.scan` runs
over them: compilation takes as long for 36 blocks as for one.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, nn
from jax.typing import DTypeLike

from jaxcls.models.architecture import BATCH_NORM_EPSILON, NUM_STAGES, norm_name
from jaxcls.models.convolution import convolve, max_pool

Weights = Mapping[str, Any]


def fold_batch_norm(variables: Weights, dtype: DTypeLike = np.float32) -> dict[str, Any]:
    """Fold a trunk's `{"params", "batch_stats"}`, on the host and in float64.

    Args:
        variables: as `jaxcls.models.resnet` has them.
        dtype: of the folded kernels; `apply_folded` casts those that are not in its own.

    Returns:
        `{"stem": {"conv"}, "stage1": {"first", "rest"}, ...}` of NumPy arrays. A block is
        `{"conv1": {"kernel", "bias"}, ...}`, with a float32 bias; in `rest` each array has one more
        axis in front, over the blocks.
    """
    params, batch_stats = variables["params"], variables["batch_stats"]
    folded = {"stem": _fold_module(params["stem"], batch_stats["stem"], dtype)}
    for stage in _stages():
        names = [f"block{number}" for number in range(1, len(params[stage]) + 1)]
        first, *rest = [_fold_module(params[stage][name], batch_stats[stage][name], dtype) for name in names]
        folded[stage] = {"first": first, "rest": jax.tree.map(lambda *arrays: np.stack(arrays), *rest)}
    return folded


def apply_folded(weights: Weights, pixels: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Run a folded trunk.

    Args:
        weights: of `fold_batch_norm`.
        pixels: [B, H, W, 3] float32, normalised.
        dtype: of the convolutions and the activations.

    Returns:
        Pooled features [B, D] float32.
    """
    x = nn.relu(_convolve(weights["stem"]["conv"], pixels.astype(dtype), stride=2)).astype(dtype)
    x = max_pool(x)
    for stage in _stages():
        x = _apply_block(weights[stage]["first"], x, stride=1 if stage == "stage1" else 2)
        x, _ = lax.scan(lambda x, block: (_apply_block(block, x), None), x, weights[stage]["rest"])
    return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)


def _stages() -> list[str]:
    return [f"stage{stage}" for stage in range(1, NUM_STAGES + 1)]


def _fold_module(params: Weights, batch_stats: Weights, dtype: DTypeLike) -> dict[str, Any]:
    """{convolution: its kernel and bias} of the stem or one block."""
    return {
        name: _fold(module["kernel"], params[norm_name(name)], batch_stats[norm_name(name)], dtype)
        for name, module in params.items()
        if "kernel" in module
    }


def _fold(kernel: Any, norm: Weights, statistics: Weights, dtype: DTypeLike) -> dict[str, np.ndarray]:
    scale, shift, mean, variance = (
        np.asarray(vector, np.float64)
        for vector in (norm["scale"], norm["bias"], statistics["mean"], statistics["var"])
    )
    factor = scale / np.sqrt(variance + BATCH_NORM_EPSILON)
    # With `out`, NumPy multiplies in float64 piece by piece and makes no float64 copy of the kernel.
    out = np.empty(np.shape(kernel), np.float32)
    folded = np.multiply(kernel, factor.reshape(1, 1, 1, -1), out=out, casting="same_kind")
    return {"kernel": folded.astype(dtype, copy=False), "bias": (shift - mean * factor).astype(np.float32)}


def _apply_block(weights: Weights, x: jax.Array, stride: int = 1) -> jax.Array:
    conv = {name: partial(_convolve, module) for name, module in weights.items()}
    shortcut = conv["shortcut_conv"](x, stride) if "shortcut_conv" in conv else x
    if "conv3" in conv:
        y = nn.relu(conv["conv1"](x)).astype(x.dtype)
        y = nn.relu(conv["conv2"](y, stride)).astype(x.dtype)
        y = conv["conv3"](y)
    else:
        y = nn.relu(conv["conv1"](x, stride)).astype(x.dtype)
        y = conv["conv2"](y)
    return nn.relu(shortcut + y).astype(x.dtype)


def _convolve(weights: Weights, x: jax.Array, stride: int = 1) -> jax.Array:
    """Convolution plus bias, padded to keep the resolution; the sum is float32."""
    kernel = weights["kernel"].astype(x.dtype)
    return (
        convolve(x, kernel, stride=stride, padding=kernel.shape[0] // 2) + weights["bias"][None, None, None]
    )

"""The scoring form of a ResNet: batch norm folded into the convolutions, as plain functions over arrays.

With stored statistics, batch norm is `y * s + t` for `s = scale / sqrt(var + epsilon)` and
`t = bias - mean * s`, channel by channel. It follows a convolution, which is linear: kernel
`k * s` and bias `t` give the same result in one operation less (Jacob et al., arXiv:1712.05877, 3.2).

All blocks of a stage but its first are alike. Their weights are stacked and `lax.scan` runs
over them: compilation takes as long for 36 blocks as for one. In bfloat16 on accelerators the loop is
unrolled, or XLA would copy the activations once a turn; and biases are bfloat16 too, as cuDNN wants them to
add bias and shortcut and cut off within a convolution. So ResNet-50 reads and writes 58 MB an image, a
textbook's 93 (`traffic_h200.json`).

On CPU only products are in bfloat16: `convolve` says how. They are so fast that memory becomes the limit,
unless a few images at a time go through a stage, whose activations then stay in the caches of the cores.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, nn
from jax.typing import DTypeLike

from jaxcls.models.architecture import BATCH_NORM_EPSILON, NUM_STAGES, norm_name
from jaxcls.models.convolution import convolve, from_bits, max_pool, to_bits

Weights = Mapping[str, Any]
Module = dict[str, dict[str, np.ndarray]]
"""{convolution: {"kernel", "bias"}}"""
Stage = Callable[[jax.Array], jax.Array]
PIXELS_AT_ONCE = 224 * 224
"""For each thread of a CPU, in the first stage: activations of 0.8 MB. Two cores of an AMD EPYC with 1 MB of
cache each scored batches of 16 so at 59 instead of 48 images/s with ResNet-18, with ResNet-50 30 and 28."""


def fold_batch_norm(variables: Weights, dtype: DTypeLike = np.float32) -> dict[str, Any]:
    """Fold a trunk's `{"params", "batch_stats"}`, on the host and in float64.

    Args:
        variables: as `jaxcls.models.resnet` has them.
        dtype: of the folded kernels, in which `apply_folded` will compute.

    Returns:
        `{"stem": {"conv"}, "stage1": {"first", "rest"}, ...}` of NumPy arrays. A block is
        `{"conv1": {"kernel", "bias"}, ...}`, with a float32 bias; in `rest` each array has one more
        axis in front, over the blocks.
    """
    stem, stages = _fold_blocks(variables)
    if jnp.dtype(dtype) == jnp.bfloat16:
        _make_biases_bfloat16(stem, stages)
    return _stacked(stem, stages, dtype)


def apply_folded(weights: Weights, pixels: jax.Array, num_at_once: int | None = None) -> jax.Array:
    """Run a folded trunk in the dtype of its kernels; on CPU, activations are float32 if that is bfloat16.

    Args:
        weights: of `fold_batch_norm`.
        pixels: [B, H, W, 3] float32, normalised.
        num_at_once: about how many images go through the first stage at once, as B can be divided; through
            each further stage twice as many. None: all, in one pass.

    Returns:
        Pooled features [B, D] float32.
    """
    dtype = weights["stem"]["conv"]["kernel"].dtype
    trunk = partial(_trunk, dtype=dtype, num_at_once=num_at_once)
    if dtype != jnp.bfloat16:
        return trunk(weights, pixels)
    return lax.platform_dependent(
        weights, pixels, cpu=partial(trunk, dtype=jnp.dtype(jnp.float32)), default=trunk
    )


def is_bfloat16(weights: Any) -> bool:
    """Whether a tree of arrays, or of their shapes, holds kernels folded in bfloat16."""
    return any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(weights))


def fitting_at_once(image_size: int) -> int:
    """How many images of `image_size` pixels square to run through the first stage at once on this CPU."""
    return _num_threads() * max(1, PIXELS_AT_ONCE // image_size**2)


def _num_threads() -> int:
    """What XLA's CPU client will have or has."""
    if limit := os.environ.get("PJRT_NPROC"):
        return int(limit)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _trunk(weights: Weights, pixels: jax.Array, dtype: jnp.dtype, num_at_once: int | None) -> jax.Array:
    def first_stage(pixels: jax.Array) -> jax.Array:
        x = nn.relu(_convolve(weights["stem"]["conv"], pixels, stride=2))
        return _apply_stage(weights["stage1"], max_pool(x), stride=1)

    stages: list[Stage] = [first_stage]
    stages += [partial(_apply_stage, weights[name], stride=2) for name in _stages()[1:]]
    x = pixels.astype(dtype)
    for number, stage in enumerate(stages):
        x = stage(x) if num_at_once is None else _in_parts(stage, x, num_at_once * 2**number)
    return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)


def _in_parts(stage: Stage, x: jax.Array, size: int) -> jax.Array:
    """`stage(x)`, of `size` images at a time, or of the number nearest to it that divides theirs."""
    divisors = [number for number in range(1, len(x) + 1) if len(x) % number == 0]
    size = min(divisors, key=lambda number: abs(math.log(number / size)))
    if size == len(x):
        return stage(x)
    y = lax.map(stage, x.reshape(-1, size, *x.shape[1:]))
    return y.reshape(-1, *y.shape[2:])


def _stages() -> list[str]:
    return [f"stage{stage}" for stage in range(1, NUM_STAGES + 1)]


def _fold_blocks(variables: Weights) -> tuple[Module, dict[str, list[Module]]]:
    """The stem, and the blocks of each stage."""
    params, batch_stats = variables["params"], variables["batch_stats"]
    stages = {
        stage: [
            _fold_module(params[stage][name], batch_stats[stage][name])
            for name in (f"block{number}" for number in range(1, len(params[stage]) + 1))
        ]
        for stage in _stages()
    }
    return _fold_module(params["stem"], batch_stats["stem"]), stages


def _fold_module(params: Weights, batch_stats: Weights) -> Module:
    """Kernels in float32 and biases in float64, of the stem or one block."""
    return {
        name: _fold(module["kernel"], params[norm_name(name)], batch_stats[norm_name(name)])
        for name, module in params.items()
        if "kernel" in module
    }


def _fold(kernel: Any, norm: Weights, statistics: Weights) -> dict[str, np.ndarray]:
    scale, shift, mean, variance = (
        np.asarray(vector, np.float64)
        for vector in (norm["scale"], norm["bias"], statistics["mean"], statistics["var"])
    )
    factor = scale / np.sqrt(variance + BATCH_NORM_EPSILON)
    # With `out`, NumPy multiplies in float64 piece by piece and makes no float64 copy of the kernel.
    out = np.empty(np.shape(kernel), np.float32)
    folded = np.multiply(kernel, factor.reshape(1, 1, 1, -1), out=out, casting="same_kind")
    return {"kernel": folded, "bias": shift - mean * factor}


def _make_biases_bfloat16(stem: Module, stages: Mapping[str, list[Module]]) -> None:
    """Have accelerators round no bias but those that shortcuts pass on: of blocks' outputs, of a basic stem.

    A rounded bias is wrong by the same amount in all pixels, which pooling does not average away: those of
    ResNet-50 made the errors of its logits a quarter larger than rounded kernels and activations do.
    """
    first = stages["stage1"][0]
    if "shortcut_conv" in first:
        _make_bias_bfloat16(stem["conv"], readers=(first["conv1"], first["shortcut_conv"]))
    for block in (block for blocks in stages.values() for block in blocks):
        chain = [block[name] for name in ("conv1", "conv2", "conv3") if name in block]
        for convolution, reader in pairwise(chain):
            _make_bias_bfloat16(convolution, readers=(reader,))


def _make_bias_bfloat16(convolution: dict[str, np.ndarray], readers: Iterable[dict[str, np.ndarray]]) -> None:
    """Scale each channel by up to 1/256, so that its bias is a bfloat16, and have its readers scale back.

    ReLU and max pooling between them commute with a positive factor.
    """
    bias = convolution["bias"]
    rounded = bias.astype(jnp.bfloat16).astype(np.float64)
    possible = (rounded != 0) & np.isfinite(rounded)
    factor = np.divide(rounded, bias, out=np.ones_like(bias), where=possible)
    bias[:] = rounded
    convolution["kernel"] *= factor.astype(np.float32)
    for reader in readers:
        reader["kernel"] /= factor.astype(np.float32)[:, None]


def _stacked(stem: Module, stages: Mapping[str, list[Module]], dtype: DTypeLike) -> dict[str, Any]:
    dtypes = {"kernel": dtype, "bias": np.float32}

    def stacked(path: tuple[Any, ...], *blocks: np.ndarray) -> np.ndarray:
        # Each block before they are joined, or all kernels of a stage would be there twice in float32.
        return np.stack([array.astype(dtypes[path[-1].key], copy=False) for array in blocks])

    def alone(module: Module) -> Module:
        return jax.tree.map_with_path(lambda path, array: stacked(path, array)[0], module)

    return {"stem": alone(stem)} | {
        stage: {"first": alone(first), "rest": jax.tree.map_with_path(stacked, *rest)}
        for stage, (first, *rest) in stages.items()
    }


def _apply_stage(weights: Weights, x: jax.Array, stride: int) -> jax.Array:
    x, rest = _apply_block(weights["first"], x, stride), weights["rest"]
    unrolled = x.dtype == jnp.bfloat16  # activations are that on accelerators alone
    if not unrolled:
        rest = jax.tree.map(to_bits, rest)
    x, _ = lax.scan(
        lambda x, block: (_apply_block(jax.tree.map(from_bits, block), x), None),
        x,
        rest,
        unroll=unrolled,
    )
    return x


def _apply_block(weights: Weights, x: jax.Array, stride: int = 1) -> jax.Array:
    conv = {name: partial(_convolve, module) for name, module in weights.items()}
    shortcut = conv["shortcut_conv"](x, stride) if "shortcut_conv" in conv else x
    if "conv3" in conv:
        y = nn.relu(conv["conv1"](x))
        y = nn.relu(conv["conv2"](y, stride))
        y = conv["conv3"](y)
    else:
        y = nn.relu(conv["conv1"](x, stride))
        y = conv["conv2"](y)
    return nn.relu(shortcut + y)


def _convolve(weights: Weights, x: jax.Array, stride: int = 1) -> jax.Array:
    """Convolution plus bias, padded to keep the resolution, in the dtype of `x`."""
    kernel, bias = weights["kernel"], weights["bias"].astype(x.dtype)
    return convolve(x, kernel, stride=stride, padding=kernel.shape[0] // 2) + bias[None, None, None]

"""ResNet-18/34/50/101/152 (v1.5) in Flax Linen: normalised pixels to pooled features.

The head is not part of the network: logits are `features @ kernel + bias`.
`variables` is `{"params", "batch_stats"}`, all float32, with the modules named
`stem/{conv,norm}` and `stage1..4/block1../{conv1,norm1,...,shortcut_conv,shortcut_norm}`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxcls.errors import UsageError
from jaxcls.models.architecture import (
    BOTTLENECK_EXPANSION,
    NUM_STAGES,
    STEM_FEATURES,
    Architecture,
    abstract_variables,
    find_architecture,
)
from jaxcls.models.convolution import convolve, max_pool
from jaxcls.models.normalization import finish, line_of, normalize
from jaxcls.models.normalized_product import normalize_product

Module = Callable[..., Any]
BATCH_NORM_MOMENTUM = 0.9


class Convolution(nn.Module):
    """A square convolution without bias: its kernel, float32 [size, size, C, F], and how it is applied."""

    features: int
    size: int
    stride: int = 1
    padding: int = 0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def kernel(self, num_inputs: int) -> jax.Array:
        """Its parameter, for C inputs."""
        shape = (self.size, self.size, num_inputs, self.features)
        return self.param("kernel", nn.initializers.lecun_normal(), shape)

    def convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """`x` [B, H, W, C] convolved with a kernel like its own."""
        return convolve(
            x.astype(self.dtype), kernel.astype(self.dtype), stride=self.stride, padding=self.padding
        )

    def widens(self, num_inputs: int) -> bool:
        """Whether it makes more channels of every pixel, and looks at no others."""
        return self.size == self.stride == 1 and self.padding == 0 and num_inputs < self.features


class BatchNorm(nn.Module):
    """A convolution of [B, H, W, C], batch norm of what it makes, then shortcut and ReLU: [B, H', W', F].

    The variables of the norm are float32 [F]; the kernel stays the convolution's.

    Attributes:
        stored: use the stored statistics; else those of the batch, which move the stored ones.
    """

    stored: bool

    @nn.compact
    def __call__(
        self, conv: Convolution, x: jax.Array, shortcut: jax.Array | None = None, *, relu: bool = True
    ) -> jax.Array:
        shape = (conv.features,)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        variance = self.variable("batch_stats", "var", jnp.ones, shape)
        kernel = conv.kernel(x.shape[-1])
        if self.stored:
            # The factor goes into the kernel, so that no pass over the activations is left of the norm.
            factor, level = line_of(scale, bias, mean.value, variance.value)
            return finish(conv.convolve(x, kernel * factor[None, None, None]), level, shortcut, relu=relu)
        if conv.widens(x.shape[-1]):
            y, moments = normalize_product(x.astype(conv.dtype), kernel, scale, bias, shortcut, relu=relu)
        else:
            y, moments = normalize(conv.convolve(x, kernel), scale, bias, shortcut, relu=relu)
        if not self.is_initializing():
            for statistic, moment in zip((mean, variance), moments, strict=True):
                statistic.value = BATCH_NORM_MOMENTUM * statistic.value + (1 - BATCH_NORM_MOMENTUM) * moment
        return y


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; `features` is the width of both."""

    conv: Module
    norm: Module
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # Padding is (1, 1), never SAME: torch pads both sides where SAME with stride 2 pads (0, 1).
        conv1 = self.conv(self.features, 3, self.stride, padding=1, name="conv1")
        conv2 = self.conv(self.features, 3, padding=1, name="conv2")
        y = self.norm(name="norm1")(conv1, x)
        return self.norm(name="norm2")(conv2, y, _shortcut(self, x, conv2.features))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut; `features` is the width of the 3x3."""

    conv: Module
    norm: Module
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv1 = self.conv(self.features, 1, name="conv1")
        conv2 = self.conv(self.features, 3, self.stride, padding=1, name="conv2")
        conv3 = self.conv(BOTTLENECK_EXPANSION * self.features, 1, name="conv3")
        y = self.norm(name="norm1")(conv1, x)
        y = self.norm(name="norm2")(conv2, y)
        return self.norm(name="norm3")(conv3, y, _shortcut(self, x, conv3.features))


def _shortcut(block: BasicBlock | BottleneckBlock, x: jax.Array, features: int) -> jax.Array:
    """`x` itself, or projected where the block changes its width or resolution."""
    if block.stride == 1 and x.shape[-1] == features:
        return x
    conv = block.conv(features, 1, block.stride, name="shortcut_conv")
    return block.norm(name="shortcut_norm")(conv, x, relu=False)


class Stem(nn.Module):
    """7x7 convolution and max pool: a quarter of the resolution, 64 features."""

    conv: Module
    norm: Module

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        conv = self.conv(STEM_FEATURES, 7, 2, padding=3, name="conv")
        return max_pool(self.norm(name="norm")(conv, pixels))


class Stage(nn.Module):
    """A run of blocks at one resolution; the first block changes it by `stride`."""

    block: Module
    num_blocks: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for index in range(self.num_blocks):
            x = self.block(stride=self.stride if index == 0 else 1, name=f"block{index + 1}")(x)
        return x


class ResNet(nn.Module):
    """The trunk: pixels [B, H, W, 3] -> pooled features [B, D], float32 or wider. See `make_apply`."""

    architecture: Architecture
    dtype: DTypeLike = jnp.float32
    batch_norm: Literal["train", "frozen"] = "train"
    num_frozen_stages: int = 0

    @nn.compact
    def __call__(self, pixels: jax.Array, train: bool) -> jax.Array:
        conv = partial(Convolution, dtype=self.dtype)
        block = BottleneckBlock if self.architecture.bottleneck else BasicBlock

        def norm_of(stage: int) -> Module:
            stored = not train or self.batch_norm == "frozen" or stage <= self.num_frozen_stages
            return partial(BatchNorm, stored)

        x = Stem(conv, norm_of(1), name="stem")(pixels)
        for stage, num_blocks in enumerate(self.architecture.stage_sizes, start=1):
            features = STEM_FEATURES * 2 ** (stage - 1)
            stage_block = partial(block, conv, norm_of(stage), features)
            x = Stage(stage_block, num_blocks, stride=1 if stage == 1 else 2, name=f"stage{stage}")(x)
            if stage == self.num_frozen_stages:
                x = lax.stop_gradient(x)
        return jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(self.dtype, jnp.float32))


class Apply(Protocol):
    """A ResNet trunk as a pure function.

    Args:
        variables: `{"params", "batch_stats"}`.
        pixels: [B, H, W, 3] float32, normalised.
        train: batch norm uses the batch's statistics and updates the stored ones; a Python bool.

    Returns:
        features [B, D] float32, and batch_stats, which come back unchanged unless training updated them.
    """

    def __call__(
        self, variables: Mapping[str, Any], pixels: jax.Array, train: bool
    ) -> tuple[jax.Array, Any]: ...


def make_apply(
    architecture: str,
    *,
    dtype: DTypeLike = jnp.float32,
    batch_norm: Literal["train", "frozen"] = "train",
    num_frozen_stages: int = 0,
) -> Apply:
    """Make `apply(variables, pixels, train) -> (features, batch_stats)` for one architecture.

    The stored variance follows the batch's biased variance, as Flax has it; torch
    stores the unbiased one. They differ by 1/(n - 1) for n = B * H * W values a channel.

    Args:
        architecture: a key of `ARCHITECTURES`.
        dtype: of the convolutions and activations. Parameters, statistics and features stay float32.
        batch_norm: "frozen" uses the stored statistics in training too, and never updates them.
        num_frozen_stages: 0 to 4. The stem and that many stages use the stored statistics
            and pass no gradient; 0 freezes nothing, 4 the whole trunk.

    Raises:
        UsageError: an option outside these values.
    """
    if batch_norm not in ("train", "frozen"):
        raise UsageError(f"batch_norm is {batch_norm!r}: use 'train' or 'frozen'")
    _check_num_frozen_stages(num_frozen_stages)
    network = ResNet(find_architecture(architecture), dtype, batch_norm, num_frozen_stages)

    def apply(variables: Mapping[str, Any], pixels: jax.Array, train: bool) -> tuple[jax.Array, Any]:
        features, updates = network.apply(variables, pixels, train, mutable=["batch_stats"] if train else [])
        return features, updates["batch_stats"] if train else variables["batch_stats"]

    return apply


def init_variables(architecture: str, key: jax.Array) -> dict[str, Any]:
    """Draw random `{"params", "batch_stats"}` as NumPy arrays: He normal (fan out) kernels, scale 1, shift 0.

    Raises:
        UsageError: an unknown architecture.
    """
    # NumPy's generator: XLA would compile a draw for every shape of kernel, some 10 s.
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        match path[-1].key:
            case "kernel":
                height, width, _, features = leaf.shape
                scale = np.float32(np.sqrt(2 / (height * width * features)))
                return scale * generator.standard_normal(leaf.shape, np.float32)
            case "scale" | "var":
                return np.ones(leaf.shape, np.float32)
            case _:
                return np.zeros(leaf.shape, np.float32)

    return jax.tree.map_with_path(draw, abstract_variables(architecture))


def frozen_param_mask(params: Mapping[str, Any], num_frozen_stages: int) -> Any:
    """Tell which of a trunk's `params` `num_frozen_stages` freezes: a tree of bools, True where frozen.

    Raises:
        UsageError: `num_frozen_stages` is not 0 to 4.
    """
    _check_num_frozen_stages(num_frozen_stages)
    stages = [f"stage{stage + 1}" for stage in range(num_frozen_stages)]
    frozen = {"stem", *stages} if stages else set()
    return {name: jax.tree.map(lambda _, name=name: name in frozen, tree) for name, tree in params.items()}


def _check_num_frozen_stages(num_frozen_stages: int) -> None:
    if not 0 <= num_frozen_stages <= NUM_STAGES:
        raise UsageError(f"num_frozen_stages is {num_frozen_stages}: use 0 (nothing) to {NUM_STAGES} (all)")

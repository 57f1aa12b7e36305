"""The ResNets by name: depths, and the shapes of their variables. Needs no Flax, which is slow to load."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from jaxcls.errors import UsageError

NUM_STAGES = 4
STEM_FEATURES = 64
BOTTLENECK_EXPANSION = 4
BATCH_NORM_EPSILON = 1e-5

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Architecture:
    """The depth of a ResNet.

    Args:
        stage_sizes: number of blocks in each of the four stages.
        bottleneck: 1x1, 3x3, 1x1 blocks with four times as many output features, instead of two 3x3.
    """

    stage_sizes: tuple[int, ...]
    bottleneck: bool

    @property
    def num_features(self) -> int:
        """D, the width of the pooled features: 512, or 2048 with bottlenecks."""
        return STEM_FEATURES * 2 ** (NUM_STAGES - 1) * (BOTTLENECK_EXPANSION if self.bottleneck else 1)


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "resnet18": Architecture((2, 2, 2, 2), bottleneck=False),
        "resnet34": Architecture((3, 4, 6, 3), bottleneck=False),
        "resnet50": Architecture((3, 4, 6, 3), bottleneck=True),
        "resnet101": Architecture((3, 4, 23, 3), bottleneck=True),
        "resnet152": Architecture((3, 8, 36, 3), bottleneck=True),
    }
)


def find_architecture(name: str) -> Architecture:
    """The row of `ARCHITECTURES`.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in ARCHITECTURES:
        raise UsageError(f"there is no architecture {name!r}: use one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


@cache
def abstract_variables(architecture: str) -> dict[str, Any]:
    """The tree of `{"params", "batch_stats"}` with `jax.ShapeDtypeStruct` leaves. Not to be changed.

    Raises:
        UsageError: an unknown architecture.
    """
    depth = find_architecture(architecture)
    kernels: dict[str, Any] = {"stem": {"conv": (7, 7, 3, STEM_FEATURES)}}
    inputs = STEM_FEATURES
    for stage, num_blocks in enumerate(depth.stage_sizes, start=1):
        kernels[f"stage{stage}"] = blocks = {}
        for block in range(1, num_blocks + 1):
            shapes = _block_kernels(depth.bottleneck, inputs, STEM_FEATURES * 2 ** (stage - 1))
            blocks[f"block{block}"] = shapes
            inputs = shapes["conv3" if depth.bottleneck else "conv2"][-1]
    params, batch_stats = _with_batch_norm(kernels)
    return {"params": params, "batch_stats": batch_stats}


def norm_name(conv: str) -> str:
    """The batch norm that follows a convolution: "norm1" after "conv1"."""
    return conv.replace("conv", "norm")


def _block_kernels(bottleneck: bool, inputs: int, features: int) -> Mapping[str, Shape]:
    """{convolution: the shape of its kernel} of one block; `features` is the width of its 3x3."""
    if bottleneck:
        outputs = BOTTLENECK_EXPANSION * features
        shapes = {
            "conv1": (1, 1, inputs, features),
            "conv2": (3, 3, features, features),
            "conv3": (1, 1, features, outputs),
        }
    else:
        outputs = features
        shapes = {"conv1": (3, 3, inputs, features), "conv2": (3, 3, features, features)}
    # The stride changes with the width, so the width alone tells where a projection is.
    return shapes if inputs == outputs else shapes | {"shortcut_conv": (1, 1, inputs, outputs)}


def _with_batch_norm(kernels: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`params` and `batch_stats` of a tree of kernel shapes, with a batch norm after every convolution."""
    params: dict[str, Any] = {}
    batch_stats: dict[str, Any] = {}
    for name, entry in kernels.items():
        if isinstance(entry, Mapping):
            params[name], batch_stats[name] = _with_batch_norm(entry)
        else:
            vector = jax.ShapeDtypeStruct(entry[-1:], np.float32)
            params[name] = {"kernel": jax.ShapeDtypeStruct(entry, np.float32)}
            params[norm_name(name)] = {"scale": vector, "bias": vector}
            batch_stats[norm_name(name)] = {"mean": vector, "var": vector}
    return params, batch_stats

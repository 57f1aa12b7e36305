"""The dtype that convolutions compute in, and the platforms. Loads JAX only when asked for it."""

from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from jaxcls.errors import UsageError

Precision = Literal["auto", "float32", "bfloat16"]
Platform = Literal["cpu", "cuda"]
PLATFORMS: tuple[Platform, ...] = get_args(Platform)
MIN_BFLOAT16_SIZE = 128
"""Smaller pictures have so few pixels in the late stages that packing the kernels for each product takes the
longest: on two cores of an AMD EPYC, ResNet-50 scored one of 32 px 0.34 times as fast as in float32, of 96 px
0.63, of 128 px 0.81 and of 224 px 1.02 times; 16 at once 0.80, 1.29, 1.31 and 1.5 times."""
_CPU_INFO = Path("/proc/cpuinfo")


def compute_dtype(precision: Precision, platform: str | None = None) -> Any:
    """A JAX dtype; "auto": bfloat16 on accelerators, float32 on CPU.

    A CPU trains no faster in bfloat16, and on which one a program written for CPUs will run is not known.

    Args:
        precision: what was asked for.
        platform: where the convolutions will run; None for JAX's default here.
    """
    import jax
    import jax.numpy as jnp

    if precision not in get_args(Precision):
        raise UsageError(f"precision {precision!r}: choose one of {', '.join(get_args(Precision))}")
    if precision == "auto":
        precision = "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[precision]


def scoring_dtype(precision: Precision, image_size: int) -> str:
    """The name of a dtype; "auto": as `compute_dtype`, but bfloat16 also where a CPU gains by it.

    Args:
        precision: what was asked for.
        image_size: of the network's input, in pixels.
    """
    import jax
    import numpy as np

    large = image_size >= MIN_BFLOAT16_SIZE
    if precision == "auto" and large and jax.default_backend() == "cpu" and cpu_multiplies_bfloat16():
        precision = "bfloat16"
    return np.dtype(compute_dtype(precision)).name


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether Linux says that this CPU has AVX512_BF16, which those with AMX have too."""
    return _CPU_INFO.exists() and " avx512_bf16" in _CPU_INFO.read_text()

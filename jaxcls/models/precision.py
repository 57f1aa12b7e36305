"""The dtype that convolutions compute in, and the platforms. Loads JAX only when asked for it."""

from typing import Any, Literal, get_args

from jaxcls.errors import UsageError

Precision = Literal["auto", "float32", "bfloat16"]
Platform = Literal["cpu", "cuda"]
PLATFORMS: tuple[Platform, ...] = get_args(Platform)


def compute_dtype(precision: Precision, platform: str | None = None) -> Any:
    """A JAX dtype; "auto": bfloat16 on accelerators, float32 on CPU, where XLA runs bfloat16 badly.

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

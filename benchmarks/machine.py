"""What the machine can do, measured: matrix products and copies on one device. And floors from that."""

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

from benchmarks.worker import Task

DTYPES = ("float32", "bfloat16")
NUM_ROUNDS = 5
NUM_CALLS = 5
# Large enough to be far from caches and launch times.
MATRIX_SIZES = {"cpu": 2048, "gpu": 8192}
COPY_BYTES = {"cpu": 2**28, "gpu": 2**31}
TINY_MATRIX_SIZES = {"cpu": 256, "gpu": 256}
TINY_COPY_BYTES = {"cpu": 2**20, "gpu": 2**20}


def probe(_: Task) -> dict[str, Any]:
    """Conditions of this machine, FLOP/s by dtype, and bytes/s of a copy, read and written both counted."""
    return _probe(MATRIX_SIZES, COPY_BYTES)


def rough_probe(_: Task) -> dict[str, Any]:
    """The same at sizes that take no time and say little."""
    return _probe(TINY_MATRIX_SIZES, TINY_COPY_BYTES)


def _probe(matrix_sizes: Mapping[str, int], copy_bytes: Mapping[str, int]) -> dict[str, Any]:
    from experiments.recording import conditions  # loads JAX; `floor` runs without

    found = conditions()
    platform = "cpu" if found["platform"] == "cpu" else "gpu"
    size, num_bytes = matrix_sizes[platform], copy_bytes[platform]
    return {
        "conditions": found,
        "matmul_flops_per_second": {dtype: matmul_rate(size, dtype) for dtype in DTYPES},
        "copy_bytes_per_second": copy_rate(num_bytes),
        "matrix_size": size,
        "copy_bytes": num_bytes,
    }


def matmul_rate(size: int, dtype: str) -> float:
    """FLOP/s of a square product of random matrices, at the precision that its dtype says, to float32."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), jnp.dtype(dtype)) for key in keys)
    precision = "highest" if dtype == "float32" else "default"
    multiply = jax.jit(lambda a, b: jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32))
    return 2 * size**3 / _seconds(multiply, a, b)


def copy_rate(num_bytes: int) -> float:
    """Bytes/s that a large array's elementwise copy reads and writes."""
    import jax
    import jax.numpy as jnp

    values = jnp.zeros(num_bytes // 4, jnp.float32)
    return 2 * num_bytes / _seconds(jax.jit(lambda values: values + 1), values)


def _seconds(function: Any, *arguments: Any) -> float:
    """Median seconds of a call, several calls to a round."""
    import jax

    jax.block_until_ready(function(*arguments))
    rounds = []
    for _ in range(NUM_ROUNDS):
        start = time.perf_counter()
        for _ in range(NUM_CALLS):
            result = function(*arguments)
        jax.block_until_ready(result)
        rounds.append((time.perf_counter() - start) / NUM_CALLS)
    return median(rounds)


def floor(cost: Mapping[str, Any], step_seconds: float, machine: Mapping[str, Any]) -> dict[str, float]:
    """How near a step comes to what the machine allows.

    Args:
        cost: `flops` and `bytes` of a step on one device, and its `dtype`.
        step_seconds: as measured.
        machine: as `probe` gives it.

    Returns:
        The least seconds by arithmetic and by traffic; `mfu` and `bandwidth_share`, the shares of
        the measured rates that the step reaches; and `share`, of the larger of both floors.
    """
    flops_seconds = cost["flops"] / machine["matmul_flops_per_second"][cost["dtype"]]
    bytes_seconds = cost["bytes"] / machine["copy_bytes_per_second"]
    return {
        "flops_seconds": flops_seconds,
        "bytes_seconds": bytes_seconds,
        "mfu": flops_seconds / step_seconds,
        "bandwidth_share": bytes_seconds / step_seconds,
        "share": max(flops_seconds, bytes_seconds) / step_seconds,
    }

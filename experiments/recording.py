"""Result files of experiments: a figure with the conditions that made it."""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import jax

PACKAGES = ("jaxcls", "jax", "jaxlib", "flax", "optax", "grain", "numpy", "pillow", "scikit-learn")


def conditions() -> dict[str, Any]:
    """Command, machine and versions of this process."""
    device = jax.devices()[0]
    return {
        "command": " ".join(["python", *sys.argv]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": f"{len(jax.devices())} x {device.device_kind}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """n, mean, standard deviation, smallest and largest."""
    return {
        "n": len(values),
        "mean": mean(values),
        "std": stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
    }


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write one experiment's result, under its conditions, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"conditions": conditions(), **result}, indent=2) + "\n", encoding="utf-8")

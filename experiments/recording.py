"""Result files: a figure with the conditions that made it."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import jax

PACKAGES = (
    "jaxcls", "jax", "jaxlib", "flax", "optax", "grain", "numpy", "pillow", "scikit-learn",
    "torch", "torchvision", "transformers", "cleanlab", "ray",
)  # fmt: skip
FLAG_VARIABLES = ("XLA_FLAGS", "JAX_PLATFORMS", "OMP_NUM_THREADS", "TF_ENABLE_ONEDNN_OPTS")
ROOT = Path(__file__).resolve().parents[1]


def conditions() -> dict[str, Any]:
    """Command, commit, machine, versions and flags of this process."""
    device = jax.devices()[0]
    return {
        "command": command(),
        "commit": commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": device.platform,
        "device": f"{len(jax.devices())} x {device.device_kind}",
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **_versions()},
        "flags": {name: os.environ[name] for name in FLAG_VARIABLES if name in os.environ},
    }


def command() -> str:
    """The command that started this process; of absolute paths the last part."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name] if spec else [Path(sys.argv[0]).name]
    arguments = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return " ".join(["python", *program, *arguments])


def commit() -> str | None:
    """The commit that is checked out, "+" added where files differ from it; None without git."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def spread(values: Sequence[float]) -> dict[str, float]:
    """n, mean, standard deviation, median, smallest and largest."""
    return {
        "n": len(values),
        "mean": mean(values),
        "std": stdev(values) if len(values) > 1 else 0.0,
        "median": median(values),
        "min": min(values),
        "max": max(values),
    }


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write one experiment's result, under its conditions, as JSON."""
    write_json(path, {"conditions": conditions(), **result})


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON; a file already there is replaced once the new one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f".{path.name}.new")
    whole.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    whole.replace(path)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """The processor's name, where Linux tells it, and the instructions that bfloat16 needs."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    values = {name.strip(): value.strip() for name, value in fields.items()}
    flags = {"avx2", "avx512_bf16", "amx_bf16"} & set(values.get("flags", "").split())
    return " ".join([values.get("model name", platform.machine()), *sorted(flags)])

"""Two forced CPU devices, strict rank promotion, and where the shared photos and weights lie."""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _raise_on_rank_promotion():
    """Broadcasting over ranks is an error in our code."""
    import jax

    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of photos, weights and reference outputs that lies beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"the photos and weights that this test reads are not at {SHARED}")
    return SHARED

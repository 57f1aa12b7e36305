"""What "auto" computes in, on this CPU or another."""

import jax
import jax.numpy as jnp
import pytest

from jaxcls.errors import UsageError
from jaxcls.models import precision
from jaxcls.models.precision import compute_dtype, scoring_dtype


@pytest.fixture
def cpu_info(tmp_path, monkeypatch):
    """Write what Linux says of the CPU; another one is not remembered."""
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(precision, "_CPU_INFO", path)
    precision.cpu_multiplies_bfloat16.cache_clear()
    yield path.write_text
    precision.cpu_multiplies_bfloat16.cache_clear()


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 avx512_vnni\n", "bfloat16"),
        ("flags\t\t: fpu avx512f avx512_bitalg\n", "float32"),
    ],
)
def test_a_cpu_scores_large_pictures_in_bfloat16_if_it_multiplies_it(cpu_info, flags, dtype):
    cpu_info(flags)
    assert [scoring_dtype("auto", size) for size in (32, 127, 128, 224)] == ["float32"] * 2 + [dtype] * 2
    assert scoring_dtype("float32", 224) == "float32"
    assert scoring_dtype("bfloat16", 32) == "bfloat16"


def test_without_linux_a_cpu_scores_in_float32(cpu_info):
    assert scoring_dtype("auto", 224) == "float32"


def test_accelerators_score_in_bfloat16(cpu_info, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert scoring_dtype("auto", 32) == "bfloat16"


def test_training_and_programs_are_float32_on_every_cpu(cpu_info):
    cpu_info("flags : avx512_bf16")
    assert compute_dtype("auto") == jnp.float32
    assert compute_dtype("auto", "cpu") == jnp.float32
    assert compute_dtype("auto", "cuda") == jnp.bfloat16


def test_another_precision_is_refused():
    with pytest.raises(UsageError, match="precision 'half': choose one of auto, float32, bfloat16"):
        scoring_dtype("half", 224)

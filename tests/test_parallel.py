"""Meshes and the compilation cache."""

import stat

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from jaxcls.parallel import batch_sharding, make_mesh, replicated, use_compilation_cache


@pytest.mark.parametrize(("batch_size", "num_devices"), [(1, 1), (2, 2), (3, 1), (64, 2)])
def test_a_mesh_has_as_many_devices_as_divide_the_batch(batch_size, num_devices):
    mesh = make_mesh(batch_size)
    assert mesh.size == num_devices
    assert mesh.axis_names == ("data",)


def test_a_batch_is_divided_and_a_state_is_copied():
    values = np.arange(12.0).reshape(4, 3)
    mesh = make_mesh(4)
    divided = jax.device_put(values, batch_sharding(mesh))
    assert [shard.data.shape for shard in divided.addressable_shards] == [(2, 3), (2, 3)]
    copied = jax.device_put(values, replicated(mesh))
    assert [shard.data.shape for shard in copied.addressable_shards] == [(4, 3), (4, 3)]


@pytest.fixture
def _no_cache_yet():
    """JAX keeps to the first folder that it used until it is told to forget it."""
    jax_cache.reset_cache()
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


@pytest.mark.usefixtures("_no_cache_yet")
def test_programs_are_kept_in_a_private_folder(tmp_path):
    folder = tmp_path / "persistent" / "compiled"
    folder.mkdir(parents=True, mode=0o777)
    folder.chmod(0o777)
    use_compilation_cache(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.jit(lambda x: x * 3.25 - 1)(np.ones(3))
    assert any(folder.iterdir())

"""One mesh axis, `data`: the batch is sharded over all devices, the state replicated."""

from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcls.storage import make_private_folder

DATA_AXIS = "data"


def make_mesh(batch_size: int) -> Mesh:
    """A mesh over as many local devices as divide `batch_size` evenly, all of them if they do."""
    devices = jax.local_devices()
    num_devices = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    return Mesh(np.asarray(devices[:num_devices]), (DATA_AXIS,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def steps_sharding(mesh: Mesh) -> NamedSharding:
    """The second axis, after that of steps, over the devices."""
    return NamedSharding(mesh, PartitionSpec(None, DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def use_compilation_cache(folder: Path) -> None:
    """Keep compiled programs in `folder`, made private: whoever can write there can run code here."""
    jax.config.update("jax_compilation_cache_dir", str(make_private_folder(folder)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

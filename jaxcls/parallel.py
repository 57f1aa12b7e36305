"""One mesh axis, `data`: the batch is sharded over all devices, the state replicated.

Several processes, each with devices of its own, train as one: all run the same programs over one mesh, and
each reads its own rows of every batch. What only one may do, such as writing files, the first does.
"""

import atexit
import hashlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxcls.errors import JaxclsError, TrainingError, UsageError
from jaxcls.storage import make_private_folder

T = TypeVar("T")

DATA_AXIS = "data"
SHUTDOWN_SECONDS = 24 * 3600
"""A process that is done waits for the first one, which may still evaluate; a dead one is noticed anyhow."""
SETTINGS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@contextmanager
def processes() -> Iterator[None]:
    """Train together with other processes: call `finetune` in each of them, within this context.

    To be entered before anything else uses JAX's devices. SLURM and Open MPI tell JAX who the others are;
    elsewhere the environment does: `JAX_COORDINATOR_ADDRESS` ("host:port" of the first), `JAX_NUM_PROCESSES`
    and `JAX_PROCESS_ID` (from 0). After an error this process ends without waiting for the others, which
    then fail, too, at once or when its heartbeat has been missing for 100 s.

    Raises:
        UsageError: there are no other processes.
        TrainingError: another process has ended.
    """
    try:
        _join()
        yield
    except BaseException as error:
        code = _exit_code(error)
        if code != 128 + signal.SIGTERM:  # then all leave together
            # Before JAX's own: that one waits for all the others.
            atexit.register(_leave, code)
        if re.search("Gloo|NCCL|coordination service", str(error)):
            raise TrainingError(
                "another process has ended or cannot be reached: look at what it says, then start all of "
                f"them again to resume the run ({str(error).splitlines()[0]})"
            ) from error
        raise


def _join() -> None:
    given = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    numbers = [int(given[name]) if given.get(name, "").isdecimal() else None for name in SETTINGS[1:]]
    # `finetune` handles SIGTERM itself.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            num_processes=numbers[0],
            process_id=numbers[1],
            # All is said: a scheduler around it, whose job this is a part of, has no say in the devices.
            cluster_detection_method="deactivate" if given.keys() == set(SETTINGS) else None,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        described = ", ".join(f"{name}={value}" for name, value in given.items()) or "none of them is set"
        raise UsageError(
            f"the other processes cannot be found: {error} Start them with srun or mpirun, or give each "
            f"{', '.join(SETTINGS)} ({described})"
        ) from error
    if jax.process_count() == 1:
        raise UsageError("this process is alone: start several, or train without --distributed")
    if len({len(group) for group in _devices_by_process()}) > 1:
        raise UsageError("the processes have different numbers of devices: give each as many")
    # Connected while all are in step: later ones wait for each other for half a minute only.
    gather(None)


def _exit_code(error: BaseException) -> int:
    """As the command line exits after the same error."""
    match error:
        case SystemExit(code=int(code)):
            return code
        case KeyboardInterrupt():
            return 130
        case UsageError():
            return 2
        case _:
            return 1


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _devices_by_process() -> list[list[jax.Device]]:
    return [jax.local_devices(process_index=index) for index in range(jax.process_count())]


def is_first_process() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """What each process passes, a JSON value, by process. All of them must call it."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray(len(text)))
    rows = multihost_utils.process_allgather(np.pad(text, (0, lengths.max() - len(text))))
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def together(function: Callable[[], T]) -> T:
    """What `function` returns; what it raises on one process ends all of them. It must not gather itself.

    Raises:
        TrainingError: it raised an error on another process alone.
    """
    problem, results = None, []
    try:
        results.append(function())
    except JaxclsError as error:
        problem = error
    problems = gather(None if problem is None else str(problem))
    if problem is not None:
        raise problem
    for index, text in enumerate(problems):
        if text is not None:
            raise TrainingError(f"process {index}: {text}")
    return results[0]


def require_same(what: str, value: Any) -> None:
    """Compare a JSON value between the processes.

    Args:
        what: the value is, for the message.
        value: of this process.

    Raises:
        UsageError: that of another process differs.
    """
    if jax.process_count() == 1:
        return
    digests = gather(hashlib.sha256(json.dumps(value).encode()).hexdigest())
    for index, digest in enumerate(digests):
        if digest != digests[0]:
            raise UsageError(
                f"process {index} was given other {what} than the first: start all processes with the same "
                "command, and let all see the same files"
            )


def from_first_process(tree: Any) -> Any:
    """The first process's arrays, NumPy's, to the bit; all others pass arrays of the same shapes."""
    if jax.process_count() == 1:
        return tree
    # As integers: they are sent as a sum, in which -0.0 would become 0.0.
    bits = jax.tree.map(lambda array: np.asarray(array).view(f"u{array.dtype.itemsize}"), tree)
    sent = multihost_utils.broadcast_one_to_all(bits)
    return jax.tree.map(lambda array, own: np.asarray(array).view(own.dtype), sent, tree)


def make_mesh(batch_size: int, *, across_processes: bool = False) -> Mesh:
    """A mesh over as many devices as divide `batch_size` evenly, all of them if they do.

    Args:
        batch_size: over all devices.
        across_processes: over the devices of all processes, as many of each; else over this process's.

    Raises:
        UsageError: the processes do not divide the batch size evenly.
    """
    groups = _devices_by_process() if across_processes else [jax.local_devices()]
    share, rest = divmod(batch_size, len(groups))
    if rest:
        raise UsageError(f"a batch of {batch_size} cannot be divided evenly over {len(groups)} processes")
    num_devices = max(n for n in range(1, len(groups[0]) + 1) if share % n == 0)
    return Mesh(np.asarray([device for group in groups for device in group[:num_devices]]), (DATA_AXIS,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def steps_sharding(mesh: Mesh) -> NamedSharding:
    """The second axis, after that of steps, over the devices."""
    return NamedSharding(mesh, PartitionSpec(None, DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def memory_limit(mesh: Mesh) -> int:
    """How many bytes each of a mesh's devices of this process can hold; CPU devices share the host's."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    device = mesh.local_devices[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit", physical)
    with suppress(OSError, ValueError):  # a container's share; "max" where it has none
        physical = min(physical, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return physical // len(mesh.local_devices)


def put(tree: Any, sharding: Sharding) -> Any:
    """NumPy arrays, the same on every process, as JAX arrays on the devices of a sharding."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda array: jax.make_array_from_process_local_data(sharding, array, array.shape), tree
    )


def put_rows(tree: Any, sharding: Sharding) -> Any:
    """The rows of each process as JAX arrays of the rows of all."""
    return jax.make_array_from_process_local_data(sharding, tree)


def use_compilation_cache(folder: Path) -> None:
    """Keep compiled programs in `folder`, made private: whoever can write there can run code here."""
    jax.config.update("jax_compilation_cache_dir", str(make_private_folder(folder)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

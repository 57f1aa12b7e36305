"""`jaxcls train` on the machines of a Ray cluster: its options, and how many processes with what.

    python -m experiments.cluster.train_on_ray photos --out run --num-processes 16 --gpus-per-process 1

Ray starts the processes; `jax.distributed` connects them, as everywhere else. All machines need jaxcls, the
photos and the run's folder, under the same paths. When a process dies, Ray ends the others and starts all of
them again, and they go on from the newest checkpoint; the same command later goes on as well.
"""

import os
import socket
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import tyro
from ray.train import get_context
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.jax import JaxConfig, JaxTrainer
from tyro.conf import OmitArgPrefixes

from jaxcls.commands.training import Train
from jaxcls.errors import UsageError
from jaxcls.storage import Storage

AS_STARTED_BY_HAND = {"RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0"}
"""Ray leaves alone the folder that a process works in, and what libraries log."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to train, and where."""

    train: OmitArgPrefixes[Train]
    address: str = "auto"
    """Of the cluster, host:port; auto: of the one that this machine is in."""
    num_processes: int = 2
    """How many to start."""
    cpus_per_process: int = 1
    """Cores that Ray keeps free for each process."""
    gpus_per_process: int = 0
    """GPUs of each process."""
    max_failures: int = 3
    """How often to start all processes again."""


def train_in_worker(command: Train, folder: Path) -> int:
    """Connect this process with the others of its group, and train; return the exit code.

    Args:
        command: the same for all.
        folder: to which its paths are relative.
    """
    import jax

    from jaxcls.parallel import SETTINGS, processes, use_compilation_cache

    rank, num_processes = get_context().get_world_rank(), get_context().get_world_size()
    address = broadcast_from_rank_zero(_free_address() if rank == 0 else None)
    os.environ.update(zip(SETTINGS, (address, str(num_processes), str(rank)), strict=True))
    os.chdir(folder)
    use_compilation_cache(Storage.default().persistent / "compiled")
    with processes():
        # Ray's own connection is for GPUs and TPUs alone; without one, each worker would train by itself.
        assert jax.process_count() == num_processes
        return command.run()


def _free_address() -> str:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{listener.getsockname()[1]}"


def main(arguments: Arguments) -> int:
    """Train, and return the exit code of the first process."""
    if arguments.train.out is None:
        raise UsageError("give --out RUN, a folder that all machines see")
    os.environ.update(AS_STARTED_BY_HAND)
    ray.init(arguments.address)
    command = replace(arguments.train, resume=True, distributed=False)
    with Storage.default().scratch() as scratch:  # Ray's record of the run, which nobody reads
        trainer = JaxTrainer(
            partial(train_in_worker, command, Path.cwd()),
            jax_config=JaxConfig(),  # not Ray's way to connect
            scaling_config=ScalingConfig(
                num_workers=arguments.num_processes,
                use_gpu=arguments.gpus_per_process > 0,
                resources_per_worker={"CPU": arguments.cpus_per_process, "GPU": arguments.gpus_per_process},
            ),
            run_config=RunConfig(
                storage_path=str(scratch), failure_config=FailureConfig(max_failures=arguments.max_failures)
            ),
        )
        result: Any = trainer.fit()
    return result.return_value


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))

"""torch's `DataLoader` over Pillow, cutting the same boxes as our stream."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.photos import (
    NUM_POSITIONS,
    Reading,
    photo_paths,
    pillow_corner,
    pillow_view,
    workers_of,
)
from benchmarks.timing import Program, SubjectError
from benchmarks.worker import Task


class Positions(Dataset[np.ndarray]):
    """What `load` makes of each position."""

    def __init__(self, load: Callable[[int], np.ndarray]) -> None:
        self._load = load

    def __len__(self) -> int:
        return NUM_POSITIONS

    def __getitem__(self, position: int) -> np.ndarray:
        return self._load(position)


def decode(task: Task) -> Program:
    """Photos decoded."""
    return _reading(task, partial(pillow_corner, photo_paths(task)))


def input_pipeline(task: Task) -> Program:
    """Photos to batches of views."""
    return _reading(task, partial(pillow_view, photo_paths(task), task.image_size))


def to_device(task: Task) -> Program:
    """The same batches on a GPU."""
    if not torch.cuda.is_available():
        raise SubjectError("left out: on a CPU its batches are on the device already")
    return input_pipeline(task)


def _reading(task: Task, load: Callable[[int], np.ndarray]) -> Program:
    return Reading(partial(_stream, task, load), task, to_host=_to_host)


@contextmanager
def _stream(task: Task, load: Callable[[int], np.ndarray]) -> Iterator[Iterator[torch.Tensor]]:
    uses_gpu = task.work == "to_device"
    loader = DataLoader(
        Positions(load), task.batch_size, num_workers=workers_of(task.subject), pin_memory=uses_gpu
    )
    batches = iter(loader)
    yield map(_to_gpu, batches) if uses_gpu else batches
    del batches  # ends its processes


def _to_gpu(batch: torch.Tensor) -> torch.Tensor:
    on_gpu = batch.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    return on_gpu


def _to_host(batch: torch.Tensor) -> np.ndarray:
    return batch.cpu().numpy()

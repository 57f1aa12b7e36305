"""jaxcls as a reader of photos: its own streams, from folders and from records."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from benchmarks.photos import (
    AUGMENTATION,
    SEED,
    Reading,
    corner,
    scratch_folder,
    workers_of,
    write_photos,
)
from benchmarks.timing import Program
from benchmarks.worker import Task
from jaxcls.data.dataset import Dataset
from jaxcls.data.folder import read_folder
from jaxcls.preprocess import Preprocess

RECORD_SIZE = 256
"""Pixels: the short side to which ImageNet's photos are usually resized."""


def decode(task: Task) -> Program:
    """Photos of a folder decoded."""
    return _reading(task, read_folder(write_photos(task)), _decoded)


def input_pipeline(task: Task) -> Program:
    """Photos of a folder to batches of views."""
    return _reading(task, read_folder(write_photos(task)), _views)


def to_device(task: Task) -> Program:
    """The same batches, copied to the devices ahead of use."""
    return _reading(task, read_folder(write_photos(task)), _views_on_devices)


def read_records(task: Task) -> Program:
    """The same views from ArrayRecord files that hold the photos as they are."""
    return _reading(task, _packed(task, None), _views)


def read_resized_records(task: Task) -> Program:
    """Views from ArrayRecord files that hold the photos resized once."""
    return _reading(task, _packed(task, RECORD_SIZE), _views)


def _packed(task: Task, size: int | None) -> Dataset:
    from jaxcls.data.arrayrecord import read_arrayrecord, write_arrayrecord

    folder = read_folder(write_photos(task))
    return read_arrayrecord(write_arrayrecord(folder, scratch_folder() / "records", size=size))


Stream = Callable[[Task, Dataset], Iterator[Any]]


def _reading(task: Task, dataset: Dataset, stream: Stream) -> Program:
    return Reading(contextmanager(partial(stream, task, dataset)), task)


def _views(task: Task, dataset: Dataset) -> Iterator[Iterator[np.ndarray]]:
    with closing(_batches(task, dataset)) as batches:
        yield (batch.images for batch in batches)


def _views_on_devices(task: Task, dataset: Dataset) -> Iterator[Iterator[Any]]:
    import jax

    from jaxcls.parallel import batch_sharding, make_mesh
    from jaxcls.pipeline import on_devices

    sharding = batch_sharding(make_mesh(task.batch_size))
    with closing(on_devices(_batches(task, dataset), sharding)) as batches:
        yield (jax.block_until_ready(batch.images) for batch in batches)


def _batches(task: Task, dataset: Dataset) -> Any:
    from jaxcls.pipeline import training_batches

    return training_batches(
        dataset,
        Preprocess(size=task.image_size),
        AUGMENTATION,
        batch_size=task.batch_size,
        seed=SEED,
        num_workers=workers_of(task.subject),
    )


def _decoded(task: Task, dataset: Dataset) -> Iterator[Iterator[Any]]:
    import grain

    from jaxcls.pipeline import iterate

    corners = grain.MapDataset.range(len(dataset)).repeat().map_with_index(_Corner(dataset))
    batches = iterate(corners.batch(task.batch_size, drop_remainder=True), workers_of(task.subject))
    with closing(batches):
        yield batches


@dataclass(frozen=True)
class _Corner:
    dataset: Dataset

    def __call__(self, position: int, index: int) -> np.ndarray:
        return corner(self.dataset.image(index), position)

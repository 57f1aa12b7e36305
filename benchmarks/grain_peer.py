"""Grain as its guide writes it, over Pillow: a source, `map`, `batch`, and its own defaults."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial

import grain
import numpy as np
from absl import flags

from benchmarks.photos import (
    NUM_POSITIONS,
    Reading,
    photo_paths,
    pillow_corner,
    pillow_view,
    workers_of,
)
from benchmarks.timing import Program
from benchmarks.worker import Task


def decode(task: Task) -> Program:
    """Photos decoded."""
    return _reading(task, partial(pillow_corner, photo_paths(task)))


def input_pipeline(task: Task) -> Program:
    """Photos to batches of views."""
    return _reading(task, partial(pillow_view, photo_paths(task), task.image_size))


def to_device(task: Task) -> Program:
    """The same batches, each put on the device when it comes."""
    return input_pipeline(task)


def _reading(task: Task, load: Callable[[int], np.ndarray]) -> Program:
    # Each of its threads, in each process, has a batch in the making.
    num_ahead = 2 * grain.ReadOptions().num_threads * max(workers_of(task.subject), 1)
    return Reading(partial(_stream, task, load), task, num_ahead=num_ahead)


@contextmanager
def _stream(task: Task, load: Callable[[int], np.ndarray]) -> Iterator[Iterator[np.ndarray]]:
    batches = grain.MapDataset.range(NUM_POSITIONS).map(load).batch(task.batch_size).to_iter_dataset()
    if num_workers := workers_of(task.subject):
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # its processes fail without it in programs that are not absl's
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    iterator = iter(batches)
    with closing(iterator):
        if task.work == "to_device":
            import jax

            yield (jax.block_until_ready(jax.device_put(batch)) for batch in iterator)
        else:
            yield iterator

"""tf.data as its guides write it: files decoded by TensorFlow on all cores, `batch`, `prefetch`.

The views are of the same distribution as ours, by TensorFlow's own drawing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks.photos import (
    AUGMENTATION,
    CORNER_SIZE,
    Reading,
    photo_paths,
    workers_of,
)
from benchmarks.timing import Program
from benchmarks.worker import Task
from jaxcls.augment.host import MAX_ASPECT_RATIO

NUM_AHEAD = 32


def decode(task: Task) -> Program:
    """Photos decoded."""
    return _reading(task, _corner)


def input_pipeline(task: Task) -> Program:
    """Photos to batches of views."""
    return _reading(task, partial(_view, task.image_size))


def to_device(task: Task) -> Program:
    """The same batches, each put on the device by JAX when it comes."""
    return input_pipeline(task)


def _corner(path: Any) -> Any:
    pixels = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
    return tf.image.random_crop(pixels, (CORNER_SIZE, CORNER_SIZE, 3))


def _view(size: int, path: Any) -> Any:
    data = tf.io.read_file(path)
    start, extent, _ = tf.image.sample_distorted_bounding_box(
        tf.io.extract_jpeg_shape(data),
        tf.zeros([0, 0, 4]),
        area_range=(AUGMENTATION.min_crop_area, 1.0),
        aspect_ratio_range=(1 / MAX_ASPECT_RATIO, MAX_ASPECT_RATIO),
        use_image_if_no_bounding_boxes=True,
    )
    # Only what the box shows is decoded.
    pixels = tf.io.decode_and_crop_jpeg(data, tf.concat([start[:2], extent[:2]], 0), channels=3)
    view = tf.image.resize(pixels, (size, size), antialias=True)
    return tf.cast(tf.round(tf.image.random_flip_left_right(view)), tf.uint8)


def _reading(task: Task, load: Callable[[Any], Any]) -> Program:
    tf.config.set_visible_devices([], "GPU")  # JAX's
    paths = [str(path) for path in photo_paths(task)]
    return Reading(partial(_stream, task, load, paths), task, num_ahead=NUM_AHEAD)


@contextmanager
def _stream(task: Task, load: Callable[[Any], Any], paths: list[str]) -> Iterator[Iterator[np.ndarray]]:
    files = tf.data.Dataset.from_tensor_slices(paths).repeat()
    batches = files.map(load, num_parallel_calls=workers_of(task.subject) or tf.data.AUTOTUNE)
    batches = batches.batch(task.batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    iterator = batches.as_numpy_iterator()
    if task.work == "to_device":
        import jax

        yield (jax.block_until_ready(jax.device_put(batch)) for batch in iterator)
    else:
        yield iterator

"""Photos made on the spot, how a reader of them is timed, and what its peers do with one: by Pillow."""

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.timing import Program, SubjectError
from benchmarks.worker import Task
from jaxcls.augment.host import Augmentation, draw_views

CLASSES = ("bright", "dark")
QUALITY = 90
AUGMENTATION = Augmentation(flip=True, min_crop_area=0.25)
SEED = 0
CORNER_SIZE = 32
NUM_POSITIONS = 10**9
"""Of a stream that does not end while it is timed."""


def make_photos(folder: Path, count: int, long_side: int) -> Path:
    """Write JPEGs of 4:3, smooth shapes under fine grain, as `folder/CLASS/NUMBER.jpg`.

    At 500 px one takes some 60 kB, as photos of that size do.
    """

    def write(number: int) -> None:
        generator = np.random.default_rng(number)
        shapes = Image.fromarray(generator.integers(0, 256, (24, 32, 3), np.uint8))
        photo = np.asarray(
            shapes.resize((long_side, long_side * 3 // 4), Image.Resampling.BICUBIC), np.float32
        )
        grain = generator.normal(0, 6, (*photo.shape[:2], 1)).astype(np.float32)
        brightness = -20 if number % 2 else 20
        pixels = np.clip(photo + grain + brightness, 0, 255).astype(np.uint8)
        path = folder / CLASSES[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=QUALITY)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(count)))
    return folder


def scratch_folder() -> Path:
    """A new folder that goes when the process ends."""
    folder = TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)


def num_photos(long_side: int) -> int:
    """Enough for no photo to stay in a processor's cache, few enough to be made in seconds; even."""
    return min(64, max(8, 16_000 // long_side * 2))


def write_photos(task: Task) -> Path:
    """The folder of a task's photos."""
    return make_photos(scratch_folder(), num_photos(task.photo_side), task.photo_side)


def photo_paths(task: Task) -> list[Path]:
    """A task's photos."""
    return sorted(write_photos(task).rglob("*.jpg"))


class Reading(Program):
    """Batches read in their steady state: a new stream each time, its first batches not timed.

    Nothing runs between the turns, so that no reader works ahead while another is timed.

    Args:
        open_stream: a context with an endless iterator of uint8 [B, size, size, 3].
        task: what is read.
        num_ahead: batches that the reader makes ready or has begun at a time, at most.
        to_host: a batch -> NumPy's array, after the time.
    """

    def __init__(
        self,
        open_stream: Callable[[], AbstractContextManager[Iterator[Any]]],
        task: Task,
        *,
        num_ahead: int = 2 * len(os.sched_getaffinity(0)) + 2,
        to_host: Callable[[Any], np.ndarray] = np.asarray,
    ) -> None:
        self._open_stream, self._num_ahead, self._to_host = open_stream, num_ahead, to_host
        size = CORNER_SIZE if task.work == "decode" else task.image_size
        self._shape = (task.batch_size, size, size, 3)
        self.images_per_step = task.batch_size
        self.details = {"dtype": "uint8", "num_cores": len(os.sched_getaffinity(0))}

    def run(self, num_steps: int) -> None:
        raise NotImplementedError("it opens and closes its stream around the time")

    def num_executed(self) -> int:
        raise NotImplementedError("a stream has no counter: `time` compares its batches")

    def time(self, num_steps: int, clock: Callable[[], float] = perf_counter) -> float:
        """Seconds of `num_steps` batches."""
        with self._open_stream() as stream:
            for _ in range(self._num_ahead):
                next(stream)
            start = clock()
            batches = [next(stream) for _ in range(num_steps)]
            seconds = clock() - start
            batches = [self._to_host(batch) for batch in batches]
        if any(batch.shape != self._shape or batch.dtype != np.uint8 for batch in batches):
            raise SubjectError(f"a batch is {batches[0].dtype} {batches[0].shape}, not uint8 {self._shape}")
        if len({batch[:, ::8, ::8].tobytes() for batch in batches}) != num_steps:
            raise SubjectError("a batch came twice")
        return seconds


def workers_of(subject: str) -> int:
    """The number of processes in a subject's name: "jaxcls-2"; "max": one a core; without: 0, none."""
    number = subject.partition("-")[2] or "0"
    return len(os.sched_getaffinity(0)) if number == "max" else int(number)


def corner(pixels: np.ndarray, position: int) -> np.ndarray:
    """What is kept of a photo where only decoding is timed: uint8 [32, 32, 3], elsewhere at each position."""
    top, left = (position % (side - CORNER_SIZE + 1) for side in pixels.shape[:2])
    # A view would keep the whole photo until its batch is made.
    return pixels[top : top + CORNER_SIZE, left : left + CORNER_SIZE].copy()


def pillow_corner(paths: Sequence[Path], position: int) -> np.ndarray:
    """A photo decoded in full, of which the corner is kept."""
    with Image.open(paths[position % len(paths)]) as file:
        return corner(np.asarray(file.convert("RGB")), position)


def pillow_view(paths: Sequence[Path], size: int, position: int) -> np.ndarray:
    """The random view that our stream draws at a position for the same photo, uint8 [size, size, 3]."""
    with Image.open(paths[position % len(paths)]) as file:
        photo = file.convert("RGB")
    views = draw_views(SEED, position, np.asarray([[photo.height, photo.width]]), AUGMENTATION)
    box = tuple(views.boxes[0].tolist())
    view = photo.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if views.flips[0]:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(view)  # torch wants it writable

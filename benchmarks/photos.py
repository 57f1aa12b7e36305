"""Photos made on the spot, and how jaxcls streams them."""

import atexit
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
from PIL import Image

from benchmarks.timing import Program, SubjectError
from benchmarks.worker import Task
from jaxcls.augment.host import Augmentation
from jaxcls.data.folder import read_folder
from jaxcls.preprocess import Preprocess

CLASSES = ("bright", "dark")
QUALITY = 90
AUGMENTATION = Augmentation(flip=True, min_crop_area=0.25)
SEED = 0


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


class Reading(Program):
    """Batches read in their steady state: a new stream each time, its first batches not timed.

    Nothing runs between the turns, so that no reader works ahead while another is timed.

    Args:
        open_stream: a context with an endless iterator of uint8 [B, size, size, 3].
        task: what is read.
    """

    def __init__(
        self, open_stream: Callable[[], AbstractContextManager[Iterator[np.ndarray]]], task: Task
    ) -> None:
        self._open_stream = open_stream
        self._shape = (task.batch_size, task.image_size, task.image_size, 3)
        self.images_per_step, self.details = task.batch_size, {"dtype": "uint8"}

    def run(self, num_steps: int) -> None:
        raise NotImplementedError("it opens and closes its stream around the time")

    def num_executed(self) -> int:
        raise NotImplementedError("a stream has no counter: `time` compares its batches")

    def time(self, num_steps: int, clock: Callable[[], float] = perf_counter) -> float:
        """Seconds of `num_steps` batches."""
        with self._open_stream() as stream:
            for _ in range(2 * (os.cpu_count() or 1) + 2):  # as many as any of the readers keeps ready
                next(stream)
            start = clock()
            batches = [next(stream) for _ in range(num_steps)]
            seconds = clock() - start
        if any(batch.shape != self._shape or batch.dtype != np.uint8 for batch in batches):
            raise SubjectError(f"a batch is {batches[0].dtype} {batches[0].shape}, not uint8 {self._shape}")
        if len({batch[:, ::8, ::8].tobytes() for batch in batches}) != num_steps:
            raise SubjectError("a batch came twice")
        return seconds


@contextmanager
def stream_batches(task: Task, folder: Path) -> Iterator[Iterator[np.ndarray]]:
    """Our own stream of random views; "jaxcls-processes" with a process per core, else threads."""
    from jaxcls.pipeline import training_batches

    batches = training_batches(
        read_folder(folder),
        Preprocess(size=task.image_size),
        AUGMENTATION,
        batch_size=task.batch_size,
        seed=SEED,
        num_workers=(os.cpu_count() or 1) if task.subject.endswith("processes") else 0,
    )
    with closing(batches):
        yield (batch.images for batch in batches)

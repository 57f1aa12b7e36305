"""Grain streams a dataset as batches: decoded, cropped and stacked in workers, then put on the devices.

The position in the data is the step. Training reads one endless stream of
permutations; batch number `step` is positions [step * B, (step + 1) * B) of it, so
every batch is full, every photo is seen equally often, and a run resumed at any
step, with any number of workers, sees what an undisturbed one would have seen.

JAX is imported only where arrays meet devices: Grain's workers import this module.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from absl import flags
from etils import epy

from jaxcls.augment.host import Augmentation, cut_view, draw_views
from jaxcls.data.dataset import UNLABELLED, Dataset
from jaxcls.errors import ImageError
from jaxcls.preprocess import Preprocess

if TYPE_CHECKING:
    from jax.sharding import Sharding

with epy.lazy_imports():
    import grain  # loaded with the first stream: programs alone are compiled without it

NUM_BATCHES_AHEAD = 2
MAX_THREADS = 16


class Batch(NamedTuple):
    """One step's photos; `images`, `labels` and `mask` are NumPy arrays or, after `on_devices`, JAX's.

    Attributes:
        images: uint8 [B, H, W, 3].
        labels: int32 [B], -1 where unlabelled.
        mask: bool [B], False for padding and for photos that could not be read.
        indices: int32 [B], positions in the dataset; -1 for padding. Of streamed photos, like `sizes` and
            `errors`, for the rows of this process alone.
        sizes: int32 [B, 2], height and width of the photo.
        errors: B messages, "" for photos that could be read.
    """

    images: Any
    labels: Any
    mask: Any
    indices: np.ndarray
    sizes: np.ndarray
    errors: tuple[str, ...]


class Batches(Iterator[Batch], Protocol):
    """Batches one after another, from threads or processes that `close` ends."""

    def close(self) -> None:
        """Stop whatever prepares the next batches."""


@dataclass(frozen=True)
class Share:
    """The rows of a batch that one of several processes reads: B / `count`, the `index`-th so many."""

    index: int = 0
    count: int = 1


WHOLE = Share()


class _Example(NamedTuple):
    image: np.ndarray
    label: int
    photo: int
    size: tuple[int, int]
    error: str


@dataclass(frozen=True)
class _Load:
    """The photo at `position`, as the network sees it: a random view in training, else the fixed one.

    Positions after the last photo are padding.
    """

    dataset: Dataset
    preprocess: Preprocess
    augmentation: Augmentation | None = None
    seed: int = 0

    def __call__(self, position: int, index: int) -> _Example:
        if self.augmentation is not None:
            (index,) = training_order(len(self.dataset), self.seed, np.asarray([position])).tolist()
        blank = np.zeros((self.preprocess.size, self.preprocess.size, 3), np.uint8)
        if index >= len(self.dataset):
            return _Example(blank, UNLABELLED, -1, (0, 0), "")
        label = int(self.dataset.labels[index])
        try:
            view, size = self._view(position, index)
        except ImageError as error:
            return _Example(blank, label, index, (0, 0), str(error))
        return _Example(view, label, index, size, "")

    def _view(self, position: int, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        photo = self.dataset.photo(index)
        if self.augmentation is None:
            return self.preprocess.resize_and_crop(photo.decode(self.preprocess.short_side)), photo.size
        views = draw_views(self.seed, position, np.asarray([photo.size]), self.augmentation)
        image = photo.decode(views.short_side(self.preprocess, photo.size))
        scales = np.divide([(image.height, image.width)], [photo.size])
        return cut_view(image, self.preprocess, views.scaled(scales)), photo.size


def _stack(rows: Sequence[_Example]) -> Batch:
    return Batch(
        images=np.stack([row.image for row in rows]),
        labels=np.asarray([row.label for row in rows], np.int32),
        mask=np.asarray([row.photo >= 0 and not row.error for row in rows]),
        indices=np.asarray([row.photo for row in rows], np.int32),
        sizes=np.asarray([row.size for row in rows], np.int32),
        errors=tuple(row.error for row in rows),
    )


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """ceil(N / B): the epoch's last batch is filled from the next permutation."""
    return -(-num_examples // batch_size)


def training_order(num_examples: int, seed: int, positions: np.ndarray) -> np.ndarray:
    """The photos, int64 [B], at `positions` int [B] of one permutation after another, without end."""
    epochs, offsets = np.divmod(positions, num_examples)
    indices = np.empty(len(positions), np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        indices[chosen] = _permutation(num_examples, seed, int(epoch))[offsets[chosen]]
    return indices


@lru_cache(maxsize=4)
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    # Views are drawn with the key (seed, 0).
    philox = np.random.Philox(key=np.asarray([seed, epoch + 1], np.uint64))
    return np.random.Generator(philox).permutation(num_examples)


def training_batches(
    dataset: Dataset,
    preprocess: Preprocess,
    augmentation: Augmentation,
    *,
    batch_size: int,
    seed: int,
    first_step: int = 0,
    num_workers: int = 0,
    share: Share = WHOLE,
) -> Batches:
    """Full, shuffled, augmented batches without end. Close it (`contextlib.closing`).

    Args:
        dataset: what to draw from; smaller than a batch, it repeats within it.
        preprocess: gives the size of the images.
        augmentation: the random views.
        batch_size: B.
        seed: of order and views. The same for any `num_workers`.
        first_step: start with this batch.
        num_workers: processes that decode; 0: threads of this process.
        share: of each batch; its rows alone are decoded.
    """
    load = _Load(dataset, preprocess, augmentation, seed)
    examples = grain.MapDataset.range(len(dataset)).repeat().map_with_index(load)
    return iterate(_batches(examples, batch_size, share, first_step), num_workers)


def evaluation_batches(
    dataset: Dataset,
    preprocess: Preprocess,
    *,
    batch_size: int,
    num_workers: int = 0,
    share: Share = WHOLE,
) -> Batches:
    """Every photo once, in order; the last batch padded and masked. Close it (`contextlib.closing`)."""
    num_positions = steps_per_epoch(len(dataset), batch_size) * batch_size
    examples = grain.MapDataset.range(num_positions).map_with_index(_Load(dataset, preprocess))
    return iterate(_batches(examples, batch_size, share), num_workers)


def _batches(
    examples: "grain.MapDataset", batch_size: int, share: Share, first_step: int = 0
) -> "grain.MapDataset":
    """A share of each batch, from that of `first_step` on."""
    shares = examples.batch(batch_size // share.count, drop_remainder=True, batch_fn=_stack)
    return shares[first_step * share.count + share.index :: share.count]


def on_devices(batches: Batches, sharding: "Sharding") -> Generator[Batch, None, None]:
    """The same batches with images, labels and mask on the devices, copied ahead of use. Close it too.

    Each of several processes passes its shares, and gets whole batches.
    """
    from jaxcls.parallel import put_rows

    with closing(batches):
        ahead: deque[Batch] = deque()
        for batch in batches:
            images, labels, mask = put_rows((batch.images, batch.labels, batch.mask), sharding)
            ahead.append(batch._replace(images=images, labels=labels, mask=mask))
            if len(ahead) > NUM_BATCHES_AHEAD:
                yield ahead.popleft()
        yield from ahead


def iterate(batches: "grain.MapDataset", num_workers: int) -> Batches:
    """The elements of a Grain dataset, made ahead by threads or, if `num_workers`, so many processes."""
    # A thread makes a whole batch; a worker process has one, and its own place among the cores.
    num_threads = 1 if num_workers else min(os.cpu_count() or 1, MAX_THREADS)
    num_ahead = max(num_threads, NUM_BATCHES_AHEAD)
    stream = batches.to_iter_dataset(grain.ReadOptions(num_threads, prefetch_buffer_size=num_ahead))
    if num_workers:
        # A Grain worker parses absl's flags and fails in programs that are no absl programs.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        # Batches are made before this line: split over workers first, they would depend on the number.
        options = grain.MultiprocessingOptions(num_workers=num_workers)
        stream = stream.mp_prefetch(options, worker_init_fn=_follow_parent)
    return iter(stream)


def _follow_parent(*_: int) -> None:
    """Signals to the whole group are for the process that uses the batches; a worker ends with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()

"""Resident photos: decoded once, kept on the devices, gathered and cut there; or why they are streamed.

Order and views are those of `pipeline.training_batches` with the same seed. So are the pixels:
exactly, without random crops and colours; within 2 levels, with them. Only photos of more pixels than the
smallest crop needs, which are shrunk before they are cut, show somewhat more difference.
"""

import os
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxcls.augment.host import Augmentation, Views, draw_views
from jaxcls.augment.views import cut_views
from jaxcls.data.dataset import Dataset, leave_out, scan
from jaxcls.errors import ImageError, UsageError
from jaxcls.parallel import batch_sharding, memory_limit, put, replicated, steps_sharding
from jaxcls.pipeline import Batch, Share, evaluation_batches, on_devices, training_order
from jaxcls.preprocess import Preprocess
from jaxcls.progress import format_bytes, show_progress

MEMORY_SHARE = 0.25
"""Of a device's memory, and of the host's, that the photos of one dataset may take."""

NUM_SAMPLES = 16
"""Photos decoded to estimate what all would take."""

CROPPED_BY_HOST = frozenset({"cpu"})
"""Platforms on which "auto" streams random crops: on 2 cores, decoding and cropping with Pillow took 4 ms a
photo, cropping a resident one 10 ms (min_crop_area 0.5) to 22 ms (0.25)."""


class _Rows(NamedTuple):
    """What a program needs to know of each image that it is to cut: arrays of one leading size."""

    indices: Any
    labels: Any
    stored_sizes: Any
    views: Views


@dataclass(frozen=True, eq=False)
class ResidentPhotos:
    """The N photos of a dataset, on the devices.

    Attributes:
        pixels: uint8 [N, H, W, 3] on every device, padded below and at the right. Without random crops,
            of each photo the evaluation view: nothing else of it is ever seen.
        stored_sizes: int32 [N, 2] on the host, heights and widths without the padding.
        sizes: int32 [N, 2] on the host, heights and widths of the photos in full, from which boxes are drawn.
        labels: int32 [N] on the host.
        preprocess: how photos become images.
        augmentation: the views that the pixels were stored for.
        mesh: the devices.
    """

    pixels: jax.Array
    stored_sizes: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    preprocess: Preprocess
    augmentation: Augmentation
    mesh: Mesh

    def batches(self, *, batch_size: int, seed: int, first_step: int = 0) -> Generator[Batch, None, None]:
        """Full, shuffled, augmented batches without end, on the devices.

        Args:
            batch_size: B.
            seed: of order and views.
            first_step: start with this batch.
        """
        sharding = batch_sharding(self.mesh)
        cut = jax.jit(self._cut, in_shardings=(replicated(self.mesh), sharding), out_shardings=sharding)
        for step in count(first_step):
            rows = self._rows(seed, step * batch_size, batch_size)
            yield self._batch(rows.indices, *cut(self.pixels, put(rows, sharding)))

    def blocks(
        self, *, batch_size: int, seed: int, num_steps: Iterable[int], capacity: int, first_step: int = 0
    ) -> Generator[Batch, None, None]:
        """The same batches, several at once, for `train.step.make_train_loop`.

        Args:
            batch_size: B.
            seed: of order and views.
            num_steps: how many steps each block counts.
            capacity: K, the most that one can; a block has images [K, B, H, W, 3] and labels [K, B], those
                that do not count being arbitrary, but indices [n, B].
            first_step: start with this batch.
        """
        sharding = steps_sharding(self.mesh)

        def cut_all(pixels: jax.Array, rows: _Rows) -> tuple[jax.Array, jax.Array]:
            return jax.lax.map(lambda row: self._cut(pixels, row), rows)

        def arrange(values: np.ndarray) -> np.ndarray:
            values = values.reshape(-1, batch_size, *values.shape[1:])
            missing = [(0, capacity - len(values))] + [(0, 0)] * (values.ndim - 1)
            return np.pad(values, missing, mode="edge")

        cut = jax.jit(cut_all, in_shardings=(replicated(self.mesh), sharding), out_shardings=sharding)
        step = first_step
        for n in num_steps:
            rows = self._rows(seed, step * batch_size, n * batch_size)
            images, labels = cut(self.pixels, put(jax.tree.map(arrange, rows), sharding))
            yield self._batch(rows.indices.reshape(n, batch_size), images, labels)
            step += n

    def _rows(self, seed: int, position: int, num_rows: int) -> _Rows:
        positions = np.arange(position, position + num_rows)
        indices = training_order(len(self.labels), seed, positions).astype(np.int32)
        views = draw_views(seed, position, self.sizes[indices], self.augmentation)
        stored_sizes = self.stored_sizes[indices]
        views = views.scaled(stored_sizes / self.sizes[indices])
        return _Rows(indices, self.labels[indices], stored_sizes, views)

    def _cut(self, pixels: jax.Array, rows: _Rows) -> tuple[jax.Array, jax.Array]:
        photos = pixels.at[rows.indices].get(mode="promise_in_bounds")
        return cut_views(photos, rows.stored_sizes, rows.views, self.preprocess), rows.labels

    def _batch(self, indices: np.ndarray, images: jax.Array, labels: jax.Array) -> Batch:
        mask = np.ones(labels.shape, bool)
        return Batch(images, labels, mask, indices, self.sizes[indices], ("",) * indices.size)


class EvaluationViews:
    """The batches of an evaluation set: kept on the devices after the first time, since views are fixed.

    Args:
        dataset: that can be decoded.
        preprocess: how photos become images.
        mesh: the devices.
        budget: in bytes, what the images may take on each device; else every evaluation streams them.
        batch_size: over all processes.
        num_workers: of processes that decode.
        share: of each batch, this process's.
    """

    def __init__(
        self,
        dataset: Dataset,
        preprocess: Preprocess,
        mesh: Mesh,
        budget: int,
        *,
        batch_size: int,
        num_workers: int,
        share: Share,
    ) -> None:
        needed = len(dataset) * preprocess.size**2 * 3 // mesh.size
        self.resident_bytes = needed if needed <= budget else 0
        self._stream = partial(
            evaluation_batches,
            dataset,
            preprocess,
            batch_size=batch_size,
            num_workers=num_workers,
            share=share,
        )
        self._mesh = mesh
        self._kept: list[Batch] = []

    def batches(self) -> Generator[Batch, None, None]:
        """All of them once, on the devices."""
        if self._kept:
            yield from self._kept
            return
        kept: list[Batch] = []
        with closing(on_devices(self._stream(), batch_sharding(self._mesh))) as stream:
            for batch in stream:
                if self.resident_bytes:
                    kept.append(batch)
                yield batch
        self._kept = kept


class Choice(NamedTuple):
    """How a run gets its photos.

    Attributes:
        dataset: without the photos that cannot be decoded.
        photos: resident, or None: stream them.
        reason: a sentence for the user.
    """

    dataset: Dataset
    photos: ResidentPhotos | None
    reason: str


def choose_pipeline(
    pipeline: Literal["auto", "resident", "streaming"],
    dataset: Dataset,
    preprocess: Preprocess,
    augmentation: Augmentation,
    mesh: Mesh,
    budget: int,
    *,
    max_bad_fraction: float = 0.0,
) -> Choice:
    """Decode a dataset onto the devices if it fits there; find its undecodable photos in any case.

    Args:
        pipeline: "resident" insists; "streaming" forgoes; "auto" wants photos resident unless they do not
            fit, or are to be cropped at random on a CPU.
        dataset: the training photos.
        preprocess: how photos become images.
        augmentation: the views that training sees.
        mesh: the devices.
        budget: in bytes, what the photos may take on each device; see `memory_budget`.
        max_bad_fraction: fail when more than this share cannot be decoded.

    Raises:
        DatasetError: too many bad photos.
        UsageError: "resident" photos do not fit.
    """
    if pipeline == "streaming":
        return Choice(scan(dataset, max_bad_fraction=max_bad_fraction), None, "Streaming, as configured")
    if pipeline == "auto" and augmentation.crops and mesh.devices.flat[0].platform in CROPPED_BY_HOST:
        reason = "Streaming: without an accelerator, random crops are faster while photos are decoded"
        return Choice(scan(dataset, max_bad_fraction=max_bad_fraction), None, reason)
    store = _Store(dataset, preprocess, augmentation, budget)
    try:
        store.check_samples()
        stored = store.decode_all()
    except _TooLargeError as error:
        if pipeline == "resident":
            raise UsageError(f"the photos cannot be resident: {error}; stream them instead") from error
        return Choice(scan(dataset, max_bad_fraction=max_bad_fraction), None, f"Streaming: {error}")
    dataset = leave_out(dataset, [photo.problem for photo in stored], max_bad_fraction=max_bad_fraction)
    stored = [photo for photo in stored if photo.problem is None]
    photos = _to_devices(dataset, stored, store, mesh)
    reason = f"Resident: decoded once, {format_bytes(photos.pixels.nbytes)} on each device; {store.allowance}"
    return Choice(dataset, photos, reason)


def memory_budget(mesh: Mesh) -> int:
    """How many bytes of resident photos each device may hold: `MEMORY_SHARE` of its memory and the host's."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(MEMORY_SHARE * min(memory_limit(mesh), physical))


class _TooLargeError(Exception):
    """The photos exceed the budget; the message says by how much, and for which photo."""


class _Stored(NamedTuple):
    pixels: Any
    size: tuple[int, int]
    problem: str | None


@dataclass(frozen=True)
class _Store:
    """Decodes photos as they are to be stored, and watches what they take."""

    dataset: Dataset
    preprocess: Preprocess
    augmentation: Augmentation
    budget: int

    @property
    def allowance(self) -> str:
        return f"{format_bytes(self.budget)} is allowed, {MEMORY_SHARE:.0%} of the memory"

    def decode(self, index: int) -> _Stored:
        short_side = self.augmentation.short_side(self.preprocess)
        try:
            photo = self.dataset.photo(index)
            image = photo.decode(short_side)
        except ImageError as error:
            return _Stored(np.zeros((0, 0, 3), np.uint8), (0, 0), str(error))
        crops = self.augmentation.crops
        pixels = (
            self.preprocess.shrink(image, short_side) if crops else self.preprocess.resize_and_crop(image)
        )
        return _Stored(pixels, photo.size, None)

    def check_samples(self) -> None:
        """Look at a few photos before decoding many in vain."""
        if len(self.dataset) > NUM_SAMPLES:
            indices = np.linspace(0, len(self.dataset) - 1, NUM_SAMPLES).astype(int)
            self._decode(indices.tolist(), "sampling")

    def decode_all(self) -> list[_Stored]:
        return self._decode(range(len(self.dataset)), "decoding")

    def _decode(self, indices: Sequence[int], what: str) -> list[_Stored]:
        decoded: list[_Stored] = []
        height = width = 0
        pool = ThreadPoolExecutor()
        try:
            photos = show_progress(pool.map(self.decode, indices), what, len(indices))
            for index, photo in zip(indices, photos, strict=True):
                decoded.append(photo)
                height, width = max(height, photo.pixels.shape[0]), max(width, photo.pixels.shape[1])
                needed = len(self.dataset) * height * width * 3
                if needed > self.budget:
                    raise _TooLargeError(
                        f"{len(self.dataset)} photos padded to {height} x {width} pixels, among them "
                        f"{self.dataset.ids[index]} of {photo.pixels.shape[0]} x {photo.pixels.shape[1]}, "
                        f"take {format_bytes(needed)} on each device; {self.allowance}"
                    )
        finally:
            pool.shutdown(cancel_futures=True)
        return decoded


def _to_devices(dataset: Dataset, stored: list[_Stored], store: _Store, mesh: Mesh) -> ResidentPhotos:
    stored_sizes = np.asarray([photo.pixels.shape[:2] for photo in stored], np.int32)
    sizes = np.asarray([photo.size for photo in stored], np.int32)
    height, width = stored_sizes.reshape(-1, 2).max(axis=0, initial=0)
    pixels = np.zeros((len(stored), height, width, 3), np.uint8)
    while stored:  # each photo is let go as soon as it is copied: the memory is not needed twice
        photo = stored.pop().pixels
        pixels[len(stored), : photo.shape[0], : photo.shape[1]] = photo
    on_devices = put(pixels, replicated(mesh))
    return ResidentPhotos(
        on_devices, stored_sizes, sizes, dataset.labels, store.preprocess, store.augmentation, mesh
    )

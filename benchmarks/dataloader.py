"""torch's `DataLoader` over Pillow, with a process per core, cutting the same boxes as our stream."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.photos import AUGMENTATION, SEED, Reading, make_photos, num_photos, scratch_folder
from benchmarks.timing import Program
from benchmarks.worker import Task
from jaxcls.augment.host import draw_views

NUM_POSITIONS = 10**9


class RandomViews(Dataset[np.ndarray]):
    """Endless random views: that at a position is what our stream draws there for the same photo.

    Args:
        paths: of the photos, taken in turn.
        size: of a view, in pixels.
    """

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return NUM_POSITIONS

    def __getitem__(self, position: int) -> np.ndarray:
        return self.view(position, position % len(self.paths))

    def view(self, position: int, index: int) -> np.ndarray:
        """uint8 [size, size, 3] of photo `index`."""
        with Image.open(self.paths[index]) as file:
            photo = file.convert("RGB")
        views = draw_views(SEED, position, np.asarray([[photo.height, photo.width]]), AUGMENTATION)
        box = tuple(views.boxes[0].tolist())
        view = photo.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        if views.flips[0]:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.array(view)  # torch wants it writable


def input_pipeline(task: Task) -> Program:
    """Photos to batches by `DataLoader`."""
    folder = make_photos(scratch_folder(), num_photos(task.photo_side), task.photo_side)
    views = RandomViews(sorted(folder.rglob("*.jpg")), task.image_size)
    return Reading(partial(_stream, views, task.batch_size), task)


@contextmanager
def _stream(views: RandomViews, batch_size: int) -> Iterator[Iterator[np.ndarray]]:
    loader = DataLoader(views, batch_size, num_workers=os.cpu_count() or 1)
    batches = iter(loader)
    yield (_as_numpy(batch) for batch in batches)
    del batches  # ends its processes


def _as_numpy(batch: torch.Tensor) -> np.ndarray:
    return batch.numpy()

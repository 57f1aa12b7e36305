"""Resident photos against the stream: same photos, boxes and flips; and when they do not fit."""

from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxcls.resident
from jaxcls.augment.host import Augmentation
from jaxcls.data.dataset import Dataset
from jaxcls.data.source import MemorySource
from jaxcls.errors import DatasetError, UsageError
from jaxcls.parallel import make_mesh
from jaxcls.pipeline import training_batches
from jaxcls.preprocess import Preprocess
from jaxcls.resident import MEMORY_SHARE, choose_pipeline, memory_budget

B = 4
SMALL = Preprocess(size=16)
PLAIN, CROPS = Augmentation(flip=True), Augmentation(True, 0.3, 0.2)


def make_photos(num_photos, *, sides=(10, 29), unreadable=()):
    """Noise of random sizes; the short side at which crops of 0.3 keep 16 pixels is 30."""
    generator = np.random.default_rng(0)
    shapes = generator.integers(*sides, (num_photos, 2))
    items = [generator.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    items = [b"no photo" if i in unreadable else item for i, item in enumerate(items)]
    ids = [f"photo {i}" for i in range(num_photos)]
    return Dataset("photos", ("a", "b", "c"), np.arange(num_photos) % 3, ids, MemorySource(items))


@pytest.fixture(autouse=True)
def _crop_on_the_device(monkeypatch):
    """As accelerators do."""
    monkeypatch.setattr(jaxcls.resident, "CROPPED_BY_HOST", frozenset())


def choose(dataset, augmentation=CROPS, pipeline="auto", **options):
    mesh = make_mesh(B)
    budget = options.pop("budget", memory_budget(mesh))
    return choose_pipeline(pipeline, dataset, SMALL, augmentation, mesh, budget, **options)


def resident_batches(num_batches, dataset, augmentation=CROPS, **options):
    photos = choose(dataset, augmentation).photos
    with closing(photos.batches(batch_size=B, **options)) as batches:
        return list(islice(batches, num_batches))


def streamed_batches(num_batches, dataset, augmentation=CROPS, **options):
    with closing(training_batches(dataset, SMALL, augmentation, batch_size=B, **options)) as batches:
        return list(islice(batches, num_batches))


def assert_alike(batches, others, *, levels):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for field in ("labels", "mask", "indices", "sizes", "errors"):
            np.testing.assert_array_equal(getattr(batch, field), getattr(other, field))
        assert batch.images.dtype == np.uint8
        assert np.abs(np.asarray(batch.images).astype(int) - other.images).max() <= levels


@pytest.mark.parametrize(("augmentation", "levels"), [(Augmentation(), 0), (PLAIN, 0), (CROPS, 2)])
def test_batches_are_those_of_the_stream(augmentation, levels):
    dataset = make_photos(7)
    resident = resident_batches(6, dataset, augmentation, seed=5)
    assert_alike(resident, streamed_batches(6, dataset, augmentation, seed=5), levels=levels)
    late = resident_batches(2, dataset, augmentation, seed=5, first_step=4)
    assert_alike(late, [jax.device_get(batch) for batch in resident[4:]], levels=0)


def test_batches_lie_sharded_over_the_devices():
    (batch,) = resident_batches(1, make_photos(5), seed=0)
    assert [shard.data.shape for shard in batch.images.addressable_shards] == [(2, 16, 16, 3)] * 2
    assert [shard.data.shape for shard in batch.labels.addressable_shards] == [(2,)] * 2


def test_blocks_are_the_batches_several_at_once():
    dataset = make_photos(7)
    photos = choose(dataset).photos
    sizes = [3, 1, 2]
    with closing(photos.blocks(batch_size=B, seed=5, num_steps=sizes, capacity=3, first_step=1)) as blocks:
        blocks = list(blocks)
    assert [block.images.shape for block in blocks] == [(3, B, 16, 16, 3)] * 3
    assert [len(block.indices) for block in blocks] == sizes
    expected = resident_batches(7, dataset, seed=5)[1:]
    seen = [row for block in blocks for row in zip(block.images, block.labels, block.indices, strict=False)]
    assert len(seen) == len(expected) == 6
    for (images, labels, indices), batch in zip(seen, expected, strict=True):
        np.testing.assert_array_equal(images, batch.images)
        np.testing.assert_array_equal(labels, batch.labels)
        np.testing.assert_array_equal(indices, batch.indices)


def test_large_photos_are_shrunk_and_still_cut_where_the_stream_cuts():
    """Smooth photos: of noise, shrunk before it is cut, other averages remain."""
    ramp = np.linspace(0, 250, 90).astype(np.uint8)
    photo = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], 0), axis=-1).astype(np.uint8)
    dataset = make_photos(3, sides=(90, 91))
    dataset = replace(dataset, source=MemorySource([photo, photo[::-1].copy(), photo[:, :60].copy()]))
    photos = choose(dataset).photos
    assert photos.pixels.shape == (3, 45, 30, 3)
    assert photos.sizes.tolist() == [[90, 90], [90, 90], [90, 60]]
    resident = resident_batches(5, dataset, seed=1)
    assert_alike(resident, streamed_batches(5, dataset, seed=1), levels=8)


def test_true_sizes_are_kept_and_padding_is_only_below_and_right():
    dataset = make_photos(5)
    photos = choose(dataset).photos
    shapes = [item.shape[:2] for item in dataset.source.items]
    assert photos.stored_sizes.tolist() == photos.sizes.tolist() == [list(shape) for shape in shapes]
    for i, (height, width) in enumerate(shapes):
        np.testing.assert_array_equal(photos.pixels[i, :height, :width], dataset.source[i])


def test_without_crops_only_the_views_are_stored():
    """However long a strip: nothing is padded."""
    dataset = make_photos(3)
    items = [*dataset.source.items[:2], np.zeros((4, 4000, 3), np.uint8)]
    photos = choose(replace(dataset, source=MemorySource(items)), PLAIN).photos
    assert photos.pixels.shape == (3, 16, 16, 3)
    np.testing.assert_array_equal(photos.pixels[1], SMALL.resize_and_crop(items[1]))


# What does not fit


def test_the_share_of_memory_is_divided_among_cpu_devices():
    lines = Path("/proc/meminfo").read_text().splitlines()
    (total,) = (1024 * int(line.split()[1]) for line in lines if line.startswith("MemTotal:"))
    container = Path("/sys/fs/cgroup/memory.max")
    if container.exists() and container.read_text().strip().isdecimal():
        total = min(total, int(container.read_text()))
    assert memory_budget(make_mesh(B)) == pytest.approx(MEMORY_SHARE * total / 2, rel=0.01)


@pytest.mark.parametrize("num_photos", [5, 100])
def test_photos_that_do_not_fit_are_streamed_and_it_is_said_why(num_photos):
    dataset = make_photos(num_photos, sides=(20, 21))
    num_bytes = num_photos * 20 * 20 * 3
    choice = choose(dataset, budget=num_bytes)
    assert choice.photos.pixels.nbytes == num_bytes
    assert choice.reason.startswith("Resident: decoded once, ")
    choice = choose(dataset, budget=num_bytes - 1)
    assert choice.photos is None
    assert choice.reason.startswith(
        f"Streaming: {num_photos} photos padded to 20 x 20 pixels, among them photo 0"
    )
    with pytest.raises(
        UsageError, match=r"cannot be resident: .* take .* on each device; .* is allowed, 25%"
    ):
        choose(dataset, pipeline="resident", budget=num_bytes - 1)


def test_a_photo_that_pads_all_others_too_much_is_named():
    dataset = make_photos(40, sides=(20, 21))
    items = [*dataset.source.items[:25], np.zeros((20, 2000, 3), np.uint8), *dataset.source.items[26:]]
    choice = choose(replace(dataset, source=MemorySource(items)), budget=40 * 20 * 100 * 3)
    assert choice.photos is None
    assert (
        "40 photos padded to 20 x 2000 pixels, among them photo 25 of 20 x 2000, take 4.6 MiB"
        in choice.reason
    )


@pytest.mark.parametrize(
    ("pipeline", "augmentation", "is_resident"),
    [("auto", CROPS, False), ("auto", PLAIN, True), ("resident", CROPS, True), ("streaming", PLAIN, False)],
)
def test_on_a_cpu_random_crops_are_streamed_unless_asked_otherwise(
    monkeypatch, pipeline, augmentation, is_resident
):
    monkeypatch.setattr(jaxcls.resident, "CROPPED_BY_HOST", frozenset({"cpu"}))
    choice = choose(make_photos(3), augmentation, pipeline)
    assert (choice.photos is not None) == is_resident
    assert choice.reason.startswith("Resident" if is_resident else "Streaming")


class CountingSource(MemorySource):
    num_read = 0

    def __getitem__(self, index):
        type(self).num_read += 1
        return super().__getitem__(index)


def test_a_large_dataset_is_not_decoded_in_vain(monkeypatch):
    """Apart from the search for bad photos, as many are read as are sampled."""
    dataset = make_photos(300, sides=(20, 21))
    dataset = replace(dataset, source=CountingSource(dataset.source.items))
    monkeypatch.setattr(jaxcls.resident, "scan", lambda dataset, **options: dataset)
    assert choose(dataset, budget=1000).photos is None
    assert CountingSource.num_read <= jaxcls.resident.NUM_SAMPLES


@pytest.mark.parametrize("pipeline", ["auto", "streaming"])
def test_undecodable_photos_are_left_out_or_refused_in_the_same_words(pipeline):
    dataset = make_photos(6, unreadable=(1, 4))
    with pytest.raises(DatasetError, match=r"2 of 6 images cannot be decoded(.|\n)*photo 1: not an image"):
        choose(dataset, pipeline=pipeline, max_bad_fraction=0.3)
    choice = choose(dataset, pipeline=pipeline, max_bad_fraction=0.5)
    assert list(choice.dataset.ids) == ["photo 0", "photo 2", "photo 3", "photo 5"]
    assert "2 undecodable images left out:" in choice.dataset.notes
    if choice.photos is not None:
        expected = streamed_batches(3, choice.dataset, seed=0)
        with closing(choice.photos.batches(batch_size=B, seed=0)) as batches:
            assert_alike(list(islice(batches, 3)), expected, levels=2)

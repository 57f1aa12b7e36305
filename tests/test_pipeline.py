"""The stream: which photo is where in it, and that nothing but its address decides how it looks."""

import io
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from itertools import islice

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from jaxcls.augment.host import Augmentation, cut_view, draw_views
from jaxcls.data.dataset import Dataset
from jaxcls.data.source import MemorySource
from jaxcls.parallel import batch_sharding, make_mesh
from jaxcls.pipeline import (
    Batch,
    evaluation_batches,
    on_devices,
    steps_per_epoch,
    training_batches,
    training_order,
)
from jaxcls.preprocess import Preprocess

SMALL = Preprocess(size=8)
STRONG = Augmentation(flip=True, min_crop_area=0.3, colour_jitter=0.2)


def make_photos(num_photos, *, unreadable=()):
    """Noise of 12 + i x 20 pixels; labels 0 1 2 0 1 2 ..."""
    generator = np.random.default_rng(0)
    items = [generator.integers(0, 256, (12 + i, 20, 3), np.uint8) for i in range(num_photos)]
    items = [b"no photo" if i in unreadable else item for i, item in enumerate(items)]
    ids = [f"photo {i}" for i in range(num_photos)]
    return Dataset("photos", ("a", "b", "c"), np.arange(num_photos) % 3, ids, MemorySource(items))


def first_batches(num_batches, dataset, augmentation=STRONG, *, batch_size=4, seed=0, **options):
    batches = training_batches(dataset, SMALL, augmentation, batch_size=batch_size, seed=seed, **options)
    with closing(batches):
        return list(islice(batches, num_batches))


def evaluated(dataset, batch_size):
    with closing(evaluation_batches(dataset, SMALL, batch_size=batch_size)) as batches:
        return list(batches)


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for value, expected in zip(batch, other, strict=True):
            np.testing.assert_array_equal(np.asarray(value), np.asarray(expected), strict=True)


def indices_of(batches):
    return np.concatenate([batch.indices for batch in batches]).tolist()


def wait_for_threads(num_threads):
    deadline = time.monotonic() + 10
    while threading.active_count() > num_threads and time.monotonic() < deadline:
        time.sleep(0.01)
    return threading.active_count()


# Training


def test_a_batch_has_its_shapes_and_types():
    (batch,) = first_batches(1, make_photos(7))
    assert batch._fields == ("images", "labels", "mask", "indices", "sizes", "errors")
    forms = [(value.dtype, value.shape) for value in batch[:-1]]
    assert forms == [
        (np.uint8, (4, 8, 8, 3)),
        (np.int32, (4,)),
        (np.bool_, (4,)),
        (np.int32, (4,)),
        (np.int32, (4, 2)),
    ]
    assert batch.errors == ("",) * 4
    assert batch.mask.all()
    assert batch.labels.tolist() == [i % 3 for i in batch.indices]
    assert batch.sizes.tolist() == [[12 + i, 20] for i in batch.indices]


@pytest.mark.parametrize(("num_photos", "batch_size"), [(7, 4), (8, 4), (3, 8), (1, 4), (5, 1)])
def test_every_batch_is_full_and_every_photo_is_seen_equally_often(num_photos, batch_size):
    dataset = make_photos(num_photos)
    # After `batch_size` permutations a batch and a permutation end together.
    batches = first_batches(num_photos, dataset, Augmentation(), batch_size=batch_size)
    assert all(len(batch.images) == batch_size and batch.mask.all() for batch in batches)
    seen = indices_of(batches)
    permutations = [seen[start : start + num_photos] for start in range(0, len(seen), num_photos)]
    assert len(permutations) == batch_size
    assert all(sorted(permutation) == list(range(num_photos)) for permutation in permutations)
    assert Counter(seen) == dict.fromkeys(range(num_photos), batch_size)


def test_each_permutation_and_each_seed_is_another():
    seen = indices_of(first_batches(10, make_photos(20), batch_size=20))
    assert len({tuple(seen[start : start + 20]) for start in range(0, 200, 20)} | {tuple(range(20))}) == 11
    first = {tuple(indices_of(first_batches(1, make_photos(20), batch_size=20, seed=s))) for s in range(10)}
    assert len(first) == 10


@pytest.mark.parametrize(
    ("num_photos", "batch_size", "steps"),
    [(41, 32, 2), (64, 32, 2), (65, 32, 3), (1, 32, 1), (0, 32, 0), (5, 1, 5)],
)
def test_an_epoch_is_as_many_steps_as_cover_it(num_photos, batch_size, steps):
    assert steps_per_epoch(num_photos, batch_size) == steps


def test_the_evaluation_view_comes_where_nothing_is_augmented():
    dataset = make_photos(5)
    (batch,) = first_batches(1, dataset, Augmentation())
    for view, index in zip(batch.images, batch.indices, strict=True):
        np.testing.assert_array_equal(view, SMALL.resize_and_crop(dataset.source[index]))


def test_a_view_is_drawn_from_seed_and_position_alone():
    dataset = make_photos(5)
    batches = first_batches(5, dataset, batch_size=3, seed=11)
    views = np.concatenate([batch.images for batch in batches])
    for position, (view, index) in enumerate(zip(views, indices_of(batches), strict=True)):
        photo = dataset.source[index]
        drawn = draw_views(11, position, np.asarray([photo.shape[:2]]), STRONG)
        np.testing.assert_array_equal(view, cut_view(photo, SMALL, drawn))


def test_a_large_jpeg_is_decoded_at_the_scale_of_its_view(monkeypatch):
    y, x = np.mgrid[:600, :800]
    photo = np.stack([255 * x / 800, 255 * y / 600, 127 + 127 * np.sin((x + y) / 90)], -1).astype(np.uint8)
    file = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6  # on its side
    Image.fromarray(np.rot90(photo)).save(file, "JPEG", quality=95, exif=exif)
    dataset = Dataset("large", ("a", "b"), [0], ["large"], MemorySource([file.getvalue()]))
    decoded_sizes, draft = [], JpegImageFile.draft

    def watched_draft(image, *args):
        result = draft(image, *args)
        decoded_sizes.append(min(image.size))
        return result

    monkeypatch.setattr(JpegImageFile, "draft", watched_draft)
    preprocess, crops = Preprocess(size=56), Augmentation(min_crop_area=0.08)
    with closing(training_batches(dataset, preprocess, crops, batch_size=8, seed=2)) as batches:
        batch = next(batches)
    assert batch.sizes.tolist() == [[600, 800]] * 8
    assert set(decoded_sizes) == {600, 300, 150}
    for position in range(8):
        views = draw_views(2, position, np.asarray([[600, 800]]), crops)
        difference = batch.images[position].astype(int) - cut_view(photo, preprocess, views)
        assert np.abs(difference).max() <= 6


def test_the_order_is_the_same_in_any_pieces():
    whole = training_order(7, 3, np.arange(70))
    pieces = [training_order(7, 3, np.arange(first, first + 5)) for first in range(0, 70, 5)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    assert len({tuple(training_order(20, seed, np.arange(20))) for seed in range(50)}) == 50
    # Epoch 1 of one seed is not epoch 0 of the next.
    assert list(training_order(20, 0, np.arange(20, 40))) != list(training_order(20, 1, np.arange(20)))


@pytest.mark.parametrize("first_step", [1, 3, 8])
def test_a_resumed_stream_is_the_rest_of_the_undisturbed_one(first_step):
    dataset = make_photos(7)
    whole = first_batches(first_step + 3, dataset, seed=5)
    assert_same(first_batches(3, dataset, seed=5, first_step=first_step), whole[first_step:])


def test_a_resumed_stream_starts_at_once_however_far_it_is():
    begin = time.monotonic()
    (batch,) = first_batches(1, make_photos(7), first_step=10**8)
    assert time.monotonic() - begin < 5
    assert batch.mask.all()


def test_the_number_of_workers_changes_nothing():
    dataset = make_photos(7, unreadable=(3,))
    alone = first_batches(7, dataset, seed=3)
    assert "photo 3: not an image" in "".join(message for batch in alone for message in batch.errors)
    for num_workers in (2, 3):
        assert_same(first_batches(7, dataset, seed=3, num_workers=num_workers), alone)


# Evaluation


@pytest.mark.parametrize(("num_photos", "batch_size"), [(7, 4), (8, 4), (3, 8), (1, 1)])
def test_evaluation_sees_every_photo_once_in_order(num_photos, batch_size):
    dataset = make_photos(num_photos)
    batches = evaluated(dataset, batch_size)
    assert len(batches) == steps_per_epoch(num_photos, batch_size)
    num_padding = len(batches) * batch_size - num_photos
    assert indices_of(batches) == [*range(num_photos), *[-1] * num_padding]
    columns = {name: np.concatenate([getattr(b, name) for b in batches]) for name in Batch._fields[:-1]}
    assert columns["mask"].tolist() == [True] * num_photos + [False] * num_padding
    assert columns["labels"].tolist() == [*(i % 3 for i in range(num_photos)), *[-1] * num_padding]
    assert columns["sizes"].tolist() == [*([12 + i, 20] for i in range(num_photos)), *[[0, 0]] * num_padding]
    assert columns["images"].shape == (len(batches) * batch_size, 8, 8, 3)
    for i in range(num_photos):
        np.testing.assert_array_equal(columns["images"][i], SMALL.resize_and_crop(dataset.source[i]))
    assert not columns["images"][num_photos:].any()
    assert {message for batch in batches for message in batch.errors} == {""}


def test_of_no_photos_there_are_no_batches():
    assert evaluated(make_photos(0), 4) == []


def test_an_unreadable_photo_is_masked_and_named_and_the_rest_unaffected():
    batches = evaluated(make_photos(6, unreadable=(1, 4)), 4)
    assert [batch.mask.tolist() for batch in batches] == [
        [True, False, True, True],
        [False, True, False, False],
    ]
    assert [batch.indices.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, -1, -1]]
    assert [batch.labels.tolist() for batch in batches] == [[0, 1, 2, 0], [1, 2, -1, -1]]
    assert batches[0].errors[1].startswith("photo 1: not an image in a known format")
    assert batches[1].errors[0].startswith("photo 4: ")
    assert [bool(message) for batch in batches for message in batch.errors] == [i in (1, 4) for i in range(8)]
    for batch, sound in zip(batches, evaluated(make_photos(6), 4), strict=True):
        np.testing.assert_array_equal(batch.images[batch.mask], sound.images[batch.mask])
        assert not batch.images[~batch.mask].any()
        assert not batch.sizes[~batch.mask].any()


def test_training_masks_an_unreadable_photo_too():
    for batch in first_batches(3, make_photos(4, unreadable=(2,))):
        assert batch.mask.tolist() == [index != 2 for index in batch.indices]
        assert [bool(message) for message in batch.errors] == [index == 2 for index in batch.indices]


class FailingSource(MemorySource):
    def __getitem__(self, index):
        raise RuntimeError("the disk is on fire")


def test_a_defect_of_a_source_surfaces():
    dataset = Dataset("photos", ("a",), [0, 0], ["1", "2"], FailingSource([b"", b""]))
    with pytest.raises(RuntimeError, match="the disk is on fire"):
        evaluated(dataset, 2)


# Devices


@pytest.mark.parametrize("num_photos", [1, 8, 27])
def test_on_devices_keeps_order_and_content(num_photos):
    assert len(jax.devices()) == 2
    dataset = make_photos(num_photos, unreadable=(5,))
    sharding = batch_sharding(make_mesh(4))
    batches = evaluation_batches(dataset, SMALL, batch_size=4)
    with closing(on_devices(batches, sharding)) as stream:
        on_device = list(stream)
    assert_same(on_device, evaluated(dataset, 4))
    for batch in on_device:
        for array in (batch.images, batch.labels, batch.mask):
            assert isinstance(array, jax.Array)
            assert array.sharding.is_equivalent_to(
                NamedSharding(make_mesh(4), PartitionSpec("data")), array.ndim
            )
            assert [shard.data.shape[0] for shard in array.addressable_shards] == [2, 2]
            assert {shard.device for shard in array.addressable_shards} == set(jax.devices())
        assert isinstance(batch.indices, np.ndarray)
        assert isinstance(batch.errors, tuple)


@pytest.mark.parametrize("num_taken", [0, 1, 5])
def test_closing_early_stops_the_threads(num_taken):
    make_mesh(4)
    jax.device_put(np.zeros(4), batch_sharding(make_mesh(4))).block_until_ready()
    num_threads = threading.active_count()
    batches = training_batches(make_photos(7), SMALL, STRONG, batch_size=4, seed=0)
    begin = time.monotonic()
    with closing(on_devices(batches, batch_sharding(make_mesh(4)))) as stream:
        assert len(list(islice(stream, num_taken))) == num_taken
    assert wait_for_threads(num_threads) <= num_threads
    assert time.monotonic() - begin < 5


# Imports


@pytest.mark.parametrize(
    "program",
    [
        "import sys, jaxcls.augment.host, jaxcls.data.folder; assert 'jax' not in sys.modules",
        # Grain loads JAX where it finds it; its workers must not need it.
        "import sys; sys.modules['jax'] = None; import jaxcls.pipeline",
    ],
    ids=["data", "pipeline"],
)
def test_decoding_needs_no_jax(program):
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)

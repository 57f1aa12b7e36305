"""Folders of records: what goes in comes out, from anywhere; and what damage is noticed as."""

import io
import json
import pickle
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import draw, write_photos
from PIL import Image, ImageOps

from jaxcls.augment.host import Augmentation
from jaxcls.data import arrayrecord
from jaxcls.data.arrayrecord import INDEX, MANIFEST, read_arrayrecord, shard_name, write_arrayrecord
from jaxcls.data.dataset import Dataset, from_items, scan
from jaxcls.data.folder import read_folder
from jaxcls.errors import DatasetError, ImageError, UsageError
from jaxcls.pipeline import evaluation_batches, training_batches
from jaxcls.preprocess import Preprocess
from jaxcls.storage import file_sha256


def encode(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def labelled(items, ids=None, **values):
    """Photos of two classes, the last of them unlabelled."""
    labels = [*(np.arange(len(items) - 1) % 2), -1]
    found = replace(from_items(items), classes=("tasse", "茶碗"), labels=labels, name="küche", **values)
    return found if ids is None else replace(found, ids=ids)


@pytest.fixture
def photos():
    items = [encode(draw(seed), kind) for seed, kind in enumerate(["JPEG", "PNG", "WEBP", "BMP", "GIF"])]
    ids = ["tasse/a b.jpg", "茶碗/写真.png", "x\ny", "tasse/é", "0"]
    return labelled(items, ids, groups=[0, 1, 1, 2, 3])


@pytest.mark.parametrize("shards", [1, 2, 5, 99])
def test_all_comes_back_byte_for_byte_and_in_order(photos, tmp_path, shards):
    path = write_arrayrecord(photos, tmp_path / "records", shards=shards)
    found = read_arrayrecord(str(path), verify=True, max_pixels=10**5)
    assert [found.source[i] for i in range(5)] == photos.source.items
    assert (found.name, found.classes, found.max_pixels) == ("küche", ("tasse", "茶碗"), 10**5)
    for name in ("labels", "ids", "groups"):
        assert getattr(found, name).tolist() == getattr(photos, name).tolist()
        assert getattr(found, name).dtype == getattr(photos, name).dtype
    num_shards = min(shards, 5)
    names = [shard_name(number, num_shards) for number in range(num_shards)]
    assert sorted(file.name for file in path.iterdir()) == sorted([INDEX, MANIFEST, *names])
    assert names[0] == f"photos-00000-of-{num_shards:05d}.arrayrecord"
    assert found.source.path(0) is None


def test_without_groups_there_are_none(photos, tmp_path):
    path = write_arrayrecord(replace(photos, groups=None), tmp_path / "records")
    assert read_arrayrecord(path).groups is None


def test_a_copy_stays_with_its_original(photos, tmp_path):
    photos = replace(photos, groups=None, origins=["", "", "tasse/a b.jpg", "", "茶碗/写真.png"])
    found = read_arrayrecord(write_arrayrecord(photos, tmp_path / "records"))
    assert found.origins.tolist() == photos.origins.tolist()
    assert found.groups.tolist() == photos.groups.tolist()
    assert found.groups[2] == found.groups[0] != found.groups[3]


def test_arrays_and_arrays_alone_become_png(tmp_path):
    pixels = np.asarray(draw(0))
    path = write_arrayrecord(labelled([pixels, b"not decoded, so not missed"]), tmp_path / "records")
    found = read_arrayrecord(path)
    assert found.source[0].startswith(b"\x89PNG")
    np.testing.assert_array_equal(found.image(0), pixels)
    assert found.source[1] == b"not decoded, so not missed"
    with pytest.raises(ImageError, match="not an image in a known format"):
        found.image(1)


def test_resized_once_the_short_side_is_as_asked(tmp_path):
    wide, tall, small = draw(0, (400, 300)), draw(1, (300, 600)), encode(draw(2, (90, 64)))
    items = [encode(wide, quality=95), encode(tall, "PNG"), small, np.asarray(wide)]
    path = write_arrayrecord(labelled(items), tmp_path / "records", size=64)
    found = read_arrayrecord(path)
    assert [found.photo(i).size for i in range(4)] == [(64, 85), (128, 64), (64, 90), (64, 85)]
    assert found.source[0].startswith(b"\xff\xd8\xff")
    assert found.source[2] == small
    expected = [picture.resize(size, Image.Resampling.BILINEAR) for picture, size in
                ((wide, (85, 64)), (tall, (64, 128)), (wide, (85, 64)))]  # fmt: skip
    np.testing.assert_array_equal(found.image(1), expected[1])
    np.testing.assert_array_equal(found.image(3), expected[2])
    assert np.abs(found.image(0).astype(int) - np.asarray(expected[0])).mean() < 2


def test_a_resized_photo_is_upright(tmp_path):
    sideways = draw(0, (200, 100))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write_arrayrecord(
        labelled([encode(sideways, exif=exif, quality=95)]), tmp_path / "records", size=50
    )
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encode(sideways, exif=exif, quality=95))))
    found = read_arrayrecord(path).image(0)
    assert found.shape == (100, 50, 3)
    assert (
        np.abs(found.astype(int) - np.asarray(upright.resize((50, 100), Image.Resampling.BILINEAR))).mean()
        < 3
    )


def test_records_may_be_packed_again(photos, tmp_path):
    first = read_arrayrecord(write_arrayrecord(photos, tmp_path / "first"))
    second = read_arrayrecord(write_arrayrecord(first.select([4, 0, 2]), tmp_path / "second", shards=2))
    assert [second.source[i] for i in range(3)] == [photos.source.items[i] for i in (4, 0, 2)]
    assert second.ids.tolist() == ["0", "tasse/a b.jpg", "x\ny"]


def test_any_number_of_threads_read_at_once(tmp_path):
    items = [bytes([number]) * (100 + number) for number in range(200)]
    source = read_arrayrecord(write_arrayrecord(labelled(items), tmp_path / "records", shards=7)).source
    order = np.random.default_rng(0).integers(0, 200, 4000).tolist()
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(source.__getitem__, order)) == [items[i] for i in order]


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(arrayrecord, "MAX_OPEN_FILES", 3)
    items = [bytes([number]) * 9 for number in range(20)]
    source = read_arrayrecord(write_arrayrecord(labelled(items), tmp_path / "records", shards=20)).source
    for _ in range(2):
        assert [source[i] for i in range(20)] == items
    folder = Path("/proc/self/fd")
    links = [link.readlink() for link in folder.iterdir() if link.is_symlink()]
    assert sum(link.is_relative_to(tmp_path) for link in links) == 3


def test_a_copy_in_another_process_opens_its_own_files(photos, tmp_path):
    path = write_arrayrecord(photos, tmp_path / "records", shards=3)
    source = read_arrayrecord(path).source
    assert source[1] == photos.source.items[1]
    assert pickle.loads(pickle.dumps(source))[4] == photos.source.items[4]
    # A process of its own: JAX, which this one has loaded, does not bear to be forked.
    code = """
import os, sys
from jaxcls.data.arrayrecord import read_arrayrecord

def offsets():
    names = os.listdir("/proc/self/fd")
    return [name for name in names if os.path.realpath(f"/proc/self/fd/{name}").startswith(sys.argv[1])]

source = read_arrayrecord(sys.argv[1]).source
items, before = [source[i] for i in range(5)], offsets()
child = os.fork()
if child == 0:
    same = [source[i] for i in range(5)] == items
    os._exit(0 if same and len(offsets()) == 2 * len(before) == 6 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_training_sees_what_it_sees_of_the_folder(tmp_path):
    folder = read_folder(write_photos(tmp_path / "photos", {"blue": 4, "red": 4}))
    records = read_arrayrecord(write_arrayrecord(folder, tmp_path / "records", shards=3))
    preprocess, augmentation = Preprocess(size=32), Augmentation(flip=True, min_crop_area=0.3)
    options = {"batch_size": 3, "seed": 7}
    with (
        closing(training_batches(folder, preprocess, augmentation, **options)) as expected,
        closing(training_batches(records, preprocess, augmentation, **options)) as found,
    ):
        for _ in range(4):
            first, second = next(expected), next(found)
            np.testing.assert_array_equal(first.images, second.images)
            np.testing.assert_array_equal(first.labels, second.labels)
            np.testing.assert_array_equal(first.indices, second.indices)


@pytest.mark.slow
def test_workers_make_the_batches_that_the_folder_makes(tmp_path):
    folder = read_folder(write_photos(tmp_path / "photos", {"blue": 4, "red": 4}))
    records = read_arrayrecord(write_arrayrecord(folder, tmp_path / "records", shards=3))
    options = {"batch_size": 4}
    expected = evaluation_batches(folder, Preprocess(size=32), **options)
    found = evaluation_batches(records, Preprocess(size=32), num_workers=2, **options)
    for first, second in zip(expected, found, strict=True):
        np.testing.assert_array_equal(first.images, second.images)
        np.testing.assert_array_equal(first.labels, second.labels)
    expected.close()
    found.close()


# Damage.


@pytest.fixture
def records(photos, tmp_path):
    return write_arrayrecord(photos, tmp_path / "records", shards=2)


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def test_no_flipped_bit_in_a_photo_goes_unnoticed(photos, records):
    file = records / shard_name(0, 2)
    for number in range(2):
        item = photos.source.items[number]
        start = file.read_bytes().index(item[:40])
        for at in np.linspace(start, start + min(len(item), 30_000) - 1, 12).astype(int):
            flip(file, at)
            found = read_arrayrecord(records)
            with pytest.raises(
                ImageError, match=rf"photos-00000-of-00002.arrayrecord, record {number}: cannot"
            ):
                found.image(number)
            assert found.source[1 - number] == photos.source.items[1 - number]
            with pytest.raises(
                DatasetError, match=r"photos-00000-of-00002.arrayrecord is damaged .* copy it"
            ):
                read_arrayrecord(records, verify=True)
            flip(file, at)
    assert len(read_arrayrecord(records, verify=True)) == 5


def test_a_damaged_record_is_one_bad_photo_to_a_scan(records):
    file = records / shard_name(1, 2)
    flip(file, 5000)
    with pytest.raises(DatasetError, match="1 of 5 images cannot be decoded"):
        scan(read_arrayrecord(records))
    assert len(scan(read_arrayrecord(records), max_bad_fraction=0.2)) == 4


@pytest.mark.parametrize("name", [INDEX, shard_name(0, 2), shard_name(1, 2)])
def test_files_that_are_cut_short_or_missing(records, name):
    data = (records / name).read_bytes()
    (records / name).write_bytes(data[:-1])
    with pytest.raises(DatasetError, match=rf"{name} has {len(data) - 1:,} bytes, not {len(data):,}"):
        read_arrayrecord(records)
    (records / name).unlink()
    with pytest.raises(DatasetError, match=f"{name} cannot be read: No such file"):
        read_arrayrecord(records)


def test_a_flipped_bit_in_the_index(records):
    flip(records / INDEX, 300)
    with pytest.raises(DatasetError, match=r"index.npz is damaged"):
        read_arrayrecord(records)


@pytest.mark.parametrize(
    "change",
    [
        {"ids_ends": np.array([9, 2, 3])},
        "out of order",
        {"ids_ends": np.array(3)},
        {"ids_ends": np.array([0.5, 1.5, 2.5])},
        {"labels": np.array(["a", "b", "c"])},
        {"ids": None},
        None,
    ],
)
def test_an_index_of_the_right_checksum_that_is_none(records, change):
    index = records / INDEX
    if change is None:
        index.write_bytes(b"PK garbage")
    else:
        with np.load(index) as file:
            arrays = dict(file)
        if change == "out of order":
            arrays["ids_ends"][:2] = arrays["ids_ends"][1::-1]
        else:
            arrays |= change
        np.savez(index, **{name: array for name, array in arrays.items() if array is not None})
    manifest = json.loads((records / MANIFEST).read_text())
    manifest["files"][INDEX] = {"bytes": index.stat().st_size, "sha256": file_sha256(index)}
    (records / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match=f"{INDEX} does not fit"):
        read_arrayrecord(records)


def test_ids_that_occur_twice_are_not_written(tmp_path):
    photos = labelled([encode(draw(seed)) for seed in range(2)], ["a.jpg", "a.jpg"])
    with pytest.raises(DatasetError, match="the same id twice"):
        write_arrayrecord(photos, tmp_path / "records")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "has format 2, this jaxcls reads 1"),
        ({"format": "other"}, "is not the manifest of jaxcls-records"),
        ({"name": None}, "is damaged"),
        ({"classes": "ab"}, "is damaged"),
        ({"classes": ["a", 1]}, "is damaged"),
        ({"classes": ["a"]}, "does not fit"),
        ({"shards": [3]}, "is damaged"),
        ({"shards": [2, "3"]}, "is damaged"),
        ({"shards": [2, 2]}, "does not fit"),
        ({"files": {}}, "is damaged"),
        ({"files": {"../elsewhere": {"bytes": 1, "sha256": ""}}}, "is damaged"),
    ],
)
def test_manifests_that_do_not_fit(records, change, message):
    file = records / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DatasetError, match=message):
        read_arrayrecord(records)


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, "[]", "\0"])
def test_manifests_that_are_none(records, text):
    (records / MANIFEST).write_text(text)
    with pytest.raises(DatasetError, match=MANIFEST):
        read_arrayrecord(records)


def test_what_is_no_folder_of_records(tmp_path):
    with pytest.raises(DatasetError, match="no folder of records: it holds no readable records"):
        read_arrayrecord(tmp_path)
    with pytest.raises(DatasetError, match="no folder of records: it does not exist"):
        read_arrayrecord(tmp_path / "none")


# Writing that fails.


@pytest.mark.parametrize(
    ("items", "options", "error", "message"),
    [
        ([], {}, DatasetError, "has no images"),
        ([b"x"], {"shards": 0}, UsageError, "shards 0: there must be at least one"),
        ([b"x"], {"size": 0}, UsageError, "size 0: the short side must have"),
        ([b"x"], {"size": 9}, DatasetError, "not an image in a known format .* mend it, or leave such"),
        (["/none.jpg"], {}, DatasetError, "/none.jpg: cannot be read: No such file or directory: mend it"),
        ([np.zeros((2, 2), np.uint8)], {}, DatasetError, "must be uint8"),
    ],
)
def test_nothing_is_left_of_what_cannot_be_written(tmp_path, items, options, error, message):
    with pytest.raises(error, match=message):
        write_arrayrecord(from_items(items), tmp_path / "records", **options)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_never_replaced(photos, tmp_path):
    for path in (tmp_path / "file", tmp_path / "link"):
        path.symlink_to("nowhere") if path.name == "link" else path.write_text("mine")
        with pytest.raises(DatasetError, match="exists: choose another path"):
            write_arrayrecord(photos, path)
    assert (tmp_path / "file").read_text() == "mine"


def test_nothing_is_left_of_an_interrupted_writing(photos, tmp_path):
    class Interrupted:
        def __len__(self):
            return 5

        def __getitem__(self, index):
            if index == 3:
                raise KeyboardInterrupt
            return b"x"

        def path(self, index):
            return None

    with pytest.raises(KeyboardInterrupt):
        write_arrayrecord(replace(photos, source=Interrupted()), tmp_path / "records")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(tmp_path):
    items = [np.random.default_rng(0).bytes(50_000)] * 40
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # stands for a disk that is full
    try:
        with pytest.raises(DatasetError, match=r"cannot write to .*records: .*File too large") as raised:
            write_arrayrecord(from_items(items), tmp_path / "records", shards=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_photos_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(arrayrecord, "NUM_PHOTOS_AHEAD", 4)
    alive: set[int] = set()
    most = []

    class Photo(bytes):
        def __new__(cls, number):
            alive.add(number)
            most.append(len(alive))
            photo = super().__new__(cls, b"%d" % number)
            photo.number = number
            return photo

        def __del__(self):
            alive.discard(self.number)

    class Source:
        def __len__(self):
            return 100

        def __getitem__(self, index):
            return Photo(index)

        def path(self, index):
            return None

    dataset = Dataset("many", ("a",), np.zeros(100), [str(i) for i in range(100)], Source())
    found = read_arrayrecord(write_arrayrecord(dataset, tmp_path / "records"))
    assert [found.source[i] for i in range(100)] == [b"%d" % i for i in range(100)]
    assert max(most) <= 2 * 4

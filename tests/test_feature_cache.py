"""Features kept by content: what costs a forward pass, and what spoils no fit."""

import hashlib
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from conftest import write_photos
from safetensors.numpy import load_file, save

from jaxcls import feature_cache
from jaxcls.data.dataset import from_items
from jaxcls.data.folder import read_folder
from jaxcls.errors import ClassifierError, DatasetError, ImageError
from jaxcls.feature_cache import features_of
from jaxcls.scoring import extract_features


def colours(dataset):
    """A network's place is taken by the mean colour, so that tests cost no forward pass: float32 [N, 512]."""
    means = [dataset.image(i).reshape(-1, 3).mean(0) for i in range(len(dataset))]
    return np.tile(np.asarray(means, np.float32), 171)[:, :512]


@pytest.fixture
def passes(monkeypatch):
    """The ids of the photos of each forward pass."""
    seen = []

    def extract(backbone, dataset, **options):
        seen.append(list(dataset.ids))
        return colours(dataset), dataset.labels, dataset.ids

    monkeypatch.setattr(feature_cache, "extract_features", extract)
    return seen


@pytest.fixture
def folder(tmp_path):
    return write_photos(tmp_path / "photos", {"blue": 2, "red": 2})


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "somewhere" / "cache"


def files(cache):
    return sorted(path for path in cache.rglob("*") if path.is_file())


def test_a_second_call_needs_no_network(photos, backbone, cache, monkeypatch):
    """With the network itself: what is kept is what it says."""
    expected, *_ = extract_features(backbone, photos)
    said = []
    _, first = features_of(backbone, photos, cache, report=said.append)
    monkeypatch.delattr(feature_cache, "extract_features")
    dataset, second = features_of(backbone, photos, cache, report=said.append)
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(second, expected)
    assert second.dtype == np.float32
    assert len(dataset) == len(photos)
    assert said == [f"features of {kept} of 16 images were kept from before" for kept in (0, 16)]


def test_without_a_cache_nothing_is_kept(folder, backbone, passes):
    dataset = read_folder(folder)
    for _ in range(2):
        _, values = features_of(backbone, dataset, None, report=pytest.fail)
    np.testing.assert_array_equal(values, colours(dataset))
    assert len(passes) == 2
    assert sorted(path.name for path in folder.parent.iterdir()) == ["photos"]


def test_a_new_photo_costs_its_own_pass_only(folder, backbone, cache, passes):
    features_of(backbone, read_folder(folder), cache)
    write_photos(folder, {"green": 1}, seed=9)
    (folder / "red" / "0.png").rename(folder / "red" / "renamed.png")
    dataset = read_folder(folder)
    for _ in range(2):
        _, values = features_of(backbone, dataset, cache)
        np.testing.assert_array_equal(values, colours(dataset))
    assert [len(ids) for ids in passes] == [4, 1]
    assert passes[1] == ["green/0.png"]


def test_a_changed_photo_costs_a_pass(folder, backbone, cache, passes):
    features_of(backbone, read_folder(folder), cache)
    (folder / "blue" / "0.png").write_bytes(
        (write_photos(folder / "x", {"red": 1}, 5) / "red/0.png").read_bytes()
    )
    dataset = read_folder(folder).filter(lambda id_, _: not id_.startswith("x"))
    _, values = features_of(backbone, dataset, cache)
    np.testing.assert_array_equal(values, colours(dataset))
    assert passes[1:] == [["blue/0.png"]]


def test_order_and_number_of_photos_do_not_matter(folder, backbone, cache, passes):
    dataset = read_folder(folder)
    features_of(backbone, dataset, cache)
    mixed = dataset.select([3, 0, 0, 2])
    _, values = features_of(backbone, mixed, cache)
    np.testing.assert_array_equal(values, colours(dataset)[[3, 0, 0, 2]])
    assert len(passes) == 1


def changed_weights(backbone):
    params = dict(backbone.variables["params"])
    kernel = params["stem"]["conv"]["kernel"].copy()
    kernel[0, 0, 0, 0] += 1e-3
    params["stem"] = params["stem"] | {"conv": {"kernel": kernel}}
    return replace(backbone, variables=backbone.variables | {"params": params})


@pytest.mark.parametrize(
    ("change", "precision"),
    [
        (changed_weights, "float32"),
        (lambda backbone: replace(backbone, preprocess=replace(backbone.preprocess, size=33)), "float32"),
        (
            lambda backbone: replace(backbone, preprocess=replace(backbone.preprocess, mean=(0.1, 0.2, 0.3))),
            "float32",
        ),
        (lambda backbone: backbone, "bfloat16"),
    ],
    ids=["weights", "size", "mean", "precision"],
)
def test_another_network_has_features_of_its_own(folder, backbone, cache, passes, change, precision):
    dataset = read_folder(folder)
    for _ in range(2):
        features_of(backbone, dataset, cache, precision="float32")
        features_of(change(backbone), dataset, cache, precision=precision)
    assert [len(ids) for ids in passes] == [4, 4]
    assert len(list(cache.iterdir())) == 2
    features_of(replace(backbone, provenance={"source": "elsewhere"}), dataset, cache, precision="float32")
    assert len(passes) == 2


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def rewrite(path, **arrays):
    """With a checksum that fits."""
    content = save(arrays)
    path.unlink()
    path.with_name(f"{hashlib.sha256(content).hexdigest()}.safetensors").write_bytes(content)


DAMAGES = {
    "a flipped bit": flip,
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "empty": lambda path: path.write_bytes(b""),
    "no safetensors": lambda path: path.write_bytes(b"hello"),
    "features of another width": lambda path: rewrite(path, **load_file(path) | {"values": np.zeros((4, 9))}),
    "too few features": lambda path: rewrite(
        path, **load_file(path) | {"values": np.zeros((3, 512), np.float32)}
    ),
    "no digests": lambda path: rewrite(path, values=load_file(path)["values"]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_passed_over_said_and_made_good(folder, backbone, cache, passes, damage):
    dataset = read_folder(folder)
    features_of(backbone, dataset, cache)
    (whole,) = files(cache)
    damage(whole)
    said = []
    _, values = features_of(backbone, dataset, cache, report=said.append)
    np.testing.assert_array_equal(values, colours(dataset))
    assert len(passes) == 2
    assert f"{cache}" in said[0]
    assert "is of no use and deleted: " in said[0]
    assert said[1:] == ["features of 0 of 4 images were kept from before"]
    assert whole.is_file()
    features_of(backbone, dataset, cache, report=said.append)
    assert said[-1] == "features of 4 of 4 images were kept from before"


def test_photos_that_cannot_be_read(folder, backbone, cache, passes):
    (folder / "red" / "1.png").write_text("no picture")
    for _ in range(2):
        with pytest.raises(DatasetError, match=r"1 of 4 images cannot be decoded(.|\n)*red/1\.png"):
            features_of(backbone, read_folder(folder), cache)
        assert not passes
    for _ in range(2):
        dataset, values = features_of(backbone, read_folder(folder), cache, max_bad_fraction=0.25)
        assert dataset.ids.tolist() == ["blue/0.png", "blue/1.png", "red/0.png"]
        assert "1 undecodable images left out:" in dataset.notes
        np.testing.assert_array_equal(values, colours(dataset))
    assert [len(ids) for ids in passes] == [3]


def test_a_photo_that_vanished_is_one_that_cannot_be_read(folder, backbone, cache, passes):
    dataset = read_folder(folder)
    features_of(backbone, dataset, cache)
    (folder / "red" / "1.png").unlink()
    with pytest.raises(DatasetError, match="1 of 4 images cannot be decoded"):
        features_of(backbone, dataset, cache)
    kept, values = features_of(backbone, dataset, cache, max_bad_fraction=0.5)
    np.testing.assert_array_equal(values, colours(kept))
    assert len(passes) == 1


class Flaky:
    """A source whose photo 0 cannot be read the first time."""

    def __init__(self, source):
        self.source, self.has_failed = source, False

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index == 0 and not self.has_failed:
            self.has_failed = True
            raise ImageError("photo 0", "the network share is away")
        return self.source[index]

    def path(self, index):
        return self.source.path(index)


def test_a_photo_that_can_be_read_only_later_is_used_and_not_kept(folder, backbone, cache, passes):
    dataset = read_folder(folder)
    for expected in (4, 1):
        kept, values = features_of(backbone, replace(dataset, source=Flaky(dataset.source)), cache)
        np.testing.assert_array_equal(values, colours(dataset))
        assert len(kept) == 4
        assert len(passes[-1]) == expected


def test_arrays_are_kept_too(backbone, cache, passes):
    """Two hold the same bytes in other shapes."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 3), np.uint8)
    dataset = from_items([pixels, pixels.reshape(32, 40, 3), pixels[::2], pixels[::-1]])
    for _ in range(2):
        _, values = features_of(backbone, dataset, cache)
        np.testing.assert_array_equal(values, colours(dataset))
    assert [len(ids) for ids in passes] == [4]
    assert len({digest for path in files(cache) for digest in map(bytes, load_file(path)["digests"])}) == 4


def test_folders_are_their_owners_alone_and_hold_no_scraps(folder, backbone, cache, passes):
    features_of(backbone, read_folder(folder), cache)
    (path,) = files(cache)
    assert path.suffix == ".safetensors"
    assert path.stem == hashlib.sha256(path.read_bytes()).hexdigest()
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_writers_at_the_same_time_do_not_disturb_each_other(folder, backbone, cache, passes):
    dataset = read_folder(folder)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: features_of(backbone, dataset, cache)[1], range(24)))
    for values in found:
        np.testing.assert_array_equal(values, colours(dataset))
    assert len(files(cache)) == 1
    passes.clear()
    features_of(backbone, dataset, cache)
    assert not passes


def test_the_same_may_be_written_while_it_is_written(cache, monkeypatch):
    """One writer between the other's writing and renaming."""
    arguments = cache, [b"d" * 32], np.zeros((1, 512), np.float32)
    write = type(cache).write_bytes

    def interrupted(path, content):
        monkeypatch.setattr(type(cache), "write_bytes", write)
        written = write(path, content)
        feature_cache._write(*arguments)
        return written

    monkeypatch.setattr(type(cache), "write_bytes", interrupted)
    feature_cache._write(*arguments)
    (path,) = files(cache)
    np.testing.assert_array_equal(load_file(path)["values"], arguments[2])


def test_a_full_disk_leaves_no_scraps(folder, backbone, cache, passes, monkeypatch):
    def fail(path, content):
        path.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(cache), "write_bytes", fail)
        with pytest.raises(OSError, match="No space left"):
            features_of(backbone, read_folder(folder), cache)
    assert not files(cache)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_are_an_error_and_not_kept(folder, backbone, cache, monkeypatch, bad):
    def extract(backbone, dataset, **options):
        values = colours(dataset)
        values[1:3, 7] = bad
        return values, dataset.labels, dataset.ids

    monkeypatch.setattr(feature_cache, "extract_features", extract)
    for kept in (cache, None):
        with pytest.raises(ClassifierError, match="the features of 2 of 4 images are not finite"):
            features_of(backbone, read_folder(folder), kept)
    assert not files(cache)

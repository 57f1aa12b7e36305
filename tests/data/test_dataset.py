"""Datasets: splits against hand-ranked ids and brute force, everything else against worked examples."""

import io
import os
import time
from collections import Counter
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxcls.data.dataset import ID_DTYPE, Dataset, from_items, scan
from jaxcls.data.folder import read_folder
from jaxcls.data.source import MemorySource
from jaxcls.errors import DatasetError, ImageError, UsageError

UNREADABLE = b"no photo"


def photo(value=0):
    return np.full((2, 3, 3), value, np.uint8)


def make_dataset(ids, labels, classes=("cup", "plate"), *, groups=None, name="photos", items=None):
    items = [photo(i) for i in range(len(ids))] if items is None else items
    return Dataset(name, classes, labels, ids, MemorySource(items), groups)


def sized(*counts, groups=None):
    """`counts[k]` photos of class k, with ids such as c0/3."""
    labels = np.repeat(np.arange(len(counts)), counts)
    ids = [f"c{label}/{i}" for i, label in enumerate(labels)]
    return make_dataset(ids, labels, tuple(f"c{k}" for k in range(len(counts))), groups=groups)


@pytest.fixture
def kitchen():
    """Five photos of two classes, one of them unlabelled."""
    ids = ["cup/1", "cup/2", "plate/1", "plate/2", "new"]
    return make_dataset(ids, [0, 0, 1, 1, -1], groups=[0, 0, 1, 2, 3])


# Values


def test_fields_are_arrays_of_fixed_types(kitchen):
    assert (kitchen.labels.dtype, kitchen.groups.dtype, kitchen.ids.dtype) == (np.int32, np.int32, ID_DTYPE)
    assert len(kitchen) == 5
    assert kitchen.class_counts().tolist() == [2, 2]
    assert repr(kitchen) == "Dataset('photos', 5 images, 2 classes)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0, 1]}, "one value per photo"),
        ({"ids": ["a"]}, "one value per photo"),
        ({"groups": [0, 0]}, "one value per photo"),
        ({"labels": [0, 1, 2]}, r"labels must lie in \[-1, 2\)"),
        ({"labels": [0, 1, -2]}, r"labels must lie in \[-1, 2\)"),
    ],
)
def test_fields_that_do_not_fit_are_refused(change, message):
    values = {"ids": ["a", "b", "c"], "labels": [0, 1, 1], "items": [photo()] * 3, **change}
    with pytest.raises(UsageError, match=message):
        make_dataset(**values)


def test_images_are_decoded_or_handed_through():
    file = io.BytesIO()
    Image.new("RGB", (640, 320), (10, 200, 30)).save(file, "JPEG", quality=95)
    dataset = from_items([file.getvalue(), photo(7)])
    assert dataset.image(0).shape == (320, 640, 3)
    np.testing.assert_allclose(dataset.image(0)[5, 5], [10, 200, 30], atol=2)
    assert dataset.image(0, short_side=80).shape == (160, 320, 3)
    np.testing.assert_array_equal(dataset.image(1), photo(7), strict=True)


@pytest.mark.parametrize(
    ("array", "shown"),
    [
        (np.zeros((2, 3, 3), np.float32), "float32 [2, 3, 3]"),
        (np.zeros((2, 3), np.uint8), "uint8 [2, 3]"),
        (np.zeros((2, 3, 4), np.uint8), "uint8 [2, 3, 4]"),
        (np.zeros((1, 2, 3, 3), np.uint8), "uint8 [1, 2, 3, 3]"),
        (np.zeros((0, 3, 3), np.uint8), "uint8 [0, 3, 3]"),
    ],
)
def test_arrays_of_another_form_are_image_errors(array, shown):
    with pytest.raises(ImageError) as caught:
        from_items([photo(), array]).image(1)
    assert str(caught.value) == f"1: an image array must be uint8 [H, W, 3], not {shown}"


# Items


def test_paths_are_their_own_ids_and_are_read_when_needed(tmp_path):
    path = tmp_path / "é.png"
    Image.new("RGB", (3, 2), (1, 2, 3)).save(path)
    dataset = from_items([path, str(tmp_path / "gone.png")])
    assert dataset.ids.tolist() == [path.as_posix(), f"{tmp_path}/gone.png"]
    assert dataset.labels.tolist() == [-1, -1]
    assert dataset.source.path(0) == path
    np.testing.assert_array_equal(dataset.image(0), np.full((2, 3, 3), [1, 2, 3]))
    with pytest.raises(ImageError, match=r"gone\.png: cannot be read: No such file"):
        dataset.image(1)


def test_items_may_be_mixed(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (3, 2), (9, 9, 9)).save(path)
    dataset = from_items([path, path.read_bytes(), photo(5), str(path)])
    assert dataset.ids.tolist() == [path.as_posix(), "1", "2", path.as_posix()]
    assert [int(dataset.image(i)[0, 0, 0]) for i in range(4)] == [9, 9, 5, 9]
    assert [dataset.source.path(i) for i in range(4)] == [path, None, None, path]
    gone = from_items([photo(), tmp_path / "gone.png"])
    with pytest.raises(ImageError, match=r"gone\.png: cannot be read"):
        gone.image(1)


@pytest.mark.parametrize("single", ["a.png", Path("a.png"), b"GIF89a", np.zeros((2, 2, 3), np.uint8)])
def test_a_single_item_says_to_put_it_into_a_list(single):
    with pytest.raises(UsageError, match="as a list"):
        from_items(single)


def test_an_item_of_another_kind_is_named():
    with pytest.raises(UsageError, match="item 1 is a Image"):
        from_items(["a.png", Image.new("RGB", (2, 2))])


def test_no_items_are_an_empty_dataset():
    empty = from_items([])
    assert len(empty) == 0
    assert empty.summary() == "images: 0 images, 0 classes"
    assert len(empty.select_ids([])) == len(scan(empty)) == len(empty.group_by_folder()) == 0


def test_a_path_that_is_not_utf8_has_its_odd_bytes_escaped(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    Image.new("RGB", (3, 2), (9, 9, 9)).save(path)
    dataset = from_items([path])
    assert dataset.ids[0] == f"{tmp_path.as_posix()}/caf\\udce9.png"
    assert dataset.image(0).shape == (2, 3, 3)
    Path(path).unlink()
    with pytest.raises(ImageError) as caught:
        dataset.image(0)
    str(caught.value).encode()


# Parts


def test_select_keeps_all_columns_in_step(kitchen):
    part = kitchen.select([3, 0])
    assert part.ids.tolist() == ["plate/2", "cup/1"]
    assert part.labels.tolist() == [1, 0]
    assert part.groups.tolist() == [2, 0]
    assert [int(part.image(i)[0, 0, 0]) for i in range(2)] == [3, 0]
    again = part.select(np.array([1]))
    assert (again.ids.tolist(), int(again.image(0)[0, 0, 0])) == (["cup/1"], 0)


def test_select_ids_keeps_their_order(kitchen):
    assert kitchen.select_ids(["new", "cup/2"]).labels.tolist() == [-1, 0]
    assert kitchen.select_ids(iter(["plate/1"])).ids.tolist() == ["plate/1"]
    assert len(kitchen.select_ids([])) == 0
    with pytest.raises(DatasetError, match="2 ids are not in dataset photos: first cup/3"):
        kitchen.select_ids(["cup/1", "cup/3", "zebra"])


def test_filter_sees_id_and_class_name(kitchen):
    seen = []
    part = kitchen.filter(lambda *photo: seen.append(photo) or photo[0].endswith("1"))
    assert seen == [
        ("cup/1", "cup"),
        ("cup/2", "cup"),
        ("plate/1", "plate"),
        ("plate/2", "plate"),
        ("new", None),
    ]
    assert part.ids.tolist() == ["cup/1", "plate/1"]
    assert part.classes == ("cup", "plate")
    assert kitchen.filter(lambda _, name: name is None).ids.tolist() == ["new"]


def test_relabel_renames_and_merges_classes():
    dataset = make_dataset(["1", "2", "3", "4"], [0, 1, 2, -1], ("fork", "cup", "knife"))
    merged = dataset.relabel({"fork": "cutlery", "knife": "cutlery"})
    assert merged.classes == ("cutlery", "cup")
    assert merged.labels.tolist() == [0, 1, 0, -1]
    swapped = dataset.relabel({"fork": "cup", "cup": "fork"})
    assert (swapped.classes, swapped.labels.tolist()) == (("cup", "fork", "knife"), [0, 1, 2, -1])
    into_other = dataset.relabel({"knife": "cup"})
    assert (into_other.classes, into_other.labels.tolist()) == (("fork", "cup"), [0, 1, 1, -1])
    with pytest.raises(UsageError, match="dataset photos has no class plate, spoon"):
        dataset.relabel({"spoon": "a", "plate": "b", "cup": "c"})


def test_with_classes_takes_labels_from_another_list(kitchen):
    taken = kitchen.with_classes(["plate", "bowl", "cup"])
    assert taken.classes == ("plate", "bowl", "cup")
    assert taken.labels.tolist() == [2, 2, 0, 0, -1]
    with pytest.raises(UsageError, match="has photos of plate; known are cup, bowl: relabel"):
        kitchen.with_classes(["cup", "bowl"])
    only_cups = kitchen.filter(lambda _, name: name == "cup")
    assert only_cups.with_classes(["bowl", "cup"]).labels.tolist() == [1, 1]


def test_require_every_class(kitchen):
    labelled = kitchen.filter(lambda _, name: name is not None)
    labelled.require_every_class()
    with pytest.raises(DatasetError, match="has 1 unlabelled images: label or filter them"):
        kitchen.require_every_class()
    with pytest.raises(DatasetError, match="has no images of cup: add some"):
        labelled.filter(lambda _, name: name == "plate").require_every_class()
    with pytest.raises(DatasetError, match="has 1 class: a classifier needs two"):
        labelled.relabel({"plate": "cup"}).require_every_class()


def test_merge_matches_classes_by_name(kitchen):
    other = make_dataset(
        ["b/1", "p/1", "x"], [0, 1, -1], ("bowl", "plate"), items=[photo(50 + i) for i in range(3)]
    )
    both = kitchen.merge(other)
    assert both.classes == ("cup", "plate", "bowl")
    assert both.ids.tolist() == ["cup/1", "cup/2", "plate/1", "plate/2", "new", "b/1", "p/1", "x"]
    assert both.labels.tolist() == [0, 0, 1, 1, -1, 2, 1, -1]
    assert [int(both.image(i)[0, 0, 0]) for i in range(8)] == [0, 1, 2, 3, 4, 50, 51, 52]
    # `other` has no groups: each of its photos is one of its own.
    assert both.groups.tolist() == [0, 0, 1, 2, 3, 4, 5, 6]
    assert other.merge(kitchen).groups.tolist() == [0, 1, 2, 3, 3, 4, 5, 6]
    assert other.merge(make_dataset(["y"], [0])).groups is None


def test_merge_bears_ids_that_numpy_cannot_sort():
    """NumPy 2.4 ends the process when it sorts these ids, of type StringDType, with its default sort."""
    first, second = (
        make_dataset(sorted(f"{side}{i}" for i in range(count)), [0] * count, items=[photo(0)] * count)
        for side, count in (("b", 2527), ("a", 1200))
    )
    merged = first.merge(second)
    assert len(merged) == len(merged.group_by_folder()) == 3727


def test_merge_tells_clashing_ids_apart():
    first, second = (make_dataset(["cup/1", "cup/2"], [0, 0], name=name) for name in ("old", "new"))
    assert first.merge(second).ids.tolist() == ["old/cup/1", "old/cup/2", "new/cup/1", "new/cup/2"]
    with pytest.raises(DatasetError, match="both datasets are named old and share ids: rename one"):
        first.merge(first)


# Scan


def test_scan_returns_the_dataset_itself_where_all_is_well():
    dataset = sized(3, 2)
    assert scan(dataset) is dataset


def test_scan_fails_above_the_allowed_share_only():
    dataset = from_items([UNREADABLE if i in (1, 7) else photo(i) for i in range(10)])
    with pytest.raises(DatasetError, match="2 of 10 images cannot be decoded"):
        scan(dataset)
    with pytest.raises(DatasetError, match="2 of 10 images cannot be decoded"):
        scan(dataset, max_bad_fraction=0.19)
    kept = scan(dataset, max_bad_fraction=0.2)
    assert kept.ids.tolist() == ["0", "2", "3", "4", "5", "6", "8", "9"]
    assert int(kept.image(6)[0, 0, 0]) == 8
    assert kept.notes[0] == "2 undecodable images left out:"
    assert [note[:5] for note in kept.notes[1:]] == ["  1: ", "  7: "]


def test_scan_lists_the_first_ten():
    with pytest.raises(DatasetError) as caught:
        scan(from_items([UNREADABLE] * 13))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("13 of 13")
    assert len(lines) == 1 + 10 + 1
    assert lines[-1] == "  and 3 more"


# Split


def ids_of(pair):
    return tuple(sorted(side.ids.tolist()) for side in pair)


def test_a_split_can_be_worked_by_hand_on_any_platform():
    """`printf 0:cup/1.png | b2sum -l 128` ranks cups 2 6 4 5 3 1 and plates 1 5 6 4 3 2: half of each."""
    ids = [f"{name}/{i}.png" for name in ("cup", "plate") for i in range(1, 7)]
    split = make_dataset(ids, [0] * 6 + [1] * 6).split(0.5)
    assert ids_of(split) == (
        ["cup/2.png", "cup/4.png", "cup/6.png", "plate/1.png", "plate/5.png", "plate/6.png"],
        ["cup/1.png", "cup/3.png", "cup/5.png", "plate/2.png", "plate/3.png", "plate/4.png"],
    )


def test_seed_and_unicode_ids_are_ranked_by_hand():
    """`printf 7:é | b2sum -l 128` and so on rank b c a d é e."""
    dataset = make_dataset(["a", "b", "c", "d", "e", "é"], [0] * 6)
    for size in range(1, 6):
        train, test = dataset.split(size, stratify=False, seed=7)
        assert (set(train.ids), set(test.ids)) == (set("bcadée"[:size]), set("bcadée"[size:]))


def test_a_group_that_does_not_fit_at_its_turn_is_worked_by_hand():
    """Ranks: 6 4 5 3 and last the group of 1 and 2. Five of six are only had with that group."""
    dataset = make_dataset([f"cup/{i}.png" for i in range(1, 7)], [0] * 6, groups=[9, 9, 3, 4, 5, 6])
    train, test = dataset.split(5, stratify=False)
    assert test.ids.tolist() == ["cup/3.png"]
    assert train.ids.tolist() == ["cup/1.png", "cup/2.png", "cup/4.png", "cup/5.png", "cup/6.png"]


def test_the_tableware_split_has_the_documented_sizes():
    train, test = sized(5, 19, 7, 32).split(train_size=0.66)
    assert (len(train), len(test)) == (41, 22)
    assert train.class_counts().tolist() == [3, 12, 5, 21]
    assert test.class_counts().tolist() == [2, 7, 2, 11]


def test_the_tableware_photos_are_split_so(shared):
    train, test = read_folder(shared / "data" / "tableware").split(train_size=0.66)
    assert train.class_counts().tolist() == [3, 12, 5, 21]
    assert len(test) == 22
    assert not set(train.ids) & set(test.ids)


def test_the_order_of_reading_does_not_matter():
    # Every third photo shares a group with its neighbour, some of them across classes.
    dataset = sized(9, 13, 6, groups=[i - (i % 3 == 0) for i in range(1, 29)])
    shuffled = dataset.select(np.random.default_rng(1).permutation(28))
    for stratify in (True, False):
        assert ids_of(dataset.split(0.6, stratify=stratify)) == ids_of(shuffled.split(0.6, stratify=stratify))


def test_another_seed_gives_another_split():
    dataset = sized(20, 20)
    assert len({tuple(dataset.split(0.5, seed=seed)[0].ids) for seed in range(10)}) == 10


def test_every_photo_is_equally_likely_to_be_trained_on():
    dataset, counts = sized(6, 12), Counter()
    for seed in range(400):
        counts.update(dataset.split(0.5, seed=seed)[0].ids.tolist())
    assert all(abs(counts[i] - 200) < 45 for i in dataset.ids)  # 4.5 standard deviations


@pytest.mark.parametrize("counts", [(2, 2), (2, 50), (10, 20, 30), (3, 3, 3, 3, 3), (7, 100, 11, 2)])
@pytest.mark.parametrize("train_size", [0.2, 0.34, 0.5, 0.66, 0.8])
def test_stratified_sizes_follow_the_largest_remainder(counts, train_size):
    total = sum(counts)
    target = int(round(train_size * total, 6))
    if not len(counts) <= target <= total - len(counts):
        with pytest.raises(DatasetError, match=r"leaves one side empty|cannot hold one of each"):
            sized(*counts).split(train_size)
        return
    train, test = sized(*counts).split(train_size)
    assert len(train) == target
    shares = np.asarray(counts) * target / total
    taken = train.class_counts()
    assert ((taken >= 1) & (test.class_counts() >= 1)).all()
    if (shares >= 1).all() and (np.asarray(counts) - shares >= 1).all():
        assert (np.abs(taken - shares) < 1).all()
        assert Counter(taken - np.floor(shares)).keys() <= {0, 1}
        up = taken > shares
        remainders = shares % 1
        assert not up.any() or up.all() or remainders[up].min() >= remainders[~up].max() - 1e-9


def test_a_small_class_takes_its_one_photo_from_the_class_with_most_to_spare():
    """Shares 0.30, 2.13 and 4.57 of 7: one at least, and the others rounded down."""
    assert sized(2, 14, 30).split(7)[0].class_counts().tolist() == [1, 2, 4]


def test_train_size_is_a_fraction_or_a_number():
    dataset = sized(10, 10)
    assert [len(side) for side in dataset.split(7)] == [7, 13]
    assert [len(side) for side in dataset.split(0.35)] == [7, 13]
    assert [len(side) for side in dataset.split(19, stratify=False)] == [19, 1]
    assert [len(side) for side in sized(50, 50).split(0.29)] == [29, 71]  # 0.29 * 100 is 28.999999999999996


@pytest.mark.parametrize("train_size", [0, 20, 21, -1, 0.0, 0.01, 1.0, 1.5, -0.5, float("nan"), float("inf")])
def test_a_size_that_leaves_a_side_empty_is_refused(train_size):
    with pytest.raises(DatasetError, match=f"train_size {train_size} of 20 images leaves one side empty"):
        sized(10, 10).split(train_size, stratify=False)


def test_classes_too_small_to_stratify_are_refused():
    with pytest.raises(DatasetError, match=r"class c1 has a single image or group, .* stratify=False"):
        sized(10, 1).split(0.5)
    with pytest.raises(DatasetError, match="class c1 has a single image or group"):
        sized(3, 3, groups=[0, 1, 2, 3, 3, 3]).split(0.5)
    with pytest.raises(
        DatasetError, match="2 training and 7 test images cannot hold one of each of 3 classes"
    ):
        sized(3, 3, 3).split(2)
    with pytest.raises(DatasetError, match="7 training and 2 test images cannot hold"):
        sized(3, 3, 3).split(7)
    assert len(sized(10, 1).split(0.5, stratify=False)[0]) == 5


@pytest.mark.parametrize("stratify", [True, False])
def test_a_single_group_cannot_be_split(stratify):
    with pytest.raises(DatasetError, match="single image or group"):
        sized(3, 3, groups=[4] * 6).split(0.5, stratify=stratify)


def test_unlabelled_photos_are_a_stratum_of_their_own():
    dataset = make_dataset([str(i) for i in range(12)], [0] * 4 + [1] * 4 + [-1] * 4)
    for side in dataset.split(0.5):
        assert Counter(side.labels.tolist()) == {0: 2, 1: 2, -1: 2}


def whole(groups, train):
    """Whether the training set holds all or nothing of every group."""
    sizes, taken = Counter(groups.tolist()), Counter(train.groups.tolist())
    return all(taken[group] in (0, size) for group, size in sizes.items())


@pytest.mark.parametrize("seed", range(60))
def test_groups_are_kept_and_sizes_as_near_as_brute_force_finds(seed):
    generator = np.random.default_rng(seed)
    groups = np.repeat(np.arange(6), generator.integers(1, 6, 6))
    generator.shuffle(groups)
    dataset = sized(len(groups), groups=groups)
    target = int(generator.integers(1, len(groups)))
    train, test = dataset.split(target, stratify=False, seed=seed)
    sizes = np.bincount(groups, minlength=6)
    possible = {sum(part) for n in range(1, 6) for part in combinations(sizes.tolist(), n)}
    assert abs(len(train) - target) == min(abs(total - target) for total in possible)
    assert whole(groups, train)
    assert sorted([*train.ids, *test.ids]) == sorted(dataset.ids)


@pytest.mark.parametrize("seed", range(30))
def test_stratified_groups_are_kept_and_every_class_is_on_both_sides(seed):
    generator = np.random.default_rng(seed)
    counts = generator.integers(6, 20, 3)
    first = np.cumsum([0, *counts])
    # Groups within a class, of at most 5 photos or so: no class is one group alone.
    groups = np.concatenate([first[k] + np.arange(counts[k]) // generator.integers(1, 6) for k in range(3)])
    dataset = sized(*counts, groups=groups)
    train, test = dataset.split(0.5, seed=seed)
    assert whole(groups, train)
    assert (train.class_counts() > 0).all()
    assert (test.class_counts() > 0).all()
    largest = np.bincount(groups).max()
    assert np.abs(train.class_counts() - counts / 2).max() <= largest


@pytest.mark.parametrize("seed", range(30))
def test_stratified_sizes_are_exact_where_single_photos_can_fill_the_gaps(seed):
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat([0, 1, 2], [9, 14, 23]))
    groups = np.arange(46)
    for label in range(3):  # of every class a pair and a group of three
        members = np.flatnonzero(labels == label)
        groups[members[:2]], groups[members[2:5]] = members[0], members[2]
    dataset = make_dataset([f"{i}" for i in range(46)], labels, ("a", "b", "c"), groups=groups)
    target = int(generator.integers(6, 40))
    train, _ = dataset.split(target, seed=seed)
    assert len(train) == target
    assert whole(groups, train)
    assert np.abs(train.class_counts() - np.asarray([9, 14, 23]) * target / 46).max() < 1.5


@pytest.mark.parametrize(
    ("num_singles", "target", "taken"),
    [
        (8, 4, [2, 2]),  # shares 2.67 and 1.33, quotas 3 and 1: a pair is one too many, taken back from c0
        (8, 5, [3, 2]),  # shares 3.33 and 1.67, quotas 3 and 2
        (3, 2, [1, 2]),  # quotas 1 and 1: c0 has none to give back
        (3, 5, [2, 2]),  # quotas 2 and 3: c0 would have to give its last test photo
    ],
)
def test_single_photos_make_up_for_two_pairs(num_singles, target, taken):
    pairs = [100, 100, 101, 101]
    dataset = sized(num_singles, 4, groups=[*range(num_singles), *pairs])
    assert dataset.split(target)[0].class_counts().tolist() == taken


def test_a_class_of_two_large_groups_is_still_on_both_sides():
    dataset = sized(20, 20, groups=[*[0] * 10, *[1] * 10, *range(2, 22)])
    for train_size, seed in product((0.2, 0.33, 0.5, 0.8), range(3)):
        train, test = dataset.split(train_size, seed=seed)
        assert (train.class_counts()[0], test.class_counts()[0]) == (10, 10)
        assert train.class_counts()[1] >= 1
        assert test.class_counts()[1] >= 1
    assert len(dataset.split(0.5)[0]) == 20


@pytest.mark.parametrize("seed", range(10))
def test_photos_added_later_move_few_others(seed):
    dataset = sized(30, 40, 50)
    for label in range(3):
        extra = make_dataset([f"later/{seed}"], [label], dataset.classes, name="later")
        grown = dataset.merge(extra)
        for stratify, most in ((False, 1), (True, 3)):
            before = set(dataset.split(0.66, stratify=stratify, seed=seed)[0].ids)
            after = set(grown.split(0.66, stratify=stratify, seed=seed)[0].ids)
            assert len((before ^ after) - set(extra.ids)) <= most


def test_split_by_ids(kitchen):
    train, test = kitchen.split_by_ids(["plate/2", "cup/1"])
    assert train.ids.tolist() == ["cup/2", "plate/1", "new"]
    assert test.ids.tolist() == ["cup/1", "plate/2"]
    with pytest.raises(DatasetError, match="1 ids are not in dataset photos: first cup/9"):
        kitchen.split_by_ids(["cup/9"])
    with pytest.raises(DatasetError, match="leaves the test set empty"):
        kitchen.split_by_ids([])
    with pytest.raises(DatasetError, match="leaves the training set empty"):
        kitchen.split_by_ids(kitchen.ids)


def test_split_by_folder():
    ids = ["cup/test/1", "cup/train/1", "plate/test/a/2", "plate/test", "plate/testing/2"]
    train, test = make_dataset(ids, [0, 0, 1, 1, 1]).split_by_folder("test")
    assert test.ids.tolist() == ["cup/test/1", "plate/test/a/2"]
    assert train.ids.tolist() == ["cup/train/1", "plate/test", "plate/testing/2"]
    with pytest.raises(DatasetError, match="photos by folder 'val' leaves the test set empty"):
        make_dataset(ids, [0, 0, 1, 1, 1]).split_by_folder("val")


def test_group_by_folder_keeps_folders_together():
    ids = [f"{name}/{day}/{i}" for name in ("cup", "plate") for day in "abcd" for i in range(3)]
    dataset = make_dataset(ids, [0] * 12 + [1] * 12).group_by_folder()
    assert dataset.groups.tolist() == np.repeat(np.arange(8), 3).tolist()
    train, test = dataset.split(0.5)
    assert train.class_counts().tolist() == [6, 6]
    assert not {i.rpartition("/")[0] for i in train.ids} & {i.rpartition("/")[0] for i in test.ids}


def test_summary_names_ids_where_there_are_no_files(kitchen):
    assert kitchen.summary().splitlines() == [
        "photos: 5 images, 2 classes",
        "  cup: 2",
        "    cup/1",
        "    cup/2",
        "  plate: 2",
        "    plate/1",
        "    plate/2",
        "  (unlabelled): 1",
    ]


# Weights of classes


def test_balanced_class_weights_are_scikit_learns():
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.repeat([0, 1, 2], [2, 5, 11])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    weights = sized(2, 5, 11).class_weights("balanced")
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_class_weights_by_name_are_1_elsewhere():
    dataset = sized(1, 1)
    second = dataset.classes[1]
    np.testing.assert_array_equal(dataset.class_weights({second: 3.0}), [1.0, 3.0])
    assert dataset.class_weights(None) is None


@pytest.mark.parametrize("rule", ["equal", {"no such class": 1.0}, {0: -1.0}])
def test_class_weights_that_cannot_work_are_refused(rule):
    dataset = sized(1, 1)
    if isinstance(rule, dict):
        rule = {dataset.classes[name] if name == 0 else name: weight for name, weight in rule.items()}
    with pytest.raises(UsageError, match="class_weight"):
        dataset.class_weights(rule)


@pytest.mark.parametrize("seed", range(60))
def test_stratified_sizes_are_as_near_as_brute_force_over_all_classes_finds(seed):
    """Few groups of several photos and no single ones: what one class lacks, another often cannot make up."""
    generator = np.random.default_rng(seed)
    sizes = [generator.integers(2, 6, generator.integers(2, 5)) for _ in range(3)]
    counts = [int(part.sum()) for part in sizes]
    groups = np.repeat(np.arange(sum(map(len, sizes))), np.concatenate(sizes))
    target = int(generator.integers(3, len(groups) - 2))
    train, test = sized(*counts, groups=groups).split(target, seed=seed)
    possible = [{sum(part) for n in range(1, len(s)) for part in combinations(s.tolist(), n)} for s in sizes]
    totals = {sum(parts) for parts in product(*possible)}
    assert abs(len(train) - target) == min(abs(total - target) for total in totals)
    assert whole(groups, train)
    assert (train.class_counts() > 0).all()
    assert (test.class_counts() > 0).all()


def test_classes_without_single_photos_keep_their_shares_where_the_size_allows():
    """Pairs alone, of 10 and 30 photos: a half, 5 and 15, cannot be had, but 20 photos can."""
    dataset = sized(10, 30, groups=[i // 2 for i in range(40)])
    assert dataset.split(20)[0].class_counts().tolist() in ([4, 16], [6, 14])
    assert len(dataset.split(21)[0]) in (20, 22)


def test_a_hundred_thousand_photos_in_groups_are_split_in_a_moment():
    """Nearly all in pairs and threes: the sums of 40,000 groups, in little time and memory."""
    labels = np.repeat([0, 1], 50_000)
    groups = np.arange(100_000) // np.repeat([2, 3], 50_000) + np.repeat([0, 50_000], 50_000)
    ids = [str(i) for i in range(100_000)]
    dataset = make_dataset(ids, labels, groups=groups, items=[photo()] * 100_000)
    started = time.perf_counter()
    train, _ = dataset.split(66_001)
    assert time.perf_counter() - started < 10
    assert len(train) == 66_001
    assert whole(groups, train)


# Augmented copies


def with_copies(dataset, num=2):
    """The dataset followed by so many copies of each photo."""
    ids = [*dataset.ids, *(f"{own}~{number}" for number in range(num) for own in dataset.ids)]
    origins = [""] * len(dataset) + [*dataset.ids] * num
    groups = None if dataset.groups is None else np.tile(dataset.groups, num + 1)
    source = MemorySource([photo(i) for i in range(len(ids))])
    labels = np.tile(dataset.labels, num + 1)
    return Dataset(dataset.name, dataset.classes, labels, ids, source, groups, origins=origins)


def test_copies_are_known_and_of_their_originals_group(kitchen):
    copies = with_copies(kitchen)
    assert copies.is_copy.tolist() == [False] * 5 + [True] * 10
    assert copies.groups.tolist() == kitchen.groups.tolist() * 3
    assert copies.originals().ids.tolist() == kitchen.ids.tolist()
    assert copies.originals().origins is None
    assert "(augmented copies among them): 10" in copies.summary()
    assert not kitchen.is_copy.any()
    assert kitchen.originals() is kitchen
    kitchen.require_originals()
    with pytest.raises(UsageError, match=r"10 of the 15 images of dataset photos are augmented copies"):
        copies.require_originals()
    with pytest.raises(UsageError, match="origins need one value per photo"):
        replace(kitchen, origins=[""])


def test_copies_stay_with_their_original_whatever_groups_are_given(kitchen):
    """Duplicates are looked for by what photos show, and a copy may show its original turned upside down."""
    copies = with_copies(sized(2, 2), 1)
    alone = replace(copies, groups=np.arange(8))
    assert alone.groups.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    joined = replace(copies, groups=[0, 1, 2, 3, 1, 5, 6, 7])
    assert joined.groups.tolist() == [0, 0, 2, 3, 0, 0, 2, 3]
    regrouped = copies.group_originals(np.asarray([5, 5, 0, 1]))
    assert regrouped.groups.tolist() == [5, 5, 0, 1, 5, 5, 0, 1]
    assert sized(2, 2).group_originals(np.asarray([1, 1, 0, 0])).groups.tolist() == [1, 1, 0, 0]


def test_copies_are_selected_and_merged_with_their_origins():
    copies = with_copies(sized(2, 2), 1)
    assert copies.select([5, 1, 2]).origins.tolist() == ["c0/1", "", ""]
    other = replace(copies, name="other")
    both = copies.merge(other)
    assert both.ids[[4, 12]].tolist() == ["photos/c0/0~0", "other/c0/0~0"]
    originals = [f"{name}/{own}" for name in ("photos", "other") for own in copies.ids[:4]]
    assert both.origins.tolist() == [""] * 4 + originals[:4] + [""] * 4 + originals[4:]
    assert both.groups.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    apart = copies.originals().merge(replace(copies.select([4, 5, 6, 7]), name="copies"))
    assert apart.groups.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert copies.originals().merge(copies.originals().relabel({}).select([])).origins is None


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("is_grouped", [False, True])
def test_copies_change_nothing_about_how_originals_are_split(seed, is_grouped):
    generator = np.random.default_rng(seed)
    dataset = sized(20, 30, groups=generator.integers(0, 40, 50) if is_grouped else None)
    some_copies = 50 + generator.choice(100, 60, replace=False)
    copies = with_copies(dataset).select(generator.permutation([*range(50), *some_copies]))
    parts = copies.split(0.6, seed=seed)
    for part, expected in zip(parts, dataset.split(0.6, seed=seed), strict=True):
        assert sorted(part.originals().ids) == sorted(expected.ids)
        assert set(part.origins) <= {"", *expected.ids}
    assert sum(map(len, parts)) == 110


def test_copies_whose_original_is_not_there_stay_together():
    copies = with_copies(sized(4, 4)).select(range(8, 24))
    train, test = copies.split(0.5)
    assert (len(train), len(test)) == (8, 8)
    assert not set(train.origins) & set(test.origins)


def test_test_photos_by_id_or_folder_take_their_copies_along():
    copies = with_copies(sized(3, 3), 1)
    for test_ids in (["c0/1", "c1/5"], ["c0/1~0", "c1/5"]):
        train, test = copies.split_by_ids(test_ids)
        assert sorted(test.ids) == ["c0/1", "c0/1~0", "c1/5", "c1/5~0"]
        assert len(train) == 8
    with pytest.raises(DatasetError, match="leaves the training set empty"):
        copies.split_by_ids(copies.originals().ids)
    assert len(copies.split_by_folder("c0")[1]) == 6

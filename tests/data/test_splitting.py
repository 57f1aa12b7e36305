"""Splits that go on from an earlier one, against brute force; their files."""

import time
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from jaxcls.data.dataset import ID_DTYPE, Dataset
from jaxcls.data.source import MemorySource
from jaxcls.data.splitting import by_class, read_split, shuffled_units, write_split
from jaxcls.errors import DatasetError, UsageError

PHOTO = np.zeros((2, 3, 3), np.uint8)


def make_dataset(ids, labels, *, groups=None):
    classes = tuple(f"c{k}" for k in range(max(labels) + 1))
    return Dataset("photos", classes, labels, ids, MemorySource([PHOTO] * len(ids)), groups)


def numbered(*counts, first=0):
    """`counts[k]` photos of class k, with ids such as c0/0012."""
    ids = [f"c{label}/{first + i:04}" for label, count in enumerate(counts) for i in range(count)]
    return ids, [int(i[1]) for i in ids]


def sides_of(pair):
    return tuple(set(side.ids) for side in pair)


def test_photos_stay_where_they_were_and_new_ones_make_up_the_sizes():
    old = make_dataset(*numbered(12, 30))
    before = sides_of(old.split(0.5))
    grown = make_dataset(*numbered(20, 60))
    train, test = grown.split(0.66, seed=5, previous=before)
    assert before[0] < set(train.ids)
    assert before[1] < set(test.ids)
    assert len(train) == 52  # of 80
    assert train.class_counts().tolist() == [13, 39]  # 66 % of 20 and 60, where plain splits have it
    assert grown.split(0.66)[0].class_counts().tolist() == [13, 39]
    assert test.notes == (
        "the split is kept: 21 training and 21 test images stay, 31 training and 7 test images are new",
    )
    assert train.notes == ()


def test_without_new_photos_the_split_stays_whatever_size_is_asked_for():
    dataset = make_dataset(*numbered(10, 10))
    before = sides_of(dataset.split(0.5))
    for size in (1, 0.3, 0.9, 19):
        assert sides_of(dataset.split(size, previous=before, seed=3)) == before


def test_the_nearest_sizes_are_taken_where_too_much_is_settled():
    """Of class 0 all is trained on, of class 1 all is tested on; 4 new photos of each."""
    old, _ = numbered(20, 20)
    grown = make_dataset(*numbered(24, 24))
    previous = ([i for i in old if i[1] == "0"], [i for i in old if i[1] == "1"])
    train, _ = grown.split(0.9, previous=previous)
    # A new photo of class 0 has to be tested on, and all but none of class 1 be trained on.
    assert train.class_counts().tolist() == [23, 4]
    train, _ = grown.split(0.1, previous=previous)
    assert train.class_counts().tolist() == [20, 1]


def test_classes_without_a_free_photo_may_lie_on_one_side():
    dataset = make_dataset(*numbered(4, 1, 6))
    ids = dataset.ids.tolist()
    train, test = dataset.split(0.5, previous=(ids[:5], ids[5:8]))
    assert train.class_counts().tolist() == [4, 1, 1]  # one of class 2 at least, though 5 of 11 are wanted
    assert test.class_counts().tolist() == [0, 0, 5]
    with pytest.raises(DatasetError, match="class c1 has a single image or group"):
        dataset.split(0.5, previous=(ids[:3], ids[5:8]))


def test_a_class_that_is_all_tested_on_takes_nothing_from_the_others():
    """The least that can be trained on is one photo of class 1, and none of class 0."""
    dataset = make_dataset(*numbered(4, 6))
    ids = dataset.ids.tolist()
    train, _ = dataset.split(1, previous=(["gone"], ids[:4]))
    assert train.class_counts().tolist() == [0, 1]
    train, _ = dataset.split(9, previous=(["gone"], ids[:4]))
    assert train.class_counts().tolist() == [0, 5]


def test_a_group_counts_to_its_most_frequent_class():
    """Of a tie, to the first. Positions 0 to 8, in groups of 3, 3, 2 and 1."""
    labels = np.asarray([0, 2, 2, 1, 1, 0, 2, 1, -1])
    groups = np.asarray([5, 5, 5, 7, 7, 7, 9, 9, 0])
    units = shuffled_units(np.asarray([str(i) for i in range(9)], ID_DTYPE), groups, seed=0)
    strata = by_class(units, labels, ("a", "b", "c"))
    members = {name: sorted(part.positions.tolist()) for name, part in strata.items()}
    assert members == {"class c": [0, 1, 2], "class b": [3, 4, 5, 6, 7], "(unlabelled)": [8]}
    assert sorted(strata["class b"].sizes.tolist()) == [2, 3]


def test_a_group_goes_where_one_of_it_is():
    ids, labels = numbered(10, 10)
    previous = (["c0/0000", "c1/0000"], ["c0/0001", "c1/0001"])
    groups = np.arange(20)
    groups[[2, 3]] = 0  # new photos of c0 that show what a training photo shows
    groups[[12, 13]] = 11  # and of c1, what a test photo shows
    train, test = make_dataset(ids, labels, groups=groups).split(0.5, previous=previous)
    assert {"c0/0000", "c0/0002", "c0/0003", "c1/0000"} <= set(train.ids)
    assert {"c0/0001", "c1/0001", "c1/0002", "c1/0003"} <= set(test.ids)
    assert (len(train), len(test)) == (10, 10)


def test_a_group_on_both_sides_is_trained_on_and_named():
    ids, labels = numbered(6, 6)
    groups = np.arange(12)
    groups[[0, 1, 2]] = 0
    previous = (["c0/0000", "c1/0000"], ["c0/0001", "c1/0001"])
    train, test = make_dataset(ids, labels, groups=groups).split(0.5, previous=previous)
    assert {"c0/0000", "c0/0001", "c0/0002"} <= set(train.ids)
    assert (len(train), len(test)) == (6, 6)
    assert test.notes == (
        "the split is kept: 2 training and 1 test images stay, 3 training and 5 test images are new",
        "1 of its test images went over to the training set, where others of their group are: c0/0001",
    )


@pytest.mark.parametrize("seed", range(80))
def test_what_is_settled_is_kept_and_sizes_are_as_near_as_brute_force_finds(seed):
    generator = np.random.default_rng(seed)
    groups = np.repeat(np.arange(7), generator.integers(1, 5, 7))
    generator.shuffle(groups)
    ids = [str(i) for i in range(len(groups))]
    was = generator.choice(3, len(groups), p=[0.6, 0.2, 0.2])  # new, training, test
    was[:2] = 1, 2
    dataset = make_dataset(ids, [0] * len(groups), groups=groups)
    target = int(generator.integers(1, len(groups)))
    previous = [[i for i, side in zip(ids, was, strict=True) if side == wanted] for wanted in (1, 2)]
    train, test = dataset.split(target, stratify=False, seed=seed, previous=tuple(previous))
    sizes = np.bincount(groups)
    in_training = {group for group in range(7) if (was[groups == group] == 1).any()}
    in_test = {group for group in range(7) if (was[groups == group] == 2).any()} - in_training
    free = sorted(set(range(7)) - in_training - in_test)
    base = sum(sizes[group] for group in in_training)
    totals = {base + sum(sizes[list(part)]) for n in range(len(free) + 1) for part in combinations(free, n)}
    assert set(train.groups) >= in_training
    assert set(test.groups) >= in_test
    assert not set(train.groups) & set(test.groups)
    both_sides = [total for total in totals if 0 < total < len(groups)]
    assert abs(len(train) - target) == min(abs(total - target) for total in both_sides or totals)


def test_the_order_of_reading_does_not_matter():
    ids, labels = numbered(30, 50)
    dataset = make_dataset(ids, labels)
    previous = (ids[:10] + ids[40:50], ids[10:14] + ids[50:55])
    shuffled = dataset.select(np.random.default_rng(0).permutation(80))
    assert sides_of(dataset.split(previous=previous)) == sides_of(shuffled.split(previous=previous))


def test_what_is_no_earlier_split_of_these_photos_is_refused():
    dataset = make_dataset(*numbered(4, 4))
    with pytest.raises(UsageError, match="has 1 ids on both sides, first c0/0001"):
        dataset.split(0.5, previous=(["c0/0000", "c0/0001"], ["c0/0001"]))
    with pytest.raises(UsageError, match="has none of these images: is it one of another folder"):
        dataset.split(0.5, previous=(["photos/c0/0000.jpg"], ["photos/c0/0001.jpg"]))


def test_a_large_split_is_kept_in_a_moment():
    """Half of the classes are trained on as a whole: 68,000 photos less are wanted of the others."""
    labels = np.repeat(np.arange(500), 400)
    ids = np.asarray([f"{label}/{i}" for i, label in enumerate(labels)])
    dataset = Dataset("photos", tuple(map(str, range(500))), labels, ids, MemorySource([PHOTO] * len(ids)))
    previous = (ids[labels < 250].tolist(), [])
    started = time.perf_counter()
    train, _ = dataset.split(0.66, previous=previous)
    assert time.perf_counter() - started < 10
    assert len(train) == 132_000
    assert set(Counter(train.labels.tolist()).values()) == {400, 128}


def test_files_bear_every_id(tmp_path):
    names = ["a/é.png", "b/tab\there", "b/carriage\rreturn", "b/line\u2028separator", " c", "d "]
    odd = ["b/line\nend", "\\b/\\n", "b\\n\r\n", "\\"]
    write_split(tmp_path, names[:4] + odd, names[4:])
    assert read_split(tmp_path) == (names[:4] + odd, names[4:])
    assert (tmp_path / "test_ids.txt").read_bytes() == b" c\nd \n"
    write_split(tmp_path, names, [])
    assert read_split(tmp_path) == (names, [])
    # As they were written before anything was escaped.
    (tmp_path / "train_ids.txt").write_text("\\b/a.png\nb/c\\d\n")
    assert read_split(tmp_path)[0] == ["\\b/a.png", "b/c\\d"]
    (tmp_path / "train_ids.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(UsageError, match=r"train_ids\.txt cannot be read: it is no UTF-8"):
        read_split(tmp_path)
    (tmp_path / "train_ids.txt").unlink()
    with pytest.raises(
        UsageError, match=r"train_ids\.txt cannot be read: No such file .*: give the folder of a run"
    ):
        read_split(tmp_path)


@pytest.mark.parametrize("step", [1, 2])
def test_a_split_whose_writing_was_stopped_is_an_error_and_not_half_of_it(tmp_path, monkeypatch, step):
    write_split(tmp_path, ["a", "b", "c"], ["d"])
    replace, steps = Path.replace, iter(range(1, 3))

    def stop(self, target):
        if next(steps) == step:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_split(tmp_path, ["a", "b"], ["c", "d"])
    with pytest.raises(UsageError, match=r"test_ids\.txt cannot be read: No such file"):
        read_split(tmp_path)


@pytest.mark.parametrize(
    ("train", "test", "name"), [("a\nb", "c\n", "train"), ("a\n", "c\nd", "test"), ("", "a\n", "train")]
)
def test_files_that_are_cut_off_are_an_error(tmp_path, train, test, name):
    (tmp_path / "train_ids.txt").write_text(train)
    (tmp_path / "test_ids.txt").write_text(test)
    with pytest.raises(UsageError, match=rf"{name}_ids\.txt is cut off: give the folder of another run"):
        read_split(tmp_path)

"""Duplicates among drawn and real photos, against what was planted and a hand-checked list."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import draw
from PIL import Image, ImageEnhance

from experiments.duplicates import KINDS, plant, read_twins, share_found, wrongly_joined
from jaxcls.data.dataset import Dataset, from_items
from jaxcls.data.duplicates import describe_leakage, find_duplicates, find_leakage
from jaxcls.data.folder import read_folder
from jaxcls.errors import UsageError


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def groups_of(dataset, **options):
    """The positions of each group of two or more."""
    groups = find_duplicates(dataset, **options).groups
    assert groups.dtype == np.int32
    assert set(groups.tolist()) == set(range(groups.max(initial=-1) + 1))
    members = [np.flatnonzero(groups == group).tolist() for group in range(groups.max(initial=-1) + 1)]
    return [positions for positions in members if len(positions) > 1]


def test_copies_of_every_kind_are_in_their_originals_group():
    generator = np.random.default_rng(0)
    images = [draw(seed) for seed in range(12)]
    items = [*map(np.asarray, images), *(kind(image, generator) for kind in KINDS for image in images)]
    found = find_duplicates(from_items(items))
    assert found.groups.tolist() == list(range(12)) * 5
    assert (found.num_exact, found.num_near) == (0, 48)


def test_the_order_of_photos_does_not_matter():
    generator = np.random.default_rng(1)
    items = [
        encode(draw(seed % 8)) if seed < 8 else KINDS[seed % 4](draw(seed % 8), generator)
        for seed in range(24)
    ]
    order = generator.permutation(24)
    groups = find_duplicates(from_items([items[i] for i in order])).groups
    for group in range(8):
        assert set((order[groups == groups[np.flatnonzero(order == group)[0]]] % 8).tolist()) == {group}


def test_the_same_pixels_are_exact_copies_whatever_the_format():
    image, other = draw(0), draw(1)
    turned = Image.Exif()
    turned[274] = 6  # to be seen turned by a quarter
    items = [
        encode(image), encode(other), encode(image, "BMP"), np.asarray(image),
        encode(image, "WEBP", lossless=True),
        encode(image.transpose(Image.Transpose.ROTATE_90), exif=turned),
    ]  # fmt: skip
    found = find_duplicates(from_items(items))
    assert found.originals.tolist() == [0, 1, 0, 0, 0, 0]
    assert (found.num_exact, found.num_near, len(found.pairs)) == (4, 0, 0)
    assert found.groups.tolist() == [0, 1, 0, 0, 0, 0]


def test_plain_pictures_are_the_same_only_if_their_pixels_are():
    plain = [
        Image.new("RGB", size, colour)
        for size in ((64, 64), (90, 60))
        for colour in ("white", "red", "#fffffe")
    ]
    ramps = [
        Image.linear_gradient("L").point(lambda v, top=top: v * top // 255).convert("RGB") for top in (9, 12)
    ]
    items = [*map(encode, plain), *map(encode, ramps), encode(plain[1], "BMP")]
    assert groups_of(from_items(items)) == [[1, 8]]


def test_pictures_of_few_pixels_are_only_compared_exactly():
    """Near copies of 24 x 24 pixels, and of 40 x 40."""
    images = [draw(0).resize(size) for size in ((24, 24), (40, 40))]
    items = [np.asarray(ImageEnhance.Brightness(image).enhance(f)) for image in images for f in (1, 1, 0.8)]
    assert groups_of(from_items(items)) == [[0, 1], [3, 4, 5]]


def test_a_chain_is_no_group():
    """A window that moves over a wide picture: each view is much like the next, not like those further on."""
    wide = draw(3, (1200, 400))
    items = [encode(wide.crop((12 * i, 0, 12 * i + 300, 225))) for i in range(50)]
    found = find_duplicates(from_items(items))
    groups = [np.flatnonzero(found.groups == group) for group in set(found.groups.tolist())]
    assert 8 < len(groups) < 40
    pairs = set(map(tuple, found.pairs.tolist()))
    for group in groups:
        # One was found like each of the others.
        assert any(all((min(a, b), max(a, b)) in pairs for b in group if b != a) for a in group.tolist())
    # What was cut is still known.
    in_test = found.groups >= 5
    twins = found.twins(in_test)
    assert twins
    assert all(in_test[photo] and not in_test[twin] for photo, twin in twins.items())


def test_many_copies_are_one_group():
    """More than the neighbours that are looked at of each."""
    images = [draw(seed) for seed in range(2)]
    items = [encode(image, "JPEG", quality=quality) for image in images for quality in range(40, 70)]
    assert groups_of(from_items(items)) == [list(range(30 * i, 30 * (i + 1))) for i in range(2)]


def test_unreadable_photos_are_left_alone_and_named():
    items = [encode(draw(0)), b"no photo", encode(draw(0)), b"no photo", encode(draw(1))[:200]]
    found = find_duplicates(from_items(items))
    assert found.groups.tolist() == [0, 1, 0, 2, 3]
    assert sorted(found.errors) == [1, 3, 4]
    assert found.summary().count("not compared: ") == 3


@pytest.mark.parametrize("number", [0, 1])
def test_hardly_any_photos(number):
    found = find_duplicates(from_items([np.asarray(draw(0))][:number]), features=np.zeros((number, 4)))
    assert found.groups.tolist() == list(range(number))
    assert (found.num_exact, found.num_near, found.members) == (0, 0, [np.arange(1)][:number])
    assert found.summary() == "images: groups of images that show the same: 0 (0 exact and 0 near copies)"


def test_parallel_features_decide_where_pixels_leave_doubt():
    """Of pictures a bit less alike than twins, three have parallel features, as has one like none of them."""
    first, others = draw(0), [Image.blend(draw(0), draw(seed), 0.32) for seed in range(1, 5)]
    dataset = from_items([np.asarray(image) for image in (first, *others, draw(9))])
    features = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    features[[1, 2, 5]] = 3 * features[0]
    assert groups_of(dataset) == []
    assert groups_of(dataset, features=features) == [[0, 1, 2]]
    copies = from_items([np.asarray(first), np.asarray(first.resize((120, 90))), np.asarray(draw(9))])
    assert groups_of(copies, features=features[[0, 3, 4]]) == [[0, 1]]


@pytest.mark.parametrize("shape", [(2, 4), (3,)])
def test_features_of_other_photos_are_refused(shape):
    with pytest.raises(UsageError, match=r"features of 3 images are \[3, D\], not"):
        find_duplicates(from_items([np.asarray(draw(0))] * 3), features=np.zeros(shape))


@pytest.fixture(scope="module")
def pairs():
    """Ten pictures of two classes, each followed by a smaller copy."""
    images = [np.asarray(image) for seed in range(10) for image in (draw(seed), draw(seed).resize((120, 90)))]
    labels = np.repeat([0, 1], 10)
    return replace(from_items(images), name="pairs", classes=("a", "b"), labels=labels)


@pytest.mark.parametrize("seed", range(5))
def test_a_split_leaves_no_twin_on_the_other_side(pairs, seed):
    grouped = replace(pairs, groups=find_duplicates(pairs).groups)
    train, test = grouped.split(12, seed=seed)
    assert (len(train), len(test)) == (12, 8)
    assert find_leakage(train, test) == {}
    assert find_leakage(*pairs.split(12, seed=seed)) != {}


def test_leakage_names_the_training_photo(pairs):
    """Of a near copy, an exact one, and one that is not seen in training; names and ids may be the same."""
    train, test = pairs.select([0, 4, 6]), pairs.select([1, 6, 8])
    twins = find_leakage(train, test)
    assert twins == {"1": "0", "6": "6"}
    assert describe_leakage(twins, len(test)) == (
        "warning: 2 of 3 test images show the same as a training image, "
        "so that the test flatters: 1 (as 0), 6 (as 6)"
    )
    assert describe_leakage({}, 3) == "none of 3 test images shows the same as a training image"


def test_a_warning_names_the_first_twenty():
    twins = {f"t{i}": f"u{i}" for i in range(23)}
    assert describe_leakage(twins, 40).endswith("t19 (as u19), and 3 more")


def test_the_summary_tells_exact_copies_and_doubtful_labels(pairs):
    some = pairs.select([0, 1, 2, 2, 4])
    some = replace(some, labels=[0, 1, 0, 0, 0], ids=["a/0", "b/0", "a/1", "a/2", "a/3"])
    assert find_duplicates(some).summary() == (
        "pairs: groups of images that show the same: 2 (1 exact and 1 near copies)\n"
        "  a/0, b/0 (of different classes)\n"
        "  a/1, a/2 (exact)"
    )


TWINS = read_twins(Path(__file__).parent / "trash_twins.json")


def test_tableware_has_twins(shared):
    """A plate of bread, and an empty plate, each photographed twice."""
    dataset = read_folder(shared / "data" / "tableware")
    groups = groups_of(dataset)
    assert [dataset.ids[group].tolist() for group in groups] == [
        [f"plate/msft-paper-plate{number}.jpg" for number in pair]
        for pair in [(20170725132817620, 20170725132822956), (20170725151127657, 20170725151131591)]
    ]
    train, test = replace(dataset, groups=find_duplicates(dataset).groups).split(0.66)
    assert (len(train), len(test)) == (41, 22)


@pytest.fixture(scope="module")
def trash(shared) -> Dataset:
    """TrashNet, 2,527 photos of 150 x 150 pixels."""
    return read_folder(shared / "data" / "trash")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_copies_planted_among_real_photos_are_found(trash, seed):
    """At least 95 % of each kind; of the groups, 1 % at most joins photos that are no twins to the eye."""
    planted = plant(trash, 300, seed)
    groups = find_duplicates(planted.mixed).groups
    shares = share_found(groups, planted)
    assert min(shares.values()) >= 0.95, shares
    joined = wrongly_joined(groups, trash.ids[planted.shown], TWINS)
    assert len(joined) < 0.01 * (np.bincount(groups) > 1).sum(), joined


@pytest.mark.slow
def test_natural_twins_are_found_and_nothing_else(trash):
    groups = groups_of(trash)
    found = {frozenset(trash.ids[group]) for group in groups}
    assert found <= TWINS
    assert len(found) >= 0.9 * len(TWINS)

"""Augmented copies: what they show, what a second call does, and that none ever passes for an original."""

import io
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import draw, write_photos
from PIL import Image

from jaxcls.augment import copies, ops
from jaxcls.augment.copies import augment_dataset
from jaxcls.data.dataset import Dataset
from jaxcls.data.folder import read_folder
from jaxcls.data.lineage import LINEAGE_FILE, Lineage, read_lineage
from jaxcls.data.source import MemorySource
from jaxcls.errors import DatasetError, UsageError
from jaxcls.storage import Storage, file_sha256, locked

pytestmark = pytest.mark.usefixtures("compilation_cache")

MIRROR, NOISE = ops.Fliplr(), ops.AdditiveGaussianNoise(scale=(10, 20))


@pytest.fixture
def photos(tmp_path):
    """Three blue and two red photos, in PNG files."""
    return read_folder(write_photos(tmp_path / "photos", {"blue": 3, "red": 2}))


def contents(folder):
    """Path -> sha256 and time of the last change, of the photos in a folder."""
    return {
        path.relative_to(folder).as_posix(): (file_sha256(path), path.stat().st_mtime_ns)
        for path in folder.rglob("[!.]*g")
    }


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def augment(photos, pipelines, out, **options):
    """The dataset, and how many copies are new, from before, and removed."""
    said = []
    made = augment_dataset(photos, pipelines, out, report=said.append, **options)
    numbers = said[0].partition("(")[2].split()
    return made, (int(numbers[0]), int(numbers[2]), int(numbers[5]))


# What is made


def test_each_pipeline_makes_a_copy_of_each_original(photos, tmp_path):
    made, counts = augment(photos, [MIRROR, NOISE], tmp_path / "out")
    assert counts == (10, 0, 0)
    assert len(made) == 15
    assert made.classes == photos.classes
    assert made.ids[:5].tolist() == photos.ids.tolist()
    assert made.labels.tolist() == photos.labels.tolist() * 3
    assert made.origins.tolist() == [""] * 5 + photos.ids.tolist() * 2
    assert made.groups.tolist() == made.groups[:5].tolist() * 3
    for index, own in enumerate(photos.ids):
        before, after = tmp_path / "photos" / own, tmp_path / "out" / own
        assert before.read_bytes() == after.read_bytes()
        np.testing.assert_array_equal(made.image(5 + index), pixels(before)[:, ::-1])
        difference = made.image(10 + index).astype(float) - pixels(before)
        assert 5 < difference.std() < 25


def test_the_folder_is_read_with_its_lineage(photos, tmp_path):
    made = augment_dataset(photos, [MIRROR, NOISE], tmp_path / "out")
    read = read_folder(tmp_path / "out")
    assert sorted(read.ids) == sorted(made.ids)
    assert dict(zip(read.ids, read.origins, strict=True)) == dict(zip(made.ids, made.origins, strict=True))
    assert "(augmented copies among them): 10" in read.summary()
    assert "skipped" not in read.summary()
    for copy, line in read_lineage(tmp_path / "out").items():
        assert line.sha256 == file_sha256(tmp_path / "out" / copy)
        if line.original:
            assert ops.parse(line.pipeline) in (MIRROR, NOISE)
            assert line.original_sha256 == file_sha256(tmp_path / "photos" / line.original)


def test_copies_whose_original_is_gone_are_left_out(photos, tmp_path):
    """It may have been renamed: nothing would keep it on the side of its copies."""
    augment_dataset(photos, [MIRROR], tmp_path / "out")
    (tmp_path / "out/red/0.png").rename(tmp_path / "out/red/renamed.png")
    read = read_folder(tmp_path / "out")
    assert len(read) == 9
    assert not [own for own in read.ids if own.startswith("red/0.png")]
    assert "augmented copies whose original is gone, skipped: 1 (red/0.png~" in read.summary()


def test_copies_that_were_moved_do_not_pass_for_originals(photos, tmp_path):
    made = augment_dataset(photos, [MIRROR], tmp_path / "out")
    (tmp_path / "out/red").rename(tmp_path / "out/crimson")
    (tmp_path / "out" / made.ids[5]).rename(tmp_path / f"out/crimson/{made.ids[6].rpartition('/')[2]}")
    read = read_folder(tmp_path / "out")
    assert sorted(read.originals().ids) == [
        "blue/0.png",
        "blue/1.png",
        "blue/2.png",
        "crimson/0.png",
        "crimson/1.png",
    ]
    assert len(read) == 7
    assert "photos that lineage.jsonl names and that are gone: 5 (" in read.summary()
    assert "augmented copies of unknown originals, by their names, skipped: 3 (crimson/" in read.summary()


def test_jpegs_stay_jpegs_of_high_quality_and_others_become_pngs(tmp_path):
    for suffix in ("jpg", "webp", "bmp"):
        path = tmp_path / f"photos/{suffix}/1.{suffix}"
        path.parent.mkdir(parents=True)
        draw(0).save(path, quality=80)
    made = augment_dataset(read_folder(tmp_path / "photos"), [MIRROR], tmp_path / "out")
    paths = [made.source.path(index) for index in range(3, 6)]
    assert [path.suffix for path in paths] == [".png", ".jpg", ".png"]
    file = io.BytesIO()
    with Image.open(paths[1]) as copy:
        copy.save(file, "JPEG", quality=95, subsampling="4:4:4")
        assert copy.quantization == Image.open(file).quantization
        assert [layer[1:3] for layer in copy.layer] == [(1, 1)] * 3
    for path, index in zip(paths, range(3), strict=True):
        np.testing.assert_allclose(pixels(path), made.image(index)[:, ::-1], atol=16)


def test_a_rotation_is_about_the_centre_of_each_photo_whatever_its_shape(tmp_path):
    for number, size in enumerate([(48, 40), (40, 48), (30, 30)]):
        path = tmp_path / f"photos/{'ab'[number % 2]}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(number, size).save(path)
    photos = read_folder(tmp_path / "photos")
    made = augment_dataset(photos, [ops.Affine(rotate=180)], tmp_path / "out")
    for index in range(3):
        np.testing.assert_allclose(made.image(3 + index), made.image(index)[::-1, ::-1], atol=1)


@pytest.mark.parametrize(
    ("size", "reduced"),
    [((100, 60), (100, 60)), ((512, 341), (96, 64)), ((300, 900), (64, 192)), ((2000, 50), (256, 6))],
)
def test_large_photos_are_reduced(tmp_path, size, reduced):
    items = [np.asarray(draw(seed, size)) for seed in range(2)]
    photos = Dataset("drawn", ("a", "b"), [0, 1], ["1", "2"], MemorySource(items))
    made = augment_dataset(photos, [MIRROR], tmp_path / "out", max_short_side=64)
    assert made.image(2).shape == (*reduced[::-1], 3)
    expected = Image.fromarray(items[0]).resize(reduced, Image.Resampling.BICUBIC)
    np.testing.assert_allclose(made.image(2), np.asarray(expected)[:, ::-1], atol=40)
    assert made.image(0).shape == items[0].shape


def test_photos_from_memory_become_files(tmp_path):
    """Pixels become PNGs; what has no suffix gets one, and what is not below its class comes there."""
    file = io.BytesIO()
    draw(1).save(file, "JPEG")
    items = [np.asarray(draw(0)), file.getvalue()]
    photos = Dataset("drawn", ("a", "b"), [1, 0], ["record-0", "a/x/1"], MemorySource(items))
    made = augment_dataset(photos, [MIRROR], tmp_path / "out")
    assert made.ids[:2].tolist() == ["b/record-0.png", "a/x/1.jpeg"]
    np.testing.assert_array_equal(made.image(0), items[0])
    assert (tmp_path / "out/a/x/1.jpeg").read_bytes() == items[1]
    assert sorted(read_folder(tmp_path / "out").ids) == sorted(made.ids)


# What decides a copy


def test_draws_differ_by_photo_seed_and_repetition_alone(photos, tmp_path):
    def make(*pipelines, **options):
        return augment_dataset(photos, pipelines, tmp_path / f"out{len(list(tmp_path.iterdir()))}", **options)

    first, again, other_seed = make(NOISE, NOISE), make(NOISE), make(NOISE, seed=1)
    noises = [
        (made.image(index).astype(int) - made.image(index % 5))[5:-5, 5:-5].tobytes()
        for made in (first, other_seed)
        for index in range(5, len(made))
    ]
    assert len(set(noises)) == 15
    assert again.ids.tolist() == first.ids[:10].tolist()
    for index in range(10):
        np.testing.assert_array_equal(again.image(index), first.image(index))


def test_neither_company_nor_name_decides(photos, tmp_path):
    """The same photo, alone in another folder under another name, has the same copy."""
    made = augment_dataset(photos, [NOISE], tmp_path / "out")
    other = tmp_path / "alone"
    for name in ("x", "y"):
        (other / name).mkdir(parents=True)
        (other / name / "renamed.png").write_bytes(photos.source[0] if name == "x" else photos.source[1])
    alone = augment_dataset(read_folder(other), [NOISE], tmp_path / "out-alone")
    np.testing.assert_array_equal(alone.image(2), made.image(5))


# A second call


def test_photos_that_come_later_change_no_other_copy(photos, tmp_path):
    out = tmp_path / "out"
    augment_dataset(photos, [NOISE], out)
    before = contents(out)
    write_photos(tmp_path / "new", {"blue": 1}, seed=9)
    (tmp_path / "new/blue/0.png").rename(tmp_path / "photos/blue/00.png")
    made, counts = augment(read_folder(tmp_path / "photos"), [NOISE], out)
    assert counts == (1, 5, 0)
    assert len(made) == 12
    assert contents(out).items() >= before.items()


def test_what_has_not_changed_is_kept_and_what_is_not_asked_for_goes(photos, tmp_path):
    out = tmp_path / "out"
    assert augment(photos, [MIRROR, NOISE], out)[1] == (10, 0, 0)
    before, lineage = contents(out), (out / LINEAGE_FILE).read_bytes()
    assert augment(photos, [MIRROR, NOISE], out)[1] == (0, 10, 0)
    assert (contents(out), (out / LINEAGE_FILE).read_bytes()) == (before, lineage)
    assert augment(photos, [NOISE], out)[1] == (0, 5, 5)
    assert contents(out).items() <= before.items()
    assert augment(photos, [NOISE], out, seed=1)[1] == (5, 0, 5)
    assert augment(photos, [NOISE], out, seed=1, max_short_side=20)[1] == (5, 0, 5)
    fewer, counts = augment(photos.select([0, 1, 3]), [NOISE], out, seed=1, max_short_side=20)
    assert counts == (0, 3, 2)
    assert sorted(read_folder(out).ids) == sorted(fewer.ids)


def test_a_changed_original_has_its_copies_made_again(photos, tmp_path):
    out = tmp_path / "out"
    augment_dataset(photos, [MIRROR], out)
    draw(5).save(tmp_path / "photos/red/1.png")
    made, counts = augment(read_folder(tmp_path / "photos"), [MIRROR], out)
    assert counts == (1, 4, 1)
    np.testing.assert_array_equal(made.image(9), np.asarray(draw(5))[:, ::-1])
    assert len(read_folder(out)) == 10


def test_damaged_and_missing_files_are_made_again(photos, tmp_path):
    out = tmp_path / "out"
    made = augment_dataset(photos, [NOISE], out)
    before = {name: sha256 for name, (sha256, _) in contents(out).items()}
    (out / made.ids[5]).write_bytes(b"damaged")
    (out / made.ids[6]).unlink()
    (out / made.ids[0]).write_bytes(b"damaged too")
    assert augment(photos, [NOISE], out)[1] == (2, 3, 0)
    assert {name: sha256 for name, (sha256, _) in contents(out).items()} == before


def test_what_others_have_put_there_stays(photos, tmp_path):
    out = tmp_path / "out"
    augment_dataset(photos, [MIRROR], out)
    draw(3).save(out / "red" / "theirs.png")
    draw(4).save(out / "red" / "1.png")  # an original, retouched in place
    augment_dataset(photos.select([0, 1, 2, 3]), [MIRROR], out)
    np.testing.assert_array_equal(pixels(out / "red/theirs.png"), np.asarray(draw(3)))
    np.testing.assert_array_equal(pixels(out / "red/1.png"), np.asarray(draw(4)))


def test_a_copy_that_somebody_has_changed_stays_and_stays_a_copy(photos, tmp_path):
    out = tmp_path / "out"
    made = augment_dataset(photos, [MIRROR], out)
    draw(3).save(out / made.ids[5])
    said = []
    augment_dataset(photos, [NOISE], out, report=said.append)
    assert "(5 new, 0 from before; 4 removed; 1 changed by somebody and kept)" in said[0]
    np.testing.assert_array_equal(pixels(out / made.ids[5]), np.asarray(draw(3)))
    read = read_folder(out)
    assert dict(zip(read.ids, read.origins, strict=True))[made.ids[5]] == made.origins[5]


def test_a_lineage_that_names_a_file_of_somebodys_does_not_remove_it(photos, tmp_path):
    out = tmp_path / "out"
    augment_dataset(photos, [MIRROR], out)
    draw(3).save(out / "red" / "theirs.png")
    for sha256 in ("", "ab" * 32):
        line = Lineage("red/theirs.png", sha256, "red/0.png", "cd" * 32, "Fliplr()", 0, 0, 640)
        with (out / LINEAGE_FILE).open("a") as file:
            file.write(line.to_line())
        augment_dataset(photos, [MIRROR], out)
        np.testing.assert_array_equal(pixels(out / "red/theirs.png"), np.asarray(draw(3)))


def test_links_out_of_the_folder_are_refused(photos, tmp_path):
    out = tmp_path / "out"
    augment_dataset(photos, [MIRROR], out)
    (out / "red").rename(tmp_path / "elsewhere")
    (out / "red").symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere")
    for some in (photos, photos.select([0, 1, 2])):
        with pytest.raises(DatasetError, match="out/red is a link: put a folder in its place"):
            augment_dataset(some, [NOISE], out)
    assert contents(tmp_path / "elsewhere") == before


def test_copies_are_not_copied(photos, tmp_path):
    made = augment_dataset(photos, [MIRROR], tmp_path / "out")
    again = augment_dataset(made, [NOISE], tmp_path / "again")
    assert len(again) == 10
    assert not set(made.ids[5:]) & set(again.ids)


def test_without_a_folder_each_request_has_its_own_below_the_outputs(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxcls.storage._in_use", Storage(tmp_path / "outputs", tmp_path, tmp_path))
    train, test = photos.split(3)
    first, second = augment_dataset(train, [MIRROR]), augment_dataset(test, [MIRROR])
    assert first.image(5).shape == second.image(3).shape
    assert augment(train, [MIRROR], None)[1] == (0, 3, 0)
    folders = list((tmp_path / "outputs").iterdir())
    assert len(folders) == 2
    assert all(folder.name.startswith("photos-augmented-") for folder in folders)


# Interruptions


@pytest.mark.parametrize("num_writes", [3, 5, 9])
def test_no_copy_passes_for_an_original_wherever_the_work_breaks_off(
    photos, tmp_path, monkeypatch, num_writes
):
    out, left = tmp_path / "out", [num_writes]

    def write(path, content):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        path.write_bytes(content)

    with monkeypatch.context() as patched:
        patched.setattr(copies, "write_whole", write)
        with pytest.raises(KeyboardInterrupt):
            augment_dataset(photos, [NOISE], out)
    there = set(contents(out))
    assert len(there) >= num_writes
    known = read_lineage(out)
    assert {own for own in there if not known[own].original} <= set(photos.ids)
    made, counts = augment(photos, [NOISE], out)
    assert sum(counts) == 5
    whole = augment_dataset(photos, [NOISE], tmp_path / "whole")
    assert {n: s for n, (s, _) in contents(out).items()} == {
        n: s for n, (s, _) in contents(tmp_path / "whole").items()
    }
    assert made.ids.tolist() == whole.ids.tolist()


def test_a_killed_process_is_taken_up_where_it_ended(tmp_path):
    write_photos(tmp_path / "photos", {"blue": 15, "red": 15})
    code = """
import itertools
import os
import sys
from pathlib import Path
from jaxcls import read_folder
from jaxcls.augment import ops
from jaxcls.augment.copies import augment_dataset
replace, calls = Path.replace, itertools.count()
def stop(path, target):
    if next(calls) >= 50:  # the lineage, 30 originals and 19 copies are written
        os.write(1, b"here\\n")  # one call: several threads get here
        sys.stdin.read()
    return replace(path, target)
Path.replace = stop
augment_dataset(read_folder("photos"), [ops.Fliplr(), ops.Flipud()], "out")
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
    assert list((tmp_path / "out").rglob(".*"))
    photos = read_folder(tmp_path / "photos")
    known = read_lineage(tmp_path / "out")
    there = contents(tmp_path / "out")
    assert {own for own in there if not known[own].original} == set(photos.ids)
    num_known = sum(bool(line.original and line.sha256) for line in known.values())
    assert num_known <= 19
    made, counts = augment(photos, [ops.Fliplr(), ops.Flipud()], tmp_path / "out")
    assert counts == (60 - num_known, num_known, 0)
    for index in (0, 15, 29):
        np.testing.assert_array_equal(made.image(60 + index), photos.image(index)[::-1])
    assert not list((tmp_path / "out").rglob(".*"))


def test_two_processes_do_not_work_in_one_folder(photos, tmp_path):
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(DatasetError, match="another process"):
        augment_dataset(photos, [MIRROR], tmp_path / "out")


# Mistakes


@pytest.mark.parametrize(
    ("pipelines", "message"),
    [
        ([], "at least one pipeline"),
        ([lambda key, images: images], "only operations of jaxcls.augment.ops leave a lineage"),
        ([ops.Sequential([lambda key, images: images])], "only operations of jaxcls.augment.ops"),
        ([ops.Affine(rotate=np.float64(3))], "only operations of jaxcls.augment.ops"),
    ],
)
def test_pipelines_that_no_lineage_can_tell_of_are_refused(photos, tmp_path, pipelines, message):
    with pytest.raises(UsageError, match=message):
        augment_dataset(photos, pipelines, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_will_not_do_are_refused(photos, tmp_path):
    draw(0).save(tmp_path / "else.png")
    for out in (tmp_path, tmp_path / "photos"):
        with pytest.raises(UsageError, match="holds something else"):
            augment_dataset(photos, [MIRROR], out)
    for out in (tmp_path / "photos" / "more", tmp_path / "photos" / "red" / "more"):
        with pytest.raises(UsageError, match="lie in each other"):
            augment_dataset(photos, [MIRROR], out)
    with pytest.raises(UsageError, match="is a file"):
        augment_dataset(photos, [MIRROR], tmp_path / "else.png")
    augment_dataset(photos, [MIRROR], tmp_path / "out")
    with pytest.raises(UsageError, match="lie in each other"):
        augment_dataset(read_folder(tmp_path / "out"), [NOISE], tmp_path / "out")
    with pytest.raises(UsageError, match="max_short_side 0"):
        augment_dataset(photos, [MIRROR], tmp_path / "new", max_short_side=0)


def test_photos_that_will_not_do_are_named_before_anything_is_made(photos, tmp_path):
    (tmp_path / "photos/red/0.png").write_bytes(b"no picture")
    whole = (tmp_path / "photos/blue/0.png").read_bytes()
    (tmp_path / "photos/blue/0.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "photos/blue/1.png").unlink()
    with pytest.raises(
        DatasetError, match=r"1 of 5 images cannot be decoded(.|\n)*blue/1.png: cannot be read"
    ):
        augment_dataset(photos, [MIRROR], tmp_path / "out")
    problems = r"2 of 4 images cannot be decoded(.|\n)*blue/0.png: damaged PNG(.|\n)*red/0.png: not an image"
    with pytest.raises(DatasetError, match=problems):
        augment_dataset(photos.select([0, 2, 3, 4]), [MIRROR], tmp_path / "out")
    assert not contents(tmp_path / "out")
    with pytest.raises(DatasetError, match="unlabelled images: label or filter"):
        augment_dataset(replace(photos, labels=[0, 0, 0, 1, -1]), [MIRROR], tmp_path / "out")


@pytest.mark.parametrize(
    ("ids", "classes"),
    [
        (["../1", "2"], ("a", "b")),
        (["1", "x/.hidden"], ("a", "b")),
        (["1", "2"], ("a/b", "c")),
        (["1", "2"], ("..", "c")),
    ],
)
def test_ids_and_classes_that_are_no_files_names_are_refused(tmp_path, ids, classes):
    photos = Dataset("drawn", classes, [0, 1], ids, MemorySource([np.asarray(draw(0))] * 2))
    with pytest.raises(DatasetError, match=r"gives no file's name.*rename it, or the class"):
        augment_dataset(photos, [MIRROR], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".png", ".jpeg"])
def test_names_leave_room_for_those_of_their_copies(tmp_path, suffix):
    def make(length):
        name = "ü" * 100 + "n" * (length - 200 - len(suffix)) + suffix
        items = [np.asarray(draw(0))] * 2
        return Dataset("drawn", ("a", "b"), [0, 1], [name, f"2{suffix}"], MemorySource(items))

    with pytest.raises(DatasetError, match=r"names of 256 bytes; at most 255 are possible.*a shorter name"):
        augment_dataset(make(235), [MIRROR], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(augment_dataset(make(234), [MIRROR], tmp_path / "out")) == 4


def test_ids_that_would_meet_in_one_file_are_refused(tmp_path):
    photos = Dataset(
        "drawn", ("a", "b"), [0, 0, 1], ["a/1", "1", "2"], MemorySource([np.asarray(draw(0))] * 3)
    )
    with pytest.raises(DatasetError, match="name the same file"):
        augment_dataset(photos, [MIRROR], tmp_path / "out")


def test_real_photos(shared, tmp_path):
    photos = read_folder(shared / "data" / "tableware").select(range(0, 63, 9))
    pipeline = ops.Sequential([ops.Fliplr(0.5), ops.Crop(percent=(0, 0.1))])
    made = augment_dataset(photos, [pipeline], tmp_path / "out")
    for index in range(7):
        small, copy = (np.asarray(made.photo(i).decode(None).resize((24, 24))) for i in (index, 7 + index))
        likeness = max(np.corrcoef(view.ravel(), copy.ravel())[0, 1] for view in (small, small[:, ::-1]))
        assert likeness > 0.8

"""How `jaxcls train` and `svm` divide photos: on from an earlier split, and what they say of it."""

from pathlib import Path

import pytest
from conftest import write_photos

import jaxcls
from jaxcls.cli import main
from jaxcls.commands.training import SplitOptions, TrainingCommand
from jaxcls.data.splitting import read_split, write_split
from jaxcls.errors import UsageError


@pytest.fixture(autouse=True)
def _own_home(tmp_path, monkeypatch, compilation_cache):
    monkeypatch.setenv("JAXCLS_HOME", str(tmp_path / "home"))
    # The session's cache of compiled programs is shared by these tests; `main` would point it elsewhere.
    monkeypatch.setattr("jaxcls.parallel.use_compilation_cache", lambda folder: None)


@pytest.fixture
def folder(tmp_path):
    return write_photos(tmp_path / "photos", {"blue": 10, "red": 10})


def divide(folder, **options):
    return TrainingCommand(data=folder, split=SplitOptions(**options)).divide()


def test_photos_that_are_added_later_leave_the_others_on_their_sides(folder, served_model, tmp_path, capsys):
    out = tmp_path / "svm.jaxcls"
    assert main(["svm", str(folder), "--backbone", str(served_model), "--out", str(out)]) == 0
    jaxcls.load(out)
    before = read_split(out)
    assert [len(side) for side in before] == [13, 7]
    for path in write_photos(tmp_path / "new", {"blue": 5, "red": 5}, seed=1).rglob("*.png"):
        path.rename(folder / path.parent.name / f"later-{path.name}")
    capsys.readouterr()
    sides = divide(folder, keep_split=out, split_seed=3)
    assert capsys.readouterr().err == (
        "the split is kept: 13 training and 7 test images stay, 6 training and 4 test images are new\n"
    )
    for earlier, later in zip(before, sides, strict=True):
        assert set(earlier) < set(later.ids)


def test_a_new_copy_of_a_test_photo_is_tested_on(folder, tmp_path):
    train, test = divide(folder, train_size=0.5)
    write_split(tmp_path, train.ids, test.ids)
    for side, place in ((test.ids[0], "red/new-of-test.png"), (train.ids[0], "red/new-of-train.png")):
        (folder / place).write_bytes((folder / side).read_bytes())
    train, test = divide(folder, train_size=0.9, keep_split=tmp_path)
    assert "red/new-of-test.png" in test.ids
    assert "red/new-of-train.png" in train.ids
    assert len(test) == 11


def test_what_the_reader_left_out_is_told(folder, capsys):
    (folder / "red" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "red" / "bad.png").write_text("no photo")
    (folder / "red" / "notes.txt").write_text("no photo")
    photos = TrainingCommand(data=folder, skip_bad=True).divide()
    assert sum(map(len, photos)) == 20
    assert capsys.readouterr().err.splitlines() == [
        "files that are no images, skipped: 1 (red/notes.txt)",
        "links in a circle, skipped: 1 (red/loop)",
        "1 undecodable images left out:",
        f"  {folder}/red/bad.png: not an image in a known format (JPEG, PNG, WebP, BMP, GIF, TIFF)",
    ]


def test_mistakes(folder, tmp_path):
    with pytest.raises(UsageError, match=r"nothing/train_ids\.txt cannot be read: No such file"):
        divide(folder, keep_split=Path(tmp_path / "nothing"))
    for options in ({"test_data": folder}, {"train_size": 1}):
        with pytest.raises(UsageError, match="--keep-split goes with neither --test-data nor --train-size 1"):
            divide(folder, keep_split=tmp_path, **options)
    write_split(tmp_path, ["a/1.png"], ["a/2.png"])
    with pytest.raises(UsageError, match="has none of these images"):
        divide(folder, keep_split=tmp_path)

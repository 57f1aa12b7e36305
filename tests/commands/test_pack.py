"""`jaxcls pack`, and what other commands read in place of a folder of photos."""

import pytest
from conftest import write_photos

from jaxcls.cli import main
from jaxcls.commands.base import PhotoCommand
from jaxcls.data.arrayrecord import read_arrayrecord
from jaxcls.errors import UsageError


@pytest.fixture(autouse=True)
def _own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCLS_HOME", str(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path):
    return write_photos(tmp_path / "photos", {"blue": 3, "red": 2})


def test_packed_photos_are_read_like_the_folder(folder, tmp_path, capsys):
    out = tmp_path / "records"
    assert main(["pack", str(folder), "--out", str(out), "--shards", "2"]) == 0
    assert capsys.readouterr().out == f"5 images, 0.3 MiB: {out}\n"
    assert len(list(out.glob("*.arrayrecord"))) == 2
    assert main(["info", str(out)]) == 0
    summary = capsys.readouterr().out
    assert summary.startswith("photos: 5 images, 2 classes\n  blue: 3\n    blue/0.png\n")
    assert "every image can be decoded" in summary
    assert main(["pack", str(out), "--out", str(tmp_path / "small"), "--size", "10"]) == 0
    assert read_arrayrecord(tmp_path / "small").image(0).shape == (10, 12, 3)


def test_lists_are_read_too(folder, tmp_path, capsys):
    path = tmp_path / "photos.csv"
    path.write_text("path,label\nphotos/red/0.png,red\nphotos/blue/1.png,blue\n")
    assert main(["info", str(path)]) == 0
    assert capsys.readouterr().out.startswith("photos: 2 images, 2 classes\n  blue: 1\n")


@pytest.mark.parametrize("kind", ["folder", "records", "list"])
def test_classes_that_are_given_decide_the_labels(folder, tmp_path, kind):
    path = folder
    if kind == "records":
        path = tmp_path / "records"
        assert main(["pack", str(folder), "--out", str(path)]) == 0
    if kind == "list":
        path = tmp_path / "photos.csv"
        path.write_text("path,label\nphotos/blue/0.png,blue\nphotos/red/1.png,red\n")
    found = PhotoCommand(max_pixels=99).read(path, ("red", "green", "blue"))
    assert found.classes == ("red", "green", "blue")
    assert set(found.labels.tolist()) == {0, 2}
    assert found.max_pixels == 99
    if kind != "folder":
        with pytest.raises(UsageError, match="has photos of red; known are blue"):
            PhotoCommand().read(path, ("blue",))


def test_a_folder_may_be_named_like_a_list(folder):
    folder.rename(folder.with_suffix(".csv"))
    assert len(PhotoCommand().read(folder.with_suffix(".csv"))) == 5


def test_bad_photos_stop_it_or_are_left_out(folder, tmp_path, capsys):
    (folder / "blue" / "bad.png").write_text("no picture")
    out = str(tmp_path / "records")
    assert main(["pack", str(folder), "--out", out, "--size", "9"]) == 1
    error = capsys.readouterr().err
    assert "bad.png: not an image" in error
    assert "--skip-bad" in error
    assert main(["pack", str(folder), "--out", out, "--size", "9", "--skip-bad"]) == 0
    assert "bad.png" in capsys.readouterr().err
    assert len(read_arrayrecord(out)) == 5


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--out", "photos"), 1, "photos exists: choose another path"),
        (("--out", "new", "--shards", "0"), 2, "shards 0"),
        (("--out", "new", "--size", "-1"), 2, "size -1"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    assert main(["pack", "photos", *arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()

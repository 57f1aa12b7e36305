"""`jaxcls info`: what became of the photos since it was asked last; photos that cannot be decoded."""

from contextlib import closing, suppress
from pathlib import Path

import pytest
from conftest import write_photos

from jaxcls.cli import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCLS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("jaxcls.parallel.use_compilation_cache", lambda folder: None)
    return write_photos(tmp_path / "photos", {"blue": 3, "red": 3})


def lines_of(capsys, arguments, code=0):
    assert main(["info", *map(str, arguments)]) == code
    return capsys.readouterr().out.splitlines()


def test_changes_are_told_once(folder, tmp_path, capsys):
    file = tmp_path / "photos.sha256"
    command = [folder, "--inventory", file]
    assert f"inventory of 6 images: {file}" in lines_of(capsys, command)
    told = "since {} was written: {} as before, 0 added, 0 removed, 0 changed, {} moved, 0 unreadable"
    assert told.format(file, 6, 0) in lines_of(capsys, command)
    (folder / "red/0.png").rename(folder / "blue/new.png")
    lines = lines_of(capsys, command)
    assert lines[lines.index(told.format(file, 5, 1)) + 1] == "  moved: red/0.png -> blue/new.png"
    assert told.format(file, 6, 0) in lines_of(capsys, command)


def test_changes_are_told_though_an_image_cannot_be_decoded(folder, tmp_path, capsys):
    command = [folder, "--inventory", tmp_path / "list"]
    lines_of(capsys, command)
    (folder / "red/bad.png").write_text("no photo")
    assert "  added: red/bad.png" in lines_of(capsys, command, code=1)


def test_a_photo_that_is_unreadable_once_is_no_new_one_afterwards(folder, tmp_path, capsys):
    command = [folder, "--inventory", tmp_path / "list"]
    lines_of(capsys, command)
    (folder / "red/0.png").rename(tmp_path / "away.png")
    (folder / "red/0.png").symlink_to(tmp_path / "nowhere.png")
    for _ in range(2):
        lines = lines_of(capsys, command, code=1)
        assert [line for line in lines if ": red/0.png" in line] == ["  unreadable: red/0.png"]
    (folder / "red/0.png").unlink()
    (folder / "red/0.png").write_bytes((folder / "red/1.png").read_bytes())
    assert "  changed: red/0.png" in lines_of(capsys, command)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="what cannot be printed is tried there")
def test_what_cannot_be_printed_is_told_the_next_time(folder, tmp_path, capsys, monkeypatch):
    command = [folder, "--inventory", tmp_path / "list"]
    lines_of(capsys, command)
    (folder / "red/0.png").unlink()
    with monkeypatch.context() as patch, suppress(OSError), closing(Path("/dev/full").open("w")) as full:
        patch.setattr("sys.stdout", full)
        main(["info", *map(str, command)])
    assert "  removed: red/0.png" in lines_of(capsys, command)


def test_what_is_no_inventory_stays_as_it_is(folder, tmp_path, capsys):
    (tmp_path / "diary.txt").write_text("Dear diary\n")
    assert main(["info", str(folder), "--inventory", str(tmp_path / "diary.txt")]) == 2
    assert "diary.txt, line 1 is none of an inventory: give" in capsys.readouterr().err
    assert (tmp_path / "diary.txt").read_text() == "Dear diary\n"
    assert main(["info", "--inventory", str(tmp_path / "list")]) == 2
    assert "--inventory" in capsys.readouterr().err


def test_what_is_asked_of_a_folder_is_told_though_an_image_cannot_be_decoded(folder, capsys):
    (folder / "red/bad.png").write_text("no photo")
    (folder / "red/twin.png").write_bytes((folder / "red/0.png").read_bytes())
    lines = lines_of(capsys, [folder, "--duplicates"], code=1)
    assert "1 undecodable images left out:" in lines
    assert any("red/bad.png" in line for line in lines)
    assert "  red/0.png, red/twin.png (exact)" in lines
    assert "every image can be decoded" not in lines

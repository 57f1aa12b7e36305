"""Inventories against `sha256sum`, and what they say of photos that came, went, changed and moved."""

import hashlib
import shutil
import subprocess

import numpy as np
import pytest
from conftest import write_photos

from jaxcls.data.dataset import from_items
from jaxcls.data.folder import read_folder
from jaxcls.data.inventory import Changes, compare_inventories, read_inventory, take_inventory
from jaxcls.errors import UsageError

AS_BEFORE = Changes(added=(), removed=(), changed=(), moved=(), unreadable=(), num_same=12)


@pytest.fixture
def folder(tmp_path):
    return write_photos(tmp_path / "photos", {"blue": 6, "red": 6})


def inventory(folder):
    return take_inventory(read_folder(folder))


def test_an_inventory_holds_the_sha256_of_every_file(folder):
    found = inventory(folder)
    assert found.ids.tolist() == read_folder(folder).ids.tolist()
    for name, digest in zip(found.ids, found.digests, strict=True):
        assert digest.tobytes() == hashlib.sha256((folder / name).read_bytes()).digest()
    assert compare_inventories(found, inventory(folder)) == AS_BEFORE


def test_every_kind_of_change_is_told(folder):
    before = inventory(folder)
    shutil.copy(folder / "red/5.png", folder / "red/6.png")  # a new photo, whatever it shows
    (folder / "red/0.png").unlink()
    (folder / "red/1.png").write_bytes((folder / "blue/1.png").read_bytes())
    (folder / "blue/2.png").rename(folder / "red/20.png")
    (folder / "blue/3.png").rename(folder / "blue/deep.png")
    (folder / "blue/4.png").unlink()
    (folder / "blue/4.png").mkdir()
    (folder / "blue/4.png/4.png").write_bytes((folder / "blue/1.png").read_bytes())
    changes = compare_inventories(before, inventory(folder))
    assert changes == Changes(
        added=("blue/4.png/4.png", "red/6.png"),
        removed=("blue/4.png", "red/0.png"),
        changed=("red/1.png",),
        moved=(("blue/3.png", "blue/deep.png"), ("blue/2.png", "red/20.png")),
        unreadable=(),
        num_same=7,
    )
    assert str(changes).splitlines() == [
        "7 as before, 2 added, 2 removed, 1 changed, 2 moved, 0 unreadable",
        "  added: blue/4.png/4.png",
        "  added: red/6.png",
        "  removed: blue/4.png",
        "  removed: red/0.png",
        "  changed: red/1.png",
        "  moved: blue/3.png -> blue/deep.png",
        "  moved: blue/2.png -> red/20.png",
    ]


def test_of_several_with_one_content_as_many_have_moved_as_are_gone(folder):
    for name in ("red/7.png", "red/8.png"):
        shutil.copy(folder / "red/0.png", folder / name)
    before = inventory(folder)
    for name in ("red/0.png", "red/8.png"):
        (folder / name).unlink()
    for name in ("blue/a.png", "blue/b.png", "blue/c.png"):
        shutil.copy(folder / "red/7.png", folder / name)
    changes = compare_inventories(before, inventory(folder))
    assert changes.moved == (("red/0.png", "blue/a.png"), ("red/8.png", "blue/b.png"))
    assert (changes.added, changes.removed) == (("blue/c.png",), ())


def test_photos_that_cannot_be_read_are_not_taken_for_removed(folder, tmp_path):
    (folder / "red/gone.png").symlink_to(tmp_path / "nowhere.png")
    before = inventory(folder)
    assert (len(before), before.unreadable) == (12, ("red/gone.png",))
    (folder / "red/0.png").unlink()
    (folder / "red/0.png").symlink_to(tmp_path / "nowhere.png")
    changes = compare_inventories(before, inventory(folder))
    assert (changes.unreadable, changes.removed) == (("red/0.png", "red/gone.png"), ())
    assert changes.num_same == 11


def test_many_changes_are_counted_and_the_first_shown(folder):
    before = inventory(folder)
    for number in range(30):
        (folder / f"red/{number:02}.jpg").write_bytes(str(number).encode())
    lines = str(compare_inventories(before, inventory(folder))).splitlines()
    assert len(lines) == 1 + 20 + 1
    assert lines[-1] == "  added: and 10 more"


def test_nothing_and_something(folder, tmp_path):
    nothing = take_inventory(from_items([]))
    assert compare_inventories(nothing, nothing).num_same == 0
    assert compare_inventories(nothing, inventory(folder)).added == tuple(inventory(folder).ids)
    assert compare_inventories(inventory(folder), nothing).removed == tuple(inventory(folder).ids)
    nothing.write(tmp_path / "list")
    assert len(read_inventory(tmp_path / "list")) == 0


def test_arrays_count_by_shape_and_pixels():
    flat, tall = np.zeros((2, 3, 3), np.uint8), np.zeros((3, 2, 3), np.uint8)
    first, second, third = take_inventory(from_items([flat, tall, flat.copy()])).digests
    assert (first == third).all()
    assert (first != second).any()


# Files.


ODD = (
    "b/back\\slash.png",
    "b/line\nend.png",
    "b/carriage\rreturn.png",
    "b/é 🍵.png",
    "b/ end .png",
    "b/\\n.png",
)


def test_the_file_comes_back_as_it_went(folder, tmp_path):
    (folder / "b").mkdir()
    for number, name in enumerate(ODD):
        (folder / name).write_bytes(str(number).encode())
    before = inventory(folder)
    before.write(tmp_path / "list")
    again = read_inventory(tmp_path / "list")
    assert again.ids.tolist() == before.ids.tolist()
    np.testing.assert_array_equal(again.digests, before.digests)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="the file is held against sha256sum")
def test_sha256sum_reads_our_files_and_writes_some_that_we_read(folder, tmp_path):
    (folder / "b").mkdir()
    for number, name in enumerate(ODD):
        (folder / name).write_bytes(str(number).encode())
    found = inventory(folder)
    found.write(tmp_path / "list")
    check = ["sha256sum", "--check", "--strict", "--quiet", tmp_path / "list"]
    assert subprocess.run(check, cwd=folder, capture_output=True, check=False).stdout == b""
    (folder / "red/0.png").write_bytes(b"another")
    done = subprocess.run(check, cwd=folder, capture_output=True, check=False)
    assert done.stdout == b"red/0.png: FAILED\n"
    (tmp_path / "theirs").write_bytes(
        subprocess.run(
            ["sha256sum", *inventory(folder).ids], cwd=folder, capture_output=True, check=True
        ).stdout
    )
    theirs = read_inventory(tmp_path / "theirs")
    assert compare_inventories(theirs, inventory(folder)).num_same == 12 + len(ODD)


@pytest.mark.parametrize(
    "line",
    [
        "no inventory",
        f"{'0' * 63}  a",
        f"{'g' * 64}  a",
        f"{'0' * 64}a",
        f"{'0' * 64}  ",
        "",
        f"{'0' * 64}  cut",
    ],
)
def test_another_file_is_refused_and_not_written_over(tmp_path, line):
    path = tmp_path / "list"
    path.write_text(f"{'0' * 64}  fine\n{line}" + "\n" * (not line.endswith("cut")))
    with pytest.raises(UsageError, match=f"{path}, line 2 is none of an inventory"):
        read_inventory(path)


def test_files_that_cannot_be_used_are_named(tmp_path):
    path = tmp_path / "list"
    path.write_text(f"{'0' * 64}  a\n{'1' * 64}  a\n")
    with pytest.raises(UsageError, match="line 2 names a again"):
        read_inventory(path)
    path.write_bytes(b"\xff")
    for unreadable in (path, tmp_path, tmp_path / "nothing"):
        with pytest.raises(UsageError, match=f"{unreadable} cannot be read"):
            read_inventory(unreadable)
    with pytest.raises(UsageError, match="nowhere/list cannot be written: No such file"):
        take_inventory(from_items([])).write(tmp_path / "nowhere" / "list")

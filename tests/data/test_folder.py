"""Folders of photos: what is read, what is left out, and what the summary tells of it."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxcls.data import folder
from jaxcls.data.dataset import scan
from jaxcls.data.folder import list_images, read_folder
from jaxcls.errors import DatasetError


def add(root, *names, colour=(1, 2, 3)):
    """PNG pictures of 2 x 3 pixels under these names, whatever their suffix."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2), colour).save(path, "PNG")
    return root


def test_sub_folders_are_classes_and_ids_are_relative_paths(tmp_path):
    add(tmp_path, "cup/b.png", "cup/a.jpg", "bowl/z.png", "cup/deep/er/c.png")
    dataset = read_folder(tmp_path)
    assert dataset.name == tmp_path.name
    assert dataset.classes == ("bowl", "cup")
    assert dataset.ids.tolist() == ["bowl/z.png", "cup/a.jpg", "cup/b.png", "cup/deep/er/c.png"]
    assert dataset.labels.tolist() == [0, 1, 1, 1]
    assert dataset.labels.dtype == np.int32
    assert dataset.source.path(3) == tmp_path / "cup/deep/er/c.png"
    np.testing.assert_array_equal(dataset.image(3), np.full((2, 3, 3), [1, 2, 3], np.uint8), strict=True)
    assert read_folder(str(tmp_path), name="kitchen").name == "kitchen"


def test_names_may_be_of_any_language_and_suffixes_upper_case(tmp_path):
    add(tmp_path, "Tasse/blå 🍵.JPG", "茶碗/写真.PnG", "Tasse/é.TIFF")
    dataset = read_folder(tmp_path)
    assert dataset.classes == ("Tasse", "茶碗")
    assert set(dataset.ids) == {"Tasse/blå 🍵.JPG", "茶碗/写真.PnG", "Tasse/é.TIFF"}
    assert all(dataset.image(i).shape == (2, 3, 3) for i in range(3))


def test_the_summary_counts_samples_and_names_what_was_left_out(tmp_path):
    add(tmp_path, *(f"cup/{i}.png" for i in range(5)), "plate/p.png")
    add(tmp_path, "loose.png", "cup/.hidden.png", ".cache/unseen.png", "cup/.thumbs/unseen.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    for name in ("notes/a.txt", "cup/b.txt", "cup/c.txt", "d.csv"):
        (tmp_path / name).write_text("no photo")
    assert read_folder(tmp_path, name="kitchen").summary().splitlines() == [
        "kitchen: 6 images, 2 classes",
        "  cup: 5",
        f"    {tmp_path}/cup/0.png",
        f"    {tmp_path}/cup/1.png",
        f"    {tmp_path}/cup/2.png",
        "  plate: 1",
        f"    {tmp_path}/plate/p.png",
        "class folders without images: 2 (empty, notes)",
        "images outside any class folder, skipped: 1 (loose.png)",
        "files that are no images, skipped: 4 (d.csv, cup/b.txt, cup/c.txt, ...)",
        "hidden files, skipped: 1 (cup/.hidden.png)",
    ]


def test_a_tidy_folder_has_no_notes(tmp_path):
    assert read_folder(add(tmp_path, "a/1.png", "b/1.png")).notes == ()


def test_links_are_followed_and_a_loop_ends(tmp_path):
    add(tmp_path / "elsewhere", "x.png", "y.png")
    root = add(tmp_path / "photos", "a/1.png")
    (root / "b").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "a" / "loop").symlink_to(root, target_is_directory=True)
    (root / "a" / "self").symlink_to(root / "a", target_is_directory=True)
    assert read_folder(root).ids.tolist() == ["a/1.png", "b/x.png", "b/y.png"]


def test_a_broken_link_is_found_by_scan(tmp_path):
    add(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DatasetError, match=r"1 of 3 images cannot be decoded(?s:.*)gone\.png"):
        scan(read_folder(tmp_path))


@pytest.mark.parametrize("broken", [b"a/caf\xe9.png", b"caf\xe9/1.png", b"caf\xe9.png"])
def test_names_that_are_not_utf8_are_skipped_and_counted(tmp_path, broken):
    add(tmp_path, "a/1.png", "b/1.png")
    path = tmp_path / os.fsdecode(broken)
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((tmp_path / "a/1.png").read_bytes())
    except (OSError, UnicodeError) as error:
        pytest.skip(f"this file system takes only UTF-8 names: {error}")
    dataset = read_folder(tmp_path)
    assert dataset.ids.tolist() == ["a/1.png", "b/1.png"]
    shown = broken.decode(errors="surrogateescape").replace("\udce9", r"\udce9")
    assert f"names that are not UTF-8, skipped: 1 ({shown})" in dataset.notes
    dataset.summary().encode()


def test_images_come_in_the_order_of_their_paths(tmp_path):
    """A folder stands where its name with "/" does: after "a b" and "a-", before "a.png" and "a0"."""
    names = ["a/x.png", "a/b/y.png", "a/b-/y.png", "a/b.png", "a/b0.png", "a/b!.png", "a-/x.png", "a.b/x.png"]
    names += ["a0/x.png", "a b/x.png", "A/é/x.png", "A/e/x.png", "A/z.png", "a/b/b/b/x.png"]
    dataset = read_folder(add(tmp_path, *names))
    assert dataset.ids.tolist() == sorted(names)
    assert [dataset.classes[label] for label in dataset.labels] == [i.split("/")[0] for i in sorted(names)]


def test_images_outside_class_folders_lie_among_them(tmp_path):
    """Loose images stand before, between and after the classes."""
    listing = list_images(add(tmp_path, "0.png", "a/1.png", "a/2.png", "b.png", "c/3.png", "d.png", "e.png"))
    assert listing.runs == [("", 1), ("a", 2), ("", 1), ("c", 1), ("", 2)]
    dataset = read_folder(tmp_path)
    assert dataset.ids.tolist() == ["a/1.png", "a/2.png", "c/3.png"]
    assert dataset.labels.tolist() == [0, 0, 1]
    assert dataset.notes == ("images outside any class folder, skipped: 4 (0.png, b.png, d.png, ...)",)


def test_many_blocks_of_names_are_one_array(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "BLOCK_SIZE", 3)
    names = [f"{name}/{i:02}.png" for name in "abc" for i in range(7)]
    assert read_folder(add(tmp_path, *names)).ids.tolist() == names


READ_AS_NOBODY = """
import os, sys
from jaxcls.commands.base import expand
from jaxcls.data.folder import read_folder
from jaxcls.errors import DatasetError
from pathlib import Path
print(len(read_folder(sys.argv[1])))  # loads what nobody may not
if os.getuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
root = Path(sys.argv[1])
print(*read_folder(root).ids)
print(read_folder(root).summary())
for read in (expand, lambda paths: read_folder(paths[0] / "cup")):
    try:
        read([root])
    except DatasetError as error:
        print(error)
"""


@pytest.fixture
def open_folder():
    """A new folder that every user may read; folders in it may be locked."""
    with tempfile.TemporaryDirectory() as root:
        Path(root).chmod(0o755)
        yield Path(root)
        for locked in Path(root).rglob("locked"):
            locked.chmod(0o755)


def test_folders_that_cannot_be_read_are_named_and_scoring_them_is_refused(open_folder):
    root = open_folder
    add(root, "bowl/1.png", "cup/1.png", "cup/locked/2.png", "plate/locked/3.png")
    for locked in root.rglob("locked"):
        locked.chmod(0)
    command = [sys.executable, "-c", READ_AS_NOBODY, str(root)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert lines[1] == "bowl/1.png cup/1.png"
    named = "2 (cup/locked: Permission denied, plate/locked: Permission denied)"
    assert f"folders that cannot be read, skipped: {named}" in lines
    assert "class folders without images: 1 (plate)" in lines
    assert lines[-2] == f"{root}: folders that cannot be read: {named}: make them readable"
    assert lines[-1].startswith(
        f"{root}/cup: no images in class folders; 1 lie in {root}/cup itself; folders"
    )


def test_a_folder_that_cannot_be_read_at_all_is_an_error(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DatasetError, match=f"{re.escape(str(tmp_path))}: Permission denied: make the folder"):
        read_folder(tmp_path)


def test_links_in_a_circle_and_second_ways_to_a_folder_are_named(tmp_path):
    root = add(tmp_path, "a/1.png", "b/1.png", "b/deep/2.png")
    (root / "b" / "deep" / "up").symlink_to(root / "b", target_is_directory=True)
    (root / "b" / "self.png").symlink_to("self.png")
    (root / "b" / "other").symlink_to(root / "a", target_is_directory=True)
    dataset = read_folder(root)
    assert dataset.ids.tolist() == ["a/1.png", "b/1.png", "b/deep/2.png"]
    assert dataset.notes == (
        "links in a circle, skipped: 2 (b/self.png, b/deep/up)",
        "folders met again under another name, skipped: 1 (b/other)",
    )


def test_a_link_that_is_added_later_renames_nothing(tmp_path):
    root = add(tmp_path / "photos", "bee/1.png", "zebra/2.png", "zebra/deep/3.png", ".new/4.png")
    before = read_folder(root).ids.tolist()
    (root / "ant").symlink_to("zebra")
    (root / "bee" / "a").symlink_to(root / "zebra" / "deep")
    (root / "bee" / "up").symlink_to(root)
    (root / "aside").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "back").symlink_to(root / "zebra")
    (tmp_path / "photos again").symlink_to(root)
    for way in (root, tmp_path / "photos again"):
        dataset = read_folder(way)
        assert dataset.ids.tolist() == before
        assert dataset.classes == ("bee", "zebra")
        assert "folders met again under another name, skipped: 3 (ant, aside/back, bee/a)" in dataset.notes
        assert "links in a circle, skipped: 1 (bee/up)" in dataset.notes
    (root / "cow").symlink_to(".new")
    assert read_folder(root).ids.tolist() == ["bee/1.png", "cow/4.png", *before[1:]]


def test_empty_files_are_named_and_left_to_the_scan(tmp_path):
    add(tmp_path, "a/1.png", "b/1.png")
    for name in ("a/0.png", "b/2.jpg", "b/empty.txt"):
        (tmp_path / name).touch()
    dataset = read_folder(tmp_path)
    assert len(dataset) == 4
    assert "images of 0 bytes: 2 (a/0.png, b/2.jpg)" in dataset.notes
    with pytest.raises(DatasetError, match="2 of 4 images cannot be decoded"):
        scan(dataset)


def test_names_that_differ_only_by_case_or_unicode_form_are_named(tmp_path):
    composed, decomposed = "caf\u00e9.png", "cafe\u0301.png"
    names = (
        "a/X.png",
        "a/x.png",
        "a/x.PNG",
        "a/y.png",
        f"b/{composed}",
        f"b/{decomposed}",
        "B/z.png",
        "a/ss",
        "a/ß",
    )
    add(tmp_path, *(name if "." in name else f"{name}/1.png" for name in names))
    if len(list(tmp_path.glob("*/*"))) < len(names):
        pytest.skip("this file system takes such names for one")
    (note,) = read_folder(tmp_path).notes
    assert note == (
        "names that differ only by case or Unicode form: 4 "
        "(B = b, a/X.png = x.PNG = x.png, a/ss = \\xdf, ...)"
    )
    (tmp_path / "a" / "X.png").unlink()
    (tmp_path / "a" / "x.PNG").unlink()
    shutil.rmtree(tmp_path / "B")
    assert read_folder(tmp_path).notes == (
        "names that differ only by case or Unicode form: 2 (a/ss = \\xdf, b/cafe\\u0301.png = caf\\xe9.png)",
    )


@pytest.mark.slow
def test_a_very_deep_folder_is_read(tmp_path):
    add(tmp_path, "a/1.png", "b/1.png")
    below = [tmp_path / "a" / "/".join("d" * depth) for depth in range(1, 1100)]
    for path in below:
        path.mkdir()
    shutil.copy(tmp_path / "a/1.png", below[-1])
    ids = read_folder(tmp_path).ids
    (below[-1] / "1.png").unlink()
    for path in below[::-1]:  # pytest would not manage
        path.rmdir()
    assert len(ids) == 3
    assert len(below) > sys.getrecursionlimit()


MEASURE = """
import sys
from pathlib import Path
from jaxcls.data.folder import read_folder
peak = lambda: 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
read_folder(sys.argv[1] + "/few")  # loads what it takes
before = peak()
dataset = read_folder(sys.argv[1] + "/many")
print(len(dataset), peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak memory is read there")
def test_many_files_need_little_memory(tmp_path):
    """A name of 125 bytes takes 145 in an array, but 190 as an object of Python's, and more in lists."""
    (tmp_path / "seed").write_bytes(b"x")
    for part, number in (("few", 2), ("many", 5000)):
        for name in range(10):
            folder = tmp_path / part / f"{name:020}"
            folder.mkdir(parents=True)
            for photo in range(number):
                os.link(tmp_path / "seed", folder / f"{photo:0100}.jpg")
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    number, grown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert int(number) == 50_000
    assert int(grown) < 450 * 50_000  # 620 bytes each where all names are objects first


def test_what_is_no_folder_of_class_folders_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="nowhere does not exist: give a folder with one sub-folder"):
        read_folder(tmp_path / "nowhere")
    add(tmp_path, "photo.png")
    with pytest.raises(DatasetError, match=r"photo\.png is a file: give a folder"):
        read_folder(tmp_path / "photo.png")
    with pytest.raises(
        DatasetError, match=f"no images in class folders; 1 lie in {re.escape(str(tmp_path))}"
    ):
        read_folder(tmp_path)
    (tmp_path / "photo.png").unlink()
    with pytest.raises(DatasetError, match=r"no images in class folders\. Put them"):
        read_folder(tmp_path)
    add(tmp_path, "cup/1.png")
    with pytest.raises(DatasetError, match="only one class, 'cup': a classifier needs at least two"):
        read_folder(tmp_path)


def test_given_classes_set_the_labels(tmp_path):
    add(tmp_path, "cup/1.png", "plate/1.png")
    dataset = read_folder(tmp_path, classes=["plate", "bowl", "cup"])
    assert dataset.classes == ("plate", "bowl", "cup")
    assert dict(zip(dataset.ids, dataset.labels.tolist(), strict=True)) == {"cup/1.png": 2, "plate/1.png": 0}
    assert len(read_folder(add(tmp_path / "one", "cup/1.png"), classes=["cup"])) == 1
    add(tmp_path / "two", "cup/1.png", "plate/1.png")
    with pytest.raises(DatasetError, match="class plate is not among the expected cup, bowl: rename"):
        read_folder(tmp_path / "two", classes=["cup", "bowl"])


def test_a_text_file_with_an_image_suffix_is_named_by_scan(tmp_path):
    add(tmp_path, "a/1.png", "b/1.png", "b/2.png")
    (tmp_path / "a" / "letter.jpg").write_text("Dear reader")
    (tmp_path / "a" / "empty.png").touch()
    dataset = read_folder(tmp_path)
    with pytest.raises(DatasetError) as caught:
        scan(dataset)
    message = str(caught.value)
    assert message.startswith("2 of 5 images cannot be decoded; mend or remove them")
    assert f"{tmp_path}/a/letter.jpg: not an image in a known format" in message
    assert f"{tmp_path}/a/empty.png: the file is empty" in message
    kept = scan(dataset, max_bad_fraction=0.4)
    assert kept.ids.tolist() == ["a/1.png", "b/1.png", "b/2.png"]
    assert "2 undecodable images left out:" in kept.summary()
    assert "letter.jpg: not an image" in kept.summary()


def test_scan_keeps_what_the_reader_noted(tmp_path):
    add(tmp_path, "a/1.png", "b/1.png", "loose.png")
    (tmp_path / "a" / "bad.jpg").write_text("no photo")
    notes = scan(read_folder(tmp_path), max_bad_fraction=0.5).notes
    assert [note.split(":")[0] for note in notes[:2]] == [
        "images outside any class folder, skipped",
        "1 undecodable images left out",
    ]


def test_list_images_sorts_files_by_kind(tmp_path):
    add(tmp_path, "z.png", "b/y.gif", "b/a/x.webp", ".h.png")
    (tmp_path / "b" / "t.txt").touch()
    listing = list_images(tmp_path)
    assert sorted(listing.images) == ["b/a/x.webp", "b/y.gif", "z.png"]
    assert (listing.hidden.first, listing.other.first, listing.not_utf8) == ([".h.png"], ["b/t.txt"], [])


def test_the_tableware_photos(shared):
    dataset = read_folder(shared / "data" / "tableware")
    assert dataset.classes == ("bowl", "cup", "cutlery", "plate")
    assert dataset.class_counts().tolist() == [5, 19, 7, 32]
    assert dataset.image(0).shape == (480, 640, 3)

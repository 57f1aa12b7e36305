"""Folders of photos: what is read, what is left out, and what the summary tells of it."""

import os
import re

import numpy as np
import pytest
from PIL import Image

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


def test_one_folder_that_cannot_be_read_stops_the_reading(tmp_path, monkeypatch):
    """The superuser may read everything, so the refusal is played."""
    add(tmp_path, "a/1.png", "b/1.png", "b/locked/2.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DatasetError, match=r"b/locked: Permission denied: make the folder readable"):
        read_folder(tmp_path)


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
    assert (listing.hidden, listing.other, listing.not_utf8) == ([".h.png"], ["b/t.txt"], [])


def test_the_tableware_photos(shared):
    dataset = read_folder(shared / "data" / "tableware")
    assert dataset.classes == ("bowl", "cup", "cutlery", "plate")
    assert dataset.class_counts().tolist() == [5, 19, 7, 32]
    assert dataset.image(0).shape == (480, 640, 3)

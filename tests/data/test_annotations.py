import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import write_photos

from jaxcls.data.annotations import (
    JOURNAL,
    NO_LABEL,
    TRASH,
    Annotations,
    Change,
    ConflictError,
    list_photos,
    read_annotated,
)
from jaxcls.errors import DatasetError, ImageError, UsageError


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_photos(tmp_path / "photos", {"blue": 3, "red": 3})


def relabel(annotations: Annotations, photo: str, label: str):
    return annotations.edit([Change(photo, annotations.label(photo), label)])


def journal(folder: Path) -> list[dict]:
    """Its whole lines."""
    text = (folder / JOURNAL).read_text("utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def test_edits_are_there_again_and_nothing_is_written_before_the_first(folder):
    annotations = Annotations(folder)
    assert not (folder / ".jaxcls").exists()
    relabel(annotations, "blue/0.png", "red")
    relabel(annotations, "blue/1.png", "grüne Schüssel")
    relabel(annotations, "red/0.png", TRASH)
    relabel(annotations, "red/1.png", NO_LABEL)
    photos = read_annotated(folder)
    assert dict(zip(photos.ids, photos.labels.tolist(), strict=True)) == {
        "blue/0.png": 2, "blue/1.png": 1, "blue/2.png": 0, "red/1.png": -1, "red/2.png": 2,
    }  # fmt: skip
    assert photos.classes == ("blue", "grüne Schüssel", "red")
    np.testing.assert_array_equal(photos.image(0).shape, (40, 48, 3))


def test_photos_that_are_added_later_change_nothing_for_the_others(folder):
    relabel(Annotations(folder), "red/0.png", "blue")
    write_photos(folder, {"green": 2, "blue": 5}, seed=1)
    annotations = Annotations(folder)
    assert annotations.label("red/0.png") == "blue"
    assert annotations.label("blue/4.png") == "blue"
    assert len(list_photos(folder).ids) == 10


def test_photos_in_the_folder_itself_and_in_unlabelled_folders_have_no_label(folder):
    (folder / "red/0.png").rename(folder / "loose.png")
    annotations = Annotations(folder, unlabelled=["red"])
    assert annotations.labels(["loose.png", "red/1.png", "blue/0.png"]) == [NO_LABEL, NO_LABEL, "blue"]
    with pytest.raises(UsageError, match="'inbox' is no sub-folder"):
        Annotations(folder, unlabelled=["inbox"])


def test_undo_and_redo(folder):
    annotations = Annotations(folder)
    first = relabel(annotations, "blue/0.png", "red")
    second = annotations.edit([Change("blue/0.png", "red", TRASH), Change("blue/1.png", "blue", TRASH)])
    assert annotations.undo(second.seq).changes == (
        Change("blue/0.png", TRASH, "red"), Change("blue/1.png", TRASH, "blue"),
    )  # fmt: skip
    annotations = Annotations(folder)
    assert annotations.labels(["blue/0.png", "blue/1.png"]) == ["red", "blue"]
    annotations.undo(first.seq)
    assert annotations.label("blue/0.png") == "blue"
    annotations.redo(annotations.redoable[-1].seq)
    annotations.redo(annotations.redoable[-1].seq)
    assert annotations.labels(["blue/0.png", "blue/1.png"]) == [TRASH, TRASH]
    annotations.undo(annotations.undoable[-1].seq)
    relabel(annotations, "red/0.png", "blue")
    assert not annotations.redoable
    assert Annotations(folder).labels(["blue/0.png", "blue/1.png", "red/0.png"]) == ["red", "blue", "blue"]


def test_an_edit_against_a_label_that_has_changed_is_refused_whole(folder):
    one, other = Annotations(folder), Annotations(folder)
    one.edit([Change("blue/0.png", "blue", "red")])
    size = (folder / JOURNAL).stat().st_size
    with pytest.raises(ConflictError, match=r"meanwhile: 'blue/0.png': look") as caught:
        other.edit([Change("blue/1.png", "blue", TRASH), Change("blue/0.png", "blue", TRASH)])
    assert caught.value.present == {"blue/0.png": "red"}
    assert (folder / JOURNAL).stat().st_size == size
    assert other.label("blue/0.png") == "red"  # it knows by now
    other.edit([Change("blue/0.png", "red", TRASH)])
    one.refresh()
    assert one.label("blue/0.png") == TRASH
    with pytest.raises(UsageError, match="nothing more to undo, or it was changed"):
        one.undo(1)
    with pytest.raises(ConflictError) as caught:
        one.edit([Change("blue/gone.png", "blue", "red")])
    assert caught.value.present == {"blue/gone.png": None}


EDIT_ON = """
import sys
from jaxcls.data.annotations import Annotations, Change
annotations = Annotations(sys.argv[1])
print(flush=True)
sys.stdin.readline()
while True:
    before = annotations.label(sys.argv[2])
    annotations.edit([Change(sys.argv[2], before, "red" if before == "blue" else "blue")])
    print(annotations.seq, flush=True)
"""


def start_editing(folder: Path, photo: str) -> subprocess.Popen:
    arguments = [sys.executable, "-c", EDIT_ON, str(folder), photo]
    writer = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    writer.stdout.readline()
    return writer


def test_two_processes_that_are_killed_lose_no_edit_that_they_were_told_holds(folder):
    writers = [start_editing(folder, photo) for photo in ("blue/0.png", "blue/1.png")]
    for writer in writers:
        print(file=writer.stdin, flush=True)
    told = [int(writer.stdout.readline()) for _ in range(40) for writer in writers]
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
        told += [int(line) for line in writer.communicate()[0].splitlines() if line]
    assert len(set(told)) == len(told)
    annotations = Annotations(folder)
    entries = journal(folder)[1:]
    assert [entry["seq"] for entry in entries] == list(range(1, annotations.seq + 1))
    assert annotations.seq >= max(told)
    for photo in ("blue/0.png", "blue/1.png"):  # each edit was made against the one before
        changes = [entry["changes"][0] for entry in entries if entry["changes"][0][0] == photo]
        assert [before for _, before, _ in changes] == ["blue", *(after for *_, after in changes[:-1])]
        assert annotations.label(photo) == changes[-1][2]


def test_a_line_that_was_cut_short_never_held_and_is_cut_off(folder):
    annotations = Annotations(folder)
    relabel(annotations, "blue/0.png", "red")
    first = (folder / JOURNAL).read_bytes()
    relabel(annotations, "blue/1.png", "rot und grün")
    both = (folder / JOURNAL).read_bytes()
    for end in range(len(both)):
        (folder / JOURNAL).write_bytes(both[:end])
        again = Annotations(folder)
        is_whole = end >= len(first)
        assert again.labels(["blue/0.png", "blue/1.png"]) == ["red" if is_whole else "blue", "blue"]
        relabel(again, "red/0.png", TRASH)
        assert Annotations(folder).label("red/0.png") == TRASH
        assert [entry.get("seq", 0) for entry in journal(folder)] == list(range(3 if is_whole else 2))


def test_zeros_that_a_power_cut_left_are_cut_off(folder):
    annotations = Annotations(folder)
    relabel(annotations, "blue/0.png", "red")
    with (folder / JOURNAL).open("ab") as file:
        file.write(bytes(100))
    relabel(Annotations(folder), "blue/1.png", "red")
    assert Annotations(folder).labels(["blue/0.png", "blue/1.png"]) == ["red", "red"]


@pytest.mark.parametrize(
    "line",
    [
        "", "{", "[]", "7", '{"seq": 1}', '{"seq": 3, "kind": "edit", "changes": []}',
        '{"seq": 2, "kind": "undo", "of": 7}',
        '{"seq": 2, "kind": "edit", "changes": [["../x.png", "blue", "red"]]}',
        '{"seq": 2, "kind": "edit", "changes": [["/etc/passwd", "blue", "red"]]}',
        '{"seq": 2, "kind": "edit", "changes": [["blue/1.png", "blue", "../.."]]}',
        '{"seq": 2, "kind": "edit", "changes": [["blue/1.png", "blue", 3]]}',
        '{"seq": 2, "kind": "move", "of": null, "moves": [["blue/1.png", "../1.png"]]}',
        '{"seq": 2, "kind": "moved", "of": 1, "moves": []}',
        '{"seq": 2, "kind": "erase"}',
        "[" * 100_000,
    ],
)  # fmt: skip
def test_a_damaged_journal_is_named_and_left_alone(folder, line):
    relabel(Annotations(folder), "blue/0.png", "red")
    with (folder / JOURNAL).open("a") as file:
        print(line, file=file)
    before = (folder / JOURNAL).read_bytes()
    with pytest.raises(DatasetError, match=r"annotations.jsonl is damaged after entry 1, byte \d+: mend"):
        Annotations(folder)
    assert (folder / JOURNAL).read_bytes() == before


def test_a_journal_of_another_format_is_refused(folder):
    relabel(Annotations(folder), "blue/0.png", "red")
    (folder / JOURNAL).write_text('{"format": "jaxcls-annotations", "version": 2}\n')
    with pytest.raises(DatasetError, match="damaged after entry 0"):
        Annotations(folder)


@pytest.mark.parametrize("label", ["", "a/b", "..", ".hidden", "x" * 256, "nul\0", "\ud800", "/other"])
def test_labels_that_could_not_be_folders_are_refused(folder, label):
    with pytest.raises(UsageError, match="cannot be a class"):
        Annotations(folder).edit([Change("blue/0.png", "blue", label)])
    assert not (folder / JOURNAL).exists()


@pytest.mark.parametrize(
    "photo", ["../secret.png", "/etc/passwd", "blue/../../secret.png", "blue//0.png", ""]
)
def test_paths_that_lead_out_are_refused(folder, photo):
    (folder.parent / "secret.png").write_bytes((folder / "blue/0.png").read_bytes())
    with pytest.raises(UsageError, match="no path of a photo"):
        Annotations(folder).edit([Change(photo, "blue", "red")])
    with pytest.raises(ImageError):
        Annotations(folder).tree.read_image(photo)


def test_links_are_not_followed(folder):
    outside = write_photos(folder.parent / "outside", {"blue": 1})
    (folder / "green").symlink_to(outside / "blue")
    (folder / "blue/link.png").symlink_to(outside / "blue/0.png")
    annotations, photos = Annotations(folder), list_photos(folder)
    assert photos.notes == ("images behind links, which may lead elsewhere, left out: 2",)
    assert [photo for photo in photos.ids if "link" in photo or "green" in photo] == []
    for photo in ("green/0.png", "blue/link.png"):
        with pytest.raises(ImageError, match="cannot be read"):
            annotations.tree.read_image(photo)
    with pytest.raises(ConflictError):
        annotations.edit([Change("green/0.png", "green", "blue")])


def test_the_folder_itself_may_be_a_link(folder):
    (folder / "loose.png").symlink_to(folder / "blue/0.png")
    (folder / "own.png").write_bytes((folder / "blue/0.png").read_bytes())
    (folder.parent / "link").symlink_to(folder)
    photos = list_photos(folder.parent / "link")
    assert (len(photos.ids), len(photos.notes)) == (7, 1)
    relabel(Annotations(folder.parent / "link"), "own.png", "red")
    assert len(read_annotated(folder).image(6)) == 40


def test_the_journal_is_not_written_through_a_link(folder):
    outside = folder.parent / "outside"
    outside.mkdir()
    (folder / ".jaxcls").symlink_to(outside)
    with pytest.raises(DatasetError, match="cannot be"):
        relabel(Annotations(folder), "blue/0.png", "red")
    assert list(outside.iterdir()) == []


def test_an_edit_that_finds_no_room_does_not_hold(folder, monkeypatch):
    annotations = Annotations(folder)
    relabel(annotations, "blue/0.png", "red")
    before = (folder / JOURNAL).read_bytes()
    pwrite = os.pwrite

    def write_half(file, data, start):
        if len(data) > 40:
            return pwrite(file, data[:40], start)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", write_half)
        with pytest.raises(DatasetError, match="No space left on device: the edit does not hold"):
            relabel(annotations, "blue/1.png", "red")
    assert (folder / JOURNAL).read_bytes() == before
    assert annotations.label("blue/1.png") == "blue"
    relabel(annotations, "blue/1.png", "red")
    assert Annotations(folder).label("blue/1.png") == "red"


def test_only_errors_of_the_journal_are_said_to_be_of_it(folder):
    annotations = Annotations(folder)
    with pytest.raises(FileNotFoundError), annotations.exclusive():
        raise FileNotFoundError(2, "not the journal")
    relabel(annotations, "blue/0.png", "red")


def test_what_is_seen_is_of_one_moment(folder):
    annotations = Annotations(folder)
    ids = ["blue/0.png", "red/0.png"]
    done = threading.Event()

    def edit() -> None:
        for number in range(40):
            edit = annotations.edit([Change(photo, annotations.label(photo), f"n{number}") for photo in ids])
            assert edit.seq == number + 1
        done.set()

    writer = threading.Thread(target=edit)
    writer.start()
    while not done.is_set():
        view = annotations.view(ids)
        expected = ["blue", "red"] if view.seq == 0 else [f"n{view.seq - 1}"] * 2
        assert (view.labels, view.folders) == (expected, ["blue", "red"])
        assert (view.undoable, view.redoable) == (view.seq or None, None)
    writer.join()

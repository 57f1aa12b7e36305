import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import write_photos

from jaxcls.data.annotations import (
    NO_LABEL,
    TRASH,
    Annotations,
    Change,
    Move,
    UnfinishedError,
    list_photos,
    read_annotated,
)
from jaxcls.data.beneath import Tree
from jaxcls.data.folder import read_folder
from jaxcls.data.moves import apply_moves, finish_moves, plan_moves, plan_return, return_moves
from jaxcls.errors import DatasetError


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_photos(tmp_path / "photos", {"blue": 4, "red": 4})


def relabel(folder: Path, labels: dict[str, str]) -> Annotations:
    annotations = Annotations(folder)
    annotations.edit([Change(photo, annotations.label(photo), label) for photo, label in labels.items()])
    return annotations


def contents(folder: Path) -> dict[str, str]:
    """Path -> checksum, of all files but the journal."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".jsonl"]
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


def plan(annotations: Annotations) -> tuple[Move, ...]:
    return plan_moves(annotations, list_photos(annotations.tree.root).ids)


def apply(annotations: Annotations):
    return apply_moves(annotations, list_photos(annotations.tree.root).ids)


EDITS = {
    "blue/0.png": "red",  # where there is a 0.png
    "blue/1.png": "green",
    "red/1.png": TRASH,
    "red/2.png": NO_LABEL,
    "red/3.png": "blue",
}
MOVES = (
    Move("blue/0.png", "red/0-2.png"),
    Move("blue/1.png", "green/1.png"),
    Move("red/1.png", ".jaxcls/trash/red/1.png"),
    Move("red/2.png", "2.png"),
    Move("red/3.png", "blue/3-2.png"),
)


def test_the_plan_is_what_is_done_and_what_is_done_can_be_taken_back(folder):
    before = contents(folder)
    annotations = relabel(folder, EDITS)
    assert plan(annotations) == MOVES
    assert contents(folder) == before
    expected = dict(before)
    for move in MOVES:
        expected[move.target] = expected.pop(move.source)
    labels = dict(zip(read_annotated(folder).ids, read_annotated(folder).labels.tolist(), strict=True))
    outcome = apply(annotations)
    assert (outcome.moves, outcome.problems) == (MOVES, ())
    assert contents(folder) == expected
    assert plan(annotations) == ()
    photos = read_annotated(folder)
    renamed = {move.source: move.target for move in MOVES}
    assert {renamed.get(photo, photo): label for photo, label in labels.items()} == dict(
        zip(photos.ids, photos.labels.tolist(), strict=True)
    )
    assert read_folder(folder).classes == ("blue", "green", "red")
    assert plan_return(annotations) == tuple(move.reversed() for move in MOVES[::-1])
    assert len(return_moves(Annotations(folder)).moves) == 5
    assert contents(folder) == before
    assert plan(Annotations(folder)) == MOVES  # the labels stay
    assert return_moves(Annotations(folder)).moves == ()


def test_edits_are_undone_after_their_photos_were_moved(folder):
    annotations = relabel(folder, {"blue/1.png": "red", "red/2.png": TRASH})
    apply(annotations)
    annotations = Annotations(folder)
    annotations.undo(annotations.undoable[-1].seq)
    assert plan(annotations) == (
        Move("red/1-2.png", "blue/1-2.png"), Move(".jaxcls/trash/red/2.png", "red/2.png"),
    )  # fmt: skip
    apply(annotations)
    assert [len(read_annotated(folder)), len(plan(annotations))] == [8, 0]
    return_moves(annotations)
    return_moves(annotations)
    assert annotations.applied == []
    assert sorted(read_folder(folder).ids) == sorted(
        f"{name}/{number}.png" for name in ("blue", "red") for number in range(4)
    )


def test_sub_folders_stay_below_the_new_class(folder):
    (folder / "blue/2019/may").mkdir(parents=True)
    (folder / "blue/0.png").rename(folder / "blue/2019/may/0.png")
    annotations = relabel(folder, {"blue/2019/may/0.png": "red"})
    apply(annotations)
    assert (folder / "red/2019/may/0.png").is_file()


def test_photos_without_label_go_into_the_folder_of_such(folder):
    (folder / "inbox").mkdir()
    annotations = Annotations(folder, unlabelled=["inbox"])
    annotations.edit([Change("blue/0.png", "blue", NO_LABEL)])
    assert plan(annotations) == (Move("blue/0.png", "inbox/0.png"),)


def test_a_file_that_comes_to_the_place_meanwhile_is_not_overwritten(folder, monkeypatch):
    annotations = relabel(folder, {"blue/0.png": "green", "blue/1.png": "green"})
    link = Tree.link

    def link_late(tree, source, target):
        if target == "green/0.png":
            (folder / "green").mkdir()
            (folder / "green/0.png").write_bytes(b"somebody else's")
        link(tree, source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Tree, "link", link_late)
        outcome = apply(annotations)
    assert outcome.moves == (Move("blue/1.png", "green/1.png"),)
    assert outcome.problems == ("blue/0.png -> green/0.png: another file has come there: plan anew",)
    assert (folder / "green/0.png").read_bytes() == b"somebody else's"
    assert (folder / "blue/0.png").is_file()
    assert plan(annotations) == (Move("blue/0.png", "green/0-2.png"),)


def test_a_file_that_comes_while_a_batch_is_interrupted_is_not_taken_for_the_photo(folder, monkeypatch):
    annotations = relabel(folder, {"blue/0.png": "green", "blue/1.png": "green"})
    photo = (folder / "blue/0.png").read_bytes()

    def interrupt(tree, source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tree, "link", interrupt)
        with pytest.raises(KeyboardInterrupt):
            apply(annotations)
    (folder / "green").mkdir()
    (folder / "green/0.png").write_bytes(b"somebody else's")
    outcome = finish_moves(Annotations(folder))
    assert outcome.problems == ("blue/0.png -> green/0.png: another file has come there: plan anew",)
    assert outcome.moves == (Move("blue/1.png", "green/1.png"),)
    assert (folder / "green/0.png").read_bytes() == b"somebody else's"
    assert (folder / "blue/0.png").read_bytes() == photo


def test_photos_that_went_meanwhile_are_told_of_and_the_others_moved(folder):
    annotations = relabel(folder, {"blue/0.png": "red", "blue/1.png": "red"})
    ids = list_photos(folder).ids
    (folder / "blue/0.png").unlink()
    outcome = apply_moves(annotations, ids)
    assert outcome.problems == ("blue/0.png -> red/0-2.png: is not there any more",)
    assert outcome.moves == (Move("blue/1.png", "red/1-2.png"),)


def test_nothing_is_moved_through_a_link(folder):
    outside = folder.parent / "outside"
    outside.mkdir()
    annotations = relabel(folder, {"blue/0.png": "green", "blue/1.png": "red"})
    (folder / "green").symlink_to(outside)
    before = contents(folder)["blue/0.png"]
    outcome = apply(annotations)
    assert outcome.moves == (Move("blue/1.png", "red/1-2.png"),)
    assert len(outcome.problems) == 1
    assert list(outside.iterdir()) == []
    assert contents(folder)["blue/0.png"] == before


@pytest.mark.parametrize("step", range(13))
def test_a_batch_that_was_interrupted_is_finished(folder, monkeypatch, step):
    """At every link, removal and entry in turn."""
    before = contents(folder)
    annotations = relabel(folder, EDITS)
    calls = iter(range(1000))

    def interrupted(method):
        def run(*arguments, **options):
            if next(calls) == step:
                raise KeyboardInterrupt
            return method(*arguments, **options)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(Tree, "link", interrupted(Tree.link))
        patch.setattr(Tree, "remove", interrupted(Tree.remove))
        patch.setattr(Annotations, "append", interrupted(Annotations.append))
        if step < 12:
            with pytest.raises(KeyboardInterrupt):
                apply(annotations)
        else:
            apply(annotations)
    assert set(before.values()) == set(contents(folder).values())
    again = Annotations(folder)
    assert (again.unfinished is not None) == (0 < step < 12)
    if again.unfinished:
        with pytest.raises(DatasetError, match="interrupted: start `jaxcls annotate` again"):
            apply(again)
        assert finish_moves(again).moves == MOVES
    else:
        apply(again)
    expected = dict(before)
    for move in MOVES:
        expected[move.target] = expected.pop(move.source)
    assert contents(folder) == expected
    return_moves(Annotations(folder))
    assert contents(folder) == before


def test_nothing_is_edited_while_moves_are_interrupted(folder, monkeypatch):
    """Finishing them would lose it: the labels given to what lay at the new paths are out of date then."""
    first = relabel(folder, {"blue/1.png": TRASH}).undoable[-1]
    annotations = relabel(folder, {"blue/0.png": "green"})

    def interrupt(tree, path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tree, "remove", interrupt)
        with pytest.raises(KeyboardInterrupt):
            apply(annotations)
    again = Annotations(folder)
    for act in (
        lambda: again.edit([Change("green/0.png", "green", "red")]),
        lambda: again.undo(again.undoable[-1].seq),
        lambda: again.redo(first.seq),
    ):
        with pytest.raises(UnfinishedError, match="interrupted: start `jaxcls annotate` again"):
            act()
    finish_moves(again)
    again.edit([Change("green/0.png", "green", "red")])
    assert Annotations(folder).label("green/0.png") == "red"


@pytest.mark.parametrize("method", ["remove", "settle"])
def test_a_move_that_cannot_be_completed_is_told_of_and_the_others_made(folder, monkeypatch, method):
    before = contents(folder)
    annotations = relabel(folder, {"blue/0.png": "green", "blue/1.png": "new"})
    works = getattr(Tree, method)

    def fail_once(tree, paths):
        if paths in ("blue/0.png", ["green/0.png"]):
            raise PermissionError(1, "Operation not permitted")
        works(tree, paths)

    with monkeypatch.context() as patch:
        patch.setattr(Tree, method, fail_once)
        outcome = apply(annotations)
    assert outcome.moves == (Move("blue/1.png", "new/1.png"),)
    assert outcome.problems == ("blue/0.png -> green/0.png: Operation not permitted",)
    expected = dict(before)
    expected["new/1.png"] = expected.pop("blue/1.png")
    assert contents(folder) == expected
    again = Annotations(folder)
    assert again.unfinished is None
    assert plan(again) == (Move("blue/0.png", "green/0.png"),)


def test_a_file_that_replaces_the_photo_meanwhile_is_not_removed(folder, monkeypatch):
    annotations = relabel(folder, {"blue/0.png": "green", "blue/1.png": "green"})
    photo = (folder / "blue/0.png").read_bytes()
    settle = Tree.settle

    def save_anew(tree, paths):
        if paths == ["green/0.png"]:
            (folder / "edited").write_bytes(b"edited")
            (folder / "edited").replace(folder / "blue/0.png")
        settle(tree, paths)

    with monkeypatch.context() as patch:
        patch.setattr(Tree, "settle", save_anew)
        outcome = apply(annotations)
    assert outcome.moves == (Move("blue/1.png", "green/1.png"),)
    assert outcome.problems == (
        "blue/0.png -> green/0.png: another file has come to its old place: look at both",
    )
    assert (folder / "blue/0.png").read_bytes() == b"edited"
    assert (folder / "green/0.png").read_bytes() == photo


def test_a_batch_is_finished_whose_old_folder_was_taken_away(folder, monkeypatch):
    annotations = relabel(folder, {f"blue/{number}.png": "green" for number in range(4)})
    append = Annotations.append

    def interrupt(annotations, entry):
        if entry["kind"] == "moved":
            raise KeyboardInterrupt
        append(annotations, entry)

    with monkeypatch.context() as patch:
        patch.setattr(Annotations, "append", interrupt)
        with pytest.raises(KeyboardInterrupt):
            apply(annotations)
    (folder / "blue").rmdir()
    assert len(finish_moves(Annotations(folder)).moves) == 4


APPLY = """
import sys
from jaxcls.data.annotations import Annotations, list_photos
from jaxcls.data import moves
from jaxcls.data.beneath import Tree
moves.CHUNK = 8
remove = Tree.remove
def told(tree, path):
    remove(tree, path)
    print(path, flush=True)
Tree.remove = told
moves.apply_moves(Annotations(sys.argv[1]), list_photos(sys.argv[1]).ids)
"""


def test_kill_in_the_middle_loses_no_photo(tmp_path):
    folder = write_photos(tmp_path / "photos", {"blue": 60, "red": 1})
    before = contents(folder)
    relabel(folder, {f"blue/{number}.png": "red" for number in range(60)})
    mover = subprocess.Popen([sys.executable, "-c", APPLY, str(folder)], stdout=subprocess.PIPE, text=True)
    for _ in range(21):
        mover.stdout.readline()
    os.kill(mover.pid, signal.SIGKILL)
    mover.communicate()
    assert set(contents(folder).values()) == set(before.values())
    annotations = Annotations(folder)
    assert len(finish_moves(annotations).moves) == 60
    after = contents(folder)
    assert sorted(after.values()) == sorted(before.values())
    assert {path.partition("/")[0] for path in after} == {"red"}
    return_moves(annotations)
    assert contents(folder) == before


def test_any_edits_and_moves_keep_every_photo(tmp_path):
    generator = np.random.default_rng(0)
    folder = write_photos(tmp_path / "photos", {"blue": 6, "red": 6, "green": 6})
    start, photos = contents(folder), sorted(contents(folder).values())
    annotations = Annotations(folder)
    for _ in range(60):
        ids = list_photos(folder).ids
        chosen = generator.choice(ids, generator.integers(1, 5), replace=False).tolist()
        label = ("blue", "red", "green", "new", TRASH, NO_LABEL)[generator.integers(6)]
        annotations.edit([Change(photo, annotations.label(photo), label) for photo in chosen])
        if generator.random() < 0.3:
            annotations.undo(annotations.undoable[-1].seq)
        if generator.random() < 0.3:
            assert not apply(annotations).problems
            now = list_photos(folder).ids
            assert annotations.labels(now) == [annotations.folder_label(photo) for photo in now]
        if generator.random() < 0.1:
            assert not return_moves(annotations).problems
        assert sorted(contents(folder).values()) == photos
        assert Annotations(folder).labels(ids) == annotations.labels(ids)
    while annotations.applied:
        assert not return_moves(annotations).problems
    assert contents(folder) == start

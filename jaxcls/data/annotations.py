"""Edits of labels: an append-only journal beside the photos, from which the present labels are replayed.

The journal is `.jaxcls/annotations.jsonl` below the folder of photos: JSON lines, each of them on the disk
before anybody is told that it holds. A line that a crash cut short never held, and is cut off. The first line
names the format; each further one is numbered and is one of

    {"seq": 1, "kind": "edit", "changes": [["cup/1.jpg", "cup", "bowl"]]}      id, label before, label now
    {"seq": 2, "kind": "undo", "of": 1}      or "redo"
    {"seq": 3, "kind": "move", "moves": [["cup/1.jpg", "bowl/1.jpg"]], "of": null}      what is to be moved
    {"seq": 4, "kind": "moved", "of": 3, "moves": [["cup/1.jpg", "bowl/1.jpg"]]}      what was

Whoever appends holds a lock and has read all that others appended. An edit says which labels it was made
against: where these have changed meanwhile it is refused, so that no two writers overwrite each other.
"""

import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from jaxcls.data.beneath import BeneathSource, Tree, is_name, is_path
from jaxcls.data.dataset import ID_DTYPE, UNLABELLED, Dataset
from jaxcls.data.folder import list_images
from jaxcls.data.images import MAX_PIXELS
from jaxcls.data.lineage import LINEAGE_FILE
from jaxcls.errors import DatasetError, UsageError
from jaxcls.storage import locked

FOLDER = ".jaxcls"
JOURNAL = f"{FOLDER}/annotations.jsonl"
TRASH_FOLDER = f"{FOLDER}/trash"
HEADER = {"format": "jaxcls-annotations", "version": 1}

TRASH, NO_LABEL = "/trash", "/unlabelled"
"""Labels that no class can have, since no folder's name holds "/": to be thrown away, and none yet."""


class ConflictError(DatasetError):
    """An edit made against labels that are no longer the present ones.

    Attributes:
        present: id -> its label now, of the photos that differ; None for one that is not there any more.
    """

    def __init__(self, present: Mapping[str, str | None]) -> None:
        first = next(iter(present), "")
        more = f" and {len(present) - 1} more" if len(present) > 1 else ""
        super().__init__(f"changed meanwhile: {first!r}{more}: look at them again, then edit")
        self.present = dict(present)


class UnfinishedError(DatasetError):
    """What cannot be done before a batch of moves that was interrupted is finished."""


@dataclass(frozen=True)
class Change:
    """The label of one photo: before, and from now on. `TRASH` and `NO_LABEL` are labels too."""

    id: str
    before: str
    after: str


@dataclass(frozen=True)
class Edit:
    """Changes made at once, undone and redone at once.

    Attributes:
        seq: its number in the journal, or that of the "undo" or "redo" which did it again.
        changes: one of each photo.
    """

    seq: int
    changes: tuple[Change, ...]

    def reversed(self) -> "Edit":
        """What undoes it."""
        return replace(self, changes=tuple(Change(c.id, c.after, c.before) for c in self.changes))


@dataclass(frozen=True)
class Move:
    """A photo that goes from one path to another, both relative to the folder of photos."""

    source: str
    target: str

    def reversed(self) -> "Move":
        """Back again."""
        return Move(self.target, self.source)


@dataclass(frozen=True)
class Batch:
    """Moves made at once.

    Attributes:
        seq: of the journal's line that announced them.
        moves: those that are to be, or were, made.
        of: the number of the batch whose moves these take back; None for others.
    """

    seq: int
    moves: tuple[Move, ...]
    of: int | None = None


@dataclass(frozen=True)
class View:
    """What `Annotations` say at one moment.

    Attributes:
        labels: the present label of each photo that was asked for.
        folders: the label that each has by where it lies.
        seq: the number of the journal's last entry; 0: there is none.
        undoable: of the edit that `undo` takes back; None: there is none.
        redoable: of the edit that `redo` makes again; None: there is none.
    """

    labels: Sequence[str]
    folders: Sequence[str]
    seq: int
    undoable: int | None
    redoable: int | None


class Annotations:
    """The edits of one folder of photos. Any number of threads and processes may make them at once.

    Args:
        root: the folder. Nothing is written before the first edit.
        unlabelled: sub-folders whose photos have no label yet, as those in `root` itself.

    Raises:
        DatasetError: a damaged journal, or one that cannot be read; or the folder holds augmented copies.
        UsageError: `unlabelled` names no sub-folder of `root`.
    """

    def __init__(self, root: str | Path, *, unlabelled: Sequence[str] = ()) -> None:
        self.tree = Tree(Path(root))
        if (self.tree.root / LINEAGE_FILE).exists():
            raise DatasetError(
                f"{root} holds augmented copies: annotate the folder of originals, and augment it again"
            )
        self.unlabelled = tuple(unlabelled)
        for name in self.unlabelled:
            if not is_name(name) or not (self.tree.root / name).is_dir():
                raise UsageError(f"{name!r} is no sub-folder of {root}")
        self.seq = 0
        self.undoable: list[Edit] = []
        self.redoable: list[Edit] = []
        self.applied: list[Batch] = []
        self.unfinished: Batch | None = None
        self._given: dict[str, str] = {}
        self._num_read = 0
        self._lock = threading.RLock()
        self.refresh()

    def __repr__(self) -> str:
        return f"Annotations({str(self.tree.root)!r}, {self.seq} entries)"

    def folder_label(self, photo: str) -> str:
        """The label that a photo has by where it lies."""
        if photo.startswith(f"{TRASH_FOLDER}/"):
            return TRASH
        top, slash, _ = photo.partition("/")
        return top if slash and top not in self.unlabelled else NO_LABEL

    def label(self, photo: str) -> str:
        """The present label of a photo: a class, `NO_LABEL` or `TRASH`."""
        with self._lock:
            return self._given.get(photo) or self.folder_label(photo)

    def labels(self, ids: Iterable[str]) -> list[str]:
        """The present label of each photo."""
        with self._lock:
            return [self._given.get(photo) or self.folder_label(photo) for photo in ids]

    def view(self, ids: Iterable[str]) -> View:
        """The present labels of photos and the position in the journal, all of one moment."""
        with self._lock:
            ids = list(ids)
            return View(
                labels=self.labels(ids),
                folders=[self.folder_label(photo) for photo in ids],
                seq=self.seq,
                undoable=self.undoable[-1].seq if self.undoable else None,
                redoable=self.redoable[-1].seq if self.redoable else None,
            )

    def edit(self, changes: Iterable[Change]) -> Edit:
        """Change labels, all of them or none.

        Raises:
            ConflictError: a photo whose label is not `before`, or that is not there.
            DatasetError: a photo cannot be looked for, or the journal cannot be written.
            UnfinishedError: moves were interrupted.
            UsageError: no changes, several of one photo, or a label or path that cannot be.
        """
        changes = tuple(changes)
        _check_changes(changes)
        with self.exclusive():
            self.require_finished()
            present = {change.id: self.label(change.id) for change in changes}
            stale: dict[str, str | None] = {
                change.id: present[change.id] for change in changes if present[change.id] != change.before
            }
            stale |= {photo: None for photo in present if self._is_gone(photo)}
            if stale:
                raise ConflictError(stale)
            self.append({"kind": "edit", "changes": [[c.id, c.before, c.after] for c in changes]})
            return self.undoable[-1]

    def _is_gone(self, photo: str) -> bool:
        try:
            return self.tree.status(photo) is None
        except OSError as error:
            raise DatasetError(
                f"{self.tree.root / photo} cannot be looked for: {error.strerror}: the edit does not hold"
            ) from error

    def undo(self, seq: int) -> Edit:
        """Take the last edit back and return what that changed.

        Args:
            seq: of that edit, as the caller knows it.

        Raises:
            DatasetError: the journal cannot be written.
            UnfinishedError: moves were interrupted.
            UsageError: another edit is the last one by now, or there is none.
        """
        return self._repeat("undo", seq).reversed()

    def redo(self, seq: int) -> Edit:
        """Make the edit again that was undone last; as `undo`."""
        return self._repeat("redo", seq)

    def _repeat(self, kind: str, seq: int) -> Edit:
        with self.exclusive():
            self.require_finished()
            found = self.undoable if kind == "undo" else self.redoable
            if not found or found[-1].seq != seq:
                raise UsageError(f"there is nothing more to {kind}, or it was changed meanwhile: look anew")
            self.append({"kind": kind, "of": seq})
            return (self.redoable if kind == "undo" else self.undoable)[-1]

    def require_finished(self) -> None:
        """Refuse what would be lost when interrupted moves are finished; within `exclusive`.

        Raises:
            UnfinishedError: moves were interrupted.
        """
        if self.unfinished is not None:
            raise UnfinishedError(
                f"{self.tree.root}: moves were interrupted: start `jaxcls annotate` again to finish them"
            )

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """While the block runs nobody else can append; all that others appended has been read.

        Raises:
            DatasetError: the journal cannot be read or locked. What the block raises is left as it is.
        """
        with self._lock, ExitStack() as stack:
            with self._writing():
                stack.enter_context(
                    self.tree.folder(FOLDER, create=True)
                )  # which refuses a link of that name
                stack.enter_context(locked(self.tree.root / FOLDER, wait=True))
            self.refresh()
            yield

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DatasetError(
                f"{self.tree.root / JOURNAL} cannot be written: {error.strerror}: the edit does not hold"
            ) from error

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write an entry, within `exclusive`; it holds when this returns.

        Raises:
            DatasetError: the journal cannot be written.
        """
        entry = {"seq": self.seq + 1, **entry}
        with self._writing():
            num_bytes = self._extend(_encode(entry))
        self._replay(entry)
        self._num_read = num_bytes

    def _extend(self, line: bytes) -> int:
        """Add a line to the journal, and return how many bytes it has then."""
        with self.tree.open(JOURNAL, os.O_RDWR | os.O_CREAT) as file:
            is_new = self._num_read == 0
            os.ftruncate(file, self._num_read)  # what a crash left of a line
            try:
                _write(file, (_encode(HEADER) if is_new else b"") + line, self._num_read)
            except OSError:
                os.ftruncate(file, self._num_read)
                raise
            num_bytes = os.fstat(file).st_size
        if is_new:
            self.tree.settle([JOURNAL])
        return num_bytes

    def refresh(self) -> None:
        """Read what others appended.

        Raises:
            DatasetError: it is damaged, or cannot be read.
        """
        with self._lock:
            try:
                with self.tree.open(JOURNAL, os.O_RDONLY) as file:
                    num_bytes = os.fstat(file).st_size
                    new = _read(file, self._num_read, num_bytes - self._num_read)
            except FileNotFoundError:
                num_bytes, new = 0, b""
            except OSError as error:
                raise DatasetError(f"{self.tree.root / JOURNAL} cannot be read: {error.strerror}") from error
            if num_bytes < self._num_read:
                raise DatasetError(f"{self.tree.root / JOURNAL} has become shorter: start anew")
            whole = new[: new.rfind(b"\n") + 1]
            for line in whole.splitlines(keepends=True):
                self._take(line)
                self._num_read += len(line)

    def _take(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            if self._num_read == 0:
                _require(entry == HEADER)
            else:
                self._replay(entry)
        except (ValueError, KeyError, TypeError, RecursionError, UsageError) as error:
            raise DatasetError(
                f"{self.tree.root / JOURNAL} is damaged after entry {self.seq}, byte {self._num_read}: "
                "mend that line, or move the file away to begin without edits"
            ) from error

    def _replay(self, entry: dict[str, Any]) -> None:
        seq, kind = entry["seq"], entry["kind"]
        _require(type(seq) is int and seq == self.seq + 1)
        if kind == "edit":
            edit = Edit(seq, tuple(Change(*change) for change in entry["changes"]))
            _check_changes(edit.changes)
            self._give(edit)
            self.undoable.append(edit)
            self.redoable.clear()
        elif kind in ("undo", "redo"):
            found, other = self.undoable, self.redoable
            if kind == "redo":
                found, other = other, found
            _require(bool(found) and found[-1].seq == entry["of"])
            edit = found.pop()
            self._give(edit.reversed() if kind == "undo" else edit)
            # A new number: whoever last saw it before all this must not take it for what it was.
            other.append(replace(edit, seq=seq))
        elif kind == "move":
            _require(self.unfinished is None)
            self.unfinished = Batch(seq, _moves(entry["moves"]), entry["of"])
        elif kind == "moved":
            batch = self.unfinished
            _require(batch is not None and batch.seq == entry["of"])
            assert batch is not None
            self._follow(replace(batch, moves=_moves(entry["moves"])))
        else:
            raise ValueError(kind)
        self.seq = seq

    def _give(self, edit: Edit) -> None:
        self._given.update({change.id: change.after for change in edit.changes})

    def _follow(self, batch: Batch) -> None:
        """The photos of a batch are at their new paths: so are their labels and edits."""
        new = {move.source: move.target for move in batch.moves}
        moved = {new[old]: label for old, label in self._given.items() if old in new}
        # Nothing lay at the new paths: a label given to what once did is out of date.
        gone = {*new, *new.values()}
        self._given = {photo: label for photo, label in self._given.items() if photo not in gone} | moved
        for edits in (self.undoable, self.redoable):
            edits[:] = [
                replace(e, changes=tuple(replace(c, id=new.get(c.id, c.id)) for c in e.changes))
                for e in edits
            ]
        if batch.of is None:
            if batch.moves:
                self.applied.append(batch)
        else:
            _require(bool(self.applied) and self.applied[-1].seq == batch.of)
            taken_back = {move.reversed() for move in batch.moves}
            last = self.applied.pop()
            if left := tuple(move for move in last.moves if move not in taken_back):
                self.applied.append(replace(last, moves=left))
        self.unfinished = None


@dataclass(frozen=True)
class Photos:
    """The photos of a folder that can be edited.

    Attributes:
        ids: POSIX paths relative to the folder, in order, those in the trash last.
        notes: which images were left out, a line for each reason.
    """

    ids: tuple[str, ...]
    notes: tuple[str, ...] = ()


def list_photos(root: str | Path) -> Photos:
    """Every image below `root` that no link leads to, and those in its trash.

    Raises:
        DatasetError: there is no such folder, or it or a folder below it cannot be read.
    """
    root = Path(root)
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder: give one that holds photos")
    listing = list_images(root)
    listing.require_whole(root)
    found = listing.images.tolist()
    trash = root / TRASH_FOLDER
    if trash.is_dir():
        found += [f"{TRASH_FOLDER}/{photo}" for photo in list_images(trash).images.tolist()]
    is_link = cache(Path.is_symlink)

    @cache
    def is_behind_link(folder: str) -> bool:
        parts = accumulate(folder.split("/"), "{}/{}".format) if folder else ()
        return any(is_link(root / part) for part in parts)

    own = tuple(
        photo
        for photo in found
        if not is_behind_link(photo.rpartition("/")[0]) and not (root / photo).is_symlink()
    )
    left_out = {
        "behind links, which may lead elsewhere": len(found) - len(own),
        "whose names are not UTF-8": len(listing.not_utf8),
    }
    return Photos(own, tuple(f"images {why}, left out: {count}" for why, count in left_out.items() if count))


def read_annotated(
    root: str | Path, *, unlabelled: Sequence[str] = (), max_pixels: int = MAX_PIXELS
) -> Dataset:
    """The photos of a folder with their present labels, whether or not files were moved for them.

    Photos in the trash are left out; those without a label have the label -1. Ids are the present paths.

    Args:
        root: the folder, as for `list_photos`.
        unlabelled: as for `Annotations`.
        max_pixels: height times width above which a photo is refused as unreadable.

    Raises:
        DatasetError: as `list_photos` and `Annotations`.
        UsageError: as `Annotations`.
    """
    annotations = Annotations(root, unlabelled=unlabelled)
    ids = list_photos(root).ids
    labels = annotations.labels(ids)
    kept = [i for i, label in enumerate(labels) if label != TRASH]
    return make_dataset(annotations.tree, [ids[i] for i in kept], [labels[i] for i in kept], max_pixels)


def make_dataset(tree: Tree, ids: Sequence[str], labels: Sequence[str], max_pixels: int) -> Dataset:
    """Photos with labels by name, classes sorted; `NO_LABEL` becomes -1."""
    classes = sorted(set(labels) - {NO_LABEL, TRASH})
    number = {name: label for label, name in enumerate(classes)}
    return Dataset(
        name=tree.root.resolve().name,
        classes=tuple(classes),
        labels=np.asarray([number.get(label, UNLABELLED) for label in labels], np.int32),
        ids=np.asarray(ids, ID_DTYPE),
        source=BeneathSource(tree, ids),
        max_pixels=max_pixels,
    )


def is_class_name(name: str) -> bool:
    """Whether a folder of this name is read as a class: it is no hidden one."""
    return is_name(name) and not name.startswith(".")


def _check_changes(changes: Sequence[Change]) -> None:
    if not changes:
        raise UsageError("an edit changes at least one photo")
    if len({change.id for change in changes}) < len(changes):
        raise UsageError("an edit changes each photo once")
    for change in changes:
        if not isinstance(change.id, str) or not is_path(change.id):
            raise UsageError(f"{change.id!r} is no path of a photo")
        for label in (change.before, change.after):
            if label not in (TRASH, NO_LABEL) and not (isinstance(label, str) and is_class_name(label)):
                raise UsageError(
                    f"{label!r} cannot be a class: it is the name of a folder, so without /, not beginning "
                    "with a dot, and of at most 255 bytes"
                )


def _moves(pairs: Iterable[Any]) -> tuple[Move, ...]:
    moves = tuple(Move(*pair) for pair in pairs)
    for move in moves:
        _require(all(isinstance(path, str) and is_path(path) for path in (move.source, move.target)))
    return moves


def _require(holds: bool) -> None:
    if not holds:
        raise ValueError


def _encode(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode() + b"\n"


def _read(file: int, start: int, num_bytes: int) -> bytes:
    parts = []
    while num_bytes > 0 and (part := os.pread(file, num_bytes, start)):
        parts.append(part)
        start += len(part)
        num_bytes -= len(part)
    return b"".join(parts)


def _write(file: int, data: bytes, start: int) -> None:
    """Write at an offset, and return once it is on the disk."""
    while data:
        written = os.pwrite(file, data, start)
        data, start = data[written:], start + written
    os.fsync(file)

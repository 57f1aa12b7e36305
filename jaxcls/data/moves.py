"""Photos moved into the folders of their labels: planned as values, never over another file, and undoable.

A file is moved by a second name (a hard link, which the system refuses where something of that name is) and
the removal of the first: at every moment it lies at one of the two, or at both. The journal says beforehand
what is about to be moved and afterwards what was, so that an interrupted batch is finished by `finish_moves`.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from jaxcls.data.annotations import NO_LABEL, TRASH, TRASH_FOLDER, Annotations, Move
from jaxcls.data.beneath import MAX_NAME_BYTES, Tree
from jaxcls.errors import DatasetError
from jaxcls.progress import show_progress

CHUNK = 256
"""Files whose second names are on the disk before their first ones are removed."""


@dataclass(frozen=True)
class Outcome:
    """What became of a batch of moves.

    Attributes:
        moves: those that were made.
        problems: a line for each of the others, whose files are where they were, unless it says otherwise.
    """

    moves: tuple[Move, ...] = ()
    problems: tuple[str, ...] = ()


def plan_moves(annotations: Annotations, ids: Iterable[str]) -> tuple[Move, ...]:
    """The moves that bring photos into the folders of their present labels; others stay where they are.

    What lies below a class folder keeps its path below the new one; photos without a label go into the first
    of the `unlabelled` folders, or else into the folder of photos itself. Where a name is taken, a number is
    added to it.

    Args:
        annotations: the labels.
        ids: of all photos, as by `list_photos`.
    """
    ids = list(ids)
    taken = set(ids)
    moves = []
    for photo, label in zip(ids, annotations.labels(ids), strict=True):
        if label != annotations.folder_label(photo):
            target = _free(_target(annotations, photo, label), taken, annotations.tree)
            taken.add(target)
            moves.append(Move(photo, target))
    return tuple(moves)


def plan_return(annotations: Annotations) -> tuple[Move, ...]:
    """The moves that take the last batch back; none where no batch is left."""
    last = annotations.applied[-1].moves if annotations.applied else ()
    return tuple(move.reversed() for move in reversed(last))


def apply_moves(annotations: Annotations, ids: Iterable[str]) -> Outcome:
    """Move photos as `plan_moves` has it.

    Raises:
        DatasetError: an interrupted batch is to be finished first, or the journal cannot be written.
    """
    with annotations.exclusive():
        return _begin(annotations, plan_moves(annotations, ids), of=None)


def return_moves(annotations: Annotations) -> Outcome:
    """Take the last batch of moves back. The labels stay: they can be applied again, or undone.

    Raises:
        DatasetError: as `apply_moves`.
    """
    with annotations.exclusive():
        moves = plan_return(annotations)
        return _begin(annotations, moves, of=annotations.applied[-1].seq if moves else None)


def finish_moves(annotations: Annotations) -> Outcome:
    """Make what is missing of a batch that was interrupted, if there is one.

    Raises:
        DatasetError: the journal cannot be written.
    """
    if annotations.unfinished is None:
        return Outcome()
    with annotations.exclusive():
        return _make(annotations)


def _begin(annotations: Annotations, moves: Sequence[Move], *, of: int | None) -> Outcome:
    annotations.require_finished()
    if not moves:
        return Outcome()
    annotations.append({"kind": "move", "moves": _pairs(moves), "of": of})
    return _make(annotations)


def _make(annotations: Annotations) -> Outcome:
    batch, tree = annotations.unfinished, annotations.tree
    if batch is None:  # another process has finished it
        return Outcome()
    done: list[Move] = []
    problems: list[str] = []
    chunks = [batch.moves[start : start + CHUNK] for start in range(0, len(batch.moves), CHUNK)]
    for chunk in show_progress(chunks, "moving", len(chunks)):
        linked = []
        for move in chunk:
            try:
                _give_second_name(tree, move)
                linked.append(move)
            except (OSError, DatasetError) as error:
                problems.append(_describe(move, error))
        settled: set[str] = set()
        for move in linked:
            try:
                _settle_once(tree, move.target, settled)
                _remove_first_name(tree, move)
                done.append(move)
            except (OSError, DatasetError) as error:
                problems.append(_describe(move, error) + _withdraw(tree, move))
    _settle_what_is_left(tree, done)
    annotations.append({"kind": "moved", "of": batch.seq, "moves": _pairs(done)})
    return Outcome(tuple(done), tuple(problems))


def _give_second_name(tree: Tree, move: Move) -> None:
    """Link the target to the source, unless an interrupted batch did already."""
    source, target = tree.status(move.source), tree.status(move.target)
    if target is not None and (source is None or os.path.samestat(source, target)):
        return
    if source is None:
        raise DatasetError("is not there any more")
    tree.link(move.source, move.target)


def _settle_once(tree: Tree, path: str, settled: set[str]) -> None:
    """Settle the folder of a file, unless it is among those that were."""
    folder = path.rpartition("/")[0]
    if folder not in settled:
        tree.settle([path])
        settled.add(folder)


def _remove_first_name(tree: Tree, move: Move) -> None:
    """Remove the source, unless an interrupted batch did already; only as long as it is the target's file."""
    source, target = tree.status(move.source), tree.status(move.target)
    if target is None:
        raise DatasetError("has gone from its new place")
    if source is None:
        return
    if not os.path.samestat(source, target):
        raise DatasetError("another file has come to its old place: look at both")
    tree.remove(move.source)


def _withdraw(tree: Tree, move: Move) -> str:
    """Take the second name back where the first is still there; "" or what to add to the problem."""
    try:
        source, target = tree.status(move.source), tree.status(move.target)
        if source is not None and target is not None and os.path.samestat(source, target):
            tree.remove(move.target)
    except (OSError, DatasetError) as error:
        return f"; it may lie at both places: {_reason(error)}"
    return ""


def _settle_what_is_left(tree: Tree, moves: Iterable[Move]) -> None:
    """Return once no source is on the disk any more."""
    for path in {move.source.rpartition("/")[0]: move.source for move in moves}.values():
        try:
            tree.settle([path])
        except (FileNotFoundError, NotADirectoryError):
            continue  # somebody took the empty folder away
        except OSError as error:
            raise DatasetError(
                f"{tree.root / path}: the move may not outlast a power cut: {error.strerror}: "
                "start `jaxcls annotate` again, which finishes it"
            ) from error


def _describe(move: Move, error: OSError | DatasetError) -> str:
    return f"{move.source} -> {move.target}: {_reason(error)}"


def _reason(error: OSError | DatasetError) -> str:
    if isinstance(error, FileExistsError):
        return "another file has come there: plan anew"
    return str(error) if isinstance(error, DatasetError) else str(error.strerror)


def _target(annotations: Annotations, photo: str, label: str) -> str:
    if label == TRASH:
        return f"{TRASH_FOLDER}/{photo}"
    path = photo.removeprefix(f"{TRASH_FOLDER}/")
    below = path.partition("/")[2] or path
    if label != NO_LABEL:
        return f"{label}/{below}"
    return f"{annotations.unlabelled[0]}/{below}" if annotations.unlabelled else path.rpartition("/")[2]


def _free(path: str, taken: set[str], tree: Tree) -> str:
    """The path, or that with the first number at which nothing lies."""
    folder, slash, name = path.rpartition("/")
    suffix = PurePosixPath(name).suffix
    stem = name.removesuffix(suffix)
    number, tried = 1, path
    while tried in taken or _is_there(tree, tried):
        number += 1
        end = f"-{number}{suffix}"
        short = stem.encode()[: MAX_NAME_BYTES - len(end.encode())].decode(errors="ignore")
        tried = f"{folder}{slash}{short}{end}"
    return tried


def _is_there(tree: Tree, path: str) -> bool:
    try:
        return tree.status(path) is not None
    except OSError:
        return False  # the move itself is refused, and says why


def _pairs(moves: Iterable[Move]) -> list[list[str]]:
    return [[move.source, move.target] for move in moves]

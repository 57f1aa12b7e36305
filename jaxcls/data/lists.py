"""A list of photos and their labels, in CSV or JSON lines, read as a `Dataset`."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from jaxcls.data.dataset import ID_DTYPE, UNLABELLED, Dataset
from jaxcls.data.images import MAX_PIXELS
from jaxcls.data.source import FileSource
from jaxcls.errors import DatasetError


def read_list(
    path: str | Path,
    *,
    root: str | Path | None = None,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Dataset:
    """Read a list of photos: in each row a path and a label.

    CSV (`.csv`) begins with a header that names the columns `path` and, if anything is labelled, `label`.
    JSON lines (`.jsonl`) are objects with these keys. Both are UTF-8; other columns and keys are passed over.
    A label is a text or a whole number; where it is empty, null or left out, the photo is unlabelled. Classes
    are the labels that occur, sorted as text (`Dataset.with_classes` gives another order). Ids are the paths
    as they are listed.

    Args:
        path: the list.
        root: the folder that relative paths start from. Default: the list's own.
        name: the dataset's name. Default: the list's, without its suffix.
        max_pixels: height times width above which a photo is refused as unreadable.

    Raises:
        DatasetError: no such list, another suffix, no rows, a row that is malformed or repeats a path, or
            photos that are not there or cannot be reached.
    """
    path = Path(path)
    root = path.parent if root is None else Path(root)
    lines: dict[str, int] = {}
    labels: list[str | None] = []
    for line, row in _rows(path):
        where = f"{path}, line {line}"
        photo, label = _parse(row, where)
        if photo in lines:
            raise DatasetError(f"{where}: {photo} is listed in line {lines[photo]} already: take one out")
        lines[photo] = line
        labels.append(label)
    if not lines:
        raise DatasetError(f"{path} lists no photos")
    if missing := [
        photo for photo, line in lines.items() if not _is_file(root / photo, f"{path}, line {line}")
    ]:
        raise DatasetError(
            f"{path}: {len(missing)} of {len(lines)} photos are not there, first {root / missing[0]} "
            f"(line {lines[missing[0]]}): mend the list, or put it where its paths start (root=)"
        )
    classes = sorted({label for label in labels if label is not None})
    position: dict[str | None, int] = {label: index for index, label in enumerate(classes)}
    ids = np.asarray(list(lines), ID_DTYPE)
    return Dataset(
        name=name or path.stem,
        classes=tuple(classes),
        labels=np.asarray([position.get(label, UNLABELLED) for label in labels], np.int32),
        ids=ids,
        source=FileSource(root, ids),
        max_pixels=max_pixels,
    )


def _is_file(photo: Path, where: str) -> bool:
    try:
        return photo.is_file()
    except OSError as error:  # a name that is too long, a folder that is locked
        raise DatasetError(
            f"{where}: {photo!s:.200}: {error.strerror}: mend the line, or its folder"
        ) from error


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows with the lines that they end in."""
    read = LIST_READERS.get(path.suffix.lower())
    if read is None:
        raise DatasetError(f"{path}: a list of photos ends in {' or '.join(LIST_READERS)}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from read(path, file)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8: save it as UTF-8") from error


def _csv_rows(path: Path, file: TextIO) -> Iterator[tuple[int, Mapping[str, Any]]]:
    rows = csv.DictReader(file)
    try:
        if "path" not in (rows.fieldnames or ()):
            raise DatasetError(
                f"{path}: its first line names no column `path`: write `path,label` above the rows"
            )
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise DatasetError(f"{path}, line {rows.reader.line_num}: {error}") from error


def _json_rows(path: Path, file: TextIO) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{path}, line {number}: no JSON: {error}") from error
        if not isinstance(row, dict):
            raise DatasetError(f"{path}, line {number}: not an object with `path` and `label`")
        yield number, row


LIST_READERS: Mapping[str, Callable[[Path, TextIO], Iterator[tuple[int, Mapping[str, Any]]]]] = {
    ".csv": _csv_rows,
    ".jsonl": _json_rows,
}
"""Suffix of a list -> how its rows are read."""


def _parse(row: Mapping[str, Any], where: str) -> tuple[str, str | None]:
    """Path and label, or None, of a row."""
    photo, label = row.get("path"), row.get("label")
    if not isinstance(photo, str) or not photo:
        raise DatasetError(f"{where}: it has no path")
    if label is None or label == "":
        return _text(photo, where), None
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise DatasetError(f"{where}: label {label!r} is neither a text nor a whole number")
    return _text(photo, where), _text(str(label), where)


def _text(value: str, where: str) -> str:
    """`value`, unless it holds half of a surrogate pair, as JSON can."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DatasetError(f"{where}: {value!a} is no Unicode text") from error
    return value

"""Where each gathered photo came from: `provenance.jsonl`, a line for each photo of each label.

Lines are only appended; a later one about the same URL and label takes the place of an earlier one. A process
that is killed leaves at most a torn last line, which the next one cuts off. Lines survive the process, but
not always a loss of power: the system puts them on the disk when it likes.
"""

import json
import os
import re
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from jaxcls.errors import DatasetError

PROVENANCE = "provenance.jsonl"
NAME_DIGITS = 20
"""Of a photo's sha256, in its file's name."""


@dataclass(frozen=True)
class Origin:
    """What is known of one photo under one label.

    Attributes:
        label: its class.
        file: relative path, "LABEL/DIGITS.SUFFIX", named after the content.
        sha256: of the file.
        url: where its bytes came from; a file: URL where they were copied from a folder.
        query: what led to it: the text, URL or folder as it was given.
        time: when it was fetched, in UTC as ISO 8601.
        provider: whose search found it; "" where it was none.
        page, title, author, licence, licence_url: as in `image_search.Found`.
        duplicate_of: why there is no such file: the one that shows the same; "" for a photo that was kept.
    """

    label: str
    file: str
    sha256: str
    url: str
    query: str
    time: str
    provider: str = ""
    page: str = ""
    title: str = ""
    author: str = ""
    licence: str = ""
    licence_url: str = ""
    duplicate_of: str = ""

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        """Read what `to_line` wrote.

        Raises:
            ValueError: it is something else, or names a file that is not the label's own.
        """
        values: Any = json.loads(line)
        if not isinstance(values, dict) or values.keys() != {field.name for field in fields(cls)}:
            raise ValueError("other fields than those of a photo")
        if not all(isinstance(value, str) for value in values.values()):
            raise ValueError("a value that is no text")
        origin = cls(**values)
        if not _SHA256.fullmatch(origin.sha256) or origin.file != file_of(
            origin.label, origin.sha256, origin.file.rpartition(".")[2]
        ):
            raise ValueError("a file that is not named as gathered photos are")
        return origin

    def to_line(self) -> bytes:
        """One line of JSON, in ASCII."""
        return json.dumps(asdict(self)).encode() + b"\n"


_SHA256 = re.compile("[0-9a-f]{64}")
_SUFFIX = re.compile("[a-z]{3,4}")


def file_of(label: str, sha256: str, suffix: str) -> str:
    """The relative path of a photo.

    Raises:
        ValueError: the label cannot be a folder's name, or the suffix is none.
    """
    if problem := label_problem(label):
        raise ValueError(problem)
    if not _SUFFIX.fullmatch(suffix):
        raise ValueError(f"{suffix!r} is no suffix")
    return f"{label}/{sha256[:NAME_DIGITS]}.{suffix}"


def label_problem(label: str) -> str:
    """Why a label cannot be the name of a folder below the gathered photos; "" where it can."""
    if not label or label != label.strip():
        return "is empty, or begins or ends with a space"
    if label.startswith("."):
        return "begins with a dot, which hides a folder"
    if set(label) & set("/\\") or not label.isprintable():
        return "holds a slash, a backslash or a control character"
    if len(label.encode(errors="replace")) > _MAX_LABEL_BYTES:
        return f"is longer than {_MAX_LABEL_BYTES} bytes"
    if label.casefold() == PROVENANCE:
        return "is the name of the file beside the folders"
    return ""


_MAX_LABEL_BYTES = 200


class Provenance:
    """The file, open for more lines. Use it in `with`.

    Attributes:
        origins: (label, URL) -> the last that was said, in the order in which each was first named.

    Raises:
        DatasetError: a line other than a torn last one is damaged.
    """

    def __init__(self, path: Path) -> None:
        with ExitStack() as stack:
            # No buffer: what could not be written would be written again when it closes.
            self._file = stack.enter_context(path.open("a+b", buffering=0))
            self._path = path
            self.origins = self._read(path)
            stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def _read(self, path: Path) -> dict[tuple[str, str], Origin]:
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        if torn:
            self._file.truncate(self._file.tell() - len(torn))
        origins = {}
        for number, line in enumerate(lines, start=1):
            try:
                origin = Origin.from_line(line)
            except (ValueError, RecursionError) as error:
                raise DatasetError(f"{path}, line {number}: {error}: delete the line") from error
            origins[origin.label, origin.url] = origin
        return origins

    def add(self, origin: Origin) -> None:
        """Write a line, all of it or nothing.

        Raises:
            DatasetError: it cannot be written, such as on a full disk.
        """
        end, rest = self._file.seek(0, os.SEEK_END), origin.to_line()
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(end)
            raise DatasetError(f"{self._path} cannot be written: {error.strerror}") from error
        self.origins[origin.label, origin.url] = origin

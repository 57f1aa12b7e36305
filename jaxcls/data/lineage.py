"""What augmented copies come from: a file beside them says it, and groups keep them with their originals."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from jaxcls.errors import DatasetError
from jaxcls.storage import write_whole

LINEAGE_FILE = "lineage.jsonl"
"""One line of JSON for each photo of a folder. Of two lines for one photo the later counts; a last line
without an end was never finished, and does not."""


@dataclass(frozen=True)
class Lineage:
    """What a photo of a folder is.

    Attributes:
        id: its path, relative to the folder.
        sha256: of the file, in hexadecimal; "" while it is being made.
        original: the id of the photo that it is a copy of; "" where it is an original itself.
        original_sha256: of that photo's file.
        pipeline: what was done to it, as `jaxcls.augment.ops.parse` reads it.
        repeat: how often the same pipeline was named before.
        seed: of the draws.
        max_short_side: in pixels; a larger original was reduced to it first.
    """

    id: str
    sha256: str
    original: str = ""
    original_sha256: str = ""
    pipeline: str = ""
    repeat: int = 0
    seed: int = 0
    max_short_side: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if type(getattr(self, field.name)) is not field.type:
                raise TypeError(f"{field.name} has another type")
        if not is_place(self.id):
            raise ValueError("the id does not lie below the folder")

    def to_line(self) -> str:
        """Its line in the file."""
        values = asdict(self) if self.original else {"id": self.id, "sha256": self.sha256}
        return json.dumps(values, ensure_ascii=False) + "\n"


def is_place(name: str) -> bool:
    """Whether a relative POSIX path names a file in a folder below, neither of them hidden."""
    parts = name.split("/")
    return len(parts) > 1 and "\0" not in name and all(part and not part.startswith(".") for part in parts)


def is_copy_name(name: str) -> bool:
    """Whether a file is named as copies are: "...~0123456789abcdef.jpg"."""
    return re.search(r"~[0-9a-f]{16}\.(jpg|png)\Z", name) is not None


def read_lineage(folder: Path) -> dict[str, Lineage]:
    """Id -> lineage of the photos that a folder's lineage file lists; none where there is no such file.

    Raises:
        DatasetError: the file is damaged.
    """
    path = folder / LINEAGE_FILE
    found: dict[str, Lineage] = {}
    if not path.is_file():
        return found
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                lineage = Lineage(**json.loads(line))
            except (ValueError, TypeError, RecursionError) as error:
                raise DatasetError(
                    f"{path}: line {number} is damaged, so that copies cannot be told from originals: "
                    "augment the photos again, into a new folder"
                ) from error
            found[lineage.id] = lineage
    return found


def write_lineage(folder: Path, lines: Iterable[Lineage]) -> None:
    """Write or replace a folder's lineage file in one step."""
    content = "".join(lineage.to_line() for lineage in lines)
    write_whole(folder / LINEAGE_FILE, content.encode())


def find_families(ids: np.ndarray, origins: np.ndarray) -> np.ndarray:
    """int64 [N]: the position of each photo's original, or of its first copy where that is not here.

    Args:
        ids: string [N].
        origins: string [N], the id of each copy's original, "" for originals.
    """
    leaders: dict[str, int] = {}
    is_copy = origins != ""
    for position in np.flatnonzero(~is_copy):
        leaders.setdefault(ids[position], int(position))
    for position in np.flatnonzero(is_copy):
        leaders.setdefault(origins[position], int(position))
    return np.asarray([leaders[origin or own] for own, origin in zip(ids, origins, strict=True)], np.int64)


def join_groups(groups: np.ndarray | None, families: np.ndarray) -> np.ndarray:
    """int32 [N]: groups in which those are joined that share a photo's family.

    Args:
        groups: int [N], or None: each photo is a group of its own.
        families: int [N], of `find_families`.
    """
    if groups is None:
        return families.astype(np.int32)
    joined = groups
    while True:
        before = joined
        for numbers in (families, groups):
            _, numbers = np.unique(numbers, return_inverse=True)
            lowest = np.full(numbers.max(initial=-1) + 1, np.iinfo(np.int64).max)
            np.minimum.at(lowest, numbers, joined)
            joined = lowest[numbers]
        if (joined == before).all():
            return joined.astype(np.int32)

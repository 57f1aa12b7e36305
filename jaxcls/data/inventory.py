"""Which photos there were and what they held: what was added, removed, changed or moved since.

The file of an inventory has the format of `sha256sum`, whose `--check` reads it in the folder of the photos.
"""

import hashlib
import re
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxcls.data.dataset import ID_DTYPE, Dataset
from jaxcls.data.lines import MARK, escape, unescape
from jaxcls.errors import ImageError, UsageError
from jaxcls.progress import map_threads
from jaxcls.storage import write_whole

NUM_SHOWN = 20
"""Photos of a kind that a description names."""

_LINE = re.compile(r"(\\?)([0-9a-f]{64}) [ *](.+)\n")


@dataclass(frozen=True, eq=False)
class Inventory:
    """N photos and what they hold.

    Attributes:
        ids: string [N].
        digests: uint8 [N, 32]: sha256 of each photo as it is stored, or was when it could be read last.
        unreadable: photos that could not be read, and are not among the N.
    """

    ids: np.ndarray
    digests: np.ndarray
    unreadable: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def carry_over(self, before: "Inventory") -> "Inventory":
        """This one, with what unreadable photos held before: else they would be new the next time."""
        row_of = {name: row for row, name in enumerate(before.ids)}
        kept = [name for name in self.unreadable if name in row_of]
        rows = np.asarray([row_of[name] for name in kept], np.int64)
        return Inventory(
            np.concatenate([self.ids, np.asarray(kept, ID_DTYPE)]),
            np.concatenate([self.digests, before.digests[rows]]),
            tuple(name for name in self.unreadable if name not in row_of),
        )

    def write(self, path: Path) -> None:
        """Write or replace its file in one step.

        Raises:
            UsageError: it cannot be written.
        """
        content = "".join(_line(name, row) for name, row in zip(self.ids, self.digests, strict=True))
        try:
            write_whole(path, content.encode())
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}") from error


@dataclass(frozen=True)
class Changes:
    """What became of photos from one inventory to the next, each by its id.

    Attributes:
        added: there is such an id now.
        removed: there is no such id any more.
        changed: the same id, another content.
        moved: (id before, id now): the content of a removed photo under a new id.
        unreadable: photos that cannot be read now, whatever became of them.
        num_same: photos that are as they were.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    moved: tuple[tuple[str, str], ...]
    unreadable: tuple[str, ...]
    num_same: int

    def __str__(self) -> str:
        """The numbers, and the first photos of each kind."""
        kinds = {
            "added": self.added,
            "removed": self.removed,
            "changed": self.changed,
            "moved": tuple(f"{before} -> {now}" for before, now in self.moved),
            "unreadable": self.unreadable,
        }
        lines = [", ".join([f"{self.num_same} as before", *(f"{len(kinds[k])} {k}" for k in kinds)])]
        for kind, names in kinds.items():
            lines += [f"  {kind}: {name}" for name in names[:NUM_SHOWN]]
            if len(names) > NUM_SHOWN:
                lines.append(f"  {kind}: and {len(names) - NUM_SHOWN} more")
        return "\n".join(lines)


def take_inventory(dataset: Dataset) -> Inventory:
    """Read every photo once, on all cores, with a progress bar."""
    digests = content_digests(dataset)
    readable = [i for i, digest in enumerate(digests) if digest]
    unreadable = [i for i, digest in enumerate(digests) if not digest]
    return Inventory(dataset.ids[readable], _rows(digests), tuple(dataset.ids[unreadable]))


def content_digests(dataset: Dataset, *, progress: bool = True) -> list[bytes]:
    """The sha256 of each photo as it is stored, of an array with its shape; b"" where it cannot be read."""

    def digest(index: int) -> bytes:
        try:
            item = dataset.source[index]
        except (ImageError, OSError):
            return b""
        if isinstance(item, bytes):
            return hashlib.sha256(item).digest()
        return hashlib.sha256(repr(item.shape).encode() + np.ascontiguousarray(item).tobytes()).digest()

    return list(map_threads(digest, len(dataset), "reading" if progress else None))


def read_inventory(path: Path) -> Inventory:
    """An inventory from its file.

    Raises:
        UsageError: the file cannot be read, or is no inventory; the message names the line.
    """
    digests: dict[str, bytes] = {}
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                name, digest = _parse(line, f"{path}, line {number}")
                if name in digests:
                    raise UsageError(
                        f"{path}, line {number} names {name} again: give the inventory of one folder"
                    )
                digests[name] = digest
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8"
        raise UsageError(f"{path} cannot be read: {reason}") from error
    return Inventory(np.asarray(list(digests), ID_DTYPE), _rows(digests.values()))


def compare_inventories(before: Inventory, now: Inventory) -> Changes:
    """What became of the photos of one inventory in a later one."""
    row_of = {name: row for row, name in enumerate(before.ids)}
    rows = np.asarray([row_of.get(name, -1) for name in now.ids], np.int64)
    is_known = rows >= 0
    is_same = (before.digests[rows[is_known]] == now.digests[is_known]).all(axis=1)
    is_gone = np.ones(len(before), bool)
    is_gone[rows[is_known]] = False
    is_gone[[row_of[name] for name in now.unreadable if name in row_of]] = False
    gone_with: dict[bytes, deque[int]] = defaultdict(deque)
    for row in np.flatnonzero(is_gone).tolist():
        gone_with[before.digests[row].tobytes()].append(row)
    added, moved = [], []
    for row in np.flatnonzero(~is_known).tolist():
        if gone := gone_with.get(now.digests[row].tobytes()):
            former = gone.popleft()
            is_gone[former] = False
            moved.append((before.ids[former], now.ids[row]))
        else:
            added.append(now.ids[row])
    return Changes(
        added=tuple(added),
        removed=tuple(before.ids[is_gone]),
        changed=tuple(now.ids[is_known][~is_same]),
        moved=tuple(moved),
        unreadable=now.unreadable,
        num_same=int(is_same.sum()),
    )


def _rows(digests: Iterable[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, hashlib.sha256().digest_size)


def _line(name: str, digest: np.ndarray) -> str:
    """As `sha256sum` writes it: a backslash at the beginning says that there are more in the name."""
    escaped = escape(name)
    return f"{'' if escaped == name else MARK}{digest.tobytes().hex()}  {escaped}\n"


def _parse(line: str, where: str) -> tuple[str, bytes]:
    found = _LINE.fullmatch(line)
    if found is None:
        raise UsageError(f"{where} is none of an inventory: give the file of one, or a new one")
    mark, digest, name = found.groups()
    return unescape(name) if mark else name, bytes.fromhex(digest)

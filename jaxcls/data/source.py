"""Where photos come from: random access to encoded or decoded ones, in files, memory, or other sources."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxcls.data import images

Item = bytes | np.ndarray


class Source(Protocol):
    """Random access to photos: encoded bytes, or decoded uint8 [H, W, 3]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...

    def path(self, index: int) -> Path | None:
        """The file behind a photo, where there is one."""
        ...


@dataclass(frozen=True, eq=False)
class FileSource:
    """Files below `root`; read anew at each access."""

    root: Path
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> bytes:
        return images.read_bytes(self.path(index))

    def path(self, index: int) -> Path:
        return self.root / self.names[index]


@dataclass(frozen=True, eq=False)
class MemorySource:
    """A list of photos in memory, or of paths, read at each access."""

    items: Sequence[str | Path | Item]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        item = self.items[index]
        return images.read_bytes(item) if isinstance(item, str | Path) else item

    def path(self, index: int) -> Path | None:
        item = self.items[index]
        return Path(item) if isinstance(item, str | Path) else None


@dataclass(frozen=True, eq=False)
class SelectedSource:
    """Some of another source's photos, in the order of `indices`."""

    source: Source
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Item:
        return self.source[int(self.indices[index])]

    def path(self, index: int) -> Path | None:
        return self.source.path(int(self.indices[index]))


@dataclass(frozen=True, eq=False)
class JoinedSource:
    """One source after another."""

    first: Source
    second: Source

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, index: int) -> Item:
        source, local = self._locate(index)
        return source[local]

    def path(self, index: int) -> Path | None:
        source, local = self._locate(index)
        return source.path(local)

    def _locate(self, index: int) -> tuple[Source, int]:
        local = index - len(self.first)
        return (self.first, index) if local < 0 else (self.second, local)

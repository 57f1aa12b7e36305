"""Files below one folder, reached without following a link: what is named never lies elsewhere.

Every folder on the way is opened by itself, and refused if it is a link; so it makes no difference when a
folder is exchanged for one meanwhile.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jaxcls.data.images import MAX_FILE_BYTES
from jaxcls.errors import DatasetError, ImageError

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
MAX_NAME_BYTES = 255


def is_name(name: str) -> bool:
    """Whether a file or folder may have this name: one that is UTF-8, and neither "." nor ".."."""
    try:
        num_bytes = len(name.encode())
    except UnicodeEncodeError:
        return False
    return 0 < num_bytes <= MAX_NAME_BYTES and name not in (".", "..") and not set(name) & {"/", "\0"}


def is_path(path: str) -> bool:
    """Whether this is a POSIX path to something below a folder, out of such names."""
    return all(map(is_name, path.split("/")))


@dataclass(frozen=True)
class Tree:
    """The files below `root`, named by POSIX paths relative to it. `root` itself may be a link.

    Every method raises OSError where the file system refuses, as it does a link on the way, and DatasetError
    for a path that would lead out.
    """

    root: Path

    @contextmanager
    def folder(self, path: str = "", *, create: bool = False) -> Iterator[int]:
        """Yield a descriptor of a folder; "" is the root.

        Args:
            path: of the folder.
            create: what is missing of it.
        """
        names = path.split("/") if path else []
        if not all(map(is_name, names)):
            raise DatasetError(f"{path!r} leads out of {self.root}, or is no path")
        descriptor = os.open(self.root, _FOLDER & ~os.O_NOFOLLOW)
        try:
            for name in names:
                if create:
                    self._make(name, descriptor)
                inner = os.open(name, _FOLDER, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = inner
            yield descriptor
        finally:
            os.close(descriptor)

    def _make(self, name: str, parent: int) -> None:
        try:
            os.mkdir(name, dir_fd=parent)
        except FileExistsError:
            return
        os.fsync(parent)

    @contextmanager
    def open(self, path: str, flags: int) -> Iterator[int]:
        """Yield a descriptor of a regular file."""
        parent, _, name = path.rpartition("/")
        self._require(path)
        with self.folder(parent) as folder:
            # O_NONBLOCK: opening a named pipe does not wait for its writer.
            flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(name, flags, 0o644, dir_fd=folder)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise DatasetError(f"{self.root / path}: not a regular file")
            yield descriptor
        finally:
            os.close(descriptor)

    def read_image(self, path: str) -> bytes:
        """The content of an image file, for `images.decode`.

        Raises:
            ImageError: it cannot be read, lies behind a link, or exceeds `MAX_FILE_BYTES`.
        """
        try:
            with self.open(path, os.O_RDONLY) as descriptor:
                if (num_bytes := os.fstat(descriptor).st_size) > MAX_FILE_BYTES:
                    raise ImageError(path, f"{num_bytes:,} bytes; at most {MAX_FILE_BYTES:,} are read")
                with os.fdopen(descriptor, "rb", closefd=False) as file:
                    return file.read()
        except OSError as error:
            raise ImageError(path, f"cannot be read: {error.strerror}") from error
        except DatasetError as error:
            raise ImageError(path, str(error)) from error

    def status(self, path: str) -> os.stat_result | None:
        """Of a file or link itself; None where there is none."""
        parent, _, name = path.rpartition("/")
        self._require(path)
        try:
            with self.folder(parent) as folder:
                return os.stat(name, dir_fd=folder, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def link(self, source: str, target: str) -> None:
        """Give a file a second name, below folders that are made where they are missing.

        Raises:
            FileExistsError: there is something of that name; it stays as it is.
        """
        self._require(source, target)
        (source_folder, _, old), (target_folder, _, new) = source.rpartition("/"), target.rpartition("/")
        with self.folder(source_folder) as there, self.folder(target_folder, create=True) as here:
            os.link(old, new, src_dir_fd=there, dst_dir_fd=here, follow_symlinks=False)

    def remove(self, path: str) -> None:
        """Take one name of a file away."""
        parent, _, name = path.rpartition("/")
        self._require(path)
        with self.folder(parent) as folder:
            os.unlink(name, dir_fd=folder)

    def settle(self, paths: Sequence[str]) -> None:
        """Return once the names in the folders of these files are on the disk."""
        for parent in dict.fromkeys(path.rpartition("/")[0] for path in paths):
            with self.folder(parent) as folder:
                os.fsync(folder)

    def _require(self, *paths: str) -> None:
        for path in paths:
            if not is_path(path):
                raise DatasetError(f"{path!r} leads out of {self.root}, or is no path")


@dataclass(frozen=True, eq=False)
class BeneathSource:
    """The images of a tree with these names; read anew at each access."""

    tree: Tree
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> bytes:
        return self.tree.read_image(self.names[index])

    def path(self, index: int) -> Path:
        """The file behind a photo; `Tree` alone opens it."""
        return self.tree.root / self.names[index]

"""Where jaxcls keeps files: outputs, lasting data, and temporary data."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self
from urllib.parse import quote
from uuid import uuid4

from jaxcls.errors import UsageError

HOME_VARIABLE = "JAXCLS_HOME"
SCRATCH = "jaxcls"
PARTIAL = ".partial-"
"""What the names of files begin with that are being written."""
_in_use: "Storage | None" = None


@dataclass(frozen=True)
class Storage:
    """Three roots. Only the outermost layer asks for them; everything else is handed a path.

    Paths may be given as text; "~" is the user's folder. A program sets them once, before anything else:

        Storage(outputs="results", persistent="/data/jaxcls", temp="/scratch").use()

    Attributes:
        outputs: runs, classifiers and reports, for the user to look at.
        persistent: downloaded weights, pins and compiled programs, private to the user.
        temp: what is of use to one running process only.
    """

    outputs: Path
    persistent: Path
    temp: Path

    def __post_init__(self) -> None:
        for root in fields(self):
            object.__setattr__(self, root.name, Path(getattr(self, root.name)).expanduser())

    def use(self) -> Self:
        """Make this what `default` returns from now on, and return it.

        Raises:
            UsageError: another one is in use.
        """
        global _in_use
        if _in_use not in (None, self):
            raise UsageError(f"{_in_use!r} is in use already: set the storage once, where the program starts")
        _in_use = self
        return self

    @classmethod
    def default(cls) -> "Storage":
        """The one in `use`, else `JAXCLS_HOME`, else `./jaxcls_outputs` and the user's cache folder."""
        return _in_use or cls.from_environment(os.environ)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """As `default`, for the given environment variables."""
        if home := environment.get(HOME_VARIABLE):
            root = Path(home).expanduser()
            return cls(root / "outputs", root / "persistent", root / "temp")
        cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxcls"
        return cls(Path("jaxcls_outputs"), cache / "persistent", cache / "temp")

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield a new folder below `temp`, private to the user, which goes with the block."""
        self.temp.mkdir(parents=True, exist_ok=True)
        self.clean()
        with _temporary_folder(self.temp, SCRATCH) as folder:
            yield folder

    def clean(self) -> None:
        """Remove the scratch folders of this machine's processes that were killed; other users' stay."""
        for folder in _left_over(self.temp, SCRATCH):
            shutil.rmtree(folder, ignore_errors=True)

    def __str__(self) -> str:
        roots = {"outputs": self.outputs, "persistent": self.persistent, "temp": self.temp}
        return json.dumps({"storage": {name: str(path) for name, path in roots.items()}}, indent=2)


def make_private_folder(path: Path) -> Path:
    """Create `path`, readable by its owner alone (mode 0700), and return it."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.chmod(0o700)
    return path


@contextmanager
def whole_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new folder that becomes `path` once the block completes; else `path` stays as it was.

    What killed processes left beside `path` is removed first. One that was killed while it replaced `path`
    has put it aside: it is put back.

    Args:
        path: what is written; folders above it are made.
        replace: what is at `path`.

    Raises:
        FileExistsError: something is at `path`, before the block or by its end, and is not to be replaced.
        OSError: the folder cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in _left_over(path.parent, f".{path.name}"):
        # Both are there from the first renaming to the second alone.
        if (left / "old").exists() and (left / "new").exists() and not os.path.lexists(path):
            (left / "old").rename(path)
        shutil.rmtree(left, ignore_errors=True)
    if not replace:
        _require_nothing(path)
    with _temporary_folder(path.parent, f".{path.name}") as scratch:
        new, old = scratch / "new", scratch / "old"
        new.mkdir()
        yield new
        if not replace:
            _require_nothing(path)
        if not os.path.lexists(path):
            new.rename(path)
            return
        path.rename(old)
        try:
            new.rename(path)
        except BaseException:  # Ctrl-C too: `old` goes with the scratch folder
            old.rename(path)
            raise


def _require_nothing(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def write_whole(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write or replace a file in one step: whoever reads it finds all of it, or what was there before.

    Several processes may write the same file. A process that is killed leaves a hidden one beside it.

    Args:
        path: the file; its folder is there.
        content: all of it.
        mode: its permissions, less those that the process gives to no file (umask).
    """
    partial = path.with_name(f"{PARTIAL}{uuid4().hex}")
    try:
        partial.touch(mode)
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Remove what killed processes were writing into a folder, in which nobody else is writing now."""
    for partial in folder.glob(f"{PARTIAL}*"):
        partial.unlink(missing_ok=True)


@contextmanager
def _temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield a new folder, which goes with the block; as long as its process lives it is not left over."""
    with ExitStack() as stack:
        yield _make_locked(parent, name, stack)


def _make_locked(parent: Path, name: str, stack: ExitStack) -> Path:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(name), dir=parent))
        try:
            is_ours = stack.enter_context(locked(folder))
        except FileNotFoundError:
            continue
        except OSError:  # a file system without locks, on which nothing passes for left over
            is_ours = True
        if is_ours and folder.exists():  # else it passed for left over before it was locked
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            return folder


def _left_over(parent: Path, name: str) -> Iterator[Path]:
    """Yield, locked, each temporary folder of that name whose process, on this machine, was killed.

    What cannot be read or locked, such as another user's, is passed over.
    """
    pattern = re.compile(re.escape(_prefix(name)) + "[a-z0-9_]{8}")  # as `tempfile` completes it
    folders = []
    with suppress(OSError):
        folders = [path for path in parent.iterdir() if pattern.fullmatch(path.name)]
    for folder in folders:
        with suppress(OSError), locked(folder) as is_ours:
            if is_ours:
                yield folder


def _prefix(name: str) -> str:
    # Of this machine, since on a file system that several share, locks may hold for one of them only.
    return f"{name}+{quote(socket.gethostname(), safe='')}+"


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Lock a folder while the block runs; at the latest, the lock ends with the process.

    Args:
        folder: what is locked, for all processes and threads that ask.
        wait: until it is free. Else yield False where somebody else has it.

    Raises:
        OSError: the folder cannot be read, or its file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            is_ours = True
        except BlockingIOError:
            is_ours = False
        yield is_ours
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Where jaxcls keeps files: outputs, lasting data, and temporary data."""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

from jaxcls.errors import UsageError

HOME_VARIABLE = "JAXCLS_HOME"
SCRATCH_PREFIX = "jaxcls-"
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
        """Yield a new folder below `temp`, which goes with the block."""
        self.temp.mkdir(parents=True, exist_ok=True)
        self.clean()
        with ExitStack() as stack:
            with locked(self.temp, wait=True):  # a folder that is not locked yet would pass for a leftover
                made = tempfile.TemporaryDirectory(
                    prefix=SCRATCH_PREFIX, dir=self.temp, ignore_cleanup_errors=True
                )
                folder = Path(stack.enter_context(made))
                stack.enter_context(locked(folder))
            yield folder

    def clean(self) -> None:
        """Remove the scratch folders of processes that were killed."""
        if not self.temp.is_dir():
            return
        with locked(self.temp, wait=True):
            for folder in self.temp.glob(f"{SCRATCH_PREFIX}*/"):
                with locked(folder) as is_left_over:
                    if is_left_over:
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
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder that takes the place of `path` once the block completes; else `path` stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        yield new
        if not path.exists():
            new.rename(path)
            return
        path.rename(old)
        try:
            new.rename(path)
        except BaseException:  # Ctrl-C too: `old` goes with the scratch folder
            old.rename(path)
            raise


def write_whole(path: Path, content: bytes) -> None:
    """Write or replace a file in one step: whoever reads it finds all of it, or what was there before."""
    partial = path.with_name(f".{path.name}")
    partial.write_bytes(content)
    partial.replace(path)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Lock a folder while the block runs; at the latest, the lock ends with the process.

    Args:
        folder: what is locked, for all processes and threads that ask.
        wait: until it is free. Else yield False where somebody else has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
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

"""Where jaxcls keeps files: outputs, lasting data, and temporary data."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

HOME_VARIABLE = "JAXCLS_HOME"


@dataclass(frozen=True)
class Storage:
    """Three roots. Only the outermost layer asks for them; everything else is handed a path.

    Attributes:
        outputs: runs, classifiers and reports, for the user to look at.
        persistent: downloaded weights, pins and compiled programs, private to the user.
        temp: what may be deleted at any time.
    """

    outputs: Path
    persistent: Path
    temp: Path

    @classmethod
    def default(cls) -> Self:
        """The folders below `JAXCLS_HOME`; without it, `./jaxcls_outputs` and the user's cache folder."""
        return cls.from_environment(os.environ)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """As `default`, for the given environment variables."""
        if home := environment.get(HOME_VARIABLE):
            root = Path(home).expanduser()
            return cls(root / "outputs", root / "persistent", root / "temp")
        cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxcls"
        return cls(Path("jaxcls_outputs"), cache / "persistent", cache / "temp")

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


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

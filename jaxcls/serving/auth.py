"""The keys that clients of the service show."""

import hashlib
import hmac
import os
import re
import stat
from pathlib import Path
from typing import Self

from jaxcls.errors import UsageError

MIN_KEY_LENGTH = 16

# What RFC 6750 lets a bearer token be made of.
_KEY = re.compile(r"[A-Za-z0-9._~+/-]+=*")


class Keys:
    """The keys in a file, any of which opens the service. Only their digests are held in memory.

    The file is the owner's alone (mode 0600; of a symbolic link, the mode of what it leads to). Each line
    holds one key of 16 characters or more, out of letters, digits and `-._~+/`, `=` at the end; whatever
    follows a `#` is a comment.
    """

    def __init__(self, path: Path, digests: tuple[bytes, ...]) -> None:
        self.path = path
        self._digests = digests

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a key file.

        Raises:
            UsageError: it cannot be read, is open to others, holds no key, or a line that is none.
        """
        return cls(Path(path), _read_digests(Path(path)))

    def reload(self) -> None:
        """Take the keys that the file holds now; where it raises, those held so far stay.

        Raises:
            UsageError: as for `read`.
        """
        self._digests = _read_digests(self.path)

    def accepts(self, authorization: str | None) -> bool:
        """Whether an `Authorization` header shows one of the keys: `Bearer KEY`.

        The time that it takes says nothing about the keys.
        """
        scheme, _, key = (authorization or "").partition(" ")
        digest = _digest(key.strip(" "))
        found = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, always
        return scheme.lower() == "bearer" and any(found)

    def __repr__(self) -> str:
        return f"Keys({str(self.path)!r}, {len(self._digests)} keys)"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="backslashreplace")).digest()


def _read_digests(path: Path) -> tuple[bytes, ...]:
    digests = []
    for number, line in enumerate(_read_private(path).splitlines(), start=1):
        key = line.partition("#")[0].strip()
        if key and (len(key) < MIN_KEY_LENGTH or not _KEY.fullmatch(key)):
            # The message goes to logs: it does not repeat the line.
            raise UsageError(
                f"{path}, line {number}: a key has {MIN_KEY_LENGTH} characters or more: "
                "letters, digits and -._~+/ with = at the end"
            )
        if key:
            digests.append(_digest(key))
    if not digests:
        raise UsageError(f"{path} holds no key: write one a line")
    return tuple(digests)


def _read_private(path: Path) -> str:
    """The text of a file that is its owner's alone."""
    try:
        # O_NONBLOCK: opening a named pipe does not wait for its writer.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise UsageError(f"{path}: not a regular file, as a file of keys must be")
            if stat.S_IMODE(mode) & ~0o600:
                raise UsageError(f"{path} can be read by others than its owner: chmod 600 {path}")
            return file.read().decode(errors="replace")
    except OSError as error:
        raise UsageError(f"{path}: the file of keys cannot be read: {error.strerror}") from error

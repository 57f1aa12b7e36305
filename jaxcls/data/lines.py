"""Ids as lines of text files: those that hold a line's end or a backslash are escaped as `sha256sum` does."""

import re

MARK = "\\"
"""What an escaped line begins with."""
_ESCAPES = {MARK: r"\\", "\n": r"\n", "\r": r"\r"}
_PLAIN = {escaped: character for character, escaped in _ESCAPES.items()}


def escape(name: str) -> str:
    """`name` without line ends; it is as it was unless it holds some, or backslashes."""
    return re.sub(r"[\\\n\r]", lambda found: _ESCAPES[found[0]], name)


def unescape(escaped: str) -> str:
    """What `escape` made this of."""
    return re.sub(r"\\[\\nr]", lambda found: _PLAIN[found[0]], escaped)


def to_line(name: str) -> str:
    """An id as a line, without its end: the id itself, or `MARK` and the escaped id."""
    escaped = escape(name)
    return name if escaped == name else MARK + escaped


def from_line(line: str) -> str:
    """The id that a line holds, or the line itself where `to_line` did not write it."""
    name = unescape(line.removeprefix(MARK))
    return name if to_line(name) == line else line

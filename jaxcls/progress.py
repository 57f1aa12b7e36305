"""Progress of long work: a bar on a terminal's standard error, nothing elsewhere."""

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def show_progress(items: Iterable[T], description: str, total: int) -> Iterable[T]:
    """The same items, counted as they pass."""
    console = Console(stderr=True)
    return track(items, description, total, console=console, transient=True, disable=not console.is_terminal)


def format_bytes(number: int) -> str:
    """As people say it: "1.5 GiB"."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"

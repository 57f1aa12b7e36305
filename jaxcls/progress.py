"""Progress of long work: a bar on a terminal's standard error, nothing elsewhere."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")
MOST_AT_ONCE = 256
"""Calls that a thread takes on at once,"""
LEAST_PARTS = 256
"""unless all of them would be so few parts."""


def show_progress(items: Iterable[T], description: str, total: int) -> Iterable[T]:
    """The same items, counted as they pass."""
    console = Console(stderr=True)
    return track(items, description, total, console=console, transient=True, disable=not console.is_terminal)


def map_threads(function: Callable[[int], T], count: int, description: str | None) -> Iterator[T]:
    """`function(0)`, ..., `function(count - 1)`, worked out on all cores, in order; an error ends it.

    Args:
        function: what threads may call at once.
        count: how many there are. Whatever their number, little is kept of what is waiting.
        description: of the bar; None: no bar.
    """
    # A future of the pool takes a kilobyte: a million at once would not be little.
    size = max(1, min(MOST_AT_ONCE, count // LEAST_PARTS))

    def work(start: int) -> list[T]:
        return [function(index) for index in range(start, min(start + size, count))]

    with ThreadPoolExecutor() as pool:
        results = chain.from_iterable(pool.map(work, range(0, count, size)))
        yield from results if description is None else show_progress(results, description, count)


def format_bytes(number: int) -> str:
    """As people say it: "1.5 GiB"."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"

"""Signals that reach a training process: Ctrl-C held off, a request to end noticed. Main thread only."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

TERMINATED = 128 + signal.SIGTERM
"""The exit code of a process that ended because it was asked to: 143, as shells report it."""


@contextmanager
def no_interrupts() -> Iterator[None]:
    """Hold off Ctrl-C."""
    with _handled(signal.SIGINT, signal.SIG_IGN):
        yield


@contextmanager
def watch_termination() -> Iterator[threading.Event]:
    """Within, SIGTERM sets the event instead of ending the process."""
    asked = threading.Event()
    with _handled(signal.SIGTERM, lambda *_: asked.set()):
        yield asked


@contextmanager
def _handled(number: signal.Signals, handler: Callable[..., Any] | signal.Handlers) -> Iterator[None]:
    # Signals reach the main thread alone, and no other may say what becomes of them.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)

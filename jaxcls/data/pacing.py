"""Requests to many hosts, a burden to none: few at a time, not too often, again after a pause."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from jaxcls.errors import DownloadError, UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """How many requests are sent, and how often.

    Attributes:
        num_requests: most under way to all hosts.
        num_per_host: most under way to one host.
        interval_seconds: shortest time from the start of one request to a host to the start of the next.
        num_attempts: how often a request is sent whose failure may pass.
        pause_seconds: before the second attempt; twice as long before each further one.
        max_pause_seconds: where a host asks for a longer pause (Retry-After), the request fails.

    Raises:
        UsageError: fewer than one of something, or a negative time.
    """

    num_requests: int = 16
    num_per_host: int = 2
    interval_seconds: float = 0.2
    num_attempts: int = 3
    pause_seconds: float = 1.0
    max_pause_seconds: float = 60.0

    def __post_init__(self) -> None:
        if min(self.num_requests, self.num_per_host, self.num_attempts) < 1:
            raise UsageError("num_requests, num_per_host and num_attempts are 1 or more")
        if not all(s >= 0 for s in (self.interval_seconds, self.pause_seconds, self.max_pause_seconds)):
            raise UsageError("interval_seconds, pause_seconds and max_pause_seconds are 0 or more")


POLITE = Limits()


class Pacer:
    """Sends requests as `limits` allow. Belongs to one event loop."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._slots = asyncio.Semaphore(limits.num_requests)
        self._hosts: defaultdict[str, _Host] = defaultdict(partial(_Host, limits))

    async def send(self, request: Callable[[], Awaitable[T]]) -> T:
        """What `request`, which waits for the turns that it needs, returns; anew where its failure may pass.

        Raises:
            DownloadError: of the last attempt.
        """
        attempt = 1
        while True:
            try:
                return await request()
            except DownloadError as error:
                if attempt == self._limits.num_attempts or not self._may_pass(error):
                    raise
            await asyncio.sleep(self._limits.pause_seconds * 2 ** (attempt - 1))
            attempt += 1

    @asynccontextmanager
    async def turn(self, host: str) -> AsyncIterator[None]:
        """Wait until a request may be sent to `host`, and send it within. Nobody waits for two turns at once.

        Where it raises a DownloadError with a Retry-After, the host is left alone for so long.
        """
        turns = self._hosts[host]
        # The host's slot first: who waits for a busy host keeps no other from being asked.
        async with turns.turn(), self._slots:
            try:
                yield
            except DownloadError as error:
                if self._may_pass(error):
                    turns.rest(error.retry_after)
                raise

    def _may_pass(self, error: DownloadError) -> bool:
        return error.is_transient and error.retry_after <= self._limits.max_pause_seconds


class _Host:
    def __init__(self, limits: Limits) -> None:
        self._interval = limits.interval_seconds
        self._slots = asyncio.Semaphore(limits.num_per_host)
        self._next = 0.0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        async with self._slots:
            now = asyncio.get_running_loop().time()
            start = max(now, self._next)
            self._next = start + self._interval
            await asyncio.sleep(start - now)
            yield

    def rest(self, seconds: float) -> None:
        """Leave the host alone for so long, as it asked."""
        self._next = max(self._next, asyncio.get_running_loop().time() + seconds)

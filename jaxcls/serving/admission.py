"""Who is let in: images and bytes are counted before any work is done for them."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jaxcls.errors import RequestError

TOO_MANY, UNAVAILABLE = 429, 503


class Admission:
    """Counts what was taken in and not yet answered.

    Args:
        max_images, max_bytes: the bounds.
        max_wait: in seconds, how long an image may be expected to wait.
        seconds_per_image: what an image takes while the service is busy, as measured so far.

    Attributes:
        is_closed: refuse all from now on.
        num_images, num_bytes: taken in.
    """

    def __init__(
        self, max_images: int, max_bytes: int, max_wait: float, seconds_per_image: Callable[[], float]
    ) -> None:
        self.is_closed = False
        self.num_images = self.num_bytes = 0
        self._max_images, self._max_bytes, self._max_wait = max_images, max_bytes, max_wait
        self._seconds_per_image = seconds_per_image

    def require_room(self) -> None:
        """Raise RequestError, 429 or 503, unless one more image would be taken in; before a body is read."""
        self._require(1, 0)

    @contextmanager
    def images(self, count: int) -> Iterator[None]:
        """Take images in for as long as the context lasts.

        Raises:
            RequestError: 413, more than are ever taken in; 429, more than now; 503, none any more.
        """
        if count > self._max_images:
            raise RequestError(413, f"{count} images; at most {self._max_images} are taken in at once")
        self._require(count, 0)
        self.num_images += count
        try:
            yield
        finally:
            self.num_images -= count

    @contextmanager
    def bytes(self, count: int) -> Iterator[None]:
        """The same for so many bytes of request bodies."""
        self._require(0, count)
        self.num_bytes += count
        try:
            yield
        finally:
            self.num_bytes -= count

    def _require(self, num_images: int, num_bytes: int) -> None:
        wait = self.num_images * self._seconds_per_image()
        retry_after = max(math.ceil(wait), 1)
        if self.is_closed:
            raise RequestError(UNAVAILABLE, "this replica is shutting down", retry_after=retry_after)
        if self.num_images + num_images > self._max_images or self.num_bytes + num_bytes > self._max_bytes:
            raise RequestError(TOO_MANY, "the queue is full: come again later", retry_after=retry_after)
        if num_images and wait > self._max_wait:
            problem = f"the wait would be {wait:.1f} s, beyond the deadline: come again later"
            raise RequestError(TOO_MANY, problem, retry_after=retry_after)

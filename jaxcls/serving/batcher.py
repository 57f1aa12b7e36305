"""The micro-batcher: images of many requests are scored together, each as if it were alone.

What is there when the device becomes free makes the next batch, of a size that was compiled. Nothing waits
for company while the device is idle.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LOGGER = logging.getLogger(__name__)
SMOOTHING = 0.1
"""Weight of the newest measurement in a running mean."""
NUM_FAILURES = 2
"""Images that the device may fail on before it counts as broken."""


class ExpiredError(Exception):
    """The deadline passed before the images were scored."""


@dataclass(eq=False, slots=True)
class _Item:
    images: np.ndarray
    deadline: float
    arrival: float
    scores: asyncio.Future[np.ndarray]


class _Batch(NamedTuple):
    size: int
    items: Sequence[_Item]


class Batcher:
    """Scores images that come one by one in batches; to be used from one event loop.

    Args:
        score: uint8 [B, H, W, 3] -> float32 [B, K], for every B in `seconds`; called from threads.
        seconds: what a batch takes, by size, on an idle machine. They decide on sizes; how much slower the
            batches are in fact is one number for all sizes, since what is measured of each while it happens
            to be used would keep a size that was unlucky once from ever being used again.
        num_classes: K.
        max_in_flight: batches given to the device at once.
        linger: seconds that images may wait for company while the device is busy with another batch.
        observe: called with size, number of images and seconds of every batch that was scored.

    Attributes:
        broken: set when the device failed on so many single images that it must be restarted.
        num_waiting: images that are not yet in a batch.
    """

    def __init__(
        self,
        score: Callable[[np.ndarray], np.ndarray],
        seconds: Mapping[int, float],
        num_classes: int,
        *,
        max_in_flight: int = 1,
        linger: float = 0.0,
        observe: Callable[[int, int, float], None] = lambda size, num_images, seconds: None,
    ) -> None:
        self.broken = asyncio.Event()
        self.num_waiting = 0
        self._score = score
        self._seconds = dict(sorted(seconds.items()))
        self._slowdown = 1.0
        self._no_scores = np.full((1, num_classes), np.nan, np.float32)
        self._max_in_flight = max_in_flight
        self._linger = linger
        self._observe = observe
        self._queue: deque[_Item] = deque()
        self._pool = ThreadPoolExecutor(max_in_flight, "device")
        self._running: set[asyncio.Task[None]] = set()
        self._num_failures = 0

    @property
    def largest(self) -> int:
        """The largest batch size."""
        return max(self._seconds)

    @property
    def seconds_per_image(self) -> float:
        """What an image takes at present in a full batch of the best size."""
        return self._slowdown * min(seconds / size for size, seconds in self._seconds.items())

    async def score(self, images: np.ndarray, deadline: float) -> np.ndarray:
        """Score images of one request.

        Args:
            images: uint8 [n, H, W, 3], any n.
            deadline: of the event loop's clock; images that are not in a batch by then are dropped.

        Returns:
            float32 [n, K]; the row of an image that the device alone fails on is NaN.

        Raises:
            ExpiredError: the deadline has passed.
        """
        starts = range(0, len(images), self.largest)
        parts = [self._enqueue(images[start : start + self.largest], deadline) for start in starts]
        self._dispatch()
        return np.concatenate(await asyncio.gather(*parts)) if len(parts) > 1 else await parts[0]

    def _enqueue(self, images: np.ndarray, deadline: float) -> asyncio.Future[np.ndarray]:
        loop = asyncio.get_running_loop()
        item = _Item(images, deadline, loop.time(), loop.create_future())
        self._queue.append(item)
        self.num_waiting += len(images)
        return item.scores

    def _dispatch(self) -> None:
        loop = asyncio.get_running_loop()
        while len(self._running) < self._max_in_flight:
            self._drop_useless(loop.time())
            if not self._queue:
                return
            if self._running and (wait := self._rest_of_linger(loop.time())) > 0:
                loop.call_later(wait, self._dispatch)
                return
            task = loop.create_task(self._run(self._take()))
            self._running.add(task)
            task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._dispatch()

    def _drop_useless(self, now: float) -> None:
        """Forget what nobody waits for any more, wherever in the queue it is."""
        kept = deque[_Item]()
        for item in self._queue:
            if item.deadline < now and not item.scores.done():
                item.scores.set_exception(ExpiredError)
            if item.scores.done():
                self.num_waiting -= len(item.images)
            else:
                kept.append(item)
        self._queue = kept

    def _rest_of_linger(self, now: float) -> float:
        if self.num_waiting >= self.largest:
            return 0.0
        return self._queue[0].arrival + self._linger - now

    def _take(self) -> _Batch:
        """The batch that scores most images a second, of those that the front of the queue can make."""
        sums = np.cumsum([len(item.images) for item in self._queue])
        batches = [(size, int((sums <= size).sum())) for size in self._seconds]
        size, num_items = max(
            ((size, num_items) for size, num_items in batches if num_items),
            key=lambda batch: sums[batch[1] - 1] / self._seconds[batch[0]],
        )
        items = [self._queue.popleft() for _ in range(num_items)]
        self.num_waiting -= int(sums[num_items - 1])
        return _Batch(size, items)

    async def _run(self, batch: _Batch) -> None:
        scores = await self._scores_of(batch)
        start = 0
        for item in batch.items:
            if not item.scores.done():
                item.scores.set_result(scores[start : start + len(item.images)])
            start += len(item.images)

    async def _scores_of(self, batch: _Batch) -> np.ndarray:
        try:
            return await self._execute(batch.size, (item.images for item in batch.items))
        except Exception:  # of any kind: one image's failure must not be its neighbours'
            LOGGER.exception("a batch of %d failed; its images are tried one by one", batch.size)
        rows = [await self._row_of(image[None]) for item in batch.items for image in item.images]
        return np.concatenate(rows)

    async def _row_of(self, image: np.ndarray) -> np.ndarray:
        """float32 [1, K]; NaN if the device fails on it."""
        if not self.broken.is_set():
            try:
                return await self._execute(min(self._seconds), [image])
            except Exception:
                LOGGER.exception("the device failed on a single image")
                self._num_failures += 1
                if self._num_failures >= NUM_FAILURES:
                    self.broken.set()
        return self._no_scores

    async def _execute(self, size: int, parts: Iterable[np.ndarray]) -> np.ndarray:
        images = list(parts)
        loop = asyncio.get_running_loop()
        scores, seconds = await loop.run_in_executor(self._pool, self._score_padded, size, images)
        self._slowdown += SMOOTHING * (seconds / self._seconds[size] - self._slowdown)
        self._observe(size, len(scores), seconds)
        return scores

    def _score_padded(self, size: int, parts: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
        started = time.perf_counter()
        num_images = sum(map(len, parts))
        padding = np.zeros((size - num_images, *parts[0].shape[1:]), np.uint8)
        batch = np.concatenate([*parts, padding]) if len(parts) > 1 or len(padding) else parts[0]
        scores = self._score(batch)[:num_images]
        return scores, time.perf_counter() - started

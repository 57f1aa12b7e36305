"""One classifier's service, before HTTP: images of any kind are decoded, scored and answered one by one."""

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np
from PIL import Image

from jaxcls.classifier import Classifier
from jaxcls.data.images import open_photo
from jaxcls.errors import DownloadError, ImageError, RequestError
from jaxcls.evaluation.thresholds import are_below
from jaxcls.predictions import probabilities
from jaxcls.serving.batcher import SMOOTHING, Batcher, ExpiredError
from jaxcls.serving.wire import Answer, Job, Url

Fetch = Callable[[str], bytes]
NUM_FETCHES = 16
"""URLs fetched at once."""


class Service:
    """From jobs to answers.

    Args:
        classifier: gives classes, thresholds and preprocessing.
        batcher: scores what it is given.
        max_pixels: refuse photos of more, before decoding them.
        fetch: gets the image behind a URL, or raises DownloadError, in a thread; None: URLs are refused.
    """

    def __init__(
        self, classifier: Classifier, batcher: Batcher, *, max_pixels: int, fetch: Fetch | None = None
    ) -> None:
        self.classifier = classifier
        self.batcher = batcher
        self._max_pixels = max_pixels
        self._fetch = fetch
        self._num_threads = os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self._num_threads, "decode")
        self._fetching = ThreadPoolExecutor(NUM_FETCHES, "fetch")
        self._decode_seconds = 0.0

    @property
    def seconds_per_image(self) -> float:
        """What an image takes while all threads and the device are busy."""
        return self._decode_seconds / self._num_threads + self.batcher.seconds_per_image

    async def answer(self, jobs: Sequence[Job], deadline: float) -> list[Answer]:
        """Score images; one that cannot be has its own error.

        Args:
            jobs: at least one.
            deadline: of the event loop's clock.

        Raises:
            RequestError: 503, the deadline has passed; 400, margins are asked for as probabilities.
        """
        if self.classifier.head.kind == "margin" and any(job.softmax for job in jobs):
            raise RequestError(
                400, "softmax: the scores are an SVM's margins, which no softmax makes probabilities"
            )
        try:
            async with asyncio.timeout_at(deadline):
                images = await asyncio.gather(*map(self._read, jobs))
                good = [image for image in images if not isinstance(image, str)]
                scores = iter(await self.batcher.score(np.stack(good), deadline) if good else ())
        except (TimeoutError, ExpiredError) as error:
            raise RequestError(503, "not scored within the deadline", retry_after=1) from error
        return [
            Answer(None, image) if isinstance(image, str) else self._answer(job, next(scores))
            for job, image in zip(jobs, images, strict=True)
        ]

    async def _read(self, job: Job) -> np.ndarray | str:
        """The network's input, or why there is none."""
        image, size = job.image, self.classifier.preprocess.size
        if isinstance(image, np.ndarray) and image.shape == (size, size, 3) and job.resize is None:
            return image
        loop = asyncio.get_running_loop()
        try:
            if isinstance(image, Url):
                image = await self._download(image)
            return await loop.run_in_executor(self._pool, self._decode, image, job.resize)
        except (ImageError, DownloadError) as error:
            return str(error)

    async def _download(self, url: Url) -> bytes:
        if self._fetch is None:
            raise DownloadError("", "this service does not fetch images by URL: send their bytes")
        # With an event loop of its own: a body that comes byte by byte would hold this one up.
        return await asyncio.get_running_loop().run_in_executor(self._fetching, self._fetch, url.address)

    def _decode(self, image: bytes | np.ndarray, resize: tuple[int, int] | None) -> np.ndarray:
        started = perf_counter()
        preprocess = self.classifier.preprocess
        if isinstance(image, np.ndarray):
            picture = Image.fromarray(image)
        else:
            photo = open_photo(image, max_pixels=self._max_pixels)
            picture = photo.decode(preprocess.short_side if resize is None else min(resize))
        if resize is not None:
            if resize[0] * resize[1] > self._max_pixels:
                raise ImageError("", f"image_resize_dims {list(resize)}: at most {self._max_pixels:,} pixels")
            picture = picture.resize(resize, Image.Resampling.BILINEAR)
        pixels = preprocess.resize_and_crop(picture)
        self._decode_seconds += SMOOTHING * (perf_counter() - started - self._decode_seconds)
        return pixels

    def _answer(self, job: Job, scores: np.ndarray) -> Answer:
        if not np.isfinite(scores).all():
            return Answer(None, "the network gave no finite scores for this image", status=500)
        head = self.classifier.head
        best = int(scores.argmax())
        abstained = head.thresholds is not None and bool(are_below(scores[None], head.thresholds)[0])
        if job.softmax:
            scores = probabilities(scores, head.kind)
        return Answer(scores, None, None if abstained else self.classifier.classes[best], abstained)

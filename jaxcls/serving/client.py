"""The client of a scoring service, for asyncio and without: retries within a deadline, scores whole folders.

Scoring twice does no harm. So what was refused for now, or lost on the way, is sent again.
"""

import asyncio
import ipaddress
import itertools
import json
import math
import random
import threading
import weakref
from base64 import b64encode
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Self, TypeVar, get_args

import httpx2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jaxcls.data.download import fetch, is_url, read_retry_after
from jaxcls.data.images import read_bytes
from jaxcls.errors import DownloadError, ImageError, JaxclsError, ServiceError, UsageError
from jaxcls.predictions import Kind, Predictions
from jaxcls.progress import show_progress

T = TypeVar("T")

ImageInput = str | Path | bytes | NDArray[np.uint8]
"""A path, an http(s) URL, an encoded image, or uint8 [H, W, 3]."""

DEADLINE_SECONDS = 30.0
CONNECT_SECONDS = 5.0
"""A host that has not answered by then is tried anew."""
FIRST_PAUSE_SECONDS, MAX_DOUBLINGS = 0.1, 5
"""The longest first pause, and how often it doubles: to 3.2 s."""
MAX_CONNECTIONS = 100

_BUSY = (429, 503)
_WRONG_SERVICE = (301, 302, 303, 307, 308, 401, 403, 404, 405)
"""Address or key are wrong: no image would fare better than another."""
_MALFORMED = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)
"""What reading an answer raises that is not as it should be."""
_LOST = (httpx2.NetworkError, httpx2.TimeoutException, httpx2.RemoteProtocolError, httpx2.ProxyError)


class _UnavailableError(ServiceError):
    """The service is not there, or not for us, whatever we send."""


class _TemporaryError(ServiceError):
    """Worth another attempt, `retry_after` seconds later at the earliest."""

    def __init__(self, message: str, *, status: int | None = None, retry_after: float = 0.0) -> None:
        super().__init__(message, status=status)
        self.retry_after = retry_after


class AsyncClient:
    """A scoring service as asyncio code sees it. Use it in `async with`, or call `aclose` in the end.

    Connections stay open between requests. Connection errors, lost answers and the statuses 429 and 503 are
    tried again after random, growing pauses, never sooner than the service's Retry-After says; so are the
    errors of a proxy that has lost the service. Anything else is an error at once.

    Args:
        url: the service's address, such as http://127.0.0.1:8000; its /score address will do.
        key: the key, if the service asks for one.
        deadline: seconds that a request may take, all its attempts and pauses together.

    Raises:
        UsageError: no http(s) address, a key that no header can hold, or a deadline that is not positive.
    """

    def __init__(self, url: str, key: str | None = None, *, deadline: float = DEADLINE_SECONDS) -> None:
        if not deadline > 0:
            raise UsageError(f"deadline is {deadline}: give a positive number of seconds")
        self.url = url.rstrip("/").removesuffix("/score")
        self.deadline = deadline
        self._http = httpx2.AsyncClient(
            headers={} if key is None else {"Authorization": f"Bearer {_check_key(key)}"},
            timeout=None,
            limits=httpx2.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_CONNECTIONS),
            # No proxy of the environment's reaches this machine's own addresses.
            trust_env=not is_loopback(_host(self.url)),
        )

    def __repr__(self) -> str:
        return f"AsyncClient({self.url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def is_ready(self) -> bool:
        """Whether the service takes requests now. Asked once, without retries."""
        try:
            async with asyncio.timeout(self.deadline):
                response = await self._http.get(f"{self.url}/v2/health/ready")
        except (httpx2.HTTPError, TimeoutError):
            return False
        return response.status_code == httpx2.codes.OK

    async def score(
        self,
        images: Iterable[ImageInput],
        *,
        softmax: bool = False,
        image_resize_dims: tuple[int, int] | None = None,
    ) -> list[str]:
        """Score images in one request; return what the service says of each, for `parse_result`.

        Args:
            images: paths, http(s) URLs of the public internet, encoded images or uint8 [H, W, 3] arrays.
            softmax: probabilities in place of the scores as they are.
            image_resize_dims: width and height to resize to first.

        Raises:
            ImageError: an image that cannot be read here.
            DownloadError: an image that cannot be fetched.
            ServiceError: the service refuses, or gives no good answer within the deadline.
            UsageError: no images, or something that is none.
        """
        named = _with_ids(images)
        parameters = _parameters(softmax, image_resize_dims)
        bodies = await asyncio.gather(*(_encode(*image) for image in named))
        request = [{"image_in_base64": b64encode(body).decode(), "parameters": parameters} for body in bodies]
        read = partial(_read_texts, count=len(named))
        return await self._ask("/score", "application/json", json.dumps(request).encode(), read)

    async def predict(
        self,
        images: Iterable[ImageInput],
        *,
        softmax: bool = False,
        image_resize_dims: tuple[int, int] | None = None,
        concurrency: int = 8,
        batch_size: int = 1,
        progress: bool = False,
    ) -> Predictions:
        """Score any number of images, of which no more are in memory than are under way.

        Once the service has been out of reach for a whole deadline, or says that address or key are wrong,
        the images that are left get this message untried; what was scored is kept.

        Args:
            images, softmax, image_resize_dims: as for `score`.
            concurrency: how many requests are under way at a time.
            batch_size: images per request. Those of a request that is refused are sent one by one.
            progress: show a progress bar.

        Returns:
            Predictions, in order. An image that could not be scored has its message in `errors` and NaN
            scores. Ids are the paths and URLs, else the positions.

        Raises:
            ServiceError: not one image was scored, so that not even the classes are known.
            UsageError: no images, something that is none, or a count below 1.
        """
        if min(concurrency, batch_size) < 1:
            raise UsageError(f"concurrency {concurrency}, batch_size {batch_size}: both must be at least 1")
        run = _Run(_with_ids(images), _parameters(softmax, image_resize_dims))
        everything = range(len(run.images))
        batches = [everything[start : start + batch_size] for start in everything[::batch_size]]
        waiting = iter(show_progress(batches, "scoring", len(batches)) if progress else batches)

        async def work() -> None:
            for batch in waiting:
                try:
                    await self._predict(batch, run)
                except _UnavailableError as error:
                    for index in itertools.chain(batch, *waiting):
                        run.fail(index, error)

        async with asyncio.TaskGroup() as workers:
            for _ in range(concurrency):
                workers.create_task(work())
        return run.predictions()

    async def _predict(self, batch: Sequence[int], run: "_Run") -> None:
        """Score some images of a run in one request; where that is refused, in one for each.

        Raises:
            _UnavailableError: it would be the same with any other image.
        """
        bodies = {}
        for index in batch:
            try:
                bodies[index] = await _encode(*run.images[index])
            except JaxclsError as error:
                run.fail(index, error)
        if not bodies:
            return
        content_type, body = _predict_body(list(bodies.values()), run.parameters)
        read = partial(_read_predictions, count=len(bodies))
        try:
            predictions = await self._ask("/v1/predict", content_type, body, read)
        except _UnavailableError:
            raise
        except ServiceError as error:
            is_refused = error.status is not None and error.status not in _BUSY
            for index in bodies:
                if is_refused and len(bodies) > 1:
                    await self._predict([index], run)
                else:
                    run.fail(index, error)
            return
        for index, prediction in zip(bodies, predictions, strict=True):
            run.add(index, prediction)

    async def _ask(self, path: str, content_type: str, body: bytes, read: Callable[[Any], T]) -> T:
        """Post `body` and `read` the JSON that comes back.

        Raises:
            ServiceError: there is no answer, or not a good one.
        """
        url = self.url + path
        answer = await self._post(url, content_type, body)
        try:
            return read(json.loads(answer))
        except _MALFORMED as error:
            raise ServiceError(f"{url}: not the answer of a scoring service: {error}", status=200) from error

    async def _post(self, url: str, content_type: str, body: bytes) -> bytes:
        """Try until there is an answer; not even a pause exceeds the deadline."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self.deadline
        for attempt in itertools.count(1):
            try:
                async with asyncio.timeout_at(end):
                    return await self._post_once(url, content_type, body, end - loop.time())
            except _TemporaryError as error:
                failure = error
            except TimeoutError:
                failure = _TemporaryError("no answer", retry_after=math.inf)
            pause = pause_seconds(attempt, failure.retry_after)
            if loop.time() + pause >= end:
                break
            await asyncio.sleep(pause)
        is_unreachable = isinstance(failure.__cause__, httpx2.ConnectError | httpx2.ConnectTimeout)
        raise (_UnavailableError if is_unreachable else ServiceError)(
            f"{url}: {failure} (attempt {attempt}, the last within {self.deadline:g} s)",
            status=failure.status,
        ) from failure

    async def _post_once(self, url: str, content_type: str, body: bytes, seconds: float) -> bytes:
        # Half of the time left: of a host that is not there, the last attempt shall say so.
        timeout = httpx2.Timeout(None, connect=min(CONNECT_SECONDS, seconds / 2))
        headers = {"Content-Type": content_type}
        try:
            response = await self._http.post(url, content=body, headers=headers, timeout=timeout)
        except _LOST as error:
            raise _TemporaryError(str(error) or type(error).__name__) from error
        except httpx2.HTTPError as error:
            raise ServiceError(f"{url}: {error}") from error
        status = response.status_code
        if status == httpx2.codes.OK:
            return response.content
        if status in _BUSY:
            seconds = read_retry_after(response.headers.get("Retry-After", ""))
            raise _TemporaryError(_reason(response), status=status, retry_after=seconds)
        if status >= httpx2.codes.INTERNAL_SERVER_ERROR and _words(response) is None:
            raise _TemporaryError(_reason(response))  # a proxy's answer, in place of one that was lost
        kind = _UnavailableError if status in _WRONG_SERVICE else ServiceError
        raise kind(f"{url}: {_reason(response)}", status=status)


class Client:
    """A scoring service: `AsyncClient` without `await`. Use it in `with`, or call `close` in the end.

    Any thread may use it, also one whose event loop is running, as in notebooks.

    Args:
        url, key, deadline: as for `AsyncClient`.

    Raises:
        UsageError: as `AsyncClient`.
    """

    def __init__(self, url: str, key: str | None = None, *, deadline: float = DEADLINE_SECONDS) -> None:
        self._client = AsyncClient(url, key, deadline=deadline)
        # With a factory the runner leaves the calling thread's own loop alone.
        runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = runner.get_loop()
        self._thread = threading.Thread(target=_run_until_stopped, args=(runner, self._client), daemon=True)
        self._thread.start()
        # Stops it also where nobody calls `close`.
        self._stop = weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)

    def __repr__(self) -> str:
        return f"Client({self._client.url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._stop()
        self._thread.join()

    def is_ready(self) -> bool:
        """As `AsyncClient.is_ready`."""
        return self._wait_for(self._client.is_ready())

    def score(
        self,
        images: Iterable[ImageInput],
        *,
        softmax: bool = False,
        image_resize_dims: tuple[int, int] | None = None,
    ) -> list[str]:
        """As `AsyncClient.score`."""
        work = self._client.score(images, softmax=softmax, image_resize_dims=image_resize_dims)
        return self._wait_for(work)

    def predict(
        self,
        images: Iterable[ImageInput],
        *,
        softmax: bool = False,
        image_resize_dims: tuple[int, int] | None = None,
        concurrency: int = 8,
        batch_size: int = 1,
        progress: bool = False,
    ) -> Predictions:
        """As `AsyncClient.predict`."""
        work = self._client.predict(
            images,
            softmax=softmax,
            image_resize_dims=image_resize_dims,
            concurrency=concurrency,
            batch_size=batch_size,
            progress=progress,
        )
        return self._wait_for(work)

    def _wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()  # if Ctrl-C has ended the waiting


def _run_until_stopped(runner: asyncio.Runner, client: AsyncClient) -> None:
    with runner:  # cancels in the end what is under way
        runner.get_loop().run_forever()
        runner.get_loop().run_until_complete(client.aclose())


@dataclass(frozen=True, eq=False)
class _Scored:
    """What the service says of an image that it has scored."""

    classes: tuple[str, ...]
    kind: Kind
    scores: NDArray[np.float32]
    abstained: bool


class _Run:
    """A call of `predict`: its images, and what is known of each so far."""

    def __init__(self, images: list[tuple[str, ImageInput]], parameters: Mapping[str, Any]) -> None:
        self.images = images
        self.parameters = parameters
        self.classes: tuple[str, ...] = ()
        self.kind: Kind = "logit"
        self.scores: dict[int, NDArray[np.float32]] = {}
        self.abstained = np.zeros(len(images), np.bool_)
        self.errors: dict[int, str] = {}

    def fail(self, index: int, error: JaxclsError | str) -> None:
        """Note why image `index` has no scores."""
        reason = error.reason if isinstance(error, ImageError | DownloadError) else str(error)
        self.errors[index] = str(ImageError(self.images[index][0], reason))

    def add(self, index: int, prediction: _Scored | str) -> None:
        """Note the service's scores for image `index`, or its error."""
        if isinstance(prediction, str):
            self.fail(index, prediction)
            return
        if not self.scores:
            self.classes, self.kind = prediction.classes, prediction.kind
        if (self.classes, self.kind) != (prediction.classes, prediction.kind):
            self.fail(index, "the service has changed its classes or scores meanwhile: score again")
            return
        self.scores[index] = prediction.scores
        self.abstained[index] = prediction.abstained

    def predictions(self) -> Predictions:
        """All that is known.

        Raises:
            ServiceError: no image was scored.
        """
        if not self.scores:
            raise ServiceError(f"none of {len(self.images)} images was scored: {self.errors[0]}")
        scores = np.full((len(self.images), len(self.classes)), np.nan, np.float32)
        for index, row in self.scores.items():
            scores[index] = row
        return Predictions(
            scores=scores,
            kind=self.kind,
            classes=self.classes,
            ids=tuple(name for name, _ in self.images),
            labels=None,
            abstained=self.abstained,
            errors=dict(sorted(self.errors.items())),
        )


def parse_result(text: str) -> NDArray[np.float32]:
    """The scores in one element of what `score` returns.

    Returns:
        float32 [K], in the order of the service's classes.

    Raises:
        ServiceError: the element is the service's error for this image, or holds no scores.
    """
    try:
        result = json.loads(text)
        if isinstance(result, dict):
            raise ServiceError(f"the image was not scored: {result['error']}")
        return _read_scores(result)
    except _MALFORMED as error:
        raise ServiceError(f"neither scores nor an error: {text[:100]!r}") from error


def pause_seconds(
    attempt: int, retry_after: float, uniform: Callable[[float, float], float] = random.uniform
) -> float:
    """Seconds to wait before the next attempt: full jitter, on top of what the service asks for.

    On top, because all who were told the same time would come back together.

    Args:
        attempt: how many attempts have failed, from 1.
        retry_after: seconds that the service asks for, else 0.
        uniform: draws a number between two.
    """
    return retry_after + uniform(0, FIRST_PAUSE_SECONDS * 2 ** min(attempt - 1, MAX_DOUBLINGS))


def _read_texts(answer: Any, count: int) -> list[str]:
    if not isinstance(answer, list) or len(answer) != count or not all(isinstance(t, str) for t in answer):
        raise ValueError(f"not a list of {count} strings")
    return answer


def _read_predictions(answer: Any, count: int) -> list[_Scored | str]:
    kind, predictions = answer["kind"], answer["predictions"]
    if kind not in get_args(Kind) or len(predictions) != count:
        raise ValueError(f"not {count} predictions of a known kind")
    return [_read_prediction(kind, prediction) for prediction in predictions]


def _read_prediction(kind: Kind, prediction: Any) -> _Scored | str:
    if prediction.get("error") is not None:
        return str(prediction["error"])
    scores = prediction["scores"]
    return _Scored(tuple(scores), kind, _read_scores(list(scores.values())), bool(prediction["abstained"]))


def _read_scores(values: Any) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        scores = np.asarray(values, np.float32)
    if scores.ndim != 1 or not scores.size or not np.isfinite(scores).all():
        raise ValueError("not a list of finite numbers")
    return scores


def _reason(response: httpx2.Response) -> str:
    """The status, and what the service says; else the status's name."""
    words = _words(response)
    return f"{response.status_code}: {response.reason_phrase if words is None else words}"


def _words(response: httpx2.Response) -> str | None:
    """What the service says of the request or its first image; None: it is not the service that speaks."""
    try:
        answer = response.json()
        return str(answer["error"] if "error" in answer else answer["predictions"][0]["error"])
    except _MALFORMED:
        return None


def _with_ids(images: Iterable[ImageInput]) -> list[tuple[str, ImageInput]]:
    """Each image with its id: the path or URL, odd bytes of a name escaped, or the position."""
    if isinstance(images, str | Path | bytes | np.ndarray):
        raise UsageError("images come as a list: put a single one in brackets")
    named: list[tuple[str, ImageInput]] = []
    for position, image in enumerate(images):
        if not isinstance(image, str | Path | bytes | np.ndarray):
            raise UsageError(f"item {position} is a {type(image).__name__}, not a path, URL, bytes or array")
        name = str(image if isinstance(image, str | Path) else position)
        named.append((name.encode(errors="backslashreplace").decode(), image))
    if not named:
        raise UsageError("there are no images to score")
    return named


async def _encode(name: str, image: ImageInput) -> bytes:
    """The image as a file would hold it.

    Raises:
        ImageError: it cannot be read.
        DownloadError: it cannot be fetched.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, np.ndarray):
        return await asyncio.to_thread(_to_png, name, image)
    return await (fetch(str(image)) if is_url(image) else asyncio.to_thread(read_bytes, image))


def _to_png(name: str, pixels: NDArray[np.uint8]) -> bytes:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        described = f"{pixels.dtype} {list(pixels.shape)}"
        raise ImageError(name, f"an image array must be uint8 [H, W, 3], not {described}")
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _parameters(softmax: bool, image_resize_dims: tuple[int, int] | None) -> dict[str, Any]:
    """What goes along with images: only what is not the default."""
    parameters: dict[str, Any] = {}
    if softmax:
        parameters["softmax"] = True
    if image_resize_dims is not None:
        parameters["image_resize_dims"] = list(image_resize_dims)
    return parameters


def _predict_body(bodies: list[bytes], parameters: Mapping[str, Any]) -> tuple[str, bytes]:
    """Content type and body of a request: a single image as it is, unless something goes along with it."""
    if len(bodies) == 1 and not parameters:
        return "application/octet-stream", bodies[0]
    request = {"images": [b64encode(body).decode() for body in bodies], **parameters}
    return "application/json", json.dumps(request).encode()


def _check_key(key: str) -> str:
    if not (key.isascii() and key.isprintable()) or not key or " " in key:
        raise UsageError("the service's key must be visible ASCII characters, without spaces")
    return key


def _host(url: str) -> str:
    try:
        address = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise UsageError(f"{url!r} is not a valid address: {error}") from error
    if address.scheme not in ("http", "https") or not address.host:
        raise UsageError(f"{url!r} is not an address such as http://127.0.0.1:8000")
    return address.host


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

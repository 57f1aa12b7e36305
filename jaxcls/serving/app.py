"""The HTTP application of one replica: every way to score is a protocol of `wire`, run by one flow.

    key -> room -> body -> jobs -> images counted -> answers -> the protocol's body

A request that is refused costs little, and is refused as early as possible.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxcls.errors import RequestError, UsageError
from jaxcls.predictions import Kind
from jaxcls.serving import metrics, wire
from jaxcls.serving.admission import Admission
from jaxcls.serving.auth import Keys
from jaxcls.serving.openapi import OPEN_PATHS, TIME_HEADER, make_document
from jaxcls.serving.service import Service
from jaxcls.serving.wire import Answer, Job

INLINE_BYTES = 64 * 1024
"""Bodies up to this size are parsed at once; larger ones by a thread, so that others need not wait."""


@dataclass(frozen=True)
class Exchange:
    """A parsed request, and how its answers are written.

    Attributes:
        jobs: its images.
        write: answers and milliseconds -> headers and body.
    """

    jobs: Sequence[Job]
    write: Callable[[list[Answer], float], tuple[dict[str, str], bytes]]


Parse = Callable[[Mapping[str, str], bytes], Exchange]


@dataclass(frozen=True)
class Identity:
    """What clients are told, and must show.

    Attributes:
        name, version: as they were deployed.
        keys: one of which each request must carry; None: none.

    Raises:
        UsageError: the name cannot be part of an address.
    """

    name: str
    version: str
    keys: Keys | None = None

    def __post_init__(self) -> None:
        if not self.name or not self.name.isprintable() or set(self.name) & set("/{}"):
            raise UsageError(f"model name {self.name!r}: give another --name, without slashes and braces")


@dataclass(eq=False)
class Replica:
    """What all endpoints share.

    Attributes:
        deadline: seconds from a request's arrival to its answer.
        is_ready: whether further requests are wanted; those that come are served as long as `admission` is
            open.
    """

    service: Service
    admission: Admission
    metrics: metrics.Metrics
    identity: Identity
    deadline: float
    max_body_bytes: int
    is_ready: bool = True


def make_app(replica: Replica) -> Starlette:
    """The ASGI application."""
    classifier = replica.service.classifier
    about = (replica.identity.name, replica.identity.version)
    model = f"/v2/models/{about[0]}"

    def score(headers: Mapping[str, str], body: bytes) -> Exchange:
        return Exchange(wire.parse_score(body), lambda answers, _: ({}, wire.format_score(answers)))

    def predict(headers: Mapping[str, str], body: bytes) -> Exchange:
        jobs = wire.parse_predict(headers.get("content-type", ""), body)
        kind: Kind = "probability" if jobs[0].softmax else classifier.head.kind

        def write(answers: list[Answer], ms: float) -> tuple[dict[str, str], bytes]:
            return {}, wire.format_predict(answers, classifier.classes, kind, about[0], ms)

        return Exchange(jobs, write)

    def infer(headers: Mapping[str, str], body: bytes) -> Exchange:
        request = wire.parse_infer(body, headers.get(wire.BINARY_HEADER))

        def write(answers: list[Answer], ms: float) -> tuple[dict[str, str], bytes]:
            return wire.format_infer(request, answers, *about)

        return Exchange(request.jobs, write)

    size = classifier.preprocess.size
    documents: dict[str, Any] = {
        "/v2": wire.server_metadata(version("jaxcls")),
        model: wire.model_metadata(*about, classifier.classes, size, "jaxcls"),
        "/openapi.json": make_document(
            about[0], classifier.classes, size, secured=replica.identity.keys is not None
        ),
        "/v2/health/live": {"live": True},
    }
    scoring: dict[str, Parse] = {"/score": score, "/v1/predict": predict, f"{model}/infer": infer}
    return Starlette(
        routes=[
            *(Route(path, _scoring(replica, parse), methods=["POST"]) for path, parse in scoring.items()),
            *(Route(path, _document(document)) for path, document in documents.items()),
            Route("/v2/health/ready", _ready(replica)),
            Route(f"{model}/ready", _ready(replica)),
            Route("/metrics", _metrics(replica)),
        ],
        middleware=[Middleware(Gate, replica=replica, scoring=frozenset(scoring))],
        exception_handlers={
            RequestError: _refuse,
            HTTPException: _refuse_http,
            ClientDisconnect: _forget,
            Exception: _fail,
        },
    )


class Gate:
    """Before everything else: the key and the room; after it: the count, and that this replica is leaving.

    Under overload nearly all requests end here, so that their cost is not taken from the others.
    """

    def __init__(self, app: ASGIApp, replica: Replica, scoring: Set[str]) -> None:
        self.app, self.replica, self.scoring = app, replica, scoring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, replica = time.perf_counter(), self.replica

        async def count_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                if not replica.is_ready:
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
                endpoint = self._endpoint(scope)
                replica.metrics.requests.labels(endpoint, message["status"]).inc()
                replica.metrics.request_seconds.labels(endpoint).observe(time.perf_counter() - started)
            await send(message)

        await (self._refusal(scope) or self.app)(scope, receive, count_and_send)

    def _endpoint(self, scope: Scope) -> str:
        if scope["path"] in self.scoring:
            return str(scope["path"])
        return scope["route"].path if "route" in scope else "other"

    def _refusal(self, scope: Scope) -> Response | None:
        if not self._is_known(scope):
            problem = {"error": "a key is needed: Authorization: Bearer KEY"}
            return JSONResponse(problem, 401, {"WWW-Authenticate": "Bearer"})
        if scope["path"] in self.scoring and scope["method"] == "POST":
            try:
                self.replica.admission.require_room()
            except RequestError as error:
                return _answer(error)
        return None

    def _is_known(self, scope: Scope) -> bool:
        keys = self.replica.identity.keys
        if keys is None or scope["path"] in OPEN_PATHS:
            return True
        return keys.accepts(Headers(scope=scope).get("authorization"))


def _scoring(replica: Replica, parse: Parse) -> Callable[[Request], Awaitable[Response]]:
    async def respond(request: Request) -> Response:
        loop = asyncio.get_running_loop()
        started = loop.time()
        deadline = started + replica.deadline
        with ExitStack() as held:
            body = await _read_body(request, replica, deadline, held)
            exchange = await _parse(parse, request.headers, body)
            held.enter_context(replica.admission.images(len(exchange.jobs)))
            answers = await _while_connected(request, replica.service.answer(exchange.jobs, deadline))
            _require_any(answers)
            milliseconds = 1000 * (loop.time() - started)
            headers, content = exchange.write(answers, milliseconds)
        for answer in answers:
            replica.metrics.images.labels("scored" if answer.error is None else "failed").inc()
        headers = {
            "content-type": "application/json",
            TIME_HEADER: f"{milliseconds:.2f}",
            **headers,
        }
        return Response(content, headers=headers)

    return respond


def _require_any(answers: Sequence[Answer]) -> None:
    """Raise RequestError unless an image could be scored."""
    if all(answer.error is not None for answer in answers):
        alone = f"{len(answers)} images, none of which can be scored; the first: " if len(answers) > 1 else ""
        raise RequestError(max(answer.status for answer in answers), f"{alone}{answers[0].error}")


async def _read_body(request: Request, replica: Replica, deadline: float, held: ExitStack) -> bytes:
    """The body, its bytes counted before they are kept.

    Raises:
        RequestError: 413, too large; 415, compressed; 429, no room; 408, too slow.
    """
    if request.headers.get("content-encoding", "identity") != "identity":
        raise RequestError(415, "Content-Encoding: send the body as it is")
    announced = request.headers.get("content-length", "")
    num_announced = int(announced) if announced.isdecimal() else 0
    _check_size(num_announced, replica)
    held.enter_context(replica.admission.bytes(num_announced))
    parts, num_bytes = [], 0
    try:
        async with asyncio.timeout_at(deadline):
            async for part in request.stream():
                num_bytes += len(part)
                _check_size(num_bytes, replica)
                if num_bytes > num_announced:  # chunked
                    held.enter_context(replica.admission.bytes(len(part)))
                parts.append(part)
    except TimeoutError as error:
        raise RequestError(408, "the body did not arrive within the deadline") from error
    return b"".join(parts)


def _check_size(num_bytes: int, replica: Replica) -> None:
    if num_bytes > replica.max_body_bytes:
        raise RequestError(413, f"a body of at most {replica.max_body_bytes:,} bytes is taken")


async def _parse(parse: Parse, headers: Mapping[str, str], body: bytes) -> Exchange:
    if len(body) <= INLINE_BYTES:
        return parse(headers, body)
    return await asyncio.get_running_loop().run_in_executor(None, parse, headers, body)


async def _while_connected(request: Request, work: Awaitable[list[Answer]]) -> list[Answer]:
    """The result of `work`, which is cancelled when the client goes."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(request.receive())  # the body is read: what comes next is the end
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watch.cancel()


def _document(document: Any) -> Callable[[Request], Awaitable[Response]]:
    async def respond(request: Request) -> Response:
        return JSONResponse(document)

    return respond


def _ready(replica: Replica) -> Callable[[Request], Awaitable[Response]]:
    async def respond(request: Request) -> Response:
        return JSONResponse({"ready": replica.is_ready}, 200 if replica.is_ready else 503)

    return respond


def _metrics(replica: Replica) -> Callable[[Request], Awaitable[Response]]:
    async def respond(request: Request) -> Response:
        counted = replica.metrics
        counted.queue_images.set(replica.admission.num_images)
        counted.queue_bytes.set(replica.admission.num_bytes)
        counted.is_ready.set(replica.is_ready)
        return Response(counted.text(), media_type=metrics.CONTENT_TYPE)

    return respond


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _answer(error)


def _answer(error: RequestError) -> Response:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse({"error": str(error)}, error.status, headers)


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _forget(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; nginx's number, for the count


async def _fail(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "the service has failed; its log says more"}, 500)

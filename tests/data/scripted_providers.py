"""A web on loopback: image searches that answer as the real ones do, and hosts of images, good and bad.

Every address of 127.0.0.0/8 is this machine; each stands for a host of its own.
"""

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from ipaddress import ip_network
from urllib.parse import parse_qs, urlsplit

from conftest import draw
from PIL import Image

from jaxcls.data.download import PUBLIC, Guard
from jaxcls.data.pacing import Limits

HOST, OTHER_HOST = "127.0.0.81", "127.0.0.82"
"""The two hosts that the guard of these tests allows; the rest of 127.0.0.0/8 stays forbidden."""

QUICK = Limits(interval_seconds=0, pause_seconds=0.01, max_pause_seconds=5)
NO_RESULTS = "Google hasn't returned any results for this query."
PAGE_SIZE = {"openverse": 20, "brave": 200, "serpapi": 100}


def encode(image: Image.Image, format_: str = "JPEG", **options) -> bytes:
    file = BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


@dataclass(frozen=True)
class Answer:
    """What a request gets: a status and a body, late, slowly, or cut short."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    chunk_delay: float = 0.0
    length: int | None = None


@dataclass(frozen=True)
class Request:
    """What was asked, and when, until it was about to be answered; the address and the head."""

    host: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    start: float
    end: float


class Web:
    """Pages by host and path, and search results by words.

    Attributes:
        pages: (host, path) -> an answer, or answers that are given one after the other, the last one again.
        results: words -> URLs of images that a search finds.
        search_answers: what searches get instead, one after the other, before they work.
        key: what the searches that want one accept.
    """

    def __init__(self) -> None:
        self.pages: dict[tuple[str, str], Answer | list[Answer]] = {}
        self.results: dict[str, list[str]] = {}
        self.search_answers: list[Answer] = []
        self.key = "key-0123456789/+abcdef"
        self.requests: list[Request] = []
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._stack = ExitStack()
        self.port = 0

    def __enter__(self) -> "Web":
        for host in (HOST, OTHER_HOST):
            server = _Server((host, self.port), _make_handler(self, host))
            self.port = server.server_address[1]
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
            thread.start()
            self._stack.callback(server.server_close)
            self._stack.callback(thread.join)
            self._stack.callback(server.shutdown)
        return self

    def __exit__(self, *_) -> None:
        self.stopped.set()
        self._stack.close()

    @property
    def guard(self) -> Guard:
        networks = (ip_network(HOST), ip_network(OTHER_HOST))
        return Guard(ports=PUBLIC.ports | {self.port}, allowed_networks=networks, seconds=30, max_bytes=10**6)

    def url(self, path: str, host: str = HOST) -> str:
        return f"http://{host}:{self.port}{path}"

    def put(self, path: str, *answers: Answer | bytes, host: str = HOST) -> str:
        """Have a page; its URL."""
        self.pages[host, path] = [Answer(a) if isinstance(a, bytes) else a for a in answers]
        return self.url(path, host)

    def put_pictures(self, count: int, first: int = 0, host: str = HOST) -> list[str]:
        return [
            self.put(f"/photos/{number}.jpg", encode(draw(number)), host=host)
            for number in range(first, first + count)
        ]

    def asked(self, prefix: str = "/photos") -> list[Request]:
        return [request for request in self.requests if request.path.startswith(prefix)]

    def answer(self, host: str, path: str, query: dict[str, str], headers: dict[str, str]) -> Answer:
        with self._lock:
            if path.startswith("/search/") and self.search_answers:
                return self.search_answers.pop(0)
            if path.startswith("/search/"):
                return _search(self, path.removeprefix("/search/"), query, headers)
            answers = self.pages.get((host, path), [Answer(b"not here", 404)])
            return answers.pop(0) if len(answers) > 1 else answers[0]


def most_at_once(requests: list[Request]) -> int:
    """How many of them were under way together."""
    events = sorted([(r.start, 1) for r in requests] + [(r.end, -1) for r in requests])
    most = now = 0
    for _, change in events:
        now += change
        most = max(most, now)
    return most


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 100

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is what the tests are about."""


def _make_handler(web: Web, host: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            start = time.monotonic()
            parts = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            headers = {name.lower(): value for name, value in self.headers.items()}
            answer = web.answer(host, parts.path, query, headers)
            web.stopped.wait(answer.delay)
            # Before it is sent: whoever has the answer may end the test, or send the next request.
            web.requests.append(Request(host, parts.path, query, headers, start, time.monotonic()))
            with suppress(OSError):
                self.send(answer)

        def send(self, answer: Answer) -> None:
            self.send_response(answer.status)
            length = len(answer.body) if answer.length is None else answer.length
            for name, value in {"Content-Length": str(length), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            step = 100 if answer.chunk_delay else max(len(answer.body), 1)
            for at in range(0, len(answer.body), step):
                if web.stopped.wait(answer.chunk_delay):
                    return
                self.wfile.write(answer.body[at : at + step])
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_WR)

        def log_message(self, *_) -> None:
            """Tests look at `requests`."""

    return Handler


# The searches, each with its own names for things, ways to count pages, and errors.


def _json(values: object, status: int = 200) -> Answer:
    return Answer(json.dumps(values).encode(), status, {"Content-Type": "application/json"})


def _search(web: Web, name: str, query: dict[str, str], headers: dict[str, str]) -> Answer:
    return _SEARCHES[name](web, query, headers)


def _openverse(web: Web, query: dict[str, str], headers: dict[str, str]) -> Answer:
    page, size = int(query["page"]), int(query["page_size"])
    if size > 20 or page * size > 240:
        return _json({"detail": "anonymous requests may not exceed 20 a page and 240 in all"}, 401)
    urls = web.results.get(query["q"], [])[:240]
    num_pages = -(-len(urls) // size)
    if page > max(num_pages, 1):
        return _json({"detail": "Invalid page."}, 404)
    items = [
        {"id": url[-8:], "title": "A picture", "url": url, "creator": "Ann O'Nym", "license": "by-sa",
         "license_version": "2.0", "license_url": "https://creativecommons.org/licenses/by-sa/2.0/",
         "foreign_landing_url": url + "?page", "provider": "flickr", "thumbnail": None}
        for url in urls[(page - 1) * size : page * size]
    ]  # fmt: skip
    return _json({"result_count": len(urls), "page_count": num_pages, "page_size": size, "results": items})


def _brave(web: Web, query: dict[str, str], headers: dict[str, str]) -> Answer:
    if headers.get("x-subscription-token") != web.key:
        error = {"code": "SUBSCRIPTION_TOKEN_INVALID", "detail": "The token is invalid.", "status": 422}
        return _json({"type": "ErrorResponse", "error": error}, 422)
    urls = web.results.get(query["q"], [])[: min(int(query["count"]), 200)]
    items = [
        {"type": "image_result", "title": "A picture", "url": url + "?page", "source": "photos.example",
         "thumbnail": {"src": "https://imgs.search.brave.com/x"}, "properties": {"url": url}}
        for url in urls
    ]  # fmt: skip
    return _json({"type": "images", "query": {"original": query["q"]}, "results": items})


def _serpapi(web: Web, query: dict[str, str], headers: dict[str, str]) -> Answer:
    if query.get("api_key") != web.key:
        return _json({"error": f"Invalid API key {query.get('api_key')}. See https://serpapi.com"}, 401)
    start = 100 * int(query["ijn"])
    urls = web.results.get(query["q"], [])[start : start + 100]
    if not urls:
        return _json({"search_metadata": {"status": "Success"}, "error": NO_RESULTS})
    items = [
        {"position": n, "title": "A picture", "original": url, "link": url + "?page", "source": "Photos"}
        for n, url in enumerate(urls)
    ]
    return _json({"search_metadata": {"status": "Success"}, "images_results": items})


_SEARCHES: dict[str, Callable[[Web, dict[str, str], dict[str, str]], Answer]] = {
    "openverse": _openverse,
    "brave": _brave,
    "serpapi": _serpapi,
}

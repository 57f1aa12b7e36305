"""The client against real servers: one that misbehaves on purpose, and one that is killed and restarted."""

import asyncio
import csv
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from email.utils import formatdate
from functools import partial
from io import BytesIO
from ipaddress import ip_network
from pathlib import Path

import numpy as np
import pytest
from conftest import free_port
from PIL import Image

from jaxcls.cli import main
from jaxcls.data.download import Guard, fetch
from jaxcls.errors import ImageError, ServiceError, UsageError
from jaxcls.serving.client import AsyncClient, Client, parse_result, pause_seconds, read_retry_after


@dataclass(frozen=True)
class Request:
    """What the server has read, and when."""

    path: str
    headers: dict[str, str]
    body: bytes
    at: float

    def images(self) -> list[bytes]:
        if self.headers["content-type"] != "application/json":
            return [self.body]
        body = json.loads(self.body)
        texts = [item["image_in_base64"] for item in body] if isinstance(body, list) else body["images"]
        return [b64decode(text, validate=True) for text in texts]


@dataclass(frozen=True)
class Reply:
    """Bytes to send after a delay, and whether the connection stays open."""

    data: bytes
    delay: float = 0.0
    stays: bool = True


Behaviour = Callable[[Request], Reply]


def says(body: object, status: str = "200 OK", **headers: str) -> Behaviour:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(content)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return lambda request: Reply("\r\n".join(lines).encode() + b"\r\n\r\n" + content)


def predicted(image: bytes) -> dict:
    """An image is a text: the number that it is scored with. Any other is bad."""
    try:
        value = float(image)
    except ValueError:
        return {"error": "not an image"}
    return {
        "label": "red",
        "score": value,
        "scores": {"blue": -value, "red": value},
        "abstained": value > 1e6,
    }


def scores(request: Request) -> Reply:
    predictions = [predicted(image) for image in request.images()]
    return says({"model": "m", "version": "1", "timing_ms": 1, "kind": "logit", "predictions": predictions})(
        request
    )


def slowly(request: Request) -> Reply:
    return replace(scores(request), delay=0.01)


def cut_short(request: Request) -> Reply:
    return Reply(scores(request).data[:-10], stays=False)


def disconnects(request: Request) -> Reply:
    return Reply(b"", stays=False)


def hangs(request: Request) -> Reply:
    return Reply(b"", delay=60)


lost_by_proxy = says(b"Internal Server Error", "500 Internal Server Error")
busy = says({"error": "queue full"}, "429 Too Many Requests", Retry_After="1")
draining = says({"error": "draining"}, "503 Service Unavailable")


class Server:
    """Answers request after request as the script says, then as `default` does."""

    def __init__(self, script: tuple[Behaviour, ...], default: Behaviour) -> None:
        self.script, self.default = list(script), default
        self.url = ""
        self.requests: list[Request] = []
        self.num_connections = self.num_busy = self.most_busy = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while await self.reply(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def reply(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        request = Request(first.split()[1], headers, body, time.monotonic())
        self.requests.append(request)
        self.num_busy += 1
        self.most_busy = max(self.most_busy, self.num_busy)
        behaviour = self.script.pop(0) if self.script else self.default
        reply = behaviour(request)
        await asyncio.sleep(reply.delay)
        self.num_busy -= 1
        writer.write(reply.data)
        await writer.drain()
        return reply.stays

    @property
    def pauses(self) -> list[float]:
        return np.diff([request.at for request in self.requests]).tolist()


@contextmanager
def serving(*script: Behaviour, default: Behaviour = scores, port: int = 0) -> Iterator[Server]:
    """A server in a thread of its own."""
    server, loop, started = Server(script, default), asyncio.new_event_loop(), threading.Event()

    async def start() -> asyncio.Server:
        listener = await asyncio.start_server(server.serve, "127.0.0.1", port, limit=2**24)
        server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        return listener

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            listener = runner.run(start())
            started.set()
            loop.run_forever()
            listener.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@contextmanager
def takes(at_least: float, below: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert at_least <= time.monotonic() - start < below


def score_one(server: Server, **options) -> float:
    with Client(server.url, **options) as client:
        return float(client.predict([b"7"]).scores[0, 1])


@pytest.fixture
def files(tmp_path) -> Callable[[int], list[Path]]:
    def write(count: int) -> list[Path]:
        paths = [tmp_path / f"{number}.png" for number in range(count)]
        for number, path in enumerate(paths):
            path.write_text(str(number))
        return paths

    return write


# What comes of a request.


def test_predictions_hold_all_that_the_service_says(files):
    array = np.zeros((4, 6, 3), np.uint8)
    (path,) = files(1)
    abstains = says({"kind": "logit", "predictions": [predicted(b"2e6")]})
    with (
        serving(scores, scores, scores, abstains) as server,
        Client(server.url + "/score/", "secret-key-of-16") as client,
    ):
        predictions = client.predict([path, str(path), b"no picture", array], concurrency=1)
    assert predictions.classes == ("blue", "red")
    assert predictions.kind == "logit"
    assert predictions.ids == (str(path), str(path), "2", "3")
    assert predictions.scores.dtype == np.float32
    assert predictions.errors == {2: "2: not an image"}
    assert predictions.abstained.tolist() == [False, False, False, True]
    assert predictions.labels is None
    assert {request.path for request in server.requests} == {"/v1/predict"}
    assert {request.headers["authorization"] for request in server.requests} == {"Bearer secret-key-of-16"}
    with Image.open(BytesIO(server.requests[3].body)) as sent:
        assert (np.asarray(sent) == array).all()


def test_parameters_go_along_with_images():
    with serving() as server, Client(server.url) as client:
        client.predict([b"1", b"2"], softmax=True, image_resize_dims=(64, 48), batch_size=2)
    (request,) = server.requests
    assert request.images() == [b"1", b"2"]
    assert json.loads(request.body).items() >= {"softmax": True, "image_resize_dims": [64, 48]}.items()


def test_score_speaks_as_the_seed_does():
    texts = ["[-1.5, 2]", '{"error": "not an image"}']
    with serving(default=says(texts)) as server, Client(server.url) as client:
        assert client.score([b"1", b"2"], image_resize_dims=(8, 8)) == texts
    (request,) = server.requests
    assert request.path == "/score"
    assert request.headers["content-type"] == "application/json"
    assert request.images() == [b"1", b"2"]
    assert json.loads(request.body)[0]["parameters"] == {"image_resize_dims": [8, 8]}
    assert "authorization" not in request.headers


def test_parse_result_reads_scores_and_errors():
    scores = parse_result("[-1.5, 2, 0.25]")
    assert scores.dtype == np.float32
    assert scores.tolist() == [-1.5, 2, 0.25]
    with pytest.raises(ServiceError, match="not scored: no picture"):
        parse_result('{"error": "no picture"}')


@pytest.mark.parametrize("text", ["", "[]", "[[1, 2]]", "[1, null]", "[1e99]", "{}", "3", '{"scores": [1]}'])
def test_parse_result_takes_nothing_else(text):
    with pytest.raises(ServiceError, match="neither scores nor an error"):
        parse_result(text)


def test_is_ready():
    with serving(says({}), draining, hangs) as server, Client(server.url, deadline=0.2) as client:
        assert client.is_ready()
        assert not client.is_ready()
        assert not client.is_ready()
        assert [request.path for request in server.requests] == ["/v2/health/ready"] * 3
    with Client(f"http://127.0.0.1:{free_port()}") as client:
        assert not client.is_ready()


# Retries.


@pytest.mark.parametrize("failure", [disconnects, cut_short, draining, lost_by_proxy])
def test_what_may_pass_is_tried_again(failure):
    with serving(failure, failure) as server:
        assert score_one(server) == 7
        assert len(server.requests) == 3
        assert all(pause <= bound + 0.4 for pause, bound in zip(server.pauses, (0.1, 0.2), strict=True))


def test_a_refused_connection_is_tried_again():
    port, result = free_port(), []
    with Client(f"http://127.0.0.1:{port}") as client:
        work = threading.Thread(target=lambda: result.append(client.predict([b"7"]).scores[0, 1]))
        work.start()
        time.sleep(0.3)  # for some attempts to fail; with none it would still be right
        with serving(port=port):
            work.join()
    assert result == [7]


def test_retry_after_in_seconds_is_waited_for():
    with serving(busy) as server:
        assert score_one(server) == 7
        assert 1 <= server.pauses[0] < 1.6


def test_retry_after_as_a_date_is_waited_for():
    back = int(time.time()) + 2
    with serving(says({}, "503 Service Unavailable", Retry_After=formatdate(back, usegmt=True))) as server:
        assert score_one(server) == 7
        assert len(server.requests) == 2
        assert time.time() >= back


def test_a_retry_after_beyond_the_deadline_is_not_waited_for():
    with serving(default=busy) as server, takes(0, 0.5), pytest.raises(ServiceError, match="429: queue full"):
        score_one(server, deadline=0.9)
    assert len(server.requests) == 1


@pytest.mark.parametrize("value", ["", "soon", "-5", "1.5", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_a_retry_after_that_asks_for_nothing(value):
    assert read_retry_after(value) == 0


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 415, 422, 500, 502])
def test_any_other_status_is_an_error_at_once(status):
    refuses = says({"error": "because I say so"}, f"{status} No")
    with serving(default=refuses) as server, pytest.raises(ServiceError, match=f"{status}: because I say so"):
        score_one(server)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"error": "so"}, "400: so"),
        ({"predictions": [{"error": "no picture"}]}, "400: no picture"),
        ({"detail": "so"}, "400: Oh"),
        (b"<html>", "400: Oh"),
        ([], "400: Oh"),
    ],
)
def test_an_error_has_the_words_of_the_service(body, words):
    with serving(says(body, "400 Oh")) as server, pytest.raises(ServiceError, match=words):
        score_one(server)


def test_a_redirect_is_not_followed_with_the_key():
    with (
        serving() as other,
        serving(says(b"", "307 Elsewhere", Location=other.url)) as server,
        pytest.raises(ServiceError, match="307"),
    ):
        score_one(server, key="secret-key-of-16")
    assert not other.requests


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"[" * 100_000,
        b"[]",
        b"{}",
        b"null",
        b'{"kind": "logit", "predictions": []}',
        b'{"kind": "guess", "predictions": [{"scores": {"a": 1}, "abstained": false}]}',
        b'{"kind": "logit", "predictions": [7]}',
        b'{"kind": "logit", "predictions": [{}]}',
        b'{"kind": "logit", "predictions": [{"scores": [1], "abstained": false}]}',
        b'{"kind": "logit", "predictions": [{"scores": {}, "abstained": false}]}',
        b'{"kind": "logit", "predictions": [{"scores": {"a": "b"}, "abstained": false}]}',
        b'{"kind": "logit", "predictions": [{"scores": {"a": NaN}, "abstained": false}]}',
        b'{"kind": "logit", "predictions": [{"scores": {"a": 1e99}, "abstained": false}]}',
    ],
)
def test_an_answer_that_is_none_is_an_error_at_once(body):
    with (
        serving(default=says(body)) as server,
        pytest.raises(ServiceError, match="not the answer of a scoring service"),
    ):
        score_one(server)
    assert len(server.requests) == 1


@pytest.mark.parametrize("body", [b"[", b"{}", b'["[1]"]', b"[[1], [2]]"])
def test_a_score_answer_that_is_none(body):
    with (
        serving(default=says(body)) as server,
        Client(server.url) as client,
        pytest.raises(ServiceError, match="not the answer of a scoring service"),
    ):
        client.score([b"1", b"2"])


@pytest.mark.parametrize("behaviour", [hangs, disconnects, draining, lambda request: Reply(b"HTTP/1.1 200")])
def test_the_deadline_holds(behaviour):
    with serving(default=behaviour) as server, pytest.raises(ServiceError), takes(0, 1.2):
        score_one(server, deadline=1.0)


def test_a_hanging_service_gets_the_whole_deadline():
    with serving(default=hangs) as server, takes(0.5, 0.7), pytest.raises(ServiceError, match="no answer"):
        score_one(server, deadline=0.5)


def test_the_deadline_holds_where_nobody_listens():
    with (
        Client(f"http://127.0.0.1:{free_port()}", deadline=1.0) as client,
        takes(0, 1.2),
        pytest.raises(ServiceError, match=r"attempt ([2-9]|\d\d), the last"),
    ):
        client.predict([b"1"])


def test_the_deadline_holds_where_connections_are_not_accepted():
    """A host that drops packets looks like this: the handshake is never answered."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        with (
            Client(f"http://127.0.0.1:{full.getsockname()[1]}", deadline=0.8) as client,
            takes(0.3, 1.2),
            pytest.raises(ServiceError, match="none of 50 images"),
        ):
            client.predict([b"1"] * 50)
        for filler in fillers:
            filler.close()


def test_pauses_are_full_jitter_on_top_of_what_is_asked():
    uniform = random.Random(0).uniform
    for attempt, bound in enumerate((0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 3.2, 3.2), start=1):
        pauses = [pause_seconds(attempt, 0, uniform) for _ in range(500)]
        assert 0 <= min(pauses) < 0.02 * bound
        assert 0.98 * bound < max(pauses) <= bound
        assert np.mean(pauses) == pytest.approx(bound / 2, rel=0.1)
    assert 5 <= pause_seconds(1, 5, uniform) <= 5.1
    assert pause_seconds(10**6, 0, uniform) <= 3.2


# Many images.


def test_a_folder_keeps_its_order_and_its_bad_images_are_rows(files):
    paths = files(200)
    paths[17].write_text("no picture")
    paths[50].unlink()
    refusals = {b"60": says({"error": "too large"}, "413 Too Large"), b"70": says({"error": "oh"}, "500 No")}

    def default(request: Request) -> Reply:
        return replace(
            refusals.get(request.body, scores)(request), delay=random.Random(request.body).random() / 50
        )

    with serving(default=default) as server, Client(server.url) as client:
        predictions = client.predict(paths)
    assert list(predictions.errors) == [17, 50, 60, 70]
    assert predictions.errors[17] == f"{paths[17]}: not an image"
    assert predictions.errors[50] == f"{paths[50]}: cannot be read: No such file or directory"
    assert predictions.errors[60] == f"{paths[60]}: {server.url}/v1/predict: 413: too large"
    assert predictions.errors[70].endswith("500: oh")
    good = ~predictions.unreadable
    assert predictions.scores[good, 1].tolist() == np.arange(200)[good].tolist()
    assert server.most_busy == 8
    assert server.num_connections <= 8


@pytest.mark.parametrize("status", ["400 Bad Request", "500 Internal Server Error"])
def test_a_batch_that_is_refused_is_sent_one_by_one(status):
    def refuses_5(request: Request) -> Reply:
        return (says({"error": "no 5"}, status) if b"5" in request.images() else scores)(request)

    with serving(default=refuses_5) as server, Client(server.url) as client:
        predictions = client.predict([b"%d" % number for number in range(10)], batch_size=4, concurrency=1)
    assert list(predictions.errors) == [5]
    assert np.delete(predictions.scores[:, 1], 5).tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert [len(request.images()) for request in server.requests] == [4, 4, 1, 1, 1, 1, 2]


def test_no_more_images_are_in_memory_than_are_under_way(tmp_path):
    size, paths = 2**20, [tmp_path / f"{number}.png" for number in range(100)]
    for number, path in enumerate(paths):
        path.write_bytes(b"%d" % number + b" " * size)
    with serving(default=slowly) as server, Client(server.url) as client:
        server.requests = Forgetful()
        client.predict(paths[:1])
        tracemalloc.start()
        predictions = client.predict(paths, concurrency=4)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert not predictions.errors
    # The server is of this process, too: the bodies that it reads count with those that the client sends.
    assert peak < 30 * size


class Forgetful(list):
    def append(self, item: object) -> None:
        """Keep nothing."""


def test_a_service_that_comes_to_refuse_the_key_ends_the_run_and_keeps_what_is_scored():
    expired = says({"error": "unknown key"}, "401 Unauthorized")
    with serving(*[scores] * 10, default=expired) as server, Client(server.url) as client:
        predictions = client.predict([b"%d" % number for number in range(1000)], concurrency=2)
    scored = np.flatnonzero(~predictions.unreadable)
    assert len(scored) == 10
    assert scored.max() < 12  # two are under way at a time, and either may be answered first
    assert predictions.scores[scored, 1].tolist() == scored.tolist()
    assert len(server.requests) <= 12
    assert "401: unknown key" in predictions.errors[999]


def test_a_service_that_goes_away_ends_the_run_after_one_deadline():
    port = free_port()
    with Client(f"http://127.0.0.1:{port}", deadline=0.5) as client:
        with serving(port=port):
            client.predict([b"1"])
        with takes(0, 1), pytest.raises(ServiceError, match="none of 1000 images was scored"):
            client.predict([b"1"] * 1000)


def test_one_image_that_hangs_does_not_end_the_run():
    def hangs_at_3(request: Request) -> Reply:
        return (hangs if request.body == b"3" else scores)(request)

    with serving(default=hangs_at_3) as server, Client(server.url, deadline=0.3) as client:
        predictions = client.predict([b"%d" % number for number in range(20)], concurrency=2)
    assert list(predictions.errors) == [3]
    assert "no answer" in predictions.errors[3]


def test_a_url_that_the_guard_refuses_is_a_row():
    with serving() as other, serving() as server, Client(server.url) as client:
        url = f"{other.url}/photo.jpg"
        predictions = client.predict([url, b"1"])
    assert predictions.ids == (url, "1")
    assert predictions.errors[0].startswith(f"{url}: port ")
    assert other.num_connections == 0
    assert len(server.requests) == 1


def test_images_are_fetched_from_their_urls(monkeypatch):
    """This machine's own addresses are allowed for once, in the guard that the client uses."""
    guard = Guard(ports=frozenset(range(2**16)), allowed_networks=(ip_network("127.0.0.0/8"),))
    monkeypatch.setattr("jaxcls.serving.client.fetch", partial(fetch, guard=guard))
    file = BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    with (
        serving(default=says(file.getvalue())) as other,
        serving(default=says({"kind": "logit", "predictions": [predicted(b"3")]})) as server,
        Client(server.url) as client,
    ):
        assert client.predict([f"{other.url}/photo.png"]).scores[0, 1] == 3
    assert other.requests[0].path == "/photo.png"
    assert server.requests[0].body == file.getvalue()


def test_classes_that_change_meanwhile_are_not_mixed():
    other = says({"kind": "logit", "predictions": [{"scores": {"red": 1, "blue": 2}, "abstained": False}]})
    with serving(scores, other) as server, Client(server.url) as client:
        predictions = client.predict([b"1", b"2", b"3"], concurrency=1)
    assert "changed its classes" in predictions.errors[1]
    assert predictions.scores[[0, 2], 1].tolist() == [1, 3]


KILLABLE = """
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        value = float(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(0.01)
        prediction = {"scores": {"blue": -value, "red": value}, "abstained": False}
        body = json.dumps({"kind": "logit", "predictions": [prediction]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        with open(sys.argv[2], "ab") as log:
            log.write(b".")

    def log_message(self, *arguments):
        pass

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_no_image_is_lost_when_the_server_is_killed_and_restarted(files, tmp_path):
    port, log = free_port(), tmp_path / "answered"
    log.touch()

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", KILLABLE, str(port), str(log)], stderr=subprocess.DEVNULL
        )

    def wait_for_more(number: int) -> None:
        target, end = log.stat().st_size + number, time.monotonic() + 20
        while log.stat().st_size < target:
            assert time.monotonic() < end
            time.sleep(0.005)

    results = []
    paths = files(600)
    process = start()
    with Client(f"http://127.0.0.1:{port}") as client:
        work = threading.Thread(target=lambda: results.append(client.predict(paths)))
        work.start()
        for _ in range(3):
            wait_for_more(100)
            process.kill()
            process.wait()
            assert work.is_alive()
            process = start()
        work.join()
    process.kill()
    process.wait()
    (predictions,) = results
    assert not predictions.errors
    assert predictions.scores[:, 1].tolist() == list(range(600))


# Both clients.


def test_the_asynchronous_client_shares_its_connections():
    async def work(url: str) -> list[float]:
        async with AsyncClient(url) as client:
            assert repr(client) == f"AsyncClient({url!r})"
            await client.predict([b"0"])
            parts = await asyncio.gather(*(client.predict([b"%d" % n], concurrency=1) for n in range(20)))
            return [float(part.scores[0, 1]) for part in parts]

    with serving(default=slowly) as server:
        assert asyncio.run(work(server.url)) == list(range(20))
        assert server.num_connections <= 20


def test_connections_stay_open_between_calls():
    with serving() as server, Client(server.url) as client:
        for _ in range(5):
            client.predict([b"1"])
        assert server.num_connections == 1


def test_the_synchronous_client_works_while_an_event_loop_runs():
    async def work(url: str) -> float:
        with Client(url) as client:
            return float(client.predict([b"7"]).scores[0, 1])

    with serving() as server:
        assert asyncio.run(work(server.url)) == 7


def test_the_synchronous_client_serves_several_threads():
    results: dict[int, float] = {}

    def work(number: int) -> None:
        results[number] = float(client.predict([b"%d" % number]).scores[0, 1])

    with serving(default=slowly) as server, Client(server.url) as client:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {number: number for number in range(10)}


def test_ctrl_c_ends_the_run_and_leaves_the_client_usable():
    def interrupts(request: Request) -> Reply:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return slowly(request)

    with serving(scores, interrupts, default=slowly) as server, Client(server.url) as client:
        with pytest.raises(KeyboardInterrupt):
            client.predict([b"1"] * 2000)
        num_requests = len(server.requests)
        for _ in range(10):
            client.predict([b"7"])
    assert len(server.requests) < num_requests + 10 + 16


def test_a_client_that_is_not_closed_leaves_no_thread():
    with serving() as server:
        before = threading.active_count()
        client = Client(server.url)
        client.predict([b"1"])
        thread = client._thread
        del client
        thread.join(10)
        assert threading.active_count() <= before + 1  # a reader of files may be left


def test_closing_twice_is_closing():
    client = Client("http://127.0.0.1:1")
    client.close()
    client.close()


def test_the_key_is_not_shown():
    with Client("http://127.0.0.1:1", "secret-key-of-16") as client:
        assert "secret" not in repr(client)


def test_an_environment_proxy_does_not_come_between_this_machine_and_itself(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    with serving() as server:
        assert score_one(server, deadline=1) == 7


# Mistakes.


@pytest.mark.parametrize("url", ["", "tableware", "127.0.0.1:8000", "ftp://host", "http://", "http://a:b:c"])
def test_an_address_that_is_none(url):
    with pytest.raises(UsageError, match="address"):
        Client(url)


@pytest.mark.parametrize("key", ["", "two words", "line\nend", "schlüssel"])
def test_a_key_that_no_header_can_hold(key):
    with pytest.raises(UsageError, match="key") as caught:
        Client("http://127.0.0.1:1", key)
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ([], {}, "no images"),
        ("photo.jpg", {}, "come as a list"),
        (b"photo", {}, "come as a list"),
        ([7], {}, "item 0 is a int"),
        ([b"1"], {"concurrency": 0}, "at least 1"),
        ([b"1"], {"batch_size": 0}, "at least 1"),
    ],
)
def test_wrong_usage(images, options, message):
    with Client("http://127.0.0.1:1") as client, pytest.raises(UsageError, match=message):
        client.predict(images, **options)


def test_a_deadline_that_is_none():
    with pytest.raises(UsageError, match="deadline"):
        Client("http://127.0.0.1:1", deadline=0)


def test_an_array_that_is_no_image():
    with serving() as server, Client(server.url) as client:
        with pytest.raises(ImageError, match=re.escape("uint8 [H, W, 3], not float64 [2, 2]")):
            client.score([np.zeros((2, 2))])
        predictions = client.predict([np.zeros((2, 2)), b"1"])
    assert "uint8 [H, W, 3]" in predictions.errors[0]


# The command.


@pytest.fixture
def environment(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("JAXCLS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("JAXCLS_SERVICE_KEY", raising=False)


@pytest.mark.usefixtures("environment")
def test_score_command(files, tmp_path, monkeypatch, capsys):
    paths = files(3)
    (tmp_path / "key").write_text("# of today\n\nkey-of-the-file-1\nanother-key-here\n")
    with serving() as server:
        assert main(["score", server.url, str(tmp_path), "--key-file", str(tmp_path / "key")]) == 0
        lines = capsys.readouterr().out.splitlines()
        monkeypatch.setenv("JAXCLS_SERVICE_KEY", "key-of-environment")
        paths[1].write_text("no picture")
        arguments = ["score", server.url, *map(str, paths), "--out", str(tmp_path / "rows.csv"), "--softmax"]
        assert main([*arguments, "--image-resize-dims", "64", "48"]) == 1
    assert [line.split() for line in lines[1:]] == [
        [str(paths[0]), "blue", "0.5000"],
        [str(paths[1]), "red", "0.8808"],
        [str(paths[2]), "red", "0.9820"],
    ]
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["score:red"] for row in rows] == ["0.0", "", "2.0"]
    assert rows[1]["error"] == f"{paths[1]}: not an image"
    keys = [request.headers["authorization"] for request in server.requests]
    assert keys == ["Bearer key-of-the-file-1"] * 3 + ["Bearer key-of-environment"] * 3
    sent = json.loads(server.requests[-1].body)
    assert (sent["softmax"], sent["image_resize_dims"]) == (True, [64, 48])


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("service", "code", "message"),
    [("tableware", 1, "there is no deployment tableware"), ("http://127.0.0.1:1/", 2, "holds no images")],
)
def test_score_command_used_wrongly(service, code, message, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    image = tmp_path / ("empty" if "http" in service else "a.png")
    assert main(["score", service, str(image)]) == code
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("environment")
def test_score_command_with_a_file_without_a_key(tmp_path, capsys):
    (tmp_path / "key").write_text("# none\n")
    assert main(["score", "http://127.0.0.1:1", "a.png", "--key-file", str(tmp_path / "key")]) == 2
    assert "holds no key" in capsys.readouterr().err


def test_score_command_loads_no_jax_and_stops_at_ctrl_c(files):
    """It is sent while a request waits for its answer."""
    code = (
        "import sys; from jaxcls.cli import main; code = main(); print('jax' in sys.modules); sys.exit(code)"
    )
    (path,) = files(1)
    with serving(default=hangs) as server:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "score", server.url, str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        end = time.monotonic() + 10
        while not server.requests:
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=5)
    assert (process.returncode, out, error) == (130, "False\n", "jaxcls: interrupted\n")

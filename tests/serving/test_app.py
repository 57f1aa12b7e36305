"""A replica over HTTP, as its clients meet it: good ones, mistaken ones, and hostile ones."""

import asyncio
import base64
import gzip
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import numpy as np
import pytest
import tritonclient.http as triton
from PIL import Image
from services import start_service

from jaxcls.classifier import load
from jaxcls.scoring import predict

SLOW = pytest.mark.slow
KEY, OTHER_KEY = "0123456789abcdef", "fedcba9876543210"
JPEG = {"content-type": "image/jpeg"}


@pytest.fixture(scope="module")
def service(served_model, service_home):
    options = ("--deadline-ms", 2000, "--max-queue", 64, "--max-body-mib", 8)
    with start_service(served_model, service_home, *options) as served:
        yield served


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.touch(0o600)
    path.write_text(f"# of the tests\n{KEY}\n")
    return path


@pytest.fixture(scope="module")
def guarded(served_model, service_home, key_file):
    with start_service(served_model, service_home, "--key-file", key_file) as served:
        yield served


@pytest.fixture(scope="module")
def expected(served_model, pictures):
    """float32 [12, 3]: what `predict` says."""
    return predict(load(served_model), pictures).scores


@pytest.fixture
def http():
    with httpx2.Client(timeout=30) as client:
        yield client


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def raw_connection(service):
    address = urlsplit(service.url)
    return socket.create_connection((address.hostname, address.port), timeout=30)


def read_answer(connection):
    """The status of what comes until the other side closes, or the body is whole."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        if not part:
            break
        data += part
    return int(data.split()[1]) if data else None


# Good clients.


def score_image_list_with_http(images, service_endpoint_url, service_key=None, parameters=None):
    """The client that AMLPCV's document publishes, with another HTTP library."""
    headers = {"Content-Type": "application/json", "X-Marathon-App-Id": ""}
    if service_key is not None:
        headers["Authorization"] = "Bearer " + service_key
    payload = []
    for image in images:
        encoded = base64.b64encode(image.read_bytes())
        payload.append({"image_in_base64": f"{encoded}", "parameters": parameters or {}})
    response = httpx2.post(service_endpoint_url, content=json.dumps(payload), headers=headers)
    return json.loads(response.text)


def test_the_published_client(service, pictures, expected):
    result = score_image_list_with_http(pictures, f"{service.url}/score")
    assert all(isinstance(text, str) for text in result)
    scores = np.array([json.loads(text) for text in result])
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


def test_the_published_client_with_a_key(guarded, pictures, expected):
    result = score_image_list_with_http(pictures[:2], f"{guarded.url}/score", KEY)
    np.testing.assert_allclose([json.loads(text) for text in result], expected[:2], rtol=1e-5, atol=1e-6)


def test_softmax_and_resize_dims(service, http, pictures, expected):
    encoded = base64.b64encode(pictures[0].read_bytes()).decode()
    parameters = {"image_resize_dims": [48, 40], "ADD_SOFTMAX": True}
    body = [{"image_in_base64": encoded, "parameters": parameters}]
    answer = http.post(f"{service.url}/score", json=body)
    probabilities = np.array(json.loads(answer.json()[0]))
    assert float(answer.headers["x-execution-time-ms"]) > 0
    # That is the size it has.
    exponentials = np.exp(expected[0] - expected[0].max())
    np.testing.assert_allclose(probabilities, exponentials / exponentials.sum(), rtol=1e-4)
    body[0]["parameters"] = {"image_resize_dims": [90, 10]}
    other = json.loads(http.post(f"{service.url}/score", json=body).json()[0])
    assert np.abs(np.array(other) - expected[0]).max() > 1e-3


def test_raw_bytes_multipart_and_json_are_scored_alike(service, http, pictures, expected):
    url, data = f"{service.url}/v1/predict", [path.read_bytes() for path in pictures[:3]]
    answers = [
        *(http.post(url, content=one, headers=JPEG).json()["predictions"][0] for one in data),
        *http.post(url, files=[("image", one) for one in data]).json()["predictions"],
        *http.post(url, json={"images": [{"base64": base64.b64encode(one).decode()} for one in data]}).json()[
            "predictions"
        ],
    ]
    for answer, scores in zip(answers, np.tile(expected[:3], (3, 1)), strict=True):
        np.testing.assert_allclose(list(answer["scores"].values()), scores, rtol=1e-5, atol=1e-6)
        best = ("blue", "green", "red")[scores.argmax()]
        assert (answer["label"], answer["abstained"]) == (best, False)
        assert answer["score"] == pytest.approx(float(scores.max()), rel=1e-5)


@pytest.mark.parametrize("is_binary", [True, False])
def test_triton_client(service, pictures, expected, served_model, is_binary):
    client = triton.InferenceServerClient(urlsplit(service.url).netloc)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("colours")
    metadata = client.get_model_metadata("colours")
    assert (metadata["name"], metadata["inputs"][0]["name"]) == ("colours", "images")
    preprocess = load(served_model).preprocess
    ready = np.stack([preprocess.resize_and_crop(Image.open(path)) for path in pictures])
    encoded = np.array([path.read_bytes() for path in pictures], np.object_)
    for images, kind in ((ready, "UINT8"), (encoded, "BYTES")):
        if kind == "BYTES" and not is_binary:
            continue  # the client refuses bytes that are not UTF-8 in JSON
        tensor = triton.InferInput("images", list(images.shape), kind)
        tensor.set_data_from_numpy(images, binary_data=is_binary)
        output = triton.InferRequestedOutput("scores", binary_data=is_binary)
        result = client.infer("colours", [tensor], outputs=[output], request_id="7")
        np.testing.assert_allclose(result.as_numpy("scores"), expected, rtol=1e-5, atol=1e-6)
        assert result.get_response()["id"] == "7"


def test_many_at_once_each_get_their_own_scores(service, pictures, expected):
    def ask(index):
        body = pictures[index % 12].read_bytes()
        answer = httpx2.post(f"{service.url}/v1/predict", content=body, headers=JPEG, timeout=30).json()
        return list(answer["predictions"][0]["scores"].values())

    with ThreadPoolExecutor(16) as pool:
        scores = list(pool.map(ask, range(96)))
    np.testing.assert_allclose(scores, np.tile(expected, (8, 1)), rtol=1e-5, atol=1e-6)
    assert service.metric("jaxcls_compilations_total") == 0


def test_metrics_and_documents(service, http, pictures):
    http.post(f"{service.url}/v1/predict", content=pictures[0].read_bytes(), headers=JPEG)
    assert service.metric("jaxcls_requests_total") >= 1
    assert service.metric("jaxcls_batch_images_total") >= 1
    assert service.metric("jaxcls_queue_images") == 0
    document = http.get(f"{service.url}/openapi.json").json()
    assert {"/score", "/v1/predict"} <= document["paths"].keys()
    assert http.get(f"{service.url}/v2").json()["name"] == "jaxcls"


# Mistaken clients.


def test_one_bad_image_errs_alone(service, http, pictures, expected):
    good = base64.b64encode(pictures[0].read_bytes()).decode()
    bad = base64.b64encode(b"no image").decode()
    answer = http.post(
        f"{service.url}/v1/predict", json={"images": [{"base64": x} for x in (good, bad, good)]}
    )
    first, second, third = answer.json()["predictions"]
    assert answer.status_code == 200
    assert "not an image in a known format" in second["error"]
    np.testing.assert_allclose(list(first["scores"].values()), expected[0], rtol=1e-5, atol=1e-6)
    assert first["scores"] == pytest.approx(third["scores"])
    answer = http.post(f"{service.url}/score", json=[{"image_in_base64": x} for x in (good, bad)])
    assert answer.status_code == 200
    assert "error" in json.loads(answer.json()[1])


BAD_REQUESTS = {
    "not JSON": ("POST", "/score", b"{", 400),
    "deep JSON": ("POST", "/score", b"[" * 100_000, 400),
    "no image": ("POST", "/v1/predict", b"no image", 400),
    "no base64": ("POST", "/score", b'[{"image_in_base64": "***"}]', 400),
    "no images": ("POST", "/score", b"[]", 400),
    "unknown path": ("GET", "/nowhere", b"", 404),
    "wrong method": ("GET", "/score", b"", 405),
    "another model": ("POST", "/v2/models/other/infer", b"{}", 404),
    "a body too large": ("POST", "/score", b" " * (9 * 2**20), 413),
    "more images than the queue holds": (
        "POST", "/v1/predict", json.dumps({"images": [{"base64": "AAAA"}] * 65}).encode(), 413
    ),
}  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body", "status"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_mistakes_are_named(service, http, method, path, body, status):
    is_json = path != "/v1/predict" or body.startswith(b"{")
    kind = "application/json" if is_json else "image/png"
    answer = http.request(method, f"{service.url}{path}", content=body, headers={"content-type": kind})
    assert answer.status_code == status
    assert answer.json()["error"]


def test_a_compressed_body_is_refused(service, http):
    bomb = gzip.compress(bytes(50 * 2**20))
    answer = http.post(f"{service.url}/score", content=bomb, headers={"content-encoding": "gzip"})
    assert answer.status_code == 415


def test_urls_are_refused_unless_allowed(service, http):
    answer = http.post(f"{service.url}/v1/predict", json={"images": [{"url": "http://127.0.0.1/x.png"}]})
    assert answer.status_code == 400
    assert "does not fetch images by URL" in answer.json()["error"]


def test_urls_go_through_the_guard(served_model, service_home, http):
    with start_service(served_model, service_home, "--allow-urls") as served:
        answer = http.post(f"{served.url}/v1/predict", json={"images": [{"url": f"{served.url}/v2"}]})
        assert answer.status_code == 400
        assert "is not allowed" in answer.json()["error"]
        assert served.metric("jaxcls_requests_total") == 1  # it did not ask itself


# Keys.


@pytest.mark.parametrize("headers", [{}, bearer(OTHER_KEY), bearer("x"), {"authorization": KEY}])
def test_no_key_no_service(guarded, http, headers):
    for path in ("/score", "/v1/predict", "/metrics", "/v2/models/colours", "/openapi.json"):
        assert http.request("POST", guarded.url + path, headers=headers).status_code == 401
    assert http.get(f"{guarded.url}/v2/health/ready", headers=headers).status_code == 200


def test_a_key_is_checked_before_the_body_is_read(guarded):
    with raw_connection(guarded) as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
        assert read_answer(connection) == 401


def test_keys_are_read_again_on_sighup(guarded, http, key_file):
    key_file.write_text(f"{KEY}\n{OTHER_KEY}\n")
    guarded.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 10
    while http.get(f"{guarded.url}/v2", headers=bearer(OTHER_KEY)).status_code == 401:
        assert time.monotonic() < deadline
    assert http.get(f"{guarded.url}/v2", headers=bearer(KEY)).status_code == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines: give a --key-file"),
        (["--key-file", __file__], "chmod 600"),
        (["--batch-sizes", "0"], "batch sizes"),
        (["--grace-seconds", "99"], "grace_seconds"),
        (["--name", "a{b}"], "model name 'a{b}'"),
        (["--port", "65536"], "cannot listen on 127.0.0.1 port 65536"),
    ],
)
def test_wrong_options_are_refused(served_model, service_home, options, message):
    done = subprocess.run(
        [sys.executable, "-m", "jaxcls.cli", "serve", served_model, *options],
        env={"PATH": "", "JAXCLS_HOME": str(service_home)}, capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert message in done.stderr


def test_a_port_that_is_taken(service, served_model, service_home):
    port = urlsplit(service.url).port
    done = subprocess.run(
        [sys.executable, "-m", "jaxcls.cli", "serve", served_model, "--port", str(port)],
        env={"PATH": "", "JAXCLS_HOME": str(service_home)}, capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in done.stderr


# Hostile clients.


def until_idle(service, seconds=10):
    deadline = time.monotonic() + seconds
    while service.metric("jaxcls_queue_images") or service.metric("jaxcls_queue_bytes"):
        assert time.monotonic() < deadline


def test_clients_that_go_free_their_places(service, pictures):
    body = pictures[0].read_bytes()
    request = b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\ncontent-length: %d\r\n\r\n"
    for number in range(1000):
        with raw_connection(service) as connection:
            # Some in the middle of the body, some while it is scored.
            connection.sendall(request % len(body) + body[: None if number % 2 else 100])
    until_idle(service)
    assert httpx2.post(f"{service.url}/v1/predict", content=body, headers=JPEG).status_code == 200


@contextmanager
def growing_by_less_than(num_bytes, service):
    """Require so of the service's peak memory while the block runs."""
    folder = Path(f"/proc/{service.process.pid}")

    def peak():
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", (folder / "status").read_text())[1])

    (folder / "clear_refs").write_text("5")  # the peak starts anew
    before = peak()
    yield
    assert peak() - before < num_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_of_100_mb_is_refused_and_not_kept(service, is_chunked):
    part, num_parts = bytes(10**6), 100
    framing = b"transfer-encoding: chunked" if is_chunked else b"content-length: %d" % (len(part) * num_parts)
    chunk = b"%x\r\n%s\r\n" % (len(part), part) if is_chunked else part
    with growing_by_less_than(50 * 10**6, service), raw_connection(service) as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nhost: x\r\n" + framing + b"\r\n\r\n")
        with suppress(ConnectionError):  # it may close before all is sent
            for _ in range(num_parts):
                connection.sendall(chunk)
        assert read_answer(connection) == 413
    until_idle(service)


def test_a_body_that_does_not_come(service):
    """Its deadline is 2 s."""
    with raw_connection(service) as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n[")
        started = time.monotonic()
        assert read_answer(connection) == 408
        assert 1.5 < time.monotonic() - started < 4
    until_idle(service)


def is_closed(connection):
    """Whether the other side ends the connection."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_headers_without_end(service):
    with raw_connection(service) as connection:
        with suppress(OSError):  # it is cut off while it sends
            connection.sendall(b"POST /score HTTP/1.1\r\n" + b"x-more: x\r\n" * 100_000)
        assert is_closed(connection)


@SLOW
def test_connections_that_never_ask(service):
    with raw_connection(service) as silent, raw_connection(service) as half:
        half.sendall(b"POST /score HT")
        assert is_closed(silent)
        assert is_closed(half)


def test_what_exceeds_the_queue_is_refused_at_once(served_model, service_home, pictures):
    """A queue of one."""
    body = pictures[0].read_bytes()

    async def ask(client):
        started = time.perf_counter()
        answer = await client.post("/v1/predict", content=body, headers=JPEG)
        return answer.status_code, answer.headers.get("retry-after"), time.perf_counter() - started

    async def ask_all(url):
        async with httpx2.AsyncClient(base_url=url, timeout=30) as client:
            return await asyncio.gather(*(ask(client) for _ in range(40)))

    with start_service(served_model, service_home, "--max-queue", 1) as served:
        answers = asyncio.run(ask_all(served.url))
        counted = httpx2.get(f"{served.url}/metrics").text
    statuses = [status for status, _, _ in answers]
    assert set(statuses) == {200, 429}
    for status in (200, 429):
        line = f'jaxcls_requests_total{{endpoint="/v1/predict",status="{status}"}} {statuses.count(status)}.0'
        assert line in counted
    assert all(int(after) >= 1 for status, after, _ in answers if status == 429)


# The end.


def test_sigterm_answers_what_was_accepted_and_exits(served_model, service_home, pictures, expected):
    results, stop = [], threading.Event()

    def ask(index, url):
        with httpx2.Client(timeout=30) as client:
            while not stop.is_set():
                try:
                    answer = client.post(
                        f"{url}/v1/predict", content=pictures[index].read_bytes(), headers=JPEG
                    )
                except httpx2.ConnectError:  # it has gone
                    return
                results.append((index, answer))

    with (
        start_service(served_model, service_home, "--grace-seconds", 1) as served,
        ThreadPoolExecutor(4) as pool,
    ):
        asking = [pool.submit(ask, index, served.url) for index in range(4)]
        while len(results) < 20:
            time.sleep(0.01)
        served.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 0.9
        while httpx2.get(f"{served.url}/v2/health/ready").status_code == 200:
            assert time.monotonic() < deadline
        num_before = len(results)
        assert served.process.wait(30) == 0
        stop.set()
        for asked in asking:
            asked.result()
    assert len(results) > num_before  # still taken while it said that it was not ready
    for index, answer in results:
        if answer.status_code == 503:  # refused in the last moment, not accepted
            assert "shutting down" in answer.json()["error"]
            continue
        scores = list(answer.json()["predictions"][0]["scores"].values())
        np.testing.assert_allclose(scores, expected[index], rtol=1e-5, atol=1e-6)


def test_ctrl_c_ends_it_at_once(served_model, service_home):
    with start_service(served_model, service_home) as served:
        started = time.monotonic()
        code, text = served.end(by=signal.SIGINT)
        assert (code, text) == (0, "")
        assert time.monotonic() - started < 3


WITH_A_TRAP = """
import sys
import threading
import jaxcls.serving.replica as replica
make_scorer = replica.make_scorer

def make_trap(*arguments, **options):
    score = make_scorer(*arguments, **options)
    def stumble_over_white(images):
        if (images == 255).all(axis=(1, 2, 3)).any():
            STUMBLE
        return score(images)
    return stumble_over_white

replica.make_scorer = make_trap
replica.MAX_SHUTDOWN_SECONDS = 2
from jaxcls.cli import main
sys.exit(main())
"""
FAILING = WITH_A_TRAP.replace("STUMBLE", "raise RuntimeError('INTERNAL: the device has failed')")
HANGING = WITH_A_TRAP.replace("STUMBLE", "threading.Event().wait()")
WHITE = {
    "name": "images",
    "shape": [1, 32, 32, 3],
    "datatype": "UINT8",
    "data": np.full((1, 32, 32, 3), 255).tolist(),
}


def test_an_image_that_breaks_the_device_errs_alone_and_the_second_ends_the_process(
    served_model, service_home, pictures, expected
):
    ask = {"inputs": [WHITE]}
    with start_service(served_model, service_home, code=FAILING) as served:
        url = f"{served.url}/v2/models/colours/infer"
        with ThreadPoolExecutor(9) as pool:
            first = pool.submit(httpx2.post, url, json=ask, timeout=30)
            others = [
                pool.submit(
                    httpx2.post,
                    f"{served.url}/v1/predict",
                    content=path.read_bytes(),
                    headers=JPEG,
                    timeout=30,
                )
                for path in pictures[:8]
            ]
        assert first.result().status_code == 500
        for other, scores in zip(others, expected, strict=False):
            found = list(other.result().json()["predictions"][0]["scores"].values())
            np.testing.assert_allclose(found, scores, rtol=1e-5, atol=1e-6)
        assert httpx2.get(f"{served.url}/v2/health/ready").status_code == 200
        assert httpx2.post(url, json=ask, timeout=30).status_code == 500
        assert served.process.wait(30) == 1


def test_it_ends_within_its_limit_though_the_device_hangs(served_model, service_home):
    with (
        start_service(served_model, service_home, "--grace-seconds", 0, code=HANGING) as served,
        ThreadPoolExecutor(1) as pool,
    ):
        url = f"{served.url}/v2/models/colours/infer"
        asked = pool.submit(httpx2.post, url, json={"inputs": [WHITE]}, timeout=30)
        deadline = time.monotonic() + 10
        while not served.metric("jaxcls_queue_images"):
            assert time.monotonic() < deadline
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(8) == 1
        with suppress(httpx2.TransportError):  # whether it still hears of it is left open
            asked.result()

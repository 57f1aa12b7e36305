"""What a replica must bear in the long run: any file, any request, thousands of them."""

import json
import os
import random
import subprocess
import sys
import tarfile
import time
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx2
import psutil
import pytest
from services import start_service

pytestmark = pytest.mark.slow
NUM_REQUESTS, NUM_WARM_UP = 10_000, 2_000
MAX_GROWTH = 50 * 2**20
SCHEMATHESIS = """
[checks]
# A schema can say neither "is an image" nor "the data fit the shape".
positive_data_acceptance.enabled = false
negative_data_rejection.expected-statuses = [400, 401, 404, 405, 413, 415]
"""


@pytest.fixture(scope="module")
def service(served_model, service_home):
    with start_service(served_model, service_home) as served:
        yield served


def odd_files(shared):
    for path in sorted((shared / "data" / "images_odd").glob("*.tar.gz")):
        with tarfile.open(path) as tar:
            yield from (tar.extractfile(member).read() for member in tar if member.isfile())


def test_any_file_is_answered_quickly(service, shared):
    url = f"{service.url}/v1/predict"

    def post(data):
        started = time.perf_counter()
        answer = client.post(url, content=data, headers={"content-type": "application/octet-stream"})
        return answer.status_code, time.perf_counter() - started

    with httpx2.Client(timeout=30) as client, ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(post, odd_files(shared)))
    assert len(outcomes) > 5000
    assert {status for status, _ in outcomes} == {200, 400}
    assert max(seconds for _, seconds in outcomes) < 1


def test_ten_thousand_mixed_requests_leave_nothing_behind(service, pictures):
    photos = [path.read_bytes() for path in pictures]
    encoded = [b64encode(photo).decode() for photo in photos]
    generator = random.Random(0)
    kinds = [
        lambda: ("/v1/predict", generator.choice(photos), "image/png"),
        lambda: ("/v1/predict", b"no image", "image/png"),
        lambda: ("/v1/predict", json.dumps({"images": generator.sample(encoded, 5)}), "application/json"),
        lambda: ("/score", json.dumps([{"image_in_base64": generator.choice(encoded)}]), "application/json"),
        lambda: ("/score", "{", "application/json"),
        lambda: ("/nowhere", "", "text/plain"),
    ]

    def ask(_):
        path, body, kind = generator.choice(kinds)()
        return client.post(service.url + path, content=body, headers={"content-type": kind}).status_code

    process = psutil.Process(service.process.pid)
    with httpx2.Client(timeout=30) as client, ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(NUM_WARM_UP)))
        before = process.memory_info().rss
        statuses = list(pool.map(ask, range(NUM_REQUESTS)))
    assert set(statuses) == {200, 400, 404}
    assert process.memory_info().rss - before <= MAX_GROWTH
    assert service.metric("jaxcls_compilations_total") == 0
    assert service.metric("jaxcls_queue_images") == 0


def test_the_document_tells_no_lies(service, tmp_path):
    pytest.importorskip("schemathesis")
    (tmp_path / "schemathesis.toml").write_text(SCHEMATHESIS)
    done = subprocess.run(
        [
            sys.executable, "-m", "schemathesis.cli", "run", f"{service.url}/openapi.json", "--seed", "0",
            "--max-examples", "30", "--phases", "examples,coverage,fuzzing", "--suppress-health-check", "all",
        ],
        cwd=tmp_path, env={**os.environ, "NO_PROXY": urlsplit(service.url).hostname}, capture_output=True,
        text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "passed" in done.stdout

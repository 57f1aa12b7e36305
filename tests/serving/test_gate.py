"""The gate of a replica: who is refused before the body is read, and how that is counted."""

import asyncio
import json

import pytest

from jaxcls.serving.admission import Admission
from jaxcls.serving.app import Gate, Identity, Replica
from jaxcls.serving.auth import Keys
from jaxcls.serving.metrics import Metrics

KEY = "k" * 40


@pytest.fixture
def replica(tmp_path):
    """A replica that takes one image in, for those who show the key."""
    file = tmp_path / "keys"
    file.touch(0o600)
    file.write_text(KEY)
    admission = Admission(1, 1000, 1.0, lambda: 0.1)
    return Replica(None, admission, Metrics(), Identity("model", "1", Keys.read(file)), 1.0, 1000)


def ask(replica, method="POST", path="/score", key=KEY):
    """The status and JSON of an answer; status 0: the request was let in."""
    sent = []

    async def app(scope, receive, send):
        sent.append({"status": 0})

    async def receive():
        raise AssertionError("the body is read")

    async def send(message):
        sent.append(message)

    headers = [(b"authorization", f"Bearer {key}".encode())]
    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    asyncio.run(Gate(app, replica, {"/score"})(scope, receive, send))
    start, *rest = sent
    return start["status"], json.loads(rest[0]["body"]) if rest else None


def test_a_full_replica_refuses_before_the_body_is_read_and_counts_it(replica):
    assert ask(replica) == (0, None)
    with replica.admission.images(1):
        status, problem = ask(replica)
    assert (status, problem) == (429, {"error": "the queue is full: come again later"})
    assert b'jaxcls_requests_total{endpoint="/score",status="429"} 1.0' in replica.metrics.text()
    assert ask(replica) == (0, None)


def test_what_scores_nothing_is_let_in_and_who_has_no_key_is_not(replica):
    with replica.admission.images(1):
        assert ask(replica, "GET") == (0, None)
        assert ask(replica, path="/metrics") == (0, None)
        assert ask(replica, key="wrong")[0] == 401

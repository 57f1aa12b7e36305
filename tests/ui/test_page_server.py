"""The server of local pages: who is let in."""

import asyncio
import socket
import sys
import threading

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from jaxcls.errors import RequestError, UsageError
from jaxcls.ui import app
from jaxcls.ui.app import Page, forward_command, has_display, make_app, read_json, serve_page

TOKEN = "a-token-of-this-test"
OWN = "http://127.0.0.1:8000"


async def echo(request: Request) -> JSONResponse:
    return JSONResponse(await read_json(request) if request.method == "POST" else "read")


async def refuse(request: Request) -> JSONResponse:
    raise RequestError(418, "a teapot")


PAGE = Page(
    "testing", lambda: b"<!doctype html>page",
    [Route("/echo", echo, methods=["GET", "POST"]), Route("/refuse", refuse)],
)  # fmt: skip


def client(base_url: str = OWN) -> TestClient:
    return TestClient(make_app(PAGE, TOKEN), base_url=base_url, follow_redirects=False)


@pytest.fixture
def known() -> TestClient:
    """A browser that opened the address with the token."""
    browser = client()
    answer = browser.get(f"/?token={TOKEN}")
    assert (answer.status_code, answer.headers["location"]) == (303, "./")
    assert "HttpOnly" in answer.headers["set-cookie"]
    return browser


def test_who_shows_the_token_once_is_known_afterwards(known):
    answer = known.get("/")
    assert (answer.status_code, answer.content) == (200, b"<!doctype html>page")
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert known.get("/echo").json() == "read"


@pytest.mark.parametrize(
    "path", ["/", "/echo", "/?token=", "/?token=another", "/echo?token=" + TOKEN, "/?token=ü"]
)
def test_without_the_token_there_is_nothing(path):
    answer = client().get(path)
    assert answer.status_code == 401
    assert "with its token" in answer.json()["error"]


def test_a_wrong_cookie_opens_nothing(known):
    name = next(iter(known.cookies))
    stranger = client()
    for value in ("", "another", TOKEN[:-1]):
        assert stranger.get("/echo", headers={"cookie": f"{name}={value}"}).status_code == 401
    assert stranger.get("/echo", headers={"cookie": f"jaxcls={TOKEN}"}).status_code == 401


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:1", "localhost:8888", "LOCALHOST:65535", "[::1]:8000"]
)
def test_any_port_may_be_forwarded(known, host):
    headers = {"host": host, "origin": f"http://{host}"}
    assert known.get("/echo", headers=headers).status_code == 200
    assert known.post("/echo", json=[1], headers=headers).json() == [1]


@pytest.mark.parametrize(
    "host",
    ["example.com", "127.0.0.1.example.com", "localhost.example.com:80", "127.0.0.1:80@example.com",
     "10.0.0.1", "0.0.0.0", "127.0.0.1:", "[::1", "", "127.0.0.1:80 x"],
)  # fmt: skip
def test_other_hosts_are_refused(known, host):
    """A stranger's page may have its own name lead to 127.0.0.1, and be read by its scripts."""
    for path in ("/echo", f"/?token={TOKEN}"):
        answer = known.get(path, headers={"host": host})
        assert answer.status_code == 421
        assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "origin",
    [
        None,
        "null",
        "http://127.0.0.1:9000",
        "http://localhost:8000",
        "https://127.0.0.1:8000",
        "http://e.com",
    ],
)
def test_other_pages_change_nothing(known, origin):
    headers = {} if origin is None else {"origin": origin}
    assert known.post("/echo", json=[1], headers=headers).status_code == 403


def test_bodies_are_bounded_and_json(known, monkeypatch):
    headers = {"origin": OWN}
    assert known.post("/echo", content=b"{", headers=headers).json() == {"error": "the body is no JSON"}
    assert known.post("/echo", content=b"[" * 100_000, headers=headers).status_code == 400
    monkeypatch.setattr(app, "MAX_BODY_BYTES", 100)
    assert known.post("/echo", json="x" * 101, headers=headers).status_code == 413


def test_errors_are_answers(known):
    assert known.get("/refuse").status_code == 418
    assert known.get("/refuse").json() == {"error": "a teapot"}
    assert known.get("/nowhere").json() == {"error": "Not Found"}


def test_the_page_is_made_beside_the_loop_that_answers_others():
    makers = []

    def make() -> bytes:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        makers.append(threading.current_thread())
        return b"page"

    browser = TestClient(make_app(Page("testing", make), TOKEN), base_url=OWN)
    assert browser.get(f"/?token={TOKEN}").content == b"page"
    assert len(makers) == 1


def test_a_taken_port_is_said():
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(UsageError, match=r"port \d+: .* give another --port"),
    ):
        serve_page(PAGE, port=taken.getsockname()[1])
    with pytest.raises(UsageError, match="port 70000"):
        serve_page(PAGE, port=70000)


def test_the_command_that_forwards_a_port(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu7")
    monkeypatch.setattr(app.getpass, "getuser", lambda: "ann")
    assert forward_command(8123, {}) == "ssh -N -L 8123:127.0.0.1:8123 ann@gpu7"
    session = {"SSH_CONNECTION": "10.0.0.2 5555 10.0.0.9 2222"}
    assert forward_command(8123, session) == "ssh -N -L 8123:127.0.0.1:8123 -p 2222 ann@10.0.0.9"


def test_a_browser_is_opened_only_where_it_is_seen(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    assert not has_display({})
    assert has_display({"DISPLAY": ":0"})
    assert has_display({"WAYLAND_DISPLAY": "wayland-0"})
    assert not has_display({"DISPLAY": "localhost:10.0", "SSH_CONNECTION": "10.0.0.2 5555 10.0.0.9 22"})
    monkeypatch.setattr(sys, "platform", "darwin")
    assert has_display({})

"""A page of this machine: served on 127.0.0.1 to whoever knows its token, and to no other site or machine.

A command makes a `Page` and calls `serve_page`; `make_app` is the same without a socket, for tests:

    require_extra()  # of `extra`
    page = Page("reviewing photos", lambda: html, [Route("/thumbnails/{index:int}", thumbnail)])
    serve_page(page, port=0)

`html` is made anew each time that the page is loaded, such as by `page.make_page`, and brings its policy. The
addresses in it are relative. A request that reaches one of the routes has shown the token and comes from this
page: they need check neither. What they raise as a `RequestError` becomes JSON with the key "error" and its
status; other errors of ours have the status 500.
"""

import getpass
import hashlib
import hmac
import json
import os
import re
import secrets
import shlex
import socket
import sys
import webbrowser
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, ExceptionHandler, Message, Receive, Scope, Send

from jaxcls.errors import JaxclsError, RequestError, UsageError
from jaxcls.storage import Storage

MAX_BODY_BYTES = 16 * 2**20
"""Of a request: the paths of 100,000 photos."""

MAX_PORT = 65535

_OWN_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
"""Any port: that of a forwarded one is another. A name of somebody else's that leads here is refused."""

_HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Page:
    """What is served.

    Attributes:
        title: said on the terminal before the address.
        html: makes the page, in UTF-8; called in any thread.
        routes: all other addresses.
    """

    title: str
    html: Callable[[], bytes]
    routes: Sequence[BaseRoute] = ()


def make_app(page: Page, token: str) -> Starlette:
    """The ASGI application of a page that is opened with `/?token=TOKEN`."""

    async def show(request: Request) -> Response:
        # Without the token, so that it is neither kept among the visited addresses nor passed on.
        if "token" in request.query_params:
            answer: Response = RedirectResponse("./", 303)
            answer.set_cookie(_cookie_name(token), token, httponly=True, samesite="lax")
        else:
            answer = HTMLResponse(await run_in_threadpool(page.html))
        answer.headers["Cache-Control"] = "no-store"
        return answer

    return Starlette(
        routes=[Route("/", show), *page.routes],
        middleware=[Middleware(Guard, token=token)],
        exception_handlers=HANDLERS,
    )


async def read_json(request: Request) -> object:
    """The JSON body of a request.

    Raises:
        RequestError: it is too large, or is none.
    """
    parts, num_bytes = [], 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes > MAX_BODY_BYTES:
            raise RequestError(413, f"a body of at most {MAX_BODY_BYTES:,} bytes is taken")
        parts.append(part)
    try:
        return json.loads(b"".join(parts))
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "the body is no JSON") from error


class Guard:
    """Before everything else: this machine's host and the token; for changes, also this page's origin."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError("only HTTP is served")

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        app = self._refusal(Request(scope)) or self.app
        await app(scope, receive, send_guarded)

    def _refusal(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        if not _OWN_HOST.fullmatch(host):
            return _problem(421, "this page is served under 127.0.0.1 and localhost alone")
        shown = request.cookies.get(_cookie_name(self.token), "")
        if request.url.path == "/":
            shown = request.query_params.get("token", shown)
        if not hmac.compare_digest(shown.encode(errors="replace"), self.token.encode()):
            return _problem(401, "open the whole address that jaxcls printed, with its token")
        if request.method not in ("GET", "HEAD") and request.headers.get("origin") != f"http://{host}":
            return _problem(403, "another page may not change anything here")
        return None


def serve_page(page: Page, *, port: int = 0) -> None:
    """Serve a page until Ctrl-C, having printed its address; where there is a display, it is opened.

    Args:
        page: what is served.
        port: on 127.0.0.1; 0: any free one.

    Raises:
        UsageError: the port cannot be had.
    """
    token = secrets.token_urlsafe(24)
    with ExitStack() as stack:
        listener = stack.enter_context(_listen(port))
        port = listener.getsockname()[1]
        address = f"http://127.0.0.1:{port}/?token={token}"
        print(f"{page.title}: {address}")
        print(f"from another machine, first: {forward_command(port, os.environ)}")
        print("Ctrl-C ends it", flush=True)
        if has_display(os.environ):
            stack.enter_context(_opened(address))
        config = uvicorn.Config(
            make_app(page, token), log_config=None, access_log=False, server_header=False, lifespan="off",
            ws="none", timeout_graceful_shutdown=1,
        )  # fmt: skip
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:  # raised once the server has ended
            print(file=sys.stderr)


def forward_command(port: int, environment: Mapping[str, str]) -> str:
    """The command that, on another machine, makes the same address lead here, by SSH.

    Args:
        port: of the page.
        environment: variables; within an SSH session, they say how this machine was reached.
    """
    host, ssh_port = socket.gethostname(), "22"
    if len(connection := environment.get("SSH_CONNECTION", "").split()) == 4:
        host, ssh_port = connection[2:]
    option = [] if ssh_port == "22" else ["-p", ssh_port]
    return shlex.join(["ssh", "-N", "-L", f"{port}:127.0.0.1:{port}", *option, f"{getpass.getuser()}@{host}"])


def has_display(environment: Mapping[str, str]) -> bool:
    """Whether a browser that is opened here is seen by whoever started the command."""
    if "SSH_CONNECTION" in environment:
        return False
    return sys.platform == "darwin" or bool(environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY"))


@contextmanager
def _opened(address: str) -> Iterator[None]:
    """Open a browser, by a file: other users of this machine can read a command's arguments, but not that."""
    with Storage.default().scratch() as folder:
        file = folder / "open.html"
        file.write_text(f'<!doctype html><meta http-equiv="refresh" content="0; url={escape(address)}">')
        webbrowser.open(file.as_uri())
        yield


def _listen(port: int) -> socket.socket:
    if not 0 <= port <= MAX_PORT:
        raise UsageError(f"cannot listen on port {port}: give a --port from 0 to {MAX_PORT}")
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise UsageError(f"cannot listen on 127.0.0.1 port {port}: {error}: give another --port") from error


def _cookie_name(token: str) -> str:
    """Of its own for each page: cookies are shared by all ports of a host."""
    return f"jaxcls-{hashlib.sha256(token.encode()).hexdigest()[:12]}"


def _problem(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status)


async def _refuse(request: Request, error: Exception) -> Response:
    return _problem(error.status if isinstance(error, RequestError) else 500, str(error))


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _problem(error.status_code, error.detail)


async def _fail(request: Request, error: Exception) -> Response:
    return _problem(500, "the page has failed; its terminal says more")


HANDLERS: Mapping[Any, ExceptionHandler] = {
    JaxclsError: _refuse, HTTPException: _refuse_http, Exception: _fail,
}  # fmt: skip
"""Of what a page's routes raise."""

"""A URL that a stranger wrote -> the bytes of a picture, without lending the stranger this machine's network.

(`fetch_json` asks a service that we chose, under the same guard.)

What only this machine can reach (itself, its neighbours, its cloud's metadata) stays out of reach:

- A name is resolved once, and every address that it has must be public.
- The connection goes to such an address and not to the name, which might by then lead elsewhere. The Host
  header and the check of the server's certificate still go by the name.
- A redirect is a new URL, judged from the start.
- Nothing goes along: no proxy, cookie, password or referrer.

And a fetch is bounded in bytes and in time, from the name's resolution to the last byte.
"""

import asyncio
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    aclosing,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cache
from importlib.metadata import version
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any
from urllib.parse import unquote, unquote_plus

import httpx2

from jaxcls.data.images import FORMATS, is_image
from jaxcls.errors import DownloadError


@dataclass(frozen=True)
class Guard:
    """What may be fetched, and how much that may take.

    Attributes:
        max_bytes: longest body.
        seconds: longest time for one `fetch`, redirects included.
        max_redirects: redirects followed, one after the other.
        ports: TCP ports that may be connected to.
        allowed_networks: networks that may be reached although they are not public.
        tls_context: whose certificates to trust; None: the system's authorities.
    """

    max_bytes: int = 32 * 2**20
    seconds: float = 30.0
    max_redirects: int = 5
    ports: frozenset[int] = frozenset({80, 443})
    allowed_networks: tuple[IPv4Network | IPv6Network, ...] = ()
    tls_context: ssl.SSLContext | None = None

    def admits(self, address: IPv4Address | IPv6Address) -> bool:
        """Whether `address` is public, or within the allowed networks."""
        return is_public(address) or any(address in network for network in self.allowed_networks)


PUBLIC = Guard()
"""The guard for the public internet."""


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether `address` belongs to one host of the public internet, as far as the address alone can tell."""
    if address in _NAT64:
        address = IPv4Address(address.packed[-4:])
    # Python's own table differs between its versions, and counts multicast and unassigned space as global.
    return address.is_global and not any(address in network for network in _NOT_PUBLIC)


_NAT64 = ip_network("64:ff9b::/96")
"""IPv4 addresses as hosts without IPv4 see them."""

_NOT_PUBLIC = tuple(
    ip_network(network)
    for network in (
        "100.64.0.0/10",  # between a carrier and its customers
        "168.63.129.16/32",  # Azure's own services, for its virtual machines
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # relays of 6to4
        "224.0.0.0/3",  # multicast, reserved, broadcast
        # All IPv6 but 2000::/3. IPv4-mapped, unique local, link-local, site-local and multicast are in here.
        "::/3",
        "4000::/2",
        "8000::/1",
        "2001::/23",  # protocol assignments, Teredo
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
    )
)


async def fetch(url: str, guard: Guard = PUBLIC) -> bytes:
    """Fetch a picture over http or https.

    Each call opens connections of its own; retries are the caller's. A server that cuts its body into crumbs
    keeps the event loop busy for tenths of a second: where others depend on the loop, use `fetch_sync` in a
    thread.

    Returns:
        The body, which begins as one of `images.FORMATS` does, whatever the server calls it.

    Raises:
        DownloadError: the URL, or one that it redirects to, is refused, fails, exceeds the guard's limits, or
            brings something else.
    """
    async with fetched(url, guard) as image:
        return image


@asynccontextmanager
async def fetched(
    url: str, guard: Guard = PUBLIC, turn: Callable[[str], AbstractAsyncContextManager] = nullcontext
) -> AsyncIterator[bytes]:
    """As `fetch`, but each request, redirects included, waits for its host's turn.

    Args:
        url: of the picture.
        guard: its time does not run while a turn is waited for.
        turn: host -> what a request to it is sent within, and the block for the last one. A host is a name,
            or an address, in small letters; its ports are one host.
    """
    location, here, seconds = url, httpx2.URL(), guard.seconds
    for _ in range(guard.max_redirects + 1):
        with _download_errors(url, guard):
            here = _check(location, here, guard)
        async with turn(here.raw_host.decode().rstrip(".")):
            begin = time.monotonic()
            with _download_errors(url, guard):
                answer = await _ask_for_image(here, guard, seconds)
            if isinstance(answer, bytes):
                yield answer
                return
            location, seconds = answer, seconds - (time.monotonic() - begin)
    raise DownloadError(url, f"more than {guard.max_redirects} redirects")


async def _ask_for_image(here: httpx2.URL, guard: Guard, seconds: float) -> bytes | str:
    """The picture, or where a redirect leads."""
    async with asyncio.timeout(seconds), _get(here, guard, _PICTURES) as response:
        if response.has_redirect_location:
            return str(response.headers["location"])
        return await _read_image(response, guard)


def fetch_sync(url: str, guard: Guard = PUBLIC) -> bytes:
    """As `fetch`, on an event loop in a thread of its own; another may be running, as in notebooks."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, fetch(url, guard)).result()


async def fetch_json(
    url: str,
    params: Mapping[str, str],
    headers: Mapping[str, str],
    *,
    secrets: Collection[str] = (),
    guard: Guard = PUBLIC,
) -> Any:
    """Ask a service over http or https for JSON. No redirect is followed: it would take the headers along.

    Args:
        url: the service's address.
        params: the query. Neither it nor the headers are in an error.
        headers: fields of the request.
        secrets: where the service's words hold one, no error quotes them.
        guard: as for `fetch`.

    Raises:
        DownloadError: as for `fetch`, with what the service says of the matter.
    """
    with _download_errors(url.partition("?")[0], guard):
        async with asyncio.timeout(guard.seconds):
            address = _check(url, httpx2.URL(), guard).copy_merge_params(dict(params))
            async with _get(address, guard, {"Accept": "application/json", **headers}) as response:
                answer = _read_json(await _read_body(response, guard))
                if response.status_code != httpx2.codes.OK:
                    raise _refusal(response, _blot_out(_words(answer), secrets))
                if answer is None:
                    raise DownloadError("", "the answer is not JSON")
                return answer


def is_url(text: object) -> bool:
    """Whether `text` is the http(s) URL of something, and no path."""
    return isinstance(text, str) and text.lower().startswith(("http://", "https://"))


def read_retry_after(value: str) -> float:
    """Seconds from now that a Retry-After header, a number or a date, asks for; 0 where it asks for none."""
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


@contextmanager
def _download_errors(url: str, guard: Guard) -> Iterator[None]:
    try:
        yield
    except DownloadError as error:
        raise DownloadError(
            url, error.reason, error.is_transient, error.status, error.retry_after
        ) from error.__cause__
    except TimeoutError as error:
        reason = f"not complete after {guard.seconds:g} seconds"
        raise DownloadError(url, reason, is_transient=True) from error
    except httpx2.TransportError as error:
        reason = f"the connection failed: {str(error) or type(error).__name__}"
        raise DownloadError(url, reason, is_transient=True) from error


def _check(location: str, here: httpx2.URL, guard: Guard) -> httpx2.URL:
    """The URL that `location` means at `here`, if its form is allowed."""
    try:
        url = here.join(location)
    except (httpx2.InvalidURL, ValueError) as error:
        raise DownloadError("", f"not a valid URL: {error}") from error
    if url.scheme not in _PORTS:
        raise DownloadError("", "only http and https URLs are fetched")
    if url.userinfo:
        raise DownloadError("", "the URL holds a user name or password; none are sent")
    if not _HOST.fullmatch(url.raw_host) or len(url.raw_host) > 253:
        raise DownloadError("", "the URL's host is neither a name nor an address")
    if _port(url) not in guard.ports:
        allowed = ", ".join(map(str, sorted(guard.ports)))
        raise DownloadError("", f"port {_port(url)} is not allowed (ports: {allowed})")
    return url


_PORTS = {"http": 80, "https": 443}
# No percent sign: it would encode another host, or name a network interface.
_HOST = re.compile(rb"[0-9a-fA-F:.]*:[0-9a-fA-F:.]*|[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?")


def _port(url: httpx2.URL) -> int:
    return _PORTS[url.scheme] if url.port is None else url.port


async def _resolve(url: httpx2.URL, guard: Guard) -> list[str]:
    """The host's addresses, if all are admitted. Odd numbers, such as 0x7f.1, are the resolver's to read."""
    host = url.raw_host.decode()
    try:
        found = await asyncio.wrap_future(_look_up(url.raw_host))
    except socket.gaierror as error:
        is_transient = error.errno == socket.EAI_AGAIN
        raise DownloadError("", f"{host} cannot be resolved: {error.strerror}", is_transient) from error
    addresses = list(dict.fromkeys(info[4][0] for info in found))
    # Which address it is stays untold: a service would answer questions about the names of its network.
    if not all(guard.admits(ip_address(address)) for address in addresses):
        raise DownloadError("", f"{host} is not on the public internet, nor in a network that is allowed")
    return addresses


def _look_up(host: bytes) -> Future[list]:
    """`getaddrinfo` in a thread that nobody waits for, unlike asyncio's own, whose end a program awaits."""
    answer: Future[list] = Future()
    answer.set_running_or_notify_cancel()

    def run() -> None:
        try:
            answer.set_result(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="resolver", daemon=True).start()
    return answer


@asynccontextmanager
async def _get(url: httpx2.URL, guard: Guard, headers: Mapping[str, str]) -> AsyncIterator[httpx2.Response]:
    """The head of the answer, its body still to come."""
    addresses = await _resolve(url, guard)
    async with AsyncExitStack() as stack:

        async def close_in_the_end(event: str, details: dict[str, Any]) -> None:
            """Without this, a handshake that is cancelled would leave its connection open."""
            if event == "connection.connect_tcp.complete":
                stack.push_async_callback(details["return_value"].aclose)

        # A transport and not a client, which would bring cookies, proxies and redirects of its own.
        transport = httpx2.AsyncHTTPTransport(verify=guard.tls_context or _system_tls(), trust_env=False)
        await stack.enter_async_context(transport)
        requests = [_make_request(url, address, headers, close_in_the_end) for address in addresses]
        yield await _first_answer(transport, requests)


async def _first_answer(
    transport: httpx2.AsyncHTTPTransport, requests: list[httpx2.Request]
) -> httpx2.Response:
    *others, last = requests
    for request in others:
        with suppress(httpx2.ConnectError, httpx2.ConnectTimeout):
            return await transport.handle_async_request(request)
    return await transport.handle_async_request(last)


@cache
def _system_tls() -> ssl.SSLContext:
    return httpx2.create_ssl_context(trust_env=False)


def _make_request(
    url: httpx2.URL, address: str, headers: Mapping[str, str], trace: Callable
) -> httpx2.Request:
    return httpx2.Request(
        "GET",
        url.copy_with(host=address),
        headers={
            "Host": url.netloc.decode(),
            "User-Agent": f"jaxcls/{version('jaxcls')}",
            "Accept-Encoding": "identity",
            "Connection": "close",
            **headers,
        },
        extensions={
            "sni_hostname": url.raw_host.decode().rstrip("."),
            "timeout": {"connect": _CONNECT_SECONDS},
            "trace": trace,
        },
    )


_PICTURES = {"Accept": ", ".join(f"image/{format_.lower()}" for format_ in FORMATS)}

_CONNECT_SECONDS = 5.0
"""Time for one address before the host's next one is tried."""


async def _read_image(response: httpx2.Response, guard: Guard) -> bytes:
    if response.status_code != httpx2.codes.OK:
        raise _refusal(response)
    image = await _read_body(response, guard)
    if not is_image(image):
        raise DownloadError("", f"not an image in a known format ({', '.join(FORMATS)})")
    return image


def _refusal(response: httpx2.Response, words: str = "") -> DownloadError:
    status = response.status_code
    reason = f"the server answered {status} {httpx2.codes.get_reason_phrase(status)}".rstrip()
    retry_after = read_retry_after(response.headers.get("retry-after", ""))
    reason = f"{reason}: {words}" if words else reason
    return DownloadError("", reason, status in _TRANSIENT, status, retry_after)


async def _read_body(response: httpx2.Response, guard: Guard) -> bytes:
    headers = response.headers
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise DownloadError("", "the server compressed the body, unasked")
    announced, body = int(headers.get("content-length", 0)), bytearray()
    async with aclosing(response.aiter_raw()) as chunks:
        async for chunk in chunks:
            body += chunk
            if max(announced, len(body)) > guard.max_bytes:
                raise DownloadError("", f"longer than {guard.max_bytes:,} bytes")
    return bytes(body)


def _read_json(body: bytes) -> Any:
    """What the body says; None where it is no JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _words(answer: Any) -> str:
    """What a service says of an error, where services say it."""
    while isinstance(answer, dict):
        answer = next((answer[name] for name in ("error", "detail", "message") if name in answer), None)
    return answer if isinstance(answer, str) else ""


def _blot_out(words: str, secrets: Collection[str]) -> str:
    """`words`, or asterisks where a secret is in there, however it is spelt."""
    spellings = (words, unquote(words), unquote_plus(words))
    return "***" if any(secret in spelling for secret in secrets for spelling in spellings) else words


_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})

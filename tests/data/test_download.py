"""Real sockets: what connects is seen by an audit hook, below everything that could be mocked.

No test leaves the machine: names are resolved from a table, and the hook refuses connections beyond loopback.
"""

import asyncio
import io
import math
import pickle
import random
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network

import numpy as np
import pytest
from PIL import Image

from jaxcls.data import download
from jaxcls.data.download import PUBLIC, Guard, fetch, fetch_json, fetch_sync, fetched, is_public
from jaxcls.data.images import FORMATS
from jaxcls.errors import DownloadError, JaxclsError

SERVER = "127.0.0.77"
"""The one address that tests allow; all others of 127.0.0.0/8 stay forbidden."""

EXAMPLE = "93.184.215.14"
"""A public address. Nothing reaches it: the audit hook is in between."""

NAMES = {
    "localhost": ["127.0.0.1", "::1"],
    "localtest.example": ["127.0.0.1"],
    "metadata.example": ["169.254.169.254"],
    "intranet.example": ["10.1.2.3"],
    "mixed.example": [EXAMPLE, "192.168.1.1"],
    "mixed6.example": [EXAMPLE, "fd00::1"],
    "mapped.example": ["::ffff:10.0.0.1"],
    "scoped.example": ["fe80::1%lo"],
    "nat64.example": ["64:ff9b::a9fe:a9fe"],
    "public.example": [EXAMPLE],
    "public6.example": ["2606:2800:21f:cb07::1"],
    "public64.example": [f"64:ff9b::{EXAMPLE}"],
    "photos.example": [SERVER],
    "other.example": [SERVER],
}


def encoded(format_: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)).save(file, format_)
    return file.getvalue()


PICTURE = encoded()


# The network as the code under test sees it.


@dataclass
class Network:
    """What was looked up, and which addresses connections were attempted to."""

    names: dict[str, list[str]]
    lookups: list[str]
    connections: list[tuple[str, int]]

    def getaddrinfo(self, host, port, family=0, type=0, proto=0, flags=0):  # noqa: A002 - the standard's names
        name = host.decode() if isinstance(host, bytes) else host
        self.lookups.append(name)
        addresses = self.names.get(name.rstrip("."), [name])
        # The C library reads the numbers, in every spelling that it knows, and asks nobody.
        answers = [GETADDRINFO(a, port, family, type, proto, socket.AI_NUMERICHOST) for a in addresses]
        return [info for answer in answers for info in answer]

    @property
    def connected(self) -> set[str]:
        return {host for host, _ in self.connections}


GETADDRINFO = socket.getaddrinfo
_watched: Network | None = None


def _watch(event: str, arguments: tuple) -> None:
    if event == "socket.connect" and _watched is not None:
        host, port = arguments[1][:2]
        _watched.connections.append((host, port))
        if not ip_address(host).is_loopback:
            raise ConnectionRefusedError(f"a test tried to connect to {host}")


sys.addaudithook(_watch)


@pytest.fixture(autouse=True)
def network(monkeypatch):
    global _watched
    _watched = Network(dict(NAMES), [], [])
    monkeypatch.setattr(socket, "getaddrinfo", _watched.getaddrinfo)
    yield _watched
    _watched = None


# Servers that behave and servers that do not.

Page = bytes | Callable[[], Iterable[bytes]]


class Server:
    """Answers each request with what its path stands for: bytes, or a function that yields them."""

    def __init__(self, pages: dict[str, Page], tls: ssl.SSLContext | None = None) -> None:
        self.pages, self.tls = pages, tls
        self.requests: list[str] = []
        self.num_bytes = 0
        self.stopped = threading.Event()
        self.listener = socket.create_server((SERVER, 0))
        self.port = self.listener.getsockname()[1]
        self.threads = ThreadPoolExecutor(16)
        self.threads.submit(self._accept)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self.stopped.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.threads.shutdown()

    def _accept(self) -> None:
        while not self.stopped.is_set():
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.threads.submit(self._answer, connection)

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(10)
        with connection:
            try:
                if self.tls:
                    connection = self.tls.wrap_socket(connection, server_side=True)
                with connection:
                    request = b""
                    while b"\r\n\r\n" not in request:
                        received = connection.recv(65536)
                        if not received:
                            return
                        request += received
                    self.requests.append(request.decode())
                    page = self.pages.get(request.split()[1].decode(), answer(status="404 Not Found"))
                    for part in [page] if isinstance(page, bytes) else page():
                        connection.sendall(part)
                        self.num_bytes += len(part)
                        if self.stopped.is_set():
                            return
            except OSError:  # the client hung up, as it should
                return

    def wait(self, seconds: float) -> None:
        self.stopped.wait(seconds)

    def url(self, path: str, host: str = SERVER) -> str:
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{path}"

    def guard(self, **changes) -> Guard:
        """What lets a fetch come here, and nowhere else that is not public."""
        allowed = Guard(
            ports=PUBLIC.ports | {self.port},
            allowed_networks=(ip_network(SERVER),),
            seconds=10,
            max_bytes=10**6,
        )
        return replace(allowed, **changes)


def answer(body: bytes = b"", status: str = "200 OK", **headers: object) -> bytes:
    fields = {"content_length": len(body)} | headers
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items() if value is not None]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode() + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    return answer(status=status, location=location, set_cookie="session=secret")


@pytest.fixture
def server():
    with Server({"/photo": answer(PICTURE)}) as server:
        yield server


def refusal(url: str, guard: Guard = PUBLIC) -> DownloadError:
    with pytest.raises(DownloadError) as caught:
        fetch_sync(url, guard)
    return caught.value


# URLs that would reach what is not public, and how it is noticed.

NOT_PUBLIC = "not on the public internet"
NOT_A_URL = "not a valid URL"
NOT_A_HOST = "neither a name nor an address"
NOT_HTTP = "only http and https"
NO_PORT = "is not allowed (ports: 80, 443)"
NO_LOGIN = "user name or password"
NO_SUCH_HOST = "cannot be resolved"

HOSTILE = [
    # Plain addresses that are not public.
    ("http://127.0.0.1/", NOT_PUBLIC),
    ("https://127.0.0.1/", NOT_PUBLIC),
    ("http://127.8.9.10/", NOT_PUBLIC),
    ("http://0.0.0.0/", NOT_PUBLIC),
    ("http://0.1.2.3/", NOT_PUBLIC),
    ("http://10.0.0.1/", NOT_PUBLIC),
    ("http://172.16.0.1/", NOT_PUBLIC),
    ("http://172.31.255.255/", NOT_PUBLIC),
    ("http://192.168.0.1/", NOT_PUBLIC),
    ("http://169.254.1.1/", NOT_PUBLIC),
    ("http://169.254.169.254/latest/meta-data/", NOT_PUBLIC),  # metadata of AWS, Google, Azure
    ("http://100.100.100.200/latest/meta-data/", NOT_PUBLIC),  # of Alibaba; carrier-grade NAT
    ("http://192.0.0.192/", NOT_PUBLIC),  # of Oracle; protocol assignments
    ("http://168.63.129.16/", NOT_PUBLIC),  # Azure's services, at a public address
    ("http://100.64.0.1/", NOT_PUBLIC),
    ("http://192.0.0.9/", NOT_PUBLIC),  # the nearest port control server: counts as global
    ("http://192.0.2.1/", NOT_PUBLIC),
    ("http://192.88.99.1/", NOT_PUBLIC),
    ("http://198.18.0.1/", NOT_PUBLIC),
    ("http://224.0.0.1/", NOT_PUBLIC),
    ("http://239.255.255.250/", NOT_PUBLIC),
    ("http://240.0.0.1/", NOT_PUBLIC),
    ("http://255.255.255.255/", NOT_PUBLIC),
    ("http://[::1]/", NOT_PUBLIC),
    ("http://[0:0:0:0:0:0:0:1]/", NOT_PUBLIC),
    ("http://[::]/", NOT_PUBLIC),
    ("http://[fd00:ec2::254]/", NOT_PUBLIC),  # metadata of AWS
    ("http://[fe80::1]/", NOT_PUBLIC),
    ("http://[fec0::1]/", NOT_PUBLIC),
    ("http://[ff02::1]/", NOT_PUBLIC),
    ("http://[2001:db8::1]/", NOT_PUBLIC),
    # IPv4 inside IPv6.
    ("http://[::ffff:127.0.0.1]/", NOT_PUBLIC),
    ("http://[::FFFF:A9FE:A9FE]/", NOT_PUBLIC),
    ("http://[0:0:0:0:0:ffff:10.0.0.1]/", NOT_PUBLIC),
    (f"http://[::ffff:{EXAMPLE}]/", NOT_PUBLIC),
    ("http://[::127.0.0.1]/", NOT_PUBLIC),
    ("http://[::ffff:0:127.0.0.1]/", NOT_PUBLIC),
    ("http://[64:ff9b::10.0.0.1]/", NOT_PUBLIC),
    ("http://[64:ff9b:1::7f00:1]/", NOT_PUBLIC),
    ("http://[2002:7f00:1::1]/", NOT_PUBLIC),
    ("http://[2002:a9fe:a9fe::]/", NOT_PUBLIC),
    ("http://[2001:0:a00:1::f5ff:fffe]/", NOT_PUBLIC),
    # Numbers that only some readers take for addresses.
    ("http://2130706433/", NOT_PUBLIC),
    ("http://0x7f000001/", NOT_PUBLIC),
    ("http://017700000001/", NOT_PUBLIC),
    ("http://127.1/", NOT_PUBLIC),
    ("http://127.0.1/", NOT_PUBLIC),
    ("http://0x7f.1/", NOT_PUBLIC),
    ("http://0x7f.0x0.0x0.0x1/", NOT_PUBLIC),
    ("http://0xA9.0xFE.43518/", NOT_PUBLIC),
    ("http://2852039166/", NOT_PUBLIC),
    ("http://0/", NOT_PUBLIC),
    ("http://0177.0.0.1/", NOT_A_URL),
    ("http://127.0.0.01/", NOT_A_URL),
    ("http://256.256.256.256/", NOT_A_URL),
    ("http://127.0.0.1./", NO_SUCH_HOST),
    ("http://127.0.0.1.:80/", NO_SUCH_HOST),
    # Names that lead to such addresses, all or only one of theirs.
    ("http://localhost/", NOT_PUBLIC),
    ("http://LOCALHOST/", NOT_PUBLIC),
    ("http://localhost./", NOT_PUBLIC),
    ("http://localtest.example/", NOT_PUBLIC),
    ("https://localtest.example./", NOT_PUBLIC),
    ("http://metadata.example/", NOT_PUBLIC),
    ("http://intranet.example/", NOT_PUBLIC),
    ("http://mixed.example/", NOT_PUBLIC),
    ("http://mixed6.example/", NOT_PUBLIC),
    ("http://mapped.example/", NOT_PUBLIC),
    ("http://scoped.example/", NOT_PUBLIC),
    ("http://nat64.example/", NOT_PUBLIC),
    # Other characters that some readers turn into digits, dots and letters.
    ("http://\uff11\uff12\uff17.0.0.1/", NOT_A_URL),
    ("http://\u2460\u2461\u2466.\u24ea.\u24ea.\u2460/", NOT_A_URL),
    ("http://127\u30020\u30020\u30021/", NOT_PUBLIC),
    ("http://127\uff0e0\uff0e0\uff0e1/", NOT_PUBLIC),
    ("http://\u24dbocalhost/", NOT_A_URL),
    ("http://localho\u017ft/", NOT_A_URL),
    ("http://loc\u00adalhost/", NOT_A_URL),
    ("http://xn--localhost-/", NO_SUCH_HOST),
    ("http://127%2e0%2e0%2e1/", NOT_A_HOST),
    ("http://%31%32%37.0.0.1/", NOT_A_HOST),
    ("http://localhost%00.public.example/", NOT_A_HOST),
    ("http://local%68ost/", NOT_A_HOST),
    ("http://[fe80::1%25lo]/", NOT_A_HOST),
    ("http://[::1%25lo]/", NOT_A_HOST),
    ("http://[127.0.0.1]/", NOT_A_URL),
    ("http://[::1/", NOT_A_URL),
    ("http://[::1].public.example/", NOT_A_URL),
    # Parts that readers split differently.
    ("http://public.example@127.0.0.1/", NO_LOGIN),
    ("http://user:password@public.example/", NO_LOGIN),
    ("http://127.0.0.1:80@public.example/", NO_LOGIN),
    ("http://public.example\\@127.0.0.1/", NO_LOGIN),
    ("http://public.example%40@127.0.0.1/", NO_LOGIN),
    ("http://@127.0.0.1/", NOT_PUBLIC),
    ("http://127.0.0.1#@public.example/", NOT_PUBLIC),
    ("http://127.0.0.1?@public.example/", NOT_PUBLIC),
    ("http://127.0.0.1\\.public.example/", NOT_A_HOST),
    ("http://127.0.0.1 public.example/", NOT_A_HOST),
    ("http:\\\\127.0.0.1/", NOT_A_HOST),
    ("http:///127.0.0.1/", NOT_A_HOST),
    ("http:127.0.0.1/", NOT_A_HOST),
    ("http://public.example:80:127.0.0.1/", NOT_A_URL),
    ("http://./", NOT_A_HOST),
    ("http://../", NOT_A_HOST),
    ("http://.localhost/", NOT_A_HOST),
    ("http://localhost../", NOT_A_HOST),
    (f"http://{'a' * 64}.example/", NOT_A_HOST),
    (f"http://{'a.' * 200}example/", NOT_A_HOST),
    (f"http://{'é' * 20000}.example/", NOT_A_URL),
    (f"http://public.example/{'a' * 70000}", NOT_A_URL),
    # Other services, other schemes, and what is no URL.
    ("http://public.example:22/", NO_PORT),
    ("http://public.example:0/", NO_PORT),
    ("http://public.example:6379/", NO_PORT),
    ("http://public.example:65616/", NO_PORT),  # 80, counted in 16 bits
    ("http://public.example:-80/", NO_PORT),
    ("https://public.example:8443/", NO_PORT),
    ("http://public.example:http/", NOT_A_URL),
    ("file:///etc/passwd", NOT_HTTP),
    ("ftp://public.example/", NOT_HTTP),
    ("gopher://127.0.0.1:6379/_FLUSHALL", NOT_HTTP),
    ("unix:///run/docker.sock", NOT_HTTP),
    ("data:image/png;base64,AAAA", NOT_HTTP),
    ("ws://public.example/", NOT_HTTP),
    ("//127.0.0.1/", NOT_HTTP),
    ("127.0.0.1", NOT_HTTP),
    ("", NOT_HTTP),
    ("\ud800", NOT_A_URL),
]
CONTROLS = [
    ("http://127.0.0.1/\r\nHost: x", NOT_A_URL),
    ("http://local\thost/", NOT_A_URL),
    ("\x00", NOT_A_URL),
]


@pytest.mark.parametrize(("url", "reason"), HOSTILE + CONTROLS, ids=lambda text: ascii(text)[:40])
def test_hostile_urls_are_refused_before_any_connection(url, reason, network):
    error = refusal(url)
    assert reason in error.reason
    assert not error.is_transient
    assert not network.connections


@pytest.mark.parametrize(
    "url", [url for url, _ in HOSTILE if url.isprintable()], ids=lambda url: ascii(url)[:40]
)
def test_a_redirect_leads_no_further_than_a_url(url, network, server):
    server.pages["/start"] = redirect(url)
    refusal(server.url("/start"), server.guard())
    assert network.connected == {SERVER}


def test_mutated_urls_reach_nothing_and_raise_nothing_else(network):
    generator = random.Random(0)
    words = ["%2e", "127.0.0.1", "localhost", "::1", "0x7f", "public.example", "xn--", "\u0660", "\u3002"]
    pieces = [*"@:/\\#?%[]. \t", *words]

    def mutate(url: str) -> str:
        for _ in range(generator.randint(1, 4)):
            at = generator.randint(0, min(len(url), 40))
            url = url[:at] + generator.choice(pieces) + url[at + generator.randint(0, 3) :]
        return url

    async def fetch_all():
        for _ in range(1500):
            with pytest.raises(DownloadError):
                await fetch(mutate(generator.choice(HOSTILE)[0]))

    asyncio.run(fetch_all())
    assert all(ip_address(host).is_global for host in network.connected)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://public.example/photo.jpg", (EXAMPLE, 80)),
        ("https://public.example/photo.jpg", (EXAMPLE, 443)),
        ("http://PUBLIC.example.:443/", (EXAMPLE, 443)),
        (f"http://{EXAMPLE}/", (EXAMPLE, 80)),
        ("http://public6.example/", ("2606:2800:21f:cb07::1", 80)),
        ("http://[2606:2800:21F:CB07::1]/", ("2606:2800:21f:cb07::1", 80)),
        ("http://public64.example/", ("64:ff9b::5db8:d70e", 80)),  # how a network without IPv4 sees it
    ],
)
def test_public_hosts_are_connected_to_by_the_address_that_was_checked(url, address, network):
    assert refusal(url).is_transient
    assert network.connections == [address]
    assert len(network.lookups) == 1


# IANA's registries of special-purpose addresses, and neighbours of their ranges.
@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        ("1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.1", True),
        (
            "169.253.255.255 172.15.255.255 172.32.0.0 192.0.1.0 192.167.255.255 192.169.0.0 223.255.255.255",
            True,
        ),
        ("2000::1 2001:200::1 2001:4860:4860::8888 2003::1 2606:4700::1111 3ffe::1 64:ff9b::8.8.8.8", True),
        ("0.0.0.0 10.255.255.255 100.127.255.255 127.255.255.255 169.254.0.0 172.16.0.0 192.0.0.10", False),
        ("192.0.0.171 192.0.2.255 198.19.255.255 198.51.100.1 203.0.113.1 224.0.0.0 233.252.0.1", False),
        ("239.255.255.255 240.0.0.0 255.255.255.255", False),
        (
            ":: ::1 ::8.8.8.8 ::ffff:8.8.8.8 64:ff9b::127.0.0.1 64:ff9b::224.0.0.1 64:ff9b:1::8.8.8.8 100::1",
            False,
        ),
        (
            "2001::1 2001:1::1 2001:20::1 2001:30::1 2001:db8::1 2002:808:808::1 3fff::1 4000::1 5f00::1",
            False,
        ),
        ("8000::1 fc00::1 fdff::1 fe80::1 fe80::1%1 febf::1 fec0::1 ff00::1 ff02::1 ff0e::1", False),
    ],
)
def test_public_addresses(addresses, expected):
    assert {a: is_public(ip_address(a)) for a in addresses.split()} == dict.fromkeys(
        addresses.split(), expected
    )


def test_only_the_allowed_networks_are_added(server):
    assert fetch_sync(server.url("/photo"), server.guard()) == PICTURE
    assert NOT_PUBLIC in refusal(server.url("/photo"), server.guard(allowed_networks=())).reason
    assert NOT_PUBLIC in refusal(f"http://127.0.0.78:{server.port}/", server.guard()).reason
    assert (
        "is not allowed (ports: 80, 443)"
        in refusal(server.url("/photo"), server.guard(ports=PUBLIC.ports)).reason
    )


# Names whose addresses change.


@pytest.fixture
def rebinding(network, monkeypatch):
    """`rebinding.example` is at the allowed server when first asked, and at its neighbour from then on."""

    def getaddrinfo(host, *arguments, **options):
        answers = network.getaddrinfo(host, *arguments, **options)
        network.names["rebinding.example"] = ["127.0.0.1"]
        return answers

    network.names["rebinding.example"] = [SERVER]
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def test_a_name_is_resolved_once(network, rebinding, server):
    assert fetch_sync(server.url("/photo", "rebinding.example"), server.guard()) == PICTURE
    assert network.lookups == ["rebinding.example"]
    assert network.connected == {SERVER}


def test_a_redirect_to_the_same_name_is_resolved_and_checked_again(network, rebinding, server):
    server.pages["/start"] = redirect("/photo")
    assert NOT_PUBLIC in refusal(server.url("/start", "rebinding.example"), server.guard()).reason
    assert network.lookups == ["rebinding.example"] * 2
    assert network.connected == {SERVER}


def test_the_next_address_is_tried_where_one_does_not_answer(network, server):
    network.names["two.example"] = ["127.0.0.78", SERVER]
    guard = server.guard(allowed_networks=(ip_network("127.0.0.64/26"),))
    assert fetch_sync(server.url("/photo", "two.example"), guard) == PICTURE
    assert network.connections == [("127.0.0.78", server.port), (SERVER, server.port)]


# What is sent.


def test_the_request_is_plain_and_honest(server):
    url = server.url("/photo?size=%20large&x=a/b#part", "photos.example")
    server.pages["/photo?size=%20large&x=a/b"] = answer(PICTURE)
    assert fetch_sync(url, server.guard()) == PICTURE
    line, *fields = server.requests[0].removesuffix("\r\n\r\n").split("\r\n")
    assert line == "GET /photo?size=%20large&x=a/b HTTP/1.1"
    headers = dict(field.lower().split(": ", 1) for field in fields)
    assert headers.pop("user-agent").startswith("jaxcls/")
    assert headers == {
        "host": f"photos.example:{server.port}",
        "accept": "image/jpeg, image/png, image/webp, image/bmp, image/gif, image/tiff",
        "accept-encoding": "identity",
        "connection": "close",
    }


def test_nothing_is_carried_along_a_redirect(server):
    server.pages["/start"] = redirect(f"//other.example:{server.port}/photo")
    assert fetch_sync(server.url("/start", "photos.example"), server.guard()) == PICTURE
    for header in ("cookie", "authorization", "referer"):
        assert f"\r\n{header}:" not in server.requests[1].lower()
    assert f"host: other.example:{server.port}" in server.requests[1].lower()


def test_the_environment_is_not_asked(network, server, monkeypatch, tmp_path):
    with Server({}) as proxy:
        for variable in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(variable, proxy.url(""))
        (tmp_path / ".netrc").write_text(f"machine {SERVER} login user password secret\n")
        (tmp_path / ".netrc").chmod(0o600)
        monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
        assert fetch_sync(server.url("/photo"), server.guard()) == PICTURE
    assert network.connections == [(SERVER, server.port)]
    assert "authorization" not in server.requests[0].lower()


# What comes back.


@pytest.mark.parametrize("format_", FORMATS)
def test_pictures_of_every_format_whatever_they_are_called(format_, server):
    server.pages["/page.html"] = answer(encoded(format_), content_type="text/html")
    assert fetch_sync(server.url("/page.html"), server.guard()) == encoded(format_)


@pytest.mark.parametrize("length", [None, f"{len(PICTURE)}, {len(PICTURE)}"])
def test_ways_of_saying_how_long_a_body_is(length, server):
    server.pages["/odd"] = answer(PICTURE, content_length=length, x="ä")
    assert fetch_sync(server.url("/odd"), server.guard()) == PICTURE


def chunked(*parts: bytes) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (*parts, b""))
    return answer(body, content_length=None, transfer_encoding="chunked")


def test_chunks(server):
    server.pages["/chunks"] = chunked(PICTURE[:100], PICTURE[100:])
    assert fetch_sync(server.url("/chunks"), server.guard()) == PICTURE


HTML, GZIP = b"<html>no picture</html>", zlib.compress(b"\0" * 10**7, wbits=31)
NO_IMAGE, COMPRESSED, TOO_LONG = "not an image in a known format", "compressed", "longer than 1,000,000 bytes"

BAD_ANSWERS = {
    "html": (answer(HTML, content_type="image/jpeg"), NO_IMAGE),
    "empty": (answer(b"", content_type="image/png"), NO_IMAGE),
    "svg": (answer(b'<svg xmlns="http://www.w3.org/2000/svg"/>', content_type="image/svg+xml"), NO_IMAGE),
    "gzip bomb": (answer(GZIP, content_encoding="gzip"), COMPRESSED),
    "compressed picture": (answer(GZIP, content_encoding="identity, br"), COMPRESSED),
    "gzip in chunks": (
        answer(GZIP, content_length=None, transfer_encoding="gzip, chunked"),
        "connection failed",
    ),
    "too long": (answer(PICTURE + bytes(10**6)), TOO_LONG),
    "said to be too long": (answer(PICTURE, content_length=10**12), TOO_LONG),
    "too long in chunks": (chunked(PICTURE, *[bytes(1000)] * 1000), TOO_LONG),
    "cut short": (answer(PICTURE, content_length=len(PICTURE) + 1), "connection failed"),
    "cut short in chunks": (chunked(PICTURE)[:-5], "connection failed"),
    "no number as length": (answer(PICTURE, content_length="many"), "connection failed"),
    "a number too long to read": (answer(PICTURE, content_length="9" * 5000), "connection failed"),
    "negative length": (answer(PICTURE, content_length=-1), "connection failed"),
    "contradictory lengths": (answer(PICTURE, content_length="1, 2"), "connection failed"),
    "huge headers": (answer(PICTURE, x="x" * 10**6), "connection failed"),
    "many headers": (answer(PICTURE, **{f"x{n}": "x" for n in range(50_000)}), "connection failed"),
    "closed early": (b"", "connection failed"),
    "closed in the head": (answer(PICTURE)[:20], "connection failed"),
    "another protocol": (b"SSH-2.0-OpenSSH_9.6\r\n" * 100, "connection failed"),
    "no protocol": (PICTURE, "connection failed"),
    "switched protocol": (answer(status="101 Switching Protocols", upgrade="x"), "connection failed"),
    "no content": (answer(status="204 No Content"), "answered 204"),
    "a part": (answer(PICTURE, status="206 Partial Content"), "answered 206"),
    "unmodified": (answer(status="304 Not Modified"), "answered 304"),
    "nowhere": (answer(status="302 Found"), "answered 302 Found"),
    "login": (answer(status="401 Unauthorized", www_authenticate="Basic realm=x"), "answered 401"),
    "an unheard-of status": (answer(status="799 red"), "answered 799"),
    "control codes": (answer(status="500 \x1b[31mred\x7f"), "answered 500 Internal Server Error"),
    "loop": (redirect("/loop"), "more than 5 redirects"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_bad_answers(name, server, network):
    page, reason = BAD_ANSWERS[name]
    path = f"/{name.replace(' ', '-')}"
    server.pages[path] = page
    error = refusal(server.url(path), server.guard())
    assert reason in error.reason
    assert str(error).isprintable()
    assert len(error.reason) < 400
    assert len(network.connections) == (6 if name == "loop" else 1)


@pytest.mark.parametrize(
    ("status", "is_transient"),
    [("400 Bad Request", False), ("403 Forbidden", False), ("404 Not Found", False), ("410 Gone", False),
     ("408 Request Timeout", True), ("429 Too Many Requests", True), ("500 Internal Server Error", True),
     ("503 Service Unavailable", True)],
)  # fmt: skip
def test_statuses_say_whether_to_come_back(status, is_transient, server):
    server.pages["/status"] = answer(PICTURE, status=status)
    error = refusal(server.url("/status"), server.guard())
    assert error.reason == f"the server answered {status}"
    assert error.is_transient == is_transient


def test_names_that_do_not_resolve_say_whether_to_come_back(monkeypatch):
    for code, is_transient in ((socket.EAI_NONAME, False), (socket.EAI_AGAIN, True)):

        def getaddrinfo(*_, code=code, **__):
            raise socket.gaierror(code, "no answer")

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        error = refusal("http://photos.example/")
        assert error.reason == "photos.example cannot be resolved: no answer"
        assert error.is_transient == is_transient


@pytest.mark.parametrize("status", ["301 Moved Permanently", "302 Found", "303 See Other", "307 x", "308 x"])
def test_redirects_are_followed(status, server):
    server.pages["/old/photo"] = redirect("../photo", status)
    assert fetch_sync(server.url("/old/photo"), server.guard()) == PICTURE


def test_as_many_redirects_as_the_guard_says(server):
    server.pages |= {f"/{n}": redirect(f"/{n - 1}") for n in range(1, 4)} | {"/0": answer(PICTURE)}
    assert fetch_sync(server.url("/3"), server.guard(max_redirects=3)) == PICTURE
    assert "more than 2 redirects" in refusal(server.url("/3"), server.guard(max_redirects=2)).reason


def test_an_endless_body_is_left_early(server):
    def endless():
        yield answer(PICTURE, content_length=None)
        while True:
            yield bytes(65536)

    server.pages["/endless"] = endless
    assert TOO_LONG in refusal(server.url("/endless"), server.guard()).reason
    assert server.num_bytes < 30 * 10**6  # what the sockets' buffers hold comes on top of the limit


# Slow servers and slow names, against one deadline.


def dripping(server: Server, data: bytes, *, at_once: bytes = b"") -> Callable[[], Iterable[bytes]]:
    def drip():
        yield at_once
        for byte in data:
            server.wait(0.05)
            yield bytes([byte])

    return drip


def test_each_request_has_its_hosts_turn_and_no_time_runs_before(server):
    """The host's name is one, whatever its port and dot; a turn ends before the next is waited for."""
    server.pages |= {"/far": redirect(server.url("/photo", "other.example."))}
    turns = []

    @asynccontextmanager
    async def turn(host):
        await asyncio.sleep(0.6)
        turns.append(f"begin {host}")
        yield
        turns.append(f"end {host}")

    async def main():
        guard = server.guard(seconds=1)
        async with fetched(server.url("/far", "photos.example"), guard, turn) as image:
            turns.append("image")
            return image

    assert asyncio.run(main()) == PICTURE
    assert turns == [
        "begin photos.example", "end photos.example", "begin other.example", "image", "end other.example",
    ]  # fmt: skip


@pytest.mark.parametrize("case", ["silence", "head", "body", "redirects", "provisional answers"])
def test_the_deadline_covers_slow_servers(case, server):
    head, body = answer(PICTURE).split(b"\r\n\r\n", 1)

    def slow_redirect():
        server.wait(0.15)
        yield redirect("/slow")

    def provisional():
        while True:
            server.wait(0.05)
            yield b"HTTP/1.1 103 Early Hints\r\n\r\n"

    server.pages["/slow"] = {
        "silence": lambda: (server.wait(10), b"")[1:],
        "head": dripping(server, head),
        "body": dripping(server, body, at_once=head + b"\r\n\r\n"),
        "redirects": slow_redirect,
        "provisional answers": provisional,
    }[case]
    start = time.monotonic()
    error = refusal(server.url("/slow"), server.guard(seconds=0.4, max_redirects=100))
    assert 0.4 <= time.monotonic() - start < 3
    assert error.reason == "not complete after 0.4 seconds"
    assert error.is_transient


def test_the_deadline_covers_a_handshake_that_never_ends_and_hangs_up():
    with socket.create_server((SERVER, 0)) as listener:
        port = listener.getsockname()[1]
        guard = Guard(ports=frozenset({port}), allowed_networks=(ip_network(SERVER),), seconds=0.4)

        def read_to_the_end() -> bytes:
            connection, _ = listener.accept()
            connection.settimeout(5)
            with connection, connection.makefile("rb") as file:
                return file.read()

        async def main() -> bytes:
            with pytest.raises(DownloadError, match=r"not complete after 0\.4 seconds"):
                await fetch(f"https://{SERVER}:{port}/", guard)
            return await asyncio.to_thread(read_to_the_end)

        start = time.monotonic()
        assert asyncio.run(main()).startswith(b"\x16\x03")  # a client's greeting, and the end of the stream
        assert time.monotonic() - start < 3


def test_the_deadline_covers_slow_names_and_nothing_waits_for_them(monkeypatch):
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered.wait(30) and [])
    start = time.monotonic()
    error = refusal("http://slow.example/", Guard(seconds=0.3))
    assert time.monotonic() - start < 3
    assert error.reason == "not complete after 0.3 seconds"
    (resolver,) = (thread for thread in threading.enumerate() if thread.name == "resolver")
    assert resolver.daemon
    answered.set()
    resolver.join(5)


# Certificates.

OPENSSL_CONFIG = """
[req]
distinguished_name = name
[name]
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
subjectAltName = DNS:photos.example
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A folder with an authority of our own and its certificate for photos.example."""
    if not shutil.which("openssl"):
        pytest.skip("certificates are made by the openssl command, which is not installed")
    folder = tmp_path_factory.mktemp("certificates")
    (folder / "openssl.cnf").write_text(OPENSSL_CONFIG)

    def make(name: str, subject: str, *options: str) -> None:
        files = ["-keyout", f"{name}.key", "-out", f"{name}.pem"]
        command = ["openssl", "req", "-x509", "-config", "openssl.cnf", "-extensions", name, "-days", "1",
                   "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc",
                   "-subj", f"/CN={subject}", *files, *options]  # fmt: skip
        subprocess.run(command, cwd=folder, check=True, capture_output=True)

    make("authority", "jaxcls tests")
    make("server", "photos.example", "-CA", "authority.pem", "-CAkey", "authority.key")
    return folder


@pytest.fixture
def tls_server(certificates):
    """A server for photos.example, a guard that trusts its authority, and the names that clients ask for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    names: list[str | None] = []
    context.sni_callback = lambda _, name, __: names.append(name)
    with Server({"/photo": answer(PICTURE)}, context) as server:
        trusting = ssl.create_default_context(cafile=certificates / "authority.pem")
        yield server, server.guard(tls_context=trusting), names


def test_the_name_and_not_the_address_is_in_the_handshake_and_the_certificate(tls_server, network):
    server, guard, names = tls_server
    assert fetch_sync(server.url("/photo", "photos.example"), guard) == PICTURE
    assert fetch_sync(server.url("/photo", "photos.example."), guard) == PICTURE
    assert names == ["photos.example"] * 2
    assert f"host: photos.example:{server.port}" in server.requests[0].lower()
    assert network.connected == {SERVER}


@pytest.mark.parametrize("host", ["other.example", SERVER])
def test_a_certificate_for_another_name_is_refused(host, tls_server):
    server, guard, names = tls_server
    error = refusal(server.url("/photo", host), guard)
    assert "CERTIFICATE_VERIFY_FAILED" in error.reason
    assert f"not valid for '{host}'" in error.reason
    assert names == ["other.example" if host == "other.example" else None]
    assert not server.requests


def test_an_unknown_authority_is_refused_whatever_the_environment_says(tls_server, certificates, monkeypatch):
    server, guard, _ = tls_server
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "authority.pem"))
    download._system_tls.cache_clear()
    error = refusal(server.url("/photo", "photos.example"), replace(guard, tls_context=None))
    assert "CERTIFICATE_VERIFY_FAILED" in error.reason
    assert not server.requests


def test_a_redirect_to_https_is_checked_by_its_own_name(tls_server, server):
    secure, guard, names = tls_server
    guard = replace(guard, ports=guard.ports | {server.port})
    server.pages["/right"] = redirect(secure.url("/photo", "photos.example"))
    server.pages["/wrong"] = redirect(secure.url("/photo", "other.example"))
    assert fetch_sync(server.url("/right", "other.example"), guard) == PICTURE
    assert "CERTIFICATE_VERIFY_FAILED" in refusal(server.url("/wrong", "photos.example"), guard).reason
    assert names == ["photos.example", "other.example"]


# JSON of services.

SECRET = "key/+&=0123456789"


def ask(server: Server, path: str, **changes) -> object:
    secrets = {"headers": {"X-Token": SECRET}, "secrets": [SECRET], "guard": server.guard(**changes)}
    return asyncio.run(fetch_json(server.url(path), {"q": "caf\u00e9 & co", "key": SECRET}, **secrets))


def test_json_with_a_query_and_headers(server):
    server.pages["/search?q=caf%C3%A9+%26+co&key=key%2F%2B%26%3D0123456789"] = answer(
        b'{"found": ["\\u00e9"]}'
    )
    assert ask(server, "/search") == {"found": ["\u00e9"]}
    head = server.requests[0].lower()
    assert f"x-token: {SECRET.lower()}\r\n" in head
    assert "accept: application/json\r\n" in head


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (answer(b"<html>"), "the answer is not JSON"),
        (answer(b"[" * 100_000), "the answer is not JSON"),
        (answer(b"\xff"), "the answer is not JSON"),
        (answer(b"", "404 Not Found"), "the server answered 404 Not Found"),
        (answer(b'{"detail": "gone"}', "410 Gone"), "the server answered 410 Gone: gone"),
        (
            answer(b'{"error": {"code": 7, "message": "no \\n"}}', "400 Bad Request"),
            "the server answered 400 Bad Request: no \\n",
        ),
        (answer(b'{"error": ["x"]}', "400 Bad Request"), "the server answered 400 Bad Request"),
        (
            answer(f'{{"error": "key {SECRET} or key%2F%2B%26%3D0123456789"}}'.encode(), "401 Unauthorized"),
            "the server answered 401 Unauthorized: ***",
        ),
        (redirect("/photo"), "the server answered 302 Found"),
        (answer(b"1" * 2000), "longer than 1,000 bytes"),
    ],
)
def test_what_is_no_json_and_what_the_service_says_of_it(page, reason, server, caplog):
    caplog.set_level("DEBUG")
    server.pages = dict.fromkeys(["/a?q=caf%C3%A9+%26+co&key=key%2F%2B%26%3D0123456789"], page)
    with pytest.raises(DownloadError) as caught:
        ask(server, "/a", max_bytes=1000 if "1,000" in reason else 10**6)
    assert (caught.value.url, caught.value.reason) == (server.url("/a"), reason)
    assert len(server.requests) == 1
    assert "0123456789" not in caplog.text


@pytest.mark.parametrize(
    "spelling",
    [SECRET, "key%2F%2B%26%3D0123456789", "key%2f%2b%26%3d0123456789", "key/%2B%26=0123456789",
     "%6bey/+&=0123456789"],
)  # fmt: skip
def test_a_secret_is_not_quoted_in_any_spelling(spelling, server):
    page = answer(f'{{"error": "no such key: {spelling}"}}'.encode(), "400 Bad Request")
    server.pages = dict.fromkeys(["/a?q=caf%C3%A9+%26+co&key=key%2F%2B%26%3D0123456789"], page)
    with pytest.raises(DownloadError) as caught:
        ask(server, "/a")
    assert caught.value.reason == "the server answered 400 Bad Request: ***"


def test_a_secret_with_spaces_is_not_quoted_as_forms_spell_it(server):
    server.pages["/a"] = answer(b'{"error": "no such key: my+key%21"}', "400 Bad Request")
    with pytest.raises(DownloadError) as caught:
        asyncio.run(fetch_json(server.url("/a"), {}, {}, secrets=["my key!"], guard=server.guard()))
    assert caught.value.reason == "the server answered 400 Bad Request: ***"


def test_a_service_is_asked_under_the_same_guard(server, network):
    for url in (
        "http://127.0.0.1/",
        "http://intranet.example/",
        "file:///etc/passwd",
        "http://a:b@x.example/",
    ):
        with pytest.raises(DownloadError):
            asyncio.run(fetch_json(url, {}, {}))
    assert not network.connections


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7),
        (None, 0),
        ("soon", 0),
        ("Mon, 01 Jan 2001 00:00:00 GMT", 0),
        ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", 0),
        ("Mon, 01 Jan 2001 00:00:00 +99999999999999999999", 0),
        ("9" * 400, math.inf),
    ],
)
def test_how_long_a_server_asks_to_wait(value, seconds, server):
    server.pages["/busy"] = answer(status="429 Too Many Requests", retry_after=value)
    error = refusal(server.url("/busy"), server.guard())
    assert (error.status, error.retry_after, error.is_transient) == (429, seconds, True)
    again = pickle.loads(pickle.dumps(error))
    assert (again.status, again.retry_after) == (429, seconds)


# Callers.


def test_many_at_once_and_from_a_running_loop(server):
    async def main():
        photos = await asyncio.gather(*(fetch(server.url("/photo"), server.guard()) for _ in range(10)))
        return [*photos, fetch_sync(server.url("/photo"), server.guard())]

    assert asyncio.run(main()) == [PICTURE] * 11


def test_cancelling_hangs_up(server):
    hung_up = threading.Event()

    def endless():
        try:
            yield answer(PICTURE, content_length=None)
            while True:
                server.wait(0.01)
                yield b"x"
        finally:
            hung_up.set()

    server.pages["/endless"] = endless

    async def main():
        task = asyncio.create_task(fetch(server.url("/endless"), server.guard()))
        while not server.num_bytes:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert hung_up.wait(5)


def test_errors_are_one_line_without_passwords():
    error = refusal("http://user:secret@public.example/\n" + "x" * 1000)
    assert "secret" not in str(error)
    assert str(error).isprintable()
    assert len(str(error)) < 700
    assert isinstance(error, JaxclsError)
    again = pickle.loads(pickle.dumps(DownloadError("http://x/", "late", is_transient=True)))
    assert (again.url, again.reason, again.is_transient) == ("http://x/", "late", True)

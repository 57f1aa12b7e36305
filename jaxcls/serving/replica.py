"""One process that serves one classifier: it loads, compiles and checks first, then accepts, then drains.

Exit codes: 0, drained; 1, failed, so that starting it again may help; 2, wrong usage, so that it will not.
"""

import argparse
import asyncio
import functools
import gc
import ipaddress
import json
import logging
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import jax
import numpy as np
import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from jaxcls.classifier import Classifier, compare_with_parity, load
from jaxcls.data.download import fetch_sync
from jaxcls.errors import ClassifierError, JaxclsError, ServiceError, UsageError
from jaxcls.models.precision import scoring_dtype
from jaxcls.parallel import use_compilation_cache
from jaxcls.scoring import make_scorer
from jaxcls.serving.admission import Admission
from jaxcls.serving.app import Identity, Replica, make_app
from jaxcls.serving.auth import Keys
from jaxcls.serving.batcher import Batcher
from jaxcls.serving.config import MAX_SHUTDOWN_SECONDS, ServiceConfig
from jaxcls.serving.metrics import Metrics
from jaxcls.serving.service import Service

LOGGER = logging.getLogger(__name__)
Score = Callable[[np.ndarray], np.ndarray]

DONE, FAILED, WRONG_USAGE = 0, 1, 2
HEADER_SECONDS = 10.0
"""A connection without a whole request's headers is closed after this."""
MAX_HEADER_BYTES = 64 * 1024
KEEP_ALIVE_SECONDS = 30
LAST_REQUESTS_SECONDS = 0.2
"""For what was on its way over connections that were accepted, when no further ones are."""
MEASURING_SECONDS = 0.1
BATCHES_IN_FLIGHT = {"cpu": 1}
"""By platform; elsewhere 2, so that the device need not wait for the host."""
LINGER = {"cpu": 0.0}
"""In seconds, by platform; elsewhere 3 ms. See `Batcher`."""


def listen(host: str, port: int, *, is_private: bool) -> socket.socket:
    """A socket bound to an address, which listens once it is served.

    Args:
        host: a name or an address.
        port: 0: any free one.
        is_private: refuse addresses that other machines can reach.

    Raises:
        UsageError: such an address, one that this machine does not have, or a port that is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        if is_private and not ipaddress.ip_address(address[0]).is_loopback:
            raise UsageError(f"{host} can be reached from other machines: give a --key-file, or 127.0.0.1")
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address[0], port, *address[2:]))  # getaddrinfo would count ports in 16 bits
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot listen on {host} port {port}: {error}") from error
    return listener


def serve(
    path: Path,
    listeners: list[socket.socket],
    config: ServiceConfig,
    identity: Identity,
    *,
    on_ready: Callable[[], object] = lambda: None,
) -> None:
    """Serve the classifier saved at `path` until SIGTERM or Ctrl-C; then finish what was taken in.

    Args:
        path: of the classifier.
        listeners: bound; nothing is accepted from them before everything is compiled and checked.
        config: bounds.
        identity: what clients are told, and must show.
        on_ready: called when the first request can be accepted.

    Raises:
        ClassifierError: the classifier is damaged, or scores other than when it was saved.
        ServiceError: the device failed again and again.
    """
    replica = make_replica(path, config, identity)
    _raise_file_limit()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(replica, config, listeners, on_ready))


def make_replica(path: Path, config: ServiceConfig, identity: Identity) -> Replica:
    """Load, compile and check a classifier: what `make_app` then needs.

    Args:
        path: of the classifier.
        config: bounds.
        identity: what clients are told, and must show.

    Raises:
        ClassifierError: the classifier is damaged, or scores other than when it was saved.
    """
    classifier = load(path)
    score = make_scorer(classifier, batch_sizes=config.batch_sizes, precision=config.precision)
    check_all_sizes(score, classifier, config, path)
    seconds = measure(score, classifier, config)
    platform, metrics = jax.default_backend(), Metrics()
    batcher = Batcher(
        score,
        seconds,
        len(classifier.classes),
        max_in_flight=BATCHES_IN_FLIGHT.get(platform, 2),
        linger=LINGER.get(platform, 0.003),
        observe=metrics.observe_batch,
    )
    service = Service(
        classifier, batcher, max_pixels=config.max_pixels, fetch=fetch_sync if config.allow_urls else None
    )
    deadline = config.deadline_ms / 1000
    admission = Admission(
        config.max_queue, config.max_queue_mib * 2**20, deadline, lambda: service.seconds_per_image
    )
    gc.collect()
    gc.freeze()  # or each full collection stops all for 100 ms to find that JAX is still there
    return Replica(service, admission, metrics, identity, deadline, config.max_body_mib * 2**20)


def check_all_sizes(score: Score, classifier: Classifier, config: ServiceConfig, path: Path) -> None:
    """Score a classifier's parity vectors in batches of every size.

    Raises:
        ClassifierError: they differ from the saved scores.
    """
    dtype = scoring_dtype(config.precision, classifier.preprocess.size)
    for size in config.batch_sizes:
        compare_with_parity(functools.partial(_score_padded, score, size), path, dtype)


def _score_padded(score: Score, size: int, images: np.ndarray) -> np.ndarray:
    padding = np.zeros((-len(images) % size, *images.shape[1:]), np.uint8)
    batches = np.concatenate([images, padding]).reshape(-1, size, *images.shape[1:])
    return np.concatenate([score(batch) for batch in batches])[: len(images)]


def measure(score: Score, classifier: Classifier, config: ServiceConfig) -> dict[int, float]:
    """Seconds that a batch takes, by size: the best of two, or of what fits into `MEASURING_SECONDS`."""
    side, seconds = classifier.preprocess.size, {}
    for size in config.batch_sizes:
        images = np.zeros((size, side, side, 3), np.uint8)
        runs: list[float] = []
        while len(runs) < 2 or sum(runs) < MEASURING_SECONDS:
            started = time.perf_counter()
            score(images)
            runs.append(time.perf_counter() - started)
        seconds[size] = min(runs)
    return seconds


class _Server(uvicorn.Server):
    """Uvicorn's, which after SIGTERM goes on taking requests for a while, and then ends in any case."""

    def __init__(
        self, config: uvicorn.Config, replica: Replica, grace_seconds: float, on_ready: Callable[[], object]
    ):
        super().__init__(config)
        self.replica = replica
        self._grace_seconds = grace_seconds
        self._on_ready = on_ready

    async def leave_when_broken(self) -> None:
        """Wait until the device is found broken, then take no more requests."""
        await self.replica.service.batcher.broken.wait()
        self.replica.is_ready = False
        self._leave(grace_seconds=0)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.replica.is_ready:  # asked again: at once
            self.should_exit = True
            return
        self.replica.is_ready = False
        asyncio.get_running_loop().call_soon_threadsafe(
            self._leave, self._grace_seconds if sig == signal.SIGTERM else 0
        )

    def _leave(self, grace_seconds: float) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(grace_seconds, self._refuse)
        # From a thread: the event loop may be what hangs.
        last = threading.Timer(MAX_SHUTDOWN_SECONDS, os._exit, (1,))
        last.daemon = True
        last.start()

    def _refuse(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        await asyncio.sleep(LAST_REQUESTS_SECONDS)
        self.replica.admission.is_closed = True
        await super().shutdown(sockets)


class _Protocol(HttpToolsProtocol):
    """Uvicorn's, with bounds for what comes before the body."""

    _num_header_bytes = 0
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._patience is not None:
            self._num_header_bytes += len(data)
        super().data_received(data)
        if self._patience is not None and self._num_header_bytes > MAX_HEADER_BYTES:
            self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._patience is None:
            self._wait_for_headers()

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        super().on_headers_complete()

    def _wait_for_headers(self) -> None:
        self._num_header_bytes = 0
        self._patience = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


async def _serve(
    replica: Replica,
    config: ServiceConfig,
    listeners: list[socket.socket],
    on_ready: Callable[[], object],
) -> None:
    keys = replica.identity.keys
    if keys is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _reload, keys)
    options = uvicorn.Config(
        make_app(replica),
        http=_Protocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=config.max_connections,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=MAX_SHUTDOWN_SECONDS,
    )
    server = _Server(options, replica, config.grace_seconds, on_ready)
    watch = asyncio.create_task(server.leave_when_broken())
    await server.serve(listeners)
    watch.cancel()
    if replica.service.batcher.broken.is_set():
        raise ServiceError("the device failed on several single images: this replica must be started anew")


def _reload(keys: Keys) -> None:
    try:
        keys.reload()
        LOGGER.info("%r", keys)
    except UsageError as error:
        LOGGER.error("the keys stay as they were: %s", error)


def _raise_file_limit() -> None:
    """As many open files, and so connections, as the system lets us have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> int:
    """Serve on sockets that were inherited from a supervisor, and drain when it is gone."""
    parser = argparse.ArgumentParser(prog="python -m jaxcls.serving.replica")
    parser.add_argument("model", type=Path, help="a saved classifier")
    parser.add_argument("--fd", type=int, required=True, help="the listening socket, shared by all replicas")
    parser.add_argument(
        "--admin-fd", type=int, required=True, help="a listening socket of this replica alone"
    )
    parser.add_argument("--status-fd", type=int, required=True, help="a pipe: it is told 'ready'")
    parser.add_argument("--key-file", type=Path)
    parser.add_argument("--compiled", type=Path, required=True, help="where compiled programs are kept")
    parser.add_argument("--name", required=True)
    parser.add_argument("--version", required=True)
    parser.add_argument("--config", type=json.loads, default={}, help="fields of ServiceConfig, in JSON")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    threading.Thread(target=_follow, args=(options.status_fd,), daemon=True).start()
    use_compilation_cache(options.compiled)
    try:
        keys = None if options.key_file is None else Keys.read(options.key_file)
        serve(
            options.model,
            [socket.socket(fileno=options.fd), socket.socket(fileno=options.admin_fd)],
            ServiceConfig(**options.config),
            Identity(options.name, options.version, keys),
            on_ready=lambda: os.write(options.status_fd, b"ready\n"),
        )
    except (UsageError, ClassifierError) as error:
        LOGGER.error("%s", error)
        return WRONG_USAGE
    except JaxclsError as error:
        LOGGER.error("%s", error)
        return FAILED
    return DONE


def _follow(pipe: int) -> None:
    """Wait until nobody holds the other end any more."""
    poll = select.poll()
    poll.register(pipe, 0)
    poll.poll()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())

"""The supervisor of one deployment: keeps its replicas running, rolls to new versions, answers for all.

It owns the listening socket, which every replica inherits: what waits there to be accepted outlives a replica
that dies and a version that goes. SIGHUP has it look at what is asked for, and the replicas at their keys;
SIGTERM ends it once the replicas have finished their work. When it is killed, they notice by their status
pipes, which nobody reads any more.
"""

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from functools import partial
from logging.handlers import RotatingFileHandler
from pathlib import Path

import uvicorn
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jaxcls.errors import DeploymentError
from jaxcls.serving.auth import Keys
from jaxcls.serving.keeper import Keeper
from jaxcls.serving.registry import PROCESSES_LOCK, SUPERVISOR_LOCK, Entry, ReplicaReport, Report, Spec

LOGGER = logging.getLogger("supervisor")

MAX_LOG_BYTES = 5 * 2**20
"""As much again is kept of what came before."""

Answer = Callable[[Request], Awaitable[Response]]


class Supervisor:
    """Makes what is asked for be there.

    Attributes:
        keys: one of which whoever asks for more than health must show.

    Args:
        entry: where both are written.
        service: the socket that the service listens on.
        status: the one on which the supervisor answers.
        lock: a file descriptor that says, as long as anybody has it, that there are processes.
    """

    def __init__(self, entry: Entry, service: socket.socket, status: socket.socket, lock: int) -> None:
        self._entry = entry
        self._service = service
        self._lock = lock
        self.keys = Keys.read(entry.key_file)
        self._report = Report(service.getsockname()[1], status.getsockname()[1])
        self._replicas: list[Keeper] = []
        self._asked = asyncio.Event()

    @property
    def report(self) -> Report:
        """What there is."""
        return replace(self._report, replicas=tuple(replica.report for replica in self._replicas))

    def look(self) -> None:
        """See whether something else is asked for, and have the replicas see whether keys have changed."""
        self._asked.set()
        for replica in self._replicas:
            replica.reload_keys()
        self.keys.reload()

    async def run(self) -> None:
        """Serve the version that is asked for, and another one when that changes.

        Raises:
            DeploymentError: the first version does not become ready.
        """
        while True:
            spec = self._entry.read_spec()
            async with asyncio.TaskGroup() as tasks:
                rolling = tasks.create_task(self._roll(spec))
                while self._entry.read_spec() == spec:
                    await self._asked.wait()
                    self._asked.clear()
                rolling.cancel()

    async def end(self) -> None:
        """Have all replicas finish their work at once, and wait for them."""
        await asyncio.gather(*(replica.end() for replica in self._replicas))

    async def metrics(self) -> bytes:
        """Those of all replicas and the supervisor's own, in Prometheus' text format."""
        key = self._entry.read_key()
        texts = await asyncio.gather(*(replica.fetch_metrics(key) for replica in self._replicas))
        names = [replica.name for replica in self._replicas]
        families = [*_own_metrics(self.report), *merge_metrics(dict(zip(names, texts, strict=True)))]
        return generate_latest(_Families(families))

    async def _roll(self, spec: Spec) -> None:
        if spec.version != self._report.version:
            await self._start(spec)
        for replica in [replica for replica in self._replicas if not self._is_wanted(replica.report)]:
            await replica.end()
            self._replicas.remove(replica)
            self._write_report()

    def _is_wanted(self, replica: ReplicaReport) -> bool:
        """A roll that was interrupted may leave some that end, of the version that is wanted again."""
        return replica.version == self._report.version and replica.state != "ending"

    async def _start(self, spec: Spec) -> None:
        """Start a version beside the one that is served, and report whether it became ready."""
        LOGGER.info("starting version %d", spec.version)
        assert spec.num_replicas != "auto"  # refused when it was asked for
        command, fds = partial(self._command, spec), (self._service.fileno(), self._lock)
        new = [
            Keeper(spec.version, number, command, fds, self._write_report)
            for number in range(1, spec.num_replicas + 1)
        ]
        self._replicas += new
        try:
            async with asyncio.timeout(spec.timeout_seconds):
                await asyncio.gather(*(replica.became_ready for replica in new))
        except (DeploymentError, TimeoutError) as error:
            failure = str(error) or f"it was not ready within {spec.timeout_seconds:g} s"
            LOGGER.error("version %d is given up: %s", spec.version, failure)
            self._report = replace(self._report, failed_version=spec.version, failure=failure)
        else:
            LOGGER.info("version %d is ready", spec.version)
            self._report = replace(self._report, version=spec.version, failed_version=None, failure="")
        self._write_report()
        if self._report.version is None:  # nothing runs: no use to go on
            raise DeploymentError(f"there is no version to serve: {self._report.failure}")

    def _command(self, spec: Spec, admin: int, status: int) -> list[str]:
        options = {
            "fd": self._service.fileno(),
            "admin-fd": admin,
            "status-fd": status,
            "name": self._entry.name,
            "version": spec.version,
            "key-file": self._entry.key_file,
            "compiled": self._entry.folder.parents[1] / "compiled",
            "config": json.dumps(spec.config),
        }
        model = self._entry.classifier(spec.version)
        command = [sys.executable, "-m", "jaxcls.serving.replica", str(model)]
        return command + [text for name, value in options.items() for text in (f"--{name}", str(value))]

    def _write_report(self) -> None:
        self._entry.write_report(self.report)


def make_app(supervisor: Supervisor) -> Starlette:
    """The application that answers for all replicas: state, metrics, health."""

    @asynccontextmanager
    async def supervise(app: Starlette) -> AsyncIterator[None]:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, supervisor.look)
        running = asyncio.create_task(supervisor.run())
        running.add_done_callback(_end_after)
        try:
            yield
        finally:
            running.cancel()
            await asyncio.wait([running])
            await supervisor.end()
            LOGGER.info("ended")

    async def live(request: Request) -> Response:
        return Response()

    async def ready(request: Request) -> Response:
        return Response(status_code=200 if supervisor.report.is_ready else 503)

    async def report(request: Request) -> Response:
        return JSONResponse(asdict(supervisor.report))

    async def metrics(request: Request) -> Response:
        return Response(await supervisor.metrics(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    def with_key(answer: Answer) -> Answer:
        async def respond(request: Request) -> Response:
            if not supervisor.keys.accepts(request.headers.get("authorization")):
                return JSONResponse({"error": "a key is needed: Authorization: Bearer KEY"}, 401)
            return await answer(request)

        return respond

    routes = {
        "/v2/health/live": live,
        "/v2/health/ready": ready,
        "/report": with_key(report),
        "/metrics": with_key(metrics),
    }
    return Starlette(routes=[Route(path, answer) for path, answer in routes.items()], lifespan=supervise)


def _end_after(running: asyncio.Task[None]) -> None:
    """Have the process end as by `delete` if its work ends by an error."""
    if not running.cancelled():
        LOGGER.error("ends", exc_info=running.exception())
        signal.raise_signal(signal.SIGTERM)


def merge_metrics(texts: Mapping[str, str]) -> list[Metric]:
    """Metrics of several processes as one list: every sample with the label `replica`.

    Args:
        texts: replica's name -> its metrics in Prometheus' text format.
    """
    families: dict[str, Metric] = {}
    for name, text in texts.items():
        for family in text_string_to_metric_families(text):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            merged.samples += [
                sample._replace(labels={**sample.labels, "replica": name}) for sample in family.samples
            ]
    return list(families.values())


def _own_metrics(report: Report) -> list[Metric]:
    ready = GaugeMetricFamily("jaxcls_replica_ready", "Whether it takes requests.", labels=["replica"])
    restarts = CounterMetricFamily("jaxcls_replica_restarts", "Starts after the first.", labels=["replica"])
    for replica in report.replicas:
        ready.add_metric([replica.name], replica.state == "ready")
        restarts.add_metric([replica.name], replica.num_restarts)
    return [ready, restarts]


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def main(arguments: Sequence[str]) -> None:
    """Supervise in a process of its own, which outlives this one.

    Args:
        arguments: the registry's folder, the deployment's name, and the file descriptors of two listening
            sockets: the service's, and the one for state, metrics and health.
    """
    registry, name, *numbers = arguments
    entry = Entry(Path(registry), name)
    alive, processes = entry.hold(SUPERVISOR_LOCK), entry.hold(PROCESSES_LOCK)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it is handled: what is asked for is read anyhow
    if pid := os.fork():
        alive.write(str(pid))
        alive.flush()
        os._exit(0)
    _detach(entry)
    service, status = (socket.socket(fileno=int(number)) for number in numbers)
    supervisor = Supervisor(entry, service, status, processes.fileno())
    config = uvicorn.Config(
        make_app(supervisor), log_config=None, access_log=False, timeout_graceful_shutdown=1
    )
    uvicorn.Server(config).run(sockets=[status])


def _detach(entry: Entry) -> None:
    """Belong to no terminal and no folder of the user's; say things in the log alone."""
    os.setsid()
    os.umask(0o077)
    os.chdir(entry.folder)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    handler = RotatingFileHandler(entry.log_file, maxBytes=MAX_LOG_BYTES, backupCount=1, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    for name in ("httpx2", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several replicas may share a GPU


if __name__ == "__main__":
    main(sys.argv[1:])

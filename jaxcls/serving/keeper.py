"""The supervisor's side of one replica: starting and restarting its process, knowing whether it is ready."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress

import httpx2

from jaxcls.errors import DeploymentError
from jaxcls.serving.registry import HOST, ReplicaReport, ReplicaState

FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.25, 30.0
"""Before a process is started again; doubled by each one that did not become ready."""
DRAIN_SECONDS = 35.0
"""A replica ends by itself within 30 s of SIGTERM; one that does not is killed."""
FETCH_SECONDS = 2.0
"""For a replica's metrics; those of one that takes longer are left out."""
FAILED, WRONG_USAGE = 1, 2
"""Exit codes of a replica; the second says that it would not do better if it were started again."""

Command = Callable[[int, int], Sequence[str]]
"""Command line of a replica, from the file descriptors of its own listening socket and its status pipe."""


class Keeper:
    """Keeps one replica running: when its process ends, the next is started after a pause.

    Args:
        version: of the classifier.
        number: among the replicas of this version.
        command: that a process runs.
        fds: file descriptors that it inherits.
        on_change: called when the report has changed.

    Attributes:
        name: "VERSION-NUMBER".
        became_ready: done once a process was ready; DeploymentError if one ended before.
    """

    def __init__(
        self, version: int, number: int, command: Command, fds: Sequence[int], on_change: Callable[[], None]
    ) -> None:
        self.version = version
        self.name = f"{version}-{number}"
        self.became_ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._command = command
        self._fds = fds
        self._on_change = on_change
        self._admin = socket.create_server((HOST, 0))
        self._log = logging.getLogger(f"replica {self.name}")
        self._last_line = ""
        self._state: ReplicaState = "starting"
        self._pid: int | None = None
        self._num_restarts = 0
        self._task = asyncio.create_task(self._keep_running())

    @property
    def report(self) -> ReplicaReport:
        """The replica's state."""
        return ReplicaReport(self.name, self.version, self._state, self._pid, self._num_restarts)

    def reload_keys(self) -> None:
        """Have it read its key file again; one that is not ready yet will read it, or just has."""
        if self._state == "ready" and self._pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGHUP)

    async def end(self) -> None:
        """Have it finish its work, and wait until it has no process."""
        if self._state != "ending":
            self._enter("ending")
            self.became_ready.cancel()
            self._task.cancel()
        await asyncio.wait([self._task])
        self._admin.close()

    async def fetch_metrics(self, key: str) -> str:
        """Its metrics in Prometheus' text format; "" if it does not answer."""
        if self._state != "ready":
            return ""
        url = f"http://{HOST}:{self._admin.getsockname()[1]}/metrics"
        async with httpx2.AsyncClient(timeout=FETCH_SECONDS, trust_env=False) as client:
            try:
                response = await client.get(url, headers={"Authorization": f"Bearer {key}"})
                return response.raise_for_status().text
            except httpx2.HTTPError:
                return ""

    def _enter(self, state: ReplicaState) -> None:
        self._state = state
        self._on_change()

    async def _keep_running(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while await self._run() != WRONG_USAGE:
            pause = FIRST_PAUSE_SECONDS if self._state == "ready" else min(2 * pause, MAX_PAUSE_SECONDS)
            self._log.warning("is started again in %g s", pause)
            self._enter("waiting")
            await asyncio.sleep(pause)
            self._num_restarts += 1
            self._enter("starting")
        self._log.error("is not started again")
        self._enter("failed")

    async def _run(self) -> int:
        """Run one process and return its exit code; when cancelled, let it finish its work first."""
        reading, writing = os.pipe()
        admin = self._admin.fileno()
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command(admin, writing),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=(*self._fds, admin, writing),
            )
        except BaseException as error:
            os.close(reading)
            if not isinstance(error, OSError):
                raise
            self._log.error("cannot be started: %s", error)
            return FAILED
        finally:
            os.close(writing)
        self._pid = process.pid
        self._on_change()
        followed = asyncio.gather(self._follow_output(process), self._follow_status(reading))
        try:
            code = await process.wait()
        finally:
            await _end(process)
            await followed
            self._pid = None
            self._log.info("ended with exit code %d", process.returncode)
        if not self.became_ready.done():
            message = f"replica {self.name} ended with exit code {code} before it was ready"
            self.became_ready.set_exception(DeploymentError(f"{message}: {self._last_line}"))
        return code

    async def _follow_output(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in _read_lines(process.stdout):
            self._log.info("%s", line)
            self._last_line = line

    async def _follow_status(self, reading: int) -> None:
        """Note the line by which a replica says that it accepts; the pipe stays open until it ends."""
        status = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(status), os.fdopen(reading, "rb", buffering=0)
        )
        async for line in _read_lines(status):
            if line == "ready" and self._state == "starting":
                self._enter("ready")
                if not self.became_ready.done():
                    self.became_ready.set_result(None)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), DRAIN_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()


async def _read_lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """The lines until the end; those longer than the stream's buffer in parts."""
    while True:
        try:
            line = await stream.readuntil()
        except asyncio.IncompleteReadError as error:
            line = error.partial
        except asyncio.LimitOverrunError as error:
            line = await stream.read(error.consumed)
        if not line:
            return
        yield line.decode(errors="replace").rstrip("\n")

"""The process that sends the load of a load test: Locust's users.

It is a process of its own, and nothing else imports this module: Locust has gevent replace the sockets,
threads and locks of the standard library, for good and for everything else in the process.

From standard input it takes a `Load` as one line of JSON, and ends early when that is closed. To standard
output it writes lines of JSON: for each request `[outcome, intended, started, finished]`, in seconds since
the load began; last `{"cpu_share": ...}`, or `{"error": ...}` alone where there is no such service.
"""

import json
import logging
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar

import gevent
from gevent.pool import Group
from gevent.socket import wait_read
from locust import FastHttpUser, task
from locust.contrib.fasthttp import FastResponse
from locust.env import Environment
from locust.exception import StopUser

from jaxcls.serving.load_test import ANSWER_SECONDS, BUSY, MAX_CONNECTIONS, OK, UNFINISHED, Load

PAUSE_SECONDS = 0.1
"""Before a user who got no answer at all tries again: a dead service must not be met by a busy loop."""
MAX_LATE_SECONDS = 1.0
"""A generator that cannot keep up with the rate ends so long after the load should have ended."""


class Recorder:
    """The clock of a load, and what became of its requests."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self.restart()

    def restart(self) -> None:
        """Begin to count time."""
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def now(self) -> float:
        """Seconds since the load began."""
        return time.perf_counter() - self._start

    def cpu_share(self) -> float:
        """The share of one processor that this process has used."""
        return (time.process_time() - self._cpu_start) / self.now()

    def write(self, outcome: str, intended: float, started: float) -> None:
        """Note that a request has ended now."""
        self._counts[outcome] += 1
        print(json.dumps([outcome, intended, started, self.now()]))

    def show_progress(self) -> None:
        """Say how it goes: every second on a terminal, elsewhere every ten."""
        interval, end = (1, "\r") if sys.stderr.isatty() else (10, "\n")
        while True:
            gevent.sleep(interval)
            num_ok, num_busy = self._counts[OK], sum(self._counts[status] for status in BUSY)
            num_failed = self._counts.total() - num_ok - num_busy
            line = (
                f"{self.now():.0f} s: {num_ok:,} ok, {num_busy:,} told to come again, {num_failed:,} failed"
            )
            print(f"{line:79}", end=end, file=sys.stderr, flush=True)


class Traffic(FastHttpUser):
    """What both kinds of load have in common. What its users share hangs on the class: Locust makes them."""

    abstract = True
    insecure = False  # Locust's default shows the key to whoever claims to be the service
    connection_timeout = network_timeout = ANSWER_SECONDS
    load: ClassVar[Load]
    images: ClassVar[Iterator[bytes]]
    headers: ClassVar[dict[str, str]]
    recorder: ClassVar = Recorder()

    @classmethod
    def prepare(cls, load: Load) -> None:
        """Read the images."""
        cls.load, cls.host = load, load.url.rstrip("/").removesuffix("/score")
        cls.images = cycle([Path(image).read_bytes() for image in load.images])
        cls.headers = {"Content-Type": "application/octet-stream"}
        if load.key is not None:
            cls.headers["Authorization"] = f"Bearer {load.key}"

    def post(self, **context: float) -> FastResponse:
        """Send the next image; `context` goes to those who listen to Locust's request event."""
        image: Any = next(self.images)  # Locust's annotation knows no bytes
        return self.client.post("/v1/predict", image, headers=self.headers, context=context)

    def post_and_record(self, intended: float) -> FastResponse:
        """Send the next image, and see to it that what becomes of it is written down."""
        started = self.recorder.now()
        try:
            return self.post(intended=intended, started=started)
        except gevent.GreenletExit:
            self.recorder.write(UNFINISHED, intended, started)
            raise

    def stop_if_over(self, intended: float) -> None:
        """End this user if the next request would begin after the end of the load."""
        if intended >= self.load.seconds:
            raise StopUser


class ClosedLoop(Traffic):
    """A user who sends the next request once the last one is answered."""

    pause = 0.0

    @task
    def ask(self) -> None:
        """Send one request."""
        now = self.recorder.now()
        self.stop_if_over(now)
        response = self.post_and_record(now)
        self.pause = 0 if response.status_code else PAUSE_SECONDS

    def wait_time(self) -> float:
        """Seconds until the next request."""
        return self.pause


class OpenLoop(Traffic):
    """Arrivals at a constant rate, which wait for no answer.

    A request that begins late, because the generator is busy, counts from when it should have begun.
    """

    concurrency = MAX_CONNECTIONS
    in_flight: ClassVar = Group()
    num_arrived = 0

    @property
    def next_arrival(self) -> float:
        """When the next request is to begin."""
        assert self.load.rate is not None
        return self.num_arrived / self.load.rate

    @task
    def arrive(self) -> None:
        """Let one request begin."""
        self.stop_if_over(max(self.next_arrival, self.recorder.now() - MAX_LATE_SECONDS))
        self.in_flight.spawn(self.post_and_record, self.next_arrival)
        self.num_arrived += 1

    def wait_time(self) -> float:
        """Seconds until the next arrival."""
        return max(0.0, self.next_arrival - self.recorder.now())


def record(response: FastResponse, exception: Exception | None, context: dict[str, Any], **_: object) -> None:
    """Listen to Locust's request event: it alone knows of answers that broke off in the middle."""
    Traffic.recorder.write(outcome(response, exception), context["intended"], context["started"])


def outcome(response: FastResponse, error: Exception | None) -> str:
    """What to call an answer: "ok", its HTTP status, or what went wrong, alike for like errors."""
    status = response.status_code
    if status == 200 and error is None:
        return OK
    if status >= 300 or error is None:
        return str(status)
    error = getattr(error, "original", error)  # what geventhttpclient wraps
    return getattr(error, "strerror", None) or str(error).rstrip(".") or type(error).__name__


def probe(user: Traffic) -> str | None:
    """Send one request; return what is wrong, if this is no scoring service, or not for us."""
    response = user.post()
    found = outcome(response, getattr(response, "error", None))
    if found == OK or found in BUSY:
        return None
    problem = f"{found} {(response.text or '')[:200]}".rstrip()
    return f"{problem} to {user.load.images[0]}" if found == "400" else problem


def main() -> None:
    """Send the load that standard input asks for."""
    logging.basicConfig(level=logging.ERROR)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    load = Load(**json.loads(sys.stdin.buffer.readline()))
    kind = ClosedLoop if load.rate is None else OpenLoop
    environment = Environment(user_classes=[kind])
    runner = environment.create_local_runner()
    kind.prepare(load)
    if (problem := probe(kind(environment))) is not None:
        print(json.dumps({"error": problem}))
        return
    environment.events.request.add_listener(record)
    Traffic.recorder.restart()
    progress = gevent.spawn(Traffic.recorder.show_progress)
    runner.spawn_users({kind.__name__: load.users or 1})

    def finish() -> None:
        runner.user_greenlets.join()
        OpenLoop.in_flight.join()

    ends = [gevent.spawn(finish), gevent.spawn(wait_read, sys.stdin.fileno())]
    gevent.wait(ends, load.seconds + ANSWER_SECONDS, count=1)
    progress.kill()
    if sys.stderr.isatty():
        print(file=sys.stderr)
    OpenLoop.in_flight.kill()
    runner.quit()
    print(json.dumps({"cpu_share": Traffic.recorder.cpu_share()}))


if __name__ == "__main__":
    main()

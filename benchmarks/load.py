"""Load on an HTTP service by `wrk`, pinned to one core, and the service as a process."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.timing import SubjectError

SECONDS_TO_END = 3
MAX_SECONDS_PER_ANSWER = 20
SECONDS_BETWEEN_PROBES = 0.02

SCRIPT = """
local order = dofile(os.getenv("ORDER"))
local requests, next_request, threads, time_header = {}, 0, {}, "x-execution-time-ms"
function setup(thread) table.insert(threads, thread) end
function init()
  for number, path in ipairs(order.bodies) do
    local file = io.open(path, "rb")
    requests[number] = wrk.format("POST", nil, order.headers, file:read("*a")); file:close()
  end
  good = 0; busy = 0; other = 0; times = {}; by_second = {}; first_second = os.time(); math.randomseed(1)
end
function delay() return order.delay_ms * (0.5 + math.random()) end
function request()
  next_request = next_request % #requests + 1
  return requests[next_request]
end
function response(status, headers)
  if status == 200 then
    good = good + 1
    by_second[os.time()] = (by_second[os.time()] or 0) + 1
    local bucket = math.floor((headers["X-Execution-Time-Ms"] or headers[time_header] or 0) / 10)
    times[bucket] = (times[bucket] or 0) + 1
  elseif status == 429 then busy = busy + 1 else other = other + 1 end
end
function done(summary, latency)
  local thread, lost = threads[1], summary.errors
  local good, busy = thread:get("good"), thread:get("busy")
  local left, bucket, times = 0.99 * good, -1, thread:get("times")
  while left > 0 do bucket = bucket + 1; left = left - (times[bucket] or 0) end
  -- Whole seconds, without those in which the load begins and ends.
  local from, to, steady = thread:get("first_second") + 2, os.time() - 1, 0
  for second, count in pairs(thread:get("by_second")) do
    if second >= from and second <= to then steady = steady + count end
  end
  local found = {
    good_per_second = steady / math.max(to - from + 1, 1),
    good = good, busy = busy, seconds = summary.duration / 1e6, good_p99_ms = 10 * (bucket + 1),
    other = thread:get("other") + lost.connect + lost.read + lost.write + lost.timeout,
    p50_ms = latency:percentile(50) / 1000, p99_ms = latency:percentile(99) / 1000,
  }
  local pairs_of = {}
  for name, value in pairs(found) do table.insert(pairs_of, string.format('"%s": %g', name, value)) end
  io.stderr:write("{" .. table.concat(pairs_of, ", ") .. "}")
end
"""


@dataclass(frozen=True)
class Load:
    """What became of a load.

    Attributes:
        good, busy, other: answers of status 200, of 429, and all else, lost connections included.
        good_per_second: good answers in the seconds between those in which the load begins and ends.
        seconds: how long it lasted.
        p50_ms, p99_ms: of all answers, as `wrk` corrects them: one that took longer than usual counts also
            as those which its connection would have asked for meanwhile.
        good_p99_ms: of the good ones, by the service's own clock, rounded up to 10 ms.
    """

    good: int
    busy: int
    other: int
    seconds: float
    p50_ms: float
    p99_ms: float
    good_p99_ms: float
    good_per_second: float


def drive(
    url: str,
    bodies: Sequence[bytes],
    headers: Mapping[str, str],
    scratch: Path,
    *,
    connections: int,
    seconds: float,
    delay_ms: float = 0.0,
) -> Load:
    """Post bodies in turn.

    Args:
        url: of one endpoint.
        bodies: of requests.
        headers: of all requests.
        scratch: a folder for the generator's files.
        connections: each asks again once it is answered.
        seconds: how long; the first two and the last tell nothing of good answers a second.
        delay_ms: the mean pause of a connection between an answer and its next request.

    Raises:
        SubjectError: there is no `wrk`, or it failed.
    """
    if shutil.which("wrk") is None:
        raise SubjectError("skipped: needs wrk, which is not installed")
    paths = [scratch / f"body{number}" for number in range(len(bodies))]
    for path, body in zip(paths, bodies, strict=True):
        path.write_bytes(body)
    (scratch / "load.lua").write_text(SCRIPT)
    fields = ", ".join(f'["{name}"] = "{value}"' for name, value in headers.items())
    names = ", ".join(f'"{path}"' for path in paths)
    order = scratch / "order.lua"
    order.write_text(f"return {{bodies = {{{names}}}, headers = {{{fields}}}, delay_ms = {delay_ms}}}")
    done = subprocess.run(
        [
            "taskset", "-c", "0", "wrk", "--threads", "1", "--connections", str(connections), "--duration",
            f"{round(seconds)}s", "--timeout", f"{MAX_SECONDS_PER_ANSWER}s", "--latency", "--script",
            str(scratch / "load.lua"), url,
        ],
        env={**os.environ, "ORDER": str(order)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode or not done.stderr.startswith("{"):
        raise SubjectError(f"wrk failed: {done.stderr[-200:]}")
    return Load(**json.loads(done.stderr))


def refusals(url: str, headers: Mapping[str, str], num_bytes: int, seconds: float) -> list[float]:
    """How soon requests are refused, in milliseconds, as another client sees it.

    Their bodies are no photos: one that is let in is answered at once, and takes no place in the queue. `wrk`
    cannot say it, since it counts slow answers several times (`Load`).

    Args:
        url, headers: as for `drive`.
        num_bytes: of a body.
        seconds: how long to ask, about 50 times a second.
    """
    parts, body, found = urlsplit(url), bytes(num_bytes), []
    ends = time.monotonic() + seconds
    with closing(HTTPConnection(parts.netloc, timeout=MAX_SECONDS_PER_ANSWER)) as connection:
        while time.monotonic() < ends:
            started = time.perf_counter()
            connection.request("POST", parts.path, body, dict(headers))
            answer = connection.getresponse()
            if answer.status == HTTPStatus.TOO_MANY_REQUESTS:
                found.append(1000 * (time.perf_counter() - started))
            answer.read()
            time.sleep(SECONDS_BETWEEN_PROBES)
    return found


@contextmanager
def serving(command: Sequence[str], ready: str) -> Iterator[str]:
    """Run a service until the block ends; yield the first group of the line that `ready` matches.

    Raises:
        SubjectError: it ends before.
    """
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    try:
        while not (match := re.search(ready, lines[-1] if lines else "")):
            lines.append(process.stdout.readline())
            if not lines[-1]:
                raise SubjectError(f"the service ended: {''.join(lines)[-200:].strip()}")
        yield match[1]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_END)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()

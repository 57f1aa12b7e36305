"""A load test of a scoring service: Locust sends, in a process of its own; the report is made here.

Two kinds of load tell different things. In an open loop requests arrive at a constant rate, whatever becomes
of them, as from many independent clients; each counts from when it should have begun, so a service that
stalls is not spared the requests of that time. In a closed loop each of so many users waits for an answer
before asking again, which finds the highest rate that the service keeps up.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cached_property
from html import escape
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from jaxcls.data.folder import list_images
from jaxcls.data.images import read_bytes
from jaxcls.errors import JaxclsError, MissingExtraError, ServiceError, UsageError
from jaxcls.evaluation import plots
from jaxcls.evaluation.plots import BLUE, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OK, UNFINISHED = "ok", "unfinished"
BUSY = ("429", "503")
"""HTTP statuses that say "come again": refused on purpose, so no failures."""

ANSWER_SECONDS = 30.0
"""How long an answer is waited for."""
MAX_CONNECTIONS = 4096
"""Requests under way at once in an open loop; further ones wait within the generator."""
MAX_IMAGE_BYTES = 256 * 2**20
"""The generator holds so much of a folder in memory."""

MAX_LATENESS_MS = 10.0
"""Beyond this the generator is said to be late."""

KINDS = ("ok", "busy", "failed")
KIND_LABELS = ("good answers", "told to come again (429, 503)", "failed")
PERCENTILES = {"p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
ORANGE = "#E69F00"  # of Okabe and Ito's palette, as the others


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is sent to a service.

    Args:
        url: the service's address, such as http://127.0.0.1:8000.
        images: paths of encoded images, sent in turn.
        rate: requests per second, in an open loop.
        users: how many wait for their answers at a time, in a closed loop.
        seconds: how long requests are begun.
        key: the key, if the service asks for one.

    Raises:
        UsageError: not exactly one of rate and users, a number that is not positive, or no http(s) address.
    """

    url: str
    images: tuple[str, ...]
    rate: float | None = None
    users: int | None = None
    seconds: float = 30.0
    key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.users is None):
            raise UsageError("give either a rate (requests per second) or users (that wait for answers)")
        for name in ("rate", "users", "seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{name} is {value}: give a positive number")
        try:
            parts = urlsplit(self.url)
            is_complete = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
            is_address = is_complete and parts.username is None  # a password would end up in the report
        except ValueError:
            is_address = False
        if not is_address:
            raise UsageError(f"{self.url!r} is not an address such as http://127.0.0.1:8000")

    def __str__(self) -> str:
        if self.rate is not None:
            return f"open loop, {self.rate:g} requests/s for {self.seconds:g} s"
        return f"closed loop, {self.users} users for {self.seconds:g} s"


@dataclass(frozen=True, eq=False, kw_only=True)
class Report:
    """What became of a load.

    Attributes:
        load: what was asked for.
        began: when.
        outcomes: str [N], one per request: "ok", an HTTP status, or what went wrong; "unfinished" for
            requests that were still under way at the very end.
        intended, started, finished: float64 [N], seconds since the load began. `started` is later than
            `intended` where the generator was late.
        cpu_share: the share of one processor that the generator used, in [0, 1].
        is_interrupted: whether it was ended early.
        p99_ms: the objective: 99 % of the good answers within so many milliseconds. None: any.
    """

    load: Load
    began: datetime
    outcomes: NDArray[np.str_]
    intended: NDArray[np.float64]
    started: NDArray[np.float64]
    finished: NDArray[np.float64]
    cpu_share: float
    is_interrupted: bool = False
    p99_ms: float | None = None

    @cached_property
    def seconds(self) -> float:
        """How long requests were begun."""
        return float(self.intended.max(initial=0.0)) if self.is_interrupted else self.load.seconds

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """Requests by outcome: good answers, then those told to come again, then failures."""
        names, counts = np.unique(self.outcomes, return_counts=True)
        found = dict(zip(names.tolist(), counts.tolist(), strict=True))
        return {
            name: found[name] for name in sorted(found, key=lambda name: (KINDS.index(_kind(name)), name))
        }

    @property
    def num_failed(self) -> int:
        """Requests neither answered well nor told to come again; not those that an early end cut off."""
        failed = sum(count for name, count in self.counts.items() if _kind(name) == "failed")
        return failed - (self.counts.get(UNFINISHED, 0) if self.is_interrupted else 0)

    @property
    def goodput(self) -> float:
        """Good answers per second; those that came only after the last request was begun do not count."""
        num_good = np.count_nonzero((self.outcomes == OK) & (self.finished <= self.seconds))
        return num_good / self.seconds if self.seconds else 0.0

    def latency_ms(self, outcome: str = OK) -> dict[str, float]:
        """p50 to p99 and the maximum, in milliseconds, of an outcome that has occurred."""
        return _percentiles((self.finished - self.intended)[self.outcomes == outcome])

    def lateness_ms(self) -> dict[str, float]:
        """By how much requests began later than intended, in milliseconds."""
        return _percentiles(self.started - self.intended)

    @cached_property
    def problems(self) -> tuple[str, ...]:
        """Why the service has not passed; empty if it has."""
        problems = []
        if OK not in self.counts:
            problems.append("no request was answered well")
        elif self.p99_ms is not None and (p99 := self.latency_ms()["p99"]) > self.p99_ms:
            problems.append(f"p99 is {p99:.1f} ms, above the objective of {self.p99_ms:g} ms")
        if self.num_failed:
            problems.append(f"{self.num_failed:,} of {len(self.outcomes):,} requests failed")
        return tuple(problems)

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """Where the generator was the bottleneck, so that the numbers do not tell of the service alone."""
        warnings = []
        if self.load.rate is not None and len(self.outcomes):
            num_sent = np.count_nonzero(self.started <= self.seconds)
            if num_sent + 1 < 0.98 * self.load.rate * self.seconds:
                warnings.append(
                    f"the generator began {num_sent / self.seconds:.4g} of {self.load.rate:g} requests/s: "
                    "it, not the service, is at its limit"
                )
            elif (late := self.lateness_ms()["p99"]) > MAX_LATENESS_MS:
                warnings.append(
                    f"the generator began 1 % of the requests {late:.0f} ms late or more, "
                    "which their latencies contain"
                )
            if self.max_in_flight >= MAX_CONNECTIONS:
                warnings.append(f"requests waited for one of the generator's {MAX_CONNECTIONS} connections")
        elif self.cpu_share > 0.9:
            warnings.append(
                f"the generator kept its processor {self.cpu_share:.0%} busy: the service may take more"
            )
        return tuple(warnings)

    @property
    def max_in_flight(self) -> int:
        """The largest number of requests under way at a time."""
        num_begun = np.arange(1, len(self.started) + 1)
        num_ended = np.searchsorted(np.sort(self.finished), np.sort(self.started))
        return int((num_begun - num_ended).max(initial=0))

    def timeline(self) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
        """Answers per second, over time.

        Returns:
            The T + 1 edges of the time bins, in seconds; and for "ok", "busy" and "failed" the requests per
            second [T] that ended so.
        """
        end = max(self.seconds, float(self.finished.max(initial=0.0)), 0.1)
        edges = np.linspace(0, end, 1 + int(np.clip(end, 10, 120)))
        kinds = np.array([_kind(outcome) for outcome in self.outcomes], dtype=np.str_)
        counts = {kind: np.histogram(self.finished[kinds == kind], edges)[0] for kind in KINDS}
        return edges, {kind: count / np.diff(edges) for kind, count in counts.items()}

    def to_json(self) -> dict[str, Any]:
        """All numbers, without the key."""
        edges, rates = self.timeline()
        return {
            "url": self.load.url,
            "rate": self.load.rate,
            "users": self.load.users,
            "num_images": len(self.load.images),
            "began": self.began.isoformat(timespec="seconds"),
            "seconds": self.seconds,
            "is_interrupted": self.is_interrupted,
            "num_requests": len(self.outcomes),
            "goodput": self.goodput,
            "outcomes": {
                name: {"count": count, "latency_ms": self.latency_ms(name)}
                for name, count in self.counts.items()
            },
            "p99_ms": self.p99_ms,
            "problems": self.problems,
            "warnings": self.warnings,
            "generator": {
                "cpu_share": self.cpu_share,
                "lateness_ms": self.lateness_ms() if len(self.outcomes) else None,
                "max_in_flight": self.max_in_flight,
                "locust": version("locust"),
            },
            "timeline": {
                "edges_seconds": edges.tolist(),
                "per_second": {kind: rate.tolist() for kind, rate in rates.items()},
            },
        }

    def write(self, folder: Path) -> None:
        """Write report.html, which needs no other file, report.json and goodput.png into a new folder."""
        folder.mkdir(parents=True)
        plots.save(plot_goodput(self), folder / "goodput.png")
        (folder / "report.json").write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")
        (folder / "report.html").write_text(
            self._html((folder / "goodput.png").read_bytes()), encoding="utf-8"
        )

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(map(str.rjust, row, widths)) for row in rows]
        return "\n".join([self._summary(), *table, *self.problems, *self.warnings])

    def _summary(self) -> str:
        early = f", ended after {self.seconds:.1f} s" if self.is_interrupted else ""
        return f"{self.load}{early}: {self.goodput:.4g} good answers/s"

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [("outcome", "requests", "share", *(f"{name} ms" for name in PERCENTILES))]
        for name, count in self.counts.items():
            latencies = (f"{value:.1f}" for value in self.latency_ms(name).values())
            rows.append((name, f"{count:,}", f"{count / len(self.outcomes):.1%}", *latencies))
        return rows

    def _html(self, plot: bytes) -> str:
        header, *rows = [[escape(cell) for cell in row] for row in self._rows()]
        lines = [f"<tr><td>{'<td>'.join(row)}" for row in rows]
        notes = [f"<p class=bad>{escape(note)}" for note in (*self.problems, *self.warnings)]
        return PAGE.format(
            url=escape(self.load.url),
            began=f"{self.began:%Y-%m-%d %H:%M:%S %Z}",
            summary=escape(self._summary()),
            objective="" if self.p99_ms is None else f"<p>objective: p99 within {self.p99_ms:g} ms",
            notes="\n".join(notes) or "<p>passed",
            header=f"<tr><th>{'<th>'.join(header)}",
            rows="\n".join(lines),
            plot=b64encode(plot).decode(),
        )


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Load test of {url}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
td, th {{ padding: 0.2rem 0.8rem; text-align: right; border-bottom: 1px solid #ddd }}
td:first-child, th:first-child {{ text-align: left }}
img {{ max-width: 100% }}
.bad {{ color: #a33b00 }}
</style>
<h1>Load test of {url}</h1>
<p>{began}
<p>{summary}
{objective}
{notes}
<table>
{header}
{rows}
</table>
<p><img alt="answers per second over time" src="data:image/png;base64,{plot}">
</html>
"""


def plot_goodput(report: Report, ax: Axes | None = None) -> Axes:
    """Draw answers per second against time: the good ones, those told to come again, and failures."""
    if ax is None:
        ax = plots.new_axes((8, 4))
    edges, rates = report.timeline()
    for kind, color, label in zip(KINDS, (BLUE, ORANGE, VERMILION), KIND_LABELS, strict=True):
        if kind == "ok" or rates[kind].any():
            ax.stairs(rates[kind], edges, color=color, label=label, linewidth=1.5)
    if report.load.rate is not None:
        ax.hlines(
            report.load.rate, 0, report.seconds, color="0.5", linestyle="--", linewidth=1, label="offered"
        )
    ax.set(xlabel="seconds", ylabel="requests per second", xlim=(0, edges[-1]))
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)
    return ax


def load_test(load: Load, *, p99_ms: float | None = None, temp: Path | None = None) -> Report:
    """Send a load and report what became of it. Ctrl-C ends it early.

    Args:
        load: what to send.
        p99_ms: the objective.
        temp: a folder for what is noted of each request meanwhile. Default: the system's.

    Raises:
        MissingExtraError: Locust is not installed.
        ServiceError: a request before the load found no scoring service, or one that is not for us.
    """
    if find_spec("locust") is None:
        raise MissingExtraError("locust", "a load test", "pip install 'jaxcls[loadtest]'")
    began, is_interrupted = datetime.now().astimezone(), False
    with tempfile.TemporaryFile(dir=temp) as lines:
        # A process group of its own: Ctrl-C on a terminal reaches this process alone, which closes the input.
        with subprocess.Popen(
            [sys.executable, "-m", "jaxcls.serving.load_generator"],
            stdin=subprocess.PIPE,
            stdout=lines,
            process_group=0,
        ) as generator:
            assert generator.stdin is not None
            try:
                generator.stdin.write(json.dumps(asdict(load)).encode() + b"\n")
                generator.stdin.flush()
                generator.wait()
            except KeyboardInterrupt:
                is_interrupted = True
            except BrokenPipeError:
                pass  # it has failed, and said why
        if generator.returncode:
            raise JaxclsError(f"the load generator has failed with exit code {generator.returncode}")
        lines.seek(0)
        *requests, end = map(json.loads, lines)
    if "error" in end:
        raise ServiceError(f"{load.url}: {end['error']}")
    outcomes, intended, started, finished = zip(*requests, strict=True) if requests else ((),) * 4
    return Report(
        load=load,
        began=began,
        outcomes=np.array(outcomes, np.str_),
        intended=np.array(intended, np.float64),
        started=np.array(started, np.float64),
        finished=np.array(finished, np.float64),
        cpu_share=end["cpu_share"],
        is_interrupted=is_interrupted,
        p99_ms=p99_ms,
    )


def choose_images(folder: Path) -> tuple[str, ...]:
    """The paths of a folder's images, as many as fit into the generator's memory.

    Raises:
        ImageError: one of them cannot be read.
        UsageError: there is none.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder: give one of images")
    chosen: list[str] = []
    num_bytes = 0
    for image in list_images(folder).images:
        num_bytes += len(read_bytes(folder / image))
        if num_bytes > MAX_IMAGE_BYTES and chosen:
            break
        chosen.append(str(folder / image))
    if not chosen:
        raise UsageError(f"{folder} holds no images")
    return tuple(chosen)


def _kind(outcome: str) -> str:
    if outcome == OK:
        return "ok"
    return "busy" if outcome in BUSY else "failed"


def _percentiles(seconds: NDArray[np.float64]) -> dict[str, float]:
    # The nearest rank: a time that was measured, which so many did not exceed.
    values = np.percentile(1000 * seconds, list(PERCENTILES.values()), method="inverted_cdf")
    return dict(zip(PERCENTILES, values.tolist(), strict=True))

"""One run of one or more benchmarks: its settings, its machine, its result file."""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Self

from benchmarks.machine import floor
from benchmarks.peers import DEFAULTS, FIRST_DEPTH, MODULES, framework_of
from benchmarks.results import FOLDER, Results
from benchmarks.timing import SubjectError, Timing, interleave
from benchmarks.worker import TIMEOUT_SECONDS, Task, Worker, ask
from experiments.recording import command, spread

TINY: Mapping[str, Any] = {
    "depth": (18,),
    "batch_size": 4,
    "image_size": 32,
    "rounds": 2,
    "round_seconds": 0.05,
}
DEPTHS = {"cpu": (18, 50), "gpu": (18, 34, 50, 101, 152)}
BATCH_SIZES = {"cpu": 16, "gpu": 256}
SETUP_SHARE = 0.85


@dataclass(frozen=True)
class Settings:
    """The command line. None: what suits the benchmark and the machine.

    Attributes:
        peer: subjects to measure.
        depth: of the ResNets.
        batch_size: images per step.
        image_size: of the networks' input, in pixels.
        rounds: of each subject.
        round_seconds: that a round should last.
        tiny: ResNet-18 at 32 px and a few steps: to try that everything runs; the figures say nothing.
        out: folder of the result files.
    """

    peer: tuple[str, ...] | None = None
    depth: tuple[int, ...] | None = None
    batch_size: int | None = None
    image_size: int = 224
    rounds: int = 5
    round_seconds: float = 1.0
    tiny: bool = False
    out: Path = FOLDER

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Self:
        """From parsed arguments."""
        known: dict[str, Any] = dict(TINY) if arguments.tiny else {}
        for name, value in vars(arguments).items():
            if value is not None and name in cls.__match_args__:
                known[name] = tuple(value) if isinstance(value, list) else value
        return cls(**known)


class Session:
    """Starts subjects, has them timed in turn, and writes their rows.

    Args:
        settings: the command line.
        name: of the result file, which also names the platform.
        seconds: the whole session's time.
    """

    def __init__(self, settings: Settings, name: str, *, seconds: float = math.inf) -> None:
        self.settings = settings
        self._end = time.monotonic() + seconds
        self.machine = _probe("rough_probe" if settings.tiny else "probe")
        self.platform = "cpu" if self.machine["conditions"]["platform"] == "cpu" else "gpu"
        self.results = Results(settings.out / f"{name}_{self.platform}.json", self.machine)

    @property
    def seconds_left(self) -> float:
        """Until the session has to end."""
        return self._end - time.monotonic()

    def at(self, *depths: int) -> "Session":
        """The same session for these depths, unless the command line names others."""
        other = copy(self)
        if self.settings.depth is None:
            other.settings = replace(self.settings, depth=depths)
        return other

    @property
    def depths(self) -> tuple[int, ...]:
        """Those asked for, or the default ones."""
        return self.settings.depth or DEPTHS[self.platform]

    def subjects(self, work: str) -> tuple[str, ...]:
        """Those asked for, or the default ones."""
        return self.settings.peer or DEFAULTS[work][self.platform]

    def peers(self, work: str) -> list[list[Task]]:
        """For each depth, a task for each subject asked for, or by default."""
        groups = self.tasks(work, self.subjects(work))
        if self.settings.peer is None:
            more = FIRST_DEPTH.get((work, self.platform), ())
            groups[0] += [self.task(work, subject, depth=self.depths[0]) for subject in more]
        return groups

    def tasks(self, work: str, subjects: Iterable[str], **values: Any) -> list[list[Task]]:
        """For each depth, a task for each subject."""
        return [
            [self.task(work, subject, depth=depth, **values) for subject in subjects] for depth in self.depths
        ]

    def task(self, work: str, subject: str, **values: Any) -> Task:
        """A task at this session's sizes."""
        batch_size = self.settings.batch_size or BATCH_SIZES[self.platform]
        return Task(
            work, subject, **{"batch_size": batch_size, "image_size": self.settings.image_size} | values
        )

    def compare(
        self,
        benchmark: str,
        tasks: Sequence[Task],
        *,
        seconds: float = math.inf,
        round_seconds: float | None = None,
    ) -> None:
        """Time the tasks in turn, each in a process of its own; a row for each, written after every round.

        Args:
            benchmark: the rows' name.
            tasks: one that cannot be set up gets a row that says why.
            seconds: for all of it; most of them for setting up.
            round_seconds: another length of a round than the settings say.
        """
        setup_end = time.monotonic() + SETUP_SHARE * min(self.seconds_left, seconds)
        with ExitStack() as stack:
            workers: dict[Task, Worker] = {}
            for task in tasks:
                left = min(setup_end - time.monotonic(), TIMEOUT_SECONDS)
                try:
                    workers[task] = stack.enter_context(Worker(task, timeout_seconds=left))
                except SubjectError as error:
                    self.put(benchmark, task, {"note": str(error)})
            costs = [worker.details for worker in workers.values() if worker.details.get("flops")]

            def write(timings: Mapping[Task, Timing]) -> None:
                for task, timing in timings.items():
                    details = {"setup_seconds": workers[task].setup_seconds, **workers[task].details}
                    self.results.put(row_of(benchmark, task, self._values(timing, details, costs)))

            timings = interleave(
                workers,
                rounds=self.settings.rounds,
                round_seconds=self.settings.round_seconds
                if round_seconds is None or self.settings.tiny
                else round_seconds,
                after_round=write,
            )
        for task in timings:
            print(_line(self.results.find(benchmark=benchmark, **asdict(task))[0]), flush=True)

    def ask(
        self,
        benchmark: str,
        task: Task,
        *,
        environment: Mapping[str, str] | None = None,
        keep: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> dict[str, Any] | None:
        """The answer to a task that is one question; None where there is none, and a row that says why.

        Args:
            benchmark: the row's name.
            task: the question.
            environment: variables of its process.
            keep: the answer -> what goes into the row.
        """
        try:
            answer = ask(
                task, environment=environment, timeout_seconds=min(self.seconds_left, TIMEOUT_SECONDS)
            )
        except SubjectError as error:
            self.put(benchmark, task, {"note": str(error)})
            return None
        self.put(benchmark, task, keep(answer))
        return answer

    def put(self, benchmark: str, task: Task, values: Mapping[str, Any]) -> None:
        """Write a row, and print it."""
        row = row_of(benchmark, task, values)
        self.results.put(row)
        print(_line(row), flush=True)

    def _values(
        self, timing: Timing, details: Mapping[str, Any], costs: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        values: dict[str, Any] = {**details, "process": "its own, timed in turn"}
        if timing.error is not None:
            values["note"] = timing.error
        if not timing.seconds:
            return values
        rates = timing.rates(details["images_per_step"])
        values |= {
            "images_per_second": spread(rates),
            "rounds": rates,
            "steps_per_round": timing.num_steps,
            "num_steps_counted": timing.num_steps * len(rates),
        }
        if num_cores := details.get("num_cores"):
            values["images_per_second_per_core"] = values["images_per_second"]["median"] / num_cores
        # Where XLA knows no cost, as for torch, the floor is that of the first subject with one.
        if costs and "dtype" in details and details["dtype"] != "uint8":
            cost = {**(details if details.get("flops") else costs[0]), "dtype": details["dtype"]}
            step_seconds = details["images_per_step"] / values["images_per_second"]["median"]
            values["floor"] = floor(cost, step_seconds, self.machine)
        return values


@cache
def _probe(work: str) -> dict[str, Any]:
    """The machine's conditions and rates, measured once a process."""
    machine = ask(Task(work, "machine"))
    machine["conditions"]["command"] = command()
    return machine


def row_of(benchmark: str, task: Task, values: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a result file."""
    return {"benchmark": benchmark, **asdict(task), **values}


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the arguments of `Settings` besides the parser's own."""
    parser.add_argument("--peer", nargs="+", metavar="NAME", help="subjects; default: those that suit")
    parser.add_argument("--depth", nargs="+", type=int, choices=DEPTHS["gpu"])
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=Path, help="a folder; default: benchmarks/results")
    parser.add_argument("--tiny", action="store_true", help="ResNet-18 at 32 px: does everything run?")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.peer or () if framework_of(name) not in MODULES]:
        parser.error(f"no subject {', '.join(unknown)}; names start with {', '.join(MODULES)}")
    return arguments


def main(name: str, run: Callable[["Session"], None], description: str | None) -> None:
    """Run one benchmark from the command line."""
    arguments = parse(argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description))
    session = Session(Settings.of(arguments), name)
    run(session)
    print(f"written to {session.results.path}", file=sys.stderr)


def _line(row: Mapping[str, Any]) -> str:
    """A row as a line for people."""
    sizes = [f"resnet{row['depth']}"] * bool(row["depth"]) + [f"{row['photo_side']} px"] * bool(
        row["photo_side"]
    )
    if row["features"]:
        sizes.append(f"{row['features']} {row['batch_size']} x {row['num_features']} x {row['num_classes']}")
    parts = [row["benchmark"], row["work"], row["subject"], *sizes]
    if rates := row.get("images_per_second"):
        parts.append(
            f"{rates['median']:.4g} images/s ({rates['min']:.4g} to {rates['max']:.4g}, n={rates['n']})"
        )
    if "images_per_second_per_core" in row:
        parts.append(f"{row['images_per_second_per_core']:.4g} a core")
    if "floor" in row:
        parts.append(f"MFU {row['floor']['mfu']:.0%}, bandwidth {row['floor']['bandwidth_share']:.0%}")
    for name in ("seconds", "compile_seconds", "note", "cache", "relative_difference"):
        if name in row:
            value = row[name]
            parts.append(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}")
    return "  ".join(parts)

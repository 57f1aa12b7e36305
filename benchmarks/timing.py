"""Timing: warm up, then all subjects in turn, round after round, and count the steps that were done."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

Name = TypeVar("Name", bound=Hashable)
MAX_STEPS = 500
MAX_WARM_UP_STEPS = 10


class SubjectError(Exception):
    """A subject that cannot be measured, or did not do what was timed; the message goes into its row."""


class Program(ABC):
    """What is timed: it runs steps, and says from its own results how many it has done.

    Attributes:
        images_per_step: how many images a step works through.
        details: what its row holds besides the times.
    """

    images_per_step: int
    details: Mapping[str, Any]

    @abstractmethod
    def run(self, num_steps: int) -> None:
        """Run the steps, and wait until their results are there."""

    @abstractmethod
    def num_executed(self) -> int:
        """Steps done so far, read off results that only these steps can have made."""

    def time(self, num_steps: int, clock: Callable[[], float] = time.perf_counter) -> float:
        """Seconds of `num_steps` steps.

        Raises:
            SubjectError: another number of steps was done.
        """
        before = self.num_executed()
        start = clock()
        self.run(num_steps)
        seconds = clock() - start
        if (executed := self.num_executed() - before) != num_steps:
            raise SubjectError(f"{executed} steps were done where {num_steps} were timed")
        return seconds


class Subject(Protocol):
    """Whatever `interleave` can time: a `Program`, or one in another process."""

    def time(self, num_steps: int) -> float:
        """Seconds of `num_steps` steps."""


@dataclass(frozen=True)
class Timing:
    """The rounds of one subject.

    Attributes:
        num_steps: of each round.
        seconds: of each round.
        error: why there are no more rounds, or None.
    """

    num_steps: int = 0
    seconds: tuple[float, ...] = ()
    error: str | None = None

    def rates(self, images_per_step: int) -> list[float]:
        """Images per second of each round."""
        return [images_per_step * self.num_steps / seconds for seconds in self.seconds]


def interleave(
    subjects: Mapping[Name, Subject],
    *,
    rounds: int,
    round_seconds: float,
    after_round: Callable[[Mapping[Name, Timing]], None],
) -> dict[Name, Timing]:
    """Time A, B, A, B, ...: what slows the machine for a while slows all of them.

    Args:
        subjects: by name. One that fails is left out of later rounds.
        rounds: of each subject.
        round_seconds: how long a round should last; it holds at least one step.
        after_round: hears of the times so far, so that they can be written.
    """
    timings = {
        name: _guarded(partial(_calibrate, subject, round_seconds), Timing())
        for name, subject in subjects.items()
    }
    for _ in range(rounds):
        for name, subject in subjects.items():
            timings[name] = _guarded(partial(_one_round, subject), timings[name])
        after_round(timings)
    return timings


def _guarded(measure: Callable[[Timing], Timing], timing: Timing) -> Timing:
    """What `measure` makes of a timing; an error ends it."""
    if timing.error is not None:
        return timing
    try:
        return measure(timing)
    except SubjectError as error:
        return replace(timing, error=str(error))


def _calibrate(subject: Subject, round_seconds: float, timing: Timing) -> Timing:
    """Warm up, and choose the steps of a round by the last of the warm-ups."""
    num_steps = 1
    for most in (MAX_WARM_UP_STEPS, MAX_STEPS):
        step_seconds = max(subject.time(num_steps) / num_steps, 1e-9)
        num_steps = max(1, min(most, round(round_seconds / step_seconds)))
    return replace(timing, num_steps=num_steps)


def _one_round(subject: Subject, timing: Timing) -> Timing:
    return replace(timing, seconds=(*timing.seconds, subject.time(timing.num_steps)))

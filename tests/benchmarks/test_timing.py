"""Rounds in turn, medians, and the refusal of subjects that skip their work."""

from collections import Counter

import pytest

from benchmarks.timing import MAX_WARM_UP_STEPS, Program, SubjectError, Timing, interleave


class Clock:
    """A clock that only subjects move."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Steps(Program):
    """Takes `cost` seconds a step, and does `share` of the steps that it is asked for."""

    images_per_step = 10

    def __init__(self, clock, cost, share=1.0):
        self.clock, self.cost, self.share, self.done = clock, cost, share, 0

    def run(self, num_steps):
        self.clock.now += self.cost * num_steps
        self.done += int(self.share * num_steps)

    def num_executed(self):
        return self.done


class Named:
    """A subject that notes its turns; `seconds` says what each step takes, turn by turn."""

    def __init__(self, name, log, seconds, fails_at=None):
        self.name, self.log, self.seconds, self.fails_at = name, log, list(seconds), fails_at

    def time(self, num_steps):
        self.log.append((self.name, num_steps))
        turn = Counter(name for name, _ in self.log)[self.name]
        if turn == self.fails_at:
            raise SubjectError("out of memory")
        return num_steps * self.seconds[min(turn, len(self.seconds)) - 1]


def test_time_is_that_of_the_steps():
    clock = Clock()
    program = Steps(clock, cost=0.25)
    assert program.time(8, clock) == 2.0
    assert program.time(4, clock) == 1.0


@pytest.mark.parametrize("share", [0.0, 0.5, 2.0])
def test_another_number_of_steps_is_refused(share):
    clock = Clock()
    with pytest.raises(SubjectError, match="where 8 were timed"):
        Steps(clock, cost=1.0, share=share).time(8, clock)


def test_subjects_take_turns():
    log = []
    subjects = {"a": Named("a", log, [9, 0.5]), "b": Named("b", log, [9, 2.0])}
    written = []
    timings = interleave(subjects, rounds=3, round_seconds=4.0, after_round=lambda so_far: written.append(
        [len(timing.seconds) for timing in so_far.values()]
    ))  # fmt: skip
    assert log[:4] == [("a", 1), ("a", 1), ("b", 1), ("b", 1)]
    # The second, warm step decides how many make 4 s.
    assert log[4:] == [("a", 8), ("b", 2)] * 3
    assert written == [[1, 1], [2, 2], [3, 3]]
    assert timings["a"] == Timing(8, (4.0, 4.0, 4.0))
    assert timings["b"].rates(images_per_step=10) == [5.0, 5.0, 5.0]


def test_quick_steps_are_warmed_up_by_several():
    log = []
    interleave({"a": Named("a", log, [0.0, 0.1])}, rounds=1, round_seconds=4.0, after_round=lambda _: None)
    assert log == [("a", 1), ("a", MAX_WARM_UP_STEPS), ("a", 40)]


def test_a_slow_step_is_a_round_by_itself():
    timings = interleave(
        {"a": Named("a", [], [100.0])}, rounds=2, round_seconds=1.0, after_round=lambda _: None
    )
    assert timings["a"] == Timing(1, (100.0, 100.0))


@pytest.mark.parametrize(("fails_at", "num_rounds"), [(1, 0), (4, 1)])
def test_a_subject_that_fails_leaves_the_others_alone(fails_at, num_rounds):
    log = []
    subjects = {"a": Named("a", log, [1.0], fails_at), "b": Named("b", log, [1.0])}
    timings = interleave(subjects, rounds=3, round_seconds=1.0, after_round=lambda _: None)
    assert timings["a"].error == "out of memory"
    assert len(timings["a"].seconds) == num_rounds
    assert len(timings["b"].seconds) == 3
    assert [name for name, _ in log].count("a") == fails_at

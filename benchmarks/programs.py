"""What all frameworks are given, and how scoring is counted. No framework here: each loads its own alone."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.timing import Program, SubjectError

NUM_INPUTS = 2
NUM_CLASSES = 1000
# Two runs of one compiled program on one input; autotuned libraries may add in another order.
SAME = 1e-2
# The environment's variable with the path of a classifier that was saved before the clock runs.
SAVED_CLASSIFIER = "JAXCLS_BENCHMARK_CLASSIFIER"


def random_images(batch_size: int, image_size: int, number: int) -> np.ndarray:
    """uint8 [B, size, size, 3]: coarse squares under noise, so that no two look alike to a network."""
    generator = np.random.default_rng(number)
    squares = generator.integers(0, 256, (batch_size, 4, 4, 3), np.uint8) // 2
    side = -(-image_size // 4)
    images = squares.repeat(side, axis=1).repeat(side, axis=2)[:, :image_size, :image_size]
    return images + generator.integers(0, 128, images.shape, np.uint8)


def random_labels(batch_size: int, number: int) -> np.ndarray:
    """int32 [B]."""
    return np.random.default_rng(number).integers(0, NUM_CLASSES, batch_size, np.int32)


class Scoring(Program):
    """Calls `score(input)`, whose every result must be the one that belongs to its input.

    Args:
        score: starts a call; its result is an array, there or under way.
        inputs: taken in turn; their results must differ.
        finish: waits for a list of results.
        to_host: a result as NumPy float32.
        images_per_step: B.
        details: for the row.
    """

    def __init__(
        self,
        score: Callable[[Any], Any],
        inputs: Sequence[Any],
        *,
        finish: Callable[[list[Any]], None],
        to_host: Callable[[Any], np.ndarray],
        images_per_step: int,
        details: dict[str, Any],
    ) -> None:
        self._score, self._inputs, self._finish, self._to_host = score, inputs, finish, to_host
        self.images_per_step, self.details = images_per_step, details
        self._expected = [to_host(score(item)) for item in inputs]
        self._results: list[Any] = []
        self._num_executed = 0
        scale = max(float(np.abs(value).max()) for value in self._expected)
        self._tolerance = SAME * scale
        if not np.isfinite(scale) or self._same(self._expected[0], self._expected[-1]):
            raise SubjectError("two inputs give the same scores, or scores that are not finite")

    def run(self, num_steps: int) -> None:
        """Start the calls one after another, and wait for all results."""
        results = [self._score(self._inputs[n % len(self._inputs)]) for n in range(num_steps)]
        self._finish(results)
        self._results = results

    def num_executed(self) -> int:
        """The number of results that are right."""
        for number, result in enumerate(self._results):
            expected = self._expected[number % len(self._expected)]
            self._num_executed += self._same(self._to_host(result), expected)
        self._results = []
        return self._num_executed

    def _same(self, result: np.ndarray, expected: np.ndarray) -> bool:
        return bool(np.abs(result - expected).max() <= self._tolerance)

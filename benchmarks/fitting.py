"""Linear SVMs on made features, and how fits are counted: by the objective that each of them has reached."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from benchmarks.timing import Program
from benchmarks.worker import Task

C = 0.01
DISTANCE = 3.4
"""Of a class's mean from the origin; the noise around it has a standard deviation of 1 in each direction."""
BLOCK_SIZE = 8192
MAX_CHECKED = 10
"""Classes whose objective is checked; of more, some from all over."""
SAME = 1e-3
"""Two fits of one machine to the same samples, the classes named in another order."""


def make_features(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [N, D], rectified noise around the mean of each class, and labels int [N].

    Correlated ones are mixed before they are rectified; their variances fall as 1, 1/2, 1/3, ..., as those of
    a network's features do.
    """
    mixing = _mixing(task.num_features) if task.features == "correlated" else None
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.arange(task.batch_size) % task.num_classes)
    means = generator.standard_normal((task.num_classes, task.num_features), np.float32)
    means *= DISTANCE / np.sqrt(task.num_features)
    features = np.empty((task.batch_size, task.num_features), np.float32)
    for rows in _blocks(task.batch_size):
        block = means[labels[rows]]
        block += generator.standard_normal(block.shape, np.float32)
        np.maximum(block if mixing is None else block @ mixing, 0, out=features[rows])
    return features, labels


def _mixing(num_features: int) -> np.ndarray:
    generator = np.random.default_rng(1)
    rotation, _ = np.linalg.qr(generator.standard_normal((num_features, num_features)))
    variances = 1 / np.arange(1.0, num_features + 1)
    return (np.sqrt(variances / variances.mean())[:, None] * rotation).astype(np.float32)


def _blocks(num_samples: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK_SIZE) for start in range(0, num_samples, BLOCK_SIZE))


def objectives(
    weights: np.ndarray, features: np.ndarray, labels: np.ndarray, classes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """liblinear's objective of classes against the rest, and by how much each may exceed its minimum.

    Args:
        weights: float64 [k, D + 1], the intercepts last.
        features: float [N, D].
        labels: int [N].
        classes: int [k].

    Returns:
        float64 [k] and float64 [k].
    """
    objective, gradient = 0.5 * (weights**2).sum(1), weights.copy()
    for rows in _blocks(len(features)):
        block = np.pad(features[rows].astype(float), ((0, 0), (0, 1)), constant_values=1)
        signs = np.where(labels[rows] == classes[:, None], 1, -1)
        slack = np.maximum(1 - signs * (weights @ block.T), 0)
        objective += C * (slack**2).sum(1)
        gradient -= 2 * C * (signs * slack) @ block
    return objective, 0.5 * (gradient**2).sum(1)


class Fitting(Program):
    """Fits to the same features; from fit to fit the classes' names move on, so that old results are wrong.

    Args:
        make: gives a machine with scikit-learn's interface.
        features: float [N, D].
        labels: int [N], from 0 to K - 1.
        share: of the fit that is asked for, which this one is.
        describe: fitted machine -> what its row holds besides.

    Attributes:
        images_per_step: N times the share.
        details: of the first fit.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        features: np.ndarray,
        labels: np.ndarray,
        *,
        share: float = 1.0,
        describe: Callable[[Any], dict[str, Any]],
    ) -> None:
        self._make, self._features, self._labels = make, features, labels
        self._num_classes = int(labels.max()) + 1
        self._shift = 0
        self._machines: list[tuple[int, Any]] = []
        self._num_executed = 0
        self.images_per_step = round(share * len(features))
        self.run(1)
        (first,) = self._machines
        self._expected, gap = self._objectives(*first)
        self.details = {
            "C": C,
            "objective": self._expected.tolist(),
            "gap_at_most": float((gap / self._expected).max()),
            **describe(first[1]),
        }

    def run(self, num_steps: int) -> None:
        """Fit; one that does not converge is an error."""
        self._machines = []
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            for _ in range(num_steps):
                self._shift += 1
                names = (self._labels + self._shift) % self._num_classes
                self._machines.append((self._shift, self._make().fit(self._features, names)))

    def num_executed(self) -> int:
        """The fits whose objective is that of the first one."""
        for shift, machine in self._machines:
            found, _ = self._objectives(shift, machine)
            self._num_executed += bool((np.abs(found - self._expected) <= SAME * self._expected).all())
        self._machines = []
        return self._num_executed

    def _objectives(self, shift: int, machine: Any) -> tuple[np.ndarray, np.ndarray]:
        weights = np.column_stack([machine.coef_, machine.intercept_]).astype(float)
        classes = np.linspace(0, self._num_classes - 1, min(len(weights), MAX_CHECKED)).astype(int)
        if self._num_classes == 2:
            weights = np.vstack([-weights, weights])
        weights = weights[(classes + shift) % self._num_classes]
        return objectives(weights, self._features, self._labels, classes)

"""Curves over thresholds: of the images of a class, and of the others, how many score at least so much."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Order(NamedTuple):
    """N images in the order of their scores, highest first.

    Attributes:
        places: int64 [N]: positions of the images.
        is_positive: bool [N], in this order: whether an image is of the class that is scored.
        starts: int64 [T]: where each of the T distinct scores begins.
        thresholds: float32 [T]: the distinct scores.
    """

    places: NDArray[np.int64]
    is_positive: NDArray[np.bool_]
    starts: NDArray[np.int64]
    thresholds: NDArray[np.float32]


class RocCurve(NamedTuple):
    """A receiver operating characteristic.

    Attributes:
        false_positive_rate: float64 [T + 1], ascending: of the others, those that score at least a threshold;
            NaN without others.
        true_positive_rate: float64 [T + 1], ascending: the same of the class's own; NaN without any.
        thresholds: float32 [T + 1], descending; the first, infinity, lets nothing pass.
    """

    false_positive_rate: NDArray[np.float64]
    true_positive_rate: NDArray[np.float64]
    thresholds: NDArray[np.float32]

    @property
    def area(self) -> float:
        """The chance that one of the class outscores another image, ties counting half; NaN if undefined."""
        return float(np.trapezoid(self.true_positive_rate, self.false_positive_rate))


class PrCurve(NamedTuple):
    """Precision against recall.

    Attributes:
        precision: float64 [T + 1]: of the images that score at least a threshold, those of the class; 1 where
            there are none.
        recall: float64 [T + 1], ascending: of the class's images, those that do; NaN without any.
        thresholds: float32 [T + 1], descending; the first, infinity, lets nothing pass.
    """

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    thresholds: NDArray[np.float32]

    @property
    def average_precision(self) -> float:
        """The mean of precision over the steps of recall, not interpolated; NaN if undefined."""
        return float((np.diff(self.recall) * self.precision[1:]).sum())


def order_by_score(scores: NDArray[np.float32], is_positive: NDArray[np.bool_]) -> Order:
    """Sort N images, at least one, by score [N]."""
    places = np.argsort(-scores, kind="stable")
    ordered = scores[places]
    starts = np.flatnonzero(np.append(True, ordered[1:] < ordered[:-1]))
    return Order(places, is_positive[places], starts, ordered[starts])


def roc_curve(order: Order, weights: NDArray[np.int64]) -> RocCurve:
    """The curve of images that count `weights` [N] times each."""
    own, others = _count(order, weights)
    return RocCurve(_share(others), _share(own), _with_infinity(order.thresholds))


def pr_curve(order: Order, weights: NDArray[np.int64]) -> PrCurve:
    """The curve of images that count `weights` [N] times each."""
    own, others = _count(order, weights)
    passed = own + others
    precision = np.divide(own, passed, out=np.ones(len(own)), where=passed > 0)
    return PrCurve(precision, _share(own), _with_infinity(order.thresholds))


def _count(order: Order, weights: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """int64 [T + 1] each: images of the class, and others, above each threshold."""
    ordered = weights[order.places]
    sides = (np.where(order.is_positive, ordered, 0), np.where(order.is_positive, 0, ordered))
    own, others = (np.append(0, np.add.reduceat(side, order.starts).cumsum()) for side in sides)
    return own, others


def _share(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    return counts / (counts[-1] or np.nan)


def _with_infinity(thresholds: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.append(np.float32(np.inf), thresholds)

"""How far to trust scores: thresholds below which to abstain, and the calibration error of probabilities."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxcls.errors import UsageError

NEVER = float(np.finfo(np.float32).max)
"""The threshold of a class whose answers are not to be trusted at any score."""
ALWAYS = -NEVER
"""The threshold of a class that has none where others have one."""


def choose_thresholds(
    scores: NDArray[np.float32], labels: np.ndarray, min_precision: float
) -> NDArray[np.float32]:
    """The lowest threshold of each class at which its answers are right often enough.

    Args:
        scores: [N, K], of images that the classifier was not trained on.
        labels: int [N].
        min_precision: in (0, 1]: of the images for which a class scores best and at least its threshold, this
            share at least is of that class.

    Returns:
        float32 [K]; `NEVER` for a class that reaches the precision at no score.

    Raises:
        UsageError: a precision outside (0, 1].
    """
    require_precision(min_precision)
    predicted = scores.argmax(1)
    thresholds = np.full(scores.shape[1], NEVER, np.float32)
    for label in range(scores.shape[1]):
        own = np.flatnonzero(predicted == label)
        own = own[np.argsort(-scores[own, label], kind="stable")]
        values = scores[own, label]
        precision = np.cumsum(labels[own] == label) / np.arange(1, len(own) + 1)
        # Equal scores are above a threshold together or not at all.
        is_last = np.append(values[1:] < values[:-1], True)[: len(own)]
        if (enough := np.flatnonzero((precision >= min_precision) & is_last)).size:
            thresholds[label] = values[enough[-1]]
    return thresholds


def are_below(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """bool [N]: where the best of scores [N, K] lies below its threshold, of [K]."""
    best = np.nan_to_num(scores, nan=-np.inf).argmax(axis=1)
    return scores[np.arange(len(scores)), best] < thresholds[best]


def require_precision(min_precision: float) -> None:
    """Raise UsageError unless it lies in (0, 1]."""
    if not 0 < min_precision <= 1:
        raise UsageError(f"min_precision {min_precision}: must be above 0 and at most 1")


class CalibrationBins(NamedTuple):
    """Answers in bins of equal width by the probability of the best class.

    Attributes:
        num_images: int64 [B].
        confidence: float64 [B]: the mean probability; NaN in an empty bin.
        accuracy: float64 [B]: the share of right answers; NaN in an empty bin.
    """

    num_images: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @property
    def error(self) -> float:
        """The expected calibration error, in [0, 1]: |accuracy - confidence|, averaged over the images.

        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
        """
        gaps = np.nan_to_num(np.abs(self.accuracy - self.confidence))
        return float(gaps @ self.num_images / self.num_images.sum())


def calibration_bins(
    probabilities: NDArray[np.float32],
    labels: np.ndarray,
    num_bins: int = 15,
    weights: NDArray[np.int64] | None = None,
) -> CalibrationBins:
    """How often answers were right, next to how probable they were said to be.

    Args:
        probabilities: [N, K].
        labels: int [N].
        num_bins: from 0 to 1.
        weights: [N], how often each image counts; None: once.

    Raises:
        UsageError: fewer than one bin.
    """
    if num_bins < 1:
        raise UsageError(f"num_bins {num_bins}: must be at least 1")
    weights = np.ones(len(labels), np.int64) if weights is None else weights
    best = probabilities.max(1).astype(np.float64)
    is_right = probabilities.argmax(1) == labels
    bins = np.minimum((best * num_bins).astype(int), num_bins - 1)
    num_images, confidence, accuracy = (
        np.bincount(bins, values, minlength=num_bins)
        for values in (weights, weights * best, weights * is_right)
    )
    per_image = np.where(num_images, num_images, np.nan)
    return CalibrationBins(num_images.astype(np.int64), confidence / per_image, accuracy / per_image)


def calibration_error(probabilities: NDArray[np.float32], labels: np.ndarray, num_bins: int = 15) -> float:
    """The expected calibration error of probabilities [N, K], in [0, 1]: see `CalibrationBins`."""
    return calibration_bins(probabilities, labels, num_bins).error

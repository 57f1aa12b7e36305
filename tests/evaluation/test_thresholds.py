"""Thresholds and the calibration error by hand-worked examples."""

import numpy as np
import pytest

from jaxcls.errors import UsageError
from jaxcls.evaluation.thresholds import (
    NEVER,
    are_below,
    calibration_error,
    choose_thresholds,
    require_precision,
)


def scores_of(*pairs):
    """float32 [N, 3] for (class, its score); the others' lie below."""
    scores = np.full((len(pairs), 3), -10, np.float32)
    for row, (label, score) in zip(scores, pairs, strict=True):
        row[label] = score
    return scores


RANKED = scores_of(*((0, score) for score in (0.9, 0.8, 0.7, 0.6, 0.5)))
"""Of the five, the third and the fifth are wrong: precisions 1, 1, 2/3, 3/4, 3/5."""
LABELS = np.array([0, 0, 1, 0, 2])


@pytest.mark.parametrize(
    ("min_precision", "threshold"),
    [(1.0, 0.8), (0.76, 0.8), (0.75, 0.6), (0.7, 0.6), (0.61, 0.6), (0.6, 0.5), (0.01, 0.5)],
)
def test_the_lowest_score_down_to_which_answers_are_right_often_enough(min_precision, threshold):
    """Also below a stretch that is not: at 0.7 precision is 2/3, at 0.6 it is 3/4 again."""
    for order in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1]):
        thresholds = choose_thresholds(RANKED[order], LABELS[order], min_precision)
        assert (thresholds.dtype, thresholds.shape) == (np.float32, (3,))
        assert thresholds[0] == np.float32(threshold)


def test_equal_scores_are_above_a_threshold_together():
    """0.9 right, then four at 0.5 of which two are right: 3 of 5; the first two alone would be 3 of 3."""
    scores = scores_of((0, 0.9), (0, 0.5), (0, 0.5), (0, 0.5), (0, 0.5))
    labels = np.array([0, 0, 0, 1, 1])
    assert choose_thresholds(scores, labels, 0.61)[0] == np.float32(0.9)
    assert choose_thresholds(scores, labels, 0.6)[0] == np.float32(0.5)
    assert choose_thresholds(scores[1:], labels[1:], 0.6)[0] == NEVER


def test_classes_have_thresholds_of_their_own_and_one_without_precision_never_answers():
    """Class 0 is right at 2 and wrong at 1; class 1 always wrong; class 2 is nowhere the best."""
    scores = scores_of((0, 2.0), (0, 1.0), (1, 5.0), (1, 4.0))
    labels = np.array([0, 2, 0, 2])
    thresholds = choose_thresholds(scores, labels, 0.9)
    np.testing.assert_array_equal(thresholds, np.array([2.0, NEVER, NEVER], np.float32))
    assert np.isfinite(thresholds).all()  # JSON has no infinity
    np.testing.assert_array_equal(are_below(scores, thresholds), [False, True, True, True])


def test_the_share_that_is_asked_for_is_reached_and_no_threshold_can_be_lower():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 500)
    scores = (rng.normal(size=(500, 4)) + 1.5 * np.eye(4)[labels]).round(1).astype(np.float32)  # with ties
    predicted = scores.argmax(1)
    for wanted in (0.6, 0.8, 0.95):
        for label, threshold in enumerate(choose_thresholds(scores, labels, wanted)):
            own, is_right = scores[predicted == label, label], labels[predicted == label] == label
            shares = {level: is_right[own >= level].mean() for level in np.unique(own)}
            assert threshold == min(level for level, share in shares.items() if share >= wanted)


@pytest.mark.parametrize("min_precision", [0, -0.1, 1.1, float("nan")])
def test_a_precision_that_cannot_be(min_precision):
    for ask in (require_precision, lambda value: choose_thresholds(RANKED, LABELS, value)):
        with pytest.raises(UsageError, match=f"min_precision {min_precision}: must be above 0 and at most 1"):
            ask(min_precision)


def test_calibration_error_by_hand():
    """Five bins. [0.6, 0.8): 0.62 right, 0.7 wrong, 0.72 wrong: |1 - 2.04| = 1.04 in sums.
    [0.8, 1]: 0.9 right, 1.0 wrong: |1 - 1.9| = 0.9. (1.04 + 0.9) / 5 = 0.388."""
    best = np.array([0.62, 0.7, 0.72, 0.9, 1.0])
    probabilities = np.stack([best, 1 - best], axis=1).astype(np.float32)
    labels = np.array([0, 1, 1, 0, 1])
    assert calibration_error(probabilities, labels, num_bins=5) == pytest.approx(0.388, abs=1e-6)
    # One bin: 2 right of 5 against a sum of 3.94.
    assert calibration_error(probabilities, labels, num_bins=1) == pytest.approx(1.94 / 5, abs=1e-6)


def test_calibration_error_of_the_certain_and_of_the_calibrated():
    certain = np.eye(2, dtype=np.float32)[[0, 0, 1, 1]]
    assert calibration_error(certain, np.array([0, 0, 1, 1])) == 0
    assert calibration_error(certain, np.array([1, 1, 0, 0])) == 1
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(3), 20_000).astype(np.float32)
    labels = (probabilities.cumsum(1) < rng.uniform(size=(20_000, 1))).sum(1)
    assert calibration_error(probabilities, labels) < 0.02
    assert calibration_error(probabilities, (labels + 1) % 3) > 0.2

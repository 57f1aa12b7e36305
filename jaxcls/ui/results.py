"""What a page shows of predictions, as plain values: `static/results.js` reads them."""

import base64
import math
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxcls.errors import UsageError
from jaxcls.evaluation.label_errors import find_label_errors
from jaxcls.evaluation.metrics import Answers, Evaluation, numbers
from jaxcls.predictions import Predictions, lags

MAX_SCORES = 1_500_000
"""Scores of all images and classes, above which only the highest are kept: 6 MB."""

SCORE_NAMES = {"logit": "Probability", "probability": "Probability", "margin": "Margin"}


def describe(
    predictions: Predictions,
    evaluation: Evaluation,
    *,
    title: str,
    model: Path | None = None,
    thresholds: NDArray[np.float32] | None = None,
    max_scores: int = MAX_SCORES,
) -> dict[str, Any]:
    """Everything about N images and K classes but the pictures.

    Args:
        predictions: with labels.
        evaluation: of them.
        title: of the page.
        model: the saved classifier, for the command that stores thresholds; None: show none.
        thresholds: float32 [K], its own.
        max_scores: with more, of each class and each image the highest are kept.
    """
    per_class = evaluation.per_class()
    truths, answers = np.nonzero(evaluation.confusion)
    return {
        "title": title,
        "model": None if model is None else quote(str(model)),
        "scoreName": SCORE_NAMES[predictions.kind],
        "numbers": [
            {"name": name, "value": _plain(value), "low": _plain(low), "high": _plain(high)}
            for name, (value, interval) in numbers(evaluation).items()
            for low, high in [interval or (math.nan, math.nan)]
        ],
        "counts": {
            "answered": evaluation.num_answered,
            "abstained": evaluation.num_abstained,
            "unlabelled": evaluation.num_unlabelled,
            "unreadable": evaluation.num_unreadable,
        },
        "perClass": {name: _plain_list(getattr(per_class, name)) for name in ("precision", "recall", "f1")},
        "support": per_class.support.tolist(),
        "confusion": np.stack([truths, answers, evaluation.confusion[truths, answers]], axis=1).tolist(),
        "lossName": "Behind the best other by" if predictions.kind == "margin" else "Loss",
        "losses": _plain_list(losses(predictions)),
        "normalizers": _normalizers(predictions),
        **describe_scores(predictions, thresholds=thresholds, max_scores=max_scores),
        **_wrong_labels(predictions),
    }


def describe_scores(
    predictions: Predictions,
    *,
    thresholds: NDArray[np.float32] | None = None,
    max_scores: int = MAX_SCORES,
) -> dict[str, Any]:
    """Of N images and K classes what the threshold explorer shows.

    Args:
        predictions, thresholds, max_scores: as in `describe`.
    """
    labels = np.full(len(predictions), -1) if predictions.labels is None else predictions.labels
    # With those abstained from, which a threshold counts.
    labelled = np.bincount(
        labels[(labels >= 0) & ~predictions.unreadable], minlength=len(predictions.classes)
    )
    return {
        "kind": predictions.kind,
        "classes": predictions.classes,
        "labelled": labelled.tolist(),
        "ids": predictions.ids,
        "truth": labels.tolist(),
        "best": predictions.top(1)[:, 0].tolist(),
        "abstained": np.flatnonzero(predictions.abstained).tolist(),
        "errors": {str(index): message for index, message in predictions.errors.items()},
        "thresholds": None if thresholds is None else thresholds.tolist(),
        **_scores(predictions, max_scores),
    }


def losses(predictions: Predictions) -> NDArray[np.float64]:
    """float64 [N]: minus the logarithm of the true class's probability; of margins, how far it lies behind.

    NaN where an image is unlabelled or unreadable, and of margins where no class is left to lie behind.
    """
    labels = np.full(len(predictions), -1) if predictions.labels is None else predictions.labels
    chosen = np.flatnonzero((labels >= 0) & ~predictions.unreadable)
    scores, truth = predictions.scores[chosen], labels[chosen]
    values = np.full(len(predictions), np.nan)
    if predictions.kind != "margin":
        values[chosen] = Answers(scores, truth, predictions.kind).losses
    elif len(predictions.classes) > 1:
        values[chosen] = lags(scores, truth)
    return values


def _normalizers(predictions: Predictions) -> list[float | None] | None:
    """The logarithm that, subtracted from logits, leaves those of probabilities."""
    if predictions.kind != "logit":
        return None
    scores = predictions.scores.astype(np.float64)
    highest = scores.max(axis=1)
    return _plain_list(highest + np.log(np.exp(scores - highest[:, None]).sum(axis=1)), digits=6)


def _scores(predictions: Predictions, max_scores: int) -> dict[str, Any]:
    scores = predictions.scores
    N, K = scores.shape
    if scores.size <= max_scores:
        return {"scores": {"dense": _encode(scores)}, "floors": None}
    # A quarter for the best images of each class, a quarter for the best classes of each image: a score that
    # is kept apart takes its place too.
    known = np.nan_to_num(scores, nan=-np.inf)
    per_class = _next_highest(known, max(1, max_scores // 4 // K), axis=0)
    per_image = _next_highest(known, max(1, max_scores // 4 // N), axis=1)
    kept = (known > per_class[None]) | (known > per_image[:, None])
    rows = np.flatnonzero(~predictions.unreadable)
    kept[rows, scores[rows].argmax(axis=1)] = True
    if predictions.labels is not None:
        labelled = rows[predictions.labels[rows] >= 0]
        kept[labelled, predictions.labels[labelled]] = True
    # The highest that is not kept, and not `per_class`: where many images share the top score of a class,
    # none exceeds that, yet each may be kept as the best of its image.
    floors = np.where(kept, -np.inf, known).max(axis=0)
    places = np.flatnonzero(kept).astype(np.uint32)
    values = scores.ravel()[places]
    return {
        "scores": {"places": _encode(places), "values": _encode(values)},
        "floors": [None if np.isneginf(floor) else float(floor) for floor in floors],
    }


def _next_highest(scores: NDArray[np.float32], count: int, axis: int) -> NDArray[np.float32]:
    """Along an axis, the score that `count` others at most exceed; minus infinity if there are no more."""
    size = scores.shape[axis]
    if count >= size:
        return np.full(scores.shape[1 - axis], -np.inf, np.float32)
    place = size - 1 - count
    return np.partition(scores, place, axis=axis).take(place, axis=axis)


def _wrong_labels(predictions: Predictions) -> dict[str, Any]:
    try:
        found = find_label_errors(predictions)
    except UsageError as error:
        return {"wrongLabels": None, "noWrongLabels": str(error)}
    probabilities = np.full(len(predictions), np.nan)
    probabilities[found.indices] = found.probabilities
    suggested = np.full(len(predictions), -1)
    suggested[found.indices] = found.suggested
    return {"wrongLabels": _plain_list(probabilities), "suggested": suggested.tolist()}


def _encode(array: NDArray[Any]) -> str:
    little_endian = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return base64.b64encode(little_endian.tobytes()).decode()


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _plain_list(values: NDArray[np.float64], digits: int = 4) -> list[float | None]:
    return [None if math.isnan(value) else round(value, digits) for value in values.tolist()]

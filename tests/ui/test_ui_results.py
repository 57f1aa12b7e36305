"""What a page is told, against the predictions it is told of."""

import base64
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from examples import make_photos, make_predictions, unreadable

from jaxcls.evaluation.label_errors import find_label_errors
from jaxcls.evaluation.metrics import evaluate
from jaxcls.predictions import Predictions
from jaxcls.ui.results import describe, losses


def tell(predictions: Predictions, **options) -> dict:
    results = describe(predictions, evaluate(predictions), title="t", model=Path("a b"), **options)
    return json.loads(json.dumps(results, allow_nan=False))


def scores_of(results: dict, num_classes: int) -> np.ndarray:
    """float32 [N, K] as the page decodes them."""
    told = results["scores"]
    if "dense" in told:
        return np.frombuffer(base64.b64decode(told["dense"]), "<f4").reshape(-1, num_classes)
    scores = np.full(len(results["ids"]) * num_classes, np.nan, np.float32)
    places = np.frombuffer(base64.b64decode(told["places"]), "<u4")
    scores[places] = np.frombuffer(base64.b64decode(told["values"]), "<f4")
    return scores.reshape(-1, num_classes)


@pytest.mark.parametrize("kind", ["logit", "probability", "margin"])
def test_scores_answers_and_counts(kind):
    predictions = unreadable(make_predictions(make_photos(30), kind=kind), 4, "cut short")
    predictions = replace(predictions, abstained=np.isin(np.arange(30), [7]))
    results, evaluation = tell(predictions), evaluate(predictions)
    np.testing.assert_array_equal(scores_of(results, 3), predictions.scores)
    assert results["best"][4] == -1
    assert results["best"][7] == predictions.scores[7].argmax()
    assert (results["abstained"], results["errors"]) == ([7], {"4": "cut short"})
    assert results["counts"] == {"answered": 28, "abstained": 1, "unlabelled": 0, "unreadable": 1}
    matrix = np.zeros((3, 3), int)
    for truth, predicted, count in results["confusion"]:
        matrix[truth, predicted] = count
    np.testing.assert_array_equal(matrix, evaluation.confusion_matrix())
    assert results["numbers"][0]["value"] == evaluation.accuracy()
    answered = np.isin(np.arange(30), [4, 7], invert=True)
    np.testing.assert_array_equal(results["support"], np.bincount(predictions.labels[answered]))
    assert sum(results["labelled"]) == 29
    assert results["model"] == "'a b'"


def test_losses_by_hand():
    probabilities = Predictions(
        np.asarray([[0.5, 0.25], [0.9, 0.1], [np.nan, np.nan]], np.float32),
        "probability",
        ("cup", "fork"),
        ("a", "b", "c"),
        np.asarray([1, -1, 0], np.int32),
        np.zeros(3, np.bool_),
        {2: "bad"},
    )
    # Probabilities that do not sum to 1 are divided by their sum.
    np.testing.assert_allclose(losses(probabilities), [np.log(3), np.nan, np.nan])
    np.testing.assert_allclose(losses(replace(probabilities, kind="margin")), [0.25, np.nan, np.nan])


@pytest.mark.parametrize(("kind", "loss"), [("logit", 0), ("probability", 0), ("margin", None)])
def test_one_class_alone_can_be_told(kind, loss):
    results = tell(make_predictions(make_photos(5, ("cup",)), kind=kind))
    assert results["losses"] == [loss] * 5
    assert results["best"] == [0] * 5


def test_normalizers_make_probabilities_of_logits():
    predictions = make_predictions(make_photos(9))
    shown = np.exp(predictions.scores - np.asarray(tell(predictions)["normalizers"])[:, None])
    np.testing.assert_allclose(shown, predictions.probabilities(), rtol=1e-4)
    assert tell(make_predictions(make_photos(9), kind="margin"))["normalizers"] is None


def test_wrong_labels_stand_with_their_images():
    predictions = unreadable(make_predictions(make_photos(40)), 3, "bad")
    labels = predictions.labels.copy()
    labels[10] = (labels[10] + 1) % 3
    predictions = replace(predictions, labels=labels)
    results, found = tell(predictions), find_label_errors(predictions)
    assert results["wrongLabels"][3] is None
    for index, probability, suggested in zip(
        found.indices, found.probabilities, found.suggested, strict=True
    ):
        assert results["wrongLabels"][index] == pytest.approx(probability, abs=1e-4)
        assert results["suggested"][index] == suggested


def test_where_no_label_can_be_judged_the_reason_is_told():
    photos = replace(make_photos(4), labels=np.zeros(4, np.int32))
    results = tell(make_predictions(photos))
    assert results["wrongLabels"] is None
    assert "fewer than two classes" in results["noWrongLabels"]


def test_of_many_scores_the_highest_of_each_class_are_whole():
    photos = make_photos(160, tuple(f"class {k}" for k in range(8)))
    predictions = unreadable(make_predictions(photos), 5, "bad")
    results = tell(predictions, max_scores=640)
    told, scores = scores_of(results, 8), predictions.scores
    known = ~np.isnan(told)
    np.testing.assert_array_equal(told[known], scores[known])
    assert known.sum() <= 640 / 2 + 2 * 160
    for k, floor in enumerate(results["floors"]):
        above = scores[:, k] > floor
        assert above.sum() >= 640 / 4 / 8
        assert known[above, k].all()
    readable = np.flatnonzero(~predictions.unreadable)
    assert known[readable, predictions.labels[readable]].all()
    assert known[readable, scores[readable].argmax(axis=1)].all()
    assert not known[5].any()


def test_a_top_score_that_many_images_share_is_whole():
    photos = make_photos(120)
    scores = np.random.default_rng(0).uniform(0, 0.4, (120, 3)).astype(np.float32)
    scores[np.arange(120), photos.labels] = 1
    predictions = replace(make_predictions(photos, kind="probability"), scores=scores)
    results = tell(predictions, max_scores=120)
    told = scores_of(results, 3)
    for k, floor in enumerate(results["floors"]):
        above = scores[:, k] > floor
        assert above.sum() >= 40
        np.testing.assert_array_equal(told[above, k], scores[above, k])


def test_equal_scores_do_not_break_the_bound():
    photos = make_photos(120, tuple(f"class {k}" for k in range(5)))
    predictions = replace(make_predictions(photos), scores=np.zeros((120, 5), np.float32))
    told = scores_of(tell(predictions, max_scores=100), 5)
    assert (~np.isnan(told)).sum() <= 100 / 2 + 2 * 120

"""Label errors against likelihoods worked by hand, and planted ones in real photos."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from jaxcls.errors import UsageError
from jaxcls.evaluation import label_errors
from jaxcls.evaluation.label_errors import find_label_errors
from jaxcls.evaluation.neighbours import score_by_neighbours
from jaxcls.predictions import Predictions

NAN = float("nan")


def make_predictions(scores, labels, kind="probability") -> Predictions:
    scores = np.asarray(scores, np.float32)
    N, K = scores.shape
    return Predictions(
        scores=scores,
        kind=kind,
        classes=("cup", "fork", "plate", "bowl")[:K],
        ids=tuple(f"{i}.jpg" for i in range(N)),
        labels=np.asarray(labels, np.int32),
        abstained=np.zeros(N, np.bool_),
    )


def saturated() -> Predictions:
    """Of 100 images with p = 3/4 for a class 70 have it as label, of 100 with p = 9/10 82.

    That is (1 - noise) p + noise / 2 with noise = 1/5, so this noise and p as it is are the likeliest.
    """
    counts = {(0.75, 0): 70, (0.75, 1): 30, (0.9, 0): 82, (0.9, 1): 18}
    scores, labels = [], []
    for (p, disagrees), count in counts.items():
        for i in range(count):
            scores.append([p, 1 - p] if i % 2 else [1 - p, p])
            labels.append((1 - i % 2) ^ disagrees)
    return make_predictions(scores, labels)


def change_labels(labels, num_classes: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels of which so many were changed to another class; and which."""
    generator = np.random.default_rng([seed, count])
    wrong = np.zeros(len(labels), np.bool_)
    wrong[generator.choice(len(labels), count, replace=False)] = True
    shift = np.where(wrong, generator.integers(1, num_classes, len(labels)), 0)
    return ((labels + shift) % num_classes).astype(np.int32), wrong


def drawn(num_images: int, num_wrong: int, seed: int) -> tuple[Predictions, np.ndarray]:
    """Logits, three times too large, of three overlapping classes; and where labels were changed."""
    generator = np.random.default_rng(seed)
    logits = 6 * generator.normal(size=(num_images, 3))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (generator.random((num_images, 1)) > p.cumsum(axis=1)).sum(axis=1).clip(max=2)
    labels, wrong = change_labels(labels, 3, num_wrong, seed)
    return make_predictions(3 * logits, labels, "logit"), wrong


@pytest.mark.parametrize("kind", ["probability", "logit", "margin"])
def test_probabilities_worked_by_hand_whatever_the_scale_of_the_scores(kind):
    predictions = saturated()
    if kind != "probability":
        predictions = replace(predictions, scores=5 * np.log(predictions.scores), kind=kind)
    found = find_label_errors(predictions)
    # P(drawn blindly | label) P(another class): 0.1 / (0.8 * 0.1 + 0.1) * 0.9, and so on.
    np.testing.assert_allclose(found.probabilities[:18], 0.5, rtol=0.01)
    np.testing.assert_allclose(found.probabilities[18:48], 0.25, rtol=0.01)
    np.testing.assert_allclose(found.probabilities[48:118], 0.1 / 0.7 * 0.25, rtol=0.01)
    np.testing.assert_allclose(found.probabilities[118:], 0.1 / 0.82 * 0.1, rtol=0.01)
    assert found.num_expected == pytest.approx(20, rel=0.01)
    assert sorted(found.indices[:18]) == list(range(182, 200))
    np.testing.assert_array_equal(found.suggested, 1 - found.labels)


@pytest.mark.parametrize("num_wrong", [0, 60, 300])
def test_the_expected_number_is_that_of_the_changed_labels(num_wrong):
    predictions, wrong = drawn(3000, num_wrong, seed=0)
    found = find_label_errors(predictions)
    assert found.num_expected == pytest.approx(num_wrong, abs=3 + 0.15 * num_wrong)
    for part in (found.probabilities > 0.5, found.probabilities <= 0.5):
        p = found.probabilities[part]
        spread = np.sqrt((p * (1 - p)).sum())
        assert wrong[found.indices[part]].sum() == pytest.approx(p.sum(), abs=3 * spread + 1)
    assert (found.probabilities > 0.5).argmin() == found.num_probable


def test_ranked_by_the_labels_own_probability_with_the_likeliest_other_class():
    predictions, _ = drawn(200, 10, seed=0)
    found = find_label_errors(predictions)
    assert (np.diff(found.probabilities) <= 0).all()
    for index, label, suggested in zip(found.indices, found.labels, found.suggested, strict=True):
        others = [k for k in range(3) if k != label]
        assert suggested == max(others, key=lambda k: predictions.scores[index, k])
        assert label == predictions.labels[index]
    assert found.ids == tuple(predictions.ids[i] for i in found.indices)


def test_one_wrong_label_among_clear_scores():
    """As on a small, easy dataset: whatever else is sure is right, so that doubts do not explain it."""
    labels = np.arange(60) % 3
    sureness = np.linspace(1, 10, 60)[:, None]
    scores = sureness * np.eye(3)[labels]
    labels[40] = 0
    found = find_label_errors(make_predictions(scores, labels, "margin"))
    assert (found.num_probable, found.indices[0], found.suggested[0]) == (1, 40, 1)
    assert found.num_expected == pytest.approx(1, abs=0.1)
    labels[40] = 1
    assert find_label_errors(make_predictions(scores, labels, "margin")).num_expected < 0.1


def test_certain_scores_that_agree_name_nothing():
    labels = np.arange(60) % 3
    assert find_label_errors(make_predictions(np.eye(3)[labels], labels)).num_probable == 0


def test_a_second_set_helps_as_far_as_it_knows_something():
    predictions, wrong = drawn(1000, 50, seed=1)
    blind = replace(predictions, scores=np.full((1000, 3), 1 / 3, np.float32), kind="probability")
    alone, with_blind = find_label_errors(predictions), find_label_errors(predictions, blind)
    np.testing.assert_allclose(with_blind.probabilities, alone.probabilities, rtol=1e-6)
    generator = np.random.default_rng(2)
    halves = [
        replace(predictions, scores=predictions.scores + sign * offset)
        for offset in [generator.normal(scale=15, size=(1000, 3)).astype(np.float32)]
        for sign in (1, -1)
    ]

    def hits(found):
        return wrong[found.indices[:50]].sum()

    assert hits(find_label_errors(*halves)) >= max(hits(find_label_errors(half)) for half in halves) + 5


def test_unlabelled_and_unreadable_images_are_left_out_and_abstention_is_no_matter():
    predictions = Predictions(
        scores=np.array([[NAN, NAN], [0.9, 0.1], [0.2, 0.8], [0.9, 0.1], [0.8, 0.2]], np.float32),
        kind="probability",
        classes=("cup", "fork"),
        ids=("unreadable", "unlabelled", "fork", "wrong", "cup"),
        labels=np.array([0, -1, 1, 1, 0], np.int32),
        abstained=np.array([False, False, False, True, False]),
        errors={0: "truncated"},
    )
    found = find_label_errors(predictions)
    assert (len(found), found.num_left_out, found.ids[0], found.indices[0]) == (3, 2, "wrong", 3)
    assert "2 images without a label or unreadable were left out" in str(found)


def test_rows_are_plain():
    found = find_label_errors(saturated())
    rows = json.loads(json.dumps(list(found.rows()), allow_nan=False))
    assert len(rows) == 200
    assert rows[0] == {
        "id": found.ids[0],
        "label": "cup" if found.labels[0] == 0 else "fork",
        "suggested": "fork" if found.labels[0] == 0 else "cup",
        "probability": found.probabilities[0],
    }


def test_the_report():
    found = find_label_errors(saturated())
    lines = str(found).splitlines()
    assert re.match(r"\d+ of 200 labels are probably wrong, 20.0 in expectation", lines[0])
    assert lines[2].split() == ["label", "suggested", "P(wrong)"]
    row = next(found.rows())
    assert lines[3].split() == [row["id"], row["label"], row["suggested"], "0.500"]
    assert len(lines) == 3 + label_errors.MAX_LISTED


def test_what_cannot_be_judged_is_an_error():
    predictions = saturated()
    for labels in (None, np.full(200, -1, np.int32)):
        with pytest.raises(UsageError, match="no labels"):
            find_label_errors(replace(predictions, labels=labels))
    with pytest.raises(UsageError, match="fewer than two classes"):
        find_label_errors(replace(predictions, labels=np.zeros(200, np.int32)))
    with pytest.raises(UsageError, match="one or more"):
        find_label_errors()
    with pytest.raises(UsageError, match="differ in their ids"):
        find_label_errors(predictions, replace(predictions, ids=predictions.ids[::-1]))
    with pytest.raises(UsageError, match="differ in their labels"):
        find_label_errors(predictions, replace(predictions, labels=None))


@pytest.mark.slow
def test_planted_in_trash(features_of):
    """2 % of the labels changed: of the 51 most suspicious, with 51 planted, 6 in 10 are of these or more.

    Over 10 seeds the share was 0.69 with a standard deviation of 0.07, and 0.60 with the SVM alone.
    """
    from jaxcls.svm.cross_validation import out_of_fold

    photos, values = features_of("trash")
    directions = values / np.linalg.norm(values, axis=1, keepdims=True)
    ids = photos.ids.tolist()
    recalls = []
    for seed in range(3):
        noisy, wrong = change_labels(photos.labels, len(photos.classes), 51, seed)
        found = find_label_errors(
            out_of_fold(directions, noisy, photos.classes, ids, seed=seed),
            score_by_neighbours(values, noisy, photos.classes, ids),
        )
        recalls.append(wrong[found.indices[:51]].sum() / 51)
        assert wrong[found.indices[: found.num_probable]].mean() >= 0.7
        assert 25 <= found.num_expected <= 85
    assert np.mean(recalls) >= 0.6

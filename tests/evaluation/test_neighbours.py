"""Votes of neighbours, worked by hand and against scikit-learn."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from jaxcls.errors import UsageError
from jaxcls.evaluation import neighbours
from jaxcls.evaluation.neighbours import score_by_neighbours


def degrees(*angles) -> np.ndarray:
    """Unit vectors in the plane, of several lengths: these do not matter."""
    radians = np.deg2rad(np.asarray(angles, np.float32))
    lengths = np.arange(1, len(angles) + 1, dtype=np.float32)[:, None]
    return lengths * np.stack([np.cos(radians), np.sin(radians)], axis=1)


VALUES = degrees(0, 1, 3, 90, 91)
LABELS = np.array([0, 0, 1, 1, -1], np.int32)


def score(values=VALUES, labels=LABELS, **options):
    return score_by_neighbours(
        values, labels, ("cup", "fork"), [f"{i}" for i in range(len(values))], **options
    )


def test_votes_worked_by_hand():
    predictions = score(num_neighbours=2)
    # Each class holds half of the labels. The first image's neighbours are the second and third.
    half = 0.5
    expected = [
        [1 + half, 1 + half],
        [1 + half, 1 + half],
        [2 + half, half],
        [1 + half, 1 + half],
        [half, 2 + half],
    ]
    np.testing.assert_allclose(predictions.scores, np.asarray(expected) / 3, rtol=1e-6)
    assert predictions.kind == "probability"
    np.testing.assert_array_equal(predictions.labels, LABELS)


def test_images_of_one_group_do_not_vote_on_each_other():
    groups = np.array([0, 0, 1, 2, 2], np.int32)
    predictions = score(num_neighbours=2, groups=groups)
    np.testing.assert_allclose(predictions.scores[0], [0.5 / 3, 2.5 / 3], rtol=1e-6)
    alone = score(num_neighbours=2, groups=np.zeros(5, np.int32))
    np.testing.assert_allclose(alone.scores, 0.5)


def test_its_own_label_has_no_say():
    changed = LABELS.copy()
    changed[0] = 1
    before, after = score(labels=np.array([0, 0, 1, 1, 1], np.int32)), score(labels=changed)
    assert before.scores[1, 0] > after.scores[1, 0]
    assert score(num_neighbours=1).scores[2].argmax() == 0


@pytest.mark.parametrize("max_cells", [1, 700, 2**25])
def test_agrees_with_scikit_learn_in_blocks_too(monkeypatch, max_cells):
    monkeypatch.setattr(neighbours, "MAX_CELLS", max_cells)
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 40).astype(np.int32)
    values = generator.normal(size=(40, 5)).astype(np.float32)
    scores = score(values, labels, num_neighbours=7).scores
    for i in range(40):
        others = np.arange(40) != i
        machine = KNeighborsClassifier(7, metric="cosine").fit(values[others], labels[others])
        expected = (7 * machine.predict_proba(values[[i]])[0] + np.bincount(labels) / 40) / 8
        np.testing.assert_allclose(scores[i], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_neighbours": 0}, "num_neighbours is 0"),
        ({"labels": np.full(5, -1, np.int32)}, "no image is labelled"),
        ({"values": np.full((5, 2), np.nan, np.float32)}, "not finite"),
        ({"labels": LABELS[:4]}, "5 features, 4 labels"),
        ({"groups": np.zeros(4, np.int32)}, "4 groups"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        score(**options)

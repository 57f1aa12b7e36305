"""Cross-validation against scikit-learn's machines, fitted fold by fold."""

import warnings

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.svm import LinearSVC

from jaxcls.errors import UsageError
from jaxcls.svm import cross_validation
from jaxcls.svm import samples as samples_module
from jaxcls.svm.calibration import fit_calibrator
from jaxcls.svm.cross_validation import (
    CrossValidation,
    candidates,
    cross_validate,
    make_folds,
    out_of_fold,
)

NAMES = ("eight", "nine", "three")
WEIGHTS = np.array([0.5, 1.0, 3.0], np.float32)
TRIED = (0.003, 0.3)


def digits(num_classes=3):
    """Those that are confused most; 150 of them as features [N, 64] and labels."""
    data = load_digits()
    kept = np.flatnonzero(np.isin(data.target, (8, 9, 3)[:num_classes]))[:150]
    _, labels = np.unique(data.target[kept], return_inverse=True)
    return (data.data[kept] / 16).astype(np.float32), labels


def machine(C, class_weights=None):  # noqa: N803
    by_label = None if class_weights is None else dict(enumerate(class_weights.tolist()))
    return LinearSVC(C=C, class_weight=by_label, dual=False, tol=1e-8, max_iter=100_000)


def held_out(values, labels, folds, C, class_weights=None):  # noqa: N803
    """Margins by scikit-learn, its machine fitted anew for each fold."""
    split = PredefinedSplit(folds)
    found = cross_val_predict(machine(C, class_weights), values, labels, cv=split, method="decision_function")
    return np.stack([-found, found], axis=1) if found.ndim == 1 else found


def cross_validate_tightly(values, labels, folds, class_weights=None):
    """To a tolerance at which the margins themselves agree."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_validation, "TOLERANCE", 1e-7)
        patch.setattr(cross_validation, "MAX_STEPS", 200)
        options = {"class_weights": class_weights, "num_classes": int(labels.max()) + 1}
        return cross_validate(values, labels, folds, TRIED, **options)


@pytest.fixture(scope="module")
def tight():
    """Both values of C, two folds: few enough problems that all are solved in one go."""
    values, labels = digits()
    folds = make_folds(labels, 2, classes=NAMES)
    return values, labels, folds, cross_validate_tightly(values, labels, folds, WEIGHTS)


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("class_weights", [None, WEIGHTS], ids=["alike", "weighted"])
def test_margins_and_the_best_c_are_scikit_learns(num_classes, class_weights):
    values, labels = digits(num_classes)
    weights = None if class_weights is None else class_weights[:num_classes]
    folds = make_folds(labels, 2, classes=NAMES[:num_classes])
    quick = cross_validate(values, labels, folds, TRIED, class_weights=weights, num_classes=num_classes)
    tight = cross_validate_tightly(values, labels, folds, weights)
    assert (quick.C, quick.margins.dtype) == (TRIED, np.float32)
    accuracy = []
    for place, C in enumerate(TRIED):
        expected = held_out(values, labels, folds, C, weights)
        largest = np.abs(expected).max()
        np.testing.assert_allclose(tight.margins[place], expected, atol=1e-3 * largest)
        np.testing.assert_allclose(quick.margins[place], expected, atol=5e-2 * largest)
        answers = cross_val_predict(machine(C, weights), values, labels, cv=PredefinedSplit(folds))
        accuracy.append(balanced_accuracy_score(labels, answers))
        assert tight.accuracy[place] == pytest.approx(accuracy[-1])
        assert quick.accuracy[place] == pytest.approx(accuracy[-1], abs=0.02)
    assert quick.best == tight.best == int(np.argmax(accuracy))
    if num_classes == 2:
        np.testing.assert_array_equal(tight.margins[..., 0], -tight.margins[..., 1])


def test_batches_of_folds_do_not_matter(tight, monkeypatch):
    values, labels, folds, whole = tight
    solved = []
    solve = cross_validation._solve
    monkeypatch.setattr(cross_validation, "_solve", lambda *a: solved.append(len(a[3])) or solve(*a))
    for most, expected in ((len(labels) * 3 * 3, [3, 1]), (1, [1, 1, 1, 1])):
        solved.clear()
        monkeypatch.setattr(cross_validation, "MAX_CELLS", most)
        found = cross_validate_tightly(values, labels, folds, WEIGHTS)
        assert solved == expected
        np.testing.assert_allclose(found.margins, whole.margins, atol=5e-3)
        np.testing.assert_array_equal(found.accuracy, whole.accuracy)


def test_the_goal_is_the_same_without_a_preconditioner(tight, monkeypatch):
    values, labels, folds, preconditioned = tight
    monkeypatch.setattr(samples_module, "MAX_SPECTRUM", 0)
    samples = samples_module.Samples(values, labels, np.ones(len(labels)), constant=1.0, num_problems=1)
    assert not len(samples.spectrum().values)
    monkeypatch.setattr(samples_module, "MAX_SPECTRUM", samples.width)
    assert len(samples.spectrum().values) == samples.width
    monkeypatch.setattr(samples_module, "MAX_SPECTRUM", 0)
    plain = cross_validate_tightly(values, labels, folds, WEIGHTS)
    np.testing.assert_allclose(plain.margins, preconditioned.margins, atol=5e-3)


def test_accuracy_is_the_mean_recall_of_the_classes(tight):
    _, labels, _, found = tight
    for margins, accuracy in zip(found.margins, found.accuracy, strict=True):
        assert accuracy == pytest.approx(balanced_accuracy_score(labels, margins.argmax(1)))


def test_of_equals_the_smallest_c_is_best():
    margins = np.zeros((4, 1, 2), np.float32)
    assert CrossValidation((0.1, 1.0, 10.0, 100.0), margins, np.array([0.5, 0.8, 0.8, 0.7])).best == 1


# Folds.


def test_every_fold_has_each_classs_share():
    labels = np.repeat([0, 1, 2], [50, 20, 7])
    folds = make_folds(labels, 5, classes=NAMES)
    assert folds.dtype == np.int32
    counts = np.array([np.bincount(folds[labels == label], minlength=5) for label in range(3)])
    np.testing.assert_array_equal(counts[:2], [[10] * 5, [4] * 5])
    assert set(counts[2]) == {1, 2}


def test_the_seed_shuffles_and_is_kept_to():
    labels = np.arange(60) % 3
    folds = [make_folds(labels, 3, classes=NAMES, seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(folds[0], folds[1])
    assert (folds[0] != folds[2]).any()


def test_groups_stay_together():
    rng = np.random.default_rng(0)
    labels, groups = np.repeat(np.arange(60) % 3, 4), np.repeat(rng.permutation(60), 4)
    folds = make_folds(labels, 4, classes=NAMES, groups=groups)
    for group in range(60):
        assert len(set(folds[groups == group])) == 1
    for label in range(3):
        assert np.bincount(folds[labels == label]).tolist() == [20] * 4


@pytest.mark.parametrize("num_folds", [1, 0, -3])
def test_fewer_than_two_folds(num_folds):
    with pytest.raises(UsageError, match=f"num_folds {num_folds}: cross-validation needs at least 2"):
        make_folds(np.arange(30) % 3, num_folds, classes=NAMES)


def test_more_folds_than_a_class_has_photos():
    labels = np.repeat([0, 1, 2], [9, 3, 5])
    message = "class nine has 3 images, fewer than 5 folds: set num_folds to 3 at most, or add some"
    with pytest.raises(UsageError, match=message):
        make_folds(labels, 5, classes=NAMES)
    make_folds(labels, 3, classes=NAMES)
    with pytest.raises(UsageError, match="class nine has 1 image, fewer than 2 folds: add some"):
        make_folds(np.array([0, 0, 1, 2, 2]), 2, classes=NAMES)


def test_more_folds_than_a_class_has_groups():
    labels = np.repeat([0, 1, 2], [8, 8, 8])
    groups = np.concatenate([np.arange(8), np.arange(8, 16), 100 + np.arange(8) // 4])
    message = "class three has 2 groups of images, fewer than 3 folds: set num_folds to 2 at most"
    with pytest.raises(UsageError, match=message):
        make_folds(labels, 3, classes=NAMES, groups=groups)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folds = make_folds(labels, 2, classes=NAMES, groups=groups)
    assert np.bincount(folds[labels == 2]).tolist() == [4, 4]


# What `C="cv"` tries, and what is said of photos out of fold.


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1.0, (0.1, 1, 10, 100, 1000)), (10.0, (1e-3, 0.01, 0.1, 1, 10)), (0.1, (10, 100, 1e3, 1e4, 1e5))],
)
def test_candidates_go_with_the_features_length(length, expected):
    values = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    values *= length / np.linalg.norm(values, axis=1, keepdims=True)
    assert candidates(values) == pytest.approx(expected)
    assert list(candidates(values)) == sorted(candidates(values))


def test_features_of_zero_have_candidates():
    assert candidates(np.zeros((3, 4), np.float32)) == candidates(np.eye(4, dtype=np.float32))


def test_out_of_fold_margins_are_scikit_learns_and_a_groups_photos_do_not_help_each_other():
    values, labels = digits()
    groups = np.arange(len(labels)) // 2
    labels = labels[2 * groups]  # two and two alike
    ids = [f"{i}.png" for i in range(len(labels))]
    options = {"C": 0.1, "num_folds": 2, "seed": 3, "groups": groups}
    found = out_of_fold(values, labels, NAMES, ids, calibrate=None, **options)
    folds = make_folds(labels, 2, classes=NAMES, groups=groups, seed=3)
    expected = held_out(values, labels, folds, 0.1)
    np.testing.assert_allclose(found.scores, expected, atol=5e-2 * np.abs(expected).max())
    assert (found.kind, found.classes, found.ids) == ("margin", NAMES, tuple(ids))
    np.testing.assert_array_equal(found.labels, labels)
    assert not found.abstained.any()

    calibrated = out_of_fold(values, labels, NAMES, ids, **options)
    assert calibrated.kind == "probability"
    for fold in range(2):
        others = fit_calibrator("temperature", found.scores[folds != fold], labels[folds != fold])
        own = found.scores[folds == fold]
        np.testing.assert_allclose(calibrated.scores[folds == fold], others.probabilities(own), atol=1e-6)


def test_out_of_fold_chooses_c(monkeypatch):
    values, labels = digits()
    monkeypatch.setattr(cross_validation, "EXPONENTS", (-3, 1))
    ids = list(map(str, range(len(labels))))
    found = out_of_fold(values, labels, NAMES, ids, num_folds=2, calibrate=None)
    folds = make_folds(labels, 2, classes=NAMES)
    margins = [held_out(values, labels, folds, C) for C in candidates(values)]
    accuracy = [balanced_accuracy_score(labels, own.argmax(1)) for own in margins]
    assert accuracy[1] > accuracy[0] + 0.02
    np.testing.assert_allclose(found.scores, margins[1], atol=5e-2 * np.abs(margins[1]).max())


def test_groups_that_leave_a_class_out_of_training(monkeypatch):
    """scikit-learn's division does so rarely, and only of few groups."""
    labels, groups = np.array([0, 0, 1, 1]), np.arange(4)
    divide = [(np.array([0, 1]), np.array([2, 3])), (np.array([2, 3]), np.array([0, 1]))]
    monkeypatch.setattr(cross_validation.StratifiedGroupKFold, "split", lambda *_: divide)
    with pytest.raises(UsageError, match="2 folds of whole groups leave no nine to train on"):
        make_folds(labels, 2, classes=NAMES[:2], groups=groups)

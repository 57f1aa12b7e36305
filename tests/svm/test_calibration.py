"""Calibration against scikit-learn's, on the same margins."""

import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn import calibration
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.svm import LinearSVC

from jaxcls.svm.calibration import Calibrator, fit_calibrator
from jaxcls.svm.cross_validation import calibrated_out_of_fold


def some(num_classes, seed=0):
    """A LinearSVC, and features and labels that it has not seen, with some overlap."""
    rng = np.random.default_rng(seed)
    labels = np.arange(300) % num_classes
    features = rng.normal(size=(300, 6)) + 1.5 * np.eye(6)[labels]
    labels[rng.random(300) < 0.1] = 0
    return LinearSVC(C=0.1).fit(features[:150], labels[:150]), features[150:], labels[150:]


def margins_of(machine, features):
    margins = machine.decision_function(features)
    return (np.stack([-margins, margins], axis=1) if margins.ndim == 1 else margins).astype(np.float32)


def log_loss(margins, labels, inverse):
    return -log_softmax(inverse * margins.astype(float), axis=1)[np.arange(len(labels)), labels].mean()


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("method", ["sigmoid", "temperature"])
def test_probabilities_are_scikit_learns(method, num_classes):
    if method == "temperature" and not hasattr(calibration, "_TemperatureScaling"):
        pytest.skip("scikit-learn has temperatures from 1.8 on")
    machine, features, labels = some(num_classes)
    theirs = CalibratedClassifierCV(FrozenEstimator(machine), method=method, ensemble=False)
    expected = theirs.fit(features, labels).predict_proba(features)
    margins = margins_of(machine, features)
    found = fit_calibrator(method, margins, labels).probabilities(margins)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-6)


def test_sigmoids_have_scikit_learns_slopes_and_intercepts():
    machine, features, labels = some(4)
    theirs = CalibratedClassifierCV(FrozenEstimator(machine), method="sigmoid", ensemble=False)
    sigmoids = theirs.fit(features, labels).calibrated_classifiers_[0].calibrators
    found = fit_calibrator("sigmoid", margins_of(machine, features), labels)
    np.testing.assert_allclose(found.slope, [-one.a_ for one in sigmoids], rtol=1e-4)
    np.testing.assert_allclose(found.intercept, [-one.b_ for one in sigmoids], rtol=1e-4)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_no_temperature_on_a_fine_grid_has_a_smaller_log_loss(num_classes):
    machine, features, labels = some(num_classes)
    margins = margins_of(machine, features)
    found = fit_calibrator("temperature", margins, labels)
    assert np.ptp(found.slope) == 0
    assert not found.intercept.any()
    losses = [log_loss(margins, labels, inverse) for inverse in np.geomspace(0.01, 100, 20_001)]
    assert log_loss(margins, labels, found.slope[0]) <= min(losses) + 1e-9


@pytest.mark.parametrize("method", ["sigmoid", "temperature"])
@pytest.mark.parametrize("scale", [1e-5, 1e-2, 1e3, 1e6])
def test_the_scale_of_margins_does_not_matter(method, scale):
    machine, features, labels = some(4)
    margins = margins_of(machine, features)
    expected = fit_calibrator(method, margins, labels).probabilities(margins)
    margins = margins * np.float32(scale)
    found = fit_calibrator(method, margins, labels).probabilities(margins)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("method", ["sigmoid", "temperature"])
def test_separable_margins_stay_finite(method):
    labels = np.arange(30) % 3
    margins = np.where(np.eye(3, dtype=bool)[labels], 1, -1).astype(np.float32)
    for num_classes in (2, 3):
        kept = labels < num_classes
        found = fit_calibrator(method, margins[kept, :num_classes], labels[kept])
        assert np.isfinite([found.slope, found.intercept]).all()
        assert 0 < found.slope.min() <= found.slope.max() < 200
        probabilities = found.probabilities(margins[kept, :num_classes])
        np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)
        assert (probabilities.argmax(1) == labels[kept]).all()


def test_separable_margins_are_as_sure_as_platts_targets():
    """10 positives at margin 1, 20 negatives at -1: the sigmoid goes through 11/12 and 1/22."""
    labels = np.arange(30) % 3
    margins = np.where(np.eye(3, dtype=bool)[labels], 1, -1).astype(np.float32)
    found = fit_calibrator("sigmoid", margins, labels)
    chances = 1 / (1 + np.exp(-(found.slope[:, None] * [1, -1] + found.intercept[:, None])))
    np.testing.assert_allclose(chances, np.broadcast_to([11 / 12, 1 / 22], (3, 2)), atol=1e-5)


def test_margins_that_say_nothing_give_the_classes_shares():
    labels = np.repeat([0, 1, 2], [10, 30, 60])
    margins = np.zeros((100, 3), np.float32)
    found = fit_calibrator("temperature", margins, labels).probabilities(margins)
    np.testing.assert_allclose(found, np.full_like(found, 1 / 3), rtol=1e-6)
    found = fit_calibrator("sigmoid", margins, labels).probabilities(margins)
    np.testing.assert_allclose(found[0], [0.1, 0.3, 0.6], atol=0.02)


def test_a_sigmoid_that_is_zero_everywhere_still_sums_to_one():
    calibrator = Calibrator("sigmoid", np.ones(3), np.full(3, -1000.0))
    probabilities = calibrator.probabilities(np.zeros((1, 3), np.float32))
    np.testing.assert_allclose(probabilities, np.full((1, 3), 1 / 3), rtol=1e-6)


@pytest.mark.parametrize("method", ["sigmoid", "temperature"])
def test_out_of_fold_probabilities_come_from_the_other_folds_only(method):
    """In fold 0 margins point the wrong way; calibrated on it, they would lose their meaning."""
    rng = np.random.default_rng(0)
    labels, folds = np.arange(90) % 3, np.arange(90) // 30
    margins = (rng.normal(size=(90, 3)) + 3 * np.eye(3)[labels]).astype(np.float32)
    margins[folds == 0] *= -1
    found = calibrated_out_of_fold(margins, labels, folds, method)
    assert (found.dtype, found.shape) == (np.float32, (90, 3))
    for fold in range(3):
        others = fit_calibrator(method, margins[folds != fold], labels[folds != fold])
        np.testing.assert_array_equal(found[folds == fold], others.probabilities(margins[folds == fold]))
    # What a fold's own labels are has no part in its probabilities, and has in the other folds'.
    relabelled = np.where(folds == 0, (labels + 1) % 3, labels)
    again = calibrated_out_of_fold(margins, relabelled, folds, method)
    np.testing.assert_array_equal(again[folds == 0], found[folds == 0])
    assert np.abs(again[folds != 0] - found[folds != 0]).max() > 0.01

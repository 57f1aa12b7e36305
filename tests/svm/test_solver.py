"""Our LinearSVC against liblinear's, by scikit-learn: the same objective, the same predictions."""

import warnings
from functools import partial

import numpy as np
import pytest
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits, make_classification
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC as Liblinear
from sklearn.utils.estimator_checks import parametrize_with_checks

from jaxcls.svm import samples as samples_module
from jaxcls.svm.newton import Problems, minimize
from jaxcls.svm.samples import Samples
from jaxcls.svm.solver import LinearSVC


def objective(machine, features, labels, C=1.0, class_weight=None, sample_weight=1.0):  # noqa: N803
    """float64 [problems], by the formula in liblinear's paper."""
    scaling = machine.intercept_scaling
    weights = np.hstack([machine.coef_, np.reshape(machine.intercept_, (-1, 1)) / scaling]).astype(float)
    samples = np.hstack([features, np.full((len(features), 1), scaling)]).astype(float)
    positive = machine.classes_[1:] if len(machine.classes_) == 2 else machine.classes_
    signs = np.where(labels == positive[:, None], 1, -1)
    costs = np.full(signs.shape, C) * sample_weight
    for row, name in enumerate(positive):
        for label, weight in (class_weight or {}).items():
            if label == name or len(positive) == 1:
                costs[row, labels == label] *= weight
    slack = np.maximum(1 - signs * (weights @ samples.T), 0)
    return 0.5 * (weights**2).sum(1) + (costs * slack**2).sum(1)


def digits():
    data = load_digits()
    return data.data / 16, data.target


def random(**options):
    return make_classification(random_state=0, **options)


def ill_conditioned():
    features, labels = random(n_samples=1000, n_features=50, n_informative=20, n_classes=4)
    return features * 10.0 ** np.random.default_rng(0).uniform(-3, 3, 50), labels


def far_from_the_origin():
    features, labels = random()
    return features + 100, labels


def separable():
    features = np.random.default_rng(0).standard_normal((400, 100))
    return features, np.where(features[:, 0] > 0, "right", "left")


def many_classes():
    rng = np.random.default_rng(0)
    labels = np.arange(1800) % 600
    return rng.standard_normal((600, 32))[labels] + 0.3 * rng.standard_normal((1800, 32)), labels


slow = partial(pytest.param, marks=pytest.mark.slow)
PROBLEMS = {
    "digits": (digits, 1.0),
    "digits, hardly regularised": slow(digits, 1000.0),
    "ill-conditioned": (ill_conditioned, 1.0),
    "ill-conditioned, regularised": (ill_conditioned, 0.01),
    "far from the origin": (far_from_the_origin, 1.0),
    "imbalanced": (lambda: random(n_samples=2000, n_features=30, weights=[0.99]), 1.0),
    "imbalanced, regularised": (lambda: random(n_samples=2000, n_features=30, weights=[0.99]), 0.01),
    "separable": slow(separable, 1000.0),
    "more features than samples": (lambda: random(n_samples=60, n_features=512), 1.0),
    "600 classes": (many_classes, 0.1),
}


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("make", "C"), PROBLEMS.values(), ids=PROBLEMS)
# liblinear may stop short of 1e-9; how far either came is what is compared.
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_the_objective_is_liblinears(make, C, dtype):  # noqa: N803
    features, labels = make()
    features = np.asarray(features, dtype)
    machine = LinearSVC(C=C).fit(features, labels)
    few = len(features) < features.shape[1]
    theirs = Liblinear(C=C, dual=few, tol=1e-9, max_iter=200_000).fit(features.astype(float), labels)
    ours, least = objective(machine, features, labels, C), objective(theirs, features, labels, C)
    assert ((ours - least) / least).max() < 1e-4
    assert (machine.predict(features) == theirs.predict(features.astype(float))).mean() >= 0.999
    assert machine.coef_.dtype == dtype


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("options", [{"intercept_scaling": 10.0}, {"fit_intercept": False}], ids=str)
def test_weights_and_intercepts_are_liblinears(num_classes, options):
    rng = np.random.default_rng(0)
    features, labels = random(n_samples=300, n_features=12, n_informative=6, n_classes=num_classes)
    of_samples, of_classes = rng.uniform(0, 2, 300), {0: 3.0, 1: 0.2}
    machines = [
        kind(C=0.3, class_weight=of_classes, tol=1e-12, **options, **more).fit(features, labels, of_samples)
        for kind, more in ((LinearSVC, {}), (Liblinear, {"dual": False}))
    ]
    np.testing.assert_allclose(machines[0].coef_, machines[1].coef_, rtol=1e-5, atol=1e-7)
    intercepts = np.broadcast_to(machines[1].intercept_, machines[0].intercept_.shape)
    np.testing.assert_allclose(machines[0].intercept_, intercepts, rtol=1e-5, atol=1e-7)
    margins = [machine.decision_function(features) for machine in machines]
    np.testing.assert_allclose(*margins, rtol=1e-5, atol=1e-6)


@parametrize_with_checks([LinearSVC(tol=1e-14)])  # at 1e-4 two ways to the minimum end at two places near it
def test_it_is_an_estimator(estimator, check):
    """All of scikit-learn's checks; that of array API input skips itself where SCIPY_ARRAY_API is not set."""
    check(estimator)


def test_it_works_in_scikit_learns_machinery():
    features, labels = digits()
    machine = make_pipeline(StandardScaler(), LinearSVC())
    search = GridSearchCV(machine, {"linearsvc__C": [1e-4, 1e-2]}, cv=3).fit(features, labels)
    assert search.best_score_ > 0.9
    probabilities = (
        CalibratedClassifierCV(LinearSVC(C=0.1), cv=3).fit(features, labels).predict_proba(features)
    )
    assert (probabilities.argmax(1) == labels).mean() > 0.95


@pytest.mark.parametrize("bytes_for_it", [None, 0], ids=["resident", "streamed"])
def test_blocks_and_devices_do_not_matter(monkeypatch, bytes_for_it):
    features, labels = digits()
    features = features[:1001].astype(np.float32)  # neither two devices nor the blocks divide it
    labels, ones = labels[:1001], np.ones(1001)
    costs, classes = np.full(10, 0.1, np.float32), np.arange(10, dtype=np.int32)
    problems = Problems(classes, costs, costs, np.full(10, -1, np.int32))

    def solve(**options):
        samples = Samples(features, labels, ones, constant=1.0, num_problems=10, **options)
        return samples, minimize(samples, problems, tolerance=1e-9, max_steps=100)

    _, whole = solve()
    monkeypatch.setattr(samples_module, "MAX_CELLS", 10 * 100)
    samples, divided = solve(memory=bytes_for_it)
    assert len(list(samples.blocks())) == 6
    assert samples.is_resident == (bytes_for_it is None)
    assert next(samples.blocks()).features.sharding.num_devices == 2
    np.testing.assert_allclose(divided.weights, whole.weights, atol=2e-4)
    np.testing.assert_allclose(divided.objective, whole.objective, rtol=1e-6)


@pytest.mark.slow
def test_many_problems_at_once_are_those_one_by_one():
    features, labels = digits()
    folds, costs = np.arange(len(labels)) % 3, (0.01, 10.0)
    asked = [(label, C, fold) for label in (2, 7) for C in costs for fold in (-1, 0, 1, 2)]
    positive, of_each, left_out = map(np.array, zip(*asked, strict=True))
    of_each = of_each.astype(np.float32)
    samples = Samples(
        features.astype(np.float32),
        labels,
        np.ones(len(labels)),
        folds,
        constant=1.0,
        num_problems=len(asked),
    )
    problems = Problems(positive.astype(np.int32), of_each, of_each, left_out.astype(np.int32))
    found = minimize(samples, problems, tolerance=1e-6, max_steps=200)
    for (label, C, fold), own, most in zip(asked, found.objective, found.gap, strict=True):
        kept = folds != fold
        alone = LinearSVC(C=C, tol=1e-10).fit(features[kept], labels[kept] == label)
        least = objective(alone, features[kept], labels[kept] == label, C)[0]
        assert own - least == pytest.approx(0, abs=1.1 * most + 1e-6 * least)


def test_the_gap_is_a_bound():
    features, labels = digits()
    least = objective(LinearSVC(tol=1e-13).fit(features, labels), features, labels)
    ones, classes = np.ones(10, np.float32), np.arange(10, dtype=np.int32)
    samples = Samples(
        features.astype(np.float32), labels, np.ones(len(labels)), constant=1.0, num_problems=10
    )
    problems = Problems(classes, ones, ones, np.full(10, -1, np.int32))
    for num_steps in (1, 3, 5):
        found = minimize(samples, problems, tolerance=1e-9, max_steps=num_steps)
        above = found.objective - least
        assert (above > 0).all()
        assert (above <= found.gap).all()


def test_too_few_steps_end_with_a_warning():
    with pytest.warns(ConvergenceWarning, match="after 3 steps, the most that max_iter allows"):
        hasty = LinearSVC(max_iter=3).fit(*digits())
    assert hasty.n_iter_ == 3


def test_samples_of_weight_0_may_stand_anywhere():
    """Those from which second moments would be estimated, too."""
    features, labels = random(n_samples=2000, n_features=10)
    weights = np.where(np.arange(2000) % 7 == 0, 0.0, 1.0)
    machine = LinearSVC(tol=1e-12).fit(features, labels, weights)
    kept = LinearSVC(tol=1e-12).fit(features[weights > 0], labels[weights > 0])
    np.testing.assert_allclose(machine.coef_, kept.coef_, rtol=1e-6)


def test_precision_that_is_exhausted_ends_it_with_a_warning():
    features, labels = digits()
    with pytest.warns(ConvergenceWarning, match="before the precision"):
        machine = LinearSVC(tol=1e-15).fit(features.astype(np.float32), labels)
    assert machine.n_iter_ < 100


def test_converged_fits_are_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LinearSVC(C=0.01).fit(*digits())


@pytest.mark.parametrize("name", ["C", "tol", "max_iter", "intercept_scaling"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_parameters_that_cannot_be(name, value):
    with pytest.raises(ValueError, match=f"{name} .*must be above 0"):
        LinearSVC(**{name: value}).fit([[0.0], [1.0]], [0, 1])

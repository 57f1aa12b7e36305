"""`fit_svm` against scikit-learn's LinearSVC, fitted here on the same features."""

import json
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from conftest import write_photos
from scipy.special import softmax
from sklearn import calibration
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GridSearchCV, PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize
from sklearn.svm import LinearSVC

from jaxcls.classifier import Classifier, Head, apply_head
from jaxcls.data.dataset import Dataset
from jaxcls.data.folder import read_folder
from jaxcls.data.source import MemorySource
from jaxcls.errors import DatasetError, UsageError
from jaxcls.evaluation.thresholds import NEVER, calibration_error, choose_thresholds
from jaxcls.scoring import extract_features, predict
from jaxcls.svm import cross_validation, fit
from jaxcls.svm.calibration import fit_calibrator
from jaxcls.svm.cross_validation import calibrated_out_of_fold, candidates, cross_validate, make_folds
from jaxcls.svm.fit import fit_svm


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Three classes of 5, 3 and 2 photos; the last ones' colour was drawn again, so that some overlap."""
    folder = tmp_path_factory.mktemp("colours")
    return read_folder(write_photos(folder, {"blue": 5, "green": 3, "red": 2}))


@pytest.fixture(scope="module")
def features(backbone, colours):
    values, labels, _ = extract_features(backbone, colours)
    return values, labels


def margins_of_scikit_learn(values, labels, **options):
    machine = LinearSVC(random_state=0, **options).fit(values, labels)
    decision = machine.decision_function(values)
    return np.stack([-decision, decision], axis=1) if decision.ndim == 1 else decision


def assert_margins(classifier, dataset, expected):
    predictions = predict(classifier, dataset)
    assert predictions.kind == "margin"
    np.testing.assert_allclose(predictions.scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normalize_features", [False, True])
def test_three_classes(backbone, colours, features, normalize_features):
    values, labels = features
    if normalize_features:
        values = normalize(values)
    expected = margins_of_scikit_learn(values, labels, C=0.1, class_weight="balanced")
    classifier = fit_svm(colours, backbone, C=0.1, normalize_features=normalize_features)
    assert classifier.head.normalize == normalize_features
    assert_margins(classifier, colours, expected)


def test_two_classes_have_margins_of_opposite_sign(backbone, colours, features):
    two = colours.filter(lambda _, name: name != "green").relabel({"green": "red"})
    values, labels = features
    kept = labels != 1
    expected = margins_of_scikit_learn(values[kept], labels[kept] > 0, C=1.0, class_weight="balanced")
    classifier = fit_svm(two, backbone)
    assert classifier.classes == ("blue", "red")
    assert_margins(classifier, two, expected)
    assert classifier.provenance["num_images"] == 7


@pytest.mark.parametrize(
    ("class_weight", "by_label"), [(None, None), ({"red": 4.0, "blue": 0.5}, {0: 0.5, 1: 1.0, 2: 4.0})]
)
def test_class_weights(backbone, colours, features, class_weight, by_label):
    expected = margins_of_scikit_learn(*features, C=0.001, class_weight=by_label)
    classifier = fit_svm(colours, backbone, C=0.001, class_weight=class_weight)
    assert_margins(classifier, colours, expected)


def test_a_classifier_gives_its_own_backbone(backbone, colours):
    """As after fine-tuning: the trunk of the classifier, and nothing of its head."""
    variables = {
        "params": backbone.variables["params"],
        "batch_stats": {
            name: {"norm": {"mean": tree["norm"]["mean"] + 1, "var": tree["norm"]["var"]}}
            if name == "stem"
            else tree
            for name, tree in backbone.variables["batch_stats"].items()
        },
    }
    tuned = Classifier(
        replace(backbone, variables=variables),
        Head(np.zeros((512, 2), np.float32), np.zeros(2, np.float32)),
        ("other", "names"),
    )
    values, labels, _ = extract_features(tuned, colours)
    expected = margins_of_scikit_learn(values, labels, C=0.1, class_weight="balanced")
    classifier = fit_svm(colours, tuned, C=0.1)
    assert classifier.backbone is tuned.backbone
    assert classifier.classes == ("blue", "green", "red")
    assert_margins(classifier, colours, expected)


def test_standardized_features_on_raw_photos(backbone, colours, features):
    values, labels = features
    machine = make_pipeline(StandardScaler(), LinearSVC(C=0.01, class_weight="balanced", random_state=0))
    expected = machine.fit(values, labels).decision_function(values)
    classifier = fit_svm(colours, backbone, C=0.01, standardize=True)
    assert_margins(classifier, colours, expected)
    assert classifier.provenance["standardize"]


def test_from_photos_to_abstentions(backbone, colours, tmp_path):
    """Features come from the cache at the second time; nothing else may differ."""
    options = {"C": 0.1, "num_folds": 2, "min_precision": 0.9, "cache": tmp_path / "cache"}
    said = []
    first, second = (fit_svm(colours, backbone, report=said.append, **options) for _ in range(2))
    assert [line for line in said if "kept from before" in line] == [
        f"features of {kept} of 10 images were kept from before" for kept in (0, 10)
    ]
    np.testing.assert_array_equal(first.head.kernel, second.head.kernel)
    best_of_all = np.full(3, 1e9, np.float32)
    for thresholds in (first.head.thresholds, best_of_all):
        strict = replace(first, head=replace(first.head, thresholds=thresholds))
        predictions = predict(strict, colours)
        best = predictions.scores.argmax(1)
        below = predictions.scores.max(1) < thresholds[best]
        np.testing.assert_array_equal(predictions.abstained, below)
        np.testing.assert_array_equal(predictions.predicted, np.where(below, -1, best))
    json.dumps(first.provenance)


# From here on features are drawn, and no network is run.


def points(num_classes=3):
    """A dataset of 90 points that overlap, and their values float32 [N, 512]; classes are of unequal size."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(num_classes), (60, 30) if num_classes == 2 else (45, 30, 15))
    told = 0.3 * (rng.normal(size=(90, 8)) + 2 * np.eye(8)[labels])
    values = (0.2 + 0.1 * rng.normal(size=(90, 512)) + np.repeat(told, 64, axis=1)).astype(np.float32)
    ids = list(map(str, range(90)))
    source = MemorySource([np.zeros((8, 8, 3), np.uint8)] * 90)
    return Dataset("points", ("a", "b", "c")[:num_classes], labels, ids, source), values


@pytest.fixture
def drawn(monkeypatch):
    """The points; whatever `fit_svm` asks features of, it gets their values."""
    dataset, values = points()
    monkeypatch.setattr(fit, "features_of", lambda backbone, dataset, *_, **__: (dataset, values))
    return dataset, values


def scores_of(classifier, values):
    head = classifier.head
    return np.asarray(
        apply_head(head.weights, values, normalize=head.normalize, calibration=head.calibration)
    )


def margin_machine(C=0.05):  # noqa: N803
    return LinearSVC(C=C, class_weight="balanced", dual=False, tol=1e-8, max_iter=100_000)


def split_of(dataset, num_folds=3, seed=0):
    folds = make_folds(dataset.labels, num_folds, classes=dataset.classes, groups=dataset.groups, seed=seed)
    return folds, PredefinedSplit(folds)


@pytest.fixture
def _tight(monkeypatch):
    """Margins held out are as exact as float32 allows."""
    monkeypatch.setattr(cross_validation, "TOLERANCE", 1e-7)


CALIBRATED = {"calibrate": "sigmoid", "num_folds": 3, "class_weight": None}


@pytest.mark.usefixtures("_tight")
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("calibrate", ["sigmoid", "temperature"])
def test_probabilities_are_those_of_calibrated_classifier_cv(backbone, drawn, calibrate, standardize):
    """Its ensemble=False: one machine of all samples, one calibrator of all margins held out."""
    dataset, values = drawn
    if calibrate == "temperature" and not hasattr(calibration, "_TemperatureScaling"):
        pytest.skip("scikit-learn has temperatures from 1.8 on")
    machine = LinearSVC(C=0.05, dual=False, tol=1e-8, max_iter=100_000)
    _, split = split_of(dataset)
    theirs = CalibratedClassifierCV(machine, method=calibrate, cv=split, ensemble=False)
    # Its folds are scaled as all samples are, as ours.
    scaled = StandardScaler().fit_transform(values) if standardize else values
    expected = theirs.fit(scaled, dataset.labels).predict_proba(scaled)
    options = CALIBRATED | {"calibrate": calibrate, "standardize": standardize}
    classifier = fit_svm(dataset, backbone, C=0.05, **options)
    assert (classifier.head.kind, classifier.head.calibration) == ("probability", calibrate)
    scores = scores_of(classifier, values)
    np.testing.assert_allclose(scores, expected, atol=5e-3)
    np.testing.assert_allclose(scores.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("calibrate", ["sigmoid", "temperature"])
def test_a_calibrated_fit_is_the_uncalibrated_one_and_a_calibrator(backbone, drawn, calibrate):
    dataset, values = drawn
    said = []
    margins = scores_of(fit_svm(dataset, backbone, C=0.05), values)
    options = {"C": 0.05, "calibrate": calibrate, "num_folds": 3, "report": said.append}
    classifier = fit_svm(dataset, backbone, **options)
    folds, _ = split_of(dataset)
    weights = dataset.class_weights("balanced")
    held_out = cross_validate(
        values, dataset.labels, folds, (0.05,), class_weights=weights, num_classes=3
    ).margins[0]
    expected = fit_calibrator(calibrate, held_out, dataset.labels).probabilities(margins)
    np.testing.assert_allclose(scores_of(classifier, values), expected, atol=1e-4)
    before = calibration_error(softmax(held_out, axis=1), dataset.labels)
    after = calibration_error(
        calibrated_out_of_fold(held_out, dataset.labels, folds, calibrate), dataset.labels
    )
    assert classifier.provenance["calibration"]["method"] == calibrate
    assert classifier.provenance["calibration"]["error"] == pytest.approx({"before": before, "after": after})
    assert f"expected calibration error, by held-out folds: {before:.4f}, calibrated {after:.4f}" in said


def test_two_classes_calibrated(backbone, monkeypatch):
    dataset, values = points(num_classes=2)
    monkeypatch.setattr(fit, "features_of", lambda backbone, dataset, *_, **__: (dataset, values))
    _, split = split_of(dataset, num_folds=9)
    machine = LinearSVC(C=0.05, dual=False, tol=1e-8, max_iter=100_000)
    theirs = CalibratedClassifierCV(machine, cv=split, ensemble=False).fit(values, dataset.labels)
    # Nine problems are what three classes have in three folds, and are compiled already.
    classifier = fit_svm(dataset, backbone, C=0.05, **CALIBRATED | {"num_folds": 9})
    np.testing.assert_allclose(scores_of(classifier, values), theirs.predict_proba(values), atol=2e-2)


def test_the_c_of_best_macro_accuracy_is_chosen(backbone, drawn, monkeypatch):
    dataset, values = drawn
    monkeypatch.setattr(cross_validation, "EXPONENTS", (-3, 0))
    tried = candidates(values)
    _, split = split_of(dataset)
    search = GridSearchCV(margin_machine(), {"C": tried}, scoring="balanced_accuracy", cv=split, refit=False)
    # GridSearchCV averages over folds: the same where all folds have as many of each class.
    search.fit(values, dataset.labels)
    said = []
    classifier = fit_svm(dataset, backbone, C="cv", num_folds=3, report=said.append)
    best = search.best_params_["C"]
    assert classifier.provenance["C"] == best
    accuracy = classifier.provenance["cross_validation"]["accuracy"]
    assert list(accuracy) == [str(C) for C in tried]
    expected = search.cv_results_["mean_test_score"]
    assert list(accuracy.values()) == pytest.approx(expected, abs=0.02)
    assert np.ptp(expected) > 0.05
    assert said[0].startswith(f"macro accuracy in 3-fold cross-validation: C={tried[0]:g} ")
    assert said[1] == f"solved by liblinear (scikit-learn), C={best:g}"
    machine = margin_machine(best).fit(values, dataset.labels)
    np.testing.assert_allclose(
        scores_of(classifier, values), machine.decision_function(values), rtol=1e-3, atol=2e-3
    )


@pytest.mark.usefixtures("_tight")
def test_abstention_has_the_precision_that_was_asked_for(backbone, drawn):
    """In cross-validation, by scikit-learn's machines."""
    dataset, values = drawn
    labels = dataset.labels
    _, split = split_of(dataset)
    held_out = cross_val_predict(margin_machine(), values, labels, cv=split, method="decision_function")
    said = []
    options = {"C": 0.05, "num_folds": 3, "report": said.append}
    classifier = fit_svm(dataset, backbone, min_precision=0.95, **options)
    thresholds = classifier.head.thresholds
    np.testing.assert_allclose(thresholds, choose_thresholds(held_out, labels, 0.95), atol=5e-3)
    best = held_out.argmax(1)
    is_answer = held_out.max(1) >= thresholds[best] - 5e-3
    assert 0.3 < is_answer.mean() < 0.95
    for label in range(3):
        own = is_answer & (best == label)
        assert (labels[own] == label).mean() >= 0.94
    assert classifier.provenance["min_precision"] == 0.95
    assert f"thresholds that leave {is_answer.mean():.1%} of the images an answer" in said
    assert classifier.head.kind == "margin"


@pytest.mark.usefixtures("_tight")
def test_augmented_copies_are_trained_on_and_not_counted(backbone, monkeypatch):
    """By scikit-learn's machines, held out with groups of copies and originals."""
    originals, values = points()
    values = np.concatenate([values, values + np.random.default_rng(1).normal(0, 0.5, values.shape)])
    values, labels = values.astype(np.float32), np.tile(originals.labels, 2)
    ids, origins = [*originals.ids, *(f"{own}~" for own in originals.ids)], [""] * 90 + [*originals.ids]
    source = MemorySource([np.zeros((8, 8, 3), np.uint8)] * 180)
    dataset = Dataset("copies", originals.classes, labels, ids, source, origins=origins)
    monkeypatch.setattr(fit, "features_of", lambda backbone, dataset, *_, **__: (dataset, values))
    folds, split = split_of(dataset)
    np.testing.assert_array_equal(folds[:90], folds[90:])
    held_out = cross_val_predict(margin_machine(), values, labels, cv=split, method="decision_function")
    classifier = fit_svm(dataset, backbone, C=0.05, min_precision=0.95, num_folds=3)
    expected = choose_thresholds(held_out[:90], labels[:90], 0.95)
    np.testing.assert_allclose(classifier.head.thresholds, expected, atol=5e-3)
    assert np.abs(choose_thresholds(held_out, labels, 0.95) - expected).max() > 0.05
    (accuracy,) = classifier.provenance["cross_validation"]["accuracy"].values()
    assert accuracy == pytest.approx(balanced_accuracy_score(labels[:90], held_out[:90].argmax(1)), abs=1e-6)


def test_a_class_that_is_never_right_never_answers(backbone, drawn):
    dataset, _ = drawn
    mixed = replace(dataset, labels=np.random.default_rng(0).permutation(dataset.labels))
    said = []
    classifier = fit_svm(mixed, backbone, min_precision=1.0, num_folds=3, C=0.05, report=said.append)
    silent = [name for name, value in zip("abc", classifier.head.thresholds, strict=True) if value == NEVER]
    assert silent
    assert said[-1].endswith(f"too rarely right at any score: {', '.join(silent)}")


def test_thresholds_are_of_probabilities_where_these_are_the_scores(backbone, drawn):
    dataset, values = drawn
    options = {"C": 0.05, "num_folds": 3, "calibrate": "temperature"}
    classifier = fit_svm(dataset, backbone, min_precision=0.9, **options)
    folds, _ = split_of(dataset)
    weights = dataset.class_weights("balanced")
    tests = cross_validate(values, dataset.labels, folds, (0.05,), class_weights=weights, num_classes=3)
    scores = calibrated_out_of_fold(tests.margins[0], dataset.labels, folds, "temperature")
    expected = choose_thresholds(scores, dataset.labels, 0.9)
    np.testing.assert_allclose(classifier.head.thresholds, expected, atol=1e-6)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_both_solvers_give_the_same_margins(backbone, monkeypatch, num_classes):
    dataset, values = points(num_classes)
    monkeypatch.setattr(fit, "features_of", lambda backbone, dataset, *_, **__: (dataset, values))
    scores = {}
    for most in (values.size * num_classes, values.size * num_classes - 1):
        monkeypatch.setattr(fit, "MAX_LIBLINEAR", most)
        classifier = fit_svm(dataset, backbone, C=0.05)
        scores[classifier.provenance["solver"]] = scores_of(classifier, values)
    assert list(scores) == ["liblinear (scikit-learn)", "Newton's method (jaxcls)"]
    first, second = scores.values()
    np.testing.assert_allclose(first, second, atol=2e-2 * np.abs(first).max())


@pytest.mark.parametrize(("kind", "most"), [("Liblinear", 10**9), ("LinearSVC", 0)])
def test_a_fit_that_did_not_converge_is_warned_of_and_used(backbone, drawn, monkeypatch, kind, most):
    monkeypatch.setattr(fit, "MAX_LIBLINEAR", most)
    monkeypatch.setattr(fit, kind, partial(getattr(fit, kind), max_iter=2))
    with pytest.warns(ConvergenceWarning, match="had not converged after 2 iterations"):
        classifier = fit_svm(drawn[0], backbone, C=100.0)
    assert np.isfinite(classifier.head.kernel).all()


def test_another_warning_is_not_taken_for_it(backbone, drawn, monkeypatch):
    class Changing(LinearSVC):
        def fit(self, *arguments):
            warnings.warn("this will change", FutureWarning, stacklevel=1)
            return super().fit(*arguments)

    monkeypatch.setattr(fit, "Liblinear", Changing)
    with pytest.warns(FutureWarning, match="this will change") as caught:
        fit_svm(drawn[0], backbone, C=0.05)
    assert {warning.category for warning in caught} == {FutureWarning}


def test_photos_of_one_group_stay_in_one_fold(backbone, drawn):
    dataset, _ = drawn
    message = "class a has 1 groups? of images, fewer than 2 folds"
    with pytest.raises(UsageError, match=message):
        fit_svm(replace(dataset, groups=dataset.labels), backbone, C="cv", num_folds=2)


@pytest.mark.parametrize(
    "options",
    [
        {"C": 0.0},
        {"C": -1.0},
        {"C": float("nan")},
        {"C": float("inf")},
        {"C": "auto"},
        {"class_weight": "equal"},
        {"class_weight": {"gren": 2.0}},
        {"class_weight": {"green": -2.0}},
        {"calibrate": "isotonic"},
        {"min_precision": 0.0},
        {"min_precision": 1.5},
        {"min_precision": float("nan")},
        {"num_folds": 1, "C": "cv"},
        {"num_folds": 3, "calibrate": "sigmoid"},
        {"num_folds": 3, "min_precision": 0.9},
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused_before_anything_is_done(
    backbone, colours, options, monkeypatch, tmp_path
):
    monkeypatch.delattr(fit, "features_of")
    with pytest.raises(UsageError, match=next(iter(options))):
        fit_svm(colours, backbone, cache=tmp_path / "cache", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("labels", "message"), [([0, 0, 2], "no images of b"), ([0, 1, -1], "1 unlabelled")])
def test_a_dataset_that_teaches_no_classifier_is_refused(backbone, labels, message):
    source = MemorySource([np.zeros((8, 8, 3), np.uint8)] * 3)
    with pytest.raises(DatasetError, match=message):
        fit_svm(Dataset("photos", ("a", "b", "c"), labels, ["0", "1", "2"], source), backbone)

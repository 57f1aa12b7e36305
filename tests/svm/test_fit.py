"""`fit_svm` against scikit-learn's LinearSVC, fitted here on the same features."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import write_photos
from sklearn.preprocessing import normalize
from sklearn.svm import LinearSVC

from jaxcls.classifier import Classifier, Head
from jaxcls.data.dataset import Dataset
from jaxcls.data.folder import read_folder
from jaxcls.data.source import MemorySource
from jaxcls.errors import DatasetError, UsageError
from jaxcls.scoring import extract_features, predict
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


@pytest.mark.parametrize(
    "options",
    [
        {"C": 0.0},
        {"C": -1.0},
        {"C": float("nan")},
        {"C": float("inf")},
        {"class_weight": "equal"},
        {"class_weight": {"gren": 2.0}},
        {"class_weight": {"green": -2.0}},
    ],
)
def test_options_that_cannot_work_are_refused(backbone, colours, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        fit_svm(colours, backbone, **options)


@pytest.mark.parametrize(("labels", "message"), [([0, 0, 2], "no images of b"), ([0, 1, -1], "1 unlabelled")])
def test_a_dataset_that_teaches_no_classifier_is_refused(backbone, labels, message):
    source = MemorySource([np.zeros((8, 8, 3), np.uint8)] * 3)
    with pytest.raises(DatasetError, match=message):
        fit_svm(Dataset("photos", ("a", "b", "c"), labels, ["0", "1", "2"], source), backbone)

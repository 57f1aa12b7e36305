"""Metrics against hand-worked values and scikit-learn."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import softmax
from sklearn import metrics as sklearn_metrics

from jaxcls.errors import UsageError
from jaxcls.evaluation import Evaluation, evaluate
from jaxcls.evaluation.metrics import NUMBERS, numbers
from jaxcls.evaluation.text import shorten
from jaxcls.evaluation.thresholds import calibration_error
from jaxcls.predictions import Predictions

NAN = float("nan")


def make_predictions(scores, labels, classes=None) -> Predictions:
    scores = np.asarray(scores, np.float32)
    N, K = scores.shape
    return Predictions(
        scores=scores,
        kind="logit",
        classes=classes or tuple(f"class {i}" for i in range(K)),
        ids=tuple(map(str, range(N))),
        labels=np.asarray(labels, np.int32),
        abstained=np.zeros(N, np.bool_),
    )


def predictions_of(confusion, classes=None) -> Predictions:
    """Certain predictions that have this confusion matrix."""
    K = len(confusion)
    pairs = [(t, p) for t in range(K) for p in range(K) for _ in range(confusion[t][p])]
    return make_predictions([np.eye(K)[p] for _, p in pairs], [t for t, _ in pairs], classes)


@pytest.fixture
def tableware() -> Predictions:
    confusion = [[0, 1, 0, 1], [0, 7, 0, 0], [0, 0, 2, 0], [0, 0, 0, 11]]
    return predictions_of(confusion, ("bowl", "cup", "cutlery", "plate"))


@pytest.fixture(params=[2, 7])
def noisy(request) -> Predictions:
    rng = np.random.default_rng(request.param)
    labels = rng.integers(0, request.param, 300)
    scores = rng.normal(size=(300, request.param))
    scores[np.arange(300), labels] += 1
    return make_predictions(scores, labels)


def test_both_accuracies_of_a_matrix_worked_by_hand(tableware):
    evaluation = evaluate(tableware)
    assert evaluation.accuracy("micro") == 20 / 22
    assert evaluation.accuracy("macro") == 0.75
    assert evaluation.accuracy() == 0.75
    assert (evaluation.num_seen, evaluation.num_answered, evaluation.coverage) == (22, 22, 1)
    assert evaluation.confusion_matrix().tolist() == [[0, 1, 0, 1], [0, 7, 0, 0], [0, 0, 2, 0], [0, 0, 0, 11]]
    np.testing.assert_array_equal(evaluation.confusion_matrix(normalize=True)[0], [0, 0.5, 0, 0.5])


def test_per_class_worked_by_hand(tableware):
    precision, recall, f1, support = evaluate(tableware).per_class()
    np.testing.assert_array_equal(precision, [NAN, 7 / 8, 1, 11 / 12])
    np.testing.assert_array_equal(recall, [0, 1, 1, 1])
    np.testing.assert_allclose(f1, [0, 14 / 15, 1, 22 / 23])
    assert support.tolist() == [2, 7, 2, 11]


def test_agrees_with_sklearn(noisy):
    evaluation = evaluate(noisy)
    truth, predicted, K = noisy.labels, noisy.scores.argmax(axis=1), len(noisy.classes)
    assert evaluation.accuracy("micro") == pytest.approx(sklearn_metrics.accuracy_score(truth, predicted))
    assert evaluation.accuracy() == pytest.approx(sklearn_metrics.balanced_accuracy_score(truth, predicted))
    np.testing.assert_array_equal(
        evaluation.confusion_matrix(), sklearn_metrics.confusion_matrix(truth, predicted)
    )
    np.testing.assert_allclose(
        evaluation.confusion_matrix(normalize=True),
        sklearn_metrics.confusion_matrix(truth, predicted, normalize="true"),
    )
    np.testing.assert_allclose(
        evaluation.per_class(), sklearn_metrics.precision_recall_fscore_support(truth, predicted)
    )
    for k in range(1, K):
        scores = noisy.scores if K > 2 else noisy.scores[:, 1] - noisy.scores[:, 0]
        expected = sklearn_metrics.top_k_accuracy_score(truth, scores, k=k)
        assert evaluation.top_k_accuracy(k) == pytest.approx(expected)
    assert evaluation.top_k_accuracy(K) == 1


def test_top_k_agrees_with_what_top_shows_even_where_scores_are_equal():
    rng = np.random.default_rng(0)
    predictions = make_predictions(rng.integers(0, 3, (200, 6)), rng.integers(0, 6, 200))
    evaluation = evaluate(predictions)
    assert evaluation.top_k_accuracy(1) == evaluation.accuracy("micro")
    for k in range(1, 7):
        shown = (predictions.top(k) == predictions.labels[:, None]).any(axis=1)
        assert evaluation.top_k_accuracy(k) == shown.mean()


def test_unreadable_unlabelled_and_abstained_are_neither_right_nor_wrong():
    predictions = Predictions(
        scores=np.array([[1, 0], [1, 0], [NAN, NAN], [NAN, NAN], [0, 1], [0, 1]], np.float32),
        kind="margin",
        classes=("a", "b"),
        ids=("right", "wrong", "unreadable", "unreadable too", "unlabelled", "abstained"),
        labels=np.array([0, 1, 0, -1, -1, 1], np.int32),
        abstained=np.array([False, False, False, False, True, True]),
        errors={2: "truncated", 3: "not an image"},
    )
    evaluation = evaluate(predictions)
    assert evaluation.num_seen == 6
    assert evaluation.num_answered == 2
    assert (evaluation.num_unreadable, evaluation.num_unlabelled, evaluation.num_abstained) == (2, 1, 1)
    assert evaluation.confusion.tolist() == [[1, 0], [1, 0]]
    assert evaluation.accuracy("micro") == evaluation.top_k_accuracy(1) == 0.5
    assert evaluation.coverage == 2 / 3
    report = str(evaluation)
    assert "6 images seen: 2 answered, 1 abstained, 1 unlabelled, 2 unreadable" in report
    assert "2 answered of 3" in report


def test_a_class_without_images_has_no_recall_and_no_say_in_the_macro_accuracy():
    evaluation = evaluate(predictions_of([[3, 1, 0], [0, 0, 0], [0, 0, 2]], ("cup", "fork", "plate")))
    np.testing.assert_array_equal(evaluation.per_class().recall, [0.75, NAN, 1])
    np.testing.assert_array_equal(evaluation.per_class().precision, [1, 0, 1])
    assert evaluation.accuracy() == 0.875
    np.testing.assert_array_equal(evaluation.confusion_matrix(normalize=True)[1], [NAN] * 3)
    assert "no answered image: recall undefined, left out of the macro accuracy: fork\n" in str(evaluation)
    assert "mean recall of 2 classes" in str(evaluation)


def test_a_class_that_does_not_occur_at_all_has_no_f1():
    metrics = evaluate(predictions_of([[3, 0], [0, 0]])).per_class()
    assert np.isnan([metrics.precision[1], metrics.recall[1], metrics.f1[1]]).all()


def test_what_cannot_be_evaluated_is_an_error(tableware):
    for labels in (None, np.full(22, -1, np.int32)):
        with pytest.raises(UsageError, match="no labels"):
            evaluate(replace(tableware, labels=labels))
    with pytest.raises(UsageError, match="of 22 images 0 are unreadable, 0 unlabelled and 22 abstained from"):
        evaluate(replace(tableware, abstained=np.ones(22, np.bool_)))


def test_wrong_arguments_are_errors(tableware):
    evaluation = evaluate(tableware)
    with pytest.raises(UsageError, match="weighted"):
        evaluation.accuracy("weighted")
    for k in (0, 5):
        with pytest.raises(UsageError, match="number of classes, 4"):
            evaluation.top_k_accuracy(k)


def test_the_matrix_handed_out_is_a_copy(tableware):
    evaluation = evaluate(tableware)
    evaluation.confusion_matrix()[:] = 0
    assert evaluation.num_answered == 22


def test_the_report_of_few_classes(tableware):
    assert (
        str(evaluate(tableware))
        == """\
                                      95 % interval
accuracy (macro)           0.7500  0.6667 to 1.0000  mean recall of 4 classes
accuracy (micro)           0.9091  0.7727 to 1.0000           20 of 22 images
Cohen's kappa              0.8493  0.6283 to 1.0000
ROC AUC (macro)            0.8553  0.7819 to 1.0000
average precision (macro)  0.7206  0.6060 to 1.0000
log loss                   0.8346  0.7437 to 0.9709
calibration error          0.4337  0.2974 to 0.5246
22 images seen: 22 answered, 0 abstained, 0 unlabelled, 0 unreadable

Classes (- is undefined)
         precision  recall     F1  support
bowl             -   0.000  0.000        2
cup          0.875   1.000  0.933        7
cutlery      1.000   1.000  1.000        2
plate        0.917   1.000  0.957       11
never predicted: precision undefined: bowl

Confusion matrix (rows: truth, columns: prediction)
         bowl  cup  cutlery  plate
bowl        0    1        0      1
cup         0    7        0      0
cutlery     0    0        2      0
plate       0    0        0     11"""
    )


def large_evaluation(num_classes: int, mistakes: dict[tuple[int, int], int]) -> Evaluation:
    confusion = 5 * np.eye(num_classes, dtype=np.int64)
    for pair, count in mistakes.items():
        confusion[pair] = count
    return evaluate(predictions_of(confusion, tuple(f"species number {i}" for i in range(num_classes))))


def test_the_report_of_many_classes_names_the_most_confused():
    report = str(large_evaluation(200, {(17, 4): 9, (4, 17): 3}))
    assert report.endswith("""\
Most confused
truth -> prediction                    images
species number 17 -> species number 4       9
species number 4 -> species number 17       3""")
    worst = report.split("lowest recall, of 200")[1].splitlines()[2:4]
    assert worst == [
        "species number 17      0.625   0.357  0.455       14",
        "species number 4       0.357   0.625  0.455        8",
    ]
    assert len(report.splitlines()) < 30
    assert "No class was taken for another." in str(large_evaluation(20, {}))


def test_the_report_lists_only_some_of_many_undefined_classes():
    report = str(large_evaluation(30, {(i, i): 0 for i in range(15)}))
    assert report.count("species number 9 and 5 more") == 2


def test_the_report_stays_aligned_with_long_and_wide_names():
    names = ("茶碗", "an extraordinarily long name of a class that goes on", "new\nline")
    lines = str(evaluate(predictions_of([[1, 0, 0], [0, 1, 0], [0, 0, 1]], names))).splitlines()
    table = lines[lines.index("Classes (- is undefined)") + 1 :][:4]
    columns = [len(line) + 2 * line.count("茶碗") for line in table]
    assert len(set(columns)) == 1
    assert "new\N{REPLACEMENT CHARACTER}line" in table[3]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("abcdefgh", "abcdefgh"),
        ("abcdefghi", "abcd…ghi"),
        ("茶碗茶碗", "茶碗茶碗"),
        ("茶碗茶碗茶", "茶碗…茶"),
    ],
)
def test_shorten_counts_terminal_columns(name, expected):
    assert shorten(name, 8) == expected


def test_evaluation_loads_neither_jax_nor_matplotlib():
    program = "import jaxcls.evaluation, sys; print([m for m in ('jax', 'matplotlib') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


@pytest.fixture(params=["distinct", "tied"])
def scored(request) -> Predictions:
    """Scores of 5 classes, one of which no image is of; with or without equal ones."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 4, 400)
    scores = rng.normal(size=(400, 5))
    scores[np.arange(400), labels] += 1
    return make_predictions(scores if request.param == "distinct" else scores.round(), labels)


def test_curves_are_scikit_learns(scored):
    evaluation = evaluate(scored)
    for label in range(4):
        positive, scores = scored.labels == label, scored.scores[:, label]
        curve = evaluation.roc_curve(f"class {label}")
        expected = sklearn_metrics.roc_curve(positive, scores, drop_intermediate=False)
        for own, theirs in zip(curve, expected, strict=True):
            np.testing.assert_allclose(own, theirs)
        assert curve.area == pytest.approx(sklearn_metrics.roc_auc_score(positive, scores), abs=1e-12)
        curve = evaluation.pr_curve(f"class {label}")
        precision, recall, thresholds = sklearn_metrics.precision_recall_curve(positive, scores)
        np.testing.assert_allclose(curve.precision, precision[::-1])
        np.testing.assert_allclose(curve.recall, recall[::-1])
        np.testing.assert_allclose(curve.thresholds[1:], thresholds[::-1])
        average = sklearn_metrics.average_precision_score(positive, scores)
        assert curve.average_precision == pytest.approx(average, abs=1e-12)


def test_areas_are_averaged_as_scikit_learn_does(scored):
    evaluation = evaluate(scored)
    truth = np.eye(5, dtype=int)[scored.labels]
    for ours, theirs in (
        (evaluation.roc_auc, sklearn_metrics.roc_auc_score),
        (evaluation.average_precision, sklearn_metrics.average_precision_score),
    ):
        # Of the fifth class there is no image: it is undefined, and left out of the mean.
        expected = theirs(truth[:, :4], scored.scores[:, :4], average="macro")
        assert ours("macro") == pytest.approx(expected, abs=1e-12)
        assert ours("micro") == pytest.approx(theirs(truth, scored.scores, average="micro"), abs=1e-12)
        with pytest.raises(UsageError, match="weighted"):
            ours("weighted")
    with pytest.raises(UsageError, match="no class 'cup'"):
        evaluation.roc_curve("cup")


def test_numbers_of_probabilities_are_scikit_learns(scored):
    evaluation = evaluate(scored)
    chances = softmax(scored.scores.astype(np.float64), axis=1)
    expected = sklearn_metrics.log_loss(scored.labels, chances, labels=range(5))
    assert evaluation.log_loss() == pytest.approx(expected, rel=1e-5)
    assert evaluation.calibration_error() == calibration_error(scored.probabilities(), scored.labels)
    margins = replace(scored, kind="margin")
    for metric in (Evaluation.log_loss, Evaluation.calibration_error):
        with pytest.raises(UsageError, match="margins are not probabilities"):
            metric(evaluate(margins))
    assert "log loss" not in evaluate(margins).report()


def test_the_loss_of_a_sure_mistake_is_finite_and_of_sigmoids_relative():
    sure = replace(make_predictions([[1, 0], [1, 0]], [0, 1]), kind="probability")
    assert evaluate(sure).log_loss() == pytest.approx(-np.log(np.finfo(np.float32).tiny) / 2)
    sigmoids = replace(make_predictions([[0.6, 0.2]], [0]), kind="probability")
    assert evaluate(sigmoids).log_loss() == pytest.approx(-np.log(0.75), rel=1e-6)


def test_kappa(noisy, tableware):
    expected = sklearn_metrics.cohen_kappa_score(noisy.labels, noisy.predicted)
    assert evaluate(noisy).cohen_kappa() == pytest.approx(expected, abs=1e-12)
    # By hand: 20/22 agree; by chance (2 x 0 + 7 x 8 + 2 x 2 + 11 x 12) / 22^2.
    chance = 192 / 484
    assert evaluate(tableware).cohen_kappa() == pytest.approx((20 / 22 - chance) / (1 - chance))


def test_what_is_undefined_is_nan():
    one_class = evaluate(make_predictions([[1, 0], [2, 0]], [0, 0]))
    assert np.isnan(one_class.cohen_kappa())
    assert np.isnan(one_class.roc_auc("macro"))
    assert np.isnan(one_class.roc_curve("class 0").area)
    assert np.isnan(one_class.pr_curve("class 1").average_precision)
    assert one_class.roc_auc("micro") == 1
    assert " nan" not in one_class.report()


def test_a_resample_counts_as_images_that_are_repeated(scored):
    evaluation = evaluate(scored)
    resample = evaluation.resample(np.random.default_rng(1))
    assert resample.num_answered == 400
    assert resample.weights.max() > 1
    chosen = np.repeat(np.arange(400), resample.weights)
    repeated = evaluate(make_predictions(scored.scores[chosen], scored.labels[chosen]))
    assert np.array_equal(resample.confusion, repeated.confusion)
    assert np.array_equal(resample.rank_counts, repeated.rank_counts)
    for name, metric in NUMBERS.items():
        assert metric(resample) == pytest.approx(metric(repeated), abs=1e-9), name
    assert resample.roc_auc("micro") == pytest.approx(repeated.roc_auc("micro"), abs=1e-12)


def test_the_interval_of_a_share_is_the_binomial_one():
    evaluation = evaluate(predictions_of([[160, 40], [0, 200]]))
    low, high = evaluation.interval(lambda e: e.accuracy("micro"), num_resamples=4000)
    margin = 1.96 * np.sqrt(0.9 * 0.1 / 400)
    assert (low, high) == pytest.approx((0.9 - margin, 0.9 + margin), abs=0.004)
    narrow = evaluation.interval(lambda e: e.accuracy("micro"), level=0.5)
    assert low < narrow.low < narrow.high < high
    assert narrow == evaluation.interval(lambda e: e.accuracy("micro"), level=0.5)
    assert evaluation.interval(Evaluation.log_loss) != evaluation.interval(Evaluation.log_loss, seed=1)
    for wrong in ({"level": 1.0}, {"num_resamples": 0}):
        with pytest.raises(UsageError):
            evaluation.interval(Evaluation.cohen_kappa, **wrong)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        is_right = rng.random(150) < 0.8
        evaluation = evaluate(make_predictions(np.eye(2)[np.where(is_right, 0, 1)], np.zeros(150)))
        low, high = evaluation.interval(lambda e: e.accuracy("micro"), num_resamples=300)
        covered += low <= 0.8 <= high
    assert 0.9 <= covered / 200 <= 0.98


def test_an_undefined_number_has_no_interval():
    one_class = evaluate(make_predictions([[1, 0], [2, 0]], [0, 0]))
    assert np.isnan(one_class.interval(Evaluation.cohen_kappa)).all()


def test_the_report_gives_intervals(tableware):
    lines = evaluate(tableware).report().splitlines()
    (line,) = (line for line in lines if line.startswith("accuracy (micro)"))
    low, high = evaluate(tableware).interval(lambda e: e.accuracy("micro"))
    assert line.split() == f"accuracy (micro) 0.9091 {low:.4f} to {high:.4f} 20 of 22 images".split()


def test_large_reports_do_without_the_intervals_that_take_long(monkeypatch, scored):
    monkeypatch.setattr("jaxcls.evaluation.metrics.MAX_RESAMPLED", 100)
    found = numbers(evaluate(scored))
    assert found["ROC AUC (macro)"][1] is None
    assert found["accuracy (macro)"][1] is not None


def test_augmented_copies_are_evaluated_on_only_where_that_is_asked_for(tableware):
    copies = replace(tableware, is_copy=np.arange(22) < 5)
    with pytest.raises(
        UsageError, match=r"5 of 22 images are augmented copies.*originals.*allow_copies=True"
    ):
        evaluate(copies)
    assert evaluate(copies, allow_copies=True).accuracy("micro") == 20 / 22
    assert evaluate(replace(tableware, is_copy=np.zeros(22, bool))).accuracy("micro") == 20 / 22

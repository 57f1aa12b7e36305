"""What is on the axes: the drawn values, and that texts neither collide nor leave the figure."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from jaxcls.data.dataset import ID_DTYPE, from_items
from jaxcls.errors import UsageError
from jaxcls.evaluation import Evaluation, evaluate, plots
from jaxcls.evaluation.metrics import Answers
from jaxcls.evaluation.plots import plot_confusion_matrix, plot_training
from jaxcls.predictions import Predictions


def make_evaluation(confusion, classes=None) -> Evaluation:
    weights = np.asarray(confusion, np.int64).ravel()
    K = len(confusion)
    scores = np.tile(np.eye(K, dtype=np.float32), (K, 1))
    return Evaluation(
        classes=classes or tuple(f"a rather long name of class {i}" for i in range(K)),
        answers=Answers(scores, np.repeat(np.arange(K, dtype=np.int32), K), "logit"),
        weights=weights,
        num_seen=int(weights.sum()),
        num_unreadable=0,
        num_unlabelled=0,
        num_abstained=0,
    )


def boxes(texts):
    return [text.get_window_extent() for text in texts if text.get_text()]


def assert_apart(texts):
    extents = boxes(texts)
    assert not any(a.overlaps(b) for i, a in enumerate(extents) for b in extents[i + 1 :])


def test_cells_hold_the_counts_truth_downwards():
    ax = plot_confusion_matrix(make_evaluation([[5, 1], [0, 12]], ("cat", "dog")))
    assert {text.get_position(): text.get_text() for text in ax.texts} == {
        (0, 0): "5",
        (1, 0): "1",
        (0, 1): "0",
        (1, 1): "12",
    }
    np.testing.assert_array_equal(ax.images[0].get_array(), [[5, 1], [0, 12]])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["cat", "dog"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("prediction", "truth")
    assert "0.917 (macro), 0.944 (micro)" in ax.get_title()


def test_normalized_cells_leave_an_absent_class_blank():
    ax = plot_confusion_matrix(make_evaluation([[3, 1], [0, 0]]), normalize=True)
    assert [text.get_text() for text in ax.texts] == ["0.75", "0.25"]
    assert ax.images[0].get_array().mask[1].all()


def test_numbers_contrast_with_their_cells():
    ax = plot_confusion_matrix(make_evaluation([[100, 1], [30, 60]]))
    ax.figure.canvas.draw()
    for text, cell in zip(ax.texts, ax.images[0].to_rgba(np.array([100, 1, 30, 60])), strict=True):
        brightness = cell[:3] @ [0.299, 0.587, 0.114]
        assert text.get_color() == ("white" if brightness < 0.5 else "black")


@pytest.mark.parametrize("num_classes", [2, 10, 20, 200])
def test_readable_with_few_and_many_classes(num_classes, tmp_path):
    ax = plot_confusion_matrix(make_evaluation(100 * np.eye(num_classes) + 1))
    ax.figure.savefig(tmp_path / "matrix.png")
    for labels in (ax.get_xticklabels(), ax.get_yticklabels(), ax.texts if num_classes < 200 else []):
        assert_apart(labels)
        assert all(
            ax.figure.bbox.containsx(box.x0) and ax.figure.bbox.containsy(box.y0) for box in boxes(labels)
        )
    assert len(ax.texts) == (num_classes**2 if num_classes < 200 else 0)
    assert len(ax.figure.axes) == (1 if num_classes < 200 else 2)
    assert len(ax.get_xticks()) >= min(num_classes, 40)


def test_numbers_fit_small_axes_of_the_caller():
    figure = Figure(figsize=(8, 4), layout="constrained")
    ax, other = figure.subplots(1, 2)
    assert plot_confusion_matrix(make_evaluation(200 * np.eye(10) + 100), ax=ax) is ax
    figure.draw_without_rendering()
    assert ax.texts
    assert_apart(ax.texts)
    assert_apart(ax.get_yticklabels())
    assert not other.has_data()


def test_class_names_are_not_markup(tmp_path):
    ax = plot_confusion_matrix(make_evaluation(np.eye(2), ("$\\frac$ 5", "été_β")))
    ax.figure.savefig(tmp_path / "matrix.png")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["$\\frac$ 5", "été_β"]


def test_training_draws_what_was_measured():
    history = [
        {"epoch": 1, "train_accuracy": 0.5, "eval_accuracy": None},
        {"epoch": 2, "train_accuracy": 0.7, "eval_accuracy": 0.0},
        {"epoch": 3, "train_accuracy": 0.8},
        {"epoch": 4, "train_accuracy": 0.9, "eval_accuracy": 0.75},
    ]
    ax = plot_training(history)
    training, evaluation = ax.lines
    assert training.get_xydata().tolist() == [[1, 0.5], [2, 0.7], [3, 0.8], [4, 0.9]]
    assert evaluation.get_xydata().tolist() == [[2, 0.0], [4, 0.75]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["training", "evaluation"]
    assert all(tick == int(tick) for tick in ax.get_xticks())


def test_training_without_an_evaluation_set(tmp_path):
    figure = Figure()
    given = figure.add_subplot()
    ax = plot_training([{"epoch": 1, "train_accuracy": 0.5}], ax=given)
    figure.savefig(tmp_path / "training.png")
    assert ax is given
    assert len(ax.lines) == 1


@pytest.mark.parametrize("history", [[], [{"epoch": 1, "train_accuracy": None}]])
def test_training_without_numbers_is_an_error(history):
    with pytest.raises(UsageError, match="nothing to plot"):
        plot_training(history)


def test_plots_leave_pyplot_alone(tmp_path):
    program = f"""
import sys
from jaxcls.evaluation import plots
ax = plots.plot_training([{{"epoch": 1, "train_accuracy": 0.5}}])
ax.figure.savefig({str(tmp_path / "training.png")!r})
print("matplotlib.pyplot" in sys.modules)
"""
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == "False"
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def scored() -> Predictions:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60).astype(np.int32)
    scores = rng.normal(size=(60, 3)).astype(np.float32)
    scores[np.arange(60), labels] += 1.5
    ids = tuple(f"{i}.png" for i in range(60))
    return Predictions(scores, "logit", ("cup", "$plate$", "bowl"), ids, labels, np.zeros(60, np.bool_))


@pytest.mark.parametrize("num_classes", [2, 200])
@pytest.mark.parametrize("plot", [plots.plot_roc, plots.plot_pr])
def test_curves_with_few_and_with_many_classes(plot, num_classes, tmp_path):
    rng = np.random.default_rng(1)
    labels = np.arange(4 * num_classes, dtype=np.int32) % num_classes
    scores = rng.normal(size=(len(labels), num_classes)).astype(np.float32)
    names = tuple(f"class {i}" for i in range(num_classes))
    ids = tuple(map(str, range(len(labels))))
    evaluation = evaluate(Predictions(scores, "margin", names, ids, labels, np.zeros(len(labels), np.bool_)))
    ax = plot(evaluation)
    plots.save(ax, tmp_path / "plot.png")
    shown = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(shown) == 1 + min(num_classes, plots.MAX_CURVES)
    values = [float(text.rpartition("(")[2].rstrip(")")) for text in shown[1:]]
    if num_classes > plots.MAX_CURVES:  # the worst
        metric = {plots.plot_roc: lambda n: evaluation.roc_curve(n).area,
                  plots.plot_pr: lambda n: evaluation.pr_curve(n).average_precision}[plot]  # fmt: skip
        assert values == pytest.approx(sorted(map(metric, names))[: plots.MAX_CURVES], abs=6e-4)


def test_the_curves_are_those_of_the_evaluation(scored):
    evaluation = evaluate(scored)
    given = plots.new_axes((3, 3))
    ax = plots.plot_roc(evaluation, given, classes=["bowl"])
    assert ax is given
    line = ax.get_lines()[-1]
    curve = evaluation.roc_curve("bowl")
    np.testing.assert_array_equal(line.get_xdata(), curve.false_positive_rate)
    np.testing.assert_array_equal(line.get_ydata(), curve.true_positive_rate)
    curve = evaluation.pr_curve("bowl")
    np.testing.assert_array_equal(
        plots.plot_pr(evaluation, classes=["bowl"]).get_lines()[-1].get_ydata(), curve.precision
    )


def test_reliability(scored, tmp_path):
    evaluation = evaluate(scored)
    ax = plots.plot_reliability(evaluation, num_bins=5)
    bins = evaluation.calibration_bins(5)
    filled = bins.num_images > 0
    np.testing.assert_array_equal(ax.get_lines()[-1].get_ydata(), bins.accuracy[filled])
    plots.save(ax, tmp_path / "reliability.png")
    with pytest.raises(UsageError, match="margins"):
        plots.plot_reliability(evaluate(replace(scored, kind="margin")))


def test_examples_show_the_worst_mistakes_first(scored, tmp_path):
    images = [np.full((40, 60, 3), i, np.uint8) for i in range(60)]
    dataset = replace(from_items(images), ids=np.asarray(scored.ids, ID_DTYPE))
    ax = plots.plot_examples(scored, dataset)
    plots.save(ax, tmp_path / "examples.png")
    rest = scored.scores.copy()
    rest[np.arange(60), scored.labels] = -np.inf
    behind = rest.max(axis=1) - scored.scores[np.arange(60), scored.labels]
    expected = np.argsort(-behind, kind="stable")[: plots.MAX_EXAMPLES]
    assert [np.asarray(image.get_array())[0, 0, 0] for image in ax.get_images()] == expected.tolist()
    texts = [text.get_text() for text in ax.texts]
    worst = expected[0]
    names = scored.classes
    assert texts[0] == f"{names[scored.predicted[worst]]}\nnot {names[scored.labels[worst]]}"
    chosen = plots.plot_examples(scored, dataset, indices=[7])
    assert [np.asarray(image.get_array())[0, 0, 0] for image in chosen.get_images()] == [7]
    with pytest.raises(UsageError, match="no photos"):
        plots.plot_examples(scored, dataset, indices=[])


def test_curves_of_many_points_are_thinned_to_what_can_be_seen():
    x = np.linspace(0, 1, 1_000_001)
    thin_x, thin_y = plots._thinned(x, x**2)
    assert len(thin_x) < 4 * plots.CURVE_STEPS * 2
    assert (thin_x[0], thin_x[-1]) == (0, 1)
    assert np.abs(np.interp(x, thin_x, thin_y) - x**2).max() < 1 / plots.CURVE_STEPS
    step = np.array([0, 0, 1]), np.array([0, 1, 1])
    assert np.array_equal(plots._thinned(*step), step)

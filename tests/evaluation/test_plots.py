"""What is on the axes: the drawn values, and that texts neither collide nor leave the figure."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from jaxcls.errors import UsageError
from jaxcls.evaluation import Evaluation
from jaxcls.evaluation.plots import plot_confusion_matrix, plot_training


def make_evaluation(confusion, classes=None) -> Evaluation:
    confusion = np.asarray(confusion, np.int64)
    K, total = len(confusion), int(confusion.sum())
    return Evaluation(
        classes=classes or tuple(f"a rather long name of class {i}" for i in range(K)),
        confusion=confusion,
        rank_counts=np.eye(1, K, dtype=np.int64)[0] * total,
        num_seen=total,
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

"""Plots of evaluations and training runs.

Each takes a Matplotlib `ax` and returns it. Without one it draws on a new figure of its own, outside pyplot's
global state and needing no display: `save(plot_confusion_matrix(evaluation), "confusion.png")`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jaxcls.data.dataset import Dataset
from jaxcls.errors import UsageError
from jaxcls.evaluation.metrics import Evaluation
from jaxcls.evaluation.text import shorten
from jaxcls.predictions import Predictions, lags

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, told apart under every form of colour blindness.
BLUE, VERMILION = "#0072B2", "#D55E00"
COLOURS = (BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
LINES = ("-", "--", "-.", ":")
POOLED: dict[str, Any] = {"color": "black", "linewidth": 2}
MAX_CURVES = len(COLOURS)
"""With more classes than this, the worst of them are drawn."""

CURVE_STEPS = 2000
"""Curves are drawn to this fraction of an axis."""

MAX_EXAMPLES = 12
THUMBNAIL = 160
"""Pixels of a side."""
ROW = 1.3
"""Height of a row of examples, in widths of a column: below a photo stand two lines."""

MIN_FONT_POINTS = 5
DIGIT_WIDTH = 0.65  # of the font size, in Matplotlib's default font


def plot_confusion_matrix(evaluation: Evaluation, ax: Axes | None = None, normalize: bool = False) -> Axes:
    """Draw the confusion matrix: a row for each true class, a column for each predicted one.

    Cells carry their numbers where these fit; else a colour bar explains them. Where there is no room for
    every class name, evenly spaced ones are shown.

    Args:
        normalize: False for counts; True for shares of each true class (grey where a class has no image).
    """
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    K = len(evaluation.classes)
    if ax is None:
        side = min(4 + 0.4 * K, 12)
        ax = new_axes((side, side))
    matrix = evaluation.confusion_matrix(normalize)
    # The square root lets single mistakes be seen beside a diagonal of hundreds.
    norm = PowerNorm(0.5, vmin=0, vmax=float(np.nanmax(matrix)))
    image = ax.imshow(matrix, cmap=colormaps["Blues"].with_extremes(bad="0.85"), norm=norm)
    ax.set(xlabel="prediction", ylabel="truth")
    accuracies = [f"{evaluation.accuracy(average):.3f} ({average})" for average in ("macro", "micro")]
    ax.set_title(f"accuracy {', '.join(accuracies)}\n{evaluation.num_answered} images", fontsize="medium")
    _name_ticks(ax, evaluation.classes)
    # The texts take their room from the cells: measure these only after the figure is laid out.
    ax.figure.get_figure(root=True).draw_without_rendering()
    _name_ticks(ax, evaluation.classes)
    if not _write_numbers(ax, matrix, norm(matrix) > 0.6):
        label = "share of the true class" if normalize else "images"
        ax.figure.colorbar(image, ax=ax, label=label, shrink=0.8)
    return ax


def plot_training(history: Sequence[Mapping[str, Any]], ax: Axes | None = None) -> Axes:
    """Draw accuracy against epochs.

    Args:
        history: one mapping for each epoch: `epoch` (from 1), `train_accuracy` and `eval_accuracy` in [0, 1];
            an accuracy that was not measured is missing or None.

    Raises:
        UsageError: no accuracy was measured.
    """
    from matplotlib.ticker import MaxNLocator

    styles: dict[str, dict[str, Any]] = {
        "train_accuracy": {"label": "training", "color": VERMILION, "marker": "s", "linestyle": "--"},
        "eval_accuracy": {"label": "evaluation", "color": BLUE, "marker": "o", "linestyle": "-"},
    }
    measured = {key: [row for row in history if row.get(key) is not None] for key in styles}
    if not any(measured.values()):
        raise UsageError("nothing to plot: the history has no train_accuracy and no eval_accuracy")
    if ax is None:
        ax = new_axes((6, 4))
    for key, rows in measured.items():
        if rows:
            ax.plot([row["epoch"] for row in rows], [row[key] for row in rows], markersize=4, **styles[key])
    ax.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1.02))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right")
    return ax


def plot_roc(evaluation: Evaluation, ax: Axes | None = None, *, classes: Sequence[str] | None = None) -> Axes:
    """Draw the ROC curve of each class against all others, and of all pairs of image and class pooled.

    Args:
        evaluation: what to draw.
        ax: where.
        classes: whose curves. Default: all, or, of many, those of smallest area.

    Raises:
        UsageError: an unknown class.
    """
    curves = {name: evaluation.roc_curve(name) for name in classes or evaluation.classes}
    areas = {name: curve.area for name, curve in curves.items()}
    ax = new_axes((5.5, 6)) if ax is None else ax
    ax.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    pooled = evaluation.roc_curve()
    looks = [(pooled, "pooled", pooled.area, POOLED)]
    looks += [(curves[name], name, areas[name], style) for name, style in _styles(areas)]
    for curve, name, area, style in looks:
        points = _thinned(curve.false_positive_rate, curve.true_positive_rate)
        ax.plot(*points, **style, label=_label(name, area))
    ax.set(xlabel="false positive rate", ylabel="true positive rate", title=_title("area under ROC", areas))
    return _finish_curves(ax)


def plot_pr(evaluation: Evaluation, ax: Axes | None = None, *, classes: Sequence[str] | None = None) -> Axes:
    """Draw precision against recall of each class, and of all pairs of image and class pooled.

    Args:
        evaluation: what to draw.
        ax: where.
        classes: whose curves. Default: all, or, of many, those of lowest average precision.

    Raises:
        UsageError: an unknown class.
    """
    curves = {name: evaluation.pr_curve(name) for name in classes or evaluation.classes}
    averages = {name: curve.average_precision for name, curve in curves.items()}
    ax = new_axes((5.5, 6)) if ax is None else ax
    pooled = evaluation.pr_curve()
    looks = [(pooled, "pooled", pooled.average_precision, POOLED)]
    looks += [(curves[name], name, averages[name], style) for name, style in _styles(averages)]
    for curve, name, average, style in looks:
        points = _thinned(curve.recall, curve.precision)
        ax.step(*points, where="pre", **style, label=_label(name, average))
    ax.set(xlabel="recall", ylabel="precision", title=_title("average precision", averages))
    return _finish_curves(ax)


def plot_reliability(evaluation: Evaluation, ax: Axes | None = None, *, num_bins: int = 15) -> Axes:
    """Draw how often answers were right against how probable they were said to be; the diagonal is honest.

    The area of a point grows with the number of answers that it stands for.

    Raises:
        UsageError: the scores are margins, which are no probabilities; or fewer than one bin.
    """
    bins = evaluation.calibration_bins(num_bins)
    ax = new_axes((5, 5)) if ax is None else ax
    ax.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    filled = bins.num_images > 0
    sizes = 20 + 280 * bins.num_images[filled] / bins.num_images.max()
    ax.plot(bins.confidence[filled], bins.accuracy[filled], color=BLUE, linewidth=1)
    ax.scatter(bins.confidence[filled], bins.accuracy[filled], s=sizes, color=BLUE, alpha=0.7)
    ax.set(xlabel="probability of the answer", ylabel="share of right answers",
           title=f"expected calibration error {bins.error:.3f}")  # fmt: skip
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    ax.grid(alpha=0.3)
    return ax


def plot_examples(
    predictions: Predictions,
    dataset: Dataset,
    ax: Axes | None = None,
    *,
    indices: Sequence[int] | None = None,
) -> Axes:
    """Draw photos with what was answered, mistakes first.

    Args:
        predictions: of photos of `dataset`, found by their ids.
        dataset: the photos.
        ax: where.
        indices: positions in `predictions`. Default: those where the true class is furthest behind.

    Raises:
        UsageError: there is no readable photo to draw.
        DatasetError: a photo that the dataset does not have.
        ImageError: a photo that cannot be read.
    """
    chosen = _most_wrong(predictions) if indices is None else list(indices)
    if not chosen:
        raise UsageError("no photos to draw: none could be read")
    photos = dataset.select_ids([predictions.ids[i] for i in chosen])
    num_columns = math.ceil(math.sqrt(1.5 * len(chosen)))
    num_rows = math.ceil(len(chosen) / num_columns)
    ax = new_axes((1.9 * num_columns, 1.9 * ROW * num_rows)) if ax is None else ax
    for place, index in enumerate(chosen):
        row, column = divmod(place, num_columns)
        image = Image.fromarray(photos.image(place, short_side=THUMBNAIL))
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        half = np.asarray(image.size) / (2.05 * THUMBNAIL)
        centre = ROW * row
        box = (column - half[0], column + half[0], centre + half[1], centre - half[1])
        ax.imshow(image, extent=box, aspect="equal", interpolation="bilinear")
        text, is_right = _verdict(predictions, index)
        ax.text(column, centre + half[1] + 0.03, text, ha="center", va="top", fontsize=7, parse_math=False,
                color="black" if is_right else VERMILION)  # fmt: skip
    ax.set(xlim=(-0.55, num_columns - 0.45), ylim=(ROW * num_rows - 0.55, -0.55))
    ax.set_axis_off()
    return ax


def save(ax: Axes, path: str | Path) -> None:
    """Write the figure that holds `ax`; the suffix decides the format."""
    ax.figure.get_figure(root=True).savefig(path)


def new_axes(size_inches: tuple[float, float]) -> Axes:
    """Axes on a new figure of their own."""
    from matplotlib.figure import Figure

    return Figure(figsize=size_inches, layout="constrained").add_subplot()


def _styles(values: Mapping[str, float]) -> list[tuple[str, dict[str, Any]]]:
    """A look for each of the classes to draw, those of lowest value where there are many."""
    defined = [name for name, value in values.items() if not math.isnan(value)]
    if len(defined) > MAX_CURVES:
        defined = sorted(defined, key=values.__getitem__)[:MAX_CURVES]
    return [
        (name, {"color": COLOURS[i % MAX_CURVES], "linestyle": LINES[i % len(LINES)], "linewidth": 1.2})
        for i, name in enumerate(defined)
    ]


def _title(what: str, values: Mapping[str, float]) -> str:
    num_defined = sum(not math.isnan(value) for value in values.values())
    if num_defined > MAX_CURVES:
        return f"{what}: the {MAX_CURVES} lowest of {num_defined} classes"
    absent = len(values) - num_defined
    return what if not absent else f"{what} ({absent} of {len(values)} classes undefined)"


def _thinned(
    x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The points of a curve that can be told apart: pooled curves may have millions."""
    places = np.round(np.stack([x, y]) * CURVE_STEPS)
    moves = (places[:, 1:] != places[:, :-1]).any(axis=0)
    kept = np.append(True, moves) | np.append(moves, True)
    return x[kept], y[kept]


def _label(name: str, value: float) -> str:
    return f"{shorten(name, 24)} ({value:.3f})".replace("$", r"\$")


def _finish_curves(ax: Axes) -> Axes:
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    ax.grid(alpha=0.3)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize="small", frameon=False)
    return ax


def _most_wrong(predictions: Predictions) -> list[int]:
    """The readable photos whose true class is furthest below the best other; without labels, the unsurest."""
    readable = np.flatnonzero(~predictions.unreadable)
    scores = predictions.scores[readable]
    labels = np.full(len(readable), -1) if predictions.labels is None else predictions.labels[readable]
    behind = lags(scores, np.where(labels >= 0, labels, scores.argmax(axis=1)))
    return readable[np.argsort(-behind, kind="stable")[:MAX_EXAMPLES]].tolist()


def _verdict(predictions: Predictions, index: int) -> tuple[str, bool]:
    """What to write below a photo, and whether its answer is right or cannot be judged."""
    label = -1 if predictions.labels is None else int(predictions.labels[index])
    predicted = int(predictions.predicted[index])
    answer = "(abstained)" if predicted < 0 else shorten(predictions.classes[predicted], 18)
    if label in (-1, predicted):
        return answer, True
    return f"{answer}\nnot {shorten(predictions.classes[label], 18)}", False


def _write_numbers(ax: Axes, matrix: NDArray[Any], dark: NDArray[np.bool_]) -> bool:
    """Write each cell's number into it and return True, or return False where the longest does not fit."""
    form = "d" if np.issubdtype(matrix.dtype, np.integer) else ".2f"
    longest = len(format(np.nanmax(matrix), form))
    fontsize = min(10, _side_points(ax) / len(matrix) / (DIGIT_WIDTH * longest + 0.4))
    if fontsize < MIN_FONT_POINTS:
        return False
    for (row, column), number in np.ndenumerate(matrix):
        if not np.isnan(number):
            color = "white" if dark[row, column] else "black"
            ax.text(
                column, row, format(number, form), ha="center", va="center", fontsize=fontsize, color=color
            )
    return True


def _name_ticks(ax: Axes, classes: Sequence[str]) -> None:
    side_points = _side_points(ax)
    cell_points = side_points / len(classes)
    fontsize = 9 if cell_points > 12 else 7
    max_width = max(8, min(24, int(0.4 * side_points / (DIGIT_WIDTH * fontsize))))
    ticks = range(0, len(classes), math.ceil(1.3 * fontsize / cell_points))
    names = [shorten(classes[i], max_width) for i in ticks]
    upright = max(map(len, names)) * DIGIT_WIDTH * fontsize > cell_points
    # parse_math=False: a class name may hold a dollar sign.
    ax.set_yticks(ticks, names, fontsize=fontsize, parse_math=False)
    ax.set_xticks(ticks, names, fontsize=fontsize, parse_math=False, rotation=90 if upright else 0)


def _side_points(ax: Axes) -> float:
    """The shorter side of the axes in points, the unit of font sizes."""
    return 72 * min(ax.bbox.width, ax.bbox.height) / ax.figure.dpi

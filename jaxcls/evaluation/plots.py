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

from jaxcls.errors import UsageError
from jaxcls.evaluation.metrics import Evaluation, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of Okabe and Ito's palette, so told apart under every form of colour blindness.
BLUE, VERMILION = "#0072B2", "#D55E00"

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


def save(ax: Axes, path: str | Path) -> None:
    """Write the figure that holds `ax`; the suffix decides the format."""
    ax.figure.get_figure(root=True).savefig(path)


def new_axes(size_inches: tuple[float, float]) -> Axes:
    """Axes on a new figure of their own."""
    from matplotlib.figure import Figure

    return Figure(figsize=size_inches, layout="constrained").add_subplot()


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

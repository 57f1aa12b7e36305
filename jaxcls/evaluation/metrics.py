"""Evaluation: what a set of predictions is worth, kept as counts from which every metric is computed."""

import unicodedata
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxcls.errors import UsageError
from jaxcls.predictions import Predictions, require_rank

Average = Literal["macro", "micro"]

# The report shows so many classes, names or mistakes. With more classes it leaves the confusion matrix out:
# ten columns of ten characters are what a terminal has room for.
MAX_LISTED = 10


class ClassMetrics(NamedTuple):
    """Metrics of each class; NaN where undefined.

    Attributes:
        precision: float64 [K]; undefined for a class that was never predicted.
        recall: float64 [K]; undefined for a class without answered images.
        f1: float64 [K]: 2 TP / (2 TP + FP + FN); undefined where neither occurs.
        support: int64 [K]: answered images whose true class this is.
    """

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]
    support: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Counts over a test set of N images and K classes; printed, it is its `report`.

    Every image is counted once: as unreadable, else unlabelled, else abstained, else answered. Metrics are
    over the answered images alone; `coverage` says how many of the labelled ones that is.

    Attributes:
        classes: the K class names.
        confusion: int64 [K, K]: answered images; rows are the true classes, columns the predicted ones.
        rank_counts: int64 [K]: answered images whose true class had the highest score, the second, and so on.
            Of equal scores the earlier class counts as the higher, as in `Predictions.top`.
        num_seen: N, all images.
        num_unreadable: images that could not be read: neither right nor wrong.
        num_unlabelled: images read, whose true class is unknown.
        num_abstained: images read and labelled, for which the classifier declined to answer.
    """

    classes: tuple[str, ...]
    confusion: NDArray[np.int64]
    rank_counts: NDArray[np.int64]
    num_seen: int
    num_unreadable: int
    num_unlabelled: int
    num_abstained: int

    @property
    def num_answered(self) -> int:
        """Images that were read, are labelled and got an answer."""
        return int(self.confusion.sum())

    @property
    def coverage(self) -> float:
        """The share, in (0, 1], of the read and labelled images that got an answer."""
        return self.num_answered / (self.num_answered + self.num_abstained)

    def accuracy(self, average: Average = "macro") -> float:
        """Accuracy in [0, 1] over the answered images.

        Args:
            average: "macro", the mean recall of the classes that have answered images (scikit-learn's
                `balanced_accuracy_score`): each class weighs the same. "micro", the share of images that are
                right: each image weighs the same.

        Raises:
            UsageError: another average.
        """
        if average == "macro":
            return float(np.nanmean(self.per_class().recall))
        if average == "micro":
            return int(np.trace(self.confusion)) / self.num_answered
        raise UsageError(
            f'average is {average!r}: it must be "macro" (each class weighs the same) or "micro"'
        )

    def top_k_accuracy(self, k: int) -> float:
        """The share of answered images whose true class is among `Predictions.top(k)`.

        With k=1 it is the micro accuracy: equal scores are ordered alike in both.

        Raises:
            UsageError: k is not from 1 to K.
        """
        require_rank(k, len(self.classes))
        return int(self.rank_counts[:k].sum()) / self.num_answered

    def confusion_matrix(self, normalize: bool = False) -> NDArray[np.int64] | NDArray[np.float64]:
        """[K, K], rows the true classes, columns the predicted ones.

        Args:
            normalize: False for int64 counts; True for float64 shares of each true class, where a row sums
                to 1 and the diagonal is the recall; NaN in the row of a class without answered images.
        """
        if not normalize:
            return self.confusion.copy()
        return _ratio(self.confusion, self.confusion.sum(axis=1, keepdims=True))

    def per_class(self) -> ClassMetrics:
        """Precision, recall, F1 and support of each class; NaN where undefined."""
        correct = np.diagonal(self.confusion)
        support, predicted = self.confusion.sum(axis=1), self.confusion.sum(axis=0)
        return ClassMetrics(
            precision=_ratio(correct, predicted),
            recall=_ratio(correct, support),
            f1=_ratio(2 * correct, support + predicted),
            support=support,
        )

    def report(self) -> str:
        """Text for a terminal: both accuracies, the counts, the classes and what was taken for what.

        With more than MAX_LISTED classes it shows those of lowest recall and the most frequent mistakes.
        """
        return "\n\n".join((_summary(self), _class_table(self), _confusion_table(self)))

    def __str__(self) -> str:
        return self.report()


def evaluate(predictions: Predictions) -> Evaluation:
    """Compare predictions with the labels they carry.

    Raises:
        UsageError: there are no labels, or no labelled image was read and answered.
    """
    labels = predictions.labels
    if labels is None or not (labels >= 0).any():
        raise UsageError("the predictions carry no labels: predict on a labelled dataset to evaluate")
    readable = ~predictions.unreadable
    labelled = readable & (labels >= 0)
    answered = labelled & ~predictions.abstained
    if not answered.any():
        raise UsageError(
            f"nothing to evaluate: of {len(predictions)} images {len(predictions.errors)} are unreadable,"
            f" {(readable & ~labelled).sum()} unlabelled and {labelled.sum()} abstained from"
        )
    truth = labels[answered]
    K = len(predictions.classes)
    confusion = np.zeros((K, K), np.int64)
    np.add.at(confusion, (truth, predictions.predicted[answered]), 1)
    return Evaluation(
        classes=predictions.classes,
        confusion=confusion,
        rank_counts=np.bincount(_ranks(predictions.scores[answered], truth), minlength=K),
        num_seen=len(predictions),
        num_unreadable=len(predictions.errors),
        num_unlabelled=int((readable & ~labelled).sum()),
        num_abstained=int((labelled & predictions.abstained).sum()),
    )


def shorten(name: str, max_width: int) -> str:
    """`name` on one line, its middle left out where it is longer than `max_width` terminal columns."""
    name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    if _columns(name) <= max_width:
        return name
    middle = len(name) // 2
    head, tail = name[:middle], name[middle:]
    while _columns(head) + 1 + _columns(tail) > max_width:
        head, tail = (head[:-1], tail) if len(head) > len(tail) else (head, tail[1:])
    return f"{head}…{tail}"


def _ranks(scores: NDArray[np.float32], truth: NDArray[np.int32]) -> NDArray[np.int64]:
    """How many classes come before the true one: int64 [N] from float32 [N, K] and int32 [N]."""
    own = np.take_along_axis(scores, truth[:, None], axis=1)
    earlier = np.arange(scores.shape[1]) < truth[:, None]
    return ((scores > own) | ((scores == own) & earlier)).sum(axis=1)


def _ratio(numerator: NDArray[np.int64], denominator: NDArray[np.int64]) -> NDArray[np.float64]:
    """Quotients; NaN where the denominator is 0."""
    return numerator / np.where(denominator == 0, np.nan, denominator)


def _summary(evaluation: Evaluation) -> str:
    e = evaluation
    num_present = int((e.per_class().support > 0).sum())
    lines = [
        f"accuracy (macro)  {e.accuracy('macro'):.4f}  mean recall of {num_present} classes",
        f"accuracy (micro)  {e.accuracy('micro'):.4f}  {np.trace(e.confusion)} of {e.num_answered} images",
    ]
    if e.num_abstained:
        labelled = e.num_answered + e.num_abstained
        lines.append(f"coverage          {e.coverage:.4f}  {e.num_answered} answered of {labelled} images")
    lines.append(
        f"{e.num_seen} images seen: {e.num_answered} answered, {e.num_abstained} abstained,"
        f" {e.num_unlabelled} unlabelled, {e.num_unreadable} unreadable"
    )
    return "\n".join(lines)


def _class_table(evaluation: Evaluation) -> str:
    metrics = evaluation.per_class()
    K = len(evaluation.classes)
    if K <= MAX_LISTED:
        title, shown = "Classes (- is undefined)", np.arange(K)
    else:
        title = f"The {MAX_LISTED} classes of lowest recall, of {K} (- is undefined)"
        shown = np.argsort(metrics.recall, kind="stable")[:MAX_LISTED]
    header = ["", "precision", "recall", "F1", "support"]
    rows = [
        [
            shorten(evaluation.classes[i], 32),
            *("-" if np.isnan(value[i]) else f"{value[i]:.3f}" for value in metrics[:3]),
            str(metrics.support[i]),
        ]
        for i in shown
    ]
    absent, unpredicted = metrics.support == 0, np.isnan(metrics.precision)
    notes = [
        _note(evaluation, absent, "no answered image: recall undefined, left out of the macro accuracy"),
        _note(evaluation, unpredicted, "never predicted: precision undefined"),
    ]
    return "\n".join([title, format_table([header, *rows]), *filter(None, notes)])


def _note(evaluation: Evaluation, mask: NDArray[np.bool_], meaning: str) -> str:
    names = [shorten(evaluation.classes[i], 32) for i in np.flatnonzero(mask)]
    if not names:
        return ""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"{meaning}: {', '.join(names[:MAX_LISTED])}{more}"


def _confusion_table(evaluation: Evaluation) -> str:
    classes, confusion = evaluation.classes, evaluation.confusion
    if len(classes) <= MAX_LISTED:
        header = ["", *(shorten(name, 10) for name in classes)]
        rows = [[shorten(name, 20), *map(str, row)] for name, row in zip(classes, confusion, strict=True)]
        return "Confusion matrix (rows: truth, columns: prediction)\n" + format_table([header, *rows])
    mistakes = confusion - np.diag(np.diagonal(confusion))
    worst = np.argsort(-mistakes, axis=None, kind="stable")[:MAX_LISTED]
    pairs = [divmod(int(i), len(classes)) for i in worst if mistakes.flat[i]]
    if not pairs:
        return "No class was taken for another."
    names = [shorten(name, 32) for name in classes]
    rows = [[f"{names[row]} -> {names[column]}", str(mistakes[row, column])] for row, column in pairs]
    return "Most confused\n" + format_table([["truth -> prediction", "images"], *rows])


def format_table(rows: list[list[str]]) -> str:
    """Columns two spaces apart: the first flush left, the others flush right."""
    widths = [max(map(_columns, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        gaps = [" " * (width - _columns(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [row[0] + gaps[0], *(gap + cell for cell, gap in zip(row[1:], gaps[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _columns(text: str) -> int:
    """Terminal columns that a text takes: two for a wide East Asian character, none for a combining one."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)

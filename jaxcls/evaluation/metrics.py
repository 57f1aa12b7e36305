"""Evaluation: what a set of predictions is worth, kept as counts from which every metric is computed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxcls.errors import UsageError
from jaxcls.evaluation.curves import Order, PrCurve, RocCurve, order_by_score, pr_curve, roc_curve
from jaxcls.evaluation.intervals import Interval, bootstrap
from jaxcls.evaluation.text import format_table, shorten
from jaxcls.evaluation.thresholds import CalibrationBins, calibration_bins
from jaxcls.predictions import Kind, Predictions, probabilities, require_rank

Average = Literal["macro", "micro"]

# The report shows so many classes, names or mistakes. With more classes it leaves the confusion matrix out:
# ten columns of ten characters are what a terminal has room for.
MAX_LISTED = 10

SMALLEST_PROBABILITY = float(np.finfo(np.float32).tiny)


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
class Answers:
    """What was answered, image by image, and what follows from it once for all.

    Attributes:
        scores: float32 [M, K], finite.
        truth: int32 [M].
        kind: of the scores.
    """

    scores: NDArray[np.float32]
    truth: NDArray[np.int32]
    kind: Kind

    @cached_property
    def predicted(self) -> NDArray[np.int64]:
        """int64 [M]: the class of highest score, the first of equals."""
        return self.scores.argmax(axis=1)

    @cached_property
    def ranks(self) -> NDArray[np.int64]:
        """int64 [M]: how many classes come before the true one, of equals the earlier."""
        own = np.take_along_axis(self.scores, self.truth[:, None], axis=1)
        earlier = np.arange(self.scores.shape[1]) < self.truth[:, None]
        return ((self.scores > own) | ((self.scores == own) & earlier)).sum(axis=1)

    @cached_property
    def probabilities(self) -> NDArray[np.float32]:
        """float32 [M, K].

        Raises:
            UsageError: the scores are margins.
        """
        return probabilities(self.scores, self.kind)

    @cached_property
    def losses(self) -> NDArray[np.float64]:
        """float64 [M]: minus the logarithm of the true class's probability, which counts as 1e-38 at least.

        Probabilities that do not sum to 1, since each is a sigmoid, are divided by their sum.
        """
        chances = self.probabilities.astype(np.float64)
        own = np.take_along_axis(chances, self.truth[:, None], axis=1)[:, 0]
        return -np.log(np.maximum(own / chances.sum(axis=1), SMALLEST_PROBABILITY))

    def order(self, label: int | None) -> Order:
        """The images by their score for a class; None: all pairs of an image and a class by their score."""
        if label not in self._orders:
            self._orders[label] = self._order(label)
        return self._orders[label]

    @cached_property
    def _orders(self) -> dict[int | None, Order]:
        return {}

    def _order(self, label: int | None) -> Order:
        if label is not None:
            return order_by_score(self.scores[:, label], self.truth == label)
        is_true = np.arange(self.scores.shape[1]) == self.truth[:, None]
        return order_by_score(self.scores.ravel(), is_true.ravel())


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What became of a test set of N images and K classes; printed, it is its `report`.

    Every image is counted once: as unreadable, else unlabelled, else abstained, else answered. Metrics are
    over the M answered images alone; `coverage` says how many of the labelled ones that is. A metric that is
    undefined is NaN: nothing is put in its place.

    Attributes:
        classes: the K class names.
        answers: of the answered images.
        weights: int64 [M]: how often each of them counts; 1, but in a resample.
        num_seen: N, all images.
        num_unreadable: images that could not be read: neither right nor wrong.
        num_unlabelled: images read, whose true class is unknown.
        num_abstained: images read and labelled, for which the classifier declined to answer.
    """

    classes: tuple[str, ...]
    answers: Answers
    weights: NDArray[np.int64]
    num_seen: int
    num_unreadable: int
    num_unlabelled: int
    num_abstained: int

    def __repr__(self) -> str:
        return f"Evaluation({self.num_seen} images, {len(self.classes)} classes)"

    @cached_property
    def confusion(self) -> NDArray[np.int64]:
        """int64 [K, K]: answered images; rows are the true classes, columns the predicted ones."""
        K = len(self.classes)
        cells = self.answers.truth * np.int64(K) + self.answers.predicted
        return _count(cells, self.weights, K * K).reshape(K, K)

    @cached_property
    def rank_counts(self) -> NDArray[np.int64]:
        """int64 [K]: answered images whose true class had the highest score, the second, and so on.

        Of equal scores the earlier class counts as the higher, as in `Predictions.top`.
        """
        return _count(self.answers.ranks, self.weights, len(self.classes))

    @property
    def num_answered(self) -> int:
        """Images that were read, are labelled and got an answer."""
        return int(self.weights.sum())

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
        raise _unknown_average(average)

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

    def cohen_kappa(self) -> float:
        """Agreement of answers and labels beyond chance, at most 1 (Cohen 1960).

        NaN where chance alone would agree always: all images are of one class, and answered so.
        """
        shares = self.confusion / self.num_answered
        chance = float(shares.sum(axis=0) @ shares.sum(axis=1))
        return (float(np.trace(shares)) - chance) / (1 - chance) if chance < 1 else float("nan")

    def roc_curve(self, class_name: str | None = None) -> RocCurve:
        """A class against all others; without a name, all pairs of an image and a class pooled.

        Raises:
            UsageError: an unknown class.
        """
        order, weights = self._ordered(class_name)
        return roc_curve(order, weights)

    def pr_curve(self, class_name: str | None = None) -> PrCurve:
        """Precision against recall of a class; without a name, of all pairs of an image and a class pooled.

        Raises:
            UsageError: an unknown class.
        """
        order, weights = self._ordered(class_name)
        return pr_curve(order, weights)

    def roc_auc(self, average: Average = "macro") -> float:
        """The area under the ROC curve, in [0, 1].

        Args:
            average: "macro", the mean over the classes for which it is defined, those with images of their
                own and others; "micro", of the pooled curve. NaN where there is none.

        Raises:
            UsageError: another average.
        """
        return self._averaged(average, lambda name: self.roc_curve(name).area)

    def average_precision(self, average: Average = "macro") -> float:
        """The mean precision over the steps of recall, in [0, 1]; averaged as in `roc_auc`.

        Raises:
            UsageError: another average.
        """
        return self._averaged(average, lambda name: self.pr_curve(name).average_precision)

    def log_loss(self) -> float:
        """The mean of -log(probability of the true class), in nats; `Answers.losses` has the details.

        Raises:
            UsageError: the scores are margins, which are no probabilities.
        """
        return float(self.weights @ self.answers.losses) / self.num_answered

    def calibration_error(self, num_bins: int = 15) -> float:
        """The expected calibration error, in [0, 1]: see `thresholds.calibration_bins`.

        Raises:
            UsageError: the scores are margins, which are no probabilities.
        """
        return self.calibration_bins(num_bins).error

    def calibration_bins(self, num_bins: int = 15) -> CalibrationBins:
        """Answers by the probability that they were given.

        Raises:
            UsageError: the scores are margins, which are no probabilities.
        """
        return calibration_bins(self.answers.probabilities, self.answers.truth, num_bins, self.weights)

    def interval(
        self,
        metric: Callable[["Evaluation"], float],
        *,
        level: float = 0.95,
        num_resamples: int = 1000,
        seed: int = 0,
    ) -> Interval:
        """The bootstrap confidence interval of a metric, such as `Evaluation.log_loss`: see `bootstrap`.

        Raises:
            UsageError: a level outside (0, 1), or no resamples.
        """
        found = bootstrap(self.resample, {"": metric}, level=level, num_resamples=num_resamples, seed=seed)
        return found[""]

    def resample(self, generator: np.random.Generator) -> "Evaluation":
        """As many answered images, drawn with replacement."""
        M = len(self.weights)
        return replace(self, weights=np.bincount(generator.integers(0, M, M), minlength=M))

    @cached_property
    def _numbers(self) -> dict[str, tuple[float, Interval | None]]:
        return _resampled_numbers(self)

    def _ordered(self, class_name: str | None) -> tuple[Order, NDArray[np.int64]]:
        if class_name is None:
            return self.answers.order(None), np.repeat(self.weights, len(self.classes))
        if class_name not in self.classes:
            raise UsageError(f"no class {class_name!r}; known are {', '.join(self.classes)}")
        return self.answers.order(self.classes.index(class_name)), self.weights

    def _averaged(self, average: Average, metric: Callable[[str | None], float]) -> float:
        if average == "micro":
            return metric(None)
        if average != "macro":
            raise _unknown_average(average)
        values = np.asarray([metric(name) for name in self.classes])
        return float(values[~np.isnan(values)].mean()) if not np.isnan(values).all() else float("nan")

    def report(self) -> str:
        """Text for a terminal: both accuracies, the counts, the classes and what was taken for what.

        With more than MAX_LISTED classes it shows those of lowest recall and the most frequent mistakes.
        """
        return "\n\n".join((_summary(self), _class_table(self), _confusion_table(self)))

    def __str__(self) -> str:
        return self.report()


def evaluate(predictions: Predictions, *, allow_copies: bool = False) -> Evaluation:
    """Compare predictions with the labels they carry.

    Args:
        predictions: what a classifier said.
        allow_copies: count augmented copies like other images.

    Raises:
        UsageError: there are no labels, no labelled image was read and answered, or there are augmented
            copies that are not allowed.
    """
    if predictions.is_copy is not None and predictions.is_copy.any() and not allow_copies:
        raise UsageError(
            f"{predictions.is_copy.sum()} of {len(predictions)} images are augmented copies: predict on the "
            "originals alone (Dataset.originals()), or count them on purpose (allow_copies=True)"
        )
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
    return Evaluation(
        classes=predictions.classes,
        answers=Answers(predictions.scores[answered], labels[answered], predictions.kind),
        weights=np.ones(answered.sum(), np.int64),
        num_seen=len(predictions),
        num_unreadable=len(predictions.errors),
        num_unlabelled=int((readable & ~labelled).sum()),
        num_abstained=int((labelled & predictions.abstained).sum()),
    )


def _count(values: NDArray[np.int64], weights: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """int64 [size]: how often each value in [0, size) occurs. Float64 counts are exact up to 2^53."""
    return np.bincount(values, weights, minlength=size).astype(np.int64)


def _unknown_average(average: object) -> UsageError:
    return UsageError(f'average is {average!r}: it must be "macro" (each class weighs the same) or "micro"')


def _ratio(numerator: NDArray[np.int64], denominator: NDArray[np.int64]) -> NDArray[np.float64]:
    """Quotients; NaN where the denominator is 0."""
    return numerator / np.where(denominator == 0, np.nan, denominator)


NUMBERS: dict[str, Callable[[Evaluation], float]] = {
    "accuracy (macro)": lambda evaluation: evaluation.accuracy("macro"),
    "accuracy (micro)": lambda evaluation: evaluation.accuracy("micro"),
    "Cohen's kappa": Evaluation.cohen_kappa,
    "ROC AUC (macro)": lambda evaluation: evaluation.roc_auc("macro"),
    "average precision (macro)": lambda evaluation: evaluation.average_precision("macro"),
    "log loss": Evaluation.log_loss,
    "calibration error": Evaluation.calibration_error,
}
"""What a report says of a whole test set."""

OF_PROBABILITIES = ("log loss", "calibration error")
OF_COUNTS = ("accuracy (macro)", "accuracy (micro)", "Cohen's kappa")

MAX_RESAMPLED = 100_000
"""Answered images times classes above which a report gives intervals of counts alone: others take minutes."""


def numbers(evaluation: Evaluation) -> dict[str, tuple[float, Interval | None]]:
    """The numbers that `NUMBERS` names, each with its 95 % interval.

    Without those of probabilities where the scores are margins; without intervals of those that depend on
    scores where these are more than `MAX_RESAMPLED`. Asked again, it does not resample again.
    """
    return dict(evaluation._numbers)


def _resampled_numbers(evaluation: Evaluation) -> dict[str, tuple[float, Interval | None]]:
    scores = evaluation.answers.scores
    is_margin = evaluation.answers.kind == "margin"
    chosen = {name: f for name, f in NUMBERS.items() if not (is_margin and name in OF_PROBABILITIES)}
    is_small = scores.size <= MAX_RESAMPLED
    intervals = bootstrap(
        evaluation.resample, {name: f for name, f in chosen.items() if is_small or name in OF_COUNTS}
    )
    return {name: (metric(evaluation), intervals.get(name)) for name, metric in chosen.items()}


def _summary(evaluation: Evaluation) -> str:
    e = evaluation
    num_present = int((e.per_class().support > 0).sum())
    notes = {
        "accuracy (macro)": f"mean recall of {num_present} classes",
        "accuracy (micro)": f"{np.trace(e.confusion)} of {e.num_answered} images",
    }
    rows = [["", "", "95 % interval", ""]]
    for name, (value, interval) in numbers(e).items():
        within = "-" if interval is None or np.isnan(interval.low) else str(interval)
        rows.append([name, "-" if np.isnan(value) else f"{value:.4f}", within, notes.get(name, "")])
    if e.num_abstained:
        labelled = e.num_answered + e.num_abstained
        rows.append(["coverage", f"{e.coverage:.4f}", "", f"{e.num_answered} answered of {labelled} images"])
    counts = (
        f"{e.num_seen} images seen: {e.num_answered} answered, {e.num_abstained} abstained,"
        f" {e.num_unlabelled} unlabelled, {e.num_unreadable} unreadable"
    )
    return f"{format_table(rows)}\n{counts}"


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

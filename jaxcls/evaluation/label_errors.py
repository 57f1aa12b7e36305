"""Labels that are probably wrong, told from scores by models that did not see them.

Each label y of an image x is taken to follow the scores, except that with a probability of `noise` it was
drawn blindly among the K classes:

    P(y | x) = (1 - noise) p(y | x) + noise / K,   p = softmax(sum_j weight_j scores_j(x))

The weights (of one set of scores, an inverse temperature) and the noise are those of largest likelihood;
Bayes' rule then gives the probability that a label is wrong. It falls with p(y | x) alone: the ranking is by
the label's own probability, the "self-confidence" of confident learning (Northcutt, Jiang and Chuang, JAIR
70, 2021). That method counts as wrong what the scores confuse; this one only what their own doubts do not
explain. Where two classes are systematically taken for each other the models learn to doubt, and such errors
rank high without being counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxcls.errors import UsageError
from jaxcls.evaluation.text import format_table, shorten
from jaxcls.predictions import Predictions

MAX_LISTED = 20
"""The report names so many images."""
FIRST_NOISE = 0.01
MAX_STEPS = 200
MAX_HALVINGS = 30
TOLERANCE = 1e-9
"""The fit ends when a step adds no more than this to the mean log-likelihood."""


@dataclass(frozen=True, eq=False)
class LabelErrors:
    """M labelled images, the label most probably wrong first; printed, it is its `report`.

    Attributes:
        classes: K names.
        ids: M names.
        indices: int64 [M], positions in the predictions.
        labels: int32 [M], as given.
        suggested: int32 [M], of the other classes the most probable one.
        probabilities: float64 [M], that the label is wrong; in [0, 1], falling.
        num_left_out: images without a label or unreadable.
    """

    classes: tuple[str, ...]
    ids: tuple[str, ...]
    indices: NDArray[np.int64]
    labels: NDArray[np.int32]
    suggested: NDArray[np.int32]
    probabilities: NDArray[np.float64]
    num_left_out: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_probable(self) -> int:
        """The number of labels that are wrong with a probability above 1/2: the first so many."""
        return int((self.probabilities > 0.5).sum())

    @property
    def num_expected(self) -> float:
        """The expected number of wrong labels, known and unknown: the sum of all probabilities."""
        return float(self.probabilities.sum())

    def rows(self) -> Iterator[dict[str, Any]]:
        """One plain dict for each image, in order: `id`, names `label` and `suggested`, `probability`."""
        for name, label, suggested, probability in zip(
            self.ids, self.labels, self.suggested, self.probabilities, strict=True
        ):
            yield {
                "id": name,
                "label": self.classes[label],
                "suggested": self.classes[suggested],
                "probability": float(probability),
            }

    def report(self) -> str:
        """Text for a terminal: how many labels are wrong, and the first MAX_LISTED images."""
        lines = [
            f"{self.num_probable} of {len(self)} labels are probably wrong, {self.num_expected:.1f} in"
            " expectation, besides such as mix up classes that the scores cannot tell apart",
            "The most suspicious:",
        ]
        if self.num_left_out:
            lines.insert(1, f"{self.num_left_out} images without a label or unreadable were left out")
        cells = [
            [
                shorten(row["id"], 50),
                shorten(row["label"], 20),
                shorten(row["suggested"], 20),
                f"{row['probability']:.3f}",
            ]
            for row in islice(self.rows(), MAX_LISTED)
        ]
        return "\n".join([*lines, format_table([["", "label", "suggested", "P(wrong)"], *cells])])

    def __str__(self) -> str:
        return self.report()


def find_label_errors(*predictions: Predictions) -> LabelErrors:
    """Rank the labelled images by the probability that their label is wrong.

    Args:
        predictions: one or more sets for the same images, such as those of an SVM and of
            `score_by_neighbours`. Their scores must be out-of-fold: a model that was trained on a wrong label
            agrees with it. Of whatever kind; scores count also where the classifier abstained.

    Raises:
        UsageError: sets that differ in images, classes or labels, no labels, or labels of one class only.
    """
    _require_same(predictions)
    first = predictions[0]
    if first.labels is None or not (first.labels >= 0).any():
        raise UsageError("the predictions carry no labels: there is none to be wrong")
    unreadable = np.any([p.unreadable for p in predictions], axis=0)
    indices = np.flatnonzero((first.labels >= 0) & ~unreadable)
    labels = first.labels[indices]
    if len(np.unique(labels)) < 2:
        raise UsageError(
            f"the {len(indices)} labelled and readable images of {len(first)} are of fewer than two classes:"
            " no wrong label can be told"
        )
    scores = np.stack([_log_scale(p)[indices] for p in predictions])
    fit = _maximize_likelihood(scores, labels)
    order = np.argsort(fit.own, kind="stable")
    others = fit.log_p.copy()
    np.put_along_axis(others, labels[:, None], -np.inf, axis=1)
    wrong = fit.doubt * np.maximum(1 - np.exp(fit.own), 0)
    return LabelErrors(
        classes=first.classes,
        ids=tuple(first.ids[i] for i in indices[order]),
        indices=indices[order],
        labels=labels[order],
        suggested=others.argmax(axis=1)[order].astype(np.int32),
        probabilities=wrong[order],
        num_left_out=len(first) - len(indices),
    )


def _require_same(predictions: tuple[Predictions, ...]) -> None:
    if not predictions:
        raise UsageError("find_label_errors needs one or more sets of predictions")
    first = predictions[0]
    for other in predictions[1:]:
        for name in ("ids", "classes", "labels"):
            if not np.array_equal(getattr(other, name), getattr(first, name)):
                raise UsageError(f"find_label_errors: the sets of predictions differ in their {name}")


def _log_scale(predictions: Predictions) -> NDArray[np.float64]:
    """Scores [N, K] whose softmax, at some temperature, can be probabilities."""
    scores = predictions.scores.astype(np.float64)
    if predictions.kind != "probability":
        return scores
    return np.log(np.maximum(scores, np.finfo(np.float32).eps))


class _Fit:
    """The model at one point: `parameters` [J + 1] are the weights and the log-odds of the noise.

    Attributes:
        log_p: float64 [M, K].
        own: float64 [M], log p of the labels.
        doubt: float64 [M], the probability that a label was drawn blindly.
        likelihood: the mean log P(label).
    """

    def __init__(
        self, parameters: NDArray[np.float64], scores: NDArray[np.float64], labels: NDArray[np.int32]
    ) -> None:
        self.parameters = parameters
        self.log_p = _log_softmax(np.tensordot(parameters[:-1], scores, axes=1))
        self.own = _of_label(self.log_p, labels)
        blind = -np.logaddexp(0, -parameters[-1]) - np.log(scores.shape[2])
        total = np.logaddexp(-np.logaddexp(0, parameters[-1]) + self.own, blind)
        self.doubt = np.exp(blind - total)
        self.likelihood = total.mean()

    def slopes(self, scores: NDArray[np.float64], labels: NDArray[np.int32]) -> NDArray[np.float64]:
        """The derivatives [M, J + 1] of each log P(label) by the parameters."""
        p = np.exp(self.log_p)
        by_weight = [(1 - self.doubt) * (_of_label(s, labels) - (p * s).sum(axis=1)) for s in scores]
        noise = 1 / (1 + np.exp(-self.parameters[-1]))
        return np.stack([*by_weight, self.doubt - noise], axis=1)


def _maximize_likelihood(scores: NDArray[np.float64], labels: NDArray[np.int32]) -> _Fit:
    """Climb from scores [J, M, K] and labels [M]: the weights first, then these and the noise together."""
    J = len(scores)
    fit = _Fit(np.append(np.zeros(J), np.log(FIRST_NOISE / (1 - FIRST_NOISE))), scores, labels)
    for num_free in (J, J + 1):
        for _ in range(MAX_STEPS):
            higher = _climb(fit, num_free, scores, labels)
            if higher is None:
                break
            fit = higher
    return fit


def _climb(fit: _Fit, num_free: int, scores: NDArray[np.float64], labels: NDArray[np.int32]) -> _Fit | None:
    """A step of Berndt, Hall, Hall and Hausman's method in the first `num_free` parameters; None at the top.

    It is Newton's with the sum of the squared slopes for the curvature (Annals of Economic and Social
    Measurement 3, 1974). A step that does not raise the likelihood is halved.
    """
    slopes = fit.slopes(scores, labels)[:, :num_free]
    step = np.zeros(len(fit.parameters))
    step[:num_free] = np.linalg.lstsq(slopes, np.ones(len(labels)))[0]
    # Without noise the likelihood is flat: from a long step there would be no way back.
    step /= max(1.0, abs(step[-1]))
    for halvings in range(MAX_HALVINGS):
        tried = _Fit(fit.parameters + step / 2**halvings, scores, labels)
        if tried.likelihood > fit.likelihood + TOLERANCE:
            return tried
    return None


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _of_label(values: NDArray[np.float64], labels: NDArray[np.int32]) -> NDArray[np.float64]:
    """From [M, K] what stands at each label: [M]."""
    return np.take_along_axis(values, labels[:, None], axis=1)[:, 0]

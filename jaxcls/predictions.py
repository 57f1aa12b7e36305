"""Predictions: the scores of a set of images, with what is known about each image."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TextIO, get_args

import numpy as np
from numpy.typing import NDArray

from jaxcls.errors import UsageError

Kind = Literal["logit", "margin", "probability"]


@dataclass(frozen=True, eq=False)
class Predictions:
    """Scores of N images for K classes.

    Args:
        scores: float32 [N, K]; finite, but NaN throughout the row of an image in `errors`.
        kind: what the scores are: "logit" (softmax makes them probabilities), "margin" (signed distances to
            one-versus-rest planes) or "probability" (in [0, 1]).
        classes: the K class names, all different.
        ids: N names of the images: paths, record keys, or positions.
        labels: int32 [N], the true classes, -1 where unknown; None where none is known.
        abstained: bool [N], where the classifier declined to answer. False in the rows of `errors`.
        errors: index -> message, for the images that could not be read.
        is_copy: bool [N], the augmented copies, which `evaluate` refuses; None where there are none.

    Raises:
        UsageError: the parts do not fit together.
    """

    scores: NDArray[np.float32]
    kind: Kind
    classes: tuple[str, ...]
    ids: tuple[str, ...]
    labels: NDArray[np.int32] | None
    abstained: NDArray[np.bool_]
    errors: Mapping[int, str] = field(default_factory=dict)
    is_copy: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        N, K = len(self.ids), len(self.classes)
        _require(
            self.kind in get_args(Kind), f"kind is {self.kind!r}, not one of {', '.join(get_args(Kind))}"
        )
        _require(len(set(self.classes)) == K > 0, "classes must be one or more names, all different")
        _require_array("scores", self.scores, np.float32, (N, K))
        _require_array("abstained", self.abstained, np.bool_, (N,))
        if self.labels is not None:
            _require_array("labels", self.labels, np.int32, (N,))
            within = bool(((self.labels >= -1) & (self.labels < K)).all())
            _require(within, f"labels must lie from -1 (unknown) to {K - 1}")
        if self.is_copy is not None:
            _require_array("is_copy", self.is_copy, np.bool_, (N,))
        _require(all(0 <= i < N for i in self.errors), f"errors has an index outside 0 to {N - 1}")
        self._check_rows()

    def _check_rows(self) -> None:
        unreadable = self.unreadable
        readable = self.scores[~unreadable]
        _require(
            bool(np.isnan(self.scores[unreadable]).all()), "the scores of an unreadable image must be NaN"
        )
        _require(not self.abstained[unreadable].any(), "an unreadable image cannot abstain: it is in errors")
        damaged = np.flatnonzero(~np.isfinite(self.scores).all(axis=1) & ~unreadable)
        if damaged.size:
            raise UsageError(
                f"Predictions: {damaged.size} of {len(self)} images were read but have scores that are not"
                f" finite (the first is {self.ids[damaged[0]]!r}): the weights have diverged or are damaged"
            )
        if self.kind == "probability":
            rounding = 1e-5
            within = bool(((readable >= 0) & (readable <= 1 + rounding)).all())
            _require(within, 'kind is "probability", yet scores leave [0, 1]: logits or margins?')

    def __repr__(self) -> str:
        return f"Predictions({len(self)} images, {len(self.classes)} classes, {self.kind})"

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def unreadable(self) -> NDArray[np.bool_]:
        """bool [N]: the images in `errors`."""
        mask = np.zeros(len(self), np.bool_)
        mask[list(self.errors)] = True
        return mask

    @property
    def predicted(self) -> NDArray[np.int32]:
        """int32 [N]: the class of highest score, the first of equals; -1 where unreadable or abstained."""
        best = self.scores.argmax(axis=1)
        return np.where(self.unreadable | self.abstained, -1, best).astype(np.int32)

    def top(self, k: int = 1) -> NDArray[np.int32]:
        """The k best classes, whether or not the classifier abstained.

        Returns:
            int32 [N, k], best first, the earlier class first where scores are equal; -1 where unreadable.

        Raises:
            UsageError: k is not from 1 to K.
        """
        require_rank(k, len(self.classes))
        best = np.argsort(-self.scores, axis=1, kind="stable")[:, :k]
        return np.where(self.unreadable[:, None], -1, best).astype(np.int32)

    def probabilities(self) -> NDArray[np.float32]:
        """float32 [N, K]: the softmax of logits, or the scores where these are probabilities already.

        NaN in the row of an unreadable image.

        Raises:
            UsageError: the scores are margins, which have no scale.
        """
        return probabilities(self.scores, self.kind)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One plain dict for each image, in order; None stands for whatever is not known.

        Keys: `id`; `predicted`, a class name, and its `score` (None where unreadable or abstained); `label`,
        the true class's name; `abstained`; `error`, the message where unreadable; `scores`, a dict from class
        name to score (None where unreadable).
        """
        labels = np.full(len(self), -1) if self.labels is None else self.labels
        for i, (predicted, label) in enumerate(zip(self.predicted, labels, strict=True)):
            error = self.errors.get(i)
            yield {
                "id": self.ids[i],
                "predicted": self._class_name(predicted),
                "score": None if predicted < 0 else float(self.scores[i, predicted]),
                "label": self._class_name(label),
                "abstained": bool(self.abstained[i]),
                "error": error,
                "scores": dict(zip(self.classes, self.scores[i].tolist(), strict=True))
                if error is None
                else None,
            }

    def _class_name(self, index: int) -> str | None:
        return None if index < 0 else self.classes[index]

    def write_csv(self, file: TextIO) -> None:
        """Write `rows` as CSV (RFC 4180), with an empty cell for None. Open the file with `newline=""`.

        In place of `scores` there is a column `score:<class>` for each class.
        """
        writer = csv.writer(file)
        fixed = ("id", "predicted", "score", "label", "abstained", "error")
        writer.writerow([*fixed, *(f"score:{name}" for name in self.classes)])
        for row in self.rows():
            scores = row["scores"] or {}
            writer.writerow([*map(row.get, fixed), *map(scores.get, self.classes)])

    def write_jsonl(self, file: TextIO) -> None:
        """Write `rows` as JSON lines: one object for each image, null for what is not known."""
        for row in self.rows():
            file.write(json.dumps(row, allow_nan=False) + "\n")


def probabilities(scores: NDArray[np.float32], kind: Kind) -> NDArray[np.float32]:
    """Scores [..., K] as `Predictions.probabilities` makes them of its own.

    Raises:
        UsageError: the scores are margins, which have no scale.
    """
    if kind == "probability":
        return scores
    if kind == "margin":
        raise UsageError(
            "margins are not probabilities: calibrate the classifier first"
            " (a temperature, or a sigmoid for each class, fitted on held-out images)"
        )
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def lags(scores: NDArray[np.float32], labels: NDArray[np.integer]) -> NDArray[np.float32]:
    """float32 [N]: how far the score of each image's label, of scores [N, K], lies behind the best other one.

    Below 0 it is the highest itself; minus infinity where there is no other.
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)[:, 0]
    others = scores.copy()
    np.put_along_axis(others, labels[:, None], -np.inf, axis=1)
    return others.max(axis=1) - own


def require_rank(k: int, num_classes: int) -> None:
    """Raise UsageError unless the k best of `num_classes` classes exist."""
    if not 1 <= k <= num_classes:
        raise UsageError(f"k is {k}: it must be from 1 to the number of classes, {num_classes}")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise UsageError(f"Predictions: {problem}")


def _require_array(name: str, array: object, dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    wanted = f"{name} must be a NumPy array {np.dtype(dtype)} {list(shape)}"
    if not isinstance(array, np.ndarray):
        raise UsageError(f"Predictions: {wanted}, not {type(array).__name__}")
    matches = array.dtype == dtype and array.shape == shape
    _require(matches, f"{wanted}, not {array.dtype} {list(array.shape)}")

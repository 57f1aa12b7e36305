"""Cross-validation of linear SVMs: all folds, classes and values of C are solved as one batch of problems."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from jaxcls.classifier import Calibration
from jaxcls.errors import UsageError
from jaxcls.predictions import Predictions
from jaxcls.svm.calibration import fit_calibrator
from jaxcls.svm.newton import Problems, minimize
from jaxcls.svm.samples import Samples
from jaxcls.svm.solver import as_columns, one_against_rest

EXPONENTS = (-1, 0, 1, 2, 3)
"""Powers of ten that `C="cv"` chooses from, for samples of length 1; a longer one has its share by itself."""
TOLERANCE = 1e-3
"""Of the objective: far below what separates one C from the next."""
MAX_STEPS = 30
"""Of Newton's method. The largest C on nearly separable samples want more, and are rarely the best."""
MAX_CELLS = 2**28
"""Of a matrix [problems, samples]: folds and values of C beyond it are solved in a further batch."""


def candidates(values: NDArray[np.float32]) -> tuple[float, ...]:
    """What `C="cv"` chooses from for features [N, D]: powers of ten, the smaller the longer the features."""
    square = float(np.mean(np.square(values).sum(1)))
    scale = round(math.log10(square)) if square > 0 else 0
    return tuple(10.0 ** (exponent - scale) for exponent in EXPONENTS)


class CrossValidation(NamedTuple):
    """What SVMs say of samples that they were not trained on.

    Attributes:
        C: those tried.
        margins: float32 [len(C), N, K].
        accuracy: float64 [len(C)], macro: the mean recall of the classes.
    """

    C: tuple[float, ...]
    margins: NDArray[np.float32]
    accuracy: NDArray[np.float64]

    @property
    def best(self) -> int:
        """The position of the C of highest accuracy, of equals the smallest C."""
        return int(self.accuracy.argmax())


def require_folds(
    labels: np.ndarray, num_folds: int, *, classes: Sequence[str], groups: np.ndarray | None = None
) -> None:
    """Raise UsageError unless `make_folds` can divide samples so."""
    if num_folds < 2:
        raise UsageError(f"num_folds {num_folds}: cross-validation needs at least 2")
    counts = count_units(labels, len(classes), groups)
    rarest = int(np.argmin(counts))
    if (count := counts[rarest]) < num_folds:
        is_whole = groups is None or count == (labels == rarest).sum()
        one, several = ("image", "images") if is_whole else ("group of images", "groups of images")
        remedy = f"set num_folds to {count} at most, or add some" if count > 1 else "add some"
        raise UsageError(
            f"class {classes[rarest]} has {count} {one if count == 1 else several}, "
            f"fewer than {num_folds} folds: {remedy}"
        )


def make_folds(
    labels: np.ndarray,
    num_folds: int,
    *,
    classes: Sequence[str],
    groups: np.ndarray | None = None,
    seed: int = 0,
) -> NDArray[np.int32]:
    """Divide samples into folds, each with every class's share, a group never over two of them.

    Args:
        labels: int [N].
        num_folds: 2 or more.
        classes: K names, for messages.
        groups: int [N] or None.
        seed: of the shuffle.

    Returns:
        int32 [N], from 0.

    Raises:
        UsageError: there are fewer than two folds, a class has fewer samples, or groups, than folds, or
            groups leave a training part without a class.
    """
    require_folds(labels, num_folds, classes=classes, groups=groups)
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    folds = np.zeros(len(labels), np.int32)
    divide = kind(num_folds, shuffle=True, random_state=seed).split(labels, labels, groups)
    for number, (trained_on, held_out) in enumerate(divide):
        folds[held_out] = number
        if missing := set(range(len(classes))) - set(labels[trained_on].tolist()):
            raise UsageError(
                f"{num_folds} folds of whole groups leave no {classes[missing.pop()]} to train on: "
                "set num_folds to fewer, or choose another seed"
            )
    return folds


def count_units(labels: np.ndarray, num_classes: int, groups: np.ndarray | None = None) -> list[int]:
    """Of each class, the samples, or groups of them, that folds can be made of."""
    units = np.arange(len(labels)) if groups is None else groups
    return [len(np.unique(units[labels == label])) for label in range(num_classes)]


def cross_validate(
    values: NDArray[np.float32],
    labels: np.ndarray,
    folds: NDArray[np.int32],
    C: Sequence[float],  # noqa: N803 - scikit-learn's name
    *,
    class_weights: np.ndarray | None = None,
    num_classes: int,
    is_counted: np.ndarray | None = None,
) -> CrossValidation:
    """Train on all folds but one, for each of them and each C, and score the one left out.

    Args:
        values: [N, D].
        labels: int [N], every class in every training part.
        folds: of `make_folds`.
        C: inverse regularisations to try, rising.
        class_weights: float [K]; the same for all folds.
        num_classes: K.
        is_counted: bool [N], the samples that the accuracy is of; None: all.
    """
    pairs = [(place, fold) for place in range(len(C)) for fold in range(int(folds.max()) + 1)]
    per_batch = max(1, MAX_CELLS // (len(labels) * num_classes))
    margins = np.empty((len(C), len(labels), num_classes), np.float32)
    for start in range(0, len(pairs), per_batch):
        batch = pairs[start : start + per_batch]
        machines = [
            one_against_rest(num_classes, C[place], class_weights, left_out=fold, dtype=values.dtype)
            for place, fold in batch
        ]
        for (place, fold), weights in zip(batch, _solve(values, labels, folds, machines), strict=True):
            held_out = folds == fold
            margins[place, held_out] = as_columns(_margins(values[held_out], weights))
    is_right = margins.argmax(2) == labels
    counted = labels if is_counted is None else np.where(is_counted, labels, -1)
    recalls = [is_right[:, counted == label].mean(1) for label in range(num_classes)]
    return CrossValidation(tuple(C), margins, np.mean(recalls, axis=0))


def out_of_fold(
    values: NDArray[np.float32],
    labels: np.ndarray,
    classes: Sequence[str],
    ids: Sequence[str],
    *,
    C: float | Literal["cv"] = "cv",  # noqa: N803
    num_folds: int = 5,
    seed: int = 0,
    calibrate: Calibration | None = "temperature",
    groups: np.ndarray | None = None,
) -> Predictions:
    """What SVMs that have not seen an image say of it, for every image.

    Args:
        values: features [N, D].
        labels: int [N], of every class.
        classes: K names.
        ids: N names.
        C: inverse regularisation; "cv": of `candidates`, the one of highest accuracy.
        num_folds, seed, groups: as for `make_folds`.
        calibrate: makes probabilities of an image's margins by those of the other folds; None: margins.

    Raises:
        UsageError: as `make_folds`.
    """
    folds = make_folds(labels, num_folds, classes=classes, groups=groups, seed=seed)
    tried = candidates(values) if C == "cv" else (float(C),)
    found = cross_validate(values, labels, folds, tried, num_classes=len(classes))
    margins = found.margins[found.best]
    return Predictions(
        scores=margins if calibrate is None else calibrated_out_of_fold(margins, labels, folds, calibrate),
        kind="margin" if calibrate is None else "probability",
        classes=tuple(classes),
        ids=tuple(map(str, ids)),
        labels=labels.astype(np.int32),
        abstained=np.zeros(len(labels), bool),
    )


def calibrated_out_of_fold(
    margins: NDArray[np.float32], labels: np.ndarray, folds: NDArray[np.int32], method: Calibration
) -> NDArray[np.float32]:
    """Probabilities [N, K] of held-out margins [N, K], those of each fold calibrated on the others."""
    probabilities = np.empty_like(margins)
    for fold in range(int(folds.max()) + 1):
        calibrator = fit_calibrator(method, margins[folds != fold], labels[folds != fold])
        probabilities[folds == fold] = calibrator.probabilities(margins[folds == fold])
    return probabilities


def _solve(
    values: NDArray[np.float32],
    labels: np.ndarray,
    folds: NDArray[np.int32],
    machines: Sequence[Problems],
) -> NDArray[np.float32]:
    """Weights [M, P, D + 1] of M machines of P problems each."""
    problems = Problems(*map(np.concatenate, zip(*machines, strict=True)))
    num_problems = len(problems.positive)
    samples = Samples(values, labels, np.ones(len(labels)), folds, constant=1.0, num_problems=num_problems)
    weights = minimize(samples, problems, tolerance=TOLERANCE, max_steps=MAX_STEPS).weights
    return weights.reshape(len(machines), -1, weights.shape[1])


@jax.jit
def _margins(values: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.matmul(values, weights[:, :-1].T, precision="highest") + weights[None, :, -1]

"""`fit_svm`: a frozen backbone's features and linear SVMs become a classifier."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.preprocessing import StandardScaler, normalize
from sklearn.svm import LinearSVC as Liblinear

from jaxcls.classifier import Calibration, Classifier, Head, as_backbone
from jaxcls.data.dataset import Dataset
from jaxcls.errors import UsageError
from jaxcls.evaluation.thresholds import (
    NEVER,
    are_below,
    calibration_error,
    choose_thresholds,
    require_precision,
)
from jaxcls.feature_cache import Report, features_of
from jaxcls.models.precision import Precision
from jaxcls.models.pretrained import Backbone
from jaxcls.svm.calibration import Calibrator, fit_calibrator
from jaxcls.svm.cross_validation import (
    CrossValidation,
    calibrated_out_of_fold,
    candidates,
    cross_validate,
    make_folds,
    require_folds,
)
from jaxcls.svm.solver import LinearSVC, as_columns

MAX_LIBLINEAR = 3 * 10**7
"""Images x features x classes up to which liblinear takes a second or two, compiling alone as long."""


def fit_svm(
    dataset: Dataset,
    backbone: Backbone | Classifier,
    *,
    C: float | Literal["cv"] = 1.0,  # noqa: N803 - scikit-learn's name
    class_weight: str | dict[str, float] | None = "balanced",
    normalize_features: bool = False,
    standardize: bool = False,
    calibrate: Calibration | None = None,
    min_precision: float | None = None,
    num_folds: int = 5,
    seed: int = 0,
    cache: str | Path | None = None,
    num_workers: int = 0,
    precision: Precision = "auto",
    max_bad_fraction: float = 0.0,
    progress: bool = False,
    report: Report = lambda text: None,
) -> Classifier:
    """Train linear SVMs, one class against the rest, on the pooled features of a dataset.

    The solver is scikit-learn's liblinear for small sets and `jaxcls.svm.solver.LinearSVC` for others, which
    minimises the same objective. Cross-validation, for whatever asks for it, is on this dataset alone; photos
    of one group stay in one fold, and augmented copies are not counted.

    Args:
        dataset: the training photos.
        backbone: the frozen network; of a classifier, its (fine-tuned) backbone.
        C: inverse regularisation, above 0; small values regularise more. "cv": of powers of ten around the
            features' own scale, the one of best macro accuracy in cross-validation.
        class_weight: "balanced", None, or a weight by class name (others 1).
        normalize_features: divide each feature vector by its L2 norm, here and in the classifier.
        standardize: train on features of mean 0 and standard deviation 1; the classifier's head undoes it.
        calibrate: make the scores probabilities, by held-out margins: "temperature", one for all classes;
            "sigmoid", one for each. None: they are margins. The error reported as before is that of the
            margins' softmax.
        min_precision: abstain where a class's answers, at such scores in cross-validation, were right less
            often. None: never abstain.
        num_folds: of the cross-validation.
        seed: of the folds and of liblinear.
        cache: a folder in which features are kept by content; those kept there cost no forward pass.
        num_workers: processes that decode; 0: threads.
        precision: of the network's convolutions: "float32", "bfloat16", or "auto" (bfloat16 where that is
            faster).
        max_bad_fraction: go on without undecodable photos up to this share of the dataset.
        progress: show a progress bar.
        report: hears what was chosen, and why.

    Returns:
        A classifier whose scores are the margins of `decision_function`, or probabilities; with two classes
        the second one's margin is scikit-learn's single column and the first one's its negative.

    Raises:
        DatasetError: undecodable photos, a class without photos, or unlabelled photos.
        ClassifierError: features that are not finite.
        UsageError: an option that cannot be, or a class with fewer photos than folds.
    """
    _check(C, calibrate, min_precision)
    dataset.require_every_class()
    dataset.class_weights(class_weight)  # a wrong name now, not after the features
    is_tested = C == "cv" or calibrate is not None or min_precision is not None
    if is_tested:
        require_folds(dataset.labels, num_folds, classes=dataset.classes, groups=dataset.groups)
    backbone = as_backbone(backbone)
    dataset, values = features_of(
        backbone,
        dataset,
        None if cache is None else Path(cache),
        num_workers=num_workers,
        precision=precision,
        max_bad_fraction=max_bad_fraction,
        progress=progress,
        report=report,
    )
    dataset.require_every_class()
    labels, weights = dataset.labels, dataset.class_weights(class_weight)
    num_classes = len(dataset.classes)
    if normalize_features:
        values = normalize(values)
    scaler = StandardScaler(with_mean=standardize, with_std=standardize).fit(values)
    values = scaler.transform(values)
    provenance: dict[str, Any] = {
        "method": "svm",
        "dataset": dataset.name,
        "num_images": len(dataset),
        "class_weight": class_weight,
        "standardize": standardize,
    }

    held_out = None
    if is_tested:
        folds = make_folds(labels, num_folds, classes=dataset.classes, groups=dataset.groups, seed=seed)
        tried = (float(C),) if C != "cv" else candidates(values)
        is_counted = ~dataset.is_copy  # copies are trained on, and say nothing new of what was held out
        tests = cross_validate(
            values,
            labels,
            folds,
            tried,
            class_weights=weights,
            num_classes=num_classes,
            is_counted=is_counted,
        )
        margins = tests.margins[tests.best]
        C, held_out = (
            tests.C[tests.best],
            _HeldOut(margins[is_counted], labels[is_counted], folds[is_counted]),
        )
        report(_describe_accuracies(tests, num_folds))
        accuracy = dict(zip(map(str, tests.C), tests.accuracy.tolist(), strict=True))
        provenance["cross_validation"] = {"num_folds": num_folds, "accuracy": accuracy}
    kernel, bias, solver = _solve(values, labels, float(C), weights, seed)
    report(f"solved by {solver}, C={C:g}")
    provenance |= {"solver": solver, "C": C}

    if held_out is not None and calibrate is not None:
        calibrator, held_out, errors = held_out.calibrate(calibrate)
        kernel, bias = kernel * calibrator.slope, bias * calibrator.slope + calibrator.intercept
        report(
            "expected calibration error, by held-out folds: {before:.4f}, calibrated {after:.4f}".format(
                **errors
            )
        )
        provenance["calibration"] = {"method": calibrate, "error": errors}
    thresholds = None
    if held_out is not None and min_precision is not None:
        thresholds = choose_thresholds(held_out.scores, held_out.labels, min_precision)
        report(_describe_thresholds(thresholds, held_out.scores, dataset.classes))
        provenance["min_precision"] = min_precision
    if standardize:
        kernel = kernel / scaler.scale_[:, None]
        bias = bias - scaler.mean_ @ kernel
    head = Head(
        np.ascontiguousarray(kernel, np.float32),
        np.asarray(bias, np.float32),
        kind="margin" if calibrate is None else "probability",
        normalize=normalize_features,
        calibration=calibrate,
        thresholds=thresholds,
    )
    return Classifier(backbone, head, dataset.classes, provenance)


class _HeldOut(NamedTuple):
    """What is known of samples by machines that were not trained on them."""

    scores: NDArray[np.float32]
    labels: np.ndarray
    folds: NDArray[np.int32]

    def calibrate(self, method: Calibration) -> tuple[Calibrator, "_HeldOut", dict[str, float]]:
        """The calibrator of all margins, probabilities held out likewise, and what it does to their error."""
        scores = calibrated_out_of_fold(self.scores, self.labels, self.folds, method)
        errors = {
            "before": calibration_error(softmax(self.scores, axis=1), self.labels),
            "after": calibration_error(scores, self.labels),
        }
        return fit_calibrator(method, self.scores, self.labels), self._replace(scores=scores), errors


def _check(C: float | str, calibrate: str | None, min_precision: float | None) -> None:  # noqa: N803
    if isinstance(C, str) and C != "cv":
        raise UsageError(f"C {C!r}: give a number above 0, or 'cv'")
    if not isinstance(C, str) and not 0 < C < math.inf:
        raise UsageError(f"C {C}: must be above 0 and finite")
    if calibrate not in (None, *get_args(Calibration)):
        raise UsageError(
            f"calibrate {calibrate!r}: choose one of {', '.join(get_args(Calibration))}, or None"
        )
    if min_precision is not None:
        require_precision(min_precision)


def _solve(
    values: NDArray[np.float32],
    labels: np.ndarray,
    C: float,  # noqa: N803
    class_weights: np.ndarray | None,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, str]:
    """Kernel [D, K], bias [K], and the name of what found them."""
    by_label = None if class_weights is None else dict(enumerate(class_weights.tolist()))
    num_classes = len(np.unique(labels))
    machine: LinearSVC | Liblinear
    if values.size * num_classes <= MAX_LIBLINEAR:
        solver = "liblinear (scikit-learn)"
        machine = Liblinear(C=C, class_weight=by_label, random_state=seed)
    else:
        solver = "Newton's method (jaxcls)"
        machine = LinearSVC(C=C, class_weight=by_label)
    with warnings.catch_warnings(record=True, action="always", category=ConvergenceWarning) as caught:
        machine.fit(values, labels)
    for other in caught:
        if not issubclass(other.category, ConvergenceWarning):
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    # A fit short of convergence is a result all the same, also where warnings are errors.
    with warnings.catch_warnings(action="always", category=ConvergenceWarning):
        if any(issubclass(other.category, ConvergenceWarning) for other in caught):
            warnings.warn(
                f"the SVM had not converged after {machine.n_iter_} iterations, and can be used as it is; a "
                f"smaller C or normalized features converge sooner ({solver}: {caught[0].message})",
                ConvergenceWarning,
                stacklevel=3,
            )
    return as_columns(machine.coef_.T).astype(np.float64), as_columns(machine.intercept_[None])[0], solver


def _describe_accuracies(tests: CrossValidation, num_folds: int) -> str:
    each = ", ".join(f"C={C:g} {value:.4f}" for C, value in zip(tests.C, tests.accuracy, strict=True))
    return f"macro accuracy in {num_folds}-fold cross-validation: {each}"


def _describe_thresholds(
    thresholds: NDArray[np.float32], scores: NDArray[np.float32], classes: Sequence[str]
) -> str:
    coverage = 1 - are_below(scores, thresholds).mean()
    silent = [name for name, value in zip(classes, thresholds, strict=True) if value == NEVER]
    text = f"thresholds that leave {coverage:.1%} of the images an answer"
    return f"{text}; too rarely right at any score: {', '.join(silent)}" if silent else text

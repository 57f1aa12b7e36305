"""`LinearSVC`: scikit-learn's estimator, all its classes solved together by `newton` on JAX's devices."""

import warnings
from collections.abc import Mapping
from typing import Any, Literal, Self

import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from jaxcls.svm.newton import Problems, Solution, minimize
from jaxcls.svm.samples import Samples


class LinearSVC(ClassifierMixin, BaseEstimator):
    """A linear support vector classifier with the squared hinge loss, one class against the rest.

    The objective is liblinear's, the intercept penalised as there; the parameters mean what they mean in
    scikit-learn's estimator of this name. float32 features are computed with in float32, others in float64.
    Features stay on the devices, their rows divided over all of them; where they do not fit, each pass sends
    them in blocks.

    Args:
        C: inverse regularisation, above 0.
        class_weight: None, "balanced", or by class what its samples' C is multiplied by.
        fit_intercept: whether there is an intercept.
        intercept_scaling: the constant feature whose weight times itself is the intercept; the larger, the
            less the intercept is penalised.
        tol: how far the objective may lie above its minimum, as a share of itself. scikit-learn's tolerance
            is another one and says less.
        max_iter: steps of Newton's method.

    Attributes:
        classes_: [K], sorted.
        coef_: [K, D], or [1, D] for two classes.
        intercept_: [K], or [1].
        n_iter_: steps of the class that took most.
        n_features_in_: D.
    """

    def __init__(
        self,
        *,
        C: float = 1.0,  # noqa: N803 - scikit-learn's name
        class_weight: Mapping[Any, float] | Literal["balanced"] | None = None,
        fit_intercept: bool = True,
        intercept_scaling: float = 1.0,
        tol: float = 1e-4,
        max_iter: int = 1000,
    ) -> None:
        self.C = C
        self.class_weight = class_weight
        self.fit_intercept = fit_intercept
        self.intercept_scaling = intercept_scaling
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:  # noqa: N803
        """Find the hyperplanes; warn with ConvergenceWarning if one is not found to the tolerance.

        Args:
            X: [N, D].
            y: [N], of two or more classes.
            sample_weight: [N], at least 0: what each sample's C is multiplied by.

        Raises:
            ValueError: features that are not finite, one class only, or a parameter that cannot be.
        """
        self._check()
        features, targets = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(targets)
        self.classes_, labels = np.unique(targets, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"the data contains only one class, {self.classes_[0]!r}: an SVM needs two")
        weights = _check_sample_weight(
            sample_weight, features, dtype=features.dtype, ensure_non_negative=True
        )
        with jax.enable_x64(features.dtype == np.float64):
            solution = self._solve(features, labels, targets, weights)
        self._keep(solution)
        return self

    def decision_function(self, X: ArrayLike) -> NDArray[np.floating]:  # noqa: N803
        """Margins: [N, K], or [N] of the second class if there are two."""
        check_is_fitted(self)
        features = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        margins: np.ndarray = features @ self.coef_.T + self.intercept_
        return margins[:, 0] if len(self.classes_) == 2 else margins

    def predict(self, X: ArrayLike) -> np.ndarray:  # noqa: N803
        """[N], of each sample the class of the largest margin."""
        margins = self.decision_function(X)
        return self.classes_[margins.argmax(1) if margins.ndim == 2 else (margins > 0).astype(int)]

    def _check(self) -> None:
        positive = {name: getattr(self, name) for name in ("C", "tol", "max_iter")}
        if self.fit_intercept:
            positive["intercept_scaling"] = self.intercept_scaling
        for name, value in positive.items():
            if not 0 < value < np.inf:
                raise ValueError(f"{name} {value}: must be above 0 and finite")

    def _solve(
        self, features: np.ndarray, labels: np.ndarray, targets: np.ndarray, weights: np.ndarray
    ) -> Solution:
        by_class = compute_class_weight(
            self.class_weight, classes=self.classes_, y=targets, sample_weight=weights
        )
        problems = one_against_rest(len(by_class), self.C, by_class, dtype=features.dtype)
        num_problems = len(problems.positive)
        constant = self.intercept_scaling if self.fit_intercept else 0.0
        samples = Samples(features, labels, weights, constant=constant, num_problems=num_problems)
        return minimize(samples, problems, tolerance=self.tol, max_steps=self.max_iter)

    def _keep(self, solution: Solution) -> None:
        self.coef_ = np.ascontiguousarray(solution.weights[:, :-1])
        self.intercept_ = solution.weights[:, -1] * self.intercept_scaling
        self.n_iter_ = int(solution.num_steps.max())
        shares = solution.gap / np.maximum(solution.objective, np.finfo(float).tiny)
        if not (shares <= self.tol).all():
            reason = (
                f"after {self.max_iter} steps, the most that max_iter allows"
                if self.n_iter_ >= self.max_iter
                else "before the precision of the features' numbers was exhausted"
            )
            warnings.warn(
                f"the SVM has not converged {reason}: the objective may lie {shares.max():.1e} of itself "
                "above its minimum; a smaller C, features of similar scale or a larger tol help",
                ConvergenceWarning,
                stacklevel=3,
            )


def one_against_rest(
    num_classes: int,
    C: float,  # noqa: N803
    class_weights: np.ndarray | None = None,
    *,
    left_out: int = -1,
    dtype: np.dtype | type = np.float32,
) -> Problems:
    """A problem for each of K classes, or a single one, of the second class, if there are two.

    As liblinear does it, the weight of a class multiplies the costs of its own samples in its own problem
    only; with two classes it does in the single one.

    Args:
        num_classes: K.
        C: inverse regularisation.
        class_weights: float [K]; None: all 1.
        left_out: the fold whose samples do not count; -1: all do.
        dtype: of the costs.
    """
    costs = C * (np.ones(num_classes) if class_weights is None else np.asarray(class_weights))
    if num_classes == 2:
        positive, others = np.array([1]), costs[:1]
    else:
        positive, others = np.arange(num_classes), np.full(num_classes, C)
    return Problems(
        positive.astype(np.int32),
        costs[positive].astype(dtype),
        others.astype(dtype),
        np.full(len(positive), left_out, np.int32),
    )


def as_columns(margins: ArrayLike) -> NDArray[np.floating]:
    """[N, K] of the margins [N, K] of one-against-rest problems, which are [N, 1] for two classes."""
    margins = np.asarray(margins)
    return np.hstack([-margins, margins]) if margins.shape[1] == 1 else margins

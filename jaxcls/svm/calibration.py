"""From an SVM's margins to probabilities: one temperature, or a sigmoid for each class."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, xlogy

from jaxcls.classifier import Calibration, calibrated


@dataclass(frozen=True, eq=False)
class Calibrator:
    """`slope * margin + intercept`, of which "temperature" takes the softmax, and "sigmoid" the logistic
    function, divided by its sum over the classes.

    Attributes:
        method: which.
        slope: float64 [K].
        intercept: float64 [K].
    """

    method: Calibration
    slope: NDArray[np.float64]
    intercept: NDArray[np.float64]

    def probabilities(self, margins: NDArray[np.float32]) -> NDArray[np.float32]:
        """Of margins [N, K]: float32 [N, K], rows that sum to 1."""
        scores = (self.slope * margins + self.intercept).astype(np.float32)
        return np.asarray(calibrated(jnp.asarray(scores), self.method))


def fit_calibrator(method: Calibration, margins: NDArray[np.float32], labels: np.ndarray) -> Calibrator:
    """Fit to samples that the SVM was not trained on.

    "temperature" has the least log-loss of softmax(margin / T): Guo et al., "On Calibration of Modern Neural
    Networks", ICML 2017. "sigmoid" is Platt's, "Probabilistic Outputs for Support Vector Machines", 1999,
    with his smoothed targets, for each class against the rest; as scikit-learn's CalibratedClassifierCV.

    Args:
        method: which.
        margins: [N, K].
        labels: int [N].
    """
    wide = margins.astype(np.float64)
    num_classes = wide.shape[1]
    # Of one scale whatever C and the features: the search has bounds and tolerances of its own.
    scale = np.sqrt(np.mean(wide**2)) or 1.0
    wide /= scale
    if method == "temperature":
        slope = np.full(num_classes, _inverse_temperature(wide, labels))
        return Calibrator(method, slope / scale, np.zeros(num_classes))
    sigmoids = [_sigmoid(column, labels == label) for label, column in enumerate(wide.T)]
    slope, intercept = np.array(sigmoids).T
    return Calibrator(method, slope / scale, intercept)


def _inverse_temperature(margins: NDArray[np.float64], labels: np.ndarray) -> float:
    own = (np.arange(len(labels)), labels)

    def loss(log_scale: float) -> float:
        scores = np.exp(log_scale) * margins
        top = scores.max(1)
        return float(np.mean(np.log(np.exp(scores - top[:, None]).sum(1)) + top - scores[own]))

    # Bounded, since of margins that are all right ever larger ones would be better.
    return float(np.exp(minimize_scalar(loss, bounds=(-5, 5), method="bounded").x))


def _sigmoid(margins: NDArray[np.float64], is_positive: NDArray[np.bool_]) -> tuple[float, float]:
    num_positive = int(is_positive.sum())
    num_negative = len(margins) - num_positive
    targets = np.where(is_positive, (num_positive + 1) / (num_positive + 2), 1 / (num_negative + 2))
    entropy = -(xlogy(targets, targets) + xlogy(1 - targets, 1 - targets)).sum()

    def loss(line: np.ndarray) -> tuple[float, np.ndarray]:
        scores = line[0] * margins + line[1]
        value = (np.logaddexp(0, scores) - targets * scores).sum() - entropy
        change = expit(scores) - targets
        return value, np.array([change @ margins, change.sum()])

    start = np.array([1.0, np.log((num_positive + 1) / (num_negative + 1))])
    slope, intercept = minimize(loss, start, jac=True, method="L-BFGS-B").x
    return float(slope), float(intercept)

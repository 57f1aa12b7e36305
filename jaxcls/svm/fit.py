"""`fit_svm`: a frozen backbone's features and a linear SVM become a classifier."""

import math
import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.preprocessing import normalize
from sklearn.svm import LinearSVC

from jaxcls.classifier import Classifier, Head, as_backbone
from jaxcls.data.dataset import Dataset, scan
from jaxcls.errors import UsageError
from jaxcls.models.precision import Precision
from jaxcls.models.pretrained import Backbone
from jaxcls.scoring import extract_features


def fit_svm(
    dataset: Dataset,
    backbone: Backbone | Classifier,
    *,
    C: float = 1.0,  # noqa: N803 - scikit-learn's name
    class_weight: str | dict[str, float] | None = "balanced",
    normalize_features: bool = False,
    num_workers: int = 0,
    precision: Precision = "auto",
    max_bad_fraction: float = 0.0,
    progress: bool = False,
) -> Classifier:
    """Train scikit-learn's `LinearSVC`, one against the rest, on the pooled features of a dataset.

    Args:
        dataset: the training photos.
        backbone: the frozen network; of a classifier, its (fine-tuned) backbone.
        C: inverse regularisation, above 0; small values regularise more.
        class_weight: "balanced", None, or a weight by class name (others 1).
        normalize_features: divide each feature vector by its L2 norm, here and in the classifier.
        num_workers: processes that decode; 0: threads.
        precision: of the network's convolutions.
        max_bad_fraction: go on without undecodable photos up to this share of the dataset.
        progress: show a progress bar.

    Returns:
        A classifier whose scores are the margins of `decision_function`; with two classes the second
        one's margin is scikit-learn's single column and the first one's its negative.

    Raises:
        DatasetError: undecodable photos, a class without photos, or unlabelled photos.
        UsageError: C is not above 0, or a weight for an unknown class.
    """
    if not 0 < C < math.inf:
        raise UsageError(f"C {C}: must be above 0 and finite")
    dataset.require_every_class()
    dataset.class_weights(class_weight)  # a wrong name now, not after the features
    dataset = scan(dataset, max_bad_fraction=max_bad_fraction)
    dataset.require_every_class()
    backbone = as_backbone(backbone)
    values, labels, _ = extract_features(
        backbone, dataset, num_workers=num_workers, precision=precision, progress=progress
    )
    if normalize_features:
        values = normalize(values)
    weights = dataset.class_weights(class_weight)
    by_label = None if weights is None else dict(enumerate(weights.tolist()))
    machine = LinearSVC(C=C, class_weight=by_label, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        machine.fit(values, labels)
        # A fit short of convergence is a result all the same, also where warnings are errors.
        warnings.simplefilter("always", ConvergenceWarning)
        if machine.n_iter_ >= machine.max_iter:
            warnings.warn(
                f"the SVM had not converged after {machine.max_iter} iterations: it can be used as it is; "
                "a smaller C or normalized features converge sooner",
                ConvergenceWarning,
                stacklevel=2,
            )
    provenance = {
        "method": "svm",
        "solver": "scikit-learn LinearSVC",
        "C": C,
        "class_weight": class_weight,
        "dataset": dataset.name,
        "num_images": len(dataset),
    }
    return Classifier(backbone, _head(machine, normalize_features), dataset.classes, provenance)


def _head(machine: LinearSVC, normalize_features: bool) -> Head:
    kernel, bias = machine.coef_.T.astype(np.float32), machine.intercept_.astype(np.float32)
    if kernel.shape[1] == 1:
        kernel, bias = np.hstack([-kernel, kernel]), np.hstack([-bias, bias])
    return Head(np.ascontiguousarray(kernel), bias, kind="margin", normalize=normalize_features)

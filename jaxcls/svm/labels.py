"""`check_labels`: labels that are probably wrong, by SVMs and neighbours that did not see them."""

from pathlib import Path

import numpy as np
from sklearn.preprocessing import normalize

from jaxcls.classifier import Classifier, as_backbone
from jaxcls.data.dataset import UNLABELLED, Dataset
from jaxcls.evaluation.label_errors import LabelErrors, find_label_errors
from jaxcls.evaluation.neighbours import score_by_neighbours
from jaxcls.feature_cache import Report, features_of
from jaxcls.models.precision import Precision
from jaxcls.models.pretrained import Backbone
from jaxcls.svm.cross_validation import count_units, out_of_fold

C = 1.0
"""On features of length 1."""
MAX_FOLDS = 5


def check_labels(
    dataset: Dataset,
    backbone: Backbone | Classifier,
    *,
    seed: int = 0,
    cache: str | Path | None = None,
    num_workers: int = 0,
    precision: Precision = "auto",
    max_bad_fraction: float = 0.0,
    progress: bool = False,
    report: Report = lambda text: None,
) -> LabelErrors:
    """Rank the photos by how probably their label is wrong, with the label that they probably want.

    Photos of one group (`find_duplicates`) do not vouch for each other.

    Args:
        dataset: photos; unlabelled ones are left out.
        backbone: the network whose features are compared; one trained on these labels agrees with them.
        seed: of the folds.
        cache, num_workers, precision, max_bad_fraction, progress, report: as for `fit_svm`.

    Raises:
        DatasetError: undecodable photos, or a class without photos.
        ClassifierError: features that are not finite.
        UsageError: a class of a single photo.
    """
    dataset = dataset.select(np.flatnonzero(dataset.labels != UNLABELLED))
    dataset.require_every_class()
    dataset, values = features_of(
        as_backbone(backbone),
        dataset,
        None if cache is None else Path(cache),
        num_workers=num_workers,
        precision=precision,
        max_bad_fraction=max_bad_fraction,
        progress=progress,
        report=report,
    )
    values, labels, groups = normalize(values), dataset.labels, dataset.groups
    classes, ids = dataset.classes, tuple(dataset.ids.tolist())
    num_folds = max(2, min(MAX_FOLDS, *count_units(labels, len(classes), groups)))
    return find_label_errors(
        out_of_fold(values, labels, classes, ids, C=C, num_folds=num_folds, seed=seed, groups=groups),
        score_by_neighbours(values, labels, classes, ids, groups=groups),
    )

"""What a classifier's predictions are worth. Knows `Predictions`; neither models nor JAX."""

from jaxcls.evaluation import label_errors, metrics, neighbours, plots, thresholds
from jaxcls.evaluation.label_errors import LabelErrors, find_label_errors
from jaxcls.evaluation.metrics import Evaluation, evaluate
from jaxcls.evaluation.neighbours import score_by_neighbours

__all__ = [
    "Evaluation",
    "LabelErrors",
    "evaluate",
    "find_label_errors",
    "label_errors",
    "metrics",
    "neighbours",
    "plots",
    "score_by_neighbours",
    "thresholds",
]

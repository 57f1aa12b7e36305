"""What a classifier's predictions are worth. Knows `Predictions`; neither models nor JAX."""

from jaxcls.evaluation import metrics, plots
from jaxcls.evaluation.metrics import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate", "metrics", "plots"]

"""Our LinearSVC as a subject, in float32; "jaxcls-tight" finds the least objective, in float64."""

from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks.fitting import C, Fitting, make_features
from benchmarks.timing import Program
from benchmarks.worker import Task
from jaxcls.svm.newton import Solution
from jaxcls.svm.solver import LinearSVC

TIGHT = 1e-8


class _CountingSVC(LinearSVC):
    """Keeps the number of products."""

    def _keep(self, solution: Solution) -> None:
        super()._keep(solution)
        self.num_products_ = solution.num_products


def make_fitting(task: Task) -> Program:
    """The fit, and what it costs."""
    features, labels = make_features(task)
    is_tight = task.subject.endswith("-tight")
    return Fitting(
        partial(_CountingSVC, C=C, tol=TIGHT) if is_tight else partial(_CountingSVC, C=C),
        features.astype(float) if is_tight else features,
        labels,
        describe=partial(_cost, features),
    )


def _cost(features: np.ndarray, machine: _CountingSVC) -> dict[str, Any]:
    """On one device; of a pair of products the features are read once, as they stay in caches in between."""
    num_values = features.size / jax.local_device_count()
    return {
        "num_steps": machine.n_iter_,
        "num_products": machine.num_products_,
        "dtype": machine.coef_.dtype.name,
        "flops": 4 * num_values * len(machine.coef_) * machine.num_products_,
        "bytes": num_values * machine.coef_.itemsize * machine.num_products_,
    }

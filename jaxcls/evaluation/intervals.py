"""Confidence intervals by the bootstrap: how much a number owes to which images happened to be tested."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np

from jaxcls.errors import UsageError

Resample = TypeVar("Resample")


class Interval(NamedTuple):
    """From `low` to `high`; both NaN where the number is undefined."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.4f} to {self.high:.4f}"


def bootstrap(
    draw: Callable[[np.random.Generator], Resample],
    metrics: Mapping[str, Callable[[Resample], float]],
    *,
    level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile intervals (Efron 1979) of several numbers, from the same resamples.

    Args:
        draw: a test set of the same size, drawn from the images with replacement.
        metrics: name -> what is measured on it. Resamples for which a number is undefined (NaN), such as one
            that lacks a class, are left out of its interval; where more than half are, so is the interval.
        level: the share of resamples within an interval, in (0, 1).
        num_resamples: how many are drawn.
        seed: of the draws.

    Raises:
        UsageError: a level outside (0, 1), or no resamples.
    """
    if not 0 < level < 1 or num_resamples < 1:
        raise UsageError(f"level {level} must lie within (0, 1), and num_resamples {num_resamples} above 0")
    generator = np.random.default_rng(seed)
    resamples = (draw(generator) for _ in range(num_resamples))
    values = np.asarray([[metric(resample) for metric in metrics.values()] for resample in resamples])
    return {name: _interval(column, level) for name, column in zip(metrics, values.T, strict=True)}


def _interval(values: np.ndarray, level: float) -> Interval:
    defined = values[~np.isnan(values)]
    if len(defined) < len(values) / 2:
        return Interval(math.nan, math.nan)
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))

"""Many linear SVMs over the same samples at once: all products are of matrices, for all problems together.

Minimised is, for each problem p and as liblinear does it,

    f_p(w) = |w|^2 / 2 + sum_i c_pi max(0, 1 - y_pi w.x_i)^2

by the finite Newton method of Keerthi and DeCoste, "A Modified Finite Newton Method for Fast Solution of
Large Scale Linear SVMs", JMLR 6 (2005): directions by conjugate gradients on the samples inside the margin,
lengths by an exact line search, here on the slope alone, which rounding disturbs far less than the objective.
As f_p is strongly convex with constant 1, it lies above its minimum by at most |grad f_p|^2 / 2, the duality
gap: that is what the tolerance is compared with. The Newton decrement is smaller, ten to a hundred times, but
no bound: where few samples are inside the margin it is as much too small.

The Hessian of f_p is I + 2 sum_i c_pi x_i x_i' over the samples inside p's margin. Conjugate gradients are
preconditioned by what it would be were those a fair sample of all: I + 2 s_p G, of one second-moment matrix G
for all problems, whose eigenvectors are found once.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from jaxcls.svm.samples import Block, Samples, Spectrum

RESIDUAL = 0.2
"""Conjugate gradients end when the residual is this share of the gradient."""
MAX_PRODUCTS = 250
"""Conjugate gradients per direction."""
SLOPE = 0.02
"""The line search ends when the slope is this share of the first one."""
MAX_LENGTHS = 20
MANY = 16
"""Problems of which those that are done are left out of the products; of fewer, this would save little."""
NUM_STALLS = 3
"""Steps without progress after which the precision of the numbers is taken to be exhausted."""


class Problems(NamedTuple):
    """P SVMs, each of which tells one class from all others.

    Attributes:
        positive: int32 [P], the label of that class.
        positive_cost, negative_cost: float [P], of its samples and of the others.
        left_out: int32 [P], the fold whose samples do not count; -1: all do.
    """

    positive: Array | np.ndarray
    positive_cost: Array | np.ndarray
    negative_cost: Array | np.ndarray
    left_out: Array | np.ndarray


class Solution(NamedTuple):
    """What was found.

    Attributes:
        weights: float [P, D], that of the intercept's feature last.
        objective: float64 [P].
        gap: float64 [P], by how much the objective may lie above its minimum.
        num_steps: int [P].
        num_products: pairs of products with all samples, all in all.
    """

    weights: np.ndarray
    objective: NDArray[np.float64]
    gap: NDArray[np.float64]
    num_steps: NDArray[np.int64]
    num_products: int


class _State(NamedTuple):
    """Where problems stand, by problem."""

    weights: np.ndarray
    objective: np.ndarray
    gap: np.ndarray
    num_steps: np.ndarray
    num_stalls: np.ndarray
    best: np.ndarray

    def judge(self, objective: np.ndarray, gradient: Array, stepped: np.ndarray | bool) -> "_State":
        """With what was found at its weights, some of which a step has changed."""
        progress = self.best - objective > np.finfo(self.weights.dtype).eps * objective
        return self._replace(
            objective=objective,
            gap=0.5 * np.asarray(_dot(gradient, gradient), np.float64),
            num_stalls=np.where(progress, 0, self.num_stalls + stepped),
            best=np.minimum(self.best, objective),
        )

    def is_live(self, tolerance: float, max_steps: int) -> NDArray[np.bool_]:
        """Which are to go on."""
        is_near = self.gap <= tolerance * self.objective
        return ~is_near & (self.num_stalls < NUM_STALLS) & (self.num_steps < max_steps)


def minimize(samples: Samples, problems: Problems, *, tolerance: float, max_steps: int) -> Solution:
    """Solve all problems.

    Args:
        samples: N of them.
        problems: P of them.
        tolerance: each ends when its objective lies above the minimum by at most this share of itself.
        max_steps: of Newton's method; problems that need more have a larger gap.
    """
    num_problems = len(problems.positive)
    weights = np.zeros((num_problems, samples.width), samples.dtype)
    (num_steps, num_stalls), infinite = np.zeros((2, num_problems), np.int64), np.full(num_problems, np.inf)
    state = _State(weights, infinite, infinite.copy(), num_steps, num_stalls, infinite.copy())
    live, spectrum, num_products = np.arange(num_problems), samples.spectrum(), 0.0
    num_before = -1
    # Without a step, rounding alone told what is done from what is not.
    while len(live) and state.num_steps.sum() > num_before:
        num_before = state.num_steps.sum()
        some = Problems(*(values[live] for values in problems))
        found, used = _descend(
            samples, some, spectrum, _State(*(v[live] for v in state)), tolerance, max_steps
        )
        for values, own in zip(state, found, strict=True):
            values[live] = own
        # What was added to margins step by step had rounding errors of its own: the last word is without.
        asked, sent = samples.replicate((problems, state.weights))
        objective, gradient, _ = _evaluate(samples, asked, sent, _margins(samples, sent))
        state = state.judge(objective, gradient, stepped=False)
        live = np.flatnonzero(state.is_live(tolerance, max_steps))
        num_products += used + 1
    weights = state.weights[:, : samples.num_features + 1]
    return Solution(weights, state.objective, state.gap, state.num_steps, int(num_products))


def _descend(
    samples: Samples,
    problems: Problems,
    spectrum: Spectrum,
    state: _State,
    tolerance: float,
    max_steps: int,
) -> tuple[_State, float]:
    """Newton's method until half of many problems, or all of a few, are done; and the pairs of products."""
    problems, weights = samples.replicate((problems, state.weights))
    margins, num_products = _margins(samples, weights), 0.5
    is_live: np.ndarray | bool = False
    few = len(weights) // 2 if len(weights) > MANY else 0
    while True:
        objective, gradient, curvature = _evaluate(samples, problems, weights, margins)
        num_products += 0.5
        state = state.judge(objective, gradient, is_live)
        is_live = state.is_live(tolerance, max_steps)
        if is_live.sum() <= few:
            return state._replace(weights=np.asarray(weights)), num_products
        preconditioner = _Preconditioner(spectrum, curvature / samples.total_weight)
        direction, used = _direction(samples, problems, preconditioner, margins, gradient, is_live)
        along = _margins(samples, direction)
        lengths = _lengths(samples, problems, weights, direction, gradient, margins, along)
        weights = weights + lengths[:, None] * direction
        margins = [_add(one, lengths, change) for one, change in zip(margins, along, strict=True)]
        state = state._replace(num_steps=state.num_steps + is_live)
        num_products += used + 0.5


@jax.jit
def _dot(a: Array, b: Array) -> Array:
    """Row by row."""
    return (a * b).sum(1)


@jax.jit
def _add(margins: Array, lengths: Array, change: Array) -> Array:
    return margins + lengths[:, None] * change


@jax.jit
def _product(weights: Array, features: Array) -> Array:
    """float [P, D] x [n, D] -> [P, n]. Problems come first in all matrices: far faster on CPU than last."""
    return jnp.matmul(weights, features.T, precision="highest")


def _margins(samples: Samples, weights: Array) -> list[Array]:
    return [_product(weights, block.features) for block in samples.blocks()]


def _signs_and_costs(block: Block, problems: Problems) -> tuple[Array, Array]:
    """float [P, n]: y, and c with the samples' weights."""
    of = Problems(*(jnp.asarray(values)[:, None] for values in problems))
    is_positive = block.labels[None] == of.positive
    costs = jnp.where(is_positive, of.positive_cost, of.negative_cost) * block.weights[None]
    signs = jnp.where(is_positive, 1, -1).astype(block.features.dtype)
    return signs, jnp.where(block.folds[None] == of.left_out, 0, costs)


@jax.jit
def _loss(block: Block, problems: Problems, margins: Array) -> tuple[Array, Array, Array]:
    """A block's part of f_p, of its gradient, and of the sum of its second derivatives by margins."""
    signs, costs = _signs_and_costs(block, problems)
    slack = jnp.maximum(1 - signs * margins, 0)
    gradient = jnp.matmul(-2 * costs * signs * slack, block.features, precision="highest")
    return (costs * slack**2).sum(1), gradient, jnp.where(slack > 0, 2 * costs, 0).sum(1)


def _evaluate(
    samples: Samples, problems: Problems, weights: Array, margins: Sequence[Array]
) -> tuple[NDArray[np.float64], Array, Array]:
    """f_p, its gradient, and the sum of its second derivatives by margins."""
    objective, gradient = 0.5 * np.asarray(_dot(weights, weights), np.float64), weights
    curvature = jnp.zeros_like(weights[:, 0])
    for block, own in zip(samples.blocks(), margins, strict=True):
        loss, *parts = _loss(block, problems, own)
        objective = objective + np.asarray(loss, np.float64)
        gradient, curvature = gradient + parts[0], curvature + parts[1]
    return objective, gradient, curvature


@jax.jit
def _add_curvature(total: Array, block: Block, problems: Problems, margins: Array, direction: Array) -> Array:
    """Add a block's part of the product of Hessians and directions. Need not be exact: it only directs."""
    signs, costs = _signs_and_costs(block, problems)
    active = jnp.where(signs * margins < 1, 2 * costs, 0)
    return total + jnp.matmul(active * jnp.matmul(direction, block.features.T), block.features)


class _Preconditioner(NamedTuple):
    """I + scale_p G, as a Hessian would be were the samples inside the margin a fair sample of all."""

    spectrum: Spectrum
    scales: Array

    def solve(self, residual: Array) -> Array:
        """float [P, D]."""
        values, vectors = self.spectrum
        if not len(values):
            return residual
        return jnp.matmul(
            jnp.matmul(residual, vectors) / (1 + self.scales[:, None] * values[None]), vectors.T
        )


class _Search(NamedTuple):
    """Conjugate gradients, of all problems at once."""

    direction: Array
    residual: Array
    conjugate: Array
    square: Array
    is_live: Array


@jax.jit
def _start(preconditioner: _Preconditioner, gradient: Array, is_live: Array) -> _Search:
    residual = jnp.where(is_live[:, None], -gradient, 0)
    conjugate = preconditioner.solve(residual)
    return _Search(jnp.zeros_like(gradient), residual, conjugate, _dot(residual, conjugate), is_live)


@jax.jit
def _improve(search: _Search, preconditioner: _Preconditioner, product: Array, targets: Array) -> _Search:
    length = jnp.where(search.is_live, search.square / _dot(search.conjugate, product), 0)[:, None]
    residual = search.residual - length * product
    solved = preconditioner.solve(residual)
    square = _dot(residual, solved)
    is_live = search.is_live & (_dot(residual, residual) > targets)
    ratio = jnp.where(is_live, square / search.square, 0)[:, None]
    conjugate = jnp.where(is_live[:, None], solved + ratio * search.conjugate, 0)
    return _Search(search.direction + length * search.conjugate, residual, conjugate, square, is_live)


def _direction(
    samples: Samples,
    problems: Problems,
    preconditioner: _Preconditioner,
    margins: Sequence[Array],
    gradient: Array,
    is_live: NDArray[np.bool_],
) -> tuple[Array, int]:
    """Newton's direction, 0 where nothing is to be done, and how many pairs of products it took."""
    search = _start(preconditioner, gradient, samples.replicate(is_live))
    targets = RESIDUAL**2 * _dot(gradient, gradient)
    num_products = 0
    while num_products < MAX_PRODUCTS and search.is_live.any():
        product = search.conjugate
        for block, own in zip(samples.blocks(), margins, strict=True):
            product = _add_curvature(product, block, problems, own, search.conjugate)
        search = _improve(search, preconditioner, product, targets)
        num_products += 1
    return search.direction, num_products


@jax.jit
def _slope(
    block: Block, problems: Problems, margins: Array, along: Array, lengths: Array
) -> tuple[Array, Array]:
    """First and second derivative of a block's part of f_p with respect to the length."""
    signs, costs = _signs_and_costs(block, problems)
    slack = jnp.maximum(1 - signs * (margins + lengths[:, None] * along), 0)
    first = (-2 * costs * signs * slack * along).sum(1)
    return first, jnp.where(slack > 0, 2 * costs * along**2, 0).sum(1)


def _lengths(
    samples: Samples,
    problems: Problems,
    weights: Array,
    direction: Array,
    gradient: Array,
    margins: Sequence[Array],
    along: Sequence[Array],
) -> Array:
    """Where along each direction f_p is smallest: its slope is piecewise linear and rising."""
    start, across, square = (
        np.asarray(_dot(direction, other), np.float64) for other in (gradient, weights, direction)
    )

    def slopes(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first, second = across + lengths * square, square
        sent = samples.replicate(lengths.astype(samples.dtype))
        for block, own, change in zip(samples.blocks(), margins, along, strict=True):
            part = _slope(block, problems, own, change, sent)
            first, second = first + np.asarray(part[0]), second + np.asarray(part[1])
        return first, second

    return samples.replicate(_find_zeros(slopes, SLOPE * np.abs(start)).astype(samples.dtype))


def _find_zeros(
    slopes: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], accuracy: np.ndarray
) -> np.ndarray:
    """Newton's method from 1, kept between what was too short and what was too long."""
    lengths = np.ones_like(accuracy)
    low, high = np.zeros_like(accuracy), np.full_like(accuracy, np.inf)
    for _ in range(MAX_LENGTHS):
        first, second = slopes(lengths)
        is_found = np.abs(first) <= accuracy
        if is_found.all():
            break
        low, high = np.where(first < 0, lengths, low), np.where(first > 0, lengths, high)
        better = lengths - first / np.where(second > 0, second, 1)
        between = np.where(np.isfinite(high), (low + high) / 2, 2 * lengths)
        better = np.where((better > low) & (better < high), better, between)
        lengths = np.where(is_found, lengths, better)
    return lengths

"""Scores from the labels of the images that look alike: out-of-fold by construction, without training."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from jaxcls.errors import UsageError
from jaxcls.predictions import Predictions

MAX_CELLS = 2**25
"""Similarities that are in memory at once."""


def score_by_neighbours(
    values: NDArray[np.float32],
    labels: NDArray[np.int32],
    classes: Sequence[str],
    ids: Sequence[str],
    *,
    num_neighbours: int = 20,
    groups: NDArray[np.int32] | None = None,
) -> Predictions:
    """Let each image's nearest neighbours vote on its class; its own label has no say.

    Neighbours are those of largest cosine similarity. A probability is (votes + share) / (voters + 1), where
    the share is that of the class among all labels: what the image would get without neighbours. All N^2
    similarities are computed, in blocks.

    Args:
        values: [N, D], features as of `extract_features`; finite.
        labels: [N]; unlabelled images (-1) get scores too, but vote on none.
        classes: K names.
        ids: N names.
        num_neighbours: how many vote, or all others where there are fewer.
        groups: [N]; images of one group, such as duplicates, do not vote on each other. None: no groups.

    Returns:
        Predictions of kind "probability" that carry the labels.

    Raises:
        UsageError: num_neighbours below 1, no labels, features that are not finite, or parts that do not fit
            together.
    """
    N, K = len(ids), len(classes)
    voters = np.flatnonzero(labels >= 0)
    own_groups = np.arange(N) if groups is None else groups
    if num_neighbours < 1:
        raise UsageError(f"num_neighbours is {num_neighbours}: it must be 1 or more")
    if not len(values) == len(labels) == len(own_groups) == N:
        raise UsageError(
            f"{len(values)} features, {len(labels)} labels, {len(own_groups)} groups and {N} ids"
        )
    if not len(voters):
        raise UsageError("no image is labelled: neighbours have nothing to vote with")
    if not np.isfinite(values).all():
        raise UsageError("features are not finite: the weights have diverged or are damaged")
    directions = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    shares = np.bincount(labels[voters], minlength=K) / len(voters)
    scores = np.empty((N, K), np.float32)
    for rows in np.array_split(np.arange(N), -(-N * len(voters) // MAX_CELLS)):
        similarities = directions[rows] @ directions[voters].T
        similarities[own_groups[rows, None] == own_groups[voters]] = -np.inf
        votes = _count_votes(similarities, labels[voters], K, num_neighbours)
        scores[rows] = (votes + shares) / (votes.sum(axis=1, keepdims=True) + 1)
    return Predictions(
        scores, "probability", tuple(classes), tuple(ids), labels.astype(np.int32), np.zeros(N, np.bool_)
    )


def _count_votes(
    similarities: NDArray[np.float32], labels: NDArray[np.int32], num_classes: int, count: int
) -> NDArray[np.int64]:
    """[n, K]: the labels [M] of the largest `count` of each row of similarities [n, M], if finite."""
    count = min(count, len(labels))
    largest = np.argpartition(-similarities, count - 1, axis=1)[:, :count]
    rows, places = np.nonzero(np.isfinite(np.take_along_axis(similarities, largest, axis=1)))
    votes = np.zeros((len(similarities), num_classes), np.int64)
    np.add.at(votes, (rows, labels[largest[rows, places]]), 1)
    return votes

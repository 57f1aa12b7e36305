"""Which photos go into the training set: a pure function of seed, ids, labels and groups.

A unit is an array of positions that stay together: a group, or a single photo.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from jaxcls.errors import DatasetError

Unit = np.ndarray
Strata = Mapping[str, Sequence[Unit]]


def shuffled_units(ids: np.ndarray, groups: np.ndarray | None, seed: int) -> list[Unit]:
    """The units of ids string [N] and groups int32 [N] or None, in an order drawn from seed and ids."""
    group_of = np.arange(len(ids)) if groups is None else groups
    order = np.argsort(group_of, kind="stable")
    starts = np.flatnonzero(np.diff(group_of[order], prepend=group_of[order[0]] - 1))
    units = np.split(order, starts[1:])
    # A keyed hash, not a generator: the same on every platform and NumPy version, and photos
    # added later leave the order of the others as it is.
    ranks = [_rank(seed, min(ids[i] for i in unit)) for unit in units]
    return [units[i] for i in sorted(range(len(units)), key=ranks.__getitem__)]


def by_class(units: Sequence[Unit], labels: np.ndarray, classes: Sequence[str]) -> dict[str, list[Unit]]:
    """Class name -> its units, in order; a group of several classes counts to its most frequent one."""
    strata: dict[str, list[Unit]] = {}
    for unit in units:
        values, counts = np.unique(labels[unit], return_counts=True)
        label = values[counts.argmax()]
        strata.setdefault("(unlabelled)" if label < 0 else f"class {classes[label]}", []).append(unit)
    return strata


def choose_training(strata: Strata, target: int) -> np.ndarray:
    """Positions of `target` training photos, or as near as whole groups come, shared out over the strata.

    Raises:
        DatasetError: a stratum of one unit, or a target that leaves a stratum without a side.
    """
    quotas = _quotas(strata, target)
    chosen, missing = [], 0
    # The flexible ones last: single photos make up for groups that did not fit.
    for name in sorted(strata, key=lambda name: (sum(len(unit) == 1 for unit in strata[name]), name)):
        positions, missing = _take(strata[name], quotas[name] + missing)
        chosen.append(positions)
    return np.concatenate(chosen)


def _rank(seed: int, identifier: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{identifier}".encode(), digest_size=16).digest()


def _quotas(strata: Strata, target: int) -> dict[str, int]:
    """Training photos per stratum by largest remainder, at least one on each side of every stratum."""
    if single := [name for name, units in strata.items() if len(units) < 2]:
        raise DatasetError(
            f"{', '.join(single)} has a single image or group, and a split needs two: "
            "add images, leave the class out, or split with stratify=False"
        )
    counts = np.asarray([sum(map(len, units)) for units in strata.values()])
    total = int(counts.sum())
    if not len(strata) <= target <= total - len(strata):
        raise DatasetError(
            f"{target} training and {total - target} test images cannot hold one of each of "
            f"{len(strata)} classes: change train_size, or split with stratify=False"
        )
    shares = counts * target / total
    quotas = np.clip(np.floor(shares).astype(int), 1, counts - 1)
    while (missing := target - quotas.sum()) != 0:
        step = int(np.sign(missing))
        room = (quotas + step >= 1) & (quotas + step <= counts - 1)
        quotas[np.where(room, step * (shares - quotas), -np.inf).argmax()] += step
    return dict(zip(strata, map(int, quotas), strict=True))


def _take(units: Sequence[Unit], quota: int) -> tuple[np.ndarray, int]:
    """Some of the units, never all, of `quota` photos or as near as can be; and how many are missing."""
    chosen, room = [], min(max(quota, 1), sum(map(len, units)) - 1)
    for unit in units:
        if len(unit) <= room:
            chosen.append(unit)
            room -= len(unit)
    positions = np.concatenate(_nearest_sum(units, quota) if room else chosen)
    return positions, quota - len(positions)


def _nearest_sum(units: Sequence[Unit], quota: int) -> list[Unit]:
    """The units, not none and not all, whose sizes add up to the sum nearest to `quota` (subset sum)."""
    reached = [1]  # Bit s of number n: some of the first n units hold s photos.
    for unit in units:
        reached.append(reached[-1] | reached[-1] << len(unit))
    sums = [total for total in range(1, sum(map(len, units))) if reached[-1] >> total & 1]
    total, chosen = min(sums, key=lambda total: abs(total - quota)), []
    for unit, reached_before in zip(units[::-1], reached[-2::-1], strict=True):
        if not reached_before >> total & 1:
            chosen.append(unit)
            total -= len(unit)
    return chosen

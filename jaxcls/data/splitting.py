"""Which photos go into the training set: a pure function of seed, ids, labels and groups.

A unit is an array of positions that stay together: a group, or a single photo.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_

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
    # The flexible ones first, as they are decided last: single photos make up for groups that did not fit.
    names = sorted(strata, key=lambda name: (sum(len(unit) == 1 for unit in strata[name]), name))[::-1]
    possible = [_possible_counts(strata[name]) for name in names]
    counts = _choose_counts(possible, [quotas[name] for name in names], target)
    return np.concatenate([_take(strata[name], count) for name, count in zip(names, counts, strict=True)])


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


# A set of numbers is an integer here: bit n says whether n belongs to it.


def _subset_sums(units: Sequence[Unit]) -> tuple[list[tuple[int, int]], list[int]]:
    """All numbers of photos that some of the units hold.

    Returns:
        Parcels (size of a unit, number of such units): 1, 2, 4, ... units of each size and the rest, so that
        they are few; and the sets of sums of the first 0, 1, ... parcels.
    """
    parcels, sums = [], [1]
    for size, left in sorted(Counter(map(len, units)).items()):
        number = 1
        while left:
            number = min(number, left)
            parcels.append((size, number))
            sums.append(sums[-1] | sums[-1] << size * number)
            left, number = left - number, 2 * number
    return parcels, sums


def _possible_counts(units: Sequence[Unit]) -> int:
    """The set of numbers of photos of some of the units, but not of none and not of all."""
    _, sums = _subset_sums(units)
    return sums[-1] & ~1 & ~(1 << sum(map(len, units)))


def _choose_counts(possible: Sequence[int], quotas: Sequence[int], target: int) -> list[int]:
    """A possible count for each stratum, their sum as near to `target` as can be.

    From the last stratum to the first, each is as near to its quota as those before it allow.
    """
    if all(counts >> quota & 1 for counts, quota in zip(possible, quotas, strict=True)):
        return list(quotas)
    totals = [1]
    for counts in possible:
        totals.append(reduce(or_, (totals[-1] << count for count in _members(counts))))
    left, chosen = _nearest(_members(totals[-1]), target), []
    for counts, before, quota in zip(possible[::-1], totals[-2::-1], quotas[::-1], strict=True):
        fitting = [count for count in _members(counts) if count <= left and before >> left - count & 1]
        chosen.append(_nearest(fitting, quota))
        left -= chosen[-1]
    return chosen[::-1]


def _members(numbers: int) -> list[int]:
    return [n for n, bit in enumerate(reversed(f"{numbers:b}")) if bit == "1"]


def _nearest(numbers: Sequence[int], wanted: int) -> int:
    return min(numbers, key=lambda number: abs(number - wanted))


def _take(units: Sequence[Unit], count: int) -> np.ndarray:
    """Positions of units that hold `count` photos: the first ones that fit or, if they hold less, others."""
    chosen, room = [], count
    for unit in units:
        if len(unit) <= room:
            chosen.append(unit)
            room -= len(unit)
    return np.concatenate(_with_sum(units, count) if room else chosen)


def _with_sum(units: Sequence[Unit], count: int) -> list[Unit]:
    parcels, sums = _subset_sums(units)
    wanted = Counter[int]()
    for (size, number), before in zip(parcels[::-1], sums[-2::-1], strict=True):
        if not before >> count & 1:
            wanted[size] += number
            count -= size * number
    chosen = []
    for unit in units:
        if wanted[len(unit)]:
            chosen.append(unit)
            wanted[len(unit)] -= 1
    return chosen

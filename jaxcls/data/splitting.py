"""Which photos go into the training set: a function of seed, ids, labels, groups and an earlier split."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import or_
from pathlib import Path

import numpy as np

from jaxcls.data.lines import from_line, to_line
from jaxcls.errors import DatasetError, UsageError
from jaxcls.storage import write_whole

FREE, TRAINING, TEST = 0, 1, 2
"""The sides of units."""
BLOCK_SIZE = 2**14
"""Units whose ids are Python strings at once."""
NUM_SHOWN = 20
"""Photos that a note names."""
TRAIN_IDS, TEST_IDS = "train_ids.txt", "test_ids.txt"
"""The files that tell how a run's photos were split, an id in each line."""


@dataclass(frozen=True, eq=False)
class Units:
    """What stays together: groups, and single photos; in an order.

    Attributes:
        positions: int64 [N]: those of the first unit's photos, then of the second's, ...
        sizes: int64 [U]: the number of photos of each unit.
        sides: int8 [U]: TRAINING or TEST where that is settled, else FREE.
    """

    positions: np.ndarray
    sizes: np.ndarray
    sides: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [U]: where each unit's photos begin in `positions`."""
        return np.cumsum(self.sizes) - self.sizes

    def select(self, chosen: np.ndarray) -> "Units":
        """The units at `chosen`, int [V], in that order."""
        sizes = self.sizes[chosen]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        positions = self.positions[np.repeat(self.starts[chosen], sizes) + within]
        return Units(positions, sizes, self.sides[chosen])

    def on(self, side: int) -> "Units":
        """Those on one side, in order."""
        return self.select(np.flatnonzero(self.sides == side))

    @property
    def num_photos(self) -> int:
        """N."""
        return len(self.positions)


Strata = Mapping[str, Units]


def shuffled_units(ids: np.ndarray, groups: np.ndarray | None, seed: int) -> Units:
    """The units of ids string [N] and groups int32 [N] or None, in an order drawn from seed and ids; free."""
    group_of = np.arange(len(ids)) if groups is None else groups.astype(np.int64)
    order = np.argsort(group_of, kind="stable")
    starts = np.flatnonzero(np.diff(group_of[order], prepend=group_of[order[0]] - 1))
    sizes = np.diff(starts, append=len(order))
    units = Units(order, sizes, np.zeros(len(starts), np.int8))
    # A keyed hash, not a generator: the same on every platform and NumPy version, and photos
    # added later leave the order of the others as it is.
    ranks = bytearray()
    for first in range(0, len(units), BLOCK_SIZE):
        some = units.select(np.arange(first, min(first + BLOCK_SIZE, len(units))))
        names = ids[some.positions].tolist()
        for start, size in zip(some.starts.tolist(), some.sizes.tolist(), strict=True):
            ranks += _rank(seed, min(names[start : start + size]))
    high, low = np.frombuffer(ranks, ">u8").reshape(-1, 2).T
    return units.select(np.lexsort((low, high)))


@dataclass(frozen=True, eq=False)
class Kept:
    """Units of N photos, some of them settled by an earlier split.

    Attributes:
        units: a unit with a photo of the earlier split is on its side.
        was_training, was_test: bool [N], the sides that the earlier split had.
    """

    units: Units
    was_training: np.ndarray
    was_test: np.ndarray

    def describe(self, ids: np.ndarray, in_training: np.ndarray) -> tuple[str, ...]:
        """What became of the N photos, of which some, bool [N], are in the training set now."""
        is_new = ~(self.was_training | self.was_test)
        new = [int((is_new & side).sum()) for side in (in_training, ~in_training)]
        old = [int(side.sum()) for side in (self.was_training & in_training, self.was_test & ~in_training)]
        notes = [
            f"the split is kept: {old[0]} training and {old[1]} test images stay, "
            f"{new[0]} training and {new[1]} test images are new"
        ]
        moved = np.flatnonzero(self.was_test & in_training)
        if len(moved):
            shown = ", ".join(ids[moved[:NUM_SHOWN]]) + (", ..." if len(moved) > NUM_SHOWN else "")
            notes.append(
                f"{len(moved)} of its test images went over to the training set, "
                f"where others of their group are: {shown}"
            )
        return tuple(notes)


def keep_sides(units: Units, ids: np.ndarray, train_ids: Iterable[str], test_ids: Iterable[str]) -> Kept:
    """Settle what an earlier split settled.

    A group with photos of both its sides is trained on: tested on, it would flatter the classifier that was
    trained on some of it.

    Raises:
        UsageError: an id is on both sides, or none is among `ids`.
    """
    training, test = set(train_ids), set(test_ids)
    if both := training & test:
        raise UsageError(
            f"the split to keep has {len(both)} ids on both sides, first {min(both)}: was it of two folders?"
        )
    was_training, was_test = (
        np.fromiter((name in side for name in ids), bool, len(ids)) for side in (training, test)
    )
    if not (was_training | was_test).any():
        raise UsageError("the split to keep has none of these images: is it one of another folder?")
    has_training, has_test = (
        np.logical_or.reduceat(was[units.positions], units.starts) for was in (was_training, was_test)
    )
    sides = np.select([has_training, has_test], [TRAINING, TEST], FREE).astype(np.int8)
    return Kept(replace(units, sides=sides), was_training, was_test)


def by_class(units: Units, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Units]:
    """Class name -> its units, in order; a group of several classes counts to its most frequent one."""
    unit_of = np.repeat(np.arange(len(units)), units.sizes)
    # Labels begin at -1.
    num_labels = len(classes) + 1
    found, counts = np.unique(unit_of * num_labels + labels[units.positions] + 1, return_counts=True)
    owners, values = np.divmod(found, num_labels)
    most = np.lexsort((values, -counts, owners))
    label_of = values[most][np.flatnonzero(np.diff(owners[most], prepend=-1))] - 1
    present, firsts, counts = np.unique(label_of, return_index=True, return_counts=True)
    members = np.split(np.argsort(label_of, kind="stable"), np.cumsum(counts)[:-1])
    return {
        "(unlabelled)" if present[i] < 0 else f"class {classes[present[i]]}": units.select(members[i])
        for i in np.argsort(firsts)
    }


def choose_training(strata: Strata, target: int) -> np.ndarray:
    """Positions of `target` training photos, or as near as whole groups come, shared out over the strata.

    Where units are settled, as near as they let it come.

    Raises:
        DatasetError: a stratum of one unit, or a target that leaves a stratum without a side, and nothing is
            settled.
    """
    quotas = _quotas(strata, target)
    # The flexible ones first, as they are decided last: single photos make up for groups that did not fit.
    singles = {name: int((units.on(FREE).sizes == 1).sum()) for name, units in strata.items()}
    names = sorted(strata, key=lambda name: (singles[name], name))[::-1]
    possible = [_possible_counts(strata[name]) for name in names]
    counts = _choose_counts(possible, [quotas[name] for name in names], target)
    return np.concatenate([_take(strata[name], count) for name, count in zip(names, counts, strict=True)])


def write_split(folder: Path, train_ids: Iterable[str], test_ids: Iterable[str]) -> None:
    """Write the ids of both sides into a folder, for `read_split`, which finds both or a file missing."""
    (folder / TEST_IDS).unlink(missing_ok=True)
    for name, ids in ((TRAIN_IDS, train_ids), (TEST_IDS, test_ids)):
        write_whole(folder / name, "".join(f"{to_line(i)}\n" for i in ids).encode())


def read_split(folder: Path) -> tuple[list[str], list[str]]:
    """The ids of both sides that `write_split` wrote into a folder: training, test.

    Raises:
        UsageError: one is not there, cannot be read or is cut off, or none was trained on.
    """
    sides = []
    for name in (TRAIN_IDS, TEST_IDS):
        try:
            with (folder / name).open(encoding="utf-8", newline="") as file:
                *lines, rest = file.read().split("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no UTF-8"
            raise UsageError(
                f"{folder / name} cannot be read: {reason}: give the folder of a run that held photos out"
            ) from error
        if rest or (not lines and name == TRAIN_IDS):
            raise UsageError(f"{folder / name} is cut off: give the folder of another run, or split anew")
        sides.append([from_line(line) for line in lines])
    return sides[0], sides[1]


def _rank(seed: int, identifier: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{identifier}".encode(), digest_size=16).digest()


def _quotas(strata: Strata, target: int) -> dict[str, int]:
    """Training photos per stratum by largest remainder, at least one on each side of every stratum.

    What is settled stays so.
    """
    is_settled = any((units.sides != FREE).any() for units in strata.values())
    if single := [name for name, units in strata.items() if len(units) < 2 and units.sides[0] == FREE]:
        raise DatasetError(
            f"{', '.join(single)} has a single image or group, and a split needs two: "
            "add images, leave the class out, or split with stratify=False"
        )
    counts = np.asarray([units.num_photos for units in strata.values()])
    settled = [
        np.asarray([units.on(side).num_photos for units in strata.values()]) for side in (TRAINING, TEST)
    ]
    least = np.minimum(np.maximum(settled[0], 1), counts - settled[1])
    most = np.maximum(np.minimum(counts - settled[1], counts - 1), settled[0])
    total = int(counts.sum())
    if not is_settled and not least.sum() <= target <= most.sum():
        raise DatasetError(
            f"{target} training and {total - target} test images cannot hold one of each of "
            f"{len(strata)} classes: change train_size, or split with stratify=False"
        )
    target = int(np.clip(target, least.sum(), most.sum()))
    shares = counts * target / total
    quotas = np.clip(np.floor(shares).astype(int), least, most)
    while (missing := int(target - quotas.sum())) != 0:
        step = 1 if missing > 0 else -1
        room = most - quotas if missing > 0 else quotas - least
        chosen = np.where(room > 0, step * (shares - quotas), -np.inf).argmax()
        # One by one; in larger portions where so much is settled that it would take long.
        quotas[chosen] += step * min(room[chosen], max(1, abs(missing) // (4 * len(quotas))))
    return dict(zip(strata, map(int, quotas), strict=True))


# A set of numbers is an integer here: bit n says whether n belongs to it.


def _subset_sums(sizes: np.ndarray) -> tuple[list[tuple[int, int]], list[int]]:
    """All numbers of photos that some of the units of these sizes hold.

    Returns:
        Parcels (size of a unit, number of such units): 1, 2, 4, ... units of each size and the rest, so that
        they are few; and the sets of sums of the first 0, 1, ... parcels.
    """
    parcels, sums = [], [1]
    for size, left in zip(*(values.tolist() for values in np.unique(sizes, return_counts=True)), strict=True):
        number = 1
        while left:
            number = min(number, left)
            parcels.append((size, number))
            sums.append(sums[-1] | sums[-1] << size * number)
            left, number = left - number, 2 * number
    return parcels, sums


def _possible_counts(units: Units) -> int:
    """The set of numbers of training photos, neither none nor all of them unless that is settled."""
    _, sums = _subset_sums(units.on(FREE).sizes)
    counts = sums[-1] << units.on(TRAINING).num_photos
    return counts & ~1 & ~(1 << units.num_photos) or counts


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


def _take(units: Units, count: int) -> np.ndarray:
    """Positions of `count` training photos: settled ones, then free units: the first that fit, or others."""
    settled, free = units.on(TRAINING), units.on(FREE)
    room = count = count - settled.num_photos
    chosen = []
    for unit, size in enumerate(free.sizes.tolist()):
        if size <= room:
            chosen.append(unit)
            room -= size
    if room:
        chosen = _with_sum(free.sizes, count)
    return np.concatenate([settled.positions, free.select(np.asarray(chosen, np.int64)).positions])


def _with_sum(sizes: np.ndarray, count: int) -> list[int]:
    """The first units of these sizes that hold `count` photos, as many of each size as it takes."""
    parcels, sums = _subset_sums(sizes)
    wanted = Counter[int]()
    for (size, number), before in zip(parcels[::-1], sums[-2::-1], strict=True):
        if not before >> count & 1:
            wanted[size] += number
            count -= size * number
    chosen = []
    for unit, size in enumerate(sizes.tolist()):
        if wanted[size]:
            chosen.append(unit)
            wanted[size] -= 1
    return chosen

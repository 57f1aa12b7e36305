"""Photos that show the same: exact copies, and copies that were resized, recompressed, cropped or brightened.

Hashes propose pairs; the pixels of one photo laid over the other confirm or refuse them (`hashing`,
`alignment`). Every photo of a group was confirmed against one and the same of them: photos that form a chain,
each like the next, do not all become one group.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from jaxcls.data.alignment import SIZE, outlines, similarity, thumbnail
from jaxcls.data.dataset import Dataset
from jaxcls.data.hashing import hash_signs, near_pairs
from jaxcls.errors import ImageError, UsageError
from jaxcls.progress import map_threads

MIN_SIMILARITY = 0.92
"""Photos this similar show the same."""
MIN_COSINE, MIN_SIMILARITY_WITH_FEATURES = 0.94, 0.85
"""So do those whose features have this cosine, if they are this similar."""
MIN_SIDE = 32
"""Pixels; smaller pictures have too few of them to tell a near copy from another picture."""

ZOOMS = (1.0, 1.05, 1.1)
"""Whole photos and middles of photos are looked up among the whole ones, so that crops are found."""
MAX_DISTANCE = 48
"""Of 256 bits. Of 10,000 pairs of different photos, one has nearer hashes than 53."""
MAX_FEATURE_DISTANCE = 56

BLOCK_SIZE = 256
"""Pairs that a thread compares at once, and thumbnails hashed at once."""
NUM_SHOWN = 20
"""Photos that a warning names."""

Pairs = np.ndarray
"""int64 [P, 2]: positions, the smaller first."""


@dataclass(frozen=True, eq=False)
class Duplicates:
    """Which of N photos show the same.

    Attributes:
        dataset: the photos.
        groups: int32 [N], as `Dataset.groups`: a number for each group and each photo without duplicates.
        originals: int32 [N]: the first photo with the same size and pixels; mostly the photo itself. JPEGs
            count by their pixels at the reduced scale at which they are decoded here.
        pairs: int64 [P, 2]: near duplicates, all of them originals; of two groups where a chain was cut.
        similarities: float32 [P], as by `alignment.similarity`.
        errors: position -> message, for photos that cannot be read: each is a group of its own.
    """

    dataset: Dataset
    groups: np.ndarray
    originals: np.ndarray
    pairs: Pairs
    similarities: np.ndarray
    errors: Mapping[int, str]

    @property
    def num_exact(self) -> int:
        """Photos with the pixels of an earlier one."""
        return int((self.originals != np.arange(len(self.originals))).sum())

    @property
    def num_near(self) -> int:
        """Photos that could be left out besides, so that one of each group would be left."""
        return len(self.groups) - self.num_exact - len(self.members)

    @property
    def members(self) -> list[np.ndarray]:
        """The positions of each group's photos, groups of one included."""
        if not len(self.groups):
            return []
        order = np.argsort(self.groups, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(self.groups[order])) + 1)

    def twins(self, in_test: np.ndarray) -> dict[int, int]:
        """Test photos that show the same as a training photo: position -> that of the most similar one.

        Args:
            in_test: bool [N]; the others are training photos.
        """
        training = {int(self.originals[i]): int(i) for i in np.flatnonzero(~in_test)[::-1]}
        twin_of = dict(training)
        for pair in self.pairs[np.argsort(-self.similarities, kind="stable")].tolist():
            for shown, other in (pair, pair[::-1]):
                if other in training:
                    twin_of.setdefault(shown, training[other])
        originals = self.originals.tolist()
        test = np.flatnonzero(in_test).tolist()
        return {photo: twin_of[originals[photo]] for photo in test if originals[photo] in twin_of}

    def summary(self) -> str:
        """The numbers of copies, and the groups with two photos or more."""
        groups = [group for group in self.members if len(group) > 1]
        lines = [
            f"{self.dataset.name}: groups of images that show the same: {len(groups)} "
            f"({self.num_exact} exact and {self.num_near} near copies)"
        ]
        lines += [f"  {self._describe(group)}" for group in groups]
        return "\n".join([*lines, *(f"not compared: {message}" for message in self.errors.values())])

    def _describe(self, group: np.ndarray) -> str:
        is_exact = len(set(self.originals[group].tolist())) == 1
        has_classes = len(set(self.dataset.labels[group].tolist())) > 1
        notes = ", ".join(["exact"] * is_exact + ["of different classes"] * has_classes)
        return ", ".join(self.dataset.ids[group]) + (f" ({notes})" if notes else "")


def find_duplicates(dataset: Dataset, *, features: np.ndarray | None = None) -> Duplicates:
    """Find photos that show the same, decoding each once, small, on all cores.

    Time grows nearly in proportion to the number of photos; memory by 14 KB for each.

    Args:
        dataset: N photos, labelled or not.
        features: float32 [N, D], such as from `jaxcls.extract_features`. Photos with parallel features are
            compared too, and need be less similar.

    Raises:
        UsageError: features of another number of photos.
    """
    if features is not None and (features.ndim != 2 or len(features) != len(dataset)):
        raise UsageError(f"features of {len(dataset)} images are [{len(dataset)}, D], not {features.shape}")
    photos = _read(dataset)
    directions = None if features is None else _normalize(features[photos.comparable])
    confirm = _make_confirm(photos.thumbnails, directions)
    proposed = _propose(photos.thumbnails, directions)
    centres, pairs, similarities = _gather(len(photos.thumbnails), proposed, confirm)
    group_of = np.arange(len(dataset))
    group_of[photos.comparable] = photos.comparable[centres]
    return Duplicates(
        dataset=dataset,
        groups=np.unique(group_of[photos.originals], return_inverse=True)[1].astype(np.int32),
        originals=photos.originals,
        pairs=photos.comparable[pairs],
        similarities=similarities,
        errors=photos.errors,
    )


def find_leakage(train: Dataset, test: Dataset) -> dict[str, str]:
    """Test photos that show the same as a training photo: id -> id of the most similar training photo."""
    both = replace(train, name="train").merge(replace(test, name="test"))
    twins = find_duplicates(both).twins(np.arange(len(both)) >= len(train))
    return {test.ids[photo - len(train)]: train.ids[twin] for photo, twin in twins.items()}


def describe_leakage(twins: Mapping[str, str], num_test: int) -> str:
    """What `find_leakage` found among so many test photos, as a warning if there are any."""
    if not twins:
        return f"none of {num_test} test images shows the same as a training image"
    shown = ", ".join(f"{photo} (as {twin})" for photo, twin in list(twins.items())[:NUM_SHOWN])
    more = f", and {len(twins) - NUM_SHOWN} more" if len(twins) > NUM_SHOWN else ""
    return (
        f"warning: {len(twins)} of {num_test} test images show the same as a training image, "
        f"so that the test flatters: {shown}{more}"
    )


@dataclass(frozen=True, eq=False)
class _Photos:
    """N photos as read: originals and errors as in `Duplicates`; what can be compared, as thumbnails."""

    originals: np.ndarray
    comparable: np.ndarray
    thumbnails: np.ndarray
    errors: Mapping[int, str]


def _read(dataset: Dataset) -> _Photos:
    thumbnails = np.zeros((len(dataset), SIZE, SIZE, 3), np.uint8)
    is_large = np.zeros(len(dataset), bool)
    errors: dict[int, str] = {}

    def read(index: int) -> bytes | None:
        try:
            photo = dataset.photo(index)
            image = photo.decode(SIZE)
        except ImageError as error:
            errors[index] = str(error)
            return None
        thumbnails[index] = thumbnail(image)
        is_large[index] = min(photo.size) >= MIN_SIDE
        return hashlib.sha256(repr((photo.size, image.size)).encode() + image.tobytes()).digest()

    digests = list(map_threads(read, len(dataset), "reading"))
    first: dict[bytes, int] = {}
    originals = np.asarray(
        [i if digest is None else first.setdefault(digest, i) for i, digest in enumerate(digests)], np.int32
    )
    comparable = np.flatnonzero(is_large & (originals == np.arange(len(dataset))))
    return _Photos(originals, comparable, thumbnails[comparable], dict(sorted(errors.items())))


def _normalize(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _propose(thumbnails: np.ndarray, directions: np.ndarray | None) -> Pairs:
    views = np.stack([_hash(thumbnails, zoom) for zoom in ZOOMS])
    pairs = near_pairs(views[0], views, max_distance=MAX_DISTANCE)
    if directions is None or not len(directions):
        return pairs
    hashes = hash_signs(directions - directions.mean(axis=0))
    more = near_pairs(hashes, hashes[None], max_distance=MAX_FEATURE_DISTANCE)
    return np.unique(np.concatenate([pairs, more]), axis=0)


def _hash(thumbnails: np.ndarray, zoom: float) -> np.ndarray:
    """Uint64 [N, 4]: the directions of outlines."""
    blocks = [np.zeros((0, 4), np.uint64)]
    for start in range(0, len(thumbnails), BLOCK_SIZE):
        cells = outlines(thumbnails[start : start + BLOCK_SIZE], zoom=zoom)
        cells = cells.reshape(len(cells), -1)
        blocks.append(hash_signs(cells - cells.mean(axis=1, keepdims=True)))
    return np.concatenate(blocks)


Confirm = Callable[[Pairs], tuple[np.ndarray, np.ndarray]]
"""Pairs -> whether they show the same, bool [P], and their similarities, float32 [P]."""


def _make_confirm(thumbnails: np.ndarray, directions: np.ndarray | None) -> Confirm:
    def compare(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        first, second = pairs.T
        similarities = similarity(thumbnails[first], thumbnails[second])
        needed = np.full(len(pairs), MIN_SIMILARITY)
        if directions is not None:
            cosines = (directions[first] * directions[second]).sum(axis=1)
            needed[cosines >= MIN_COSINE] = MIN_SIMILARITY_WITH_FEATURES
        return similarities >= needed, similarities

    def confirm(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        blocks = np.split(pairs, range(BLOCK_SIZE, len(pairs), BLOCK_SIZE))
        compared = map_threads(lambda number: compare(blocks[number]), len(blocks), "comparing")
        is_same, similarities = map(np.concatenate, zip(*compared, strict=True))
        return is_same, similarities

    return confirm


def _gather(num_photos: int, proposed: Pairs, confirm: Confirm) -> tuple[np.ndarray, Pairs, np.ndarray]:
    """Stars of confirmed pairs: int64 [num_photos], each photo's centre; the pairs; and their similarities.

    Pairs were proposed for a few neighbours of each photo. Where a confirmed pair joins two stars, its photos
    are compared with the other's centre, until no star grows.
    """
    is_same, similarities = confirm(proposed)
    pairs, similarities, seen = proposed[is_same], similarities[is_same], proposed
    while True:
        centres = _stars(num_photos, pairs)
        bridges = pairs[centres[pairs[:, 0]] != centres[pairs[:, 1]]]
        new = np.sort(np.concatenate([np.stack([centres[a], b], 1) for a, b in (bridges.T, bridges.T[::-1])]))
        new = _without(np.unique(new, axis=0), seen)
        is_same, new_similarities = confirm(new)
        if not is_same.any():
            return centres, pairs, similarities
        pairs = np.concatenate([pairs, new[is_same]])
        similarities = np.concatenate([similarities, new_similarities[is_same]])
        seen = np.concatenate([seen, new])


def _without(pairs: Pairs, seen: Pairs) -> Pairs:
    known = set(map(tuple, seen.tolist()))
    return pairs[[tuple(pair) not in known for pair in pairs.tolist()]]


def _stars(num_photos: int, pairs: Pairs) -> np.ndarray:
    """The photo with most partners takes them, then the next of those that are left, and so on."""
    partners = defaultdict(list)
    for first, second in pairs.tolist():
        partners[first].append(second)
        partners[second].append(first)
    centres = np.arange(num_photos)
    is_free = np.ones(num_photos, bool)
    for photo in sorted(partners, key=lambda photo: (-len(partners[photo]), photo)):
        if is_free[photo]:
            star = [photo, *(partner for partner in partners[photo] if is_free[partner])]
            centres[star], is_free[star] = photo, False
    return centres

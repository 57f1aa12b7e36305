"""`Dataset`: photos reached by position, with their labels. Every operation returns a new one."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from jaxcls.data import images
from jaxcls.data.lineage import find_families, join_groups
from jaxcls.data.source import Item, JoinedSource, MemorySource, SelectedSource, Source
from jaxcls.data.splitting import by_class, choose_training, keep_sides, shuffled_units
from jaxcls.errors import DatasetError, ImageError, UsageError
from jaxcls.progress import map_threads

UNLABELLED = -1
ID_DTYPE = np.dtypes.StringDType()


@dataclass(frozen=True, eq=False)
class Dataset:
    """Photos with labels.

    Attributes:
        name: for messages and reports.
        classes: the K class names; a label is an index into them.
        labels: int32 [N], -1 where unlabelled.
        ids: string [N]: POSIX paths relative to the root, or record keys; unique in a dataset that was read.
        source: the photos themselves.
        groups: int32 [N] or None. Photos of one group (duplicates, copies and their original) are
            never split apart.
        notes: what the reader left out, for `summary`.
        max_pixels: height times width above which a photo is refused as unreadable.
        origins: string [N] or None. Of an augmented copy, the id of its original; "" of other photos. None:
            there are no copies. Copies are of their original's group, whatever `groups` says.
    """

    name: str
    classes: tuple[str, ...]
    labels: np.ndarray
    ids: np.ndarray
    source: Source
    groups: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    max_pixels: int = images.MAX_PIXELS
    origins: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", np.asarray(self.labels, np.int32))
        # NumPy copies strings even where the type is the same already.
        if getattr(self.ids, "dtype", None) != ID_DTYPE:
            object.__setattr__(self, "ids", np.asarray(self.ids, ID_DTYPE))
        if self.groups is not None:
            object.__setattr__(self, "groups", np.asarray(self.groups, np.int32))
        if self.origins is not None:
            object.__setattr__(self, "origins", np.asarray(self.origins, ID_DTYPE))
        for values in (self.labels, self.ids, self.groups, self.origins):
            if values is not None and values.shape != (len(self.source),):
                raise UsageError(
                    f"dataset {self.name}: labels, ids, groups and origins need one value per photo"
                )
        if self.origins is not None and not self.is_copy.any():
            object.__setattr__(self, "origins", None)
        if self.origins is not None:
            object.__setattr__(self, "groups", join_groups(self.groups, self._families()))
        if len(self) and not UNLABELLED <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise UsageError(f"dataset {self.name}: labels must lie in [-1, {len(self.classes)})")

    def __len__(self) -> int:
        return len(self.source)

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, {len(self)} images, {len(self.classes)} classes)"

    def image(self, index: int, *, short_side: int | None = None) -> np.ndarray:
        """Photo `index` as uint8 [H, W, 3].

        Args:
            index: its position.
            short_side: in pixels; a JPEG may be decoded at a reduced scale that keeps at least this much.

        Raises:
            ImageError: it cannot be read.
        """
        return np.array(self.photo(index).decode(short_side))

    def photo(self, index: int) -> images.Photo:
        """Photo `index`, its pixels not decoded yet.

        Raises:
            ImageError: it cannot be read; also from its `decode`.
        """
        item = self.source[index]
        if isinstance(item, bytes):
            name = str(self.source.path(index) or self.ids[index])
            return images.open_photo(item, name=name, max_pixels=self.max_pixels)
        if item.dtype != np.uint8 or item.ndim != 3 or item.shape[2] != 3 or not item.size:
            raise ImageError(
                self.ids[index],
                f"an image array must be uint8 [H, W, 3], not {item.dtype} {list(item.shape)}",
            )
        return images.Photo(item.shape[:2], lambda short_side: Image.fromarray(item))

    @property
    def is_copy(self) -> np.ndarray:
        """bool [N]: the augmented copies."""
        return np.zeros(len(self), bool) if self.origins is None else self.origins != ""

    def originals(self) -> "Dataset":
        """The photos without the augmented copies."""
        return self if self.origins is None else self.select(np.flatnonzero(~self.is_copy))

    def group_originals(self, groups: np.ndarray) -> "Dataset":
        """The same photos in other groups, int32 [number of originals]; each copy is in its original's."""
        own = np.arange(len(self)) + groups.max(initial=-1) + 1
        own[~self.is_copy] = groups
        return replace(self, groups=own)

    def require_originals(self) -> None:
        """Raise UsageError if there are augmented copies: what is measured on them flatters or misleads."""
        if num_copies := int(self.is_copy.sum()):
            raise UsageError(
                f"{num_copies} of the {len(self)} images of dataset {self.name} are augmented copies: "
                "evaluate on its originals()"
            )

    def class_counts(self) -> np.ndarray:
        """int64 [K]: the number of photos of each class."""
        return np.bincount(self.labels[self.labels != UNLABELLED], minlength=len(self.classes))

    def class_weights(self, rule: str | Mapping[str, float] | None) -> np.ndarray | None:
        """float32 [K] weights of the loss, or None.

        Args:
            rule: None; "balanced": N / (K n_k), as scikit-learn, where n_k photos are of class k; or
                class name -> weight (others 1).

        Raises:
            UsageError: another rule, an unknown class, or a weight below 0.
        """
        if rule is None:
            return None
        if rule == "balanced":
            counts = self.class_counts()
            return (counts.sum() / (len(counts) * counts)).astype(np.float32)
        if isinstance(rule, str):
            raise UsageError(f"class_weight {rule!r}: use None, 'balanced' or a weight by class name")
        if unknown := sorted(set(rule) - set(self.classes)):
            raise UsageError(
                f"class_weight names unknown classes: {', '.join(unknown)}; "
                f"known are {', '.join(self.classes)}"
            )
        if min(rule.values(), default=0.0) < 0:
            raise UsageError("class_weight: no weight may be below 0")
        return np.asarray([rule.get(name, 1.0) for name in self.classes], np.float32)

    def select(self, indices: Sequence[int] | np.ndarray) -> "Dataset":
        """The photos at `indices` (integers), in that order."""
        indices = np.asarray(indices, np.int64)
        return replace(
            self,
            labels=self.labels[indices],
            ids=self.ids[indices],
            groups=None if self.groups is None else self.groups[indices],
            source=SelectedSource(self.source, indices),
            notes=(),
            origins=None if self.origins is None else self.origins[indices],
        )

    def select_ids(self, ids: Iterable[str]) -> "Dataset":
        """The photos with these ids, in this order.

        Raises:
            DatasetError: an id that the dataset does not have.
        """
        return self.select(self._positions(ids))

    def filter(self, keep: Callable[[str, str | None], bool]) -> "Dataset":
        """The photos for which `keep(id, class name or None)` is true."""
        names = [None if label == UNLABELLED else self.classes[label] for label in self.labels]
        return self.select([i for i, name in enumerate(names) if keep(self.ids[i], name)])

    def relabel(self, new_classes: dict[str, str]) -> "Dataset":
        """Rename classes; two classes with one new name become one.

        Args:
            new_classes: old name -> new name; the others keep theirs.

        Raises:
            UsageError: an old name that the dataset does not have.
        """
        if unknown := sorted(set(new_classes) - set(self.classes)):
            raise UsageError(f"dataset {self.name} has no class {', '.join(unknown)}")
        renamed = [new_classes.get(name, name) for name in self.classes]
        classes = tuple(dict.fromkeys(renamed))
        return replace(self, classes=classes, labels=_translate(self.labels, renamed, classes))

    def with_classes(self, classes: Sequence[str]) -> "Dataset":
        """The same photos, labelled by position in `classes`, such as a classifier's.

        Raises:
            UsageError: photos of a class that is not among them.
        """
        present = [name for name, count in zip(self.classes, self.class_counts(), strict=True) if count]
        if unknown := sorted(set(present) - set(classes)):
            raise UsageError(
                f"dataset {self.name} has photos of {', '.join(unknown)}; known are {', '.join(classes)}: "
                "relabel them, or filter them out"
            )
        labels = _translate(self.labels, self.classes, classes)
        return replace(self, classes=tuple(classes), labels=labels)

    def require_every_class(self) -> None:
        """Check that a classifier can learn from this.

        Raises:
            DatasetError: fewer than two classes, a class without photos, or unlabelled photos.
        """
        if len(self.classes) < 2:
            raise DatasetError(f"dataset {self.name} has {len(self.classes)} class: a classifier needs two")
        if num_unlabelled := int((self.labels == UNLABELLED).sum()):
            raise DatasetError(
                f"dataset {self.name} has {num_unlabelled} unlabelled images: label or filter them"
            )
        if empty := [self.classes[i] for i in np.flatnonzero(self.class_counts() == 0)]:
            raise DatasetError(
                f"dataset {self.name} has no images of {', '.join(empty)}: add some, or leave the class out"
            )

    def merge(self, other: "Dataset") -> "Dataset":
        """This dataset followed by `other`; classes are matched by name.

        Ids that clash are prefixed with their dataset's name.
        """
        classes = tuple(dict.fromkeys((*self.classes, *other.classes)))
        parts = (self, other)
        ids = [self.ids, other.ids]
        origins = [np.full(len(p), "", ID_DTYPE) if p.origins is None else p.origins for p in parts]
        # Sets, since NumPy 2.4's unstable sorts of StringDType can end the process (segmentation fault).
        if not set(self.ids).isdisjoint(other.ids):
            if self.name == other.name:
                raise DatasetError(f"both datasets are named {self.name} and share ids: rename one of them")
            ids = [_prefix(part.name, part.ids) for part in parts]
            origins = [_prefix(part.name, own) for part, own in zip(parts, origins, strict=True)]
        return Dataset(
            name=self.name,
            classes=classes,
            labels=np.concatenate([self.labels, _translate(other.labels, other.classes, classes)]),
            ids=np.concatenate(ids),
            source=JoinedSource(self.source, other.source),
            groups=_merge_groups(self, other),
            max_pixels=max(self.max_pixels, other.max_pixels),
            origins=np.concatenate(origins),
        )

    def group_by_folder(self) -> "Dataset":
        """Photos of one folder become one group, so that `split` keeps each folder on one side."""
        folders = [i.rpartition("/")[0] for i in self.ids]
        numbers = {folder: number for number, folder in enumerate(dict.fromkeys(folders))}
        return replace(self, groups=np.asarray([numbers[folder] for folder in folders], np.int32))

    def split(
        self,
        train_size: float | int = 0.66,
        *,
        stratify: bool = True,
        seed: int = 0,
        previous: tuple[Iterable[str], Iterable[str]] | None = None,
    ) -> tuple["Dataset", "Dataset"]:
        """Divide into a training and a test set, the same on every platform.

        The sides depend on the seed and the ids, not on the order of reading; adding photos later
        moves few of the others across. Sizes are exact (rounded down for the training set) whenever whole
        groups allow it, and otherwise the nearest that they do. Of every class the training set holds its
        share, or as near as whole groups come, the classes with most ungrouped photos making up for others.
        Augmented copies are not counted: each goes where its original goes, so that these are divided as if
        there were no copies.

        Args:
            train_size: a fraction in (0, 1), or the number of training photos.
            stratify: keep the share of every class.
            seed: another seed, another split.
            previous: ids of an earlier split's training set and of its test set. They stay on their sides;
                others are divided so that sizes and shares come as near as can be. New photos of their groups
                go with them; a group that is on both sides by now goes to the training set. The test set's
                notes tell.

        Raises:
            DatasetError: a stratified class with one photo or group, or a side without any.
            UsageError: `previous` has none of the photos, or the same on both sides.
        """
        families = self._families()
        leaders = np.unique(families)  # every photo, where there are no copies
        target = math.floor(train_size * len(leaders) + 1e-9) if 0 < train_size < 1 else train_size
        if not (isinstance(target, int | np.integer) and 0 < target < len(leaders)):
            raise DatasetError(
                f"train_size {train_size} of {len(leaders)} images leaves one side empty: "
                "give a fraction between 0 and 1, or a number of images"
            )
        groups = None if self.groups is None else self.groups[leaders]
        ids, labels = self.ids[leaders], self.labels[leaders]
        units = shuffled_units(ids, groups, seed)
        kept = None if previous is None else keep_sides(units, ids, *previous)
        if kept is not None:
            units = kept.units
        strata = by_class(units, labels, self.classes) if stratify else {f"dataset {self.name}": units}
        leads_training = np.zeros(len(leaders), bool)
        leads_training[choose_training(strata, int(target))] = True
        in_training = leads_training[np.searchsorted(leaders, families)]
        notes = () if kept is None else kept.describe(ids, leads_training)
        test = replace(self.select(np.flatnonzero(~in_training)), notes=notes)
        return self.select(np.flatnonzero(in_training)), test

    def split_by_ids(self, test_ids: Iterable[str]) -> tuple["Dataset", "Dataset"]:
        """Training and test set, the latter given by its ids; augmented copies go with their original.

        Raises:
            DatasetError: an id that the dataset does not have, or an empty side.
        """
        in_test = np.zeros(len(self), bool)
        in_test[self._positions(test_ids)] = True
        return self._divide(in_test, "these ids")

    def split_by_folder(self, test_folder: str) -> tuple["Dataset", "Dataset"]:
        """Training and test set; a photo with a folder named `test_folder` in its id is a test photo.

        Raises:
            DatasetError: an empty side.
        """
        in_test = np.asarray([test_folder in i.split("/")[:-1] for i in self.ids], bool)
        return self._divide(in_test, f"folder {test_folder!r}")

    def summary(self) -> str:
        """Total, number of photos and three samples for each class, and what was left out."""
        lines = [f"{self.name}: {len(self)} images, {len(self.classes)} classes"]
        for label, (name, count) in enumerate(zip(self.classes, self.class_counts(), strict=True)):
            lines.append(f"  {name}: {count}")
            samples = np.flatnonzero(self.labels == label)[:3]
            lines += [f"    {self.source.path(int(i)) or self.ids[i]}" for i in samples]
        if num_unlabelled := int((self.labels == UNLABELLED).sum()):
            lines.append(f"  (unlabelled): {num_unlabelled}")
        if num_copies := int(self.is_copy.sum()):
            lines.append(f"  (augmented copies among them): {num_copies}")
        return "\n".join([*lines, *self.notes])

    def _families(self) -> np.ndarray:
        """int64 [N], as by `find_families`."""
        return np.arange(len(self)) if self.origins is None else find_families(self.ids, self.origins)

    def _positions(self, ids: Iterable[str]) -> list[int]:
        ids = list(ids)
        position = {own_id: index for index, own_id in enumerate(self.ids)}
        if unknown := [wanted for wanted in ids if wanted not in position]:
            raise DatasetError(f"{len(unknown)} ids are not in dataset {self.name}: first {unknown[0]}")
        return [position[wanted] for wanted in ids]

    def _divide(self, in_test: np.ndarray, what: str) -> tuple["Dataset", "Dataset"]:
        # One of a copy and its original is enough: neither may be trained on.
        families = self._families()
        in_test = np.isin(families, families[in_test])
        if in_test.all() or not in_test.any():
            side = "training" if in_test.all() else "test"
            raise DatasetError(f"splitting {self.name} by {what} leaves the {side} set empty")
        return self.select(np.flatnonzero(~in_test)), self.select(np.flatnonzero(in_test))


def from_items(items: Sequence[str | Path | Item]) -> Dataset:
    """An unlabelled dataset of paths, encoded bytes or uint8 [H, W, 3] arrays, in the given order.

    The id of a path is the path itself, odd bytes of a name that is not UTF-8 escaped; of anything
    else, its position.

    Raises:
        UsageError: anything else.
    """
    if isinstance(items, str | Path | bytes | np.ndarray):
        raise UsageError("images come as a list: put a single one in brackets")
    items = list(items)
    ids = []
    for position, item in enumerate(items):
        if not isinstance(item, str | Path | bytes | np.ndarray):
            raise UsageError(f"item {position} is a {type(item).__name__}, not a path, bytes or uint8 array")
        ids.append(_printable(item) if isinstance(item, str | Path) else str(position))
    labels = np.full(len(items), UNLABELLED, np.int32)
    return Dataset("images", (), labels, np.asarray(ids, ID_DTYPE), MemorySource(items))


def scan(dataset: Dataset, *, max_bad_fraction: float = 0.0) -> Dataset:
    """Decode every photo once, at the smallest scale, and return the dataset without those that cannot be.

    Args:
        dataset: what to look through, on all cores, with a progress bar.
        max_bad_fraction: fail when more than this share cannot be decoded.

    Raises:
        DatasetError: too many bad photos; the message lists the first of them.
    """
    return leave_out(dataset, find_problems(dataset), max_bad_fraction=max_bad_fraction)


def find_problems(dataset: Dataset) -> list[str | None]:
    """What is wrong with each photo, None where it can be decoded, at the smallest scale and on all cores."""

    def problem(index: int) -> str | None:
        try:
            dataset.image(index, short_side=1)
        except ImageError as error:
            return str(error)
        return None

    return list(map_threads(problem, len(dataset), "scanning"))


def leave_out(dataset: Dataset, problems: Sequence[str | None], *, max_bad_fraction: float) -> Dataset:
    """The dataset without the photos that have a problem.

    Args:
        dataset: N photos.
        problems: N messages, None for sound photos.
        max_bad_fraction: fail when more than this share has one.

    Raises:
        DatasetError: too many bad photos; the message lists the first of them.
    """
    bad = [message for message in problems if message is not None]
    if len(bad) > max_bad_fraction * len(dataset):
        shown = "\n  ".join(bad[:10])
        more = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise DatasetError(
            f"{len(bad)} of {len(dataset)} images cannot be decoded; mend or remove them, "
            f"or leave them out (--skip-bad, max_bad_fraction):\n  {shown}{more}"
        )
    if not bad:
        return dataset
    kept = dataset.select([i for i, message in enumerate(problems) if message is None])
    notes = (f"{len(bad)} undecodable images left out:", *(f"  {message}" for message in bad))
    return replace(kept, notes=(*dataset.notes, *notes))


def _printable(path: str | Path) -> str:
    return Path(path).as_posix().encode(errors="backslashreplace").decode()


def _translate(labels: np.ndarray, names: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Labels that index `names` as labels that index `classes`; -1 for a name that is not among them."""
    position = {name: label for label, name in enumerate(classes)}
    # One more entry, so that -1 (unlabelled) maps to itself.
    table = np.asarray([*(position.get(name, UNLABELLED) for name in names), UNLABELLED], np.int32)
    return table[labels]


def _prefix(name: str, ids: np.ndarray) -> np.ndarray:
    """Ids that no other dataset has; "" stays as it is."""
    return np.asarray([own and f"{name}/{own}" for own in ids], ID_DTYPE)


def _merge_groups(first: Dataset, second: Dataset) -> np.ndarray | None:
    if first.groups is None and second.groups is None:
        return None
    parts = [np.arange(len(part)) if part.groups is None else part.groups for part in (first, second)]
    return np.concatenate([parts[0], parts[1] + parts[0].max(initial=-1) + 1])

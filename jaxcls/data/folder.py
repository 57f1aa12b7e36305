"""A folder with one sub-folder per class, read as a `Dataset`.

Names are listed folder by folder and kept in arrays, so that a million of them need little memory.
"""

import errno
import os
import unicodedata
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from jaxcls.data.dataset import ID_DTYPE, Dataset
from jaxcls.data.images import MAX_PIXELS, SUFFIXES
from jaxcls.data.lineage import LINEAGE_FILE, is_copy_name, read_lineage
from jaxcls.data.source import FileSource
from jaxcls.errors import DatasetError

BLOCK_SIZE = 2**14
"""Paths that are Python strings at once, before they become part of an array."""
NUM_SHOWN = 3
"""Names of a kind that the summary shows."""

Identity = tuple[int, int]
"""Device and inode of a folder: the same, whatever link led there."""


@dataclass
class Tally:
    """How many names of one kind there are, and the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, names: Sequence[str], prefix: str = "") -> None:
        """Count these too: the names of files of one folder, whose path with "/" is the prefix."""
        self.count += len(names)
        if len(names) and len(self.first) < NUM_SHOWN:
            self.first += [prefix + name for name in sorted(names)[: NUM_SHOWN - len(self.first)]]

    def __str__(self) -> str:
        shown = ", ".join(self.first) + (", ..." if self.count > len(self.first) else "")
        return f"{self.count} ({shown})".encode(errors="backslashreplace").decode()


@dataclass
class Listing:
    """What one walk over a tree found, as paths relative to its root.

    Attributes:
        images: string [N], in the order of `sorted`.
        runs: (folder, number) of images in a row that lie below the same folder of the root; "": in the root.
        folders: those of the root.
        not_utf8: images whose names are not UTF-8, which no array of strings can hold.
        hidden, other: files that are hidden, and those that are no images by their suffix.
        unreadable: folders, with the reason.
        circles: links that lead to a folder above them, or to themselves; not followed.
        again: folders that were read already under another name.
        empty: images of 0 bytes.
        alike: images and folders whose names differ only by case or by Unicode form.
    """

    images: np.ndarray = field(default_factory=lambda: np.asarray([], ID_DTYPE))
    runs: list[tuple[str, int]] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    not_utf8: list[str] = field(default_factory=list)
    hidden: Tally = field(default_factory=Tally)
    other: Tally = field(default_factory=Tally)
    unreadable: Tally = field(default_factory=Tally)
    circles: Tally = field(default_factory=Tally)
    again: Tally = field(default_factory=Tally)
    empty: Tally = field(default_factory=Tally)
    alike: Tally = field(default_factory=Tally)

    def require_whole(self, root: Path) -> None:
        """Raise DatasetError if a folder below `root` could not be read."""
        if self.unreadable.count:
            raise DatasetError(f"{root}: folders that cannot be read: {self.unreadable}: make them readable")


def read_folder(
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Dataset:
    """Read a folder of photos: each sub-folder is a class, folders below it belong to it.

    Links are followed, each folder once, and none to a folder that is read anyway: a link that is added later
    changes no id of what lies below `path`. Skipped and counted are such links, hidden files, files that are
    no images (by suffix), images outside any class folder, images whose names are not UTF-8, links in a
    circle and folders that cannot be read; a class folder without images is left out and named. Files of 0
    bytes, which `scan` refuses, and names that differ only by case or Unicode form, which other file systems
    would take for one, are named too. `summary()` tells of all.

    Photos that are added later leave the ids of the others as they are. Augmented copies are known by the
    folder's lineage file; those whose original is gone are skipped and counted. Where there is such a file,
    so is what it does not list and has a copy's name; what it lists and is not there is counted.

    Args:
        path: the folder.
        classes: the class names and their order, such as those of a trained classifier. Default: the
            folders that hold images, sorted by name.
        name: the dataset's name. Default: the folder's.
        max_pixels: height times width above which a photo is refused as unreadable.

    Raises:
        DatasetError: no such folder, one that cannot be read, no images, fewer than two classes (unless
            `classes` is given), a class folder that is not among `classes`, or a damaged lineage file.
    """
    root = Path(path)
    try:
        is_folder, exists = root.is_dir(), root.exists()
    except OSError as error:
        raise DatasetError(f"{root}: {error.strerror}: make the folder readable") from error
    if not is_folder:
        reason = "is a file" if exists else "does not exist"
        raise DatasetError(f"{root} {reason}: give a folder with one sub-folder of images per class")
    listing = list_images(root)
    found = sorted({folder for folder, _ in listing.runs if folder})
    counts = [number for _, number in listing.runs]
    in_class = np.repeat([folder != "" for folder, _ in listing.runs], counts).astype(bool)
    loose = Tally()
    loose.add(listing.images[~in_class])
    _check_classes(root, found, classes, listing, num_loose=loose.count)
    class_names = tuple(found if classes is None else classes)
    label_of = {class_name: label for label, class_name in enumerate(class_names)}
    ids = listing.images[in_class] if loose.count else listing.images
    photos = Dataset(
        name=name or root.resolve().name,
        classes=class_names,
        labels=np.repeat(
            np.asarray([label_of[folder] for folder, _ in listing.runs if folder], np.int32),
            [number for folder, number in listing.runs if folder],
        ),
        ids=ids,
        source=FileSource(root, ids),
        notes=_notes(found, listing, loose),
        max_pixels=max_pixels,
    )
    return _trace_copies(photos, root)


def list_images(root: Path) -> Listing:
    """Every file below `root`, links followed and each folder read once.

    Raises:
        DatasetError: `root` itself cannot be read.
    """
    listing = Listing()
    blocks: list[np.ndarray] = []
    some: list[str] = []
    for prefix, names in _walk(root, listing):
        top = prefix.partition("/")[0]
        if not listing.runs or listing.runs[-1][0] != top:
            listing.runs.append((top, 0))
        listing.runs[-1] = (top, listing.runs[-1][1] + len(names))
        for start in range(0, len(names), BLOCK_SIZE):
            some += [prefix + name for name in names[start : start + BLOCK_SIZE]]
            if len(some) >= BLOCK_SIZE:
                blocks.append(np.asarray(some, ID_DTYPE))
                some = []
    blocks.append(np.asarray(some, ID_DTYPE))
    listing.images = _join(blocks)
    return listing


def _join(blocks: list[np.ndarray]) -> np.ndarray:
    """One array of several, which are given up one by one: joined at once, all would be there twice."""
    joined = np.empty(sum(map(len, blocks)), ID_DTYPE)
    end = len(joined)
    while blocks:
        block = blocks.pop()
        joined[end - len(block) : end] = block
        end -= len(block)
    return joined


def _walk(root: Path, listing: Listing) -> Iterator[tuple[str, list[str]]]:
    """Images as (path of their folder with "/", names in order), all in the order of their whole paths.

    In it, a folder's place among the files beside it is that of its name with "/".
    """
    seen: set[Identity] = set()
    home = os.path.realpath(root)
    # A folder to read, with the folders above it, or images to give. No recursion: paths may be very deep.
    pending: list[tuple[str, tuple[Identity, ...], list[str] | None]] = [("", (), None)]
    while pending:
        prefix, above, names = pending.pop()
        if names is not None:
            if names:
                yield prefix, names
            continue
        try:
            status = (root / prefix).stat()
            identity = (status.st_dev, status.st_ino)
            if identity in seen or (prefix and _is_second_way(root / prefix, home)):
                (listing.circles if identity in above else listing.again).add([prefix[:-1]])
                continue
            images, folders = _read(root, prefix, listing)
        except OSError as error:
            if not prefix:
                raise DatasetError(f"{root}: {error.strerror}: make the folder readable") from error
            listing.unreadable.add([f"{prefix[:-1]}: {error.strerror}"])
            continue
        seen.add(identity)
        if not prefix:
            listing.folders = folders
        start = 0
        parts: list[tuple[str, tuple[Identity, ...], list[str] | None]] = []
        for folder in folders:
            end = bisect_left(images, f"{folder}/")
            parts += [(prefix, (), images[start:end]), (f"{prefix}{folder}/", (*above, identity), None)]
            start = end
        pending += [*parts, (prefix, (), images[start:])][::-1]


def _read(root: Path, prefix: str, listing: Listing) -> tuple[list[str], list[str]]:
    """The names of a folder's images and sub-folders, in order; `listing` hears of all else."""
    images: list[str] = []
    folders: list[str] = []
    hidden: list[str] = []
    other: list[str] = []
    empty: list[str] = []
    circles: list[str] = []
    with os.scandir(root / prefix) as entries:
        for entry in entries:
            name = entry.name
            if _is_folder(entry):
                if not name.startswith("."):
                    folders.append(name)
            elif name.startswith("."):
                hidden.append(name)
            elif name[name.rfind(".") :].lower() not in SUFFIXES:
                if prefix or name != LINEAGE_FILE:
                    other.append(name)
            else:
                try:
                    if not entry.stat().st_size:
                        empty.append(name)
                except OSError as error:
                    if error.errno == errno.ELOOP:
                        circles.append(name)
                        continue
                    # A broken link, or gone by now: the scan will tell.
                images.append(name)
    images.sort()
    # A folder stands among others where its name with "/" does.
    folders.sort(key=lambda name: f"{name}/")
    if not _is_utf8(prefix + "/".join(images)):
        broken = [name for name in images if not _is_utf8(prefix + name)]
        listing.not_utf8 += [prefix + name for name in broken]
        images = [name for name in images if _is_utf8(prefix + name)]
    listing.hidden.add(hidden, prefix)
    listing.other.add(other, prefix)
    listing.empty.add(empty, prefix)
    listing.circles.add(circles, prefix)
    listing.alike.add(_alike([*images, *folders]), prefix)
    return images, folders


def _is_second_way(path: Path, home: str) -> bool:
    """Whether this is a link to a folder that is read below `home` without it: hidden ones are not."""
    if not path.is_symlink():
        return False
    target = Path(os.path.realpath(path))
    return target.is_relative_to(home) and not any(
        part.startswith(".") for part in target.relative_to(home).parts
    )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _is_utf8(names: str) -> bool:
    """Whether the file system's bytes for names are UTF-8; Python decodes others as surrogates."""
    try:
        names.encode()
    except UnicodeEncodeError:
        return False
    return True


def _alike(names: list[str]) -> list[str]:
    """Names of one folder that differ only by case or by Unicode form, each such set as one text."""
    hashes = [
        np.fromiter(map(hash, _fold(names[start : start + BLOCK_SIZE])), np.int64)
        for start in range(0, len(names), BLOCK_SIZE)
    ]
    if len(np.unique(np.concatenate([np.empty(0, np.int64), *hashes]))) == len(names):
        return []
    sets = defaultdict(list)
    for name, folded in zip(names, _fold(names), strict=True):
        sets[folded].append(name)
    # Escaped, since the forms of one letter look the same.
    texts = [" = ".join(same) for same in sets.values() if len(same) > 1]
    return [text.encode("ascii", "backslashreplace").decode() for text in texts]


def _fold(names: list[str]) -> list[str]:
    """What names have in common that differ by case or Unicode form."""
    # All in one: no name holds "/", and no letter is changed by what is beyond one.
    text = unicodedata.normalize("NFD", "/".join(names)).casefold()
    return unicodedata.normalize("NFD", text).split("/")


def _trace_copies(photos: Dataset, root: Path) -> Dataset:
    """The photos, augmented copies known as such; of those without their original no split could be sure."""
    lineage, ids = read_lineage(root), set(photos.ids)
    if not lineage:
        return photos
    origin_of = {photo.id: photo.original for photo in lineage.values()}
    origins = [origin_of.get(own, "") for own in photos.ids]
    is_unknown = np.asarray([own not in lineage and is_copy_name(own) for own in photos.ids])
    there = {own for own, origin in zip(photos.ids, origins, strict=True) if not origin}
    is_lost = np.asarray([bool(origin) and origin not in there for origin in origins])
    missing, unknown, lost = Tally(), Tally(), Tally()
    # What is being made has no checksum, and may not be there yet.
    missing.add([photo.id for photo in lineage.values() if photo.sha256 and photo.id not in ids])
    unknown.add(photos.ids[is_unknown])
    lost.add(photos.ids[is_lost])
    rows = {
        f"photos that {LINEAGE_FILE} names and that are gone": missing,
        "augmented copies of unknown originals, by their names, skipped": unknown,
        "augmented copies whose original is gone, skipped": lost,
    }
    notes = tuple(f"{what}: {names}" for what, names in rows.items() if names.count)
    photos = replace(photos, origins=np.asarray(origins, ID_DTYPE))
    if (is_lost | is_unknown).any():
        photos = replace(photos.select(np.flatnonzero(~(is_lost | is_unknown))), notes=photos.notes)
    return replace(photos, notes=(*photos.notes, *notes))


def _check_classes(
    root: Path, found: list[str], classes: Sequence[str] | None, listing: Listing, *, num_loose: int
) -> None:
    if not found:
        hint = f"; {num_loose} lie in {root} itself" if num_loose else ""
        if listing.unreadable.count:
            hint += f"; folders that cannot be read: {listing.unreadable}"
        raise DatasetError(
            f"{root}: no images in class folders{hint}. Put them into one sub-folder per class"
        )
    if classes is None and len(found) < 2:
        raise DatasetError(f"{root}: only one class, {found[0]!r}: a classifier needs at least two")
    if classes is not None and (unknown := sorted(set(found) - set(classes))):
        raise DatasetError(
            f"{root}: class {', '.join(unknown)} is not among the expected {', '.join(classes)}: "
            "rename the folder or take it away"
        )


def _notes(found: list[str], listing: Listing, loose: Tally) -> tuple[str, ...]:
    without = Tally()
    without.add([name for name in listing.folders if name not in found])
    not_utf8 = Tally()
    not_utf8.add(listing.not_utf8)
    rows = {
        "class folders without images": without,
        "images outside any class folder, skipped": loose,
        "names that are not UTF-8, skipped": not_utf8,
        "files that are no images, skipped": listing.other,
        "hidden files, skipped": listing.hidden,
        "folders that cannot be read, skipped": listing.unreadable,
        "links in a circle, skipped": listing.circles,
        "folders met again under another name, skipped": listing.again,
        "images of 0 bytes": listing.empty,
        "names that differ only by case or Unicode form": listing.alike,
    }
    return tuple(f"{what}: {names}" for what, names in rows.items() if names.count)

"""A folder with one sub-folder per class, read as a `Dataset`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jaxcls.data.dataset import ID_DTYPE, Dataset
from jaxcls.data.images import MAX_PIXELS, SUFFIXES
from jaxcls.data.source import FileSource
from jaxcls.errors import DatasetError


@dataclass
class Listing:
    """What one walk over a tree found, as paths relative to its root."""

    images: list[str] = field(default_factory=list)
    not_utf8: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)


def read_folder(
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Dataset:
    """Read a folder of photos: each sub-folder is a class, folders below it belong to it.

    Hidden files, files that are no images (by suffix), images outside any class folder and images
    whose names are not UTF-8 are skipped and counted; a class folder without images is left out and
    named. `summary()` tells of all.

    Args:
        path: the folder.
        classes: the class names and their order, such as those of a trained classifier. Default: the
            folders that hold images, sorted by name.
        name: the dataset's name. Default: the folder's.
        max_pixels: height times width above which a photo is refused as unreadable.

    Raises:
        DatasetError: no such folder, no images, fewer than two classes (unless `classes` is given), a
            folder that cannot be read, or a class folder that is not among `classes`.
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
    loose = [image for image in listing.images if "/" not in image]
    images = sorted(image for image in listing.images if "/" in image)
    found = sorted({image.split("/")[0] for image in images})
    _check_classes(root, found, classes, num_loose=len(loose))
    class_names = tuple(found if classes is None else classes)
    label_of = {class_name: label for label, class_name in enumerate(class_names)}
    ids = np.asarray(images, ID_DTYPE)
    return Dataset(
        name=name or root.resolve().name,
        classes=class_names,
        labels=np.asarray([label_of[image.split("/")[0]] for image in images], np.int32),
        ids=ids,
        source=FileSource(root, ids),
        notes=_notes(root, found, listing, loose),
        max_pixels=max_pixels,
    )


def list_images(root: Path) -> Listing:
    """Every file below `root`, links followed (a loop once), as relative POSIX paths by kind.

    Raises:
        DatasetError: a folder that cannot be read.
    """

    def fail(error: OSError) -> None:
        raise DatasetError(f"{error.filename}: {error.strerror}: make the folder readable, or move it away")

    listing = Listing()
    visited: set[tuple[int, int]] = set()
    for folder, subfolders, files in os.walk(root, onerror=fail, followlinks=True):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        prefix = Path(folder).relative_to(root).as_posix()
        for file in sorted(files):
            kind = listing.other
            if file.startswith("."):
                kind = listing.hidden
            elif Path(file).suffix.lower() in SUFFIXES:
                kind = listing.images if _is_utf8(prefix + file) else listing.not_utf8
            kind.append(file if prefix == "." else f"{prefix}/{file}")
    return listing


def _is_utf8(name: str) -> bool:
    """Whether the file system's bytes for a name are UTF-8; Python decodes others as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _check_classes(root: Path, found: list[str], classes: Sequence[str] | None, *, num_loose: int) -> None:
    if not found:
        hint = f"; {num_loose} lie in {root} itself" if num_loose else ""
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


def _notes(root: Path, found: list[str], listing: Listing, loose: list[str]) -> tuple[str, ...]:
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    rows = (
        ("class folders without images", [name for name in folders if name not in found]),
        ("images outside any class folder, skipped", loose),
        ("names that are not UTF-8, skipped", listing.not_utf8),
        ("files that are no images, skipped", listing.other),
        ("hidden files, skipped", listing.hidden),
    )
    return tuple(f"{what}: {len(names)} ({_some(names)})" for what, names in rows if names)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return shown.encode(errors="backslashreplace").decode()

"""ArrayRecord: the photos of a dataset in a few large files, each reached by position.

A folder of records is written as a whole:

| file | holds |
| --- | --- |
| `records.json` | the manifest: format, name, classes; of every other file its size and sha256 |
| `index.npz` | labels, ids, and groups and origins where there are any; no pickle |
| `photos-00000-of-00008.arrayrecord`, ... | in the dataset's order, a photo a record: its file's content |

Besides the manifest's checksums, which only `verify` reads a whole file for, each record has one of
ArrayRecord's own, which every reading compares.
"""

import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image

from jaxcls.data.dataset import ID_DTYPE, Dataset
from jaxcls.data.images import MAX_PIXELS, encode, format_name
from jaxcls.errors import DatasetError, ImageError, UsageError
from jaxcls.preprocess import Preprocess
from jaxcls.progress import show_progress
from jaxcls.storage import file_sha256, whole_folder

FORMAT = "jaxcls-records"
FORMAT_VERSION = 1
MANIFEST, INDEX = "records.json", "index.npz"

MAX_OPEN_FILES = 64
"""Of one source in one process, which may often open no more than 1024; to open one takes 20 microseconds."""

NUM_PHOTOS_AHEAD = 64
"""How many photos are made ready together, to be written one after another."""


@dataclass(frozen=True)
class Shard:
    """A run of records in one file.

    Attributes:
        path: of the file.
        first: the position of the first record in it.
        count: how many.
    """

    path: str
    first: int
    count: int


@dataclass(frozen=True, eq=False)
class RecordSource:
    """The records of several files, one run after another, for any number of threads at once.

    A copy in another process, pickled or forked, opens the files anew.
    """

    shards: tuple[Shard, ...]
    _ends: list[int] = field(init=False, repr=False)
    _reader: Callable[[str, int], Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ends", list(accumulate(shard.count for shard in self.shards)))
        object.__setattr__(self, "_reader", lru_cache(MAX_OPEN_FILES)(_open))

    def __reduce__(self) -> tuple[type["RecordSource"], tuple[tuple[Shard, ...]]]:
        return type(self), (self.shards,)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        path, position = self._locate(index)
        try:
            return self._reader(path, os.getpid()).read([position])[0]
        except RuntimeError as error:
            raise ImageError(self.place(index), f"cannot be read: {error}") from error

    def place(self, index: int) -> str:
        """File and position, for messages."""
        path, position = self._locate(index)
        return f"{path}, record {position}"

    def _locate(self, index: int) -> tuple[str, int]:
        number = bisect_right(self._ends, index)
        shard = self.shards[number]
        return shard.path, shard.first + shard.count - (self._ends[number] - index)

    def path(self, index: int) -> None:
        """None: a record is no file."""


def _open(path: str, process: int) -> Any:
    """A reader, for the threads of one process."""
    return ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=32768)


def write_arrayrecord(
    dataset: Dataset, path: str | Path, *, size: int | None = None, shards: int = 8
) -> Path:
    """Write a dataset as a new folder of records, complete or not at all, and return its path.

    Encoded photos are kept byte for byte, undecoded. With `size`, those with a longer short side are resized
    once, antialiased: a JPEG becomes a JPEG of quality 95 (4:4:4), anything else a PNG. Arrays become PNGs.

    Args:
        dataset: N photos; their order, labels, ids, groups and origins are kept.
        path: where nothing is yet.
        size: of the short side, in pixels. For training that crops, more than the network's input.
        shards: the number of files, at most N.

    Raises:
        DatasetError: no photos, an id twice, one that cannot be read, something at `path`, or a failure to
            write.
        UsageError: `size` or `shards` below 1.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise DatasetError(f"{path} exists: choose another path, or move it away")
    if not len(dataset):
        raise DatasetError(f"dataset {dataset.name} has no images: there is nothing to write")
    if len(set(dataset.ids)) < len(dataset):
        raise DatasetError(f"dataset {dataset.name} has the same id twice: give each photo its own")
    if shards < 1:
        raise UsageError(f"shards {shards}: there must be at least one")
    if size is not None and size < 1:
        raise UsageError(f"size {size}: the short side must have at least 1 pixel")
    try:
        with whole_folder(path) as folder:
            counts = _write_shards(dataset, folder, size, min(shards, len(dataset)))
            _write_index(dataset, folder)
            _write_manifest(dataset, folder, counts)
    except ImageError as error:
        raise DatasetError(f"{error}: mend it, or leave such images out (--skip-bad, jaxcls.scan)") from error
    except (OSError, RuntimeError) as error:
        raise DatasetError(f"cannot write to {path}: {error}") from error
    return path


def read_arrayrecord(path: str | Path, *, verify: bool = False, max_pixels: int = MAX_PIXELS) -> Dataset:
    """Read a folder that `write_arrayrecord` wrote: labels and ids now, each photo when it is asked for.

    The sizes of all files and the checksum of the index are compared with the manifest. A damaged record
    is an `ImageError` once it is read.

    Args:
        path: the folder.
        verify: compare the checksums of all files, too, which reads them once.
        max_pixels: height times width above which a photo is refused as unreadable.

    Raises:
        DatasetError: no such folder, one of another format, or a file that is missing, cut short or damaged.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    for name, entry in manifest["files"].items():
        _check_file(path / name, entry, verify=verify or name == INDEX)
    counts = manifest["shards"]
    shards = [Shard(str(path / shard_name(i, len(counts))), 0, count) for i, count in enumerate(counts)]
    try:
        with np.load(path / INDEX, allow_pickle=False) as file:
            index = dict(file)
        return Dataset(
            name=manifest["name"],
            classes=tuple(manifest["classes"]),
            labels=index["labels"],
            ids=_unpack("ids", index),
            source=RecordSource(tuple(shards)),
            groups=index.get("groups"),
            max_pixels=max_pixels,
            origins=_unpack("origins", index) if "origins" in index else None,
        )
    except (BadZipFile, EOFError, KeyError, OSError, TypeError, ValueError, UsageError) as error:
        raise DatasetError(f"{path}: {INDEX} does not fit {MANIFEST}: {error}") from error


def is_arrayrecord(path: Path) -> bool:
    """Whether a folder of records lies at `path`."""
    return (path / MANIFEST).is_file()


def shard_name(number: int, count: int) -> str:
    """The name of one of `count` files."""
    return f"photos-{number:05d}-of-{count:05d}.arrayrecord"


def _write_shards(dataset: Dataset, folder: Path, size: int | None, num_shards: int) -> list[int]:
    """Write the photos in order; return how many each file holds."""
    bounds = [len(dataset) * number // num_shards for number in range(num_shards + 1)]
    counts = [stop - start for start, stop in pairwise(bounds)]
    photos = iter(show_progress(_encoded(dataset, size), "writing", len(dataset)))
    for number, count in enumerate(counts):
        # Photos are compressed already, and a group is read as a whole.
        writer = ArrayRecordWriter(str(folder / shard_name(number, num_shards)), "group_size:1,uncompressed")
        for photo in islice(photos, count):
            writer.write(photo)
        writer.close()
    return counts


def _encoded(dataset: Dataset, size: int | None) -> Iterator[bytes]:
    """The photos as they are written, made on all cores, few at a time."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(dataset), NUM_PHOTOS_AHEAD):
            indices = range(start, min(start + NUM_PHOTOS_AHEAD, len(dataset)))
            yield from pool.map(partial(_encode, dataset, size), indices)


def _encode(dataset: Dataset, size: int | None, index: int) -> bytes:
    """A photo as it is written."""
    item = dataset.source[index]
    if size is None:
        return item if isinstance(item, bytes) else encode(dataset.photo(index).decode(None), "PNG")
    photo = dataset.photo(index)
    if isinstance(item, bytes) and min(photo.size) <= size:
        return item
    picture = Image.fromarray(Preprocess().shrink(photo.decode(size), size))
    return encode(picture, "JPEG" if isinstance(item, bytes) and format_name(item) == "JPEG" else "PNG")


def _write_index(dataset: Dataset, folder: Path) -> None:
    arrays = {"labels": dataset.labels, **_pack("ids", dataset.ids)}
    if dataset.groups is not None:
        arrays["groups"] = dataset.groups
    if dataset.origins is not None:
        arrays |= _pack("origins", dataset.origins)
    np.savez(folder / INDEX, allow_pickle=False, **arrays)


def _pack(name: str, texts: np.ndarray) -> dict[str, np.ndarray]:
    """Strings [N] as two arrays, whose types NumPy writes without pickle."""
    encoded = [text.encode() for text in texts]
    return {
        name: np.frombuffer(b"".join(encoded), np.uint8),
        f"{name}_ends": np.cumsum([len(text) for text in encoded], dtype=np.int64),
    }


def _unpack(name: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The inverse of `_pack`.

    Raises:
        KeyError, TypeError, ValueError: the arrays are not what it makes.
    """
    encoded, ends = arrays[name].tobytes(), [0, *arrays[f"{name}_ends"].tolist()]
    if ends != sorted(ends) or ends[-1] != len(encoded):
        raise ValueError(f"{name} do not end where they should")
    return np.asarray([encoded[start:stop].decode() for start, stop in pairwise(ends)], ID_DTYPE)


def _write_manifest(dataset: Dataset, folder: Path, counts: list[int]) -> None:
    names = [INDEX, *(shard_name(number, len(counts)) for number in range(len(counts)))]
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": dataset.name,
        "classes": dataset.classes,
        "shards": counts,
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
            for name in names
        },
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        what = f"holds no readable {MANIFEST}" if path.exists() else "does not exist"
        raise DatasetError(f"{path} is no folder of records: it {what}") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path / MANIFEST} is damaged: {error}: copy the folder again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DatasetError(f"{path / MANIFEST} is not the manifest of {FORMAT}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise DatasetError(
            f"{path} has format {manifest.get('format_version')}, this jaxcls reads {FORMAT_VERSION}: "
            "use the jaxcls that wrote it, or a newer one"
        )
    if not _is_complete(manifest):
        raise DatasetError(f"{path / MANIFEST} is damaged: copy the folder again")
    return manifest


def _is_complete(manifest: Mapping[str, Any]) -> bool:
    """Whether everything is there and of its type."""
    name, classes, counts, files = (manifest.get(key) for key in ("name", "classes", "shards", "files"))
    if not (isinstance(name, str) and isinstance(files, dict)):
        return False
    if not (isinstance(classes, list) and all(isinstance(one, str) for one in classes)):
        return False
    if not (isinstance(counts, list) and all(isinstance(count, int) and count > 0 for count in counts)):
        return False
    names = {INDEX, *(shard_name(number, len(counts)) for number in range(len(counts)))}
    return set(files) == names and all(
        isinstance(entry, dict) and {"bytes", "sha256"} <= set(entry) for entry in files.values()
    )


def _check_file(file: Path, entry: Mapping[str, Any], *, verify: bool) -> None:
    """Raise DatasetError unless the file is as the manifest has it."""
    try:
        num_bytes = file.stat().st_size
        if num_bytes != entry["bytes"]:
            raise DatasetError(
                f"{file} has {num_bytes:,} bytes, not {entry['bytes']:,}: it is cut short; copy it again"
            )
        if verify and file_sha256(file) != entry["sha256"]:
            raise DatasetError(f"{file} is damaged (its sha256 is not the manifest's): copy it again")
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror}: copy the folder again") from error

"""TensorFlow Datasets that are prepared as ArrayRecord, read as a `Dataset` without TensorFlow."""

import json
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from etils import epy

from jaxcls.data.arrayrecord import RecordSource, Shard
from jaxcls.data.dataset import ID_DTYPE, UNLABELLED, Dataset
from jaxcls.data.images import MAX_PIXELS
from jaxcls.errors import DatasetError, ImageError
from jaxcls.progress import map_threads

with epy.lazy_imports():
    import tensorflow_datasets as tfds  # takes a good part of a second

FILE_FORMAT = "array_record"


@dataclass(frozen=True, eq=False)
class ExampleSource:
    """The encoded images in TFDS's examples.

    Attributes:
        records: the examples, serialised.
        features: TFDS's `FeaturesDict` of what is parsed.
        image: the image's key among them.
    """

    records: RecordSource
    features: Any
    image: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> bytes:
        return self.example(index)[self.image]

    def example(self, index: int) -> dict[str, Any]:
        """The parsed features of an example, its image encoded.

        Raises:
            ImageError: the record is damaged, or holds something else.
        """
        record = self.records[index]
        try:
            decoders = {self.image: tfds.decode.SkipDecoding()}
            return self.features.deserialize_example_np(record, decoders=decoders)
        # Protocol buffers and TFDS raise nearly every kind of exception.
        except Exception as error:
            raise ImageError(self.records.place(index), f"not an example of this dataset: {error}") from error

    def path(self, index: int) -> None:
        """None: a record is no file."""


def read_tfds(
    name: str,
    *,
    split: Any = "train",
    data_dir: str | Path | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Dataset:
    """Read labelled images that TFDS has prepared as ArrayRecord, without loading TensorFlow.

    Only files are read: nothing is downloaded, and no code of the dataset runs. Every record is read once for
    its label; images are read again when they are asked for, and stay encoded until then. Image and label are
    the features that the dataset names as supervised, or the only ones of their kinds. Ids are TFDS's own
    (`tfds_id`): a file's name, "__", and the position in it.

    Args:
        name: as in `tfds.load`: "mnist", "mnist:3.0.1", "dataset/config".
        split: as in `tfds.load`: "train", "train[:50%]", "train[10:20]", "train[:2shard]", "train+test",
            "all", or what `tfds.even_splits` and `tfds.core.ReadInstruction` make.
        data_dir: where TFDS keeps datasets. Default: TFDS's own, `TFDS_DATA_DIR` or `~/tensorflow_datasets`.
        max_pixels: height times width above which a photo is refused as unreadable.

    Raises:
        DatasetError: not prepared, or not as ArrayRecord (the message holds the command that does it); a
            split that is not there, is empty or takes a record twice; no image with one label; a file that is
            missing or damaged.
    """
    info = _find(name, data_dir)
    image, label = _find_features(info)
    shards = _find_shards(info, split)
    features = tfds.features.FeaturesDict({key: info.features[key] for key in (image, label)})
    source = ExampleSource(RecordSource(shards), features, image)
    classes = tuple(info.features[label].names)
    return Dataset(
        name=info.name,
        classes=classes,
        labels=_read_labels(source, label, len(classes)),
        ids=np.asarray(list(_ids(shards)), ID_DTYPE),
        source=source,
        max_pixels=max_pixels,
    )


def _find(name: str, data_dir: str | Path | None) -> Any:
    """TFDS's description of a prepared dataset."""
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    options = {} if data_dir is None else {"data_dir": str(data_dir)}
    try:
        info = builder_from_files(name, **options).info
    except tfds.core.DatasetNotFoundError:
        raise DatasetError(
            f"TFDS dataset {name} is not prepared in {data_dir or 'the folder of TFDS'}: where TensorFlow is "
            f"installed, this prepares it: {_prepare(name, data_dir)}"
        ) from None  # TFDS's own reasons are pages long, and speak of other ways
    except Exception as error:  # of any kind, from damaged descriptions too
        raise DatasetError(
            f"TFDS dataset {name} cannot be read: {str(error).partition(chr(10))[0]}"
        ) from error
    formats = sorted(known.value for known in info.available_file_formats())
    if FILE_FORMAT not in formats:
        raise DatasetError(
            f"TFDS dataset {name} is prepared as {', '.join(formats)}, which has no random access: where "
            f"TensorFlow is installed, this prepares it in another folder: {_prepare(name, 'FOLDER')}"
        )
    info.set_file_format(FILE_FORMAT, override=True, override_if_initialized=True)
    return info


def _prepare(name: str, data_dir: str | Path | None) -> str:
    """The command that prepares a dataset: Python, since TFDS's own needs more packages than TensorFlow."""
    where = "" if data_dir is None else f", data_dir={json.dumps(str(data_dir), ensure_ascii=False)}"
    builder = f'tfds.builder("{name}"{where}, file_format="{FILE_FORMAT}")'
    return "python -c " + shlex.quote(f"import tensorflow_datasets as tfds; {builder}.download_and_prepare()")


def _find_features(info: Any) -> tuple[str, str]:
    """The keys of image and label."""
    found = []
    for kind in (tfds.features.Image, tfds.features.ClassLabel):
        # Not isinstance: a LabeledImage is a map of labels.
        keys = [key for key, feature in info.features.items() if type(feature) is kind]
        keys = [key for key in keys if key in (info.supervised_keys or ())] or keys
        if len(keys) != 1:
            there = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in info.features.items())
            raise DatasetError(
                f"TFDS dataset {info.full_name} has {len(keys)} features that are {kind.__name__}, where "
                f"one is needed: its features are {there}"
            )
        found += keys
    image, label = found
    if info.features[image].np_dtype == np.float32:
        raise DatasetError(f"TFDS dataset {info.full_name}: feature {image} holds floats, not photos")
    return image, label


def _find_shards(info: Any, split: Any) -> tuple[Shard, ...]:
    """The runs of records of a split."""
    known = ", ".join(f"{name} ({part.num_examples} images)" for name, part in info.splits.items())
    try:
        instructions = info.splits[split].file_instructions
    # ValueError, NotImplementedError or AttributeError, by what is wrong with it.
    except Exception as error:
        raise DatasetError(
            f"TFDS dataset {info.full_name} has no split {split!r}: known are {known}, their slices such "
            "as train[:50%], and sums such as train+test"
        ) from error
    shards = tuple(Shard(str(run.filename), run.skip, run.take) for run in instructions)
    if not shards:
        raise DatasetError(f"split {split!r} of TFDS dataset {info.full_name} is empty: known are {known}")
    runs = sorted(shards, key=lambda shard: (shard.path, shard.first))
    if any(a.path == b.path and a.first + a.count > b.first for a, b in pairwise(runs)):
        raise DatasetError(f"split {split!r} of TFDS dataset {info.full_name} takes some images twice")
    if missing := [shard.path for shard in shards if not Path(shard.path).is_file()]:
        raise DatasetError(
            f"TFDS dataset {info.full_name}: {missing[0]} is missing: copy or prepare it again"
        )
    return shards


def _ids(shards: Iterable[Shard]) -> Iterator[str]:
    for shard in shards:
        file = Path(shard.path).name
        yield from (f"{file}__{position}" for position in range(shard.first, shard.first + shard.count))


def _read_labels(source: ExampleSource, label: str, num_classes: int) -> np.ndarray:
    """int32 [N], read on several threads."""

    def read(index: int) -> int:
        return source.example(index)[label]

    try:
        labels = np.fromiter(map_threads(read, len(source), "reading labels"), np.int64, len(source))
    except ImageError as error:
        raise DatasetError(f"{error}: copy or prepare the dataset again") from error
    if not UNLABELLED <= labels.min() <= labels.max() < num_classes:
        raise DatasetError(f"{source.records.place(0)}: labels outside [-1, {num_classes}): prepare it again")
    return labels.astype(np.int32)

"""Large sets: scores or features of photos anywhere, by a Ray cluster, as Parquet; resumed where it ended.

A list of photos is divided into shards, and each shard's rows are one file, there whole or not at all. What
is there is done: a job that was killed is started again, and does what is missing. The folder holds:

| file | content |
| --- | --- |
| `part-0000000.parquet`, ... | rows; by name and in each, those of all photos in order |
| `_job.json` | what the rows are of: digests of the network and the list, and the settings |
| `_photos.txt` | the list, an address in each line |
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jaxcls.cluster.files import ResultFolder, find_photos, to_text
from jaxcls.cluster.session import connected, require_ray
from jaxcls.cluster.stages import Stages, compute, part_name
from jaxcls.cluster.tables import FeatureTable, ScoreTable, Table
from jaxcls.data.images import MAX_PIXELS
from jaxcls.errors import UsageError
from jaxcls.models.precision import Precision
from jaxcls.progress import show_progress

if TYPE_CHECKING:
    from jaxcls.classifier import Classifier
    from jaxcls.models.pretrained import Backbone

JOB, PHOTOS = "_job.json", "_photos.txt"


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How a cluster divides the work."""

    address: str | None = None
    """Of a Ray cluster: host:port, or auto: RAY_ADDRESS, else this machine's; default: RAY_ADDRESS, else one
    for this job."""
    shard_size: int = 512
    """Photos of a part, best a multiple of 64; decoded, at 224 px, 77 MB, a few times for each device."""
    num_actors: int | None = None
    """Processes that score; default: one for each GPU or, where there are none, for each core."""

    def __post_init__(self) -> None:
        if self.shard_size < 1 or (self.num_actors is not None and self.num_actors < 1):
            raise UsageError("shard_size and num_actors must be at least 1")


@dataclass(frozen=True)
class Outcome:
    """What a job's folder holds.

    Attributes:
        num_photos: rows.
        num_failed: of these, photos that could not be read.
        num_parts: files.
        num_written: of these, the files that were written now, not by an earlier run.
    """

    num_photos: int
    num_failed: int
    num_parts: int
    num_written: int


def predict(
    classifier: "Classifier",
    sources: Sequence[str | Path],
    out: str | Path,
    config: BatchConfig = BatchConfig(),
    *,
    precision: Precision = "auto",
    max_pixels: int = MAX_PIXELS,
    progress: bool = False,
) -> Outcome:
    """Score photos as `jaxcls.predict` does, and write a row for each.

    Columns: `id`, the photo's path or URI; `predicted`, a class name, and its `score`, float32 (null where
    unreadable or abstained); `abstained`; `error`, the message where unreadable, else null; `scores`, float32
    [K] (null where unreadable), whose kind and classes `tables.read_metadata` reads off the schema. Scores
    differ from those of one process in the same precision by rounding: XLA sums in another order with other
    numbers of threads.

    Args:
        classifier: what scores them.
        sources: folders, `.txt` lists of paths and URIs, and prefixes and objects of stores that `pyarrow.fs`
            knows, as `files.find_photos` takes them.
        out: a folder that all nodes see under this path, or a prefix of an object store. What an earlier run
            has left to do there is done.
        config: how the cluster divides the work.
        precision: of the convolutions; "auto": bfloat16 on GPUs, float32 on CPUs.
        max_pixels: height times width above which a photo is refused as unreadable.
        progress: show a progress bar.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: `out` holds something else, or rows of another network, list or setting; a bad argument.
        DatasetError: a source holds no photos, or cannot be read.
        DeploymentError: the cluster cannot be reached.
        JaxclsError: a part cannot be written, or the network's scores are not finite.
        OSError: what lies in `out` cannot be read, or the job's own files cannot be written there.
    """
    head = classifier.head
    table = ScoreTable(head.kind, classifier.classes, head.thresholds)
    photos = _find(sources)
    job = _Job("scores", _digest(classifier), precision, max_pixels, config.shard_size, *_describe(photos))
    return _complete(job, classifier, photos, table, out, config, "scoring" if progress else None)


def extract_features(
    network: "Backbone | Classifier",
    sources: Sequence[str | Path],
    out: str | Path,
    config: BatchConfig = BatchConfig(),
    *,
    precision: Precision = "auto",
    max_pixels: int = MAX_PIXELS,
    progress: bool = False,
) -> Outcome:
    """Pooled features of photos, as of `jaxcls.extract_features`, and a row for each.

    Columns: `id`; `error`, the message where unreadable, else null; `features`, float32 [D] (null where
    unreadable).

    Args:
        network: a backbone; of a classifier, its (fine-tuned) backbone.
        sources, out, config, precision, max_pixels, progress: as for `predict`.

    Raises:
        MissingExtraError, UsageError, DatasetError, DeploymentError, JaxclsError, OSError: as `predict`.
    """
    from jaxcls.classifier import as_backbone

    backbone = as_backbone(network)
    table = FeatureTable(backbone.num_features)
    photos = _find(sources)
    job = _Job("features", _digest(backbone), precision, max_pixels, config.shard_size, *_describe(photos))
    return _complete(job, backbone, photos, table, out, config, "features" if progress else None)


@dataclass(frozen=True)
class _Job:
    """What decides the rows: two runs into one folder must agree in all of it."""

    values: Literal["scores", "features"]
    network: str
    precision: Precision
    max_pixels: int
    shard_size: int
    photos: str
    num_photos: int

    @property
    def shards(self) -> range:
        return range(-(-self.num_photos // self.shard_size))

    def missing(self, folder: ResultFolder) -> list[int]:
        """The shards that have no part."""
        names = set(folder.names())
        return [shard for shard in self.shards if part_name(shard) not in names]

    def begin(self, folder: ResultFolder, photos: Sequence[str]) -> None:
        """Record the job in a new folder, or find it recorded where it was begun.

        Raises:
            UsageError: the folder holds something else, or another job.
        """
        names = folder.names()
        if JOB in names:
            self._require_same(folder)
        elif set(names) <= {PHOTOS}:
            folder.write(PHOTOS, to_text(photos))
            folder.write(JOB, (json.dumps(asdict(self), indent=2) + "\n").encode())
        else:
            raise UsageError(f"{folder.address} is not empty, and holds no {JOB}: give a new folder")

    def _require_same(self, folder: ResultFolder) -> None:
        try:
            begun = _Job(**json.loads(folder.read(JOB)))
        except (ValueError, TypeError) as error:
            raise UsageError(f"{folder.address}/{JOB} is damaged: give a new folder") from error
        differing = [name for name, value in asdict(self).items() if value != getattr(begun, name)]
        if set(differing) & {"photos", "num_photos"}:
            raise UsageError(
                f"{folder.address} is of another list of {begun.num_photos} photos: give a new folder, or "
                f"{folder.address}/{PHOTOS} as the source, to complete that list"
            )
        if differing:
            raise UsageError(f"{folder.address} is of another {' and '.join(differing)}: give a new folder")


def _find(sources: Sequence[str | Path]) -> list[str]:
    require_ray()
    return find_photos([str(source) for source in sources])


def _describe(photos: Sequence[str]) -> tuple[str, int]:
    return hashlib.sha256(to_text(photos)).hexdigest(), len(photos)


def _digest(network: "Backbone | Classifier") -> str:
    """Of all that decides a network's values."""
    import jax

    from jaxcls.classifier import Classifier, as_backbone

    backbone = as_backbone(network)
    conditions: list[Any] = [backbone.architecture, backbone.preprocess.to_json()]
    arrays = {"backbone": backbone.variables}
    if isinstance(network, Classifier):
        head = network.head
        conditions += [network.classes, head.kind, head.normalize, head.calibration]
        arrays |= {"head": head.weights, "thresholds": head.thresholds}
    digest = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode())
    for path, leaf in jax.tree.leaves_with_path(arrays):
        digest.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _complete(
    job: _Job,
    network: "Backbone | Classifier",
    photos: Sequence[str],
    table: Table,
    out: str | Path,
    config: BatchConfig,
    shown: str | None,
) -> Outcome:
    """Compute the parts that are missing, and count what is there then."""
    folder = ResultFolder(str(out))
    with folder.claimed():
        job.begin(folder, photos)
        shards = {
            shard: photos[shard * job.shard_size : (shard + 1) * job.shard_size]
            for shard in job.missing(folder)
        }
        if shards:
            stages = Stages(network.preprocess, job.max_pixels, table, folder)
            with connected(config.address):
                written = compute(stages, network, job.precision, shards, config.num_actors)
                for _ in show_progress(written, shown, len(shards)) if shown else written:
                    pass
        if lost := job.missing(folder):
            raise UsageError(
                f"{folder.address}: {part_name(lost[0])} was written where this process does not see it: "
                "give a folder that all nodes of the cluster share, or a prefix of an object store"
            )
        num_rows, num_failed = folder.count_rows()
    if num_rows != len(photos):
        raise UsageError(f"{folder.address} holds {num_rows} rows of {len(photos)} photos: give a new folder")
    return Outcome(num_rows, num_failed, len(job.shards), len(shards))

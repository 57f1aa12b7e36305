"""Features of photos, kept on disk by content: what was seen before costs no forward pass."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from jaxcls.data.dataset import Dataset, find_problems, leave_out
from jaxcls.data.inventory import content_digests
from jaxcls.errors import ClassifierError
from jaxcls.models.precision import Precision, scoring_dtype
from jaxcls.models.pretrained import Backbone
from jaxcls.scoring import extract_features
from jaxcls.storage import make_private_folder, write_whole

Report = Callable[[str], object]
SUFFIX = ".safetensors"
VERSION = 3
"""Of what decoding, resizing and the network make of a photo: to be raised when that changes."""
PER_FILE = 2**14
"""Photos whose features are kept at once: what an interrupted extraction has to do again."""


def features_of(
    backbone: Backbone,
    dataset: Dataset,
    cache: Path | None,
    *,
    num_workers: int = 0,
    precision: Precision = "auto",
    max_bad_fraction: float = 0.0,
    progress: bool = False,
    report: Report = lambda text: None,
) -> tuple[Dataset, NDArray[np.float32]]:
    """The photos that can be read, and their features float32 [N, D].

    Kept are features by the photo's bytes, below a folder for each backbone: its weights, preprocessing and
    precision. A file there is named by the sha256 of what it holds; one that does not fit is deleted.

    Args:
        backbone: the network.
        dataset: photos.
        cache: where features are kept; None: nowhere.
        num_workers, precision, progress: as for `extract_features`.
        max_bad_fraction: as for `scan`.
        report: hears what came from the cache, and what in it is of no use.

    Raises:
        DatasetError: too many photos cannot be read.
        ClassifierError: features are not finite.
    """
    digests = [b""] * len(dataset) if cache is None else content_digests(dataset, progress=progress)
    folder = None if cache is None else cache / _backbone_digest(backbone, precision)
    known = {} if folder is None else dict(_read(folder, backbone.num_features, set(digests), report))
    missing = [i for i, digest in enumerate(digests) if digest not in known]
    problems: list[str | None] = [None] * len(dataset)
    for i, problem in zip(missing, find_problems(dataset.select(missing)) if missing else (), strict=True):
        problems[i] = problem
    kept = [i for i, problem in enumerate(problems) if problem is None]
    dataset = leave_out(dataset, problems, max_bad_fraction=max_bad_fraction)
    digests = [digests[i] for i in kept]
    new = [i for i, digest in enumerate(digests) if digest not in known]
    if folder is not None:
        report(f"features of {len(dataset) - len(new)} of {len(dataset)} images were kept from before")
    values = np.empty((len(dataset), backbone.num_features), np.float32)
    for i, digest in enumerate(digests):
        if digest in known:
            values[i] = known[digest]
    for start in range(0, len(new), PER_FILE):
        some = new[start : start + PER_FILE]
        values[some], _, _ = extract_features(
            backbone, dataset.select(some), num_workers=num_workers, precision=precision, progress=progress
        )
        if num_bad := int((~np.isfinite(values[some]).all(1)).sum()):
            raise ClassifierError(
                f"the features of {num_bad} of {len(some)} images are not finite: the network's weights are "
                "damaged or have diverged"
            )
        # One without a digest could be read the second time only.
        if folder is not None and (readable := [i for i in some if digests[i]]):
            _write(folder, [digests[i] for i in readable], values[readable])
    return dataset, values


def _backbone_digest(backbone: Backbone, precision: Precision) -> str:
    conditions = [
        VERSION,
        backbone.architecture,
        backbone.preprocess.to_json(),
        scoring_dtype(precision, backbone.preprocess.size),
    ]
    digest = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode())
    for path, leaf in jax.tree.leaves_with_path(backbone.variables):
        digest.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:32]


def _read(
    folder: Path, num_features: int, wanted: set[bytes], report: Report
) -> Iterator[tuple[bytes, NDArray[np.float32]]]:
    """Digests of photos and their features, of those wanted."""
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != path.stem:
                raise ValueError("its content is not what was written")
            arrays = load(content)
            digests, values = arrays["digests"], arrays["values"]
            if values.shape != (len(digests), num_features):
                raise ValueError(f"it holds features {list(values.shape)}")
        except FileNotFoundError:  # another process was faster in deleting it
            continue
        except (SafetensorError, KeyError, ValueError) as error:
            report(f"{path} is of no use and deleted: {error}")
            path.unlink(missing_ok=True)
            continue
        for digest, row in zip(digests, values, strict=True):
            if digest.tobytes() in wanted:
                yield digest.tobytes(), row


def _write(folder: Path, digests: Sequence[bytes], values: NDArray[np.float32]) -> None:
    rows = np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1)
    content = save({"digests": rows, "values": values})
    path = make_private_folder(folder) / f"{hashlib.sha256(content).hexdigest()}{SUFFIX}"
    write_whole(path, content)

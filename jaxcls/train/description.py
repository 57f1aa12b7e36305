"""What a run is: described to the user, and in a form to compare: by processes, and when it is resumed."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from jaxcls.data.dataset import Dataset
from jaxcls.models.precision import compute_dtype
from jaxcls.train.config import FinetuneConfig
from jaxcls.train.setup import Setup

WITHOUT_EFFECT = {"num_workers", "log_every", "max_bad_fraction", "num_checkpoints", "checkpoint_seconds"}


def describe(setup: Setup, params: Any, notes: Iterable[str]) -> str:
    """For the user, a line for each fact; what else is to be told, `notes`, comes last."""
    config, dataset, backbone = setup.config, setup.dataset, setup.backbone
    leaves = jax.tree.leaves(params)
    dtype = np.dtype(compute_dtype(config.precision)).name
    num_parameters = sum(leaf.size for leaf in leaves)
    lines = [
        f"Fine-tuning {backbone.architecture} on {len(dataset)} images of {len(dataset.classes)} classes: "
        f"{num_parameters} parameters in {len(leaves)} tensors",
        f"{config.num_epochs} epochs of {setup.steps_per_epoch} steps with {config.batch_size} images of "
        f"{backbone.preprocess.size} px in {dtype} on {setup.mesh.size} x {jax.devices()[0].device_kind}"
        + (f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""),
    ]
    if backbone.pretrained_head is not None:
        num_classes = len(backbone.pretrained_head[1])
        lines.append(f"The pretrained head of {num_classes} classes is replaced by a new one")
    if len(dataset) < config.batch_size:
        lines.append(
            f"The training set is smaller than a batch of {config.batch_size}: images repeat within it"
        )
    return "\n".join([*lines, *notes])


def identity(setup: Setup, eval_dataset: Dataset | None) -> dict[str, Any]:
    """What two runs must have in common for one to go on from the other's checkpoints; of JSON values."""
    return {
        **decisive(setup.config),
        "architecture": setup.backbone.architecture,
        "weights": _checksum(setup.backbone.variables),
        "preprocess": setup.backbone.preprocess.to_json(),
        "training photos": _fingerprint(setup.dataset),
        "evaluation photos": None if eval_dataset is None else _fingerprint(eval_dataset),
    }


def decisive(config: FinetuneConfig) -> dict[str, Any]:
    """What of a configuration decides what the parameters become."""
    return {name: value for name, value in asdict(config).items() if name not in WITHOUT_EFFECT}


def environment(setup: Setup) -> str:
    """On what else the bits of the results depend."""
    photos = "streamed" if setup.photos is None else "resident"
    return (
        f"{setup.mesh.size} x {jax.devices()[0].device_kind} with jax {version('jax')}, {photos} photos, "
        f"up to {setup.block_capacity} steps a dispatch, {jax.process_count()} processes"
    )


def _fingerprint(dataset: Dataset) -> dict[str, Any]:
    """What tells two datasets apart: number, classes, and a checksum of ids and labels in their order."""
    rows = json.dumps([list(dataset.ids), dataset.labels.tolist()])
    return {
        "number": len(dataset),
        "classes": ", ".join(dataset.classes),
        "ids and labels": hashlib.sha256(rows.encode()).hexdigest()[:16],
    }


def _checksum(variables: Any) -> str:
    """What tells the weights of two networks apart."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(variables):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]

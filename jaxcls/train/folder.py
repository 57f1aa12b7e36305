"""The folder of a run: its files' names, opening it, and what is written into it but checkpoints."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxcls.classifier import load
from jaxcls.data.dataset import Dataset
from jaxcls.data.splitting import write_split
from jaxcls.errors import ClassifierError, UsageError
from jaxcls.models.pretrained import Backbone
from jaxcls.train.config import FinetuneConfig
from jaxcls.train.reporters import MetricsReporter, PlotReporter, Reporter, TensorBoardReporter

CLASSIFIER_FOLDER, CHECKPOINTS_FOLDER, CONFIG_FILE = "classifier", "checkpoints", "config.json"


def open_folder(folder: Path, *, resume: bool) -> None:
    """Make a folder for a run, or find the run in it that is to go on.

    Raises:
        UsageError: it holds something else, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            return
    except OSError as error:
        raise UsageError(f"{folder} cannot hold a run: {error.strerror}") from error
    if not resume:
        raise UsageError(
            f"{folder} is not empty: give each run a folder of its own, or resume its run (--resume)"
        )
    if not (folder / CONFIG_FILE).exists():
        raise UsageError(f"{folder} holds no run to resume, but something else: give another folder")


def open_reporters(folder: Path, history: Sequence[Mapping[str, Any]], step: int) -> list[Reporter]:
    """Those that write into the folder, after the rows of `history` and so many steps."""
    return [
        MetricsReporter(folder, history),
        TensorBoardReporter(folder, step),
        PlotReporter(folder, history),
    ]


def write_config(
    folder: Path, config: FinetuneConfig, backbone: Backbone, train: Dataset, test: Dataset | None
) -> None:
    """Describe a run in `config.json`, and list the ids of both sides where there are two."""
    datasets = {"train": train, "eval": test}
    description = {
        "config": asdict(config),
        "versions": {name: version(name) for name in ("jaxcls", "jax", "flax", "optax", "grain")},
        "backbone": {"architecture": backbone.architecture, **backbone.provenance},
        "preprocess": backbone.preprocess.to_json(),
        "datasets": {
            name: {"name": part.name, "classes": part.classes, "num_images": len(part)}
            for name, part in datasets.items()
            if part is not None
        },
    }
    text = json.dumps(description, indent=2, ensure_ascii=False)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    if test is not None:
        write_split(folder, train.ids, test.ids)


def has_classifier(folder: Path, num_epochs: int) -> bool:
    """Whether the classifier of so many epochs is there already, with what was exported since."""
    try:
        return load(folder / CLASSIFIER_FOLDER).provenance.get("num_epochs_done") == num_epochs
    except ClassifierError:
        return False

"""`jaxcls evaluate`, `predict`, `features` and `export`."""

# Annotations stay text: evaluated, those of the API would load JAX before `--help` is printed.
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from tyro.conf import OmitArgPrefixes, Positional

import jaxcls
from jaxcls.cluster import batch
from jaxcls.cluster.batch import BatchConfig, Outcome
from jaxcls.commands.base import (
    DONE,
    FAILED,
    BackboneOptions,
    Command,
    HtmlReport,
    PhotoCommand,
    expand,
    note,
    read_lines,
    report,
)
from jaxcls.commands.output import OutputOptions
from jaxcls.data.lines import from_line
from jaxcls.data.splitting import TEST_IDS, TRAIN_IDS, read_split
from jaxcls.errors import UsageError
from jaxcls.models.precision import PLATFORMS, Platform, Precision
from jaxcls.storage import write_whole


@dataclass(frozen=True, kw_only=True)
class EvaluationCommand(PhotoCommand):
    """What every subcommand takes that compares a saved classifier with labels."""

    model: Annotated[Positional[Path], tyro.conf.arg(metavar="CLASSIFIER")]
    """A saved classifier."""
    data: Annotated[Positional[Path], tyro.conf.arg(metavar="PHOTOS")]
    """The folder of photos, one sub-folder per class; records (`jaxcls pack`), or a .csv or .jsonl list."""
    ids: Path | None = None
    """Only the photos whose ids this file lists, one a line, such as a run's `test_ids.txt`."""
    allow_copies: bool = False
    """Count augmented copies like other photos."""

    def load(self) -> tuple[jaxcls.Classifier, jaxcls.Dataset]:
        """The classifier, and the photos to compare it with."""
        classifier = jaxcls.load(self.model)
        dataset = self.read(self.data, classifier.classes)
        if self.ids is not None:
            dataset = dataset.select_ids([from_line(line) for line in read_lines(self.ids)])
        if not self.allow_copies and (num_copies := int(dataset.is_copy.sum())):
            raise UsageError(
                f"{num_copies} of the {len(dataset)} images in {self.data} are augmented copies: give the "
                "originals that were held out (--ids RUN/test_ids.txt), or count copies on purpose "
                "(--allow-copies)"
            )
        self.warn_of_training_photos(dataset)
        return classifier, dataset

    def warn_of_training_photos(self, dataset: jaxcls.Dataset) -> None:
        """Say so where photos have the ids of those that the classifier was trained on."""
        for folder in (self.model, self.model.parent):  # as `svm` and as `train` leave them
            if (folder / TRAIN_IDS).is_file():
                trained, _ = read_split(folder)
                if count := len(set(trained) & set(dataset.ids)):
                    note(
                        f"warning: {count} of these {len(dataset)} images have the ids of images that were "
                        f"trained on, which flatters; the others: --ids {folder / TEST_IDS}"
                    )
                return


@dataclass(frozen=True, kw_only=True)
class Evaluate(EvaluationCommand):
    """Measure a saved classifier on a folder of labelled photos."""

    out: Path | None = None
    """A new folder for predictions.csv and plots: confusion matrix, ROC, precision, recall, reliability."""
    report: Path | None = None
    """An HTML file, written or replaced, with the numbers, the photos and an explorer of thresholds."""

    def run(self) -> int:
        if self.out is not None and self.out.exists():
            raise UsageError(f"{self.out} exists: give a new folder")
        if self.report is not None and (self.report.is_dir() or not self.report.parent.is_dir()):
            raise UsageError(f"--report {self.report}: give the name of a file in a folder that exists")
        classifier, dataset = self.load()
        html = None if self.report is None else HtmlReport(self.report, self.model)
        return report(classifier, dataset, self.out, html, allow_copies=self.allow_copies)


@dataclass(frozen=True, kw_only=True)
class ClusterCommand(PhotoCommand):
    """What every subcommand takes that a Ray cluster can do, too."""

    target: Literal["local", "ray"] = "local"
    """ray: on a Ray cluster, into a folder of Parquet files, which is completed where a run was cut short."""
    cluster: OmitArgPrefixes[BatchConfig] = field(default_factory=BatchConfig)
    precision: Precision = "auto"
    """Of the convolutions; auto: bfloat16 on accelerators and, from 128 px on, CPUs that multiply it, but for
    Ray's."""

    def __post_init__(self) -> None:
        if self.target == "local" and self.cluster != BatchConfig():
            raise UsageError("--address, --shard-size and --num-actors go with --target ray")

    def on_cluster(
        self,
        work: Callable[..., Outcome],
        network: jaxcls.Classifier | jaxcls.Backbone,
        sources: Sequence[str],
        out: str | None,
    ) -> int:
        """Have a cluster do it; print what there is then, and return the exit code."""
        if out is None:
            raise UsageError("--target ray needs --out: a folder, or a prefix such as s3://bucket/scores")
        options: dict[str, Any] = {"precision": self.precision, "max_pixels": self.max_pixels}
        done = work(network, sources, out, self.cluster, progress=True, **options)
        print(f"{done.num_photos} images in {done.num_parts} parts, {done.num_written} of them new: {out}")
        if done.num_failed:
            note(f"{done.num_failed} images could not be read: the column `error` says why")
        return FAILED if done.num_failed else DONE


@dataclass(frozen=True, kw_only=True)
class Predict(ClusterCommand):
    """Score images: a row for each. An unreadable image gets a row with its error, and exit code 1."""

    model: Annotated[Positional[Path], tyro.conf.arg(metavar="CLASSIFIER")]
    """A saved classifier."""
    sources: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGES")]
    """Images, and folders of images; with --target ray also URIs (s3://...) and .txt lists of all these."""
    format: Literal["table", "csv", "jsonl"] | None = None
    """How to write the rows; default: by the suffix of --out, else a table."""
    out: str | None = None
    """A .csv or .jsonl file instead of the terminal; with --target ray, a folder or s3:// prefix."""

    def run(self) -> int:
        if self.target == "ray":
            if self.format is not None:
                raise UsageError("--format does not go with --target ray, which writes Parquet")
            return self.on_cluster(batch.predict, jaxcls.load(self.model), self.sources, self.out)
        from jaxcls.data.dataset import from_items

        output = OutputOptions(format=self.format, out=None if self.out is None else Path(self.out))
        photos = replace(from_items(expand([Path(s) for s in self.sources])), max_pixels=self.max_pixels)
        predictions = jaxcls.predict(jaxcls.load(self.model), photos, precision=self.precision, progress=True)
        return output.write(predictions)


@dataclass(frozen=True, kw_only=True)
class Features(ClusterCommand):
    """Write pooled features of images: `values` [N, D], `labels` [N] (-1: unknown), `classes` and `ids`."""

    backbone: Annotated[Positional[str], tyro.conf.arg(metavar="BACKBONE")]
    """A name of the catalogue (`jaxcls info` lists them), or the path of a saved classifier."""
    data: Annotated[Positional[str], tyro.conf.arg(metavar="PHOTOS")]
    """A folder of photos, one sub-folder per class; records, or a list; with --target ray as for predict."""
    out: str
    """A .npz file; with --target ray, a folder or s3:// prefix, where rows have an id and no label."""
    weights: Path | None = None
    """Weights from this file (.safetensors, .pth) instead of the hub."""
    image_size: int | None = None
    """Pixels; default: the size the weights were trained for."""
    skip_bad: bool = False
    """Leave undecodable photos out, however many; with --target ray they have rows with their error."""

    def run(self) -> int:
        start = BackboneOptions(backbone=self.backbone, weights=self.weights, image_size=self.image_size)
        if self.target == "ray":
            return self.on_cluster(batch.extract_features, start.load(), (self.data,), self.out)
        if not self.out.endswith(".npz"):
            raise UsageError(f"--out {self.out}: give a name that ends in .npz")
        photos = self.read(Path(self.data), skip_bad=self.skip_bad)
        values, labels, ids = jaxcls.extract_features(
            start.load(), photos, precision=self.precision, progress=True
        )
        content = BytesIO()
        texts = np.asarray(photos.classes, np.str_), np.asarray(ids.tolist(), np.str_)
        np.savez(content, values=values, labels=labels, classes=texts[0], ids=texts[1])
        write_whole(Path(self.out), content.getvalue())
        print(f"{len(ids)} images, {values.shape[1]} features: {self.out}")
        return DONE


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    """Write a classifier's scoring programs for cpu and cuda, or a folder for Hugging Face transformers.

    A program, CLASSIFIER/program/PLATFORM.bin, is run by `jaxcls.load_program`, which does not trace the
    network again. It holds no weights and takes any batch size.
    """

    model: Annotated[Positional[Path], tyro.conf.arg(metavar="CLASSIFIER")]
    """A saved classifier."""
    platforms: tuple[Platform, ...] | None = None
    """What to write programs for; default: cpu and cuda, or none with --hub-folder."""
    precision: Precision = "auto"
    """Of the programs' convolutions; auto: float32 for cpu, bfloat16 for cuda."""
    hub_folder: Path | None = None
    """Write this new folder: weights, configuration and preprocessing for transformers' from_pretrained."""

    def run(self) -> int:
        classifier = jaxcls.load(self.model)
        if self.hub_folder is not None:
            print(f"for transformers: {classifier.export_hub(self.hub_folder)}")
            for lost in classifier.hub_notes:
                note(f"note: {lost}")
        platforms = self.platforms or (PLATFORMS if self.hub_folder is None else ())
        if platforms:
            for path in classifier.export(self.model, platforms, precision=self.precision):
                print(f"program: {path}")
        return DONE

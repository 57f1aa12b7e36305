"""`jaxcls evaluate`, `predict` and `export`."""

# Annotations stay text: evaluated, those of the API would load JAX before `--help` is printed.
from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional

import jaxcls
from jaxcls.commands.base import DONE, Command, HtmlReport, PhotoCommand, expand, note, read_lines, report
from jaxcls.commands.output import OutputOptions
from jaxcls.data.lines import from_line
from jaxcls.data.splitting import TEST_IDS, TRAIN_IDS, read_split
from jaxcls.errors import UsageError
from jaxcls.models.precision import PLATFORMS, Platform, Precision


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
class Predict(PhotoCommand):
    """Score images: a row for each. An unreadable image gets a row with its error, and exit code 1."""

    model: Annotated[Positional[Path], tyro.conf.arg(metavar="CLASSIFIER")]
    """A saved classifier."""
    paths: Positional[tuple[Path, ...]]
    """Images, and folders of images."""
    output: OmitArgPrefixes[OutputOptions] = field(default_factory=OutputOptions)
    precision: Precision = "auto"
    """Of the convolutions."""

    def run(self) -> int:
        from jaxcls.data.dataset import from_items

        photos = replace(from_items(expand(self.paths)), max_pixels=self.max_pixels)
        predictions = jaxcls.predict(jaxcls.load(self.model), photos, precision=self.precision, progress=True)
        return self.output.write(predictions)


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

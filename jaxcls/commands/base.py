"""What the commands share: their options, and how they print."""

# Annotations stay text: evaluated, those of the API would load JAX before `--help` is printed.
from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import ClassVar, TextIO

import jaxcls
from jaxcls.data.images import MAX_PIXELS
from jaxcls.errors import UsageError
from jaxcls.storage import Storage

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True, kw_only=True)
class Command:
    """What every subcommand takes."""

    uses_jax: ClassVar[bool] = True

    debug: bool = False
    """Show the traceback of an error."""

    def run(self) -> int:
        """Do it and return the exit code."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PhotoCommand(Command):
    """What every subcommand that reads photos takes."""

    max_pixels: int = MAX_PIXELS
    """Refuse photos of more pixels, before decoding them."""

    def read(
        self, path: Path, classes: Sequence[str] | None = None, *, skip_bad: bool = False
    ) -> jaxcls.Dataset:
        """The photos of a folder, records or a list; says what is left out.

        Args:
            path: where they lie.
            classes: the class names that are expected.
            skip_bad: leave undecodable photos out, too.
        """
        photos = self._read(path, classes)
        if skip_bad:
            photos = jaxcls.scan(photos, max_bad_fraction=1.0)
        for line in photos.notes:
            note(line)
        return photos

    def _read(self, path: Path, classes: Sequence[str] | None) -> jaxcls.Dataset:
        """What lies at `path`; a folder of photos unless it is something else."""
        from jaxcls.data.arrayrecord import is_arrayrecord, read_arrayrecord
        from jaxcls.data.lists import LIST_READERS, read_list

        if is_arrayrecord(path):
            photos = read_arrayrecord(path, max_pixels=self.max_pixels)
        elif path.suffix.lower() in LIST_READERS and not path.is_dir():
            photos = read_list(path, max_pixels=self.max_pixels)
        else:
            return jaxcls.read_folder(path, classes=classes, max_pixels=self.max_pixels)
        return photos if classes is None else photos.with_classes(classes)


@dataclass(frozen=True, kw_only=True)
class BackboneOptions:
    """Which network to start from."""

    backbone: str = "resnet18"
    """A name of the catalogue (`jaxcls info` lists them), or the path of a saved classifier."""
    weights: Path | None = None
    """Weights from this file (.safetensors, .pth) instead of the hub."""
    image_size: int | None = None
    """Pixels; default: the size the weights were trained for."""

    def load(self) -> jaxcls.Backbone:
        """The backbone these options name."""
        if is_classifier(Path(self.backbone)):
            if self.weights is not None:
                raise UsageError("--weights does not go with --backbone CLASSIFIER, which has its own")
            backbone = jaxcls.load(self.backbone).backbone
            return backbone if self.image_size is None else backbone.with_image_size(self.image_size)
        return jaxcls.load_pretrained(self.backbone, weights=self.weights, image_size=self.image_size)


def is_classifier(path: Path) -> bool:
    """Whether a saved classifier lies at `path`."""
    from jaxcls.manifest import MANIFEST

    return (path / MANIFEST).is_file()


def expand(paths: Sequence[Path]) -> list[Path]:
    """Files as they are; of folders, the images below them."""
    from jaxcls.data.folder import list_images

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            listing = list_images(path)
            listing.require_whole(path)
            found = sorted([*listing.images, *listing.not_utf8])
            if not found:
                raise UsageError(f"{path} holds no images")
            files += [path / image for image in found]
        else:
            files.append(path)
    if not files:
        raise UsageError("give at least one image or folder")
    return files


def read_lines(path: Path) -> list[str]:
    """The lines of a text file."""
    try:
        # Not splitlines: a file name may hold what Unicode counts as a line's end.
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def read_key(key_file: Path | None, variable: str) -> str | None:
    """The first key in a file, # comments aside; without a file, the environment variable's."""
    if key_file is None:
        return os.environ.get(variable)
    for line in read_lines(key_file):
        if key := line.partition("#")[0].strip():
            return key
    raise UsageError(f"{key_file} holds no key")


def open_text(path: Path | None) -> AbstractContextManager[TextIO]:
    """A text file to be written, or, without a path, the terminal."""
    if path is None:
        return nullcontext(sys.stdout)
    try:
        return path.open("w", encoding="utf-8", newline="")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Rows of cells, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())


def note(text: str) -> None:
    """Say something on standard error, beside the results."""
    print(text, file=sys.stderr)


def feature_cache() -> Path:
    """Where features that were computed once are kept."""
    return Storage.default().persistent / "features"


def new_output(command: str) -> Path:
    """A folder for what a command writes, named after the time."""
    return Storage.default().outputs / f"{command}-{datetime.now():%Y%m%d-%H%M%S}"


@dataclass(frozen=True)
class HtmlReport:
    """Where to write a report, and of which saved classifier."""

    path: Path
    model: Path


def report(
    classifier: jaxcls.Classifier,
    dataset: jaxcls.Dataset,
    out: Path | None = None,
    html: HtmlReport | None = None,
    *,
    allow_copies: bool = False,
) -> int:
    """Print the evaluation; write predictions and plots into `out`, and a report as `html`."""
    plots = jaxcls.evaluation.plots
    predictions = jaxcls.predict(classifier, dataset, progress=True)
    evaluation = jaxcls.evaluate(predictions, allow_copies=allow_copies)
    print(evaluation)
    for message in predictions.errors.values():
        print(f"jaxcls: {message}", file=sys.stderr)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with open_text(out / "predictions.csv") as file:
            predictions.write_csv(file)
        drawn = {
            "confusion": plots.plot_confusion_matrix(evaluation),
            "roc": plots.plot_roc(evaluation),
            "pr": plots.plot_pr(evaluation),
        }
        if predictions.kind != "margin":
            drawn["reliability"] = plots.plot_reliability(evaluation)
        for name, ax in drawn.items():
            plots.save(ax, out / f"{name}.png")
        print(f"predictions.csv and plots: {out}")
    if html is not None:
        from jaxcls.ui.report import write_report

        thresholds = classifier.head.thresholds
        written = write_report(
            html.path, predictions, evaluation, dataset, model=html.model, thresholds=thresholds
        )
        print(f"{html.path}: {written}")
    return FAILED if predictions.errors else DONE

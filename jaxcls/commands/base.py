"""What the commands share: their options, and how they print."""

# Annotations stay text: evaluated, those of the API would load JAX before `--help` is printed.
from __future__ import annotations

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
        """The photos of a folder, without undecodable ones if these are to be skipped."""
        photos = jaxcls.read_folder(path, classes=classes, max_pixels=self.max_pixels)
        if not skip_bad:
            return photos
        good = jaxcls.scan(photos, max_bad_fraction=1.0)
        for line in good.notes[len(photos.notes) :]:
            print(line, file=sys.stderr)
        return good


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
            found = sorted(listing.images + listing.not_utf8)
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


def report(classifier: jaxcls.Classifier, dataset: jaxcls.Dataset, out: Path | None = None) -> int:
    """Print the evaluation; write predictions and plot into `out`."""
    plots = jaxcls.evaluation.plots
    predictions = jaxcls.predict(classifier, dataset, progress=True)
    evaluation = jaxcls.evaluate(predictions)
    print(evaluation)
    for message in predictions.errors.values():
        print(f"jaxcls: {message}", file=sys.stderr)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with open_text(out / "predictions.csv") as file:
            predictions.write_csv(file)
        plots.save(plots.plot_confusion_matrix(evaluation), out / "confusion.png")
        print(f"predictions.csv and confusion.png: {out}")
    return FAILED if predictions.errors else DONE

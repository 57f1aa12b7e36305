"""`jaxcls quickstart`, `train` and `svm`."""

# Annotations stay text: evaluated, those of the API would load JAX before `--help` is printed.
from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from tyro.conf import OmitArgPrefixes, Positional

import jaxcls
from jaxcls.commands.base import (
    DONE,
    BackboneOptions,
    Command,
    PhotoCommand,
    feature_cache,
    new_output,
    note,
    report,
)
from jaxcls.data.duplicates import describe_leakage, find_duplicates, find_leakage
from jaxcls.data.splitting import read_split, write_split
from jaxcls.errors import UsageError
from jaxcls.models.precision import Precision
from jaxcls.train.config import FinetuneConfig


@dataclass(frozen=True, kw_only=True)
class Quickstart(Command):
    """Train, evaluate, save and score on scikit-learn's handwritten digits: no network, under two minutes."""

    out: Path | None = None
    """A new folder for everything it writes."""

    def run(self) -> int:
        from jaxcls.quickstart import quickstart

        quickstart(self.out or new_output("quickstart"))
        return DONE


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """Which photos are held out for testing."""

    test_data: Path | None = None
    """Test photos: a folder, records or a list. Without them, a stratified part of the photos is held out."""
    train_size: float = 0.66
    """Share of the photos to train on; 1: all of them, without a test; above 1: their number."""
    split_seed: int = 0
    """Another seed, another held-out part."""
    keep_split: Path | None = None
    """A run, or a classifier of `jaxcls svm`: its photos stay on their sides, only new ones are divided."""
    group_duplicates: bool = True
    """Look for photos that show the same, and hold out all or none of them."""


@dataclass(frozen=True, kw_only=True)
class TrainingCommand(PhotoCommand):
    """What both ways of training take."""

    data: Annotated[Positional[Path], tyro.conf.arg(metavar="PHOTOS")]
    """The folder of photos; or records (`jaxcls pack`), or a .csv or .jsonl list."""
    start: OmitArgPrefixes[BackboneOptions] = field(default_factory=BackboneOptions)
    split: OmitArgPrefixes[SplitOptions] = field(default_factory=SplitOptions)
    skip_bad: bool = False
    """Leave undecodable photos out, however many."""

    def divide(self) -> tuple[jaxcls.Dataset, jaxcls.Dataset | None]:
        """Training and test set."""
        is_settled = self.split.test_data is not None or self.split.train_size == 1
        if self.split.keep_split is not None and is_settled:
            raise UsageError("--keep-split goes with neither --test-data nor --train-size 1")
        previous = None if self.split.keep_split is None else read_split(self.split.keep_split)
        photos = self.read(self.data, skip_bad=self.skip_bad)
        originals = photos.originals()
        duplicates = find_duplicates(originals) if self.split.group_duplicates else None
        if duplicates is not None:
            photos = photos.group_originals(duplicates.groups)
            if duplicates.num_exact or duplicates.num_near:
                note(duplicates.summary().partition("\n")[0])
        if self.split.test_data is not None:
            test = self.read(self.split.test_data, photos.classes, skip_bad=self.skip_bad)
            return photos, _leave_copies_out(test)
        size = self.split.train_size
        if size == 1:
            return photos, None
        size = int(size) if size > 1 else size
        train, test = photos.split(size, seed=self.split.split_seed, previous=previous)
        for line in test.notes:
            note(line)
        test = _leave_copies_out(test)
        if duplicates is None:
            return train, test
        # There are some only where photos form a chain, each like the next, and no group holds all of it.
        tested = set(test.ids)
        twins = duplicates.twins(np.asarray([i in tested for i in originals.ids]))
        if twins:
            names = {originals.ids[photo]: originals.ids[twin] for photo, twin in twins.items()}
            print(describe_leakage(names, len(test)), file=sys.stderr)
        return train, test


def _leave_copies_out(test: jaxcls.Dataset) -> jaxcls.Dataset:
    """What is measured on: originals alone."""
    if num_copies := int(test.is_copy.sum()):
        note(f"{num_copies} augmented copies of test images are left out: these are measured on as they are")
    return test.originals()


@dataclass(frozen=True, kw_only=True)
class Train(TrainingCommand):
    """Fine-tune a network on a folder of photos, one sub-folder per class."""

    config: OmitArgPrefixes[FinetuneConfig] = field(default_factory=FinetuneConfig)
    out: Path | None = None
    """A new folder for the run."""
    resume: bool = False
    """Go on with the run in --out where it stopped; start it if there is none yet."""
    distributed: bool = False
    """Train together with the other processes that were started with this command, by srun, mpirun or
    Kubernetes; see "Several machines" in the README."""

    def run(self) -> int:
        from jaxcls.parallel import is_first_process, processes
        from jaxcls.train.folder import CLASSIFIER_FOLDER

        if self.resume and self.out is None:
            raise UsageError("--resume needs --out RUN, the folder of the run to go on with")
        with processes() if self.distributed else nullcontext():
            train, test = self.divide()
            run_dir = self.out or new_output("train")
            result = jaxcls.finetune(
                train, self.start.load(), self.config, eval_dataset=test, run_dir=run_dir, resume=self.resume
            )
            if not is_first_process():
                return DONE
            print(f"classifier: {run_dir / CLASSIFIER_FOLDER}")
            return DONE if test is None else report(result.classifier, test, run_dir)


@dataclass(frozen=True, kw_only=True)
class Svm(TrainingCommand):
    """Train a linear SVM on a frozen network's features of a folder of photos."""

    C: float | Literal["cv"] = 1.0
    """Inverse regularisation: small values regularise more. cv: the best in cross-validation."""
    class_weight: Literal["balanced", "none"] = "balanced"
    """Weigh classes inversely to their number of photos, or alike."""
    normalize_features: bool = False
    """Divide each feature vector by its L2 norm."""
    standardize: bool = False
    """Train on features of mean 0 and standard deviation 1."""
    calibrate: Literal["temperature", "sigmoid"] | None = None
    """Make the scores probabilities, by cross-validation: one temperature, or a sigmoid for each class."""
    min_precision: float | None = None
    """Abstain where, in cross-validation, a class's answers at such scores were right less often."""
    num_folds: int = 5
    """Of the cross-validation."""
    precision: Precision = "auto"
    """Of the convolutions; auto: bfloat16 on accelerators and, from 128 px on, CPUs that multiply it."""
    out: Path | None = None
    """Where to save the classifier."""

    def run(self) -> int:
        if self.out is not None and self.out.exists():
            raise UsageError(f"{self.out} exists: choose another path, or move it away")
        train, test = self.divide()
        if test is not None and test.groups is None and (twins := find_leakage(train, test)):
            note(describe_leakage(twins, len(test)))
        classifier = jaxcls.fit_svm(
            train,
            self.start.load(),
            C=self.C,
            class_weight=None if self.class_weight == "none" else self.class_weight,
            normalize_features=self.normalize_features,
            standardize=self.standardize,
            calibrate=self.calibrate,
            min_precision=self.min_precision,
            num_folds=self.num_folds,
            cache=feature_cache(),
            precision=self.precision,
            progress=True,
            report=note,
        )
        path = classifier.save(self.out or new_output("svm") / "svm.jaxcls")
        if test is not None and self.split.test_data is None:
            write_split(path, train.ids, test.ids)
        print(f"classifier: {path}")
        return DONE if test is None else report(classifier, test)

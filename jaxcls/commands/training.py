"""`jaxcls quickstart`, `train` and `svm`."""

# Annotations stay text: evaluated, those of the API would load JAX before `--help` is printed.
from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
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
    is_classifier,
    new_output,
    note,
    report,
)
from jaxcls.data.duplicates import describe_leakage, find_duplicates, find_leakage
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
    """A folder of test photos. Without it, a stratified part of the photos is held out."""
    train_size: float = 0.66
    """Share of the photos to train on; 1: all of them, without a test; above 1: their number."""
    split_seed: int = 0
    """Another seed, another held-out part."""
    group_duplicates: bool = True
    """Look for photos that show the same, and hold out all or none of them."""


@dataclass(frozen=True, kw_only=True)
class TrainingCommand(PhotoCommand):
    """What both ways of training take."""

    data: Annotated[Positional[Path], tyro.conf.arg(metavar="PHOTOS")]
    """The folder of photos."""
    start: OmitArgPrefixes[BackboneOptions] = field(default_factory=BackboneOptions)
    split: OmitArgPrefixes[SplitOptions] = field(default_factory=SplitOptions)
    skip_bad: bool = False
    """Leave undecodable photos out, however many."""

    def divide(self) -> tuple[jaxcls.Dataset, jaxcls.Dataset | None]:
        """Training and test set."""
        photos = self.read(self.data, skip_bad=self.skip_bad)
        duplicates = find_duplicates(photos) if self.split.group_duplicates else None
        if duplicates is not None:
            photos = replace(photos, groups=duplicates.groups)
            if duplicates.num_exact or duplicates.num_near:
                note(duplicates.summary().partition("\n")[0])
        if self.split.test_data is not None:
            return photos, self.read(self.split.test_data, photos.classes, skip_bad=self.skip_bad)
        size = self.split.train_size
        if size == 1:
            return photos, None
        train, test = photos.split(int(size) if size > 1 else size, seed=self.split.split_seed)
        if duplicates is None:
            return train, test
        # There are some only where photos form a chain, each like the next, and no group holds all of it.
        twins = duplicates.twins(np.isin(photos.ids, test.ids))
        if twins:
            names = {photos.ids[photo]: photos.ids[twin] for photo, twin in twins.items()}
            print(describe_leakage(names, len(test)), file=sys.stderr)
        return train, test


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
    """Of the convolutions."""
    out: Path | None = None
    """Where to save the classifier."""

    def run(self) -> int:
        if self.out is not None and self.out.exists() and not is_classifier(self.out):
            raise UsageError(f"{self.out} exists and is no saved classifier: choose another path")
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
        print(f"classifier: {path}")
        return DONE if test is None else report(classifier, test)

"""The main job on real data that is already here: scikit-learn's 1,797 handwritten digits."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from jaxcls.classifier import create_model, load
from jaxcls.data.folder import read_folder
from jaxcls.errors import UsageError
from jaxcls.evaluation import plots
from jaxcls.evaluation.metrics import evaluate
from jaxcls.scoring import predict
from jaxcls.svm.fit import fit_svm
from jaxcls.train.config import FinetuneConfig
from jaxcls.train.finetune import finetune
from jaxcls.train.folder import CLASSIFIER_FOLDER

IMAGE_SIZE = 20
# From scratch, so without dropout; a mirrored digit is another sign, so without flips. Without the smoothing
# so high a rate left 20 instead of 9 errors on three test sets of 360.
CONFIG = FinetuneConfig(
    num_epochs=6,
    learning_rates=(0.3,),
    schedule="cosine",
    warmup_epochs=1,
    dropout=0.0,
    label_smoothing=0.1,
    flip=False,
)

NEXT = """
The same with your own photos, one sub-folder per class, and pretrained weights:
  jaxcls info PHOTOS
  jaxcls svm PHOTOS --backbone resnet18 --out svm.jaxcls
  jaxcls train PHOTOS --backbone resnet18 --out runs/first
  jaxcls evaluate runs/first/classifier OTHER_PHOTOS
  jaxcls predict runs/first/classifier IMAGE_OR_FOLDER ..."""


def write_digits(folder: Path) -> None:
    """Write scikit-learn's digits as `folder/DIGIT/NUMBER.png`, 8 x 8 pixels, grey."""
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        target = folder / str(label) / f"{number:04d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8)).save(target)


def quickstart(folder: Path, show: Callable[[str], None] = print) -> None:
    """Digits -> photos on disk -> fine-tuning and SVM -> evaluation -> saved, loaded, scoring a file.

    Args:
        folder: new or empty; everything is written below it.
        show: takes each piece of text for the user.

    Raises:
        UsageError: the folder holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not empty: give --out a new folder, or delete it")
    started = time.perf_counter()
    write_digits(folder / "digits")
    digits = read_folder(folder / "digits")
    show(digits.summary())
    train, test = digits.split(0.8, seed=0)

    show(
        f"\nTraining ResNet-18 from scratch at {IMAGE_SIZE} px on {len(train)} images, testing on {len(test)}"
    )
    untrained = create_model("resnet18", train.classes, image_size=IMAGE_SIZE).backbone
    # The digits fill their pictures: nothing to crop away.
    untrained = replace(untrained, preprocess=replace(untrained.preprocess, crop_fraction=1.0))
    result = finetune(train, untrained, CONFIG, eval_dataset=test, run_dir=folder / "run")
    evaluation = evaluate(predict(result.classifier, test))
    show(f"\n{evaluation}")
    plot = folder / "confusion.png"
    plots.save(plots.plot_confusion_matrix(evaluation), plot)

    svm = fit_svm(train, result.classifier, C=0.01)
    svm.save(folder / "svm.jaxcls")
    show(f"\nSVM on its features: {evaluate(predict(svm, test)).accuracy():.2%} (macro)")

    saved = folder / "run" / CLASSIFIER_FOLDER
    photo = test.source.path(0)
    assert photo is not None
    row = next(iter(predict(load(saved), [photo]).rows()))
    show(
        f"\n{saved}, loaded again, takes {photo} for {row['predicted']!r} ({test.classes[test.labels[0]]!r})"
    )
    show(f"Curves: {folder / 'run' / 'accuracy.png'}   Confusion matrix: {plot}")
    show(f"Done in {time.perf_counter() - started:.0f} s.")
    show(NEXT)

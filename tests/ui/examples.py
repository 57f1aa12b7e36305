"""Results to look at: photos with scores that are made up, names that are hostile."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from conftest import draw

from jaxcls.data.dataset import Dataset
from jaxcls.data.source import MemorySource
from jaxcls.evaluation.metrics import evaluate
from jaxcls.predictions import Predictions
from jaxcls.ui.report import write_report

HOSTILE = (
    "</script><script>document.title='broken'</script>",
    "\N{RIGHT-TO-LEFT OVERRIDE}gnp.tac\N{ARABIC LETTER ALEF} & <b>\"'",
    "🍴" * 20 + "x" * 280,
)
"""Names of classes, and in the names of files."""


def make_photos(
    num_images: int, classes: tuple[str, ...] = ("cup", "fork", "plate"), seed: int = 0
) -> Dataset:
    """Photos of three drawings, labelled in turn."""
    drawings = [np.asarray(draw(i, (48, 36))) for i in range(3)]
    names = [f"{classes[i % len(classes)]}/{i:05d}.jpg" for i in range(num_images)]
    labels = np.arange(num_images) % len(classes)
    items = [drawings[i % 3] for i in range(num_images)]
    return Dataset("table ware", classes, labels, np.asarray(names), MemorySource(items))


def make_predictions(photos: Dataset, *, kind: str = "logit", seed: int = 0) -> Predictions:
    """Scores that are right for most photos."""
    N, K = len(photos), len(photos.classes)
    scores = np.random.default_rng(seed).normal(size=(N, K)).astype(np.float32)
    scores[np.arange(N), photos.labels] += 2
    if kind == "probability":
        scores = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    return Predictions(scores, kind, photos.classes, tuple(photos.ids), photos.labels, np.zeros(N, np.bool_))


def unreadable(predictions: Predictions, index: int, message: str) -> Predictions:
    """The same, but for one photo that could not be read."""
    scores = predictions.scores.copy()
    scores[index] = np.nan
    return replace(predictions, scores=scores, errors={index: message})


def write_example(path: Path, predictions: Predictions, photos: Dataset, **options) -> str:
    """A report of a classifier whose name wants quotes."""
    return write_report(path, predictions, evaluate(predictions), photos, model="runs/my model", **options)

"""Compiled scoring: a classifier or backbone and images become predictions or features."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcls.classifier import PARITY_TOLERANCE, Classifier, apply_head, load_parity, make_forward
from jaxcls.data.dataset import UNLABELLED, Dataset, Item, from_items
from jaxcls.errors import ClassifierError, ImageError, UsageError
from jaxcls.models.precision import Precision, compute_dtype
from jaxcls.models.pretrained import Backbone
from jaxcls.models.resnet import make_apply
from jaxcls.parallel import batch_sharding, make_mesh, replicated
from jaxcls.pipeline import evaluation_batches, on_devices, steps_per_epoch
from jaxcls.predictions import Predictions
from jaxcls.progress import show_progress

BATCH_SIZES = (1, 8, 64)
Items = Dataset | Sequence[str | Path | Item]


@dataclass(frozen=True, eq=False)
class CompiledProgram:
    """One function of (weights, images), compiled ahead of time for a fixed set of batch sizes."""

    executables: Mapping[int, tuple[Any, Any]]
    image_size: int

    def __call__(self, images: Any) -> Any:
        """Run on uint8 [B, size, size, 3], without waiting for the result.

        Raises:
            UsageError: another dtype or shape, or a batch size that was not compiled.
        """
        expected = (self.image_size, self.image_size, 3)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != expected:
            raise UsageError(
                f"images must be uint8 [B, {', '.join(map(str, expected))}], not {_form(images)}"
            )
        if len(images) not in self.executables:
            sizes = ", ".join(map(str, self.executables))
            raise UsageError(f"batch size {len(images)} was not compiled; compiled are {sizes}")
        executable, weights = self.executables[len(images)]
        return executable(weights, images)


def compile_program(
    function: Callable[[Any, jax.Array], Any], weights: Any, image_size: int, batch_sizes: Sequence[int]
) -> CompiledProgram:
    """Compile `function(weights, images uint8 [B, size, size, 3])` for every batch size.

    A batch is sharded over as many devices as divide it.
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise UsageError(f"batch sizes {tuple(batch_sizes)}: give at least one, each at least 1")
    executables = {}
    placed: dict[Any, Any] = {}
    for size in sorted(set(batch_sizes)):
        mesh = make_mesh(size)
        if mesh not in placed:
            placed[mesh] = jax.device_put(weights, replicated(mesh))
        shape = jax.ShapeDtypeStruct(
            (size, image_size, image_size, 3), np.uint8, sharding=batch_sharding(mesh)
        )
        program = jax.jit(function, out_shardings=batch_sharding(mesh))
        executables[size] = (program.lower(placed[mesh], shape).compile(), placed[mesh])
    return CompiledProgram(executables, image_size)


def make_scorer(
    classifier: Classifier, *, batch_sizes: Sequence[int] = BATCH_SIZES, precision: Precision = "auto"
) -> Callable[[np.ndarray], np.ndarray]:
    """Compile a classifier; the result maps uint8 [B, size, size, 3] to scores float32 [B, K].

    Args:
        classifier: what to compile.
        batch_sizes: the values of B. Another one is an error, never a compilation.
        precision: of the convolutions: "float32", "bfloat16", or "auto".

    Raises:
        UsageError: no batch size or one below 1; from the result: images of another dtype or shape, or a
            batch size that was not compiled.
    """
    forward = make_forward(classifier, compute_dtype(precision))

    def scores_of(weights: Any, images: jax.Array) -> jax.Array:
        return forward(weights, images)[0]

    program = compile_program(scores_of, classifier.weights, classifier.preprocess.size, batch_sizes)
    return lambda images: np.asarray(program(images))


def predict(
    classifier: Classifier,
    images: Items,
    *,
    batch_size: int | None = None,
    num_workers: int = 0,
    precision: Precision = "auto",
    progress: bool = False,
) -> Predictions:
    """Score images of any size.

    Args:
        classifier: what scores them.
        images: a dataset, or a list of paths, encoded bytes or uint8 [H, W, 3] arrays. A dataset's
            labels are matched to the classifier's classes by name.
        batch_size: default: the smallest of 1, 8 and 64 that holds them all, else 64.
        num_workers: processes that decode; 0: threads.
        precision: of the convolutions: "float32", "bfloat16", or "auto".
        progress: show a progress bar.

    Returns:
        Predictions, in order. An image that cannot be read has its message in `errors` and NaN scores.

    Raises:
        UsageError: no images, or labels of classes that the classifier does not have.
    """
    dataset = _as_dataset(images).with_classes(classifier.classes)
    forward = make_forward(classifier, compute_dtype(precision))
    scores, errors = _run(
        lambda weights, batch: forward(weights, batch)[0],
        classifier.weights,
        len(classifier.classes),
        dataset,
        classifier.preprocess,
        batch_size=batch_size,
        num_workers=num_workers,
        progress="scoring" if progress else None,
    )
    thresholds = classifier.head.thresholds
    return Predictions(
        scores=scores,
        kind=classifier.head.kind,
        classes=classifier.classes,
        ids=tuple(dataset.ids),
        labels=None if (dataset.labels == UNLABELLED).all() else dataset.labels,
        abstained=np.zeros(len(scores), bool) if thresholds is None else _below(scores, thresholds),
        errors=errors,
    )


def extract_features(
    backbone: Backbone | Classifier,
    images: Items,
    *,
    batch_size: int | None = None,
    num_workers: int = 0,
    precision: Precision = "auto",
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pooled features of images: `(values float32 [N, D], labels int32 [N], ids string [N])`.

    Args:
        backbone: the network; of a classifier, its (fine-tuned) backbone.
        images: as for `predict`; labels are -1 where unknown.
        batch_size, num_workers, precision, progress: as for `predict`.

    Raises:
        ImageError: an image that cannot be read; `jaxcls.scan` finds them all.
    """
    if isinstance(backbone, Classifier):
        backbone = backbone.backbone
    dataset = _as_dataset(images)
    apply = make_apply(backbone.architecture, dtype=compute_dtype(precision))
    preprocess = backbone.preprocess
    values, errors = _run(
        lambda variables, batch: apply(variables, preprocess.normalize(batch), train=False)[0],
        backbone.variables,
        backbone.num_features,
        dataset,
        preprocess,
        batch_size=batch_size,
        num_workers=num_workers,
        progress="features" if progress else None,
    )
    if errors:
        raise ImageError("", next(iter(errors.values())))
    return values, dataset.labels, dataset.ids


def score_features(classifier: Classifier, values: np.ndarray) -> np.ndarray:
    """The head alone: features float32 [N, D] -> scores float32 [N, K]."""
    head = jax.device_put(classifier.weights["head"])
    return np.asarray(
        jax.jit(apply_head, static_argnames="normalize")(head, values, normalize=classifier.head.normalize)
    )


def check_parity(classifier: Classifier, path: str | Path, precision: Precision = "auto") -> float:
    """Score the parity vectors saved at `path` and return the largest relative difference.

    Raises:
        ClassifierError: it exceeds the tolerance for this precision.
    """
    images, expected = load_parity(path)
    scores = make_scorer(classifier, batch_sizes=(len(images),), precision=precision)(images)
    difference = float(np.abs(scores - expected).max() / np.abs(expected).max())
    tolerance = PARITY_TOLERANCE[np.dtype(compute_dtype(precision)).name]
    if not difference <= tolerance:
        raise ClassifierError(
            f"{path}: scores differ from the saved ones by {difference:.1e}, allowed {tolerance}"
        )
    return difference


def _run(
    function: Callable[[Any, jax.Array], jax.Array],
    weights: Any,
    width: int,
    dataset: Dataset,
    preprocess: Any,
    *,
    batch_size: int | None,
    num_workers: int,
    progress: str | None,
) -> tuple[np.ndarray, dict[int, str]]:
    """float32 [N, width] rows of `function` for a dataset, and the messages of unreadable images."""
    if batch_size is None:
        batch_size = next((size for size in BATCH_SIZES if size >= len(dataset)), BATCH_SIZES[-1])
    program = compile_program(function, weights, preprocess.size, (batch_size,))
    rows = np.full((len(dataset), width), np.nan, np.float32)
    errors: dict[int, str] = {}
    batches = evaluation_batches(dataset, preprocess, batch_size=batch_size, num_workers=num_workers)
    with closing(on_devices(batches, batch_sharding(make_mesh(batch_size)))) as stream:  # type: ignore[type-var]
        total = steps_per_epoch(len(dataset), batch_size)
        for batch in show_progress(stream, progress, total) if progress else stream:
            mask = np.asarray(batch.mask)
            rows[batch.indices[mask]] = np.asarray(program(batch.images))[mask]
            errors |= {int(i): e for i, e in zip(batch.indices, batch.errors, strict=True) if e}
    return rows, errors


def _as_dataset(images: Items) -> Dataset:
    dataset = images if isinstance(images, Dataset) else from_items(images)
    if not len(dataset):
        raise UsageError("no images to score")
    return dataset


def _below(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    best = np.nan_to_num(scores, nan=-np.inf).argmax(axis=1)
    return scores[np.arange(len(scores)), best] < thresholds[best]


def _form(images: Any) -> str:
    return f"{images.dtype} {list(images.shape)}"

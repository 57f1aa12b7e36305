"""Compiled scoring: a classifier or backbone and images become predictions or features."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxcls.classifier import Classifier, Forward, as_backbone, compare_with_parity
from jaxcls.data.dataset import UNLABELLED, Dataset, from_items
from jaxcls.data.source import Item
from jaxcls.errors import ImageError, UsageError
from jaxcls.evaluation.thresholds import are_below
from jaxcls.models.convolution import compiler_options
from jaxcls.models.fold import fitting_at_once, fold_batch_norm, is_bfloat16
from jaxcls.models.precision import Precision, scoring_dtype
from jaxcls.models.pretrained import Backbone
from jaxcls.parallel import batch_sharding, make_mesh, replicated
from jaxcls.predictions import Predictions
from jaxcls.preprocess import Preprocess
from jaxcls.progress import show_progress

if TYPE_CHECKING:
    from jaxcls.pipeline import Batch

BATCH_SIZES = (1, 8, 64)
Items = Dataset | Sequence[str | Path | Item]


@dataclass(frozen=True, eq=False)
class CompiledProgram:
    """A `Forward` and its weights on the devices, compiled ahead of time for a fixed set of batch sizes."""

    executables: Mapping[int, tuple[Any, Any]]
    preprocess: Preprocess

    def __call__(self, images: Any) -> Any:
        """Run on uint8 [B, size, size, 3], without waiting for the result.

        Raises:
            UsageError: another dtype or shape, or a batch size that was not compiled.
        """
        self.preprocess.check_images(images)
        if len(images) not in self.executables:
            sizes = ", ".join(map(str, self.executables))
            raise UsageError(f"batch size {len(images)} was not compiled; compiled are {sizes}")
        executable, weights = self.executables[len(images)]
        return executable(weights, images)


def compile_program(forward: Forward, weights: Any, batch_sizes: Sequence[int]) -> CompiledProgram:
    """Compile for every batch size; a batch is sharded over as many devices as divide it."""
    if not batch_sizes or min(batch_sizes) < 1:
        raise UsageError(f"batch sizes {tuple(batch_sizes)}: give at least one, each at least 1")
    leaves, structure = jax.tree.flatten(weights)
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    placed: dict[Mesh, Any] = {}
    executables = {}
    for size in sorted(set(batch_sizes)):
        mesh = make_mesh(size)
        if mesh not in placed:
            placed[mesh] = jax.device_put(weights, replicated(mesh))
        executables[size] = _compile(forward, structure, shapes, size, mesh), placed[mesh]
    return CompiledProgram(executables, forward.preprocess)


@lru_cache(maxsize=64)
def _compile(
    forward: Forward,
    structure: jax.tree_util.PyTreeDef,
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    batch_size: int,
    mesh: Mesh,
) -> Any:
    """The executable for one batch size; the same again for all weights of a form."""
    size, platform = forward.preprocess.size, mesh.devices.flat[0].platform
    if platform == "cpu" and mesh.size == 1:
        forward = replace(forward, num_at_once=fitting_at_once(size))
    images = jax.ShapeDtypeStruct((batch_size, size, size, 3), np.uint8)
    program = jax.jit(
        forward,
        in_shardings=(replicated(mesh), batch_sharding(mesh)),
        out_shardings=batch_sharding(mesh),
        compiler_options=compiler_options(platform, bfloat16_kernels=is_bfloat16(shapes)),
    )
    return program.lower(jax.tree.unflatten(structure, shapes), images).compile()


def compile_network(
    network: Classifier | Backbone, *, batch_sizes: Sequence[int], precision: Precision = "auto"
) -> CompiledProgram:
    """Compile a classifier, to scores float32 [B, K], or a backbone, to features float32 [B, D]."""
    dtype = scoring_dtype(precision, network.preprocess.size)
    if isinstance(network, Classifier):
        return compile_program(network.forward, network.folded_weights(dtype), batch_sizes)
    forward = Forward(network.architecture, network.preprocess)
    weights = {"backbone": fold_batch_norm(network.variables, jnp.dtype(dtype))}
    return compile_program(forward, weights, batch_sizes)


def make_scorer(
    classifier: Classifier, *, batch_sizes: Sequence[int] = BATCH_SIZES, precision: Precision = "auto"
) -> Callable[[np.ndarray], np.ndarray]:
    """Compile a classifier; the result maps uint8 [B, size, size, 3] to scores float32 [B, K].

    Args:
        classifier: what to compile.
        batch_sizes: the values of B. Another one is an error, never a compilation.
        precision: of the convolutions: "float32", "bfloat16", or "auto" (bfloat16 where that is faster).

    Raises:
        UsageError: no batch size or one below 1; from the result: images of another dtype or shape, or a
            batch size that was not compiled.
    """
    program = compile_network(classifier, batch_sizes=batch_sizes, precision=precision)
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
        precision: of the convolutions: "float32", "bfloat16", or "auto" (bfloat16 where that is faster).
        progress: show a progress bar.

    Returns:
        Predictions, in order. An image that cannot be read has its message in `errors` and NaN scores.

    Raises:
        UsageError: no images, or labels of classes that the classifier does not have.
    """
    dataset = _as_dataset(images).with_classes(classifier.classes)
    scores, errors = _run(
        classifier,
        len(classifier.classes),
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        precision=precision,
        progress="scoring" if progress else None,
    )
    thresholds = classifier.head.thresholds
    return Predictions(
        scores=scores,
        kind=classifier.head.kind,
        classes=classifier.classes,
        ids=tuple(dataset.ids),
        labels=None if (dataset.labels == UNLABELLED).all() else dataset.labels,
        abstained=np.zeros(len(scores), bool) if thresholds is None else are_below(scores, thresholds),
        errors=errors,
        is_copy=None if dataset.origins is None else dataset.is_copy,
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
    backbone = as_backbone(backbone)
    dataset = _as_dataset(images)
    values, errors = _run(
        backbone,
        backbone.num_features,
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        precision=precision,
        progress="features" if progress else None,
    )
    if errors:
        raise ImageError("", next(iter(errors.values())))
    return values, dataset.labels, dataset.ids


def check_parity(classifier: Classifier, path: str | Path, precision: Precision = "auto") -> float:
    """Score the parity vectors saved at `path` and return the largest relative difference.

    Raises:
        ClassifierError: it exceeds the tolerance for this precision.
    """

    def score(images: np.ndarray) -> np.ndarray:
        return make_scorer(classifier, batch_sizes=(len(images),), precision=precision)(images)

    return compare_with_parity(score, path, scoring_dtype(precision, classifier.preprocess.size))


def _run(
    network: Classifier | Backbone,
    width: int,
    dataset: Dataset,
    *,
    batch_size: int | None,
    num_workers: int,
    precision: Precision,
    progress: str | None,
) -> tuple[np.ndarray, dict[int, str]]:
    """float32 [N, width] scores or features of a dataset, and the messages of unreadable images."""
    # Here, because a scorer reads no files and Grain takes as long to load as JAX.
    from jaxcls.pipeline import evaluation_batches, on_devices, steps_per_epoch

    if batch_size is None:
        batch_size = next((size for size in BATCH_SIZES if size >= len(dataset)), BATCH_SIZES[-1])
    program = compile_network(network, batch_sizes=(batch_size,), precision=precision)
    rows = np.full((len(dataset), width), np.nan, np.float32)
    errors: dict[int, str] = {}

    def collect(batch: "Batch", values: jax.Array) -> None:
        mask = np.asarray(batch.mask)
        rows[batch.indices[mask]] = np.asarray(values)[mask]
        errors.update({int(i): e for i, e in zip(batch.indices, batch.errors, strict=True) if e})

    batches = evaluation_batches(dataset, network.preprocess, batch_size=batch_size, num_workers=num_workers)
    with closing(on_devices(batches, batch_sharding(make_mesh(batch_size)))) as stream:
        total = steps_per_epoch(len(dataset), batch_size)
        in_flight = None
        for batch in show_progress(stream, progress, total) if progress else stream:
            started = batch, program(batch.images)
            if in_flight is not None:
                collect(*in_flight)
            in_flight = started
        if in_flight is not None:
            collect(*in_flight)
    return rows, errors


def _as_dataset(images: Items) -> Dataset:
    dataset = images if isinstance(images, Dataset) else from_items(images)
    if not len(dataset):
        raise UsageError("no images to score")
    return dataset

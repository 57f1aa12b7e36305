"""`finetune`: a dataset and a backbone become a classifier. The only loop over training steps."""

import json
import signal
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxcls.classifier import Classifier, Head, as_backbone
from jaxcls.data.dataset import UNLABELLED, Dataset, class_weights, scan
from jaxcls.errors import DatasetError, TrainingError, UsageError
from jaxcls.models.precision import compute_dtype
from jaxcls.models.pretrained import Backbone
from jaxcls.models.resnet import make_apply
from jaxcls.parallel import batch_sharding, make_mesh, replicated
from jaxcls.pipeline import Batch, evaluation_batches, on_devices, steps_per_epoch, training_batches
from jaxcls.train.config import FinetuneConfig
from jaxcls.train.optimizer import make_optimizer, make_schedule
from jaxcls.train.reporters import (
    ConsoleReporter,
    MetricsReporter,
    PlotReporter,
    Reporter,
    Reporters,
    TensorBoardReporter,
)
from jaxcls.train.state import TrainState, init_state
from jaxcls.train.step import EvalStep, Sums, TrainStep, make_eval_step, make_train_step

CLASSIFIER_FOLDER = "classifier"


@dataclass(frozen=True)
class FinetuneResult:
    """What training leaves.

    Attributes:
        classifier: the trained one.
        history: one row per epoch: epoch, step, learning_rate, train_loss, train_accuracy,
            images_per_second and, with an evaluation set, eval_loss, eval_accuracy (micro),
            eval_num_correct, eval_num_seen.
        run_dir: where the run was written, or None.
    """

    classifier: Classifier
    history: list[dict[str, Any]] = field(repr=False)
    run_dir: Path | None


def finetune(
    dataset: Dataset,
    backbone: Backbone | Classifier,
    config: FinetuneConfig | None = None,
    *,
    eval_dataset: Dataset | None = None,
    run_dir: str | Path | None = None,
    reporters: Sequence[Reporter] | None = None,
) -> FinetuneResult:
    """Train a backbone and a new head on a dataset, over all devices.

    Args:
        dataset: the training photos; each is decoded once before training, to find bad ones.
        backbone: where to start, unchanged; of a classifier, its backbone.
        config: default: AMLPCV's recipe.
        eval_dataset: evaluated after every epoch; never trained on. The last epoch is kept, not the best:
            choosing by this set would leave none to measure with.
        run_dir: an empty or new folder for `config.json`, `test_ids.txt` (of `eval_dataset`),
            `metrics.jsonl`, TensorBoard events, `accuracy.png` and `classifier/`. Ctrl-C leaves all of them
            as of the last whole epoch; without a folder it leaves nothing.
        reporters: listeners besides those of `run_dir`. Default: the console.

    Raises:
        DatasetError: undecodable photos, a class without photos, or unlabelled photos.
        UsageError: a configuration that cannot work, or a `run_dir` that holds something.
        TrainingError: the loss is no longer finite; the message names step and photos.
    """
    run = _Run(
        dataset, as_backbone(backbone), config or FinetuneConfig(), eval_dataset, _empty_folder(run_dir)
    )
    return run.train(reporters)


class _Run:
    """One call of `finetune`: its programs, its state, and the last whole epoch."""

    def __init__(
        self,
        dataset: Dataset,
        backbone: Backbone,
        config: FinetuneConfig,
        eval_dataset: Dataset | None,
        run_dir: Path | None,
    ) -> None:
        self.config, self.backbone, self.run_dir = config, backbone, run_dir
        # What can be refused before the scan is: it reads every photo.
        dataset.require_every_class()
        class_weights(config.class_weight, dataset.classes, dataset.class_counts())
        self.dataset = scan(dataset, max_bad_fraction=config.max_bad_fraction)
        self.dataset.require_every_class()
        self.eval_dataset = None
        if eval_dataset is not None:
            matched = eval_dataset.with_classes(dataset.classes)
            self.eval_dataset = scan(matched, max_bad_fraction=config.max_bad_fraction)
            if not len(self.eval_dataset) or (self.eval_dataset.labels == UNLABELLED).any():
                raise DatasetError(
                    f"evaluation dataset {eval_dataset.name} needs images, all of them labelled"
                )
        self.steps_per_epoch = steps_per_epoch(len(self.dataset), config.batch_size)
        self.mesh = make_mesh(config.batch_size)
        self.schedule = make_schedule(config, self.steps_per_epoch)
        self.state, self.train_step, self.eval_step = self._programs(self.mesh)
        self.history: list[dict[str, Any]] = []
        self.kept: tuple[Any, Any] | None = None

    def train(self, reporters: Sequence[Reporter] | None) -> FinetuneResult:
        if reporters is None:
            reporters = [
                ConsoleReporter(self.config.num_epochs, self.steps_per_epoch, self.config.batch_size)
            ]
        with ExitStack() as stack:
            reporter = Reporters([*_run_reporters(self.run_dir), *reporters])
            stack.callback(reporter.close)
            # Also on Ctrl-C and on errors: what the last whole epoch made is kept.
            stack.push(partial(self._save, reporter))
            self._write_config()
            reporter.message(self._describe())
            with closing(self._stream()) as stream:
                for epoch in range(1, self.config.num_epochs + 1):
                    self._train_epoch(epoch, stream, reporter)
        return FinetuneResult(self._classifier(), self.history, self.run_dir)

    def _programs(self, mesh: Mesh) -> tuple[TrainState, TrainStep, EvalStep]:
        config = self.config
        optimizer = make_optimizer(config, self.schedule)
        state = init_state(
            self.backbone,
            len(self.dataset.classes),
            optimizer,
            seed=config.seed,
            use_ema=config.ema_decay is not None,
        )
        apply = make_apply(
            self.backbone.architecture,
            dtype=compute_dtype(config.precision),
            batch_norm=config.batch_norm,
            num_frozen_stages=config.num_frozen_stages,
        )
        preprocess = self.backbone.preprocess
        train_step = make_train_step(
            apply,
            preprocess,
            optimizer,
            mesh,
            dropout=config.dropout,
            label_smoothing=config.label_smoothing,
            weights=class_weights(config.class_weight, self.dataset.classes, self.dataset.class_counts()),
            ema_decay=config.ema_decay,
        )
        return jax.device_put(state, replicated(mesh)), train_step, make_eval_step(apply, preprocess, mesh)

    def _stream(self) -> Generator[Batch, None, None]:
        batches = training_batches(
            self.dataset,
            self.backbone.preprocess,
            self.config.augmentation,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            num_workers=self.config.num_workers,
        )
        return on_devices(batches, batch_sharding(self.mesh))

    def _train_epoch(self, epoch: int, stream: Iterator[Batch], reporter: Reporter) -> None:
        started = time.perf_counter()
        total = _Totals()
        pending: list[tuple[np.ndarray, Sums]] = []
        for step in range(1, self.steps_per_epoch + 1):
            batch = next(stream)
            _require_readable(batch)
            self.state, sums = self.train_step(self.state, batch.images, batch.labels)
            pending.append((batch.indices, sums))
            if len(pending) == self.config.log_every or step == self.steps_per_epoch:
                recent = self._fetch(pending, (epoch - 1) * self.steps_per_epoch + step)
                total += recent
                reporter.steps(
                    len(pending),
                    {"loss": recent.mean_loss, "error": 1 - recent.accuracy, "rate": self._rate(epoch, step)},
                )
                pending.clear()
        seconds = time.perf_counter() - started
        row = {
            "epoch": epoch,
            "step": epoch * self.steps_per_epoch,
            "learning_rate": self._rate(epoch, self.steps_per_epoch),
            "train_loss": total.mean_loss,
            "train_accuracy": total.accuracy,
            "images_per_second": total.num_seen / seconds,
            **self._evaluate(),
        }
        self.kept = jax.device_get((self.state.best_params, self.state.batch_stats))
        self.history.append(row)
        reporter.epoch(row)

    def _rate(self, epoch: int, step: int) -> float:
        rate = self.schedule((epoch - 1) * self.steps_per_epoch + step - 1)
        # Through str: the shortest decimal that is this float32, 0.05 and not 0.05000000074505806.
        return float(str(np.float32(rate)))

    def _fetch(self, pending: list[tuple[np.ndarray, Sums]], last_step: int) -> "_Totals":
        """The sums of some steps, from the device; the first loss that is not finite ends the run."""
        fetched = jax.device_get([sums for _, sums in pending])
        for number, ((indices, _), sums) in enumerate(zip(pending, fetched, strict=True)):
            if not np.isfinite(sums.loss):
                step = last_step - len(pending) + number + 1
                ids = ", ".join(self.dataset.ids[i] for i in indices)
                raise TrainingError(
                    f"the loss is {sums.loss} at step {step}: lower the learning rates, "
                    f"or look at the batch: {ids}"
                )
        return _total(fetched)

    def _evaluate(self) -> dict[str, Any]:
        if self.eval_dataset is None:
            return {}
        fetched = []
        batches = evaluation_batches(
            self.eval_dataset,
            self.backbone.preprocess,
            batch_size=self.config.batch_size,
            num_workers=self.config.num_workers,
        )
        with closing(on_devices(batches, batch_sharding(self.mesh))) as stream:
            for batch in stream:
                _require_readable(batch)
                params, batch_stats = self.state.best_params, self.state.batch_stats
                fetched.append(self.eval_step(params, batch_stats, batch.images, batch.labels, batch.mask))
        total = _total(fetched)
        if not np.isfinite(total.loss):
            raise TrainingError(
                f"the evaluation loss is {total.loss} after step {int(self.state.step)}: "
                "lower the learning rates"
            )
        return {
            "eval_loss": total.mean_loss,
            "eval_accuracy": total.accuracy,
            "eval_num_correct": total.num_correct,
            "eval_num_seen": total.num_seen,
        }

    def _classifier(self) -> Classifier:
        assert self.kept is not None
        params, batch_stats = self.kept
        backbone = Backbone(
            architecture=self.backbone.architecture,
            variables={"params": params["backbone"], "batch_stats": batch_stats},
            preprocess=self.backbone.preprocess,
            pretrained_head=None,
            pretrained_classes=None,
            provenance=self.backbone.provenance,
        )
        provenance = {
            "method": "finetune",
            "dataset": self.dataset.name,
            "num_images": len(self.dataset),
            "config": asdict(self.config),
            "num_epochs_done": len(self.history),
        }
        return Classifier(backbone, Head(**params["head"]), self.dataset.classes, provenance)

    def _save(self, reporter: Reporter, kind: type[BaseException] | None, *_: object) -> None:
        if self.run_dir is None or self.kept is None:
            return
        path = self.run_dir / CLASSIFIER_FOLDER
        if kind is not None:
            reporter.message(
                f"Stopped: keeping epoch {len(self.history)} of {self.config.num_epochs} in {path}"
            )
        with _no_interrupts():
            self._classifier().save(path)

    def _write_config(self) -> None:
        if self.run_dir is None:
            return
        datasets = {"train": self.dataset, "eval": self.eval_dataset}
        description = {
            "config": asdict(self.config),
            "versions": {name: version(name) for name in ("jaxcls", "jax", "flax", "optax", "grain")},
            "backbone": {"architecture": self.backbone.architecture, **self.backbone.provenance},
            "preprocess": self.backbone.preprocess.to_json(),
            "datasets": {
                name: {"name": part.name, "classes": part.classes, "num_images": len(part)}
                for name, part in datasets.items()
                if part is not None
            },
        }
        text = json.dumps(description, indent=2, ensure_ascii=False)
        (self.run_dir / "config.json").write_text(text + "\n", encoding="utf-8")
        if self.eval_dataset is not None:
            ids = "".join(f"{i}\n" for i in self.eval_dataset.ids)
            (self.run_dir / "test_ids.txt").write_text(ids, encoding="utf-8")

    def _describe(self) -> str:
        config = self.config
        leaves = jax.tree.leaves(self.state.params)
        device = jax.devices()[0]
        dtype = np.dtype(compute_dtype(config.precision)).name
        num_parameters = sum(leaf.size for leaf in leaves)
        lines = [
            f"Fine-tuning {self.backbone.architecture} on {len(self.dataset)} images of "
            f"{len(self.dataset.classes)} classes: {num_parameters} parameters in {len(leaves)} tensors",
            f"{config.num_epochs} epochs of {self.steps_per_epoch} steps with {config.batch_size} images of "
            f"{self.backbone.preprocess.size} px in {dtype} on {self.mesh.size} x {device.device_kind}",
        ]
        if self.backbone.pretrained_head is not None:
            num_classes = len(self.backbone.pretrained_head[1])
            lines.append(f"The pretrained head of {num_classes} classes is replaced by a new one")
        if len(self.dataset) < config.batch_size:
            lines.append(
                f"The training set is smaller than a batch of {config.batch_size}: images repeat within it"
            )
        lines += self.dataset.notes
        return "\n".join(lines)


@dataclass(frozen=True)
class _Totals:
    loss: float = 0.0
    num_correct: int = 0
    num_seen: int = 0

    def __add__(self, other: "_Totals") -> "_Totals":
        return _Totals(
            self.loss + other.loss, self.num_correct + other.num_correct, self.num_seen + other.num_seen
        )

    @property
    def mean_loss(self) -> float:
        return self.loss / self.num_seen

    @property
    def accuracy(self) -> float:
        return self.num_correct / self.num_seen


def _require_readable(batch: Batch) -> None:
    if message := next(filter(None, batch.errors), None):
        raise DatasetError(f"a photo became unreadable during training: {message}")


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Hold off Ctrl-C; only the main thread gets it, and may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _total(sums: Sequence[Sums]) -> _Totals:
    return _Totals(*(sum(values).item() for values in zip(*jax.device_get(sums), strict=True)))


def _run_reporters(run_dir: Path | None) -> list[Reporter]:
    if run_dir is None:
        return []
    return [MetricsReporter(run_dir), TensorBoardReporter(run_dir), PlotReporter(run_dir)]


def _empty_folder(path: str | Path | None) -> Path | None:
    if path is None:
        return None
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError(f"{folder} is not empty: give each run a folder of its own")
    except OSError as error:
        raise UsageError(f"{folder} cannot hold a run: {error.strerror}") from error
    return folder

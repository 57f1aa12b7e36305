"""`finetune`: a dataset and a backbone become a classifier. The only loop over training steps."""

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcls.classifier import Classifier, Head, as_backbone
from jaxcls.data.dataset import UNLABELLED, Dataset, scan
from jaxcls.data.duplicates import describe_leakage, find_leakage
from jaxcls.errors import ClassifierError, DatasetError, TrainingError, UsageError
from jaxcls.models.precision import compute_dtype
from jaxcls.models.pretrained import Backbone
from jaxcls.models.resnet import make_apply
from jaxcls.parallel import (
    batch_sharding,
    from_first_process,
    gather,
    is_first_process,
    make_mesh,
    memory_limit,
    replicated,
    require_same,
    steps_sharding,
    together,
)
from jaxcls.pipeline import (
    Batch,
    Share,
    on_devices,
    steps_per_epoch,
    training_batches,
    training_order,
)
from jaxcls.resident import EvaluationViews, choose_pipeline, memory_budget
from jaxcls.train.checkpoint import Checkpoints, Snapshot, checksum, fingerprint
from jaxcls.train.config import FinetuneConfig
from jaxcls.train.folder import (
    CHECKPOINTS_FOLDER,
    CLASSIFIER_FOLDER,
    has_classifier,
    open_folder,
    open_reporters,
    write_config,
)
from jaxcls.train.memory import describe_parts, describe_shortage, is_exhausted, needed_bytes
from jaxcls.train.optimizer import make_optimizer, make_schedule
from jaxcls.train.reporters import ConsoleReporter, Reporter, Reporters
from jaxcls.train.signals import TERMINATED, no_interrupts, watch_termination
from jaxcls.train.state import Totals, TrainState, init_state, to_devices, to_host
from jaxcls.train.step import (
    STEPS_PER_DISPATCH,
    Sums,
    block_sizes,
    make_eval_step,
    make_train_loop,
    make_train_step,
)

WITHOUT_EFFECT = {"num_workers", "log_every", "max_bad_fraction", "num_checkpoints", "checkpoint_seconds"}


@dataclass(frozen=True)
class FinetuneResult:
    """What training leaves.

    Attributes:
        classifier: the trained one.
        history: one row per epoch: epoch, step, learning_rate, train_loss, train_accuracy,
            images_per_second and, with an evaluation set, eval_loss, eval_accuracy (micro),
            eval_num_correct, eval_num_seen.
        run_dir: where this process wrote the run, or None.
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
    resume: bool = False,
    reporters: Sequence[Reporter] | None = None,
) -> FinetuneResult:
    """Train a backbone and a new head on a dataset, over all devices, and all `parallel.processes`.

    Each of several processes makes the same call and needs all the photos. The first writes `run_dir` and
    calls the reporters; all return the classifier.

    With a `run_dir`, a run that was stopped or killed at any point can be resumed, and ends with bitwise
    the parameters, history and `metrics.jsonl` of an undisturbed one (the speeds in the history aside), on
    as many CPU devices as before; on other devices, where their programs are deterministic (on a GPU with
    `XLA_FLAGS=--xla_gpu_deterministic_ops=true`). A checkpoint is written after every epoch while training
    goes on (an epoch that ends before the last one is written goes without, unless it is the best), and
    within long epochs, see `FinetuneConfig.checkpoint_seconds`. SIGTERM saves the step under way and the last
    whole epoch's classifier, and ends the process with `SystemExit(143)`.

    Args:
        dataset: the training photos; each is decoded once before training, to find bad ones.
        backbone: where to start, unchanged; of a classifier, its backbone.
        config: default: AMLPCV's recipe.
        eval_dataset: evaluated after every epoch; never trained on, and without augmented copies. The last
            epoch is kept, not the best: choosing by this set would leave none to measure with. Unless both
            datasets have groups, the first message warns of its photos that show the same as a training
            photo.
        run_dir: an empty or new folder for `config.json`, `train_ids.txt` and `test_ids.txt` (if there
            is an `eval_dataset`), `metrics.jsonl`, TensorBoard events, `accuracy.png`, `checkpoints/` and
            `classifier/`. Ctrl-C leaves all of them as of the last whole epoch; without a folder it leaves
            nothing.
        resume: go on with the run in `run_dir`, from its newest undamaged checkpoint. Without one, start
            from the beginning; a finished run returns its result at once.
        reporters: listeners besides those of `run_dir`. Default: the console.

    Raises:
        DatasetError: undecodable photos, a class without photos, or unlabelled photos.
        UsageError: a configuration that cannot work, a `run_dir` that holds something, or, to resume, a
            run with another configuration or other photos; the message names what differs.
        TrainingError: the loss is no longer finite; the message names step and photos. A checkpoint cannot be
            written, or every one is damaged. A step in the smallest parts, or the evaluation, does not fit
            in memory.
    """
    if resume and run_dir is None:
        raise UsageError("resume=True needs the run_dir of the run to go on with")
    config = config or FinetuneConfig()
    folder = None if run_dir is None else Path(run_dir)
    require_same("settings", [_decisive(config), config.log_every, resume, folder is None])
    if folder is not None:
        together(lambda: open_folder(folder, resume=resume) if is_first_process() else None)
    run = _Run(dataset, as_backbone(backbone), config, eval_dataset, folder)
    if resume:
        run.restore()
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
        self.config, self.backbone = config, backbone
        # What can be refused before the scan is: it reads every photo.
        dataset.require_every_class()
        dataset.class_weights(config.class_weight)
        if eval_dataset is not None:
            eval_dataset.require_originals()
        self.mesh = make_mesh(config.batch_size, across_processes=True)
        self.share = Share(jax.process_index(), jax.process_count())
        self.limit, self.budget = (
            min(gather(measure(self.mesh))) for measure in (memory_limit, memory_budget)
        )
        # Never several steps in a loop on CPU: XLA's gradient of a convolution is many times slower there.
        is_looped = jax.default_backend() != "cpu" and config.pipeline != "streaming"
        self.block_capacity = min(config.log_every, STEPS_PER_DISPATCH) if is_looped else 1
        self.dataset = dataset
        self.num_parts = 1
        self._prepare()
        together(lambda: self._read_photos(dataset, eval_dataset))
        self.notes: list[str] = []
        self.kept: Snapshot | None = None
        self.terminated = threading.Event()
        self.is_resumable = run_dir is not None
        self.run_dir = run_dir if is_first_process() else None
        self.checkpoints = None
        identity = self._identity()
        require_same("photos or weights", identity)
        if self.run_dir is not None:
            folder = self.run_dir / CHECKPOINTS_FOLDER
            self.checkpoints = Checkpoints(
                folder, identity, self._environment(), num_kept=config.num_checkpoints
            )

    def _read_photos(self, dataset: Dataset, eval_dataset: Dataset | None) -> None:
        """Find undecodable photos and leaked ones, and decode those that are to be resident."""
        config = self.config
        self.dataset, self.photos, self.pipeline_note = choose_pipeline(
            config.pipeline,
            dataset,
            self.backbone.preprocess,
            config.augmentation,
            self.mesh,
            self.budget,
            max_bad_fraction=config.max_bad_fraction,
        )
        self.dataset.require_every_class()
        is_looped_in_vain = self.photos is None and self.block_capacity > 1
        if is_looped_in_vain:
            self.block_capacity = 1
        if is_looped_in_vain or self.dataset is not dataset:
            self._prepare()
        self.eval_dataset = self.eval_views = None
        self.leakage: dict[str, str] = {}
        if eval_dataset is not None:
            matched = eval_dataset.with_classes(dataset.classes)
            self.eval_dataset = scan(matched, max_bad_fraction=config.max_bad_fraction)
            if not len(self.eval_dataset) or (self.eval_dataset.labels == UNLABELLED).any():
                raise DatasetError(
                    f"evaluation dataset {eval_dataset.name} needs images, all of them labelled"
                )
            has_groups = self.dataset.groups is not None and self.eval_dataset.groups is not None
            # With augmented copies there are groups, whether or not duplicates were looked for.
            if is_first_process() and not (has_groups and self.dataset.origins is None):
                self.leakage = find_leakage(self.dataset.originals(), self.eval_dataset)
            self.eval_views = EvaluationViews(
                self.eval_dataset,
                self.backbone.preprocess,
                self.mesh,
                0 if config.pipeline == "streaming" else self.budget,
                batch_size=config.batch_size,
                num_workers=config.num_workers,
                share=self.share,
            )

    def restore(self) -> None:
        """Go back to the newest good checkpoint, if there is one."""
        snapshot = self._from_first_process(together(self._restored))
        if snapshot is None:
            self.notes.append("Nothing to resume: starting from the beginning")
            return
        if snapshot.num_parts > self.num_parts:  # it was found not to fit otherwise
            self.num_parts = snapshot.num_parts
            self._make_programs()
        self._go_to(snapshot)
        self.first_step = self.step
        if self.step == len(self.history) * self.steps_per_epoch:
            self.kept = snapshot
        total = self.config.num_epochs * self.steps_per_epoch
        self.notes.append(f"Resuming after step {self.step} of {total}")

    def _go_to(self, snapshot: Snapshot) -> None:
        self.saved = snapshot
        self.state: TrainState = to_devices(snapshot.state, replicated(self.mesh))
        self.step = snapshot.step
        self.total, self.history = snapshot.totals, list(snapshot.history)

    def _restored(self) -> Snapshot | None:
        if self.checkpoints is None:
            return None
        snapshot, self.notes = self.checkpoints.restore(self.state)
        return snapshot

    def _from_first_process(self, snapshot: Snapshot | None) -> Snapshot | None:
        progress = gather(
            None if snapshot is None else [asdict(snapshot.totals), snapshot.history, snapshot.num_parts]
        )[0]
        if progress is None:
            return None
        totals, history, num_parts = progress
        state = from_first_process(to_host(self.state) if snapshot is None else snapshot.state)
        return Snapshot(state, Totals(**totals), tuple(history), num_parts)

    def train(self, reporters: Sequence[Reporter] | None) -> FinetuneResult:
        if reporters is None:
            reporters = [
                ConsoleReporter(
                    self.config.num_epochs, self.steps_per_epoch, self.config.batch_size, self.step
                )
            ]
        if not is_first_process():
            reporters = []
        elif self.run_dir is not None:
            write_config(self.run_dir, self.config, self.backbone, self.dataset, self.eval_dataset)
            reporters = [*open_reporters(self.run_dir, self.history, self.step), *reporters]
        with ExitStack() as stack:
            reporter = Reporters(reporters)
            stack.callback(reporter.close)
            # Also on Ctrl-C and on errors: what the last whole epoch made is kept.
            stack.push(partial(self._keep, reporter))
            if self.is_resumable:
                self.terminated = stack.enter_context(watch_termination())
            reporter.message(self._describe())
            self._make_it_fit(reporter)
            while len(self.history) < self.config.num_epochs:
                try:
                    with closing(self._stream()) as stream:
                        for epoch in range(len(self.history) + 1, self.config.num_epochs + 1):
                            self._train_epoch(epoch, stream, reporter)
                except jax.errors.JaxRuntimeError as error:
                    if not is_exhausted(error):
                        raise
                    self._recover(error, reporter)
        return FinetuneResult(self._classifier(), self.history, self.run_dir)

    def _prepare(self) -> None:
        """Make the state and the programs; the training step compiles from now on, while photos decode."""
        self.steps_per_epoch = steps_per_epoch(len(self.dataset), self.config.batch_size)
        self.schedule = make_schedule(self.config, self.steps_per_epoch)
        self.optimizer = make_optimizer(self.config, self.schedule)
        state = init_state(
            self.backbone,
            len(self.dataset.classes),
            self.optimizer,
            seed=self.config.seed,
            use_ema=self.config.ema_decay is not None,
        )
        self._go_to(Snapshot(to_host(state), Totals(), ()))
        self.first_step = 0
        self._make_programs()

    def _make_programs(self) -> None:
        config, preprocess = self.config, self.backbone.preprocess
        apply = make_apply(
            self.backbone.architecture,
            dtype=compute_dtype(config.precision),
            batch_norm=config.batch_norm,
            num_frozen_stages=config.num_frozen_stages,
        )
        self.train_step = make_train_step(
            apply,
            preprocess,
            self.optimizer,
            self.mesh,
            dropout=config.dropout,
            label_smoothing=config.label_smoothing,
            weights=self.dataset.class_weights(config.class_weight),
            ema_decay=config.ema_decay,
            num_parts=self.num_parts,
        )
        self.train_loop = make_train_loop(self.train_step, self.mesh)
        self.eval_step = make_eval_step(apply, preprocess, self.mesh)
        pool = ThreadPoolExecutor(1)
        # Traced here: JAX's settings may hold for this thread alone, and are part of what it keeps.
        self.compiling = pool.submit(self._lowered().compile)
        pool.shutdown(wait=False)

    def _lowered(self) -> jax.stages.Lowered:
        """The program that trains, ready to be compiled; JAX finds it again when it is called."""
        size, shape = self.backbone.preprocess.size, [self.config.batch_size]
        sharding = batch_sharding(self.mesh)
        if self.block_capacity > 1:
            shape, sharding = [self.block_capacity, *shape], steps_sharding(self.mesh)
        images = jax.ShapeDtypeStruct((*shape, size, size, 3), np.uint8, sharding=sharding)
        labels = jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)
        if self.block_capacity > 1:
            return self.train_loop.lower(self.state, images, labels, 1)
        return self.train_step.lower(self.state, images, labels)

    def _make_it_fit(self, reporter: Reporter) -> None:
        """Divide the batch until a step, as XLA foresees it, takes no more memory than there is."""
        resident = 0 if self.photos is None else self.photos.pixels.nbytes
        resident += 0 if self.eval_views is None else self.eval_views.resident_bytes
        # The most that any process needs: all must do the same.
        while (needed := max(gather(needed_bytes(self.compiling.result()))) + resident) > self.limit:
            self._divide(describe_shortage(needed, self.limit), reporter)

    def _divide(self, reason: str, reporter: Reporter) -> None:
        """Go on from the last state on the host, with the batch in twice as many parts."""
        config, num_parts = self.config, 2 * self.num_parts
        if config.batch_size // self.mesh.size % num_parts:
            raise TrainingError(
                f"{reason}, and {config.batch_size} images on {self.mesh.size} devices cannot be divided "
                f"into {num_parts} parts: train smaller images, a smaller network or smaller batches"
            )
        self.num_parts = num_parts
        self._go_to(self.saved)
        self._make_programs()
        parts = describe_parts(num_parts, config.batch_size, is_normalised=config.batch_norm == "train")
        reporter.message(f"{reason}: after step {self.step}, batches are done in {parts}")

    def _recover(self, error: jax.errors.JaxRuntimeError, reporter: Reporter) -> None:
        # The failed step's state is gone with its donation.
        reason = f"A step ran out of memory ({str(error).splitlines()[0][:200]})"
        if jax.process_count() > 1:
            raise TrainingError(f"{reason}: train smaller batches") from error
        self._divide(reason, reporter)
        self._make_it_fit(reporter)

    def _stream(self) -> Generator[Batch, None, None]:
        config = self.config
        if self.photos is not None:
            if self.block_capacity == 1:
                return self.photos.batches(
                    batch_size=config.batch_size, seed=config.seed, first_step=self.step
                )
            return self.photos.blocks(
                batch_size=config.batch_size,
                seed=config.seed,
                num_steps=block_sizes(self.steps_per_epoch, config.log_every, self.step),
                first_step=self.step,
                capacity=self.block_capacity,
            )
        batches = training_batches(
            self.dataset,
            self.backbone.preprocess,
            self.config.augmentation,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            first_step=self.step,
            num_workers=self.config.num_workers,
            share=self.share,
        )
        return on_devices(batches, batch_sharding(self.mesh))

    def _train_epoch(self, epoch: int, stream: Iterator[Batch], reporter: Reporter) -> None:
        started, num_seen_before = time.perf_counter(), self.total.num_seen
        last_step = epoch * self.steps_per_epoch
        pending: list[tuple[int, Sums]] = []
        while self.step < last_step:
            pending.append(self._advance(next(stream)))
            is_logged = self.step % self.steps_per_epoch % self.config.log_every == 0
            is_ending, is_late = self._agree(is_logged)
            is_due = is_ending or (is_late and self.step < last_step)
            if is_logged or is_due or self.step == last_step:
                self._fetch(pending, reporter)
                pending.clear()
            if is_due:
                self._checkpoint(is_ending)
        seconds = time.perf_counter() - started
        row = {
            "epoch": epoch,
            "step": last_step,
            "learning_rate": self._rate(last_step),
            "train_loss": self.total.mean_loss,
            "train_accuracy": self.total.accuracy,
            "images_per_second": (self.total.num_seen - num_seen_before) / seconds,
            **self._evaluate(),
        }
        self.history.append(row)
        self.total = Totals()
        self.kept = self.saved = self._snapshot()
        reporter.epoch(row)
        if self.checkpoints is not None and self.checkpoints.has_room_for(self.kept):
            self.checkpoints.save(self.kept)

    def _advance(self, batch: Batch) -> tuple[int, Sums]:
        """Do the steps of a batch, or of a block of batches: their number, and their sums."""
        _require_readable(batch)
        if batch.indices.ndim == 1:
            num_steps = 1
            self.state, sums = self.train_step(self.state, batch.images, batch.labels)
        else:
            num_steps = len(batch.indices)
            self.state, sums = self.train_loop(self.state, batch.images, batch.labels, num_steps)
        self.step += num_steps
        return num_steps, sums

    def _snapshot(self) -> Snapshot:
        return Snapshot(to_host(self.state), self.total, tuple(self.history), self.num_parts)

    def _agree(self, is_logged: bool) -> tuple[bool, bool]:
        """Whether to end, as one of the processes was asked to, and whether a checkpoint is due."""
        if jax.process_count() > 1 and not is_logged:  # to ask them takes time
            return False, False
        is_late = (
            self.checkpoints is not None
            and self.checkpoints.seconds_since_save >= self.config.checkpoint_seconds
            and not self.checkpoints.is_writing
        )
        answers = gather([int(self.terminated.is_set()), int(is_late)])
        return any(ending for ending, _ in answers), any(late for _, late in answers)

    def _checkpoint(self, is_ending: bool) -> None:
        """Save between two steps; leave if the processes are to end."""
        self.saved = self._snapshot()
        if self.checkpoints is not None:
            self.checkpoints.save(self.saved)
        if is_ending:
            raise SystemExit(TERMINATED)

    def _rate(self, step: int) -> float:
        # Through str: the shortest decimal that is this float32, 0.05 and not 0.05000000074505806.
        return float(str(np.float32(self.schedule(step - 1))))

    def _fetch(self, pending: Sequence[tuple[int, Sums]], reporter: Reporter) -> None:
        """Add up the last steps' sums; the first loss that is not finite ends the run."""
        fetched = jax.device_get([sums for _, sums in pending])
        totals = [
            one
            for (num_steps, _), sums in zip(pending, fetched, strict=True)
            for one in _totals(sums)[:num_steps]
        ]
        for step, one in enumerate(totals, start=self.step - len(totals)):
            if not np.isfinite(one.loss):
                raise TrainingError(
                    f"the loss is {one.loss} at step {step + 1}: lower the learning rates, or look at the "
                    f"batch: {', '.join(self._ids_of(step))}"
                )
        # Step by step, so that the sum's last bits do not depend on where a run was interrupted.
        self.total = sum(totals, start=self.total)
        recent = sum(totals, start=Totals())
        rate = self._rate(self.step)
        row = {"step": self.step, "loss": recent.mean_loss, "error": 1 - recent.accuracy, "rate": rate}
        reporter.steps(len(totals), row)

    def _ids_of(self, step: int) -> list[str]:
        positions = step * self.config.batch_size + np.arange(self.config.batch_size)
        order = training_order(len(self.dataset), self.config.seed, positions)
        return [self.dataset.ids[index] for index in order]

    def _evaluate(self) -> dict[str, Any]:
        if self.eval_views is None:
            return {}
        try:
            total = self._evaluation_totals(self.eval_views)
        except jax.errors.JaxRuntimeError as error:
            if not is_exhausted(error):
                raise
            raise TrainingError(f"the evaluation ran out of memory: use smaller batches ({error})") from error
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

    def _evaluation_totals(self, views: EvaluationViews) -> Totals:
        fetched = []
        with closing(views.batches()) as stream:
            for number, batch in enumerate(stream, start=1):
                _require_readable(batch)
                params, batch_stats = self.state.best_params, self.state.batch_stats
                fetched.append(self.eval_step(params, batch_stats, batch.images, batch.labels, batch.mask))
                is_ending, _ = self._agree(number % self.config.log_every == 0)
                if is_ending:
                    self._checkpoint(is_ending)
        return sum((one for sums in jax.device_get(fetched) for one in _totals(sums)), start=Totals())

    def _classifier(self) -> Classifier:
        assert self.kept is not None
        params, batch_stats = self.kept.state.best_params, self.kept.state.batch_stats
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
            "num_epochs_done": len(self.kept.history),
        }
        return Classifier(backbone, Head(**params["head"]), self.dataset.classes, provenance)

    def _keep(self, reporter: Reporter, kind: type[BaseException] | None, *_: object) -> None:
        """Leave the last whole epoch's classifier and a checkpoint of it, or of a later step."""
        if self.run_dir is None or self.checkpoints is None:
            return
        with no_interrupts():
            try:
                if self.kept is not None:
                    path = self.run_dir / CLASSIFIER_FOLDER
                    self._save_classifier(path, reporter, is_stopped=kind is not None)
            finally:
                self.checkpoints.wait()
                if self.kept is not None and self.kept.position > (self.checkpoints.newest or (0, 0)):
                    self.checkpoints.save(self.kept)
                    self.checkpoints.wait()
        if kind is not None and self.checkpoints.newest is not None:
            reporter.message(f"The run can be resumed after step {self.checkpoints.newest[0]}")

    def _save_classifier(self, path: Path, reporter: Reporter, *, is_stopped: bool) -> None:
        assert self.kept is not None
        num_epochs = len(self.kept.history)
        was_finished = self.first_step == self.config.num_epochs * self.steps_per_epoch
        if was_finished and has_classifier(path.parent, num_epochs):
            return
        if not is_stopped:
            self._classifier().save(path)
            return
        done = f"epoch {num_epochs} of {self.config.num_epochs}"
        try:
            self._classifier().save(path)
            reporter.message(f"Stopped: keeping {done} in {path}")
        except ClassifierError as error:  # what stopped the run matters more
            reporter.message(f"Stopped: {done} is not kept: {error}")

    def _identity(self) -> dict[str, Any]:
        return {
            **_decisive(self.config),
            "architecture": self.backbone.architecture,
            "weights": checksum(self.backbone.variables),
            "preprocess": self.backbone.preprocess.to_json(),
            "training photos": fingerprint(self.dataset),
            "evaluation photos": None if self.eval_dataset is None else fingerprint(self.eval_dataset),
        }

    def _environment(self) -> str:
        photos = "streamed" if self.photos is None else "resident"
        return (
            f"{self.mesh.size} x {jax.devices()[0].device_kind} with jax {version('jax')}, {photos} photos, "
            f"up to {self.block_capacity} steps a dispatch, {jax.process_count()} processes"
        )

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
            f"{self.backbone.preprocess.size} px in {dtype} on {self.mesh.size} x {device.device_kind}"
            + (f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""),
        ]
        if self.backbone.pretrained_head is not None:
            num_classes = len(self.backbone.pretrained_head[1])
            lines.append(f"The pretrained head of {num_classes} classes is replaced by a new one")
        if len(self.dataset) < config.batch_size:
            lines.append(
                f"The training set is smaller than a batch of {config.batch_size}: images repeat within it"
            )
        if self.leakage and self.eval_dataset is not None:
            lines.append(describe_leakage(self.leakage, len(self.eval_dataset)))
        lines += [self.pipeline_note, *self.dataset.notes, *self.notes]
        return "\n".join(lines)


def _decisive(config: FinetuneConfig) -> dict[str, Any]:
    """What of a configuration decides what the parameters become."""
    return {name: value for name, value in asdict(config).items() if name not in WITHOUT_EFFECT}


def _require_readable(batch: Batch) -> None:
    if message := next(filter(None, batch.errors), None):
        raise DatasetError(f"a photo became unreadable during training: {message}")


def _totals(sums: Sums) -> list[Totals]:
    """Of one step, or of each of several."""
    return [
        Totals(*values) for values in zip(*(np.atleast_1d(value).tolist() for value in sums), strict=True)
    ]

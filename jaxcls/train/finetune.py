"""`finetune`: a dataset and a backbone become a classifier. The only loop over training steps."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcls.classifier import Classifier, Head, as_backbone
from jaxcls.data.dataset import Dataset
from jaxcls.errors import ClassifierError, TrainingError, UsageError
from jaxcls.models.pretrained import Backbone
from jaxcls.parallel import (
    gather,
    is_first_process,
    make_mesh,
    memory_limit,
    replicated,
    require_same,
    together,
)
from jaxcls.pipeline import Batch
from jaxcls.resident import memory_budget
from jaxcls.train.checkpoint import Checkpoints, Snapshot, snapshot_of_first_process
from jaxcls.train.config import FinetuneConfig
from jaxcls.train.description import decisive, describe, environment, identity
from jaxcls.train.folder import (
    CHECKPOINTS_FOLDER,
    CLASSIFIER_FOLDER,
    has_classifier,
    open_folder,
    open_reporters,
    write_config,
)
from jaxcls.train.held_out import HeldOut, read_held_out
from jaxcls.train.memory import describe_parts, describe_shortage, divide_further, is_exhausted, needed_bytes
from jaxcls.train.programs import make_programs
from jaxcls.train.reporters import ConsoleReporter, Reporter, Reporters
from jaxcls.train.setup import Setup, choose_block_capacity, read_photos, require_readable
from jaxcls.train.signals import TERMINATED, no_interrupts, watch_termination
from jaxcls.train.state import Totals, TrainState, init_state, to_devices, to_host
from jaxcls.train.step import Sums, totals_of


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
    require_same("settings", [decisive(config), config.log_every, resume, folder is None])
    if folder is not None:
        together(lambda: open_folder(folder, resume=resume) if is_first_process() else None)
    run = _Run(dataset, as_backbone(backbone), config, eval_dataset, folder)
    if resume:
        run.restore()
    return run.train(reporters)


class _Run:
    """One call of `finetune`: its state, the one `saved` on the host, and the last whole epoch: `kept`."""

    def __init__(
        self,
        dataset: Dataset,
        backbone: Backbone,
        config: FinetuneConfig,
        eval_dataset: Dataset | None,
        run_dir: Path | None,
    ) -> None:
        self.config = config
        # What can be refused before the scan is: it reads every photo.
        dataset.require_every_class()
        dataset.class_weights(config.class_weight)
        if eval_dataset is not None:
            eval_dataset.require_originals()
        mesh = make_mesh(config.batch_size, across_processes=True)
        self.limit, budget = (min(gather(measure(mesh))) for measure in (memory_limit, memory_budget))
        self._prepare(Setup(config, backbone, mesh, dataset, choose_block_capacity(config)))
        self.held_out: HeldOut | None = None
        together(lambda: self._read_photos(eval_dataset, budget))
        self.notes: list[str] = []
        self.kept: Snapshot | None = None
        self.terminated = threading.Event()
        self.is_resumable = run_dir is not None
        self.run_dir = run_dir if is_first_process() else None
        self.checkpoints = None
        run_identity = identity(self.setup, self.eval_dataset)
        require_same("photos or weights", run_identity)
        if self.run_dir is not None:
            folder = self.run_dir / CHECKPOINTS_FOLDER
            self.checkpoints = Checkpoints(
                folder, run_identity, environment(self.setup), num_kept=config.num_checkpoints
            )

    def _prepare(self, setup: Setup) -> None:
        """Make the state and the programs; the training step compiles from now on, while photos decode."""
        self.setup = setup
        state = init_state(
            setup.backbone,
            len(setup.dataset.classes),
            setup.optimizer,
            seed=self.config.seed,
            use_ema=self.config.ema_decay is not None,
        )
        self._go_to(Snapshot(to_host(state), Totals(), ()))
        self.first_step = 0
        self.programs = make_programs(setup, self.state)

    def _read_photos(self, eval_dataset: Dataset | None, budget: int) -> None:
        before, self.setup = self.setup, read_photos(self.setup, budget)
        if self.setup.dataset is not before.dataset or self.setup.block_capacity != before.block_capacity:
            self._prepare(self.setup)
        if eval_dataset is not None:
            self.held_out = read_held_out(eval_dataset, self.setup, budget)

    @property
    def eval_dataset(self) -> Dataset | None:
        return None if self.held_out is None else self.held_out.dataset

    def restore(self) -> None:
        """Go back to the newest good checkpoint, if there is one."""
        snapshot = snapshot_of_first_process(together(self._restored), self.state)
        if snapshot is None:
            self.notes.append("Nothing to resume: starting from the beginning")
            return
        if snapshot.num_parts > self.programs.num_parts:  # it was found not to fit otherwise
            self.programs = make_programs(self.setup, self.state, snapshot.num_parts)
        self._go_to(snapshot)
        self.first_step = self.step
        if self.step == len(self.history) * self.setup.steps_per_epoch:
            self.kept = snapshot
        self.notes.append(f"Resuming after step {self.step} of {self.setup.num_steps}")

    def _restored(self) -> Snapshot | None:
        if self.checkpoints is None:
            return None
        snapshot, self.notes = self.checkpoints.restore(self.state)
        return snapshot

    def _go_to(self, snapshot: Snapshot) -> None:
        self.saved = snapshot
        self.state: TrainState = to_devices(snapshot.state, replicated(self.setup.mesh))
        self.step = snapshot.step
        self.total, self.history = snapshot.totals, list(snapshot.history)

    def train(self, reporters: Sequence[Reporter] | None) -> FinetuneResult:
        setup, config = self.setup, self.config
        if reporters is None:
            reporters = [
                ConsoleReporter(config.num_epochs, setup.steps_per_epoch, config.batch_size, self.step)
            ]
        if not is_first_process():
            reporters = []
        elif self.run_dir is not None:
            write_config(self.run_dir, config, setup.backbone, setup.dataset, self.eval_dataset)
            reporters = [*open_reporters(self.run_dir, self.history, self.step), *reporters]
        with ExitStack() as stack:
            reporter = Reporters(reporters)
            stack.callback(reporter.close)
            # Also on Ctrl-C and on errors: what the last whole epoch made is kept.
            stack.push(partial(self._keep, reporter))
            if self.is_resumable:
                self.terminated = stack.enter_context(watch_termination())
            warnings = () if self.held_out is None else self.held_out.notes
            notes = [*warnings, setup.reason, *setup.dataset.notes, *self.notes]
            reporter.message(describe(setup, self.state.params, notes))
            self._make_it_fit(reporter)
            while len(self.history) < config.num_epochs:
                try:
                    with closing(setup.batches(self.step)) as stream:
                        for epoch in range(len(self.history) + 1, config.num_epochs + 1):
                            self._train_epoch(epoch, stream, reporter)
                except jax.errors.JaxRuntimeError as error:
                    if not is_exhausted(error):
                        raise
                    self._recover(error, reporter)
        assert self.kept is not None
        return FinetuneResult(_classifier(setup, self.kept), self.history, self.run_dir)

    def _make_it_fit(self, reporter: Reporter) -> None:
        """Divide the batch until a step, as XLA foresees it, takes no more memory than there is."""
        resident = 0 if self.setup.photos is None else self.setup.photos.pixels.nbytes
        resident += 0 if self.held_out is None else self.held_out.views.resident_bytes
        # The most that any process needs: all must do the same.
        while (needed := max(gather(needed_bytes(self.programs.compiling.result()))) + resident) > self.limit:
            self._divide(describe_shortage(needed, self.limit), reporter)

    def _divide(self, reason: str, reporter: Reporter) -> None:
        """Go on from the last state on the host, with the batch in twice as many parts."""
        batch_size, is_normalised = self.config.batch_size, self.config.batch_norm == "train"
        num_parts = divide_further(self.programs.num_parts, batch_size, self.setup.mesh.size, reason)
        self._go_to(self.saved)
        self.programs = make_programs(self.setup, self.state, num_parts)
        parts = describe_parts(num_parts, batch_size, is_normalised=is_normalised)
        reporter.message(f"{reason}: after step {self.step}, batches are done in {parts}")

    def _recover(self, error: jax.errors.JaxRuntimeError, reporter: Reporter) -> None:
        # The failed step's state is gone with its donation.
        reason = f"A step ran out of memory ({str(error).splitlines()[0][:200]})"
        if jax.process_count() > 1:
            raise TrainingError(f"{reason}: train smaller batches") from error
        self._divide(reason, reporter)
        self._make_it_fit(reporter)

    def _train_epoch(self, epoch: int, stream: Iterator[Batch], reporter: Reporter) -> None:
        started, num_seen_before = time.perf_counter(), self.total.num_seen
        steps_per_epoch, log_every = self.setup.steps_per_epoch, self.config.log_every
        last_step = epoch * steps_per_epoch
        pending: list[tuple[int, Sums]] = []
        while self.step < last_step:
            pending.append(self._advance(next(stream)))
            is_logged = self.step % steps_per_epoch % log_every == 0
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
            "learning_rate": self.setup.learning_rate(last_step),
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
        require_readable(batch)
        if batch.indices.ndim == 1:
            num_steps = 1
            self.state, sums = self.programs.train_step(self.state, batch.images, batch.labels)
        else:
            num_steps = len(batch.indices)
            self.state, sums = self.programs.train_loop(self.state, batch.images, batch.labels, num_steps)
        self.step += num_steps
        return num_steps, sums

    def _fetch(self, pending: Sequence[tuple[int, Sums]], reporter: Reporter) -> None:
        """Add up the last steps' sums; the first loss that is not finite ends the run."""
        fetched = jax.device_get([sums for _, sums in pending])
        totals = [
            one
            for (num_steps, _), sums in zip(pending, fetched, strict=True)
            for one in totals_of(sums)[:num_steps]
        ]
        for step, one in enumerate(totals, start=self.step - len(totals)):
            if not np.isfinite(one.loss):
                raise TrainingError(
                    f"the loss is {one.loss} at step {step + 1}: lower the learning rates, or look at the "
                    f"batch: {', '.join(self.setup.ids_of(step))}"
                )
        # Step by step, so that the sum's last bits do not depend on where a run was interrupted.
        self.total = sum(totals, start=self.total)
        recent = sum(totals, start=Totals())
        rate = self.setup.learning_rate(self.step)
        row = {"step": self.step, "loss": recent.mean_loss, "error": 1 - recent.accuracy, "rate": rate}
        reporter.steps(len(totals), row)

    def _evaluate(self) -> dict[str, Any]:
        if self.held_out is None:
            return {}

        def end_if_asked(num_batches: int) -> None:
            is_ending, _ = self._agree(num_batches % self.config.log_every == 0)
            if is_ending:
                self._checkpoint(is_ending)

        return self.held_out.evaluate(self.programs.eval_step, self.state, end_if_asked)

    def _snapshot(self) -> Snapshot:
        return Snapshot(to_host(self.state), self.total, tuple(self.history), self.programs.num_parts)

    def _agree(self, is_logged: bool) -> tuple[bool, bool]:
        """Whether to end, as one of the processes was asked to, and whether a checkpoint is due."""
        if jax.process_count() > 1 and not is_logged:  # to ask them takes time
            return False, False
        is_late = self.checkpoints is not None and self.checkpoints.is_due(self.config.checkpoint_seconds)
        answers = gather([int(self.terminated.is_set()), int(is_late)])
        return any(ending for ending, _ in answers), any(late for _, late in answers)

    def _checkpoint(self, is_ending: bool) -> None:
        """Save between two steps; leave if the processes are to end."""
        self.saved = self._snapshot()
        if self.checkpoints is not None:
            self.checkpoints.save(self.saved)
        if is_ending:
            raise SystemExit(TERMINATED)

    def _keep(self, reporter: Reporter, kind: type[BaseException] | None, *_: object) -> None:
        """Leave the last whole epoch's classifier and a checkpoint of it, or of a later step."""
        if self.run_dir is None or self.checkpoints is None:
            return
        with no_interrupts():
            try:
                if self.kept is not None:
                    self._save_classifier(self.run_dir, self.kept, reporter, is_stopped=kind is not None)
            finally:
                self.checkpoints.finish(self.kept)
        if kind is not None and self.checkpoints.newest is not None:
            reporter.message(f"The run can be resumed after step {self.checkpoints.newest[0]}")

    def _save_classifier(
        self, run_dir: Path, kept: Snapshot, reporter: Reporter, *, is_stopped: bool
    ) -> None:
        num_epochs = len(kept.history)
        if self.first_step == self.setup.num_steps and has_classifier(run_dir, num_epochs):
            return
        path, classifier = run_dir / CLASSIFIER_FOLDER, _classifier(self.setup, kept)
        if not is_stopped:
            classifier.save(path)
            return
        done = f"epoch {num_epochs} of {self.config.num_epochs}"
        try:
            classifier.save(path)
            reporter.message(f"Stopped: keeping {done} in {path}")
        except ClassifierError as error:  # what stopped the run matters more
            reporter.message(f"Stopped: {done} is not kept: {error}")


def _classifier(setup: Setup, kept: Snapshot) -> Classifier:
    params, batch_stats = kept.state.best_params, kept.state.batch_stats
    backbone = Backbone(
        architecture=setup.backbone.architecture,
        variables={"params": params["backbone"], "batch_stats": batch_stats},
        preprocess=setup.backbone.preprocess,
        pretrained_head=None,
        pretrained_classes=None,
        provenance=setup.backbone.provenance,
    )
    provenance = {
        "method": "finetune",
        "dataset": setup.dataset.name,
        "num_images": len(setup.dataset),
        "config": asdict(setup.config),
        "num_epochs_done": len(kept.history),
    }
    return Classifier(backbone, Head(**params["head"]), setup.dataset.classes, provenance)

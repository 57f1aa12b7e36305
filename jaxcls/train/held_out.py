"""The photos that are held out of training: read before it, evaluated after each epoch."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxcls.data.dataset import UNLABELLED, Dataset, scan
from jaxcls.data.duplicates import describe_leakage, find_leakage
from jaxcls.errors import DatasetError, TrainingError
from jaxcls.parallel import is_first_process
from jaxcls.resident import EvaluationViews
from jaxcls.train.memory import is_exhausted
from jaxcls.train.setup import Setup, require_readable
from jaxcls.train.state import Totals, TrainState
from jaxcls.train.step import EvalStep, totals_of


@dataclass(frozen=True, eq=False)
class HeldOut:
    """An evaluation set.

    Attributes:
        dataset: with the classes in the order of the training set's, and without undecodable photos.
        views: its batches.
        notes: warnings, for the user.
    """

    dataset: Dataset
    views: EvaluationViews
    notes: tuple[str, ...]

    def evaluate(
        self, eval_step: EvalStep, state: TrainState, after_batch: Callable[[int], None]
    ) -> dict[str, Any]:
        """What the history says of a state; `after_batch` is called with the number of batches begun.

        Raises:
            TrainingError: the loss is not finite, or the memory is exhausted.
        """
        try:
            total = self._totals(eval_step, state, after_batch)
        except jax.errors.JaxRuntimeError as error:
            if not is_exhausted(error):
                raise
            raise TrainingError(f"the evaluation ran out of memory: use smaller batches ({error})") from error
        if not np.isfinite(total.loss):
            raise TrainingError(
                f"the evaluation loss is {total.loss} after step {int(state.step)}: lower the learning rates"
            )
        return {
            "eval_loss": total.mean_loss,
            "eval_accuracy": total.accuracy,
            "eval_num_correct": total.num_correct,
            "eval_num_seen": total.num_seen,
        }

    def _totals(self, eval_step: EvalStep, state: TrainState, after_batch: Callable[[int], None]) -> Totals:
        fetched = []
        with closing(self.views.batches()) as stream:
            for number, batch in enumerate(stream, start=1):
                require_readable(batch)
                fetched.append(
                    eval_step(state.best_params, state.batch_stats, batch.images, batch.labels, batch.mask)
                )
                after_batch(number)
        return sum((one for sums in jax.device_get(fetched) for one in totals_of(sums)), start=Totals())


def read_held_out(dataset: Dataset, setup: Setup, budget: int) -> HeldOut:
    """Look through an evaluation set, once the training photos are read.

    Args:
        dataset: any; what it has to be, the errors say.
        setup: of the run.
        budget: in bytes, what the images may take on each device; see `EvaluationViews`.

    Raises:
        DatasetError: it has no photos, unlabelled ones, or too many that cannot be decoded.
        UsageError: it has photos of other classes than the training set.
    """
    config, training = setup.config, setup.dataset
    matched = dataset.with_classes(training.classes)
    readable = scan(matched, max_bad_fraction=config.max_bad_fraction)
    if not len(readable) or (readable.labels == UNLABELLED).any():
        raise DatasetError(f"evaluation dataset {dataset.name} needs images, all of them labelled")
    leakage: dict[str, str] = {}
    has_groups = training.groups is not None and readable.groups is not None
    # With augmented copies there are groups, whether or not duplicates were looked for.
    if is_first_process() and not (has_groups and training.origins is None):
        leakage = find_leakage(training.originals(), readable)
    views = EvaluationViews(
        readable,
        setup.backbone.preprocess,
        setup.mesh,
        0 if config.pipeline == "streaming" else budget,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        share=setup.share,
    )
    return HeldOut(readable, views, (describe_leakage(leakage, len(readable)),) if leakage else ())

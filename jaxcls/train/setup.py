"""`Setup`: what of a run does not change while it trains: its configuration, network, photos and devices."""

from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jaxcls.data.dataset import Dataset
from jaxcls.errors import DatasetError
from jaxcls.models.pretrained import Backbone
from jaxcls.parallel import batch_sharding
from jaxcls.pipeline import Batch, Share, on_devices, steps_per_epoch, training_batches, training_order
from jaxcls.resident import ResidentPhotos, choose_pipeline
from jaxcls.train.config import FinetuneConfig
from jaxcls.train.optimizer import make_optimizer, make_schedule
from jaxcls.train.step import STEPS_PER_DISPATCH, block_sizes


@dataclass(frozen=True, eq=False)
class Setup:
    """What a run trains, how, with which photos, and where.

    Attributes:
        config: how to train.
        backbone: where to start.
        mesh: the devices, of all processes.
        dataset: the training photos.
        block_capacity: the most steps that one dispatch does.
        photos: those of `dataset` on the devices; None: not yet read, or streamed.
        reason: why they are resident or streamed, for the user.
    """

    config: FinetuneConfig
    backbone: Backbone
    mesh: Mesh
    dataset: Dataset
    block_capacity: int
    photos: ResidentPhotos | None = None
    reason: str = ""

    @property
    def steps_per_epoch(self) -> int:
        """ceil(N / B)."""
        return steps_per_epoch(len(self.dataset), self.config.batch_size)

    @property
    def num_steps(self) -> int:
        """Of the whole run."""
        return self.config.num_epochs * self.steps_per_epoch

    @property
    def share(self) -> Share:
        """The rows of each batch that this process reads."""
        return Share(jax.process_index(), jax.process_count())

    @cached_property
    def schedule(self) -> optax.Schedule:
        """Step -> rate."""
        return make_schedule(self.config, self.steps_per_epoch)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """Of the params."""
        return make_optimizer(self.config, self.schedule)

    def learning_rate(self, step: int) -> float:
        """Of the last of so many steps."""
        # Through str: the shortest decimal that is this float32, 0.05 and not 0.05000000074505806.
        return float(str(np.float32(self.schedule(step - 1))))

    def ids_of(self, step: int) -> list[str]:
        """The photos of the step after so many."""
        positions = step * self.config.batch_size + np.arange(self.config.batch_size)
        order = training_order(len(self.dataset), self.config.seed, positions)
        return [self.dataset.ids[index] for index in order]

    def batches(self, first_step: int) -> Generator[Batch, None, None]:
        """Those of `first_step` and later, or blocks of them, without end, on the devices. Close it."""
        batch_size, seed = self.config.batch_size, self.config.seed
        if self.photos is None:
            batches = training_batches(
                self.dataset,
                self.backbone.preprocess,
                self.config.augmentation,
                batch_size=batch_size,
                seed=seed,
                first_step=first_step,
                num_workers=self.config.num_workers,
                share=self.share,
            )
            return on_devices(batches, batch_sharding(self.mesh))
        if self.block_capacity == 1:
            return self.photos.batches(batch_size=batch_size, seed=seed, first_step=first_step)
        return self.photos.blocks(
            batch_size=batch_size,
            seed=seed,
            num_steps=block_sizes(self.steps_per_epoch, self.config.log_every, first_step),
            first_step=first_step,
            capacity=self.block_capacity,
        )


def choose_block_capacity(config: FinetuneConfig) -> int:
    """The most steps that one dispatch does, as far as can be told before the photos are read."""
    # Never several steps in a loop on CPU: XLA's gradient of a convolution is many times slower there.
    is_looped = jax.default_backend() != "cpu" and config.pipeline != "streaming"
    return min(config.log_every, STEPS_PER_DISPATCH) if is_looped else 1


def read_photos(setup: Setup, budget: int) -> Setup:
    """Leave out photos that cannot be decoded, and decode those that are to be resident.

    Raises:
        DatasetError: too many cannot be decoded, or all those of a class.
        UsageError: the photos are to be resident, and would take more bytes on each device than the budget.
    """
    config = setup.config
    dataset, photos, reason = choose_pipeline(
        config.pipeline,
        setup.dataset,
        setup.backbone.preprocess,
        config.augmentation,
        setup.mesh,
        budget,
        max_bad_fraction=config.max_bad_fraction,
    )
    dataset.require_every_class()
    block_capacity = 1 if photos is None else setup.block_capacity
    return replace(setup, dataset=dataset, photos=photos, reason=reason, block_capacity=block_capacity)


def require_readable(batch: Batch) -> None:
    """Refuse a batch with photos that could be decoded before the run, but not now."""
    if message := next(filter(None, batch.errors), None):
        raise DatasetError(f"a photo became unreadable during training: {message}")

"""`FinetuneConfig`: how to fine-tune, as plain values. No JAX, so that `--help` is quick."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from jaxcls.augment.host import Augmentation
from jaxcls.errors import UsageError
from jaxcls.models.precision import Precision

NUM_STAGES = 4
Schedule = Literal["per_epoch", "cosine"]
Pipeline = Literal["auto", "resident", "streaming"]
BatchNorm = Literal["train", "frozen"]


@dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune. The defaults are AMLPCV's recipe, its rates read as its engine read them.

    Attributes:
        num_epochs: an epoch is ceil(N / batch_size) full batches.
        learning_rates: one per epoch, the last holds on; for the cosine schedule, the first is the peak.
            With unit-gain momentum (`unit_gain_sgd`), 0.05 here is 0.005 for Optax or torch.
        schedule: "per_epoch", or "cosine" down to 0.
        warmup_epochs: of the cosine schedule.
        momentum: unit-gain.
        batch_size: photos per step, over all devices. Halve the rate when you halve it.
        dropout: the share of features dropped before the head.
        l2: times every kernel, added to its gradient; not for biases and batch norm.
        freeze: "none"; "backbone" (only the head learns); or a number of stages, 1 to 4, that keep
            their weights and statistics, the stem with them.
        batch_norm: "train", or "frozen": the stored statistics are used and never updated. Frozen,
            scale and shift stay too and the gradient's norm is clipped at 1: without both, the default
            rates diverge.
        class_weight: None, "balanced" (N / (K n_k)), or a weight by class name.
        label_smoothing: in [0, 1).
        flip: mirror left and right at random.
        min_crop_area: below 1, crop a random box of at least this share of the photo.
        colour_jitter: in [0, 1): scale brightness, contrast and saturation by up to 1 plus or minus this.
        precision: of the convolutions: "float32", "bfloat16", or "auto" (bfloat16 on accelerators).
        ema_decay: average the parameters with this decay, and evaluate and keep the average.
        seed: of the head, the order, the views and dropout.
        pipeline: "resident": photos are decoded once, and kept and cropped on the devices; "streaming":
            decoded anew each epoch; "auto": resident if they fit into a quarter of the devices' memory and
            need no random crops on a CPU.
        num_workers: processes that decode while streaming; 0: threads.
        max_bad_fraction: go on without undecodable photos up to this share of the dataset.
        log_every: fetch the losses from the device every so many steps.
        num_checkpoints: how many of the newest to keep; that of the best evaluation accuracy stays besides.
        checkpoint_seconds: save within an epoch too once the last save is this old, so that a run that is
            killed loses little even of a long epoch.
    """

    num_epochs: int = 15
    learning_rates: tuple[float, ...] = (0.05,) * 7 + (0.005,) * 7 + (0.0005,)
    schedule: Schedule = "per_epoch"
    warmup_epochs: float = 0.0
    momentum: float = 0.9
    batch_size: int = 32
    dropout: float = 0.5
    l2: float = 0.0005
    freeze: Literal["none", "backbone"] | int = "none"
    batch_norm: BatchNorm = "train"
    class_weight: Literal["balanced"] | dict[str, float] | None = None
    label_smoothing: float = 0.0
    flip: bool = True
    min_crop_area: float = 1.0
    colour_jitter: float = 0.0
    precision: Precision = "auto"
    ema_decay: float | None = None
    seed: int = 0
    pipeline: Pipeline = "auto"
    num_workers: int = 0
    max_bad_fraction: float = 0.0
    log_every: int = 10
    num_checkpoints: int = 2
    checkpoint_seconds: float = 600.0

    def __post_init__(self) -> None:
        rules = (
            (self.num_epochs >= 1, "num_epochs must be at least 1"),
            (
                isinstance(self.learning_rates, tuple | list)
                and self.learning_rates
                and all(0 <= rate < math.inf for rate in self.learning_rates),
                "learning_rates is a tuple of at least one value, each finite and not below 0",
            ),
            (self.schedule in get_args(Schedule), f"schedule must be one of {get_args(Schedule)}"),
            (0 <= self.warmup_epochs < self.num_epochs, "warmup_epochs must lie in [0, num_epochs)"),
            (
                self.schedule == "cosine" or self.warmup_epochs == 0,
                'warmup_epochs is for schedule="cosine"; for "per_epoch", list the rates',
            ),
            (0 <= self.momentum < 1, "momentum must lie in [0, 1)"),
            (self.batch_size >= 1, "batch_size must be at least 1"),
            (0 <= self.dropout < 1, "dropout must lie in [0, 1)"),
            (0 <= self.l2 < math.inf, "l2 must be finite and not below 0"),
            (
                not isinstance(self.freeze, bool)
                and self.freeze in ("none", "backbone", *range(NUM_STAGES + 1)),
                f'freeze must be "none", "backbone" or a number of stages up to {NUM_STAGES}',
            ),
            (
                self.class_weight in (None, "balanced") or isinstance(self.class_weight, dict),
                "class_weight must be None, 'balanced' or a weight by class name",
            ),
            (self.batch_norm in get_args(BatchNorm), f"batch_norm must be one of {get_args(BatchNorm)}"),
            (0 <= self.label_smoothing < 1, "label_smoothing must lie in [0, 1)"),
            (self.precision in get_args(Precision), f"precision must be one of {get_args(Precision)}"),
            (self.ema_decay is None or 0 <= self.ema_decay < 1, "ema_decay must lie in [0, 1)"),
            (0 <= self.seed < 2**32, "seed must lie in [0, 2**32)"),
            (self.pipeline in get_args(Pipeline), f"pipeline must be one of {get_args(Pipeline)}"),
            (self.num_workers >= 0, "num_workers must not be below 0"),
            (0 <= self.max_bad_fraction <= 1, "max_bad_fraction must lie in [0, 1]"),
            (self.log_every >= 1, "log_every must be at least 1"),
            (self.num_checkpoints >= 1, "num_checkpoints must be at least 1"),
            (self.checkpoint_seconds > 0, "checkpoint_seconds must be above 0"),
        )
        for holds, message in rules:
            if not holds:
                raise UsageError(message)
        _ = self.augmentation  # checks its own fields

    @property
    def num_frozen_stages(self) -> int:
        """`freeze` as a number of stages."""
        return (
            self.freeze if isinstance(self.freeze, int) else {"none": 0, "backbone": NUM_STAGES}[self.freeze]
        )

    @property
    def augmentation(self) -> Augmentation:
        """The random views of training."""
        return Augmentation(self.flip, self.min_crop_area, self.colour_jitter)

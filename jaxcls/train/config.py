"""`FinetuneConfig`: how to fine-tune, as plain values. No JAX, so that `--help` is quick."""

from dataclasses import dataclass
from typing import Literal

from jaxcls.augment.host import Augmentation
from jaxcls.errors import UsageError
from jaxcls.models.precision import Precision

NUM_STAGES = 4


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
            scale and shift stay too and the gradient's norm is clipped at 1: without, the default
            rates can diverge.
        class_weight: None, "balanced" (N / (K n_k)), or a weight by class name.
        label_smoothing: in [0, 1).
        flip, min_crop_area, colour_jitter: random views, see `Augmentation`.
        precision: of the convolutions: "float32", "bfloat16", or "auto" (bfloat16 on accelerators).
        ema_decay: average the parameters with this decay, and evaluate and keep the average.
        seed: of the head, the order, the views and dropout.
        num_workers: processes that decode; 0: threads.
        max_bad_fraction: go on without undecodable photos up to this share of the dataset.
        log_every: fetch the losses from the device every so many steps.
    """

    num_epochs: int = 15
    learning_rates: tuple[float, ...] = (0.05,) * 7 + (0.005,) * 7 + (0.0005,)
    schedule: Literal["per_epoch", "cosine"] = "per_epoch"
    warmup_epochs: float = 0.0
    momentum: float = 0.9
    batch_size: int = 32
    dropout: float = 0.5
    l2: float = 0.0005
    freeze: Literal["none", "backbone"] | int = "none"
    batch_norm: Literal["train", "frozen"] = "train"
    class_weight: Literal["balanced"] | dict[str, float] | None = None
    label_smoothing: float = 0.0
    flip: bool = True
    min_crop_area: float = 1.0
    colour_jitter: float = 0.0
    precision: Precision = "auto"
    ema_decay: float | None = None
    seed: int = 0
    num_workers: int = 0
    max_bad_fraction: float = 0.0
    log_every: int = 10

    def __post_init__(self) -> None:
        rules = (
            (self.num_epochs >= 1, "num_epochs must be at least 1"),
            (len(self.learning_rates) >= 1, "learning_rates needs at least one value"),
            (self.batch_size >= 1, "batch_size must be at least 1"),
            (0 <= self.dropout < 1, "dropout must lie in [0, 1)"),
            (self.l2 >= 0, "l2 must not be below 0"),
            (0 <= self.label_smoothing < 1, "label_smoothing must lie in [0, 1)"),
            (self.ema_decay is None or 0 <= self.ema_decay < 1, "ema_decay must lie in [0, 1)"),
            (self.log_every >= 1, "log_every must be at least 1"),
            (0 <= self.num_frozen_stages <= NUM_STAGES, f"freeze must be at most {NUM_STAGES} stages"),
        )
        for holds, message in rules:
            if not holds:
                raise UsageError(message)

    @property
    def num_frozen_stages(self) -> int:
        """`freeze` as a number of stages."""
        return {"none": 0, "backbone": NUM_STAGES}.get(self.freeze, self.freeze)  # type: ignore

    @property
    def augmentation(self) -> Augmentation:
        """The random views of training."""
        return Augmentation(self.flip, self.min_crop_area, self.colour_jitter)

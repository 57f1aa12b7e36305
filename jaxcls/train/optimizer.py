"""The optimizer: SGD with unit-gain momentum, rates by epoch, and which parameters move."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import optax

from jaxcls.errors import UsageError
from jaxcls.models.resnet import frozen_param_mask
from jaxcls.train.config import FinetuneConfig


def make_schedule(config: FinetuneConfig, steps_per_epoch: int) -> optax.Schedule:
    """The schedule that a configuration asks for: step -> rate."""
    if config.schedule == "per_epoch":
        return per_epoch_schedule(config.learning_rates, steps_per_epoch)
    num_warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    return cosine_schedule(config.learning_rates[0], config.num_epochs * steps_per_epoch, num_warmup_steps)


def make_optimizer(config: FinetuneConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer that a configuration asks for, for params `{"backbone", "head"}`."""
    freeze_norm = config.batch_norm == "frozen"
    return unit_gain_sgd(
        schedule,
        momentum=config.momentum,
        l2=config.l2,
        trainable=partial(
            trainable_mask, num_frozen_stages=config.num_frozen_stages, freeze_norm=freeze_norm
        ),
        clip_norm=1.0 if freeze_norm else None,
    )


def per_epoch_schedule(rates: Sequence[float], steps_per_epoch: int) -> optax.Schedule:
    """One rate per epoch; the last holds on."""
    if not rates or min(rates) < 0:
        raise UsageError(f"learning rates {tuple(rates)}: give at least one, none below 0")
    boundaries = [steps_per_epoch * epoch for epoch in range(1, len(rates))]
    return optax.join_schedules([optax.constant_schedule(rate) for rate in rates], boundaries)


def cosine_schedule(peak: float, num_steps: int, num_warmup_steps: int) -> optax.Schedule:
    """Linear from 0 to `peak`, then half a cosine down to 0."""
    if not 0 <= num_warmup_steps < num_steps:
        raise UsageError(f"{num_warmup_steps} warm-up steps of {num_steps} leave none to train with")
    return optax.warmup_cosine_decay_schedule(
        0.0 if num_warmup_steps else peak, peak, num_warmup_steps, num_steps
    )


def unit_gain_sgd(
    schedule: optax.Schedule,
    *,
    momentum: float,
    l2: float,
    trainable: Callable[[Any], Any],
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """SGD whose momentum averages: v = m v + (1 - m) (g + l2 w); w -= rate v.

    CNTK's convention. Optax's and torch's momentum adds up instead, v = m v + g, so that
    a rate here equals `rate * (1 - m)` there.

    Args:
        schedule: step -> rate.
        momentum: m, in [0, 1).
        l2: added to the gradient, times the parameter, where `decayed_mask` is true.
        trainable: params -> a tree of bools; the others stay, and hold no state.
        clip_norm: the largest norm of the whole gradient, before `l2`; None: unlimited.
    """
    if not 0 <= momentum < 1:
        raise UsageError(f"momentum {momentum}: must lie in [0, 1)")
    moving = optax.chain(
        optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm),
        optax.add_decayed_weights(l2, mask=decayed_mask),
        optax.ema(momentum, debias=False),
        optax.scale_by_learning_rate(schedule),
    )

    def label(params: Any) -> Any:
        return jax.tree.map(lambda moves: "moving" if moves else "fixed", trainable(params))

    return optax.partition({"moving": moving, "fixed": optax.set_to_zero()}, label)


def trainable_mask(params: Mapping[str, Any], *, num_frozen_stages: int, freeze_norm: bool) -> Any:
    """Which parameters move: a tree of bools.

    Args:
        params: `{"backbone", "head"}`.
        num_frozen_stages: as for `make_apply`.
        freeze_norm: keep the scale and shift of every batch norm.
    """
    frozen = frozen_param_mask(params["backbone"], num_frozen_stages)
    moves = jax.tree.map(
        lambda stays, value: not stays and not (freeze_norm and value.ndim == 1), frozen, params["backbone"]
    )
    return {"backbone": moves, "head": jax.tree.map(lambda _: True, params["head"])}


def decayed_mask(params: Any) -> Any:
    """Kernels decay; biases and batch norm's scale and shift (all of rank 1) do not."""
    return jax.tree.map(lambda value: value.ndim > 1, params)

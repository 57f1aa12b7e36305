"""The programs of a run, compiled ahead for the shapes of its batches."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np

from jaxcls.models.precision import compute_dtype
from jaxcls.models.resnet import make_apply
from jaxcls.parallel import batch_sharding, steps_sharding
from jaxcls.train.setup import Setup
from jaxcls.train.state import TrainState
from jaxcls.train.step import EvalStep, TrainLoop, TrainStep, make_eval_step, make_train_loop, make_train_step


@dataclass(frozen=True)
class Programs:
    """What a run computes, with its batches done in so many parts.

    Attributes:
        num_parts: see `make_train_step`.
        train_step, train_loop, eval_step: see `train.step`.
        compiling: the one of the first two that trains.
    """

    num_parts: int
    train_step: TrainStep
    train_loop: TrainLoop
    eval_step: EvalStep
    compiling: Future[jax.stages.Compiled]


def make_programs(setup: Setup, state: TrainState, num_parts: int = 1) -> Programs:
    """The programs for any state like this one; the one that trains compiles from now on, in a thread."""
    config, preprocess = setup.config, setup.backbone.preprocess
    apply = make_apply(
        setup.backbone.architecture,
        dtype=compute_dtype(config.precision),
        batch_norm=config.batch_norm,
        num_frozen_stages=config.num_frozen_stages,
    )
    train_step = make_train_step(
        apply,
        preprocess,
        setup.optimizer,
        setup.mesh,
        dropout=config.dropout,
        label_smoothing=config.label_smoothing,
        weights=setup.dataset.class_weights(config.class_weight),
        ema_decay=config.ema_decay,
        num_parts=num_parts,
    )
    train_loop = make_train_loop(train_step, setup.mesh)
    pool = ThreadPoolExecutor(1)
    # Traced here: JAX's settings may hold for this thread alone, and are part of what it keeps.
    compiling = pool.submit(_lower(setup, state, train_step, train_loop).compile)
    pool.shutdown(wait=False)
    return Programs(
        num_parts, train_step, train_loop, make_eval_step(apply, preprocess, setup.mesh), compiling
    )


def _lower(
    setup: Setup, state: TrainState, train_step: TrainStep, train_loop: TrainLoop
) -> jax.stages.Lowered:
    """The program that trains, ready to be compiled; JAX finds it again when it is called."""
    size, shape = setup.backbone.preprocess.size, [setup.config.batch_size]
    sharding = batch_sharding(setup.mesh)
    if setup.block_capacity > 1:
        shape, sharding = [setup.block_capacity, *shape], steps_sharding(setup.mesh)
    images = jax.ShapeDtypeStruct((*shape, size, size, 3), np.uint8, sharding=sharding)
    labels = jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)
    if setup.block_capacity > 1:
        return train_loop.lower(state, images, labels, 1)
    return train_step.lower(state, images, labels)

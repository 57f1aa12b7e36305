"""One training step and one evaluation step, as pure functions compiled over the mesh."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from inspect import unwrap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxcls.classifier import apply_head
from jaxcls.models.convolution import compiler_options
from jaxcls.models.resnet import Apply
from jaxcls.parallel import batch_sharding, replicated, steps_sharding
from jaxcls.preprocess import Preprocess
from jaxcls.train.state import TrainState

STEPS_PER_DISPATCH = 10
"""At most, on accelerators; the images of so many steps are held at once."""


class Sums(NamedTuple):
    """Sums, not means: divided once, at the end, by the number of images seen.

    Attributes:
        loss: float32 scalar.
        num_correct, num_seen: int32 scalars.
    """

    loss: jax.Array
    num_correct: jax.Array
    num_seen: jax.Array


TrainStep = jax.stages.Wrapped
"""(state, images, labels) -> (state, sums); `lower(...).compile()` compiles it ahead."""
TrainLoop = jax.stages.Wrapped
"""(state, images, labels, num_steps) -> (state, sums); see `make_train_loop`."""
EvalStep = Callable[[Any, Any, jax.Array, jax.Array, jax.Array], Sums]


def make_train_step(
    apply: Apply,
    preprocess: Preprocess,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    dropout: float,
    label_smoothing: float,
    weights: Any | None,
    ema_decay: float | None,
) -> TrainStep:
    """Compile `step(state, images uint8 [B, H, W, 3], labels int32 [B]) -> (state, sums)`.

    The state is donated: the one passed in is gone. Batch norm sees the whole batch,
    however many devices share it.

    Args:
        apply: the trunk.
        preprocess: normalises the images.
        optimizer: of `state.params`.
        mesh: the devices.
        dropout: the share of features set to zero before the head.
        label_smoothing: the share of the target spread evenly over the classes.
        weights: float32 [K] of the loss by true class, or None; the loss is then a weighted mean.
        ema_decay: of the averaged parameters, or None.
    """

    def loss_of(
        params: Any, state: TrainState, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, Any]:
        variables = {"params": params["backbone"], "batch_stats": state.batch_stats}
        features, batch_stats = apply(variables, preprocess.normalize(images), train=True)
        key = jax.random.fold_in(state.key, state.step)
        logits = apply_head(params["head"], drop(key, features, dropout))
        losses = cross_entropy(logits, labels, label_smoothing)
        loss = jnp.mean(losses) if weights is None else _weighted_mean(losses, jnp.asarray(weights)[labels])
        return loss, (batch_stats, logits)

    def step(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[TrainState, Sums]:
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (batch_stats, logits)), gradients = gradient(state.params, state, images, labels)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_decay is not None:
            ema_params = optax.incremental_update(params, ema_params, 1 - ema_decay)
        sums = Sums(loss * len(labels), jnp.sum(logits.argmax(-1) == labels), jnp.full((), len(labels)))
        return replace(
            state,
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema_params=ema_params,
        ), sums

    whole, sharded = replicated(mesh), batch_sharding(mesh)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(whole, sharded, sharded),
        out_shardings=whole,
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )


def make_train_loop(step: TrainStep, mesh: Mesh) -> TrainLoop:
    """Compile `loop(state, images uint8 [K, B, H, W, 3], labels int32 [K, B], n) -> (state, sums [K])`.

    It does the first n <= K steps in one dispatch, without a compilation for each n; later sums are 0.
    For accelerators: inside a CPU loop XLA's gradient of a convolution is many times slower.
    """

    # XLA takes options for a whole program only.
    one_step = unwrap(step)

    def loop(
        state: TrainState, images: jax.Array, labels: jax.Array, num_steps: jax.Array
    ) -> tuple[TrainState, Sums]:
        def body(i: jax.Array, carry: tuple[TrainState, Sums]) -> tuple[TrainState, Sums]:
            state, sums = carry
            state, one = one_step(state, images[i], labels[i])
            return state, jax.tree.map(lambda values, value: values.at[i].set(value), sums, one)

        kinds = jax.eval_shape(one_step, state, images[0], labels[0])[1]
        sums = jax.tree.map(lambda kind: jnp.zeros(len(images), kind.dtype), kinds)
        return jax.lax.fori_loop(0, num_steps, body, (state, sums))

    whole, sharded = replicated(mesh), steps_sharding(mesh)
    return jax.jit(
        loop,
        donate_argnums=0,
        in_shardings=(whole, sharded, sharded, whole),
        out_shardings=whole,
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )


def block_sizes(steps_per_epoch: int, log_every: int, first_step: int = 0) -> Iterator[int]:
    """How many steps one dispatch after another does: none passes an epoch's end or a step that is logged."""
    step = first_step % steps_per_epoch
    while True:
        num_steps = min(STEPS_PER_DISPATCH, log_every - step % log_every, steps_per_epoch - step)
        yield num_steps
        step = (step + num_steps) % steps_per_epoch


def make_eval_step(apply: Apply, preprocess: Preprocess, mesh: Mesh) -> EvalStep:
    """Compile `step(params, batch_stats, images, labels, mask) -> sums`; masked rows count for nothing."""

    def step(params: Any, batch_stats: Any, images: jax.Array, labels: jax.Array, mask: jax.Array) -> Sums:
        variables = {"params": params["backbone"], "batch_stats": batch_stats}
        features, _ = apply(variables, preprocess.normalize(images), train=False)
        logits = apply_head(params["head"], features)
        losses = jnp.where(mask, cross_entropy(logits, jnp.where(mask, labels, 0)), 0.0)
        return Sums(jnp.sum(losses), jnp.sum((logits.argmax(-1) == labels) & mask), jnp.sum(mask))

    whole, sharded = replicated(mesh), batch_sharding(mesh)
    return jax.jit(
        step,
        in_shardings=(whole, whole, sharded, sharded, sharded),
        out_shardings=whole,
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """float32 [B] losses of logits [B, K] and labels int32 [B]."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def drop(key: jax.Array, features: jax.Array, rate: float) -> jax.Array:
    """Set a share `rate` of the features to zero and scale the others by 1 / (1 - rate)."""
    if rate == 0:
        return features
    kept = jax.random.bernoulli(key, 1 - rate, features.shape)
    return jnp.where(kept, features / (1 - rate), 0.0)


def _weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1e-12)

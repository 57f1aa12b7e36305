"""One training step and one evaluation step, as pure functions compiled over the mesh."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from inspect import unwrap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

from jaxcls.classifier import apply_head
from jaxcls.models.convolution import compiler_options
from jaxcls.models.resnet import Apply
from jaxcls.parallel import batch_sharding, replicated, steps_sharding
from jaxcls.preprocess import Preprocess
from jaxcls.train.state import Totals, TrainState

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


def totals_of(sums: Sums) -> list[Totals]:
    """Of one step, or of each of several, once they are fetched."""
    return [
        Totals(*values) for values in zip(*(np.atleast_1d(value).tolist() for value in sums), strict=True)
    ]


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
    num_parts: int = 1,
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
        num_parts: do the batch in so many parts, one after another, and add up their gradients: it takes
            less memory. Batch norm then sees one part at a time. Divides the rows of each device evenly.
    """

    def loss_of(
        params: Any,
        batch_stats: Any,
        key: jax.Array,
        images: jax.Array,
        labels: jax.Array,
        shares: jax.Array,
    ) -> tuple[jax.Array, Any]:
        variables = {"params": params["backbone"], "batch_stats": batch_stats}
        features, batch_stats = apply(variables, preprocess.normalize(images), train=True)
        logits = apply_head(params["head"], drop(key, features, dropout))
        loss = jnp.sum(cross_entropy(logits, labels, label_smoothing) * shares)
        return loss, (batch_stats, jnp.sum(logits.argmax(-1) == labels))

    def step(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[TrainState, Sums]:
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        key = jax.random.fold_in(state.key, state.step)
        batch = images, labels, _shares_in_loss(labels, weights)
        batch_stats = state.batch_stats
        total: Any = None
        # Not a loop: inside one, XLA's gradient of a convolution is many times slower on CPU.
        for part in range(num_parts):
            images_of_part, *rest = _part(batch, part, num_parts)
            rows = _after(total, images_of_part), *rest
            part_key = key if num_parts == 1 else jax.random.fold_in(key, part)
            (loss, (batch_stats, num_correct)), gradients = gradient(
                state.params, batch_stats, part_key, *rows
            )
            one = (loss, num_correct, gradients)
            total = one if total is None else jax.tree.map(jnp.add, total, one)
        loss, num_correct, gradients = total
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_decay is not None:
            ema_params = optax.incremental_update(params, ema_params, 1 - ema_decay)
        sums = Sums(loss * len(labels), num_correct, jnp.full((), len(labels)))
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
        return lax.fori_loop(0, num_steps, body, (state, sums))

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


def _shares_in_loss(labels: jax.Array, weights: Any | None) -> jax.Array:
    """[B]: what the loss of each image counts in the batch's, which is a (weighted) mean."""
    if weights is None:
        return jnp.full(len(labels), 1 / len(labels))
    by_image = jnp.asarray(weights)[labels]
    return by_image / jnp.maximum(jnp.sum(by_image), 1e-12)


def _part(batch: Any, part: int, num_parts: int) -> Any:
    """Every `num_parts`-th row, so that no row leaves its device."""
    if num_parts == 1:
        return batch
    return jax.tree.map(lambda rows: rows.reshape(-1, num_parts, *rows.shape[1:])[:, part], batch)


def _after(values: Any, images: jax.Array) -> jax.Array:
    """The same images, to be used after all `values` are computed: their memory is then free again."""
    if values is None:
        return images
    # XLA's CPU compiler drops optimization barriers and would have all parts in memory at once.
    some = sum(leaf.reshape(-1)[0] for leaf in jax.tree.leaves(values))
    return images + (some != some).astype(images.dtype)

"""`TrainState`: everything that training changes, and `Totals` of its steps. Data only."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding

from jaxcls.classifier import init_head
from jaxcls.models.pretrained import Backbone
from jaxcls.parallel import put


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """One point of a training run.

    Attributes:
        step: int32 scalar, the number of steps done; also the position in the data, which is all a resumed
            run needs to see the photos that an undisturbed one would have seen.
        params: `{"backbone": ..., "head": {"kernel", "bias"}}`, float32.
        batch_stats: the backbone's stored statistics, float32.
        opt_state: the optimizer's.
        ema_params: a running average of `params`, or None.
        key: the run's random key; a step uses `fold_in(key, step)`.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema_params: Any | None
    key: jax.Array

    @property
    def best_params(self) -> Any:
        """The averaged parameters where there are any, else the parameters."""
        return self.params if self.ema_params is None else self.ema_params


@dataclass(frozen=True)
class Totals:
    """What the steps of an epoch, or the batches of an evaluation, add up to.

    Added in order as Python's floats: any number of steps at a time gives the same bits.

    Attributes:
        loss: the sum over images.
        num_correct, num_seen: images.
    """

    loss: float = 0.0
    num_correct: int = 0
    num_seen: int = 0

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(
            self.loss + other.loss, self.num_correct + other.num_correct, self.num_seen + other.num_seen
        )

    @property
    def mean_loss(self) -> float:
        """By image."""
        return self.loss / self.num_seen

    @property
    def accuracy(self) -> float:
        """The share of images classified correctly."""
        return self.num_correct / self.num_seen


def init_state(
    backbone: Backbone,
    num_classes: int,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    use_ema: bool,
) -> TrainState:
    """A backbone's weights under a new random head, before the first step.

    Args:
        backbone: copied; steps donate the state, and the backbone must outlive them.
        num_classes: K.
        optimizer: of the params.
        seed: of the head and of the run's key.
        use_ema: keep averaged parameters.
    """
    head_key, run_key = jax.random.split(jax.random.key(seed))
    params = {
        "backbone": _copy(backbone.variables["params"]),
        "head": init_head(head_key, backbone.num_features, num_classes),
    }
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=_copy(backbone.variables["batch_stats"]),
        opt_state=optimizer.init(params),
        ema_params=_copy(params) if use_ema else None,
        key=run_key,
    )


def to_host(state: TrainState) -> TrainState:
    """The state as NumPy arrays, its key as the key's data: it outlives the donation of the state."""
    return jax.device_get(replace(state, key=jax.random.key_data(state.key)))


def to_devices(state: TrainState, sharding: Sharding) -> TrainState:
    """What `to_host` took, as JAX arrays."""
    state = put(state, sharding)
    return replace(state, key=jax.random.wrap_key_data(state.key))


def _copy(tree: Any) -> Any:
    return jax.tree.map(lambda value: jnp.array(value, copy=True), tree)

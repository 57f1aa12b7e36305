"""`TrainState`: everything that training changes. Data only."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcls.classifier import init_head
from jaxcls.models.pretrained import Backbone


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """One point of a training run.

    Attributes:
        step: int32 scalar, the number of steps done; also the position in the data.
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


def _copy(tree: Any) -> Any:
    return jax.tree.map(lambda value: jnp.array(value, copy=True), tree)

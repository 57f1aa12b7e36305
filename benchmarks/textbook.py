"""The textbook Flax ResNet: `nn.Conv`, `nn.BatchNorm`, `optax.sgd`, one `jit` or `pmap`, and nothing else."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.jax_programs import JaxScoring, JaxTraining, compile_with_details, first_run
from benchmarks.programs import NUM_CLASSES, NUM_INPUTS, random_images, random_labels
from benchmarks.timing import Program
from benchmarks.worker import Task
from jaxcls.models.architecture import ARCHITECTURES
from jaxcls.preprocess import IMAGENET_MEAN, IMAGENET_STD

AXIS = "batch"


class Block(nn.Module):
    """A residual block, basic or bottleneck."""

    features: int
    stride: int
    bottleneck: bool
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features, strides = self.features, (self.stride, self.stride)
        if self.bottleneck:
            y = nn.relu(self.norm()(self.conv(features, (1, 1))(x)))
            y = nn.relu(self.norm()(self.conv(features, (3, 3), strides, padding=1)(y)))
            y = self.norm()(self.conv(4 * features, (1, 1))(y))
        else:
            y = nn.relu(self.norm()(self.conv(features, (3, 3), strides, padding=1)(x)))
            y = self.norm()(self.conv(features, (3, 3), padding=1)(y))
        if x.shape != y.shape:
            x = self.norm()(self.conv(y.shape[-1], (1, 1), strides)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet v1.5 on normalised pixels [B, H, W, 3]: logits [B, K]."""

    depth: int
    dtype: Any

    @nn.compact
    def __call__(self, pixels: jax.Array, train: bool) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        x = nn.relu(norm()(conv(64, (7, 7), (2, 2), padding=3)(pixels)))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        architecture = ARCHITECTURES[f"resnet{self.depth}"]
        for stage, num_blocks in enumerate(architecture.stage_sizes):
            for index in range(num_blocks):
                stride = 2 if stage and not index else 1
                x = Block(64 * 2**stage, stride, architecture.bottleneck, conv, norm)(x)
        return nn.Dense(NUM_CLASSES)(x.mean((1, 2)).astype(jnp.float32))


def make_optimizer() -> optax.GradientTransformation:
    """SGD with momentum."""
    return optax.sgd(0.001, momentum=0.9)


def init_state(network: ResNet, optimizer: optax.GradientTransformation, images: Any) -> Any:
    """The count of steps, parameters, batch statistics, and the optimizer's state."""
    variables = network.init(jax.random.key(0), _normalize(images), train=False)
    params = variables["params"]
    return jnp.zeros((), jnp.int32), params, variables["batch_stats"], optimizer.init(params)


def make_step(network: ResNet, optimizer: optax.GradientTransformation, axis: str | None = None) -> Any:
    """The function (state, images, labels) -> (state, loss); it averages over an `axis` of devices."""

    def step(state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, jax.Array]:
        count, params, batch_stats, opt_state = state

        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updates = network.apply(variables, _normalize(images), True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates["batch_stats"]

        (loss, new_stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        if axis is not None:
            loss, new_stats, gradients = jax.lax.pmean((loss, new_stats, gradients), axis)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return (count + 1, optax.apply_updates(params, updates), new_stats, opt_state), loss

    return step


def apply_unfolded(network: ResNet, variables: Any, images: jax.Array) -> Any:
    """Logits of uint8 images, with batch norm unfolded."""
    return network.apply(variables, _normalize(images), False)


def train(task: Task) -> Program:
    """The training step under `jit` on one device, or under `pmap` on all of them."""
    mode, dtype = _settings(task)
    network, optimizer = ResNet(task.depth, dtype), make_optimizer()
    batches = [
        (random_images(task.batch_size, task.image_size, n), random_labels(task.batch_size, n))
        for n in range(NUM_INPUTS)
    ]
    state = jax.jit(partial(init_state, network, optimizer))(batches[0][0][:1])
    step = make_step(network, optimizer, axis=AXIS if mode == "pmap" else None)
    if mode == "pmap":
        num_devices = jax.local_device_count()
        jitted = jax.pmap(step, AXIS, donate_argnums=0)
        split = jax.pmap(lambda x: x)
        state = jax.tree.map(lambda x: split(np.broadcast_to(x, (num_devices, *x.shape))), state)
        placed = [tuple(split(x.reshape(num_devices, -1, *x.shape[1:])) for x in batch) for batch in batches]
    else:
        jitted = jax.jit(step, donate_argnums=0)
        placed = [jax.device_put(batch) for batch in batches]
    compiled, details = compile_with_details(jitted, state, *placed[0])
    return JaxTraining(
        compiled,
        state,
        placed,
        step_of=lambda state: state[0],
        weights_of=lambda state: state[1]["Dense_0"]["kernel"],
        images_per_step=task.batch_size,
        details={"dtype": dtype.name, **details},
    )


def score(task: Task) -> Program:
    """The network under `jit`, batch norm unfolded."""
    _, dtype = _settings(task)
    network = ResNet(task.depth, dtype)
    images = [jax.device_put(random_images(task.batch_size, task.image_size, n)) for n in range(NUM_INPUTS)]
    variables = jax.jit(partial(network.init, train=False))(jax.random.key(0), _normalize(images[0][:1]))

    compiled, details = compile_with_details(jax.jit(partial(apply_unfolded, network)), variables, images[0])
    details = {"dtype": dtype.name, **details}
    return JaxScoring(partial(compiled, variables), images, task.batch_size, details)


def first_step(task: Task) -> dict[str, Any]:
    """One training step in a new process."""
    return first_run(train, task)


def first_score(task: Task) -> dict[str, Any]:
    """One batch scored in a new process."""
    return first_run(score, task)


def _settings(task: Task) -> tuple[str, Any]:
    """ "flax-MODE-DTYPE"."""
    _, mode, dtype = task.subject.split("-")
    return mode, jnp.dtype(dtype)


def _normalize(images: Any) -> jax.Array:
    mean, std = (jnp.asarray(values).reshape(1, 1, 1, 3) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images / 255.0 - mean) / std

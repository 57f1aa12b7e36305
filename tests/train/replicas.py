"""A script: some steps of one network on this process's devices, or on those of all processes, as numbers.

    python replicas.py OUT.npz

Tests run it on 1, 2, 4 and 8 devices and in two processes and compare what it writes.
"""

import os
import sys
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcls.classifier import create_model
from jaxcls.models.resnet import make_apply
from jaxcls.parallel import batch_sharding, is_first_process, make_mesh, processes, put, replicated
from jaxcls.train.state import TrainState, init_state, to_devices, to_host
from jaxcls.train.step import make_eval_step, make_train_step

B, NUM_EVALUATED = 16, 21


class Run(NamedTuple):
    """What is trained, how often and how fast, and the number of the first batch."""

    dtype: Any
    batch_norm: str
    size: int
    num_steps: int
    rate: float
    first: int = 0


RUNS = {
    # Rounding puts one of 3 million activations across a ReLU's or a pool's edge now and then. That changes
    # the gradients by up to 1 %, and the losses of small steps by nothing.
    "losses in float32": Run(jnp.float32, "train", 64, 5, 1e-5),
    # With stored statistics an image's activations do not depend on the others. In batch 0 one of them
    # crosses a ReLU's edge all the same, in 1, 2 and 3 none.
    "gradients in float32": Run(jnp.float32, "frozen", 64, 1, 1e-5, first=1),
    # XLA's float64 convolutions are slow on CPU: smaller images.
    "all in float64": Run(jnp.float64, "train", 32, 20, 5e-4),
}


def make_optimizer(rate):
    """SGD, whose state is the last gradient."""
    return optax.chain(optax.trace(0.0), optax.scale(-rate))


def draw_batch(number, size, num_images=B):
    """Noise, a little redder for one class and bluer for the other."""
    generator = np.random.default_rng(number)
    labels = generator.integers(0, 2, num_images).astype(np.int32)
    images = generator.integers(0, 216, (num_images, size, size, 3), np.uint8)
    images[np.arange(num_images), :, :, 2 * labels] += 40
    return images, labels


def train(run, mesh):
    """The losses of all steps, the first gradients, and an evaluation's counts, its last batch ragged."""
    dtype, batch_norm, size, num_steps, rate, first = run
    optimizer = make_optimizer(rate)
    backbone = create_model("resnet18", 2, image_size=size).backbone
    start = to_host(init_state(backbone, 2, optimizer, seed=0, use_ema=False))
    start = jax.tree.map(lambda array: array.astype(dtype) if array.dtype == np.float32 else array, start)
    state: TrainState = to_devices(start, replicated(mesh))
    apply = make_apply("resnet18", dtype=dtype, batch_norm=batch_norm)
    options = {"dropout": 0.0, "label_smoothing": 0.0, "weights": None, "ema_decay": None}
    step = make_train_step(apply, backbone.preprocess, optimizer, mesh, **options)
    losses, gradients = [], None
    for number in range(first, first + num_steps):
        state, sums = step(state, *put(draw_batch(number, size), batch_sharding(mesh)))
        losses.append(float(sums.loss) / B)
        if gradients is None:
            gradients = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(state.opt_state)]

    evaluate = make_eval_step(apply, backbone.preprocess, mesh)
    images, labels = draw_batch(first + num_steps, size, 2 * B)
    mask = np.arange(2 * B) < NUM_EVALUATED
    counts = []
    for rows in (slice(0, B), slice(B, 2 * B)):
        batch = put((images[rows], labels[rows], mask[rows]), batch_sharding(mesh))
        sums = evaluate(state.params, state.batch_stats, *batch)
        counts.append((int(sums.num_correct), int(sums.num_seen)))
    return np.asarray(losses), np.concatenate(gradients), np.asarray(counts)


def main(path):
    """Do all runs."""
    with processes() if "JAX_NUM_PROCESSES" in os.environ else nullcontext():
        if expected := os.environ.get("JAX_NUM_PROCESSES"):
            assert jax.process_count() == int(expected)
        mesh = make_mesh(B, across_processes=True)
        assert mesh.size == jax.device_count()
        results = {}
        for name, run in RUNS.items():
            with jax.enable_x64(run.dtype == jnp.float64):
                losses, gradients, counts = train(run, mesh)
            results |= {f"{name}: losses": losses, f"{name}: gradients": gradients, f"{name}: counts": counts}
        if is_first_process():
            np.savez(path, **results)


if __name__ == "__main__":
    main(sys.argv[1])

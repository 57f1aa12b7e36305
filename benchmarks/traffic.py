"""What programs read and write on a GPU, for each image: compiled for an NVIDIA H200, none is needed.

    pip install "jax-cuda13-plugin==$(python -c 'import jax; print(jax.__version__)')"
    pip install "nvidia-cuda-nvcc==13.0.*" "nvidia-nvvm==13.0.*"
    JAX_PLATFORMS=cpu python -m benchmarks.traffic [--depth 50] [--batch-size 256] [--out FOLDER]

XLA fuses, lays out and rewrites for a device from a description of it, and the optimized program says what
each kernel and library call reads and writes. Caches may serve some of it; nothing is timed. Without the
device nothing is tuned on it either: which of a library's kernels runs is not known.
"""

import argparse
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from benchmarks import textbook
from benchmarks.hlo import Instruction, instructions
from benchmarks.programs import NUM_CLASSES
from benchmarks.results import FOLDER, Results
from experiments.recording import conditions
from jaxcls.classifier import create_model
from jaxcls.models.resnet import make_apply
from jaxcls.parallel import DATA_AXIS, batch_sharding, replicated
from jaxcls.train.config import BatchNorm, FinetuneConfig
from jaxcls.train.optimizer import make_optimizer, make_schedule
from jaxcls.train.state import init_state
from jaxcls.train.step import make_train_step

DEPTHS = (18, 34, 50, 101, 152)
# What XLA asks of a device, by NVIDIA's data sheet and its programming guide for compute capability 9.0.
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000
  device_memory_size: 151397597184
  l2_cache_size: 52428800
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""


class Size(NamedTuple):
    """Of a program."""

    depth: int
    batch_size: int
    image_size: int

    @property
    def images(self) -> jax.ShapeDtypeStruct:
        """uint8 [B, size, size, 3]."""
        return jax.ShapeDtypeStruct((self.batch_size, self.image_size, self.image_size, 3), np.uint8)

    @property
    def labels(self) -> jax.ShapeDtypeStruct:
        """int32 [B]."""
        return jax.ShapeDtypeStruct((self.batch_size,), np.int32)


def train(size: Size, mesh: Mesh, batch_norm: BatchNorm = "train") -> jax.stages.Lowered:
    """The step of `finetune` in bfloat16."""
    config = FinetuneConfig(learning_rates=(0.01,), batch_norm=batch_norm)
    optimizer = make_optimizer(config, make_schedule(config, steps_per_epoch=100))
    model = create_model(f"resnet{size.depth}", NUM_CLASSES, image_size=size.image_size)
    step = make_train_step(
        make_apply(model.backbone.architecture, dtype=jnp.bfloat16, batch_norm=batch_norm),
        model.preprocess,
        optimizer,
        mesh,
        dropout=config.dropout,
        label_smoothing=config.label_smoothing,
        weights=None,
        ema_decay=None,
    )
    state = jax.eval_shape(partial(init_state, model.backbone, NUM_CLASSES, optimizer, seed=0, use_ema=False))
    return step.lower(state, size.images, size.labels)


def score(size: Size, mesh: Mesh) -> jax.stages.Lowered:
    """The program of `make_scorer` in bfloat16."""
    model = create_model(f"resnet{size.depth}", NUM_CLASSES, image_size=size.image_size)
    weights = jax.tree.map(jax.typeof, model.folded_weights("bfloat16"))
    shardings = replicated(mesh), batch_sharding(mesh)
    program = jax.jit(model.forward, in_shardings=shardings, out_shardings=batch_sharding(mesh))
    return program.lower(weights, size.images)


def train_textbook(size: Size, mesh: Mesh) -> jax.stages.Lowered:
    """The step of the textbook's network in bfloat16."""
    network, optimizer = textbook.ResNet(size.depth, jnp.bfloat16), textbook.make_optimizer()
    state = jax.eval_shape(partial(textbook.init_state, network, optimizer), size.images)
    whole = replicated(mesh)
    step = jax.jit(textbook.make_step(network, optimizer), donate_argnums=0, in_shardings=whole)
    return step.lower(state, size.images, size.labels)


def score_textbook(size: Size, mesh: Mesh) -> jax.stages.Lowered:
    """The textbook's network in bfloat16, its batch norm unfolded."""
    network, optimizer = textbook.ResNet(size.depth, jnp.bfloat16), textbook.make_optimizer()
    _, params, statistics, _ = jax.eval_shape(partial(textbook.init_state, network, optimizer), size.images)
    program = jax.jit(partial(textbook.apply_unfolded, network), in_shardings=replicated(mesh))
    return program.lower({"params": params, "batch_stats": statistics}, size.images)


PROGRAMS: Mapping[tuple[str, str], Callable[[Size, Mesh], jax.stages.Lowered]] = {
    ("train", "jaxcls"): train,
    ("train", "flax-jit-bfloat16"): train_textbook,
    ("train_frozen", "jaxcls"): partial(train, batch_norm="frozen"),
    ("score", "jaxcls"): score,
    ("score", "flax-jit-bfloat16"): score_textbook,
}


def describe(compiled: jax.stages.Compiled, batch_size: int) -> dict[str, Any]:
    """Megabytes an image in all and by kind, how many kernels and calls, and what should not be there."""
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    run = instructions(text)
    moved: Counter[str] = Counter()
    for one in run:
        moved[_kind(one)] += one.num_bytes * one.times
    return {
        "megabytes_per_image": sum(moved.values()) / batch_size / 1e6,
        "by_kind": {kind: total / batch_size / 1e6 for kind, total in moved.most_common()},
        "num_kernels": sum(one.times for one in run),
        "float32_convolutions": sum(_kind(one) == "convolution" and "(f32[" in one.shape for one in run),
        "scatters": len(re.findall(r"ROOT \S+ = \S+ scatter\(", text)),
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def _kind(instruction: Instruction) -> str:
    if "$conv" in instruction.target:
        return "convolution"
    if instruction.target:
        return "library call"
    return instruction.operation


def main() -> None:
    """Compile every program at every depth, and write a row for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", nargs="+", type=int, choices=DEPTHS, default=DEPTHS)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--out", type=Path, default=FOLDER, help="a folder; default: benchmarks/results")
    arguments = parser.parse_args()
    try:
        topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H200)
    except NotImplementedError:
        parser.error("jax-cuda13-plugin is not installed, or does not suit this JAX; --help says how")
    mesh = Mesh(np.asarray(topology.devices), (DATA_AXIS,))
    machine = {"conditions": {**conditions(), "compiled_for": mesh.devices.flat[0].device_kind}}
    results = Results(arguments.out / "traffic_h200.json", machine)
    for depth in arguments.depth:
        size = Size(depth, arguments.batch_size, arguments.image_size)
        for (work, subject), lower in PROGRAMS.items():
            row = describe(lower(size, mesh).compile(), size.batch_size)
            results.put({"benchmark": "traffic", "work": work, "subject": subject, **size._asdict(), **row})
            print(f"{work} {subject} resnet{depth}: {row['megabytes_per_image']:.1f} MB an image", flush=True)


if __name__ == "__main__":
    main()

"""Which lowering of each convolution of a ResNet is fastest here: the evidence for `models.convolution`.

    python -m benchmarks.convolution [--architecture resnet50] [--batch-size 16] [--image-size 224]

One JSON line for every distinct shape and pass: milliseconds (the least of several runs) of XLA's
convolution and of a matrix product over patches, each compiled as XLA does by itself and with
`compiler_options`, and forward also of our sum of bfloat16 products; the last line is the gradient of
the max pool. `gflop` over the time is the rate to compare with the machine's matrix products.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcls.models.architecture import ARCHITECTURES, BOTTLENECK_EXPANSION, STEM_FEATURES
from jaxcls.models.convolution import compiler_options, convolve, max_pool

NUM_RUNS = 5


class Shape(NamedTuple):
    """A square convolution of [B, resolution, resolution, inputs]."""

    size: int
    stride: int
    resolution: int
    inputs: int
    features: int


def distinct_shapes(architecture: str, image_size: int) -> list[Shape]:
    """The convolutions of a ResNet, each shape once, in order."""
    return list(dict.fromkeys(_shapes(architecture, image_size)))


def _shapes(architecture: str, image_size: int) -> Iterator[Shape]:
    bottleneck = ARCHITECTURES[architecture].bottleneck
    yield Shape(7, 2, image_size, 3, STEM_FEATURES)
    resolution, inputs = image_size // 4, STEM_FEATURES
    for stage, num_blocks in enumerate(ARCHITECTURES[architecture].stage_sizes):
        width = STEM_FEATURES * 2**stage
        features = width * BOTTLENECK_EXPANSION if bottleneck else width
        for block in range(num_blocks):
            stride = 2 if stage and not block else 1
            if bottleneck:
                yield Shape(1, 1, resolution, inputs, width)
            yield Shape(3, stride, resolution, width if bottleneck else inputs, width)
            if stride == 2 or inputs != features:
                yield Shape(1, stride, resolution, inputs, features)
            resolution //= stride
            yield (
                Shape(1, 1, resolution, width, features)
                if bottleneck
                else Shape(3, 1, resolution, width, width)
            )
            inputs = features


def convolution(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """XLA's own."""
    around = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), ((around, around),) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def product(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """The patches under the kernel side by side, then one matrix product; of 1x1 kernels that alone."""
    size, around = kernel.shape[0], kernel.shape[0] // 2
    height, width = ((extent - 1) // stride + 1 for extent in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (around, around), (around, around), (0, 0)))
    patches = [x[:, i::stride, j::stride][:, :height, :width] for i in range(size) for j in range(size)]
    flat = kernel.reshape(-1, kernel.shape[-1])
    return lax.dot_general(jnp.concatenate(patches, axis=-1), flat, (((3,), (0,)), ((), ())))


def bfloat16_products(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Ours, with the kernel in bfloat16."""
    return convolve(x, kernel.astype(jnp.bfloat16), stride=stride, padding=kernel.shape[0] // 2)


def passes(function: Callable[..., jax.Array]) -> dict[str, Callable[..., Any]]:
    """The value and each gradient, of (x, kernel, gradient of the value)."""
    return {
        "forward": lambda x, kernel, gradient: function(x, kernel),
        "input gradient": lambda x, kernel, gradient: jax.vjp(lambda x: function(x, kernel), x)[1](gradient),
        "kernel gradient": lambda x, kernel, gradient: jax.vjp(lambda k: function(x, k), kernel)[1](gradient),
    }


def least_ms(programs: dict[str, Any], operands: tuple[Any, ...]) -> dict[str, float]:
    """The least time of each compiled program in milliseconds, run in turns."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for run in range(NUM_RUNS + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*operands))
            if run:  # the first one warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(min(values), 2) for name, values in times.items()}


def compiled(functions: dict[str, Callable[..., Any]], operands: tuple[Any, ...]) -> dict[str, Any]:
    """Each function compiled as XLA does by itself and, where this platform has any, with our options."""
    options = compiler_options(jax.default_backend())
    programs = {}
    for name, function in functions.items():
        lowered = jax.jit(function).lower(*operands)
        programs[name] = lowered.compile()
        if options:
            programs[f"{name}, with options"] = lowered.compile(compiler_options=options)
    return programs


def main() -> None:
    """Print one line for each shape and pass."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="resnet50")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    arguments = parser.parse_args()
    draw = partial(np.random.default_rng(0).standard_normal, dtype=np.float32)
    device = jax.devices()[0].device_kind
    for shape in distinct_shapes(arguments.architecture, arguments.image_size):
        size, stride, resolution, inputs, features = shape
        output = (resolution - 1) // stride + 1
        operands = jax.device_put(
            (
                draw((arguments.batch_size, resolution, resolution, inputs)),
                draw((size, size, inputs, features)),
                draw((arguments.batch_size, output, output, features)),
            )
        )
        gflop = 2e-9 * operands[2].size * size * size * inputs
        lowerings = {f.__name__: passes(partial(f, stride=stride)) for f in (convolution, product)}
        ours = partial(bfloat16_products, stride=stride)
        lowerings[bfloat16_products.__name__] = {"forward": passes(ours)["forward"]}
        for name in lowerings["convolution"]:
            functions = {key: value[name] for key, value in lowerings.items() if name in value}
            programs = compiled(functions, operands)
            row = {"device": device, **shape._asdict(), "pass": name, "gflop": round(gflop, 3)}
            print(json.dumps({**row, "ms": least_ms(programs, operands)}), flush=True)

    x = draw((arguments.batch_size, arguments.image_size // 2, arguments.image_size // 2, STEM_FEATURES))
    window = partial(
        lax.reduce_window,
        init_value=-jnp.inf,
        computation=lax.max,
        window_dimensions=(1, 3, 3, 1),
        window_strides=(1, 2, 2, 1),
        padding=((0, 0), (1, 1), (1, 1), (0, 0)),
    )
    operands = jax.device_put((x, np.asarray(window(x))))
    pools = {
        name: lambda x, gradient, pool=pool: jax.vjp(pool, x)[1](gradient)
        for name, pool in {"select and scatter": window, "max_pool": max_pool}.items()
    }
    print(
        json.dumps(
            {"device": device, "pass": "max pool", "ms": least_ms(compiled(pools, operands), operands)}
        )
    )


if __name__ == "__main__":
    main()

"""Scoring as a file: `jax.export` programs, each lowered for one platform, the weights being arguments."""

from collections.abc import Callable
from typing import Any

import jax
import jax.export
import numpy as np

from jaxcls.models.convolution import compiler_options
from jaxcls.models.fold import is_bfloat16

Program = Callable[[Any, Any], jax.Array]


def serialize_program(forward: Program, weights: Any, image_size: int, platform: str) -> bytes:
    """Lower a function for a platform, which need not be at hand.

    Args:
        forward: `(weights, images uint8 [B, image_size, image_size, 3]) -> float32 [B, K]`.
        weights: a tree of arrays, of which only shapes and dtypes are used.
        image_size: in pixels. B stays symbolic: the program runs for any B of at least 1.
        platform: as JAX names it, such as "cpu" or "cuda".
    """
    arguments = _abstract_arguments(weights, image_size)
    return bytes(jax.export.export(jax.jit(forward), platforms=(platform,))(*arguments).serialize())


def deserialize_program(data: bytes, weights: Any, image_size: int, platform: str) -> Program:
    """The function in `serialize_program`'s bytes. It is compiled for each B at first use.

    Raises:
        ValueError: these bytes are no program that this JAX reads, or one for another platform or for
            weights or images of another shape.
    """
    try:
        exported = jax.export.deserialize(bytearray(data))
    except Exception as error:  # the format has no error of its own: any kind escapes
        raise ValueError(f"jax {jax.__version__} cannot read it ({error})") from error
    arguments, keywords = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    if keywords or _signature(arguments) != _signature(_abstract_arguments(weights, image_size)):
        raise ValueError("it takes other weights or images")
    if exported.platforms != (platform,):
        raise ValueError(f"it is for {', '.join(exported.platforms)}")
    options = compiler_options(platform, bfloat16_kernels=is_bfloat16(weights))
    return jax.jit(exported.call, compiler_options=options)


def _abstract_arguments(weights: Any, image_size: int) -> tuple[Any, jax.ShapeDtypeStruct]:
    shape = jax.export.symbolic_shape(f"B, {image_size}, {image_size}, 3")
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weights)
    return abstract, jax.ShapeDtypeStruct(shape, np.uint8)


def _signature(arguments: Any) -> list[str]:
    # As text: symbols of two programs are never equal, and comparing them is an error.
    leaves = jax.tree.leaves_with_path(arguments)
    return [f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}" for path, leaf in leaves]

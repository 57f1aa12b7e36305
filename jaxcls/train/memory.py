"""What a training step takes of a device's memory, foreseen by XLA or found out by failing; its parts."""

import jax

from jaxcls.errors import TrainingError
from jaxcls.progress import format_bytes


def needed_bytes(compiled: jax.stages.Compiled) -> int:
    """What running a program takes on each device: its arguments, its results and what lies between."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return 0
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )


def is_exhausted(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether a program failed for lack of memory."""
    return "RESOURCE_EXHAUSTED" in str(error)


def divide_further(num_parts: int, batch_size: int, num_devices: int, reason: str) -> int:
    """Twice as many parts of a batch.

    Raises:
        TrainingError: the images of a device cannot be divided so; the reason to divide them comes first.
    """
    num_parts *= 2
    if batch_size // num_devices % num_parts:
        raise TrainingError(
            f"{reason}, and {batch_size} images on {num_devices} devices cannot be divided "
            f"into {num_parts} parts: train smaller images, a smaller network or smaller batches"
        )
    return num_parts


def describe_parts(num_parts: int, batch_size: int, *, is_normalised: bool) -> str:
    """What dividing the batch changes, for the user."""
    effect = (
        "batch norm sees the images of one part at a time, so that results differ from those of whole batches"
        if is_normalised
        else "the results differ in their last digits alone"
    )
    return f"{num_parts} parts of {batch_size // num_parts} images, their gradients added up; {effect}"


def describe_shortage(needed: int, limit: int) -> str:
    """That a step will not fit."""
    return f"A step would take {format_bytes(needed)} of the {format_bytes(limit)} of each device"

"""JAX programs to time, whoever wrote the step: compiled ahead, their cost and memory read off."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.programs import Scoring
from benchmarks.timing import Program, SubjectError
from benchmarks.worker import Task


def compile_with_details(jitted: Any, *arguments: Any, num_devices: int = 1) -> tuple[Any, dict[str, Any]]:
    """A compiled program, with the seconds that took and what `details_of` says."""
    start = time.perf_counter()
    lowered = jitted.lower(*arguments)
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    return compiled, {"compile_seconds": seconds, **details_of(lowered, compiled, num_devices)}


def details_of(lowered: Any, compiled: Any, num_devices: int) -> dict[str, Any]:
    """FLOPs, bytes and memory of one execution on one device, as XLA counts them.

    The FLOPs are those of the program before compilation, divided among the `num_devices` that it is split
    over: a compiled one counts what fusions do twice, and nothing for a call into a library.
    """
    before, after = lowered.cost_analysis() or {}, compiled.cost_analysis() or {}
    return {
        "flops": before.get("flops", 0.0) / num_devices,
        "bytes": after.get("bytes accessed", 0.0),
        "memory": memory_of(compiled),
    }


def first_run(make_program: Callable[[Task], Program], task: Task) -> dict[str, Any]:
    """Make a program and run one step of it, keeping every compiled program in the cache.

    The time to remember is that of the whole process, which the parent measures.
    """
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    program = make_program(task)
    return {"step_seconds": program.time(1), **program.details}


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes on one device, by XLA's own account."""
    analysis = compiled.memory_analysis()
    fields = ("argument", "output", "alias", "temp")
    sizes = {name: getattr(analysis, f"{name}_size_in_bytes", 0) for name in fields}
    return {**sizes, "peak": getattr(analysis, "peak_memory_in_bytes", 0)}


class JaxTraining(Program):
    """Steps `(state, *batch) -> (state, loss)` on batches that are on the device already.

    Args:
        step: may donate its state.
        state: the first one.
        batches: taken in turn.
        step_of: the number of steps that a state says it has behind it.
        weights_of: an array of a state that every step changes.
        images_per_step: B.
        details: for the row.
    """

    def __init__(
        self,
        step: Callable[..., tuple[Any, Any]],
        state: Any,
        batches: Sequence[tuple[Any, ...]],
        *,
        step_of: Callable[[Any], Any],
        weights_of: Callable[[Any], Any],
        images_per_step: int,
        details: dict[str, Any],
    ) -> None:
        self._step, self._state, self._batches = step, state, batches
        self._step_of, self._weights_of = step_of, weights_of
        self._weights = np.array(weights_of(state))  # a copy: steps may donate what it views
        self.images_per_step, self.details = images_per_step, details
        self._losses: list[Any] = []

    def run(self, num_steps: int) -> None:
        """Run the steps, one dispatch after another, and wait for the last state."""
        for number in range(num_steps):
            self._state, loss = self._step(self._state, *self._batches[number % len(self._batches)])
            self._losses.append(loss)
        jax.block_until_ready((self._state, self._losses))

    def num_executed(self) -> int:
        """The state's own counter, once the weights have moved and the losses are finite."""
        weights = np.array(self._weights_of(self._state))
        if self._losses:
            if not np.isfinite(loss := np.asarray(self._losses[-1])).all():
                raise SubjectError(f"the loss is {loss}")
            if np.array_equal(weights, self._weights):
                raise SubjectError("the weights are the same after the steps as before")
        self._weights, self._losses = weights, []
        return int(np.ravel(self._step_of(self._state))[0])


class JaxScoring(Scoring):
    """A compiled JAX function of images on the device; results stay there."""

    def __init__(
        self,
        score: Callable[[Any], Any],
        inputs: Sequence[Any],
        images_per_step: int,
        details: dict[str, Any],
    ) -> None:
        super().__init__(
            score,
            inputs,
            finish=jax.block_until_ready,
            to_host=lambda result: np.asarray(result, np.float32),
            images_per_step=images_per_step,
            details=details,
        )


class JaxFeatures(JaxScoring):
    """The same, with every result copied to the host while the next one is computed."""

    def run(self, num_steps: int) -> None:
        """Keep one call under way while the result before it is copied."""
        results: list[Any] = []
        under_way: Any = None
        for number in range(num_steps):
            started = self._score(self._inputs[number % len(self._inputs)])
            if under_way is not None:
                results.append(np.asarray(under_way))
            under_way = started
        if under_way is not None:
            results.append(np.asarray(under_way))
        self._results = results

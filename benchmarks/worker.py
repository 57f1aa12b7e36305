"""One subject in a process of its own: its threads, device memory and flags disturb no other.

Parent and child speak JSON lines over pipes: a task, its details when it is ready, then steps and seconds.
"""

import json
import os
import select
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Self

from benchmarks.timing import Program, SubjectError

TIMEOUT_SECONDS = 900.0
END_SECONDS = 5.0


@dataclass(frozen=True)
class Task:
    """What a worker does. Everything in it is part of the row's identity.

    Attributes:
        work: "train", "score", ...: a function of the subject's module.
        subject: who does it: "jaxcls", "flax-jit-float32", "torch-compile-bfloat16", ...
        depth: of the ResNet.
        batch_size: images per step.
        image_size: of the network's input, in pixels.
        photo_side: the longer side of the photos, in pixels, where there are photos.
        features: what an SVM is fitted to, "random" or "correlated".
        num_features: D.
        num_classes: K.
    """

    work: str
    subject: str
    depth: int = 0
    batch_size: int = 0
    image_size: int = 0
    photo_side: int = 0
    features: str = ""
    num_features: int = 0
    num_classes: int = 0


class Worker:
    """A task in a child process. A context manager: leaving it ends the child.

    Attributes:
        details: what the child answered when it was ready.
        setup_seconds: from starting the process to that answer.
    """

    def __init__(
        self,
        task: Task,
        *,
        environment: Mapping[str, str] | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(asdict(task))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Several processes share an accelerator: none may take all of its memory at the start.
            env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **(environment or {})},
            text=True,
        )
        try:
            self.details: dict[str, Any] = self._answer(timeout_seconds)
        except BaseException:
            self.close()
            raise
        self.setup_seconds = time.perf_counter() - started

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def time(self, num_steps: int) -> float:
        """Seconds of `num_steps` steps, by the child's clock.

        Raises:
            SubjectError: the child failed, or did another number of steps.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # its answer says why
            self._process.stdin.write(f"{num_steps}\n")
            self._process.stdin.flush()
        return self._answer(TIMEOUT_SECONDS)["seconds"]

    def close(self) -> None:
        """End the child, and wait for its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()  # the child's last request
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _answer(self, timeout_seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], max(timeout_seconds, 0.0))[0]:
            self._process.kill()
            raise SubjectError(f"left out: not ready within {timeout_seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise SubjectError(f"its process ended with code {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise SubjectError(answer["error"])
        return answer


def ask(
    task: Task, *, environment: Mapping[str, str] | None = None, timeout_seconds: float = TIMEOUT_SECONDS
) -> dict[str, Any]:
    """The answer to a task that is one question.

    Raises:
        SubjectError: the child failed.
    """
    with Worker(task, environment=environment, timeout_seconds=timeout_seconds) as worker:
        return worker.details


def describe(error: Exception) -> str:
    """One line for a row."""
    if isinstance(error, SubjectError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"skipped: needs {error.name}, which cannot be imported here"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def main() -> None:
    """Do the task that the command line holds."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(values: Mapping[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        from benchmarks.peers import start

        started = start(Task(**json.loads(sys.argv[1])))
        if not isinstance(started, Program):
            answer(started)
            return
        answer({"images_per_step": started.images_per_step, **started.details})
        for line in sys.stdin:
            answer({"seconds": started.time(int(line))})
    except Exception as error:  # of any kind: what ends a subject is the note of its row
        answer({"error": describe(error)})
        if not isinstance(error, ModuleNotFoundError | SubjectError):
            traceback.print_exc()


if __name__ == "__main__":
    main()

"""Who is measured: jaxcls, and what a user would pick instead. A name is FRAMEWORK[-SETTING...]."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from benchmarks.timing import Program, SubjectError
from benchmarks.worker import Task

OURS = "jaxcls"

# Each module has a function for every kind of work that its framework can do.
MODULES = {
    OURS: "benchmarks.subjects",
    "flax": "benchmarks.textbook",
    "torch": "benchmarks.torch_peers",
    "dataloader": "benchmarks.dataloader",
    "grain": "benchmarks.grain_peer",
    "tfdata": "benchmarks.tfdata_peer",
    "sklearn": "benchmarks.sklearn_peer",
    "machine": "benchmarks.machine",
}

# Work -> platform -> subjects. torch is channels_last unless it says contiguous.
DEFAULTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "train": {
        "cpu": (
            OURS,
            "torch-eager-float32",
            "torch-compile-float32",
            "torch-eager-bfloat16",
            "flax-jit-float32",
        ),
        "gpu": (
            OURS,
            "torch-eager-bfloat16",
            "flax-jit-bfloat16",
            "torch-compile-bfloat16",
            "flax-pmap-bfloat16",
        ),
    },
    "score": {
        "cpu": (
            OURS,
            f"{OURS}-float32",
            "torch-compile-float32",
            "torch-eager-float32",
            "torch-eager-bfloat16",
            "flax-jit-float32",
        ),
        "gpu": (
            OURS,
            "torch-compile-bfloat16",
            "torch-eager-bfloat16",
            "flax-jit-bfloat16",
            "torch-maxautotune-bfloat16",
        ),
    },
    # With so many processes that read; "max": one a core.
    "input_pipeline": dict.fromkeys(
        ("cpu", "gpu"),
        (
            "jaxcls-0",
            "jaxcls-1",
            "jaxcls-max",
            "dataloader-0",
            "dataloader-1",
            "dataloader-max",
            "grain-0",
            "grain-max",
            "tfdata",
        ),
    ),
    "svm": dict.fromkeys(("cpu", "gpu"), (OURS, "sklearn")),
    "first_step": {
        "cpu": (OURS, "flax-jit-float32"),
        "gpu": (OURS, "flax-jit-bfloat16"),
    },
    "first_score": {
        "cpu": (OURS, "flax-jit-float32", "torch-eager-float32"),
        "gpu": (OURS, "flax-jit-bfloat16", "torch-eager-bfloat16", "torch-compile-bfloat16"),
    },
}

# The same, for the first depth only: on two cores each takes minutes.
FIRST_DEPTH: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("train", "cpu"): ("torch-eager-float32-contiguous", "flax-pmap-float32"),
    ("score", "cpu"): ("torch-eager-float32-contiguous", "torch-compile-bfloat16"),
}


def framework_of(subject: str) -> str:
    """The first part of a subject's name."""
    return subject.partition("-")[0]


def start(task: Task) -> Program | dict[str, Any]:
    """The program that a task asks for, ready to be timed, or the answer where the task is a question."""
    begin = getattr(import_module(MODULES[framework_of(task.subject)]), task.work, None)
    if begin is None:
        raise SubjectError(f"left out: {task.subject} is not measured at {task.work}")
    return begin(task)

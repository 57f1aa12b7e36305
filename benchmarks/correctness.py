"""Before speed: scores on this device against float32 on CPU, and losses in bfloat16 against float32."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks.peers import OURS
from benchmarks.session import Session, main

REFERENCE = f"{OURS}-float32"
COMPARED = (OURS, f"{OURS}-bfloat16")
DEPTH = 50
NUM_IMAGES = 16
CPU_CURVE_SIZE = 64  # 50 steps of ResNet-50 at 224 px take minutes on a CPU


def run(session: Session) -> None:
    """Logits, then loss curves."""
    session = session.at(DEPTH)
    compare_logits(session)
    compare_losses(session)


def compare_logits(session: Session) -> None:
    """The largest difference of any logit, relative to the largest logit."""
    batch_size = min(NUM_IMAGES, session.task("logits", OURS).batch_size)
    for (reference,) in session.tasks("logits", [REFERENCE], batch_size=batch_size):
        expected = session.ask(
            "correctness", reference, environment={"JAX_PLATFORMS": "cpu"}, keep=lambda _: {"device": "cpu"}
        )
        if expected is not None:
            for subject in COMPARED:
                task = replace(reference, subject=subject)
                session.ask("correctness", task, keep=partial(_difference, expected, "logits"))


def compare_losses(session: Session) -> None:
    """The largest difference of the losses of 50 steps, relative to the loss in float32."""
    on_cpu = session.platform == "cpu"
    size = min(session.settings.image_size, CPU_CURVE_SIZE) if on_cpu else session.settings.image_size
    for (reference,) in session.tasks("loss_curve", [REFERENCE], image_size=size):
        expected = session.ask("correctness", reference)
        if expected is not None:
            for subject in COMPARED:
                task = replace(reference, subject=subject)
                session.ask("correctness", task, keep=partial(_difference, expected, "losses"))


def _difference(expected: dict[str, Any], name: str, found: dict[str, Any]) -> dict[str, Any]:
    values, reference = np.asarray(found[name]), np.asarray(expected[name])
    if name == "logits":
        difference = np.abs(values - reference).max() / np.abs(reference).max()
        return {"dtype": found["dtype"], "relative_difference": float(difference)}
    difference = np.abs(values - reference) / np.abs(reference)
    return {**found, "relative_difference": float(difference.max())}


if __name__ == "__main__":
    main("correctness", run, __doc__)

"""What a GPU machine should answer, in stages of at most 8 minutes, a result file for each.

    pip install --no-deps --no-build-isolation -e .
    python -m benchmarks.gpu first --out FOLDER
    python -m benchmarks.gpu all --out FOLDER

A row is written as soon as there is one, a comparison's after every round. Besides JAX, Flax,
Optax, NumPy, Pillow and safetensors nothing has to be there: a row that needs more (torch, Grain,
scikit-learn) says so instead of figures.
"""

import argparse
import math
from collections.abc import Callable, Mapping

from benchmarks import (
    correctness,
    features,
    input_pipeline,
    memory,
    short_run,
    startup,
    svm,
    train_end_to_end,
)
from benchmarks.session import Session, Settings, parse

STAGE_SECONDS = 450.0
FEW = ("jaxcls", "torch-eager-bfloat16", "torch-compile-bfloat16")


def first(session: Session) -> None:
    """ResNet-50: scores against the CPU's, training and scoring against all peers, loss curves."""
    at50 = session.at(50)
    correctness.compare_logits(at50)
    _compare(at50, "train_step", "train", seconds=0.5 * at50.seconds_left)
    _compare(at50, "score", "score", seconds=0.8 * at50.seconds_left)
    correctness.compare_losses(at50)


def train_small(session: Session) -> None:
    """Training ResNet-18 and -34."""
    for depth in (18, 34):
        _compare(session.at(depth), "train_step", "train", FEW)


def train_large(session: Session) -> None:
    """Training ResNet-101 and -152."""
    for depth in (101, 152):
        _compare(session.at(depth), "train_step", "train", FEW, seconds=session.seconds_left * 0.55)


def score_depths(session: Session) -> None:
    """Scoring the other four depths."""
    for depth in (18, 34, 101, 152):
        _compare(session.at(depth), "score", "score", FEW)


def whole(session: Session) -> None:
    """Features, training from files, the short run, and the input pipeline."""
    features.run(session.at(18, 50))
    train_end_to_end.run(session.at(50))
    short_run.run(session)
    input_pipeline.run(session)


def start(session: Session) -> None:
    """Start-up and memory."""
    startup.run(session.at(50))
    memory.run(session.at(50, 152))


def fit(session: Session) -> None:
    """Linear SVMs."""
    svm.run(session)


STAGES: Mapping[str, Callable[[Session], None]] = {
    stage.__name__.replace("_", "-"): stage
    for stage in (first, train_small, train_large, score_depths, whole, start, fit)
}


def _compare(
    session: Session, benchmark: str, work: str, subjects: tuple[str, ...] = (), *, seconds: float = math.inf
) -> None:
    for tasks in session.tasks(work, session.settings.peer or subjects or session.subjects(work)):
        session.compare(benchmark, tasks, seconds=seconds)


def main() -> None:
    """Run a stage, or all of them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=(*STAGES, "all"))
    arguments = parse(parser)
    for name in STAGES if arguments.stage == "all" else (arguments.stage,):
        STAGES[name](Session(Settings.of(arguments), name, seconds=STAGE_SECONDS))


if __name__ == "__main__":
    main()

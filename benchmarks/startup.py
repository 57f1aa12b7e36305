"""Seconds from the start of a process to its first training step and to its first score.

Each time in a new process: once with an empty folder of compiled programs (cold), then again and
again with what the first one left there (warm). We score with a classifier that was saved before, as users
do; the peers, with random weights that they make.
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.peers import OURS
from benchmarks.programs import SAVED_CLASSIFIER
from benchmarks.session import Session, main
from benchmarks.timing import SubjectError
from benchmarks.worker import TIMEOUT_SECONDS, Task, Worker, ask
from experiments.recording import spread

DEPTH = 50
WORKS = ("first_score", "first_step")


def run(session: Session) -> None:
    """For each subject a cold start, and as many warm ones as there are rounds."""
    session = session.at(DEPTH)
    for work in WORKS:
        for tasks in session.tasks(work, session.subjects(work)):
            for task in tasks:
                _starts(session, task)


def _starts(session: Session, task: Task) -> None:
    with TemporaryDirectory() as folder:
        kept = Path(folder)
        if task.work == "first_score" and task.subject == OURS:
            ask(replace(task, work="save"), environment=_environment(kept))
        cold = _start(session, task, kept)
        session.put("startup", task, {"cache": "cold", **cold})
        if "note" in cold:
            return
        warm = [_start(session, task, kept) for _ in range(session.settings.rounds)]
        notes = [start for start in warm if "note" in start]
        seconds = [start["seconds"] for start in warm if "seconds" in start]
        summary = {"seconds": spread(seconds)["median"], "starts": spread(seconds)} if seconds else {}
        session.put("startup", task, {**warm[0], "cache": "warm", **summary, **(notes[0] if notes else {})})


def _start(session: Session, task: Task, kept: Path) -> dict[str, Any]:
    """One start: what the process says of it, and its seconds."""
    environment = {
        **_environment(kept),
        "JAX_COMPILATION_CACHE_DIR": str(kept / "jax"),
        "TORCHINDUCTOR_CACHE_DIR": str(kept / "torch"),
    }
    try:
        with Worker(
            task, environment=environment, timeout_seconds=min(session.seconds_left, TIMEOUT_SECONDS)
        ) as worker:
            return {**worker.details, "seconds": worker.setup_seconds}
    except SubjectError as error:
        return {"note": str(error)}


def _environment(kept: Path) -> dict[str, str]:
    return {SAVED_CLASSIFIER: str(kept / "classifier")}


if __name__ == "__main__":
    main("startup", run, __doc__)

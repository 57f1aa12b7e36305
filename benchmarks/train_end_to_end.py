"""`finetune` from JPEGs in files, next to the same step on batches that are on the device already."""

from dataclasses import replace

from benchmarks.peers import OURS
from benchmarks.session import Session, main

DEPTHS = {"cpu": 18, "gpu": 50}
PHOTO_SIDE = 500
ROUND_SECONDS = 6.0  # an epoch has to hold a few steps


def run(session: Session) -> None:
    """The step alone and the second epoch of `finetune`."""
    session = session.at(DEPTHS[session.platform])
    subjects = session.settings.peer or (OURS,)
    for tasks in session.tasks("train", subjects):
        whole = [replace(task, work="train_end_to_end", photo_side=PHOTO_SIDE) for task in tasks]
        session.compare("train_end_to_end", [*tasks, *whole], round_seconds=ROUND_SECONDS)


if __name__ == "__main__":
    main("train_end_to_end", run, __doc__)

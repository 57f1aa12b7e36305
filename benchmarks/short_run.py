"""AMLPCV's walk-through as a whole: `finetune` on 41 photos for 15 epochs, ResNet-18.

Next to it the training step alone at the same batch size, times the number of steps.
"""

from benchmarks.peers import OURS
from benchmarks.session import Session, main

DEPTH = 18
BATCH_SIZE = 32
PHOTO_SIDE = 640


def run(session: Session) -> None:
    """The step alone, then the whole run, its compilation included."""
    sizes = {"depth": DEPTH, "batch_size": 4 if session.settings.tiny else BATCH_SIZE}
    session.compare("short_run", [session.task("train", OURS, **sizes)])
    session.ask("short_run", session.task("short_run", OURS, photo_side=PHOTO_SIDE, **sizes))


if __name__ == "__main__":
    main("short_run", run, __doc__)

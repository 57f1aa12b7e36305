"""Images per second of training steps on batches that are on the device already."""

from benchmarks.session import Session, main


def run(session: Session) -> None:
    """A group for each depth."""
    for tasks in session.peers("train"):
        session.compare("train_step", tasks)


if __name__ == "__main__":
    main("train_step", run, __doc__)

"""Images per second of scoring images that are on the device already."""

from benchmarks.session import Session, main


def run(session: Session) -> None:
    """A group for each depth."""
    for tasks in session.peers("score"):
        session.compare("score", tasks)


if __name__ == "__main__":
    main("score", run, __doc__)

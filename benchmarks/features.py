"""Features, copied to the host, next to scores that stay on the device."""

from dataclasses import replace

from benchmarks.peers import OURS
from benchmarks.session import Session, main


def run(session: Session) -> None:
    """For each depth, the rate of scores, and of features with their copy."""
    for subjects in session.tasks("score", session.settings.peer or (OURS,)):
        session.compare(
            "features", [part for task in subjects for part in (task, replace(task, work="features"))]
        )


if __name__ == "__main__":
    main("features", run, __doc__)

"""What a training step and a scoring program will need on one device: arguments, temporaries, peak.

By XLA's `memory_analysis` of the compiled program; nothing is run.
"""

from dataclasses import replace

from benchmarks.peers import OURS
from benchmarks.session import Session, main

WORKS = ("memory_train", "memory_score")


def run(session: Session) -> None:
    """For each depth, at the batch size and at twice that."""
    for work in WORKS:
        for tasks in session.tasks(work, session.settings.peer or (OURS,)):
            for task in tasks:
                for times in (1, 2):
                    session.ask("memory", replace(task, batch_size=times * task.batch_size))


if __name__ == "__main__":
    main("memory", run, __doc__)

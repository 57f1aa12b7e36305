"""Seconds of a linear SVM's fit, and how near to the least objective it ends.

`gap` is the share of the objective by which that of the worst class exceeds a tight fit's, in float64;
`gap_at_most` bounds it without one. scikit-learn fits class after class: of many it fits one, and its seconds
are multiplied.
"""

from collections.abc import Iterable
from dataclasses import asdict, replace

import numpy as np

from benchmarks.peers import OURS
from benchmarks.session import Session, main
from benchmarks.worker import Task

SIZES = {"cpu": ((20_000, 2048, 10), (10_000, 512, 10)), "gpu": ((50_000, 2048, 100),)}
TINY_SIZE = (300, 16, 3)
IMAGENET_SIZE = (1_281_167, 2048, 1000)


def run(session: Session) -> None:
    """All sizes, on both kinds of features; on a GPU also as many photos as ImageNet has."""
    for size in (TINY_SIZE,) if session.settings.tiny else SIZES[session.platform]:
        for features in ("random", "correlated"):
            tasks = [_task(subject, features, size) for subject in session.subjects("svm")]
            least = session.ask("svm", replace(tasks[0], subject=f"{OURS}-tight"))
            session.compare("svm", tasks)
            _complete(session, tasks, least["objective"] if least else None)
    if session.platform == "gpu" and not session.settings.tiny:
        task = _task(OURS, "random", IMAGENET_SIZE)
        session.compare("svm", [task])
        _complete(session, [task])


def _task(subject: str, features: str, size: tuple[int, int, int]) -> Task:
    num_samples, num_features, num_classes = size
    return Task(
        "svm",
        subject,
        batch_size=num_samples,
        features=features,
        num_features=num_features,
        num_classes=num_classes,
    )


def _complete(session: Session, tasks: Iterable[Task], least: list[float] | None = None) -> None:
    """Add to the rows what follows from them."""
    for task in tasks:
        for row in session.results.find(benchmark="svm", **asdict(task)):
            if "images_per_second" not in row:
                continue
            row["seconds"] = task.batch_size / row["images_per_second"]["median"]
            if "num_products" in row:
                row["product_ms"] = 1000 * row["seconds"] / row["num_products"]
            if least is not None:
                found = np.asarray(row["objective"])
                row["gap"] = float((found / np.asarray(least)[: len(found)]).max() - 1)
            session.results.put(row)


if __name__ == "__main__":
    main("svm", run, __doc__)

"""Photos in files to scores: a Ray cluster on this machine, with 1 and 2 actors, next to one process.

One process decodes and scores with all cores; an actor scores with one core while tasks decode beside it.
Of a job on Ray the rate counts from each actor's first part on: a job starts its actors anew, which load JAX
and a program that was compiled before. That time is in `job_seconds`; a large set makes up for it.
"""

import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.photos import make_photos, scratch_folder
from benchmarks.programs import NUM_CLASSES
from benchmarks.session import Session, main
from benchmarks.timing import SubjectError
from experiments.recording import spread
from jaxcls.classifier import Classifier, create_model
from jaxcls.cluster import batch
from jaxcls.cluster.files import find_photos
from jaxcls.cluster.session import connected
from jaxcls.cluster.stages import BATCH_SIZE
from jaxcls.models.precision import Precision
from jaxcls.parallel import use_compilation_cache
from jaxcls.predictions import Predictions
from jaxcls.scoring import predict
from jaxcls.storage import Storage

NUM_PHOTOS, PHOTO_SIDE, SHARD_SIZE = 384, 500, BATCH_SIZE
NUM_TINY_PHOTOS, TINY_SHARD_SIZE = 64, 8
NUM_ACTORS = (1, 2)
PRECISION: Precision = "float32"  # "auto" differs: of workers on CPUs it is float32, whatever the CPU

Rate = tuple[float, float]
"""Images a second, and seconds of the job."""


def run(session: Session) -> None:
    """Rounds of one process, one actor, and two, in turn; a row for each."""
    use_compilation_cache(Storage.default().persistent / "compiled")
    is_tiny = session.settings.tiny
    count = NUM_TINY_PHOTOS if is_tiny else NUM_PHOTOS
    shard_size = TINY_SHARD_SIZE if is_tiny else SHARD_SIZE
    for depth in session.at(18).depths:
        classifier = create_model(f"resnet{depth}", NUM_CLASSES, image_size=session.settings.image_size)
        photos = make_photos(scratch_folder(), count, PHOTO_SIDE)
        expected = _alone(classifier, photos)
        subjects: Mapping[str, Callable[[], Rate]] = {
            "one-process": partial(_one_process, classifier, photos),
            **{f"ray-{n}": partial(_on_ray, classifier, photos, n, shard_size, expected) for n in NUM_ACTORS},
        }
        with connected():
            for warm_up in subjects.values():
                warm_up()
            rounds = [
                {name: subject() for name, subject in subjects.items()}
                for _ in range(session.settings.rounds)
            ]
        for name in subjects:
            _put(session, name, depth, [found[name] for found in rounds], num_photos=count)


def _one_process(classifier: Classifier, photos: Path) -> Rate:
    start = time.perf_counter()
    found = _alone(classifier, photos)
    seconds = time.perf_counter() - start
    return len(found) / seconds, seconds


def _alone(classifier: Classifier, photos: Path) -> Predictions:
    return predict(classifier, find_photos([str(photos)]), precision=PRECISION)


def _on_ray(
    classifier: Classifier, photos: Path, num_actors: int, shard_size: int, expected: Predictions
) -> Rate:
    out = scratch_folder() / "scores"
    config = batch.BatchConfig(num_actors=num_actors, shard_size=shard_size)
    start = time.perf_counter()
    batch.predict(classifier, [photos], out, config, precision=PRECISION)
    seconds = time.perf_counter() - start
    _require_same(out, expected)
    times = sorted(path.stat().st_mtime for path in out.glob("part-*.parquet"))
    # The first part of each actor comes when its start is over.
    return (len(times) - num_actors) * shard_size / (times[-1] - times[num_actors - 1]), seconds


def _require_same(out: Path, expected: Predictions) -> None:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(out)
    scores = np.asarray(table["scores"].to_pylist(), np.float32)
    scale = float(np.abs(expected.scores).max())
    if (
        tuple(table["id"].to_pylist()) != expected.ids
        or np.abs(scores - expected.scores).max() > 1e-4 * scale
    ):
        raise SubjectError("the rows on Ray are not those of one process")


def _put(session: Session, subject: str, depth: int, rounds: list[Rate], **values: Any) -> None:
    rates = [rate for rate, _ in rounds]
    task = session.task("predict", subject, depth=depth, batch_size=BATCH_SIZE, photo_side=PHOTO_SIDE)
    session.put(
        "ray_batch",
        task,
        {
            "images_per_second": spread(rates),
            "rounds": rates,
            "job_seconds": median(seconds for _, seconds in rounds),
            "num_cores": os.cpu_count(),
            **values,
        },
    )


if __name__ == "__main__":
    main("ray_batch", run, __doc__)

"""JPEGs to batches of random views: our stream, from files and from ArrayRecord, next to other readers.

`input_pipeline` decodes and crops, `decode` only decodes, `to_device` puts the same batches on the device;
`read_records` and `read_resized_records` do as `input_pipeline` from records, of the photos as they are and
resized once.
"""

from dataclasses import replace

from benchmarks.peers import OURS, framework_of
from benchmarks.session import Session, main
from benchmarks.worker import Task

PHOTO_SIDES = (500, 1500, 3000)
TINY_PHOTO_SIDES = (100,)
RECORD_SIDES = (100, 500, 1500)
RECORD_WORKS = ("read_records", "read_resized_records")
PARTS = ("decode", "to_device")
LEAST = ("jaxcls-0", "jaxcls-max", "dataloader-max")
"""Of the subjects, those that read large photos, too."""


def run(session: Session) -> None:
    """A group for each size of photos, made on the spot, then one for each part of the work."""
    sides = TINY_PHOTO_SIDES if session.settings.tiny else PHOTO_SIDES
    subjects = session.subjects("input_pipeline")
    for side in sides:
        chosen = subjects if side == sides[0] or session.settings.peer else LEAST
        tasks = [session.task("input_pipeline", subject, photo_side=side) for subject in chosen]
        session.compare("input_pipeline", tasks + _from_records(tasks))
    for work in PARTS:
        tasks = [session.task(work, subject, photo_side=sides[0]) for subject in subjects]
        session.compare("input_pipeline", tasks)


def _from_records(tasks: list[Task]) -> list[Task]:
    ours = [t for t in tasks if framework_of(t.subject) == OURS and t.photo_side in RECORD_SIDES]
    return [replace(task, work=work) for work in RECORD_WORKS for task in ours]


if __name__ == "__main__":
    main("input_pipeline", run, __doc__)

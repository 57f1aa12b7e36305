"""JPEGs to batches of random views: our stream, from files and from ArrayRecord, next to other readers.

`input_pipeline` decodes and crops, `decode` only decodes, `to_device` puts the same batches on the device;
`read_records` and `read_resized_records` do as `input_pipeline` from records, of the photos as they are and
resized once.
"""

from benchmarks.peers import OURS, framework_of
from benchmarks.session import Session, main

PHOTO_SIDES = (500, 1500, 3000)
TINY_PHOTO_SIDES = (100,)
RECORDS = {
    100: ("read_records", "read_resized_records"),
    500: ("read_records", "read_resized_records"),
    1500: ("read_resized_records",),
}
"""Side of the photos -> works that read them from records."""
PARTS = ("decode", "to_device")
MOST = ("jaxcls-0", "jaxcls-max", "dataloader-0", "dataloader-max", "grain-0", "grain-max", "tfdata")
LEAST = ("jaxcls-0", "jaxcls-max", "dataloader-max")
"""Of the subjects, those that do the parts, and those that read large photos and records."""


def run(session: Session) -> None:
    """A group for each size of photos, made on the spot, then one for each part of the work."""
    sides = TINY_PHOTO_SIDES if session.settings.tiny else PHOTO_SIDES
    subjects = session.subjects("input_pipeline")
    most, least = (session.settings.peer or few for few in (MOST, LEAST))
    for side in sides:
        chosen = subjects if side == sides[0] else least
        tasks = [session.task("input_pipeline", subject, photo_side=side) for subject in chosen]
        ours = [subject for subject in least if framework_of(subject) == OURS]
        tasks += [session.task(work, s, photo_side=side) for work in RECORDS.get(side, ()) for s in ours]
        session.compare("input_pipeline", tasks)
    for work in PARTS:
        tasks = [session.task(work, subject, photo_side=sides[0]) for subject in most]
        session.compare("input_pipeline", tasks)


if __name__ == "__main__":
    main("input_pipeline", run, __doc__)

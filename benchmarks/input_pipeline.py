"""JPEGs to batches of random views, on all cores: our stream next to torch's `DataLoader` over Pillow."""

from benchmarks.session import Session, main

PHOTO_SIDES = (500, 1500, 3000)
TINY_PHOTO_SIDES = (100,)


def run(session: Session) -> None:
    """A group for each size of photos, made on the spot."""
    for photo_side in TINY_PHOTO_SIDES if session.settings.tiny else PHOTO_SIDES:
        tasks = [
            session.task("input_pipeline", subject, photo_side=photo_side)
            for subject in session.subjects("input_pipeline")
        ]
        session.compare("input_pipeline", tasks)


if __name__ == "__main__":
    main("input_pipeline", run, __doc__)

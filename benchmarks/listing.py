"""A folder of a million photos: seconds and memory of reading and splitting it, next to `find`.

`find` lists the files, or looks at each size too, as `read_folder` does. All was read before, so that no
disk is timed. Each reading is a new process.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.peers import OURS
from benchmarks.session import Session, main
from benchmarks.worker import Task
from experiments.recording import spread

NUM_FILES, NUM_FOLDERS = 1_000_000, 1000
TINY_NUM_FILES, TINY_NUM_FOLDERS = 2000, 10
LINKS_PER_FILE = 10_000
"""Hard links stand in for files: some file systems allow no more than 65,000 to one."""
STEPS = ("read", "split", "grouped_split")


def run(session: Session) -> None:
    """Rounds of `find`, `find` with sizes, and ours, in turn; a row for each kind of work."""
    is_tiny = session.settings.tiny
    num_files, num_folders = (TINY_NUM_FILES, TINY_NUM_FOLDERS) if is_tiny else (NUM_FILES, NUM_FOLDERS)
    with TemporaryDirectory() as scratch:
        folder = make_folder(Path(scratch), num_files, num_folders)
        subjects: Mapping[str, Callable[[Path], dict[str, float]]] = {
            "names": lambda folder: _find(folder),
            "sizes": lambda folder: _find(folder, "-size", "0"),
            "ours": _read,
        }
        for subject in subjects.values():
            subject(folder)
        rounds = [
            {name: subject(folder) for name, subject in subjects.items()}
            for _ in range(session.settings.rounds)
        ]
    for name, command in (("names", "find"), ("sizes", "find-sizes")):
        _put(session, "read", command, num_files, [found[name]["seconds"] for found in rounds])
    for step in STEPS:
        seconds = [found["ours"][f"{step}_seconds"] for found in rounds]
        most = max(found["ours"][f"{step}_bytes"] for found in rounds)
        _put(session, step, OURS, num_files, seconds, bytes_per_file=most / num_files)


def make_folder(scratch: Path, num_files: int, num_folders: int) -> Path:
    """A folder of so many files, none of them empty, in so many class folders; their ids have 32 bytes."""
    for number in range(num_folders):
        folder = scratch / "photos" / f"n{number:08}"
        folder.mkdir(parents=True)
        for photo in range(number * num_files // num_folders, (number + 1) * num_files // num_folders):
            original = scratch / f"{photo // LINKS_PER_FILE}.jpg"
            if not original.exists():
                original.write_bytes(b"\xff\xd8\xff")
            os.link(original, folder / f"n{number:08}_{photo:07}.JPEG")
    return scratch / "photos"


def _find(folder: Path, *condition: str) -> dict[str, float]:
    start = time.perf_counter()
    subprocess.run(["find", folder, "-type", "f", *condition], stdout=subprocess.PIPE, check=True)
    return {"seconds": time.perf_counter() - start}


def _read(folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.reading", str(folder)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _put(
    session: Session, work: str, subject: str, num_files: int, seconds: list[float], **values: Any
) -> None:
    summary = spread(seconds)
    task = Task(work, subject, batch_size=num_files)
    session.put("listing", task, {"seconds": summary["median"], "rounds": summary, **values})


if __name__ == "__main__":
    main("listing", run, __doc__)

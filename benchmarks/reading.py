"""A folder read and split in a process of its own: `python -m benchmarks.reading FOLDER` prints JSON."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxcls.data.folder import read_folder

TRAIN_SIZE = 0.66
GROUP_EVERY = 20
"""Every so many photos, two are of one group."""


def main() -> None:
    """Seconds of each step, and bytes by which the process had grown at most until its end."""
    folder = Path(sys.argv[1])
    before = _peak_bytes()
    found: dict[str, float] = {}

    def note(step: str, start: float) -> None:
        found[f"{step}_seconds"] = time.perf_counter() - start
        found[f"{step}_bytes"] = _peak_bytes() - before

    start = time.perf_counter()
    photos = read_folder(folder)
    note("read", start)
    start = time.perf_counter()
    sides = photos.split(TRAIN_SIZE)
    note("split", start)
    assert sum(map(len, sides)) == len(photos)
    groups = np.arange(len(photos))
    groups[1::GROUP_EVERY] = groups[: len(groups) - 1 : GROUP_EVERY]
    grouped = replace(photos, groups=groups)
    start = time.perf_counter()
    grouped.split(TRAIN_SIZE)
    note("grouped_split", start)
    print(json.dumps({"num_files": len(photos), **found}))


def _peak_bytes() -> int:
    """Of this process; on Linux."""
    return 1024 * int(Path("/proc/self/status").read_text("utf-8").partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    main()

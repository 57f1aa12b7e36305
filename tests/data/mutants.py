"""Damaged images, each a function of a seed and its number, and a process that decodes one after another.

    python tests/data/mutants.py decode SEED FIRST SECONDS FOLDER
    python tests/data/mutants.py show SEED NUMBER > mutant

The first begins with mutant FIRST and ends after so many seconds, with code 0 and how many it decoded on its
output, or at the first that makes trouble. FOLDER/number holds its number, also where the process crashed.
"""

import mmap
import random
import resource
import signal
import struct
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
from test_images import RULES, SEEDS, bombs

from jaxcls.data.images import decode
from jaxcls.errors import ImageError

CPU_SECONDS = 1
"""Of one mutant: SIGPROF ends the process after it."""
MAX_PIXELS = 2**22
"""An original has a few hundred; what a damaged header claims up to here is decoded."""
MOST_BYTES = 300 * 2**20
"""That a mutant may add to the memory that the process had before the first."""
SIDES = (None, 1, 6)
"""What `short_side` is in turn."""

ORIGINALS = [*SEEDS.values(), *(data for data, _ in RULES.values()), *bombs().values()]
NUMBERS = (0, 1, 2, 7, 8, 9, 127, 128, 254, 255, 256, 257, 32767, 32768, 65534, 65535, 65536)
NUMBERS += (2**24, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)


def mutant(seed: int, number: int) -> bytes:
    """The mutant of this number: an image with one to six kinds of damage."""
    draw = random.Random(seed * 2**40 + number)
    data = bytearray(draw.choice(ORIGINALS))
    for _ in range(draw.choice((1, 1, 1, 2, 2, 3, 6))):
        draw.choice(DAMAGES)(data, draw)
    # A checksum that does not fit would hide what is behind it.
    if data.startswith(b"\x89PNG") and draw.random() < 0.8:
        _mend_png(data)
    return bytes(data)


def _place(data: bytearray, draw: random.Random) -> int:
    """A position: mostly near an end, where headers and directories are."""
    length = max(1, len(data))
    near = min(length, draw.choice((32, 200, length)))
    return draw.randrange(near) if draw.random() < 0.7 else length - 1 - draw.randrange(near)


def _span(data: bytearray, draw: random.Random) -> slice:
    start = _place(data, draw)
    return slice(start, start + draw.choice((1, 2, 4, 12, 50, draw.randrange(1, 400))))


def _flip(data: bytearray, draw: random.Random) -> None:
    if data:
        data[_place(data, draw)] ^= 1 << draw.randrange(8)


def _byte(data: bytearray, draw: random.Random) -> None:
    if data:
        data[_place(data, draw)] = draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))


def _number(data: bytearray, draw: random.Random) -> None:
    form, most = draw.choice((("<H", 2**16), (">H", 2**16), ("<L", 2**32), (">L", 2**32)))
    packed = struct.pack(form, draw.choice([n for n in NUMBERS if n < most]))
    start = _place(data, draw)
    data[start : start + len(packed)] = packed


def _cut(data: bytearray, draw: random.Random) -> None:
    del data[_span(data, draw)]


def _end(data: bytearray, draw: random.Random) -> None:
    del data[_place(data, draw) :]


def _repeat(data: bytearray, draw: random.Random) -> None:
    start = _place(data, draw)
    data[start:start] = bytes(data[_span(data, draw)]) * draw.choice((1, 2, 30))


def _insert(data: bytearray, draw: random.Random) -> None:
    start = _place(data, draw)
    data[start:start] = draw.randbytes(draw.choice((1, 4, 40)))


def _fill(data: bytearray, draw: random.Random) -> None:
    span = _span(data, draw)
    data[span] = bytes([draw.choice((0, 255, draw.randrange(256)))]) * len(data[span])


def _borrow(data: bytearray, draw: random.Random) -> None:
    other = bytearray(draw.choice(ORIGINALS))
    data[_span(data, draw)] = other[_span(other, draw)]


DAMAGES = (_flip, _byte, _byte, _number, _number, _number, _cut, _end, _repeat, _insert, _fill, _borrow)


def _mend_png(data: bytearray) -> None:
    at = 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        if end + 4 > len(data):
            return
        data[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4)
        at = end + 4


def check(data: bytes, number: int) -> None:
    """Decode it; raise whatever is no `ImageError`, and where what comes is no picture."""
    try:
        pixels = decode(data, short_side=SIDES[number % len(SIDES)], max_pixels=MAX_PIXELS)
    except ImageError as error:
        if isinstance(error.__cause__, Warning):
            raise error.__cause__ from error
        return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert 0 < pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS


def decode_mutants(seed: int, first: int, seconds: float, folder: Path) -> int:
    """Decode mutants in turn, for so many seconds; return how many there were."""
    with (folder / "number").open("w+b") as file:
        file.write(bytes(8))
        file.flush()
        current = mmap.mmap(file.fileno(), 8)
    warnings.simplefilter("error")
    before, end, number = _peak(), time.monotonic() + seconds, first
    while time.monotonic() < end:
        # Written without a system call, and still there when the process is not.
        current[:] = number.to_bytes(8)
        data = mutant(seed, number)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        check(data, number)
        signal.setitimer(signal.ITIMER_PROF, 0)
        grown = _peak() - before
        assert grown <= MOST_BYTES, f"{grown:,} bytes"
        number += 1
    return number - first


def _peak() -> int:
    """Bytes. On Linux, what `getrusage` says counts from before the program: its parent's."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    if sys.argv[1] == "show":
        sys.stdout.buffer.write(mutant(int(sys.argv[2]), int(sys.argv[3])))
    else:
        print(decode_mutants(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), Path(sys.argv[5])))

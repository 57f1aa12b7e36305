"""Mutants of images for a minute: each becomes a picture or an `ImageError`, in bounded time and memory."""

import os
import subprocess
import sys
from pathlib import Path

import mutants
import pytest
from mutants import ORIGINALS, mutant

SEED = 20260101
SECONDS = float(os.environ.get("JAXCLS_FUZZ_SECONDS", "60"))
FIRST = int(os.environ.get("JAXCLS_FUZZ_FIRST", "0"))
"""The first mutant: a longer search goes on where another ended."""


def decode(
    folder, *, first=FIRST, seconds=SECONDS, timeout=10 * SECONDS + 60, program=Path(mutants.__file__)
):
    """Decode mutants in a process of its own; return how many, or fail and name the one that made trouble."""
    command = [sys.executable, program, "decode", str(SEED), str(first), str(seconds), str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=timeout)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        number = int.from_bytes((folder / "number").read_bytes())
        path = folder / f"mutant-{number}"
        path.write_bytes(mutant(SEED, number))
        again = f"python tests/data/mutants.py show {SEED} {number}"
        pytest.fail(f"{error} at `{again}`, kept as {path}:\n{(error.stderr or '')[-3000:]}")
    return int(done.stdout)


@pytest.mark.slow
def test_every_mutant_is_a_picture_or_an_image_error(tmp_path):
    number = decode(tmp_path)
    print(f"{number:,} mutants, seed {SEED}, from {FIRST}")
    assert number > 0


def test_a_mutant_is_a_function_of_seed_and_number():
    assert [mutant(SEED, number) for number in range(50)] == [mutant(SEED, number) for number in range(50)]
    assert len({mutant(SEED, number) for number in range(200)}) > 190
    assert len({mutant(seed, 0) for seed in range(20)}) > 15
    command = [sys.executable, mutants.__file__, "show", str(SEED), "7"]
    assert subprocess.run(command, capture_output=True, check=True).stdout == mutant(SEED, 7)
    assert len(ORIGINALS) > 40


def failing_at_5(folder, trouble):
    """A program whose decoder fails at the mutant that equals number 5, as a defect in it would."""
    program = folder / "broken.py"
    program.write_text(f"""
import os, signal, sys
import numpy as np
sys.path.insert(0, {str(Path(mutants.__file__).parent)!r})
import mutants
sound, marked = mutants.decode, mutants.mutant({SEED}, 5)
def decode(data, **options):
    if data == marked:
        {trouble}
    return sound(data, **options)
mutants.decode = decode
seed, first, seconds = map(int, sys.argv[2:5])
print(mutants.decode_mutants(seed, first, seconds, mutants.Path(sys.argv[5])))
""")
    return program


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        ("raise KeyError('a defect')", "KeyError"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        pytest.param("[None for _ in iter(int, 1)]", "SIGPROF", marks=pytest.mark.slow),
        ("bytes(range(256)) * (400 * 2**12)", "bytes"),
        ("return np.zeros((2, 2), np.uint8)", "ndim"),
    ],
)
def test_what_makes_trouble_is_named_and_kept(tmp_path, trouble, told):
    program = failing_at_5(tmp_path, trouble)
    with pytest.raises(pytest.fail.Exception, match=f"show {SEED} 5") as caught:
        decode(tmp_path, first=0, seconds=20, timeout=260, program=program)
    assert told in str(caught.value)
    assert (tmp_path / "mutant-5").read_bytes() == mutant(SEED, 5)


@pytest.mark.slow
def test_what_never_ends_is_named_and_kept(tmp_path):
    program = failing_at_5(tmp_path, "signal.pause()")
    with pytest.raises(pytest.fail.Exception, match=rf"timed out after 10 .*show {SEED} 5"):
        decode(tmp_path, first=0, seconds=1, timeout=10, program=program)
    assert (tmp_path / "mutant-5").read_bytes() == mutant(SEED, 5)

"""Every benchmark runs from end to end, tiny; and what a GPU machine runs needs only what it has."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from benchmarks import all as every
from benchmarks.gpu import STAGES
from benchmarks.photos import AUGMENTATION, SEED, make_photos, pillow_view
from benchmarks.timing import SubjectError
from benchmarks.worker import Task, Worker, ask
from jaxcls.data.folder import read_folder
from jaxcls.pipeline import training_batches
from jaxcls.preprocess import Preprocess

ROOT = Path(__file__).resolve().parents[2]
BLOCKER = """
import sys

BLOCKED = {"grain", "tyro", "tensorboardX", "tensorflow_datasets", "starlette", "httpx2"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture
def bare(tmp_path):
    """The environment of a machine without Grain, tyro and the like."""
    folder = tmp_path / "blocker"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCKER)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


@pytest.fixture
def run(compiled_once):
    """Call it to run a process; the figures matter to nobody here: programs are unoptimised, and kept."""

    def run(*command, environment=os.environ):
        flags = environment.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env={**environment, **compiled_once, "XLA_FLAGS": flags},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def read(folder):
    """{(benchmark, work, subject): row} of all files."""
    rows = [row for path in sorted(folder.glob("*.json")) for row in json.loads(path.read_text())["rows"]]
    return {(row["benchmark"], row["work"], row["subject"]): row for row in rows}


def multiply_adds_of_resnet18_at_32_px():
    """Of the stem, and of all the rest, for one picture; worked by hand.

    XLA leaves out what a kernel sees of the padding: along a side, 8 outputs of a 3x3 kernel see 22 places,
    not 24. The last two stages, of 2x2 and of 1 output, are products of whole patches: all places count.
    """
    stem = 106**2 * 3 * 64
    stages = (
        4 * 22**2 * 64 * 64,
        11**2 * 64 * 128 + 3 * 10**2 * 128 * 128 + 4**2 * 64 * 128,
        2**2 * (9 * (128 * 256 + 3 * 256 * 256) + 128 * 256),
        9 * (256 * 512 + 3 * 512 * 512) + 256 * 512,
    )
    return stem, sum(stages) + 512 * 1000


def test_what_a_gpu_machine_runs_imports_no_more_than_it_has(run, bare):
    code = "import benchmarks.gpu, benchmarks.subjects, benchmarks.textbook, jaxcls.scoring"
    run("-c", code, environment=bare)


def test_a_worker_says_what_is_missing():
    with pytest.raises(SubjectError, match="machine is not measured at first_step"):
        ask(Task("first_step", "machine"))
    with pytest.raises(SubjectError, match="KeyError: 'nobody'"):
        ask(Task("score", "nobody"))


def test_a_worker_that_has_ended_is_an_error_and_no_wait():
    with (
        pytest.raises(SubjectError, match="its process ended with code 0"),
        Worker(Task("rough_probe", "machine")) as worker,
    ):
        worker.time(1)


def test_a_worker_that_takes_too_long_is_ended():
    with pytest.raises(SubjectError, match="not ready within 0 s"):
        ask(Task("rough_probe", "machine"), timeout_seconds=0.1)


def test_the_peers_cut_the_boxes_of_our_stream(tmp_path):
    photos = read_folder(make_photos(tmp_path, 6, 120))
    batches = training_batches(photos, Preprocess(size=32), AUGMENTATION, batch_size=6, seed=SEED)
    for number in range(2):
        batch = next(batches)
        expected = [
            pillow_view([photos.source.path(int(index))], 32, 6 * number + place)
            for place, index in enumerate(batch.indices)
        ]
        np.testing.assert_array_equal(batch.images, np.stack(expected))
    batches.close()


@pytest.mark.slow
def test_a_script_measures_ours_and_two_peers(run, tmp_path):
    pytest.importorskip("torch")
    names = ("jaxcls", "flax-pmap-float32", "torch-eager-bfloat16")
    out = run("-m", "benchmarks.train_step", "--tiny", "--out", tmp_path, "--peer", *names)
    document = json.loads((tmp_path / "train_step_cpu.json").read_text())
    assert document["conditions"]["command"].startswith("python -m benchmarks.train_step --tiny --out")
    assert str(tmp_path) not in json.dumps(document)
    rows = read(tmp_path)
    for name in names:
        row = rows["train_step", "train", name]
        assert row["images_per_second"]["n"] == 2
        assert row["num_steps_counted"] == 2 * row["steps_per_round"]
        assert row["floor"]["mfu"] > 0
        assert name in out
    # Half of the 4 images on each of two devices, 2 operations a multiply-add, 3 passes; the stem needs no
    # gradient for pictures. The optimizer takes about 4 operations for each of 11.7 M weights.
    stem, rest = multiply_adds_of_resnet18_at_32_px()
    expected = 2 * 2 * (2 * stem + 3 * rest) + 4 * 11.7e6
    assert rows["train_step", "train", "jaxcls"]["flops"] == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(every.BENCHMARKS) - {"train_step", "correctness"}))
def test_every_script_runs(run, tmp_path, name):
    peers = {"score": ["flax-jit-float32"], "input_pipeline": ["jaxcls-0", "grain-0"]}
    chosen = ["--peer", *peers.get(name, []), *["jaxcls"] * (name != "input_pipeline")]
    run("-m", f"benchmarks.{name}", "--tiny", "--out", tmp_path, *chosen)
    rows = read(tmp_path)
    assert rows
    assert not [row for row in rows.values() if "note" in row]


@pytest.mark.slow
def test_the_first_stage_runs_on_a_bare_machine(run, tmp_path, bare):
    out = tmp_path / "out"
    run("-m", "benchmarks.gpu", "first", "--tiny", "--out", out, "--peer", "jaxcls", environment=bare)
    assert [path.name for path in out.iterdir()] == ["first_cpu.json"]
    rows = read(out)
    assert rows["train_step", "train", "jaxcls"]["images_per_second"]["n"] == 2
    assert rows["score", "score", "jaxcls"]["images_per_second"]["n"] == 2
    assert rows["correctness", "logits", "jaxcls"]["relative_difference"] < 0.02
    assert len(rows["correctness", "loss_curve", "jaxcls"]["losses"]) == 50


@pytest.mark.slow
def test_a_row_that_needs_more_than_is_there_says_so(run, tmp_path, bare):
    names = ("jaxcls-0", "dataloader-0", "tfdata")
    run("-m", "benchmarks.input_pipeline", "--tiny", "--out", tmp_path, "--peer", *names, environment=bare)
    rows = read(tmp_path)
    for work in ("input_pipeline", "decode", "to_device", "read_records"):
        assert "needs grain" in rows["input_pipeline", work, "jaxcls-0"]["note"]
    if not find_spec("tensorflow"):
        assert "needs tensorflow" in rows["input_pipeline", "decode", "tfdata"]["note"]


def test_there_are_at_most_eight_result_files_of_a_gpu():
    assert len(STAGES) <= 8


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.skipif(shutil.which("wrk") is None, reason="the load comes from wrk")
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_ray_serving(run, tmp_path):
    run("-m", "benchmarks.ray_serving", "--tiny", "--out", tmp_path)
    rows = {(work, subject): row for (_, work, subject), row in read(tmp_path).items()}
    ways = ("local", "ray-haproxy", "ray-direct", "ray-proxy")
    assert set(rows) == set(product(("tensors", "photos"), ways))
    assert all(row["images_per_second"]["min"] > 0 < row["at_rest_p50_ms"]["min"] for row in rows.values())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("wrk") is None, reason="the load comes from wrk")
def test_serving(run, tmp_path):
    run("-m", "benchmarks.serving", "--tiny", "--out", tmp_path)
    rows = {work: row for (_, work, subject), row in read(tmp_path).items() if subject == "jaxcls"}
    assert {"score_bare", "serve_tensors", "serve_photos", "at_rest", "overload_10x"} <= rows.keys()
    assert rows["serve_photos"]["images_per_second"]["median"] > 0
    overload = {
        name: values["min"] for name, values in rows["overload_10x"].items() if isinstance(values, dict)
    }
    assert overload["busy"] > overload["good"] > 0
    assert overload["refused_timed"] > 0
    assert rows["overload_10x"]["other"]["max"] == 0

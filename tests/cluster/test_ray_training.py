"""Ray starts the processes that train as one, and starts them again when one is killed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import free_port
from run_folders import assert_same, newest, read_arrays

from jaxcls.classifier import load

pytest.importorskip("ray")

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
SECONDS = 300


@pytest.fixture(scope="module")
def train(world, service_home):
    """Call it to start a program with the options of `jaxcls train`; what it prints goes into a file."""
    processes = []

    def train(program, run_dir, *options, **environment):
        arguments = [
            "photos", "--test-data", "eval", "--backbone", "start", "--out", run_dir.name,
            "--batch-size", "6", "--num-epochs", "6", "--learning-rates", "0.01", "--min-crop-area", "0.5",
            "--log-every", "1", "--checkpoint-seconds", "0.1", *options,
        ]  # fmt: skip
        home = {"JAXCLS_HOME": str(service_home), "PYTHONPATH": str(Path(__file__).parents[2])}
        with run_dir.with_suffix(".txt").open("a") as printed:
            process = subprocess.Popen(
                [sys.executable, "-m", *program, *arguments],
                cwd=run_dir.parent, env={**os.environ, **home, **environment},
                stdout=printed, stderr=subprocess.STDOUT,
            )  # fmt: skip
        processes.append(process)
        return process

    yield train
    for process in processes:
        process.kill()
        process.wait()


def finish(run_dir, *processes):
    for process in processes:
        assert process.wait(SECONDS) == 0, run_dir.with_suffix(".txt").read_text()


@pytest.fixture(scope="module")
def undisturbed(world, train):
    """The folder of a run of two processes that were started by hand."""
    run_dir = world / "undisturbed"
    address = f"localhost:{free_port()}"
    two = [
        train(
            ["jaxcls.cli", "train"], run_dir, "--distributed",
            JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(index),
        )
        for index in range(2)
    ]  # fmt: skip
    finish(run_dir, *two)
    return run_dir


@pytest.fixture(scope="module")
def killed_twice(world, train, ray_cluster, undisturbed):
    """The folder of a run on Ray: the second process was killed first, then the one that writes.

    Its programs are those that were compiled for the undisturbed run.
    """
    run_dir = world / "killed"
    process = train(["experiments.cluster.train_on_ray"], run_dir, "--address", ray_cluster)
    for num_steps, is_writing in ((4, False), (10, True)):
        wait_until(lambda num_steps=num_steps: num_steps_saved(run_dir) >= num_steps, process, run_dir)
        find_worker(run_dir, is_writing).kill()
    finish(run_dir, process)
    return run_dir


def wait_until(holds, process, run_dir):
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert process.poll() is None, run_dir.with_suffix(".txt").read_text()
        assert time.monotonic() < deadline, run_dir.with_suffix(".txt").read_text()
        time.sleep(0.02)


def num_steps_saved(run_dir):
    folders = (run_dir / "checkpoints").glob("*")
    return max((int(path.name) for path in folders if path.name.isdecimal()), default=0)


def find_worker(run_dir, is_writing):
    """One of two processes of training: the first has the log of the run open."""
    workers = [child for child in psutil.Process().children(recursive=True) if "TrainWorker" in child.name()]
    writers = [
        worker
        for worker in workers
        if any(file.path.startswith(str(run_dir)) for file in worker.open_files())
    ]
    assert (len(workers), len(writers)) == (2, 1)
    return writers[0] if is_writing else next(worker for worker in workers if worker not in writers)


def read_metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_killed_processes_are_started_again_and_arrive_where_undisturbed_ones_do(killed_twice, undisturbed):
    """Bit for bit: parameters, statistics, optimizer, key, step and log."""
    assert killed_twice.with_suffix(".txt").read_text().count("Resuming after step") == 2
    assert newest(killed_twice).name == newest(undisturbed).name == "00000018"
    assert_same(read_arrays(killed_twice), read_arrays(undisturbed))
    weights = [load(run_dir / "classifier").weights for run_dir in (killed_twice, undisturbed)]
    assert_same(*weights)
    logs = [(run_dir / "metrics.jsonl").read_bytes() for run_dir in (killed_twice, undisturbed)]
    assert logs[0] == logs[1]


def test_two_processes_on_ray_train_as_one_with_two_devices(killed_twice, world, train):
    run_dir = world / "one"
    finish(run_dir, train(["jaxcls.cli", "train"], run_dir))
    rows = list(zip(read_metrics(killed_twice), read_metrics(run_dir), strict=True))
    assert len(rows) == 6
    for row, expected in rows:
        assert (row["eval_num_correct"], row["eval_num_seen"]) == (expected["eval_num_correct"], 7)
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4)

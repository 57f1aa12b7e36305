"""Several devices, and several real processes on this machine, train as one device does."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trainer
from conftest import free_port, write_photos

from jaxcls.classifier import create_model, load
from jaxcls.data.folder import read_folder
from jaxcls.errors import UsageError
from jaxcls.parallel import make_mesh
from jaxcls.pipeline import Share, evaluation_batches, training_batches
from jaxcls.train.config import FinetuneConfig
from jaxcls.train.finetune import finetune
from jaxcls.train.reporters import Reporter

SLOW = pytest.mark.slow
REPLICAS = Path(__file__).with_name("replicas.py")
CONFIG = FinetuneConfig(
    num_epochs=2,
    learning_rates=(0.01,),
    batch_size=6,
    min_crop_area=0.5,
    log_every=1,
    checkpoint_seconds=0.1,
)
LONG = replace(CONFIG, num_epochs=30, log_every=2)
SECONDS = 100


def by_jax(index):
    return {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)}


def by_slurm(index):
    return {
        "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index),
    }  # fmt: skip


def by_open_mpi(index):
    return {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(index), "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
    }  # fmt: skip


def start(commands, describe=by_jax):
    """One process with one device for each command, in which JAX finds the others."""
    port, found = free_port(), []
    for index, command in enumerate(commands):
        environment = {**os.environ, "XLA_FLAGS": "", **describe(index)}
        if describe is by_jax:
            environment["JAX_COORDINATOR_ADDRESS"] = f"localhost:{port}"
        else:
            environment["JAX_COORDINATOR_PORT"] = str(port)
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        found.append(process)
    return found


def finish(processes):
    """Wait for all of them: exit codes and what they printed."""
    try:
        texts = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], texts


@pytest.fixture(scope="module")
def command(world, compilation_cache):
    def command(run_dir, config=CONFIG, photos="photos"):
        return trainer.command(world, compilation_cache, run_dir, config, photos, num_processes=2)

    return command


def read_metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights_of(text):
    return re.search(r"WEIGHTS \d+", text)[0]


@SLOW
@pytest.mark.parametrize("pipeline", ["streaming", "resident"])
def test_two_processes_train_as_one_with_two_devices(pipeline, world, command, tmp_path):
    config = replace(CONFIG, pipeline=pipeline)
    codes, texts = finish(start([command(tmp_path / "two", config)] * 2))
    assert codes == [0, 0], texts
    assert weights_of(texts[0]) == weights_of(texts[1])
    assert "in 2 processes" in texts[0]
    assert "STEPS" not in texts[1]
    one = finetune(
        read_folder(world / "photos"), load(world / "start"), config,
        eval_dataset=read_folder(world / "eval"), run_dir=tmp_path / "one", reporters=[],
    )  # fmt: skip
    for row, expected in zip(read_metrics(tmp_path / "two"), one.history, strict=True):
        assert (row["eval_num_correct"], row["eval_num_seen"]) == (expected["eval_num_correct"], 7)
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4)
    assert load(tmp_path / "two" / "classifier").provenance["num_epochs_done"] == 2


@SLOW
def test_devices_and_processes_train_alike(tmp_path):
    """Rounding grows with each step of float32: only the first few losses are compared."""
    files = {num_devices: tmp_path / f"{num_devices}.npz" for num_devices in (1, 2, 4, 8)}

    def replicate(num_devices):
        flags = f"--xla_force_host_platform_device_count={num_devices}"
        command = [sys.executable, REPLICAS, files[num_devices]]
        subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(replicate, files))
    files["two processes"] = tmp_path / "two.npz"
    codes, texts = finish(start([[REPLICAS, files["two processes"]]] * 2))
    assert codes == [0, 0], texts
    found = {name: np.load(file) for name, file in files.items()}
    one = found.pop(1)
    assert len(found) == 4
    for name, other in found.items():
        for key, expected in one.items():
            if key.endswith("counts"):
                np.testing.assert_array_equal(other[key], expected, name)
        for key, tolerance in (
            ("losses in float32: losses", 1e-5),
            ("all in float64: losses", 1e-6),
        ):
            np.testing.assert_allclose(other[key], one[key], rtol=tolerance, err_msg=f"{name} {key}")
        for key, tolerance in (
            ("gradients in float32: gradients", 1e-4),
            ("all in float64: gradients", 1e-10),
        ):
            difference = np.linalg.norm(other[key] - one[key])
            assert difference <= tolerance * np.linalg.norm(one[key]), f"{name} {key}"


@pytest.mark.parametrize("describe", [by_slurm, by_open_mpi])
@SLOW
def test_the_command_line_under_a_launcher(describe, world, tmp_path):
    arguments = [
        "-m", "jaxcls.cli", "train", world / "photos", "--test-data", world / "eval", "--backbone",
        world / "start", "--batch-size", "6", "--num-epochs", "1", "--out", tmp_path / "run", "--distributed",
    ]  # fmt: skip
    codes, texts = finish(start([arguments] * 2, describe))
    assert codes == [0, 0], texts
    assert "in 2 processes" in texts[0]
    assert texts[0].count("accuracy (micro)") == 1
    assert "accuracy" not in texts[1]


@SLOW
def test_a_killed_process_ends_the_other_and_both_go_on(command, world, tmp_path):
    """Bitwise to where two undisturbed ones arrive."""
    config = replace(LONG, num_epochs=4)
    codes, texts = finish(start([command(tmp_path / "undisturbed", config)] * 2))
    assert codes == [0, 0], texts
    both = start([command(tmp_path / "killed", config)] * 2)
    wait_for(both[0], "STEPS", 3)
    both[1].kill()
    started = time.monotonic()
    codes, texts_killed = finish(both)
    assert codes[0] != 0
    assert "another process has ended or cannot be reached" in texts_killed[0]
    assert time.monotonic() - started < 60
    codes, texts_resumed = finish(start([command(tmp_path / "killed", config)] * 2))
    assert codes == [0, 0], texts_resumed
    assert "Resuming after step" in texts_resumed[0]
    assert {weights_of(text) for text in texts_resumed} == {weights_of(texts[0])}
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("undisturbed", "killed")]
    assert metrics[0] == metrics[1]


@SLOW
def test_sigterm_to_one_saves_and_ends_both(command, tmp_path):
    both = start([command(tmp_path / "run", LONG)] * 2)
    wait_for(both[0], "STEPS", 3)
    both[1].send_signal(signal.SIGTERM)
    codes, texts = finish(both)
    assert codes == [143, 143], texts
    assert "The run can be resumed after step" in texts[0]


@SLOW
def test_two_processes_stop_and_one_goes_on(command, world, tmp_path):
    """With two devices, to where one would have come alone, but for rounding."""
    config = replace(LONG, num_epochs=6)
    both = start([command(tmp_path / "two", config)] * 2)
    wait_for(both[0], "STEPS", 2)
    both[0].send_signal(signal.SIGTERM)
    codes, texts = finish(both)
    assert codes == [143, 143], texts
    recorder = Recorder()
    photos, evaluation = read_folder(world / "photos"), read_folder(world / "eval")
    runs = [
        finetune(
            photos, load(world / "start"), config,
            eval_dataset=evaluation, run_dir=tmp_path / name, resume=True, reporters=[recorder],
        )
        for name in ("two", "one")
    ]  # fmt: skip
    (note,) = re.findall("Written on .*", recorder.text)
    assert re.search("2 processes, resumed on .* 1 processes: the results can differ in their last", note)
    assert "Resuming after step" in recorder.text
    for row, expected in zip(*(run.history for run in runs), strict=True):
        assert (row["step"], row["eval_num_seen"]) == (expected["step"], 7)
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4)


class Recorder(Reporter):
    text = ""

    def message(self, text):
        self.text += f"{text}\n"


@SLOW
def test_more_processes_than_divide_the_batch_are_refused(command, tmp_path):
    codes, texts = finish(start([command(tmp_path / "run", replace(CONFIG, batch_size=5))] * 2))
    assert codes == [2, 2]
    for text in texts:
        assert "a batch of 5 cannot be divided evenly over 2 processes" in text


def wait_for(process, word, count):
    watchdog = threading.Timer(SECONDS, process.kill)
    watchdog.start()
    while count:
        line = process.stdout.readline()
        assert line, f"the process ended before it printed {word}"
        count -= line.startswith(word)
    watchdog.cancel()


@SLOW
def test_processes_that_were_given_different_photos_say_so(command, world, tmp_path):
    write_photos(world / "others", {"blue": 8, "red": 8}, seed=5)
    run_dir = tmp_path / "run"
    codes, texts = finish(start([command(run_dir), command(run_dir, photos="others")]))
    assert 0 not in codes
    # The one that is faster may end the other before it says so, too.
    assert "process 1 was given other photos or weights than the first" in "".join(texts)


@SLOW
def test_processes_that_were_given_different_settings_say_so(command, tmp_path):
    """`log_every` decides when they ask each other."""
    run_dir = tmp_path / "run"
    codes, texts = finish(start([command(run_dir), command(run_dir, replace(CONFIG, log_every=2))]))
    assert 0 not in codes
    assert "process 1 was given other settings than the first" in "".join(texts)


@SLOW
def test_what_the_first_process_alone_finds_ends_both(command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").write_text("mine")
    codes, texts = finish(start([command(tmp_path / "run")] * 2))
    assert 0 not in codes
    assert "holds no run to resume, but something else" in "".join(texts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "none of them is set"),
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1"}, "JAX_COORDINATOR_ADDRESS=localhost:1"),
        (
            {"JAX_COORDINATOR_ADDRESS": "PORT", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
            "this process is alone",
        ),
    ],
)
def test_a_process_without_others_is_told_what_is_missing(settings, message, world, tmp_path):
    environment = os.environ | {
        name: value.replace("PORT", f"localhost:{free_port()}") for name, value in settings.items()
    }
    arguments = ["train", world / "photos", "--out", tmp_path / "run", "--distributed"]
    done = subprocess.run(
        [sys.executable, "-m", "jaxcls.cli", *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_shares_are_the_rows_of_the_batches(photos):
    """Whatever the number of processes, together they read what one would."""
    preprocess = load_preprocess()

    def read(share, make, **options):
        batches = make(photos, preprocess, batch_size=12, share=share, **options)
        with_rows = [(b.indices.tolist(), b.images) for b, _ in zip(batches, range(2), strict=False)]
        batches.close()
        return with_rows

    for make, options in (
        (training_batches, {"augmentation": CONFIG.augmentation, "seed": 3, "first_step": 5}),
        (evaluation_batches, {}),
    ):
        whole = read(Share(), make, **options)
        assert len(whole) == 2
        parts = [read(Share(index, 3), make, **options) for index in range(3)]
        for step, (indices, images) in enumerate(whole):
            assert indices == [i for part in parts for i in part[step][0]]
            np.testing.assert_array_equal(images, np.concatenate([part[step][1] for part in parts]))


def load_preprocess():
    return create_model("resnet18", 2, image_size=32).backbone.preprocess


def test_a_batch_that_the_processes_cannot_divide(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.local_devices", lambda process_index=None: ["device"])
    with pytest.raises(UsageError, match="a batch of 7 cannot be divided evenly over 2 processes"):
        make_mesh(7, across_processes=True)

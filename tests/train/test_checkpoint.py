"""Runs that are killed, stopped, out of disk space or damaged, and go on as if nothing had happened.

The undisturbed run trains in this process; those that are killed, in processes of their own. One program
(a ResNet-18 at 32 pixels on two forced CPU devices) serves them all from the compilation cache.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import trainer
from conftest import write_photos
from run_folders import assert_same, newest, read_arrays

from jaxcls.classifier import create_model, load
from jaxcls.data.folder import read_folder
from jaxcls.errors import TrainingError, UsageError
from jaxcls.train.checkpoint import Checkpoints, Snapshot, find_damage
from jaxcls.train.config import FinetuneConfig
from jaxcls.train.finetune import finetune
from jaxcls.train.reporters import Reporter
from jaxcls.train.state import Totals, TrainState, to_devices, to_host

STEPS_PER_EPOCH = 3
# The rates, dropout and batch size are those of `test_finetune.py`, and so is the program.
CONFIG = FinetuneConfig(
    num_epochs=2,
    learning_rates=(0.03, 0.025, 1e30),
    batch_size=6,
    dropout=0.0,
    min_crop_area=0.5,
    log_every=1,
    checkpoint_seconds=0.1,
)
LONG = replace(
    CONFIG, num_epochs=8, learning_rates=(0.03, 0.02), dropout=0.5, log_every=2, checkpoint_seconds=0.4
)
LAST_STEP = CONFIG.num_epochs * STEPS_PER_EPOCH


class Recorder(Reporter):
    """Sends its own process a signal after a number of steps."""

    def __init__(self, stop_at=None, by=signal.SIGINT):
        self.text, self.num_steps, self.stop_at, self.signal = "", 0, stop_at, by

    def message(self, text):
        self.text += text + "\n"

    def steps(self, num_steps, row):
        self.num_steps += num_steps
        if self.num_steps == self.stop_at:
            os.kill(os.getpid(), self.signal)


@pytest.fixture(scope="module")
def world(tmp_path_factory, compilation_cache):
    """Photos, photos to evaluate on, and the saved network to start from, as paths."""
    folder = tmp_path_factory.mktemp("world")
    write_photos(folder / "photos", {"blue": 8, "red": 8})
    write_photos(folder / "eval", {"blue": 3, "red": 4}, seed=1)
    create_model("resnet18", 2, image_size=32).save(folder / "start")
    return folder


def train(world, run_dir, config=CONFIG, **options):
    options.setdefault("reporters", [])
    return finetune(
        read_folder(world / "photos"),
        load(world / "start"),
        config,
        eval_dataset=read_folder(world / "eval"),
        run_dir=run_dir,
        **options,
    )


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    return train(world, tmp_path_factory.mktemp("runs") / "undisturbed")


def start_process(world, cache, run_dir, config=CONFIG, **options):
    return subprocess.Popen(
        [sys.executable, *trainer.command(world, cache, run_dir, config, **options)], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for_steps(process, num_steps):
    """Read what a training process prints until it has done so many steps; return it."""
    lines, done = [], 0
    while done < num_steps:
        lines.append(process.stdout.readline())
        assert lines[-1], f"the process ended after {done} steps"
        if lines[-1].startswith("STEPS"):
            done += int(lines[-1].split()[1])
    return "".join(lines)


def wait_for_saving(process, run_dir):
    while not list((run_dir / "checkpoints").glob("*.partial")):
        assert process.poll() is None, "the process ended without a save"
        time.sleep(0.002)


def kill(process):
    """Kill it, and its data workers, which are in its group."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def assert_as_undisturbed(run_dir, undisturbed, num_epochs=CONFIG.num_epochs):
    """Parameters, statistics, optimizer, key, step and log, bit for bit."""
    assert int(newest(run_dir).name) == num_epochs * STEPS_PER_EPOCH
    assert_same(read_arrays(run_dir), read_arrays(undisturbed.run_dir))
    assert_same(load(run_dir / "classifier").weights, undisturbed.classifier.weights)
    logs = [(folder / "metrics.jsonl").read_bytes() for folder in (run_dir, undisturbed.run_dir)]
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == num_epochs


def test_killed_while_saving_then_ended_then_damaged(world, undisturbed, compilation_cache, tmp_path):
    """Each takes up what the one before left."""
    run_dir = tmp_path / "run"
    process = start_process(world, compilation_cache, run_dir)
    assert "Nothing to resume" in wait_for_steps(process, 2)
    wait_for_saving(process, run_dir)
    kill(process)
    assert list((run_dir / "checkpoints").glob("*.partial"))
    with (run_dir / "metrics.jsonl").open("a") as log:
        log.write('{"epoch": 9, "st')

    recorder = Recorder(stop_at=2, by=signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        train(world, run_dir, resume=True, reporters=[recorder])
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert f"The run can be resumed after step {int(newest(run_dir).name)}" in recorder.text
    assert not list((run_dir / "checkpoints").glob("*.partial"))

    damaged, recorder = max(newest(run_dir).rglob("*/d/*"), key=lambda path: path.stat().st_size), Recorder()
    flip(damaged)
    train(world, run_dir, resume=True, reporters=[recorder])
    assert re.search(rf"Checkpoint {run_dir}/.* is damaged and passed over: .*{damaged.name}", recorder.text)
    assert "Resuming after step" in recorder.text
    assert_as_undisturbed(run_dir, undisturbed)


@pytest.fixture(scope="module")
def long_undisturbed(world, tmp_path_factory):
    return train(world, tmp_path_factory.mktemp("runs") / "long", LONG)


@pytest.mark.slow
def test_killed_ten_times_at_random(world, long_undisturbed, compilation_cache, tmp_path):
    """With and without workers; the third time while saving, half of the times within a step or a save."""
    run_dir, chance = tmp_path / "run", random.Random(0)
    for number in range(10):
        config = replace(LONG, num_workers=(0, 2)[number // 2 % 2])
        process = start_process(world, compilation_cache, run_dir, config)
        if number == 2:
            wait_for_saving(process, run_dir)
        elif number % 2:
            wait_for_steps(process, 1)
            time.sleep(chance.uniform(0, 1))
        else:
            time.sleep(chance.uniform(0, 8))
        kill(process)
        if number == 2:
            assert list((run_dir / "checkpoints").glob("*.partial"))
    train(world, run_dir, replace(LONG, num_workers=2), resume=True)
    assert_as_undisturbed(run_dir, long_undisturbed, LONG.num_epochs)


@pytest.mark.slow
def test_signals_to_the_whole_group_of_workers(world, compilation_cache, tmp_path):
    """SIGTERM leaves them at work until the step is saved; they do not outlive the one they work for."""
    config = replace(LONG, num_workers=2, pipeline="streaming", num_epochs=100, checkpoint_seconds=1e9)
    process = start_process(world, compilation_cache, tmp_path / "run", config)
    wait_for_steps(process, 2)
    os.killpg(process.pid, signal.SIGTERM)
    text = process.stdout.read()
    process.stdout.close()
    assert process.wait() == 143, text
    assert f"The run can be resumed after step {int(newest(tmp_path / 'run').name)}" in text

    process = start_process(world, compilation_cache, tmp_path / "run", config)
    wait_for_steps(process, 2)
    process.kill()
    process.wait()
    process.stdout.read()  # until the last one that could write to it is gone
    process.stdout.close()


def test_a_finished_run_returns_its_result_at_once(world, undisturbed, tmp_path):
    run_dir, recorder = tmp_path / "run", Recorder()
    shutil.copytree(undisturbed.run_dir, run_dir)
    shutil.rmtree(run_dir / "classifier")
    result = train(world, run_dir, resume=True, reporters=[recorder])
    assert recorder.num_steps == 0
    assert f"after step {LAST_STEP} of {LAST_STEP}" in recorder.text
    assert_same(result.classifier.weights, undisturbed.classifier.weights)
    assert result.history == undisturbed.history
    assert_as_undisturbed(run_dir, undisturbed)
    exported = run_dir / "classifier" / "exported since"
    exported.touch()
    train(world, run_dir, resume=True)
    assert exported.exists()


@pytest.mark.slow
def test_ctrl_c_then_a_full_disk(world, undisturbed, compilation_cache, tmp_path):
    """Files that cannot grow are what a full disk looks like to those who write."""
    run_dir, recorder = tmp_path / "run", Recorder(stop_at=STEPS_PER_EPOCH + 2)
    with pytest.raises(KeyboardInterrupt):
        train(world, run_dir, replace(CONFIG, checkpoint_seconds=1e9), reporters=[recorder])
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"{STEPS_PER_EPOCH:08d}"]
    assert f"resumed after step {STEPS_PER_EPOCH}" in recorder.text
    kept = load(run_dir / "classifier")

    process = start_process(world, compilation_cache, run_dir, largest_file=300_000)
    text = process.stdout.read()
    process.stdout.close()
    assert process.wait() == 1
    last = text.rpartition("jaxcls.errors.TrainingError: ")[2]
    assert f"could not be written to {run_dir / 'checkpoints'}: " in last
    assert "once this is mended, resume the run" in last
    assert int(newest(run_dir).name) == STEPS_PER_EPOCH
    assert find_damage(newest(run_dir)) is None
    assert_same(load(run_dir / "classifier").weights, kept.weights)

    train(world, run_dir, resume=True)
    assert_as_undisturbed(run_dir, undisturbed)


def test_another_configuration_is_refused(world, undisturbed):
    rates = r"learning_rates was \[0.03, 0.025, 1e\+30\], is \[0.03\]; seed was 0, is 1"
    with pytest.raises(UsageError, match=f"belongs to another run: {rates}. Repeat"):
        train(world, undisturbed.run_dir, replace(CONFIG, learning_rates=(0.03,), seed=1), resume=True)


@pytest.mark.slow
def test_other_weights_and_photos_are_refused(world, undisturbed):
    fewer = read_folder(world / "photos").select(range(1, 16))
    evaluation = read_folder(world / "eval")
    options = {"eval_dataset": evaluation, "run_dir": undisturbed.run_dir, "resume": True, "reporters": []}
    with pytest.raises(UsageError, match=r"training photos\.number was 16, is 15"):
        finetune(fewer, load(world / "start"), CONFIG, **options)
    other = create_model("resnet18", 2, image_size=32, seed=1)
    with pytest.raises(UsageError, match="run: weights was"):
        finetune(read_folder(world / "photos"), other, CONFIG, **options)
    options["eval_dataset"] = None
    with pytest.raises(UsageError, match=r"evaluation photos"):
        finetune(read_folder(world / "photos"), load(world / "start"), CONFIG, **options)


def test_a_folder_without_a_run_is_refused(world, undisturbed, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds no run to resume, but something else"):
        train(world, tmp_path, resume=True)
    with pytest.raises(UsageError, match=r"is not empty.*--resume"):
        train(world, undisturbed.run_dir)
    with pytest.raises(UsageError, match="needs the run_dir"):
        train(world, None, resume=True)


# Checkpoints alone, of a state of two small arrays.


def make_snapshot(step, accuracies=()):
    generator = np.random.default_rng(step)
    state = TrainState(
        step=np.array(step, np.int32),
        params={"kernel": generator.standard_normal((5, 3), np.float32)},
        batch_stats={},
        opt_state=({"trace": generator.standard_normal((5, 3), np.float32)}, ()),
        ema_params=None,
        key=np.array([step, 7], np.uint32),
    )
    history = tuple({"step": 10 * n, "eval_accuracy": a} for n, a in enumerate(accuracies, start=1))
    return Snapshot(state, Totals(0.1 + step, 2, 3), history)


LIKE = to_devices(make_snapshot(0).state, jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def open_checkpoints(folder, identity=None, environment="2 x cpu", num_kept=2):
    return Checkpoints(folder, identity or {"seed": 0}, environment, num_kept=num_kept)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    checkpoints = open_checkpoints(tmp_path_factory.mktemp("two"))
    for step in (3, 6):
        checkpoints.save(make_snapshot(step))
    checkpoints.wait()
    return checkpoints.folder


def test_what_was_being_written_first_of_all_is_cleared_away(tmp_path):
    (tmp_path / "00000001.partial" / "arrays").mkdir(parents=True)
    assert open_checkpoints(tmp_path).restore(LIKE) == (None, [])
    assert not list(tmp_path.iterdir())


def test_one_that_was_being_replaced_is_not_lost(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(make_snapshot(3))
    checkpoints.wait()
    (tmp_path / "00000003").rename(tmp_path / "00000003.old.partial")
    (tmp_path / "00000003.partial").mkdir()
    snapshot, notes = open_checkpoints(tmp_path).restore(LIKE)
    assert (snapshot.step, notes) == (3, [])
    assert [path.name for path in tmp_path.iterdir()] == ["00000003"]


def test_what_was_saved_is_restored(two_checkpoints):
    snapshot, notes = open_checkpoints(two_checkpoints).restore(LIKE)
    assert_same(vars(snapshot.state), vars(make_snapshot(6).state))
    assert (snapshot.totals, snapshot.step, notes) == (make_snapshot(6).totals, 6, [])
    assert_same(vars(to_host(LIKE)), vars(make_snapshot(0).state))


def test_a_folder_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = open_checkpoints(Path("run/checkpoints"))
    checkpoints.save(make_snapshot(3))
    checkpoints.wait()
    snapshot, _ = open_checkpoints(Path("run/checkpoints")).restore(LIKE)
    assert snapshot.step == 3


def test_sha256sum_reads_the_checksums(two_checkpoints):
    subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", "sha256sums"],
        cwd=two_checkpoints / "00000006",
        check=True,
    )


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped": flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "deleted": Path.unlink,
    "renamed": lambda path: path.rename(path.with_name("other")),
    "another one beside it": lambda path: path.with_name("other").write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_is_noticed_and_the_checkpoint_before_is_used(two_checkpoints, tmp_path, damage):
    files = [path for path in sorted((two_checkpoints / "00000006").rglob("*")) if path.is_file()]
    assert len(files) > 5
    if damage in ("flipped", "truncated", "emptied"):  # Orbax marks the folder as its own by an empty file
        files = [path for path in files if path.stat().st_size]
    for number, file in enumerate(files):
        folder = shutil.copytree(two_checkpoints, tmp_path / str(number))
        DAMAGE[damage](folder / file.relative_to(two_checkpoints))
        snapshot, notes = open_checkpoints(folder).restore(LIKE)
        assert_same(vars(snapshot.state), vars(make_snapshot(3).state))
        (note,) = notes
        assert note.startswith(f"Checkpoint {folder / '00000006'} is damaged and passed over: ")
        assert damage == "another one beside it" or file.name in note or file.name == "sha256sums"
        assert [path.name for path in folder.iterdir()] == ["00000003"]


def test_without_a_good_checkpoint_all_are_named_and_left_alone(two_checkpoints, tmp_path):
    folder = shutil.copytree(two_checkpoints, tmp_path / "copy")
    for path in folder.glob("*/progress.json"):
        flip(path)
    with pytest.raises(TrainingError, match=r"no good checkpoint(.|\n)*00000006(.|\n)*00000003"):
        open_checkpoints(folder).restore(LIKE)
    assert len(list(folder.iterdir())) == 2


def test_another_environment_is_remarked_upon(two_checkpoints):
    snapshot, (note,) = open_checkpoints(two_checkpoints, environment="1 x gpu").restore(LIKE)
    assert snapshot.step == 6
    assert "Written on 2 x cpu, resumed on 1 x gpu" in note


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints = open_checkpoints(tmp_path, num_kept=2)
    accuracies = (0.5, 0.9, 0.7, 0.9, 0.8)
    for number in range(1, 6):
        checkpoints.save(make_snapshot(10 * number, accuracies[:number]))
    checkpoints.wait()
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [20, 40, 50]
    assert checkpoints.newest == (50, 5)


def test_an_evaluated_epoch_replaces_the_same_step_before_evaluation(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(make_snapshot(10))
    checkpoints.save(make_snapshot(10, (0.5,)))
    checkpoints.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["00000010"]
    snapshot, _ = checkpoints.restore(LIKE)
    assert snapshot.position == checkpoints.newest == (10, 1)


def test_only_the_best_epoch_waits_for_the_one_being_written(tmp_path, monkeypatch):
    checkpoints = open_checkpoints(tmp_path)
    assert checkpoints.has_room_for(make_snapshot(10, (0.5,)))
    monkeypatch.setattr(Checkpoints, "is_writing", True)
    assert checkpoints.has_room_for(make_snapshot(20, (0.5, 0.6)))
    assert not checkpoints.has_room_for(make_snapshot(20, (0.5, 0.5)))
    assert not checkpoints.has_room_for(make_snapshot(20))


def test_a_save_that_fails_is_reported_by_the_next(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    checkpoints = open_checkpoints(tmp_path / "checkpoints")
    checkpoints.save(make_snapshot(1))
    with pytest.raises(TrainingError, match=r"checkpoint of step 1 could not be written to .*checkpoints"):
        checkpoints.save(make_snapshot(2))
    checkpoints.wait()
    assert checkpoints.newest is None

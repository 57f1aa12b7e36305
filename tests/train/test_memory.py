"""Steps that would not fit, or did not, are done in parts."""

import os
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import write_photos

import jaxcls.train.finetune
from jaxcls.classifier import create_model
from jaxcls.errors import TrainingError
from jaxcls.models.resnet import make_apply
from jaxcls.parallel import make_mesh, replicated
from jaxcls.train.config import FinetuneConfig
from jaxcls.train.finetune import finetune
from jaxcls.train.held_out import HeldOut
from jaxcls.train.memory import needed_bytes
from jaxcls.train.optimizer import make_optimizer, make_schedule
from jaxcls.train.reporters import Reporter
from jaxcls.train.state import init_state, to_devices, to_host
from jaxcls.train.step import make_train_step

SLOW = pytest.mark.slow
CONFIG = FinetuneConfig(
    num_epochs=2, learning_rates=(0.03,), batch_size=8, dropout=0.0, log_every=1, batch_norm="frozen"
)


class Recorder(Reporter):
    def __init__(self):
        self.messages, self.losses = [], []

    def message(self, text):
        self.messages.append(text)

    def steps(self, num_steps, row):
        self.losses.append(row["loss"])


class Interrupt(Recorder):
    """In the second epoch."""

    def steps(self, num_steps, row):
        super().steps(num_steps, row)
        if len(self.losses) == 3:
            raise KeyboardInterrupt


def train(photos, backbone, config=CONFIG):
    recorder = Recorder()
    result = finetune(photos, backbone, config, reporters=[recorder])
    return result, recorder


@pytest.fixture(scope="module")
def whole(photos, backbone):
    return train(photos, backbone)


@pytest.fixture
def fail_at(monkeypatch):
    """The step of that number fails once as those do that run out of memory: the donated state is gone."""

    def install(step):
        advance, failed = jaxcls.train.finetune._Run._advance, []

        def failing(run, batch):
            if run.step == step and not failed:
                failed.append(step)
                jax.tree.map(lambda array: array.delete(), run.state)
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")
            return advance(run, batch)

        monkeypatch.setattr(jaxcls.train.finetune._Run, "_advance", failing)

    return install


def limit_memory(monkeypatch, limit):
    monkeypatch.setattr(jaxcls.train.finetune, "memory_limit", lambda mesh: limit)


def weights_of(result):
    return jax.tree.leaves(result.classifier.weights)


@SLOW
def test_a_step_that_fails_for_memory_is_done_in_parts(photos, backbone, whole, fail_at):
    """In the second epoch: the first one is not repeated. Without batch norm, parts are the whole."""
    fail_at(3)
    result, recorder = train(photos, backbone)
    (message,) = [text for text in recorder.messages if "ran out of memory" in text]
    assert "RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes" in message
    assert "after step 2, batches are done in 2 parts of 4 images" in message
    assert "last digits alone" in message
    # The fourth step failed; the third is done again, from the epoch's start.
    assert recorder.losses[:3] == whole[1].losses[:3]
    np.testing.assert_allclose(recorder.losses[3:], whole[1].losses[2:], rtol=1e-4)
    assert result.history[0]["train_loss"] == whole[0].history[0]["train_loss"]
    assert result.history[1]["train_loss"] == pytest.approx(whole[0].history[1]["train_loss"], rel=1e-4)


@SLOW
def test_what_was_foreseen_and_what_failed_train_alike(photos, backbone, monkeypatch, fail_at):
    """To the bit, and with batch norm, which differs from that of whole batches."""
    config = replace(CONFIG, batch_norm="train", dropout=0.5)
    with monkeypatch.context() as context:
        needed = iter((2**22, 2**19))
        context.setattr(jaxcls.train.finetune, "needed_bytes", lambda compiled: next(needed))
        limit_memory(context, 2**21)
        foreseen, recorder = train(photos, backbone, config)
    assert any("A step would take 4.0 MiB of the 2.0 MiB" in text for text in recorder.messages)
    assert any("batch norm sees the images of one part at a time" in text for text in recorder.messages)
    fail_at(0)
    failed, recorder = train(photos, backbone, config)
    assert any("ran out of memory" in text for text in recorder.messages)
    for one, other in zip(weights_of(foreseen), weights_of(failed), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_cannot_be_divided_is_an_error(photos, backbone, monkeypatch):
    limit_memory(monkeypatch, 2**20)
    monkeypatch.setattr(jaxcls.train.finetune, "needed_bytes", lambda compiled: 2**30)
    message = r"A step would take 1\.0 GiB of the 1\.0 MiB .* 6 images on 2 devices cannot be divided"
    with pytest.raises(TrainingError, match=message):
        train(photos, backbone, replace(CONFIG, batch_size=6))


def test_an_evaluation_that_runs_out_of_memory_is_an_error(photos, backbone, monkeypatch):
    def fail(held_out, *arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")

    monkeypatch.setattr(HeldOut, "_totals", fail)
    with pytest.raises(TrainingError, match="the evaluation ran out of memory: use smaller batches"):
        finetune(photos, backbone, CONFIG, eval_dataset=photos, reporters=[])


@SLOW
def test_a_resumed_run_keeps_its_parts(photos, backbone, fail_at, monkeypatch, tmp_path):
    """Stopped in the second epoch, after the batch was divided in the first."""
    config = replace(CONFIG, batch_norm="train", checkpoint_seconds=0.01)
    fail_at(0)
    undisturbed, _ = train(photos, backbone, config)
    fail_at(0)
    with pytest.raises(KeyboardInterrupt):
        finetune(photos, backbone, config, run_dir=tmp_path / "run", reporters=[Interrupt()])
    resumed = finetune(photos, backbone, config, run_dir=tmp_path / "run", resume=True, reporters=[])
    for one, other in zip(weights_of(resumed), weights_of(undisturbed), strict=True):
        np.testing.assert_array_equal(one, other)


LIMITED = """
import resource, sys
import jaxcls.train.finetune
from jaxcls.classifier import create_model
from jaxcls.data.folder import read_folder
from jaxcls.train.config import FinetuneConfig
from jaxcls.train.memory import needed_bytes
from jaxcls.train.reporters import Reporter

class Print(Reporter):
    def message(self, text):
        print(text, flush=True)
        # Or some allocation of C++ might end the process.
        if "ran out of memory" in text:
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))

def limit_and_measure(compiled, found=[]):
    found.append(needed_bytes(compiled))
    if len(found) == 1:
        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + int(0.8 * found[0]), -1))
    return found[-1]

if __name__ == "__main__":
    jaxcls.train.finetune.needed_bytes = limit_and_measure
    jaxcls.train.finetune.finetune(
        read_folder(sys.argv[1]), create_model("resnet18", 2, image_size=224).backbone,
        FinetuneConfig(num_epochs=1, batch_size=32, learning_rates=(0.001,), min_crop_area=0.5),
        reporters=[Print()],
    )
"""


@SLOW
def test_a_process_that_really_runs_out_of_memory(tmp_path):
    """Until it has failed, it may grow by less than a step of the whole batch takes."""
    write_photos(tmp_path / "photos", {"blue": 16, "red": 16})
    (tmp_path / "limited.py").write_text(LIMITED)
    done = subprocess.run(
        [sys.executable, tmp_path / "limited.py", tmp_path / "photos"],
        env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "RESOURCE_EXHAUSTED" in done.stdout, done.stderr
    assert "batches are done in 2 parts of 16 images" in done.stdout
    assert done.returncode == 0, done.stderr


@SLOW
def test_parts_take_less_memory():
    """By XLA's account, at a size where the activations outweigh the weights."""
    backbone, config = create_model("resnet18", 2, image_size=128).backbone, FinetuneConfig()
    optimizer = make_optimizer(config, make_schedule(config, 10))
    mesh = make_mesh(1)
    host = to_host(init_state(backbone, 2, optimizer, seed=0, use_ema=False))
    state = to_devices(host, replicated(mesh))
    needed = []
    for num_parts in (1, 4):
        step = make_train_step(
            make_apply("resnet18"), backbone.preprocess, optimizer, mesh, dropout=0.0,
            label_smoothing=0.0, weights=None, ema_decay=None, num_parts=num_parts,
        )  # fmt: skip
        images = jax.ShapeDtypeStruct((64, 128, 128, 3), np.uint8)
        compiled = step.lower(state, images, jax.ShapeDtypeStruct((64,), np.int32)).compile()
        needed.append(needed_bytes(compiled))
    assert needed[1] < 0.6 * needed[0]

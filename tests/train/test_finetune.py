"""`finetune` as a whole, with a ResNet-18 at 32 pixels. Compiling takes long: most runs share one program."""

import json
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import write_photos
from PIL import Image

import jaxcls.train.programs
from jaxcls.classifier import load
from jaxcls.data.dataset import Dataset
from jaxcls.data.folder import read_folder
from jaxcls.data.source import MemorySource
from jaxcls.data.splitting import read_split
from jaxcls.errors import DatasetError, TrainingError, UsageError
from jaxcls.scoring import make_scorer, predict
from jaxcls.train.config import FinetuneConfig
from jaxcls.train.finetune import finetune
from jaxcls.train.reporters import Reporter
from jaxcls.train.step import Sums

STEPS_PER_EPOCH = 3
SLOW = pytest.mark.slow
# The third rate is for the run that diverges: rates are part of the program.
CONFIG = FinetuneConfig(
    num_epochs=2, learning_rates=(0.03, 0.025, 1e30), batch_size=6, dropout=0.0, log_every=1
)
ONE_EPOCH = replace(CONFIG, num_epochs=1)


class Recorder(Reporter):
    def __init__(self):
        self.messages, self.losses, self.epochs, self.num_closed = [], [], [], 0

    def message(self, text):
        self.messages.append(text)

    def steps(self, num_steps, row):
        assert num_steps == 1
        self.losses.append(row["loss"])

    def epoch(self, row):
        self.epochs.append(row)

    def close(self):
        self.num_closed += 1


class StopAt(Recorder):
    """Presses Ctrl-C after a number of steps; 0: before the first."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def message(self, text):
        super().message(text)
        if self.step == 0:
            raise KeyboardInterrupt

    def steps(self, num_steps, row):
        super().steps(num_steps, row)
        if len(self.losses) == self.step:
            raise KeyboardInterrupt


def draw_photo(shade=0):
    return np.random.default_rng(shade).integers(0, 256, (40, 48, 3), np.uint8)


def memory_dataset(labels, classes):
    photos = [draw_photo(number) for number in range(len(labels))]
    return Dataset("memory", classes, labels, [str(i) for i in range(len(labels))], MemorySource(photos))


def assert_same(actual, expected):
    leaves = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for number, (one, other) in enumerate(leaves):
        np.testing.assert_array_equal(one, other, err_msg=f"leaf {number}")


@pytest.fixture(scope="module")
def eval_photos(tmp_path_factory):
    """7 photos, which fill no whole number of batches, with the classes in another order."""
    folder = write_photos(tmp_path_factory.mktemp("eval"), {"red": 4, "blue": 3}, seed=1)
    return read_folder(folder, classes=("red", "blue"))


@pytest.fixture(scope="module")
def run(photos, backbone, eval_photos, tmp_path_factory):
    """Two epochs, everything written: the result and what a listener heard."""
    recorder = Recorder()
    run_dir = tmp_path_factory.mktemp("runs") / "first"
    before = jax.tree.map(np.array, backbone.variables)
    result = finetune(
        photos, backbone, CONFIG, eval_dataset=eval_photos, run_dir=run_dir, reporters=[recorder]
    )
    assert_same(backbone.variables, before)
    return result, recorder


@pytest.fixture(scope="module")
def one_epoch(photos, backbone, tmp_path_factory):
    """The first epoch of `run` alone, evaluated on blue photos only."""
    blue = read_folder(write_photos(tmp_path_factory.mktemp("blue"), {"blue": 5}), classes=("blue",))
    return finetune(photos, backbone, ONE_EPOCH, eval_dataset=blue, reporters=[])


def test_learns_to_tell_red_from_blue(run):
    first, last = run[0].history
    assert last["train_loss"] < 0.8 * first["train_loss"]
    assert 1 - last["train_accuracy"] < 1 - first["train_accuracy"]


def test_a_row_of_the_history(run):
    result, recorder = run
    assert recorder.epochs == result.history
    for epoch, row in enumerate(result.history, start=1):
        assert (row["epoch"], row["step"]) == (epoch, epoch * STEPS_PER_EPOCH)
        assert row["learning_rate"] == CONFIG.learning_rates[epoch - 1]
        losses = recorder.losses[STEPS_PER_EPOCH * (epoch - 1) : STEPS_PER_EPOCH * epoch]
        assert row["train_loss"] == pytest.approx(np.mean(losses))
        assert row["images_per_second"] > 0
    assert recorder.num_closed == 1


def test_the_run_is_described_first(run):
    _, recorder = run
    (text,) = recorder.messages
    num_parameters = 11_689_512 - 513 * 1000 + 513 * 2
    assert f"16 images of 2 classes: {num_parameters} parameters in 62 tensors" in text
    assert "2 epochs of 3 steps with 6 images of 32 px in float32 on 2 x cpu" in text
    assert "smaller than a batch" not in text


def test_evaluation_photos_that_are_trained_on_are_warned_of(photos, backbone):
    """Unless both sets have groups: then `split` has kept those on one side that show the same."""
    warning = "warning: 2 of 2 test images show the same as a training image"
    for groups, is_warned in ((None, True), (np.arange(16), False)):
        grouped, recorder = replace(photos, groups=groups), StopAt(0)
        with pytest.raises(KeyboardInterrupt):
            finetune(grouped, backbone, CONFIG, eval_dataset=grouped.select([3, 12]), reporters=[recorder])
        assert (warning in recorder.messages[0]) == is_warned


def test_augmented_copies_are_not_evaluated_on(photos, backbone):
    """Nor do their groups, of copies and originals, pass for a search for duplicates."""
    copies, recorder = replace(photos, origins=[photos.ids[1], *[""] * 15]), StopAt(0)
    with pytest.raises(UsageError, match=r"1 of the 2 images of dataset .* are augmented copies"):
        finetune(photos, backbone, CONFIG, eval_dataset=copies.select([0, 3]), reporters=[recorder])
    with pytest.raises(KeyboardInterrupt):
        finetune(copies, backbone, CONFIG, eval_dataset=copies.select([3, 12]), reporters=[recorder])
    assert "warning: 2 of 2 test images show the same as a training image" in recorder.messages[0]


def test_evaluation_counts_every_photo_once_and_matches_classes_by_name(run, one_epoch, eval_photos):
    result, _ = run
    predictions = predict(result.classifier, eval_photos, precision="float32")
    last = result.history[-1]
    assert last["eval_num_seen"] == 7
    assert last["eval_num_correct"] == (predictions.predicted == predictions.labels).sum()
    assert last["eval_accuracy"] == last["eval_num_correct"] / 7
    logits, labels = predictions.scores.astype(np.float64), predictions.labels
    logits -= logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(7), labels]
    assert last["eval_loss"] == pytest.approx(losses.mean(), rel=1e-3, abs=1e-5)
    assert one_epoch.history[0]["eval_num_seen"] == 5


def test_the_run_folder(run, photos):
    result, _ = run
    names = {path.name for path in result.run_dir.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    files = {"config.json", "train_ids.txt", "test_ids.txt", "metrics.jsonl", "accuracy.png"}
    assert names - events == {*files, "checkpoints", "classifier"}
    train_ids, test_ids = read_split(result.run_dir)
    assert set(train_ids) | set(test_ids) <= set(photos.ids)
    assert (
        len(train_ids)
        == json.loads((result.run_dir / "config.json").read_text())["datasets"]["train"]["num_images"]
    )
    assert len(test_ids) == result.history[0]["eval_num_seen"]
    rows = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{k: v for k, v in row.items() if k != "images_per_second"} for row in result.history]
    written = json.loads((result.run_dir / "config.json").read_text())
    assert written["config"]["learning_rates"] == [0.03, 0.025, 1e30]
    assert written["config"]["seed"] == 0
    assert written["datasets"]["train"] == {"name": photos.name, "classes": ["blue", "red"], "num_images": 16}
    assert written["datasets"]["eval"]["num_images"] == 7
    with Image.open(result.run_dir / "accuracy.png") as plot:
        assert plot.size == (600, 400)


def test_the_written_classifier_scores_bitwise_as_the_returned_one(run):
    result, _ = run
    loaded = load(result.run_dir / "classifier")
    assert_same(loaded.weights, result.classifier.weights)
    images = np.stack([draw_photo()[:32, :32]])
    scores = [make_scorer(one, batch_sizes=(1,))(images) for one in (loaded, result.classifier)]
    np.testing.assert_array_equal(*scores)
    assert loaded.classes == ("blue", "red")
    assert loaded.provenance["num_epochs_done"] == 2
    assert loaded.provenance["config"]["batch_size"] == 6


def test_tensorboard_events_are_readable(run):
    from tensorboardX.proto.event_pb2 import Event

    result, recorder = run
    (path,) = result.run_dir.glob("events.*")
    data, scalars = path.read_bytes(), {}
    while data:  # TFRecord: length, its checksum, payload, its checksum
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
        for value in event.summary.value:
            scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    assert [step for step, _ in scalars["step/loss"]] == list(range(1, 7))
    np.testing.assert_allclose([loss for _, loss in scalars["step/loss"]], recorder.losses, rtol=1e-6)
    expected = [(row["epoch"], row["eval_accuracy"]) for row in result.history]
    np.testing.assert_allclose(scalars["epoch/eval_accuracy"], expected, rtol=1e-6)


def test_ctrl_c_leaves_the_last_whole_epoch(photos, backbone, eval_photos, one_epoch, tmp_path):
    """It also shows that a seed gives the same parameters, bit for bit."""
    recorder = StopAt(step=STEPS_PER_EPOCH + 2)
    with pytest.raises(KeyboardInterrupt):
        finetune(photos, backbone, CONFIG, eval_dataset=eval_photos, run_dir=tmp_path, reporters=[recorder])
    assert recorder.num_closed == 1
    kept = load(tmp_path / "classifier")
    assert kept.provenance["num_epochs_done"] == 1
    assert_same(kept.weights, one_epoch.classifier.weights)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    assert (tmp_path / "accuracy.png").is_file()
    assert (tmp_path / "config.json").is_file()


def test_ctrl_c_in_the_first_epoch_leaves_no_classifier(photos, backbone, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        finetune(photos, backbone, CONFIG, run_dir=tmp_path, reporters=[StopAt(step=0)])
    assert not (tmp_path / "classifier").exists()
    assert not (tmp_path / "accuracy.png").exists()


def test_another_seed_trains_otherwise(photos, backbone, run):
    recorder = StopAt(step=2)
    with pytest.raises(KeyboardInterrupt):
        finetune(photos, backbone, replace(CONFIG, seed=1), reporters=[recorder])
    assert recorder.losses != run[1].losses[:2]


def losses_of(dataset, backbone, config, num_steps):
    recorder = StopAt(step=num_steps)
    with pytest.raises(KeyboardInterrupt):
        finetune(dataset, backbone, config, reporters=[recorder])
    return recorder


def test_resident_and_streamed_photos_train_alike(photos, backbone, run):
    """Without random crops the pixels are the same, and so are the losses, to the bit."""
    recorder = losses_of(photos, backbone, replace(CONFIG, pipeline="streaming"), 5)
    assert "Streaming, as configured" in recorder.messages[0]
    assert "Resident: decoded once, 0.0 MiB on each device" in run[1].messages[0]
    assert recorder.losses == run[1].losses[:5]


@SLOW
def test_random_crops_of_resident_and_streamed_photos_train_alike(photos, backbone):
    """Batch norm over 6 values would multiply the rounding of pixels."""
    config = replace(CONFIG, min_crop_area=0.3, colour_jitter=0.2, batch_norm="frozen")
    losses = [
        losses_of(photos, backbone, replace(config, pipeline=pipeline), 5).losses
        for pipeline in ("resident", "streaming")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-3)
    assert np.ptp(losses[0]) > 0.01


@SLOW
def test_steps_in_blocks_train_as_one_by_one(photos, backbone, monkeypatch):
    """As on accelerators; batch norm over 6 values would multiply the rounding of another program."""
    config = replace(CONFIG, batch_norm="frozen", precision="float32")
    one_by_one = losses_of(photos, backbone, config, 6).losses
    monkeypatch.setattr(jax, "default_backend", lambda: "accelerator")
    rows = []
    reporter = Reporter()
    reporter.steps = lambda num_steps, row: rows.append((num_steps, row["loss"]))
    finetune(photos, backbone, replace(config, log_every=2), reporters=[reporter])
    assert [num_steps for num_steps, _ in rows] == [2, 1] * 2
    expected = [np.mean(one_by_one[i : i + n]) for i, n in ((0, 2), (2, 1), (3, 2), (5, 1))]
    np.testing.assert_allclose([loss for _, loss in rows], expected, rtol=1e-3)


@SLOW
def test_worker_processes_change_nothing(photos, backbone, one_epoch):
    result = finetune(photos, backbone, replace(ONE_EPOCH, num_workers=2, pipeline="streaming"), reporters=[])
    assert_same(result.classifier.weights, one_epoch.classifier.weights)


def changed_parts(backbone, classifier):
    """Names of stem, stages and statistics of which something changed, and of those of which nothing did."""
    names = {True: set(), False: set()}
    for collection, tree in backbone.variables.items():
        for path, before in jax.tree.leaves_with_path(tree):
            after = classifier.backbone.variables[collection]
            for key in path:
                after = after[key.key]
            changed = not np.array_equal(before, after)
            names[changed].add((collection, path[0].key, path[-1].key))
    return names[True], names[False]


@pytest.mark.parametrize(
    ("options", "stays"),
    [
        ({"freeze": "backbone"}, lambda part, leaf: True),
        (
            {"freeze": 2, "batch_norm": "frozen"},
            lambda part, leaf: part in ("stem", "stage1", "stage2") or leaf != "kernel",
        ),
        pytest.param({"freeze": 2}, lambda part, leaf: part in ("stem", "stage1", "stage2"), marks=SLOW),
        pytest.param({"batch_norm": "frozen"}, lambda part, leaf: leaf != "kernel", marks=SLOW),
    ],
)
def test_what_is_frozen_stays_bitwise_and_all_else_moves(photos, backbone, options, stays):
    config = FinetuneConfig(num_epochs=1, learning_rates=(0.1,), batch_size=4, dropout=0.0, **options)
    result = finetune(photos.select([0, 8, 1, 9]), backbone, config, reporters=[])
    moved, stayed = changed_parts(backbone, result.classifier)
    assert moved.isdisjoint(stayed)
    assert stayed == {name for name in moved | stayed if stays(*name[1:])}


def test_a_diverging_run_names_step_and_photos_and_keeps_the_last_whole_epoch(photos, backbone, tmp_path):
    config = replace(CONFIG, num_epochs=3)
    with pytest.raises(TrainingError, match="the loss is nan at step 8: lower the learning rates") as caught:
        finetune(photos, backbone, config, run_dir=tmp_path, reporters=[])
    named = str(caught.value).partition("batch: ")[2].split(", ")
    assert len(named) == 6
    assert set(named) <= set(photos.ids)
    kept = load(tmp_path / "classifier")
    assert kept.provenance["num_epochs_done"] == 2
    assert not predict(kept, photos).errors  # and all scores are finite, else `Predictions` refuses them


def test_an_evaluation_that_shows_divergence_keeps_the_epoch_before(
    photos, backbone, eval_photos, monkeypatch
):
    """The last step of an epoch ruins the parameters after its own loss was computed."""
    monkeypatch.setattr(jaxcls.train.programs, "make_train_step", lambda *args, **options: jax.jit(ruin))

    def ruin(state, images, labels):
        bias = state.params["head"]["bias"] + np.nan
        params = state.params | {"head": state.params["head"] | {"bias": bias}}
        sums = Sums(np.float32(4), np.int32(2), np.int32(4))
        return replace(state, step=state.step + 1, params=params), sums

    recorder = Recorder()
    with pytest.raises(TrainingError, match="evaluation loss is nan after step 3"):
        finetune(photos, backbone, CONFIG, eval_dataset=eval_photos, reporters=[recorder])
    assert recorder.epochs == []


def test_a_training_set_smaller_than_a_batch_repeats(backbone):
    recorder = StopAt(step=0)
    dataset = memory_dataset([0, 1, 1], ("a", "b"))
    with pytest.raises(KeyboardInterrupt):
        finetune(dataset, backbone, ONE_EPOCH, reporters=[recorder])
    assert "smaller than a batch of 6: images repeat within it" in recorder.messages[0]


@pytest.fixture
def spoilt(tmp_path):
    """17 photos, one of them undecodable; with and without it, as many steps as the other runs have."""
    folder = write_photos(tmp_path / "spoilt", {"blue": 8, "red": 9})
    (folder / "red" / "3.png").write_bytes(b"no picture")
    return read_folder(folder)


def test_undecodable_photos_are_refused_or_left_out(spoilt, backbone):
    with pytest.raises(DatasetError, match=r"1 of 17 images cannot be decoded(.|\n)*3\.png"):
        finetune(spoilt, backbone, CONFIG, reporters=[])
    recorder = StopAt(step=0)
    with pytest.raises(KeyboardInterrupt):
        finetune(spoilt, backbone, replace(CONFIG, max_bad_fraction=0.1), reporters=[recorder])
    assert "on 16 images" in recorder.messages[0]
    assert re.search(r"1 undecodable images left out:\n .*3\.png", recorder.messages[0])


class Remove(Reporter):
    """Deletes a file when the run starts, after the datasets have been looked through."""

    def __init__(self, path):
        self.path = path

    def message(self, text):
        self.path.unlink()


@pytest.mark.parametrize("part", ["training", "evaluation"])
def test_a_photo_that_vanishes_during_the_run_ends_it(photos, backbone, tmp_path, part):
    vanishing = read_folder(write_photos(tmp_path / "photos", {"blue": 8, "red": 8}))
    training, evaluation = (vanishing, photos) if part == "training" else (photos, vanishing)
    path = vanishing.source.path(5)
    streaming = replace(ONE_EPOCH, pipeline="streaming")
    with pytest.raises(DatasetError, match=f"unreadable during training: .*{path.name}"):
        finetune(training, backbone, streaming, eval_dataset=evaluation, reporters=[Remove(path)])


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        ([0, 0, 1], ("a", "b", "c"), "no images of c"),
        ([0, 0], ("a",), "a classifier needs two"),
        ([0, 1, -1], ("a", "b"), "1 unlabelled"),
    ],
)
def test_a_dataset_that_teaches_no_classifier_is_refused(backbone, labels, classes, message):
    with pytest.raises(DatasetError, match=message):
        finetune(memory_dataset(labels, classes), backbone, CONFIG, reporters=[])


@pytest.mark.parametrize(
    ("labels", "classes", "error", "message"),
    [
        ([0, 1], ("blue", "green"), UsageError, "photos of green"),
        ([0, -1], ("blue",), DatasetError, "all of them labelled"),
        ([], ("blue",), DatasetError, "needs images"),
    ],
)
def test_an_evaluation_set_that_measures_nothing_is_refused(
    photos, backbone, labels, classes, error, message
):
    with pytest.raises(error, match=message):
        finetune(photos, backbone, CONFIG, eval_dataset=memory_dataset(labels, classes), reporters=[])


def test_a_folder_that_holds_something_is_refused_and_left_alone(photos, backbone, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        finetune(photos, backbone, CONFIG, run_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(UsageError, match="cannot hold a run"):
        finetune(photos, backbone, CONFIG, run_dir=tmp_path / "notes.txt")


def test_class_weights_of_unknown_classes_are_refused(photos, backbone):
    with pytest.raises(UsageError, match="class_weight names unknown classes: green; known are blue, red"):
        finetune(photos, backbone, replace(CONFIG, class_weight={"green": 2.0}), reporters=[])


def test_an_unknown_rule_of_class_weights_is_refused():
    with pytest.raises(UsageError, match="class_weight must be"):
        replace(CONFIG, class_weight="equal")


def test_the_console_is_the_default_reporter(photos, backbone, run, capfd):
    """Without a terminal: plain lines, and nothing on standard output."""
    finetune(photos, backbone, ONE_EPOCH)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert re.search(
        r"^epoch   1/1  rate 0\.03  loss \d+\.\d{4}  error \d+\.\d\d%  [\d.]+ images/s$", captured.err, re.M
    )
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", captured.err)

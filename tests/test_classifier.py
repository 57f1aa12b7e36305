"""`Classifier`: saved and loaded, damaged and edited; models untrained and from published weights."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy.special import expit

from jaxcls.classifier import (
    Classifier,
    Head,
    apply_head,
    create_model,
    imagenet_classifier,
    load,
    load_parity,
)
from jaxcls.errors import ClassifierError, UsageError, WeightsError
from jaxcls.models.port import from_variables
from jaxcls.models.pretrained import imagenet_classes
from jaxcls.scoring import check_parity, make_scorer, predict
from jaxcls.storage import file_sha256

CLASSES = ("Löffel", "茶碗", "a/b c\u2028🍴")
FILES = ("classifier.json", "weights.safetensors", "parity.npz")
IMAGE = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def classifier(compilation_cache):
    created = create_model("resnet18", CLASSES, image_size=32, seed=5)
    head = replace(created.head, normalize=True, thresholds=np.asarray([0.1, -2.5, 1e9], np.float32))
    return replace(created, head=head, provenance={"method": "none", "note": "ü"})


@pytest.fixture(scope="module")
def saved(classifier, tmp_path_factory):
    return classifier.save(tmp_path_factory.mktemp("saved") / "new folder" / "tableware.jaxcls")


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the saved classifier, to be spoilt."""
    return shutil.copytree(saved, tmp_path / "copy")


def test_what_is_loaded_is_what_was_saved(classifier, saved):
    loaded = load(saved)
    assert loaded.classes == CLASSES
    assert loaded.preprocess == classifier.preprocess
    assert loaded.provenance == classifier.provenance
    assert loaded.backbone.provenance == classifier.backbone.provenance
    assert (loaded.head.kind, loaded.head.normalize) == ("logit", True)
    np.testing.assert_array_equal(loaded.head.thresholds, classifier.head.thresholds)
    assert repr(loaded) == "Classifier(resnet18, 32 px, 3 classes)"


def test_a_new_process_scores_bitwise_alike(classifier, saved, tmp_path):
    np.save(tmp_path / "image.npy", IMAGE)
    program = (
        "import sys, numpy, jaxcls\n"
        "score = jaxcls.make_scorer(jaxcls.load(sys.argv[1]), batch_sizes=(1,))\n"
        "numpy.save(sys.argv[3], score(numpy.load(sys.argv[2])))\n"
    )
    arguments = [saved, tmp_path / "image.npy", tmp_path / "scores.npy"]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, timeout=120)
    expected = make_scorer(classifier, batch_sizes=(1,))(IMAGE)
    np.testing.assert_array_equal(np.load(tmp_path / "scores.npy"), expected)


def test_a_folder_holds_three_files_and_no_pickle(saved):
    assert sorted(path.name for path in saved.iterdir()) == sorted(FILES)
    images, scores, _ = load_parity(saved)  # reads with allow_pickle=False
    assert (images.shape, images.dtype) == ((2, 32, 32, 3), np.uint8)
    assert (scores.shape, scores.dtype) == ((2, 3), np.float32)
    assert all(array.dtype == np.float32 for array in load_file(saved / "weights.safetensors").values())
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]  # no scratch folder is left


def test_the_manifest_is_readable_text(saved):
    text = (saved / "classifier.json").read_text(encoding="utf-8")
    manifest = json.loads(text)
    assert "Löffel" in text
    assert manifest["architecture"] == "resnet18"
    assert manifest["preprocess"]["size"] == 32
    assert set(manifest["versions"]) == {"jaxcls", "jax", "flax", "numpy"}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x80
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def delete(path):
    path.unlink()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip, truncate, delete])
def test_a_damaged_file_is_named(copy, name, damage):
    damage(copy / name)
    with pytest.raises(ClassifierError, match=name):
        load(copy)


@pytest.mark.parametrize("damage", [flip, truncate, delete])
def test_damaged_parity_vectors_are_named(copy, classifier, damage):
    damage(copy / "parity.npz")
    with pytest.raises(ClassifierError, match=r"parity\.npz"):
        load_parity(copy)


def test_a_path_that_holds_no_classifier(tmp_path):
    (tmp_path / "file").write_text("hello")
    for path in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(ClassifierError, match="is no saved classifier"):
            load(path)


EDITS = {
    "another format": {"format": "something"},
    "no format": {"format": None},
    "a newer version": {"format_version": 2},
    "no version": {"format_version": None},
    "too few classes": {"classes": ["a", "b"]},
    "a class twice": {"classes": ["a", "b", "a"]},
    "classes that are a number": {"classes": 3},
    "classes that are no names": {"classes": [1, 2, 3]},
    "an unknown architecture": {"architecture": "resnet19"},
    "another architecture": {"architecture": "resnet34"},
    "an architecture that is a list": {"architecture": ["resnet18"]},
    "no architecture": {"architecture": None},
    "an unknown interpolation": {"preprocess": {"interpolation": "nearest"}},
    "a size below 1": {"preprocess": {"size": 0}},
    "a size that is text": {"preprocess": {"size": "32"}},
    "a mean of two": {"preprocess": {"mean": [0.5, 0.5]}},
    "an unknown field of preprocess": {"preprocess": {"gamma": 1}},
    "an unknown kind": {"head": {"kind": "votes"}},
    "an unknown calibration": {"head": {"kind": "probability", "calibration": "isotonic"}},
    "logits that are calibrated": {"head": {"calibration": "sigmoid"}},
    "too few thresholds": {"head": {"thresholds": [0.5]}},
    "thresholds that are text": {"head": {"thresholds": "high"}},
    "no head": {"head": None},
    "provenance that is text": {"provenance": "ours"},
    "no provenance": {"provenance": None},
    "no checksums": {"sha256": None},
    "a wrong checksum": {"sha256": {"parity.npz": "0" * 64}},
    "a checksum that is a number": {"sha256": {"parity.npz": 1}},
    "a file outside the folder": {"sha256": {"../../etc/passwd": "0" * 64}},
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_manifest_is_refused(copy, edit):
    path = copy / "classifier.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for name, value in edit.items():
        manifest[name] = manifest[name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ClassifierError, match="copy"):
        load(copy)


@pytest.mark.parametrize("text", ["", "no JSON", "[1, 2]", "null", "[" * 100_000])
def test_a_manifest_that_is_none_is_refused(copy, text):
    (copy / "classifier.json").write_text(text)
    with pytest.raises(ClassifierError, match=r"classifier\.json"):
        load(copy)


def test_weights_of_another_network_are_refused_though_their_checksum_fits(copy):
    weights = load_file(copy / "weights.safetensors")
    first = next(iter(weights))
    save_file(weights | {first: weights[first][..., :1]}, copy / "weights.safetensors")
    path = copy / "classifier.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["sha256"]["weights.safetensors"] = file_sha256(copy / "weights.safetensors")
    path.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ClassifierError, match="do not fit together"):
        load(copy)


def test_saving_replaces_an_older_classifier(classifier, copy):
    two = replace(
        classifier, head=Head(classifier.head.kernel[:, :2], classifier.head.bias[:2]), classes=("a", "b")
    )
    (copy / "program").mkdir()
    two.save(copy)
    assert load(copy).classes == ("a", "b")
    assert sorted(path.name for path in copy.iterdir()) == sorted(FILES)


def test_weights_are_stored_whatever_their_strides(classifier, tmp_path):
    transposed = np.ascontiguousarray(classifier.head.kernel.T).T
    replace(classifier, head=replace(classifier.head, kernel=transposed)).save(tmp_path / "t")
    np.testing.assert_array_equal(load(tmp_path / "t").head.kernel, classifier.head.kernel)


def test_an_interrupt_between_the_renames_brings_the_old_one_back(classifier, copy, monkeypatch):
    rename = Path.rename

    def interrupted(path, target):
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        classifier.save(copy)
    assert load(copy).classes == CLASSES


def test_saving_over_anything_else_is_refused(classifier, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ClassifierError, match="is no saved classifier: choose another path"):
            classifier.save(path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_failed_save_leaves_what_was_there(classifier, copy, monkeypatch):
    def fail(path, content):
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    for path in (copy, copy.parent / "new"):
        with pytest.raises(ClassifierError, match=r"cannot save to .*No space left"):
            classifier.save(path)
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]
    assert load(copy).classes == CLASSES


def test_parity_holds_until_the_weights_change(classifier, saved):
    assert check_parity(load(saved), saved, "float32") <= 1e-5  # saved unfolded, scored folded
    kernel = classifier.head.kernel.copy()
    kernel[0, 0] += 1
    altered = replace(classifier, head=replace(classifier.head, kernel=kernel))
    with pytest.raises(ClassifierError, match=r"scores differ from the saved ones by .*, allowed 0\.0001"):
        check_parity(altered, saved, "float32")


def test_parity_in_bfloat16_has_a_wider_tolerance(classifier, saved):
    assert 1e-4 < check_parity(classifier, saved, "bfloat16") <= 5e-2


def test_below_its_threshold_a_class_is_not_predicted(classifier):
    """The three scores are the biases: the features are multiplied by zero."""
    head = Head(np.zeros((512, 3), np.float32), np.asarray([1.0, 3.0, 2.0], np.float32))
    for thresholds, predicted in (([0, 3, 9], 1), ([0, 3.1, 0], -1)):
        strict = replace(head, thresholds=np.asarray(thresholds, np.float32))
        predictions = predict(replace(classifier, head=strict), [IMAGE[0], b"no picture"])
        np.testing.assert_array_equal(predictions.predicted, [predicted, -1])
        np.testing.assert_array_equal(predictions.abstained, [predicted == -1, False])


def as_probabilities(products, calibration):
    """By the formulas, in float64."""
    chances = (
        np.exp(products.astype(float)) if calibration == "temperature" else expit(products.astype(float))
    )
    return chances / chances.sum(1, keepdims=True)


@pytest.mark.parametrize("calibration", [pytest.param("temperature", marks=pytest.mark.slow), "sigmoid"])
def test_a_calibrated_classifier_is_saved_loaded_and_scores_alike(classifier, saved, tmp_path, calibration):
    head = replace(classifier.head, kind="probability", calibration=calibration)
    path = replace(classifier, head=head).save(tmp_path / "calibrated")
    loaded = load(path)
    assert (loaded.head.kind, loaded.head.calibration) == ("probability", calibration)
    expected = as_probabilities(load_parity(saved)[1], calibration)
    np.testing.assert_allclose(load_parity(path)[1], expected, rtol=1e-5)
    assert check_parity(loaded, path, "float32") <= 1e-5
    uncalibrated = replace(loaded, head=replace(loaded.head, calibration=None))
    with pytest.raises(ClassifierError, match="scores differ from the saved ones"):
        check_parity(uncalibrated, path, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("calibration", ["temperature", "sigmoid"])
def test_a_calibrated_classifier_folded_in_bfloat16_keeps_parity(classifier, tmp_path, calibration):
    for slope in (1.0, 10.0):
        kernel = slope * classifier.head.kernel
        head = replace(classifier.head, kernel=kernel, kind="probability", calibration=calibration)
        steep = replace(classifier, head=head)
        path = steep.save(tmp_path / "calibrated")
        assert 0 < check_parity(steep, path, "bfloat16") <= 5e-2


@pytest.mark.slow
@pytest.mark.parametrize("calibration", ["temperature", "sigmoid"])
def test_predictions_of_a_calibrated_classifier_are_probabilities(classifier, calibration):
    head = replace(classifier.head, kind="probability", calibration=calibration)
    predictions = predict(replace(classifier, head=head), [IMAGE[0]])
    products = predict(classifier, [IMAGE[0]]).scores
    assert predictions.kind == "probability"
    np.testing.assert_allclose(predictions.scores, as_probabilities(products, calibration), rtol=1e-5)
    np.testing.assert_array_equal(predictions.probabilities(), predictions.scores)


@pytest.mark.parametrize("calibration", ["temperature", "sigmoid"])
def test_apply_head_calibrates_by_the_formulas(calibration):
    rng = np.random.default_rng(0)
    features = 3 * rng.standard_normal((20, 5), np.float32)
    weights = {"kernel": rng.standard_normal((5, 4), np.float32), "bias": rng.standard_normal(4, np.float32)}
    scores = np.asarray(apply_head(weights, features, calibration=calibration))
    products = features @ weights["kernel"] + weights["bias"]
    np.testing.assert_allclose(scores, as_probabilities(products, calibration), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(scores.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("calibration", ["temperature", "sigmoid"])
@pytest.mark.parametrize("product", [-1e4, -100.0, 100.0, 1e4])
def test_certainty_is_finite(calibration, product):
    """A logistic function is 0 in float32 below -104: of three such classes none is likelier."""
    weights = {"kernel": np.zeros((5, 3), np.float32), "bias": np.full(3, product, np.float32)}
    scores = np.asarray(apply_head(weights, np.zeros((1, 5), np.float32), calibration=calibration))
    np.testing.assert_allclose(scores, np.full((1, 3), 1 / 3), rtol=1e-5)


def test_create_model_is_random_by_seed_and_shaped_by_name():
    models = [create_model("resnet18", 2, image_size=64, seed=seed) for seed in (0, 0, 1)]
    assert models[0].classes == ("class 0", "class 1")
    assert models[0].preprocess.size == 64
    kernels = [model.backbone.variables["params"]["stem"]["conv"]["kernel"] for model in models]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[0], kernels[2])
    np.testing.assert_array_equal(models[0].head.kernel, models[1].head.kernel)


@pytest.mark.parametrize(
    "make",
    [
        lambda: create_model("resnet19", 2),
        lambda: create_model("resnet18", ("a", "b", "a")),
        lambda: create_model("resnet18", 0),
        lambda: create_model("resnet18", 2, image_size=0),
        lambda: Head(np.zeros((4, 2)), np.zeros(3)),
        lambda: Head(np.zeros(4), np.zeros(4)),
        lambda: Head(np.zeros((4, 2)), np.zeros(2), kind="votes"),
        lambda: Head(np.zeros((4, 2)), np.zeros(2), kind="probability", calibration="isotonic"),
        lambda: Head(np.zeros((4, 2)), np.zeros(2), kind="margin", calibration="sigmoid"),
        lambda: Head(np.zeros((4, 2)), np.zeros(2), thresholds=np.zeros(3)),
    ],
)
def test_what_fits_no_network_is_refused(make):
    with pytest.raises(UsageError):
        make()


def test_a_head_of_another_width_is_refused(classifier):
    with pytest.raises(UsageError, match=r"\(2048, 3\); features and classes need \(512, 3\)"):
        Classifier(classifier.backbone, Head(np.zeros((2048, 3)), np.zeros(3)), CLASSES)


def write_weights(backbone, num_classes, path):
    generator = np.random.default_rng(0)
    head = None
    if num_classes is not None:
        head = (
            generator.standard_normal((512, num_classes), np.float32),
            generator.standard_normal(num_classes, np.float32),
        )
    save_file(from_variables("resnet18", backbone.variables, head), path)
    return head


def test_imagenet_classifier_of_a_file(backbone, tmp_path):
    kernel, bias = write_weights(backbone, 1000, tmp_path / "weights.safetensors")
    classifier = imagenet_classifier("resnet18", weights=str(tmp_path / "weights.safetensors"))
    np.testing.assert_array_equal(classifier.head.kernel, kernel)
    np.testing.assert_array_equal(classifier.head.bias, bias)
    assert classifier.classes == imagenet_classes()
    assert classifier.preprocess.size == 224
    assert classifier.backbone.pretrained_head is None


@pytest.mark.parametrize("num_classes", [None, 10])
def test_imagenet_classifier_needs_a_head_of_1000_classes(backbone, tmp_path, num_classes):
    write_weights(backbone, num_classes, tmp_path / "weights.safetensors")
    with pytest.raises(ClassifierError, match=r"weights\.safetensors: these weights carry no ImageNet head"):
        imagenet_classifier("resnet18", weights=tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError):
        imagenet_classifier("resnet18", weights=tmp_path / "none.safetensors")

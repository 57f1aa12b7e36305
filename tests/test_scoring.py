"""Compiled scoring: shapes that are refused, inputs of every kind, and what must not change a score."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import write_photos
from PIL import Image

from jaxcls import scoring
from jaxcls.classifier import create_model
from jaxcls.data.dataset import Dataset
from jaxcls.data.folder import read_folder
from jaxcls.data.source import MemorySource
from jaxcls.errors import ImageError, UsageError
from jaxcls.models import precision
from jaxcls.models.resnet import make_apply
from jaxcls.parallel import make_mesh
from jaxcls.scoring import compile_network, extract_features, make_scorer, predict

QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0}
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def classifier(compilation_cache):
    return create_model("resnet18", ("blue", "green", "red"), image_size=32, seed=1)


@pytest.fixture(scope="module")
def scorer(classifier):
    return make_scorer(classifier, batch_sizes=(4, 1, 4), precision="float32")


@pytest.fixture(scope="module")
def predictions(classifier, photos):
    return predict(classifier, photos, precision="float32")


@pytest.fixture
def compilations():
    """Grows by one entry for each program that is compiled."""
    events = []

    def listen(event, duration, **_):
        if event == COMPILE_EVENT:
            events.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def network_inputs(classifier, dataset, indices):
    return np.stack([classifier.preprocess.resize_and_crop(dataset.image(i)) for i in indices])


def assert_close(actual, expected, relative=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * np.abs(expected).max())


def test_the_listener_hears_compilations(compilations):
    jax.jit(lambda x: x * 2.75)(np.ones(3))
    assert len(compilations) == 1


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            np.zeros((1, 32, 32, 3), np.float32),
            r"must be uint8 \[B, 32, 32, 3\], not float32 \[1, 32, 32, 3\]",
        ),
        (np.zeros((1, 32, 33, 3), np.uint8), r"not uint8 \[1, 32, 33, 3\]"),
        (np.zeros((1, 3, 32, 32), np.uint8), r"not uint8 \[1, 3, 32, 32\]"),
        (np.zeros((32, 32, 3), np.uint8), r"not uint8 \[32, 32, 3\]"),
        (np.zeros((2, 32, 32, 3), np.uint8), "batch size 2 was not compiled; compiled are 1, 4"),
        (np.zeros((0, 32, 32, 3), np.uint8), "batch size 0 was not compiled"),
    ],
)
def test_another_form_is_an_error_and_compiles_nothing(scorer, compilations, images, message):
    with pytest.raises(UsageError, match=message):
        scorer(images)
    assert compilations == []


def test_no_batch_size_but_the_compiled_ones_runs_or_compiles(scorer, compilations):
    for batch_size in set(range(70)) - {1, 4}:
        with pytest.raises(UsageError, match=f"batch size {batch_size} was not compiled"):
            scorer(np.zeros((batch_size, 32, 32, 3), np.uint8))
    assert compilations == []


def test_another_classifier_of_the_form_shares_the_program(scorer, classifier, compilations):
    head = replace(classifier.head, kernel=2 * classifier.head.kernel)
    other = replace(classifier, head=head, classes=("a", "b", "c"))
    image = np.full((1, 32, 32, 3), 200, np.uint8)
    assert not np.array_equal(make_scorer(other, batch_sizes=(1,), precision="float32")(image), scorer(image))
    assert compilations == []


def test_a_scorer_compiles_nothing_and_scores_as_predict(
    scorer, classifier, photos, predictions, compilations
):
    """One image runs on one device, four on two; `predict` pads sixteen to 64."""
    indices = [0, 3, 7, 11]
    images = network_inputs(classifier, photos, indices)
    four = scorer(images)
    one = np.concatenate([scorer(image[None]) for image in images])
    assert compilations == []
    assert (four.dtype, four.shape) == (np.float32, (4, 3))
    assert_close(four, predictions.scores[indices])
    assert_close(one, predictions.scores[indices])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_scores_of_the_network_by_hand(classifier, photos, dtype, tolerance):
    predictions = predict(classifier, photos, precision=dtype)
    images = network_inputs(classifier, photos, [0, 6])
    pixels = (images / 255 - np.asarray([0.485, 0.456, 0.406])) / np.asarray([0.229, 0.224, 0.225])
    apply = jax.jit(make_apply("resnet18"), static_argnames="train", compiler_options=QUICK_TO_COMPILE)
    features, _ = apply(classifier.backbone.variables, pixels.astype(np.float32), train=False)
    expected = np.asarray(features) @ classifier.head.kernel + classifier.head.bias
    assert_close(predictions.scores[[0, 6]], expected, tolerance)


@pytest.mark.parametrize(("multiplies", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_cpu_scores_in_what_it_multiplies(classifier, monkeypatch, multiplies, dtype):
    monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: multiplies)
    monkeypatch.setattr(precision, "MIN_BFLOAT16_SIZE", 32)
    program = compile_network(classifier, batch_sizes=(1,))
    _, weights = program.executables[1]
    assert weights["backbone"]["stem"]["conv"]["kernel"].dtype == dtype


def test_one_device_scores_a_few_images_at_once(classifier, monkeypatch):
    """Nine images run on one of the two devices, eight on both."""
    asked = []

    def two(image_size):
        asked.append(image_size)
        return 2

    scoring._compile.cache_clear()
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    expected = make_scorer(classifier, batch_sizes=(9,), precision="float32")(images)
    scoring._compile.cache_clear()
    monkeypatch.setattr(scoring, "fitting_at_once", two)
    score = make_scorer(classifier, batch_sizes=(8, 9), precision="float32")
    scoring._compile.cache_clear()
    assert asked == [32]
    assert_close(score(images), expected)
    assert_close(score(images[:8]), expected[:8])


@pytest.mark.parametrize("batch_sizes", [(), (0,), (1, -2)])
def test_batch_sizes_below_1_are_refused(classifier, batch_sizes):
    with pytest.raises(UsageError, match="batch sizes"):
        make_scorer(classifier, batch_sizes=batch_sizes)


def test_predictions_of_a_dataset(predictions, photos):
    assert predictions.ids == tuple(photos.ids)
    assert predictions.classes == ("blue", "green", "red")
    assert predictions.kind == "logit"
    assert not predictions.errors
    assert not predictions.abstained.any()


def test_labels_are_matched_by_name(predictions, photos):
    """The dataset knows blue and red as 0 and 1, the classifier as 0 and 2."""
    expected = [0 if name.startswith("blue") else 2 for name in photos.ids]
    np.testing.assert_array_equal(predictions.labels, expected)


def test_labels_of_an_unknown_class_are_refused(classifier):
    dataset = Dataset("photos", ("purple",), [0], ["0"], MemorySource([np.zeros((8, 8, 3), np.uint8)]))
    with pytest.raises(UsageError, match="photos of purple"):
        predict(classifier, dataset)


def test_unlabelled_images_have_no_labels(classifier, photos):
    assert predict(classifier, [photos.image(0)]).labels is None


@pytest.mark.parametrize("kind", ["paths", "texts", "bytes", "arrays", "mixed"])
def test_every_kind_of_input_scores_alike(classifier, photos, predictions, kind):
    paths = [photos.source.path(i) for i in range(3)]
    items = {
        "paths": paths,
        "texts": [str(path) for path in paths],
        "bytes": [path.read_bytes() for path in paths],
        "arrays": [photos.image(i) for i in range(3)],
        "mixed": [paths[0], paths[1].read_bytes(), photos.image(2)],
    }[kind]
    found = predict(classifier, items, precision="float32")
    assert_close(found.scores, predictions.scores[:3])
    is_path = [isinstance(item, str | Path) for item in items]
    assert found.ids == tuple(str(paths[i]) if is_path[i] else str(i) for i in range(3))


def test_no_images_is_an_error(classifier):
    with pytest.raises(UsageError, match="no images"):
        predict(classifier, [])


@pytest.mark.parametrize("batch_size", [5, 6])
def test_padding_and_devices_change_no_score(classifier, photos, predictions, batch_size):
    """16 images in batches of 5 (one device) and 6 (two); the last ones are filled up."""
    assert make_mesh(batch_size).size == (2 if batch_size == 6 else 1)
    found = predict(classifier, photos, batch_size=batch_size, precision="float32")
    assert_close(found.scores, predictions.scores)
    assert found.ids == predictions.ids


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_1_is_refused(classifier, photos, batch_size):
    with pytest.raises(UsageError, match="batch size"):
        predict(classifier, photos, batch_size=batch_size)


def test_a_bad_file_gets_an_error_row_and_changes_no_other(classifier, photos, predictions, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(photos.source.path(1).read_bytes()[:-20])
    paths = [photos.source.path(0), bad, tmp_path / "none.png", photos.source.path(2)]
    found = predict(classifier, paths, precision="float32")
    assert set(found.errors) == {1, 2}
    assert "bad.png" in found.errors[1]
    assert "none.png" in found.errors[2]
    assert np.isnan(found.scores[1:3]).all()
    assert_close(found.scores[[0, 3]], predictions.scores[[0, 2]])
    np.testing.assert_array_equal(found.predicted[1:3], [-1, -1])


def test_images_of_any_size(classifier, tmp_path):
    photo = read_folder(write_photos(tmp_path, {"blue": 1, "red": 1})).image(0)
    large = np.asarray(Image.fromarray(photo).resize((480, 400)))
    strip = np.zeros((1, 500, 3), np.uint8)
    assert np.isfinite(predict(classifier, [photo, large, strip]).scores).all()


def test_features_are_what_the_head_scores(classifier, photos, predictions):
    values, labels, ids = extract_features(classifier, photos, precision="float32")
    assert (values.dtype, values.shape) == (np.float32, (16, 512))
    np.testing.assert_array_equal(labels, photos.labels)
    np.testing.assert_array_equal(ids, photos.ids)
    head = classifier.head
    assert_close(predictions.scores, values @ head.kernel + head.bias)
    normalized = values / np.linalg.norm(values, axis=1, keepdims=True)
    normalizing = replace(classifier, head=replace(head, normalize=True))
    assert_close(
        predict(normalizing, photos, precision="float32").scores, normalized @ head.kernel + head.bias
    )


def test_features_of_a_list_have_no_labels(classifier, photos):
    path = photos.source.path(0)
    _, labels, ids = extract_features(classifier.backbone, [path])
    assert labels.tolist() == [-1]
    assert ids.tolist() == [str(path)]


def test_features_of_an_unreadable_image_are_an_error_that_names_it(classifier, tmp_path):
    with pytest.raises(ImageError, match=r"none\.png: cannot be read: No such file"):
        extract_features(classifier.backbone, [tmp_path / "none.png"])

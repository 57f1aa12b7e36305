"""Folders for Hugging Face transformers: read back by our own code, and loaded by transformers."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import jaxcls
from jaxcls.classifier import Classifier, create_model
from jaxcls.errors import ClassifierError, UsageError
from jaxcls.models.port import read_state_dict, to_variables
from jaxcls.preprocess import Preprocess

CLASSES = ("Löffel", "茶碗", "a/b c")


def draw_classifier(architecture, preprocess):
    """Random weights, batch norm's included, so that no two arrays of a shape are alike."""
    classifier = create_model(architecture, CLASSES, seed=2)
    generator = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: generator.uniform(0.5, 1, leaf.shape).astype(np.float32) if leaf.ndim == 1 else leaf,
        classifier.backbone.variables,
    )
    backbone = replace(classifier.backbone, variables=variables, preprocess=preprocess)
    return replace(classifier, backbone=backbone)


def draw_photo(height, width):
    """Uint8 [height, width, 3], smooth and noisy."""
    rows, columns = np.mgrid[:height, :width]
    waves = np.sin(np.stack([rows / 17, columns / 23, (rows + columns) / 31], axis=-1))
    noise = np.random.default_rng(1).normal(0, 12, (height, width, 3))
    return np.clip(127 + 90 * waves + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def classifier(compilation_cache):
    return draw_classifier("resnet18", Preprocess(size=64))


def test_the_folder_is_read_back(classifier, tmp_path):
    path = classifier.export_hub(tmp_path / "new folder" / "hub")
    names = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert {file.name for file in path.iterdir()} == names
    ported = to_variables("resnet18", read_state_dict(path / "model.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, ported.variables, classifier.backbone.variables)
    np.testing.assert_array_equal(ported.head[0], classifier.head.kernel)
    np.testing.assert_array_equal(ported.head[1], classifier.head.bias)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {"0": "Löffel", "1": "茶碗", "2": "a/b c"}
    assert "random weights, seed 2" in (path / "README.md").read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["hub"]


def test_what_the_folder_cannot_say_is_noted(classifier, tmp_path):
    assert classifier.hub_notes == ()
    head = replace(classifier.head, kind="margin", thresholds=np.zeros(3, np.float32))
    card = replace(classifier, head=head).export_hub(tmp_path / "hub") / "README.md"
    text = card.read_text(encoding="utf-8")
    assert "are each class's margin" in text
    assert "thresholds below which the classifier abstains are left out" in text


def test_a_normalising_head_is_refused(classifier, tmp_path):
    normalizing = replace(classifier, head=replace(classifier.head, normalize=True))
    with pytest.raises(UsageError, match="divides features by their norm"):
        normalizing.export_hub(tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


def test_nothing_is_replaced_and_nothing_left_half_written(classifier, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="exists: give a new folder"):
        classifier.export_hub(tmp_path)

    def fail(path, *arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(ClassifierError, match=r"cannot export to .*No space left"):
        classifier.export_hub(tmp_path / "hub")
    assert list(tmp_path.iterdir()) == []


def load_with_transformers(path):
    pytest.importorskip("torch", reason="transformers runs on torch")
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
    network, report = transformers.AutoModelForImageClassification.from_pretrained(
        path, output_loading_info=True
    )
    assert type(network).__name__ == "ResNetForImageClassification"
    assert not any(report.values())  # no weight is missing, left over or of another shape
    return network.eval(), transformers.AutoImageProcessor.from_pretrained(path)


def process(processor, photos):
    """Pixels [B, size, size, 3] as transformers makes them."""
    pictures = [Image.fromarray(photo) for photo in photos]
    return processor(images=pictures, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)


def run_torch(network, pixels):
    import torch

    with torch.no_grad():
        return network(torch.tensor(pixels.transpose(0, 3, 1, 2).copy())).logits.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_transformers_gives_the_same_logits(architecture, tmp_path, compilation_cache):
    classifier = draw_classifier(architecture, Preprocess(size=64))
    network, processor = load_with_transformers(classifier.export_hub(tmp_path / "hub"))
    photos = [draw_photo(90, 120), draw_photo(200, 100)]
    scores = jaxcls.predict(classifier, photos, precision="float32").scores
    images = np.stack([classifier.preprocess.resize_and_crop(photo) for photo in photos])
    pixels = classifier.preprocess.normalize(images)
    logits = run_torch(network, pixels)
    np.testing.assert_allclose(logits, scores, rtol=0, atol=1e-4 * np.abs(scores).max())
    theirs = run_torch(network, process(processor, photos))
    np.testing.assert_allclose(theirs, scores, rtol=0, atol=1e-2 * np.abs(scores).max())
    assert np.abs(logits[0] - logits[1]).max() > 0.02 * np.abs(logits).max()
    assert network.config.id2label == dict(enumerate(CLASSES))


@pytest.mark.slow
@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess(),
        Preprocess(96, 0.75, "bicubic", (0.1, 0.2, 0.3), (0.5, 0.4, 0.3)),
        Preprocess(400, 1.0, "lanczos"),
    ],
)
def test_transformers_sees_the_same_pixels(classifier, preprocess, tmp_path):
    """Within one of 255 levels, on photos whose margins halve to whole pixels."""
    backbone = replace(classifier.backbone, preprocess=preprocess)
    changed = Classifier(backbone, classifier.head, classifier.classes)
    _, processor = load_with_transformers(changed.export_hub(tmp_path / "hub"))
    size = preprocess.short_side
    for height, width in ((size, size + 40), (3 * size, 2 * size), (2 * size, 2 * size)):
        photo = draw_photo(height, width)
        pixels = process(processor, [photo])
        expected = preprocess.normalize(preprocess.resize_and_crop(photo)[None])
        levels = np.abs(pixels - expected) * 255 * np.asarray(preprocess.std).reshape(1, 1, 1, 3)
        assert levels.max() < 1.01
        assert levels.mean() < 0.1


@pytest.mark.slow
def test_transformers_predicts_alike_on_photos(shared, tmp_path, compilation_cache):
    unpack = shared / "tools" / "unpack_weights.py"
    subprocess.run([sys.executable, unpack, tmp_path], check=True, capture_output=True)
    classifier = jaxcls.imagenet_classifier("resnet18", weights=tmp_path / "resnet18.safetensors")
    network, processor = load_with_transformers(classifier.export_hub(tmp_path / "hub"))
    files = sorted((shared / "data" / "imagenet50").glob("*.jpg"))
    assert len(files) == 50
    photos = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    logits = run_torch(network, process(processor, photos))
    assert (logits.argmax(axis=1) == jaxcls.predict(classifier, files).predicted).sum() >= 49

"""`jaxcls quickstart`: the main job on real digits, to the accuracy it promises."""

import json

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import jaxcls
from jaxcls.errors import UsageError
from jaxcls.quickstart import quickstart, write_digits


def test_digits_are_written_as_scikit_learn_has_them(tmp_path):
    write_digits(tmp_path)
    digits = load_digits()
    photos = jaxcls.read_folder(tmp_path)
    assert photos.classes == tuple("0123456789")
    np.testing.assert_array_equal(photos.class_counts(), np.bincount(digits.target))
    pixels = np.asarray(Image.open(tmp_path / str(digits.target[5]) / "0005.png"), np.float32)
    np.testing.assert_allclose(pixels * 16 / 255, digits.images[5], atol=16 / 255 / 2)


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        quickstart(tmp_path)


@pytest.mark.slow
def test_the_whole_job(tmp_path):
    shown: list[str] = []
    quickstart(tmp_path / "out", shown.append)
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows[-1]["eval_num_seen"] == 360
    assert rows[-1]["eval_accuracy"] >= 0.97
    text = "\n".join(shown)
    assert "Confusion matrix (rows: truth, columns: prediction)" in text
    assert "jaxcls train PHOTOS" in text
    for plot in ("confusion.png", "run/accuracy.png"):
        with Image.open(tmp_path / "out" / plot) as image:
            assert min(image.size) > 300
    assert jaxcls.load(tmp_path / "out" / "svm.jaxcls").head.kind == "margin"

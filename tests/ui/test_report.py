"""Reports as files: what they hold, and how large they are."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from examples import make_photos, make_predictions, unreadable, write_example

from jaxcls.errors import UsageError
from jaxcls.evaluation.metrics import evaluate
from jaxcls.ui.report import MAX_BYTES, most_telling, write_report


def block(path, name: str):
    (text,) = re.findall(
        rf'<script type="application/json" id="{name}">(.*?)</script>', path.read_text("utf-8"), re.DOTALL
    )
    return json.loads(text)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "report.html"


def test_one_file_is_written(path):
    photos = make_photos(12)
    note = write_example(path, make_predictions(photos), photos)
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    assert "Thumbnails of 12 of 12 readable photos, up to 384 px" in note
    assert block(path, "results")["title"] == "my model on table ware"
    assert all(block(path, "thumbnails")["encoded"])


def test_a_report_is_replaced(path):
    photos = make_photos(6)
    path.write_text("an older one")
    write_example(path, make_predictions(photos), photos)
    assert path.read_bytes().startswith(b"<!doctype html>")


def test_the_size_is_bounded_and_what_is_left_out_is_said(path):
    photos = make_photos(60)
    predictions = make_predictions(photos)
    evaluation = evaluate(predictions)

    def write(max_bytes: int) -> str:
        return write_report(path, predictions, evaluation, photos, model="cups", max_bytes=max_bytes)

    write(10**7)
    embedded = block(path, "thumbnails")["encoded"]
    fixed = path.stat().st_size - sum(map(len, embedded)) - 3 * len(embedded) + 1_000
    for room, is_enough in ((200, False), (3_000, False), (60_000, True)):
        note = write(fixed + room)
        assert path.stat().st_size <= fixed + room
        left = [i for i, text in enumerate(block(path, "thumbnails")["encoded"]) if text is None]
        assert f"Thumbnails of {60 - len(left)} of 60" in note
        assert ("no room" in block(path, "results")["note"]) == bool(left) != is_enough
        assert set(left) == set(most_telling(predictions)[60 - len(left) :])


def test_the_photos_of_highest_loss_come_first():
    predictions = unreadable(make_predictions(make_photos(20)), 3, "bad")
    labels = predictions.labels.copy()
    labels[5] = -1
    order = most_telling(replace(predictions, labels=labels))
    assert sorted(order) == [i for i in range(20) if i != 3]
    assert order[-1] == 5
    p = predictions.probabilities()[order[:-1], labels[order[:-1]]]
    assert (np.diff(p) >= 0).all()


def test_numbers_that_do_not_fit_are_refused(path):
    photos = make_photos(6)
    with pytest.raises(
        UsageError, match=r"report\.html: the numbers of 6 photos take [\d,]+ bytes more than"
    ):
        write_example(path, make_predictions(photos), photos, max_bytes=10_000)
    assert not path.exists()


def test_other_photos_are_refused(path):
    with pytest.raises(UsageError, match="not of the photos of dataset table ware"):
        write_example(path, make_predictions(make_photos(6)), make_photos(7))


@pytest.mark.slow
def test_ten_thousand_photos_fit(path):
    photos = make_photos(10_000)
    note = write_example(path, make_predictions(photos), photos)
    assert path.stat().st_size <= MAX_BYTES
    assert "10,000 of 10,000" in note

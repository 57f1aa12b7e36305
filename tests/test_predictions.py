"""Predictions against hand-worked values, torch's softmax, and readers that did not write the files."""

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest

from jaxcls.errors import UsageError
from jaxcls.predictions import Predictions

NAN = float("nan")
ABOVE_ONE = np.array([[1, 0, 1.5], [0, 0, 0], [NAN, NAN, NAN], [0, 0, 0]], np.float32)


@pytest.fixture
def predictions() -> Predictions:
    """Four images: right, a tie that is wrong, unreadable, abstained and unlabelled."""
    return Predictions(
        scores=np.array([[0, 2, 1], [3, -1, 3], [NAN, NAN, NAN], [0.25, 0, 0]], np.float32),
        kind="logit",
        classes=("bowl", "cup", "plate"),
        ids=("a.jpg", "b.jpg", "c.jpg", "d.jpg"),
        labels=np.array([1, 2, 0, -1], np.int32),
        abstained=np.array([False, False, False, True]),
        errors={2: "truncated JPEG"},
    )


def test_predicted_is_the_best_class_and_minus_one_without_an_answer(predictions):
    assert len(predictions) == 4
    assert predictions.unreadable.tolist() == [False, False, True, False]
    assert predictions.predicted.dtype == np.int32
    assert predictions.predicted.tolist() == [1, 0, -1, -1]


def test_top_orders_classes_and_ranks_the_abstained_too(predictions):
    assert predictions.top(2).dtype == np.int32
    assert predictions.top(3).tolist() == [[1, 2, 0], [0, 2, 1], [-1, -1, -1], [0, 1, 2]]
    assert predictions.top().tolist() == [[1], [0], [-1], [0]]


@pytest.mark.parametrize("k", [0, 4])
def test_top_refuses_what_does_not_exist(predictions, k):
    with pytest.raises(UsageError, match="from 1 to the number of classes, 3"):
        predictions.top(k)


def test_probabilities_are_torchs_softmax_even_of_large_logits(predictions):
    torch = pytest.importorskip("torch")
    scores = predictions.scores.copy()
    scores[0] = [1000, 999, -1000]
    probabilities = replace(predictions, scores=scores).probabilities()
    assert probabilities.dtype == np.float32
    expected = torch.softmax(torch.from_numpy(scores), dim=1).numpy()
    np.testing.assert_allclose(probabilities, expected, rtol=1e-6)
    assert np.isnan(probabilities[2]).all()


def test_probabilities_stay_and_margins_have_none(predictions):
    probabilities = replace(predictions, kind="probability", scores=predictions.probabilities())
    np.testing.assert_array_equal(probabilities.probabilities(), probabilities.scores)
    with pytest.raises(UsageError, match="calibrate"):
        replace(predictions, kind="margin").probabilities()


def test_rows_say_what_is_known_and_nothing_else(predictions):
    right, wrong, unreadable, abstained = predictions.rows()
    assert right == {
        "id": "a.jpg",
        "predicted": "cup",
        "score": 2.0,
        "label": "cup",
        "abstained": False,
        "error": None,
        "scores": {"bowl": 0.0, "cup": 2.0, "plate": 1.0},
    }
    assert (wrong["predicted"], wrong["score"], wrong["label"]) == ("bowl", 3.0, "plate")
    assert unreadable == {
        "id": "c.jpg",
        "predicted": None,
        "score": None,
        "label": "bowl",
        "abstained": False,
        "error": "truncated JPEG",
        "scores": None,
    }
    assert (abstained["predicted"], abstained["score"], abstained["label"]) == (None, None, None)
    assert (abstained["abstained"], abstained["scores"]["bowl"]) == (True, 0.25)


def test_rows_without_any_labels(predictions):
    assert [row["label"] for row in replace(predictions, labels=None).rows()] == [None] * 4


AWKWARD = ('a, "b".jpg', "line\nfeed\r\n.jpg", "茶碗 ☕.jpg", "=1+1;\t.jpg")


def written(write) -> str:
    file = io.StringIO(newline="")
    write(file)
    return file.getvalue()


def test_csv_survives_awkward_names(predictions):
    predictions = replace(predictions, ids=AWKWARD, classes=("id", "a,b", "tasse à café"))
    text = written(predictions.write_csv)
    rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    assert tuple(row["id"] for row in rows) == AWKWARD
    assert rows[0] == {
        "id": AWKWARD[0],
        "predicted": "a,b",
        "score": "2.0",
        "label": "a,b",
        "abstained": "False",
        "error": "",
        "score:id": "0.0",
        "score:a,b": "2.0",
        "score:tasse à café": "1.0",
    }
    assert list(rows[2].values())[1:] == ["", "", "id", "False", "truncated JPEG", "", "", ""]
    assert rows[3]["abstained"] == "True"
    assert "nan" not in text.lower()


def test_jsonl_is_strict_json_and_gives_the_rows_back(predictions):
    predictions = replace(predictions, ids=("caf\udce9.jpg", *AWKWARD[1:]))
    lines = written(predictions.write_jsonl).splitlines()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert [json.loads(line, parse_constant=refuse) for line in lines] == list(predictions.rows())


def test_empty_predictions():
    empty = Predictions(
        scores=np.zeros((0, 2), np.float32),
        kind="margin",
        classes=("a", "b"),
        ids=(),
        labels=None,
        abstained=np.zeros(0, np.bool_),
    )
    assert written(empty.write_csv) == "id,predicted,score,label,abstained,error,score:a,score:b\r\n"
    assert empty.top(2).shape == (0, 2)
    assert empty.predicted.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "score"}, "kind is 'score'"),
        ({"classes": ("cup", "cup", "plate")}, "all different"),
        (
            {"classes": ("bowl", "cup")},
            r"scores must be a NumPy array float32 \[4, 2\], not float32 \[4, 3\]",
        ),
        ({"ids": ("a", "b")}, r"scores must be .* \[2, 3\]"),
        ({"scores": np.zeros((4, 3))}, "not float64"),
        ({"scores": [[0.0] * 3] * 4}, "not list"),
        ({"labels": np.zeros(4, np.int64)}, "labels must be .* int32"),
        ({"labels": np.array([0, 1, 2, 3], np.int32)}, r"from -1 \(unknown\) to 2"),
        ({"labels": np.array([0, 1, 2, -2], np.int32)}, r"from -1 \(unknown\) to 2"),
        ({"abstained": np.zeros(3, np.bool_)}, "abstained must be"),
        ({"abstained": np.ones(4, np.bool_)}, "cannot abstain"),
        ({"errors": {2: "truncated", 4: "no such image"}}, "outside 0 to 3"),
        ({"errors": {1: "truncated", 2: "truncated"}}, "must be NaN"),
        ({"errors": {}}, r"1 of 4 images were read .* 'c.jpg'.* diverged"),
        ({"kind": "probability"}, "logits or margins"),
        ({"kind": "probability", "scores": ABOVE_ONE}, "logits or margins"),
    ],
)
def test_parts_that_do_not_fit_are_refused(predictions, change, message):
    with pytest.raises(UsageError, match=message):
        replace(predictions, **change)

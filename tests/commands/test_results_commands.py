"""`jaxcls evaluate --report` and `jaxcls thresholds`, as their users type them."""

import json
import shutil

import numpy as np
import pytest
from conftest import write_photos

import jaxcls
from jaxcls.cli import main
from jaxcls.errors import UsageError
from jaxcls.evaluation.thresholds import ALWAYS, NEVER
from jaxcls.manifest import MANIFEST, WEIGHTS, write_thresholds
from jaxcls.storage import file_sha256


@pytest.fixture
def model(served_model, tmp_path, monkeypatch):
    """A copy of a saved classifier of blue, green and red."""
    monkeypatch.setenv("JAXCLS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("jaxcls.parallel.use_compilation_cache", lambda folder: None)
    return shutil.copytree(served_model, tmp_path / "my colours")


def stored(model) -> list[float] | None:
    return json.loads((model / MANIFEST).read_text("utf-8"))["head"]["thresholds"]


def test_thresholds_are_stored_and_nothing_else_changes(model, capsys):
    before = file_sha256(model / WEIGHTS)
    assert main(["thresholds", str(model), "--set=red=0.7", "--set", "blue=-1.5"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["blue   -1.5", "green  always answered", "red    0.7"]
    classifier = jaxcls.load(model)
    np.testing.assert_array_equal(classifier.head.thresholds, np.asarray([-1.5, ALWAYS, 0.7], np.float32))
    assert file_sha256(model / WEIGHTS) == before


def test_later_ones_are_added_and_all_are_cleared(model, capsys):
    main(["thresholds", str(model), "--set=red=0.7"])
    main(["thresholds", str(model), "--set=green=0.25"])
    np.testing.assert_allclose(stored(model)[1:], [0.25, 0.7])
    assert main(["thresholds", str(model), "--clear", "--set=blue=0.5"]) == 0
    assert stored(model) == [0.5, ALWAYS, ALWAYS]
    assert main(["thresholds", str(model), "--clear"]) == 0
    assert stored(model) is None
    assert "no thresholds" in capsys.readouterr().out


def test_a_stored_threshold_abstains(model, tmp_path):
    photos = jaxcls.read_folder(write_photos(tmp_path / "photos", {"blue": 2, "green": 2, "red": 2}))
    assert not jaxcls.predict(jaxcls.load(model), photos).abstained.any()
    write_thresholds(model, [NEVER] * 3)
    assert jaxcls.predict(jaxcls.load(model), photos).abstained.all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("mug=0.5", "no class 'mug'; known are blue, green, red"),
        ("red", "give CLASS=SCORE"),
        ("red=much", "give CLASS=SCORE"),
        ("red=nan", "give CLASS=SCORE"),
        ("red=inf", "give CLASS=SCORE"),
        ("red=1e39", "give CLASS=SCORE"),
    ],
)
def test_wrong_thresholds(model, change, message, capsys):
    assert main(["thresholds", str(model), f"--set={change}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert stored(model) is None


def test_no_classifier(tmp_path, capsys):
    assert main(["thresholds", str(tmp_path)]) == 1
    assert "is no saved classifier" in capsys.readouterr().err


def test_thresholds_of_probabilities_are_probabilities(model, capsys):
    manifest = json.loads((model / MANIFEST).read_text("utf-8"))
    manifest["head"]["kind"] = "probability"
    (model / MANIFEST).write_text(json.dumps(manifest))
    for change in ("red=70", "red=-0.1"):
        assert main(["thresholds", str(model), f"--set={change}"]) == 2
        assert "give one from 0 to 1" in capsys.readouterr().err
    assert stored(model) is None
    assert main(["thresholds", str(model), "--set=red=1", "--set=blue=0", f"--set=green={NEVER!r}"]) == 0
    assert stored(model) == [0, NEVER, 1]


@pytest.mark.parametrize("thresholds", [[0.5], [0.5, 0.5, float("nan")], [0.5, 0.5, 1e39]])
def test_thresholds_that_cannot_be_stored(model, thresholds):
    with pytest.raises(UsageError, match="one finite value for each of 3 classes"):
        write_thresholds(model, thresholds)


def test_a_damaged_manifest(model, capsys):
    manifest = json.loads((model / MANIFEST).read_text("utf-8"))
    (model / MANIFEST).write_text(json.dumps(manifest | {"head": {"thresholds": [1.0]}}))
    assert main(["thresholds", str(model)]) == 1
    assert "is damaged: 1 thresholds of 3 classes" in capsys.readouterr().err


def test_evaluate_writes_a_report(model, tmp_path, capsys):
    folder = write_photos(tmp_path / "photos", {"blue": 2, "green": 2, "red": 2})
    (folder / "red" / "2.png").write_bytes(b"no photo")
    path = tmp_path / "report.html"
    assert main(["evaluate", str(model), str(folder), "--report", str(path)]) == 1
    printed = capsys.readouterr()
    assert f"{path}: " in printed.out
    assert "6 of 6 readable photos" in printed.out
    assert "not an image" in printed.err
    assert b"my colours on photos" in path.read_bytes()


@pytest.mark.parametrize("name", ["nowhere/report.html", "."])
def test_a_report_that_cannot_be_written(model, tmp_path, name, capsys):
    folder = write_photos(tmp_path / "photos", {"blue": 2})
    assert main(["evaluate", str(model), str(folder), "--report", str(tmp_path / name)]) == 2
    assert "give the name of a file in a folder that exists" in capsys.readouterr().err

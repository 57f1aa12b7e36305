"""The experiments run: scripts as processes, the notebook in a kernel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import write_photos
from nbclient import NotebookClient
from safetensors.numpy import save_file

from jaxcls.classifier import create_model
from jaxcls.models.port import from_variables
from jaxcls.quickstart import write_digits

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with random ResNet-18 weights."""
    model = create_model("resnet18", 1000, image_size=32)
    folder = tmp_path_factory.mktemp("weights")
    head = (model.head.kernel, model.head.bias)
    save_file(from_variables("resnet18", model.backbone.variables, head), folder / "resnet18.safetensors")
    return folder


@pytest.fixture
def run(compiled_once):
    """Call it with the name of a script and its arguments to have what it prints."""

    def run(name: str, *arguments: object) -> str:
        command = [sys.executable, "-m", f"experiments.{name}", *map(str, arguments)]
        environment = {**os.environ, **compiled_once}
        done = subprocess.run(
            command, cwd=EXPERIMENTS.parent, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_notebook_on_the_digits(tmp_path, weights):
    write_digits(tmp_path / "all")
    for photo in (tmp_path / "all").rglob("*.png"):
        if int(photo.stem) < 300:
            target = tmp_path / "digits" / photo.relative_to(tmp_path / "all")
            target.parent.mkdir(parents=True, exist_ok=True)
            photo.rename(target)
    notebook = nbformat.read(EXPERIMENTS / "tableware.ipynb", as_version=4)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = (
        "from pathlib import Path\n"
        f"DATA = Path({str(tmp_path / 'digits')!r})\n"
        f"WEIGHTS = Path({str(weights / 'resnet18.safetensors')!r})\n"
        "IMAGE_SIZE = 32\n"
        f"OUT = Path({str(tmp_path / 'out')!r})\n"
    )
    NotebookClient(notebook, timeout=900).execute()
    assert (tmp_path / "out" / "photos.jaxcls" / "weights.safetensors").is_file()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 2
    history = (tmp_path / "out" / "run" / "metrics.jsonl").read_text().splitlines()
    # From random weights, on 198 digits: better than the 10 % of guessing is what there is to learn.
    assert json.loads(history[-1])["eval_accuracy"] > 0.5


@pytest.mark.slow
def test_walk_through(run, tmp_path, weights):
    photos = write_photos(tmp_path / "photos", {"blue": 6, "red": 6})
    out = run(
        "tableware", photos, "--weights", weights / "resnet18.safetensors", "--image-size", 32,
        "--num-epochs", 1, "--out", tmp_path / "out",
    )  # fmt: skip
    assert "7 training images, 5 test images" in out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "run", "confusion.png", "svm.jaxcls", "tableware.jaxcls"
    }  # fmt: skip


@pytest.mark.slow
def test_recipes_and_accuracy_over_seeds(run, tmp_path, weights):
    photos = write_photos(tmp_path / "photos", {"blue": 6, "red": 6})
    out = run(
        "improve_accuracy", photos, "--weights-folder", weights, "--recipes", 0, "--num-epochs", 1,
        "--out", tmp_path / "recipes.json",
    )  # fmt: skip
    assert "224 px  resnet18" in out
    assert json.loads((tmp_path / "recipes.json").read_text())["rows"][0]["num_test"] == 5
    run(
        "accuracy", "svm", photos, "--weights", weights / "resnet18.safetensors", "--num-seeds", 2,
        "--out", tmp_path / "svm.json",
    )  # fmt: skip
    result = json.loads((tmp_path / "svm.json").read_text())
    assert result["accuracy"]["micro"]["n"] == 2
    assert {"command", "device", "versions"} <= set(result["conditions"])


def test_planted_labels_are_wrong_and_suspects_judged_by_them():
    from experiments.label_errors import Suspects, judge, plant

    labels = np.arange(100, dtype=np.int32) % 3
    noisy, planted = plant(labels, 3, 0.04, seed=0)
    np.testing.assert_array_equal(noisy != labels, planted)
    assert (planted.sum(), noisy.dtype, noisy.max()) == (4, np.int32, 2)
    others, changed = np.flatnonzero(~planted), np.flatnonzero(planted)
    found = np.concatenate([changed[:1], others[:1], changed[1:3], others[1:]])
    assert judge(Suspects(found, 3), planted) == {
        "precision_at_planted": 0.75,
        "recall_at_planted": 0.75,
        "num_named": 3,
        "precision_named": 2 / 3,
        "recall_named": 0.5,
    }
    assert judge(Suspects(found, 0), planted)["precision_named"] is None


@pytest.mark.slow
def test_label_errors(run, tmp_path, weights):
    photos = write_photos(tmp_path / "photos", {"blue": 12, "red": 12})
    out = run(
        "label_errors", photos, "--weights", weights / "resnet18.safetensors", "--num-seeds", 2,
        "--out", tmp_path / "found.json",
    )  # fmt: skip
    assert "found of 1" in out
    result = json.loads((tmp_path / "found.json").read_text())
    assert {row["scores"] for row in result["summary"]} == {"svm", "neighbours", "both"}
    assert all(row["recall_at_planted"]["n"] == 2 for row in result["summary"])
    assert any(row["method"].startswith("cleanlab") for row in result["runs"]) or result["notes"]


def test_duplicates(run, tmp_path):
    photos = write_photos(tmp_path / "photos", {"blue": 4, "red": 4})
    out = run("duplicates", photos, "--num-originals", 2, "--num-seeds", 1, "--out", tmp_path / "found.json")
    assert "photos: 0 exact and 0 near copies" in out
    result = json.loads((tmp_path / "found.json").read_text())
    assert result["runs"][0]["num_images"] == 16
    assert set(result["summary"]["share_found"]) == {"shrunk", "recompressed", "cropped", "brightened"}


def test_copies_count_as_found_beside_their_original():
    from experiments.duplicates import Planted, share_found, wrongly_joined

    shown, kinds = np.asarray([0, 1, 0, 1, 2, 0, 1]), np.asarray([-1, -1, 0, 1, -1, 2, 3])
    groups = np.asarray([0, 1, 0, 0, 1, 2, 1], np.int32)
    planted = Planted(None, shown, kinds)  # the pictures do not matter
    assert share_found(groups, planted) == {
        "shrunk": 1, "recompressed": 0, "cropped": 0, "brightened": 1
    }  # fmt: skip
    ids = np.asarray(["a", "b", "c"])[shown]
    assert wrongly_joined(groups, ids, frozenset()) == [["a", "b"], ["b", "c"]]
    assert wrongly_joined(groups, ids, frozenset([frozenset("ab")])) == [["b", "c"]]


def test_interval_draws_photos_of_a_group_together():
    from experiments.svm_baseline import bootstrap

    labels, groups = np.array([0] * 30 + [1] * 10, np.int32), np.arange(40, dtype=np.int32)
    seen, right = np.full(40, 2), np.array([2] * 27 + [0] * 3 + [2] * 5 + [1] * 5)
    apart = bootstrap(right, seen, labels, groups)
    assert apart["micro"]["value"] == 69 / 80
    assert apart["macro"]["value"] == pytest.approx((0.9 + 0.75) / 2)
    rate = right / seen
    assert apart["micro"]["high"] - apart["micro"]["low"] == pytest.approx(
        2 * 1.96 * rate.std() / 40**0.5, rel=0.1
    )
    together = bootstrap(right, seen, labels, groups // 5)
    assert together["micro"]["value"] == apart["micro"]["value"]
    assert together["micro"]["low"] < apart["micro"]["low"]
    seen[30:], right[30:] = 0, 0
    assert bootstrap(right, seen, labels, groups)["macro"] == bootstrap(right, seen, labels, groups)["micro"]


def test_runs_go_on_only_under_the_same_settings(tmp_path):
    from experiments.recording import write_result
    from experiments.svm_baseline import read_runs
    from jaxcls.errors import UsageError

    path = tmp_path / "result.json"
    assert read_runs(path, {"num_epochs": 1}) == read_runs(None, {"num_epochs": 1}) == []
    write_result(path, {"settings": {"num_epochs": 1}, "runs": [{"method": "svm", "seed": 0}]})
    assert read_runs(path, {"num_epochs": 1}) == [{"method": "svm", "seed": 0}]
    with pytest.raises(UsageError, match="other settings"):
        read_runs(path, {"num_epochs": 2})


@pytest.mark.slow
def test_svm_next_to_fine_tuning(run, tmp_path, weights):
    photos = write_photos(tmp_path / "photos", {"blue": 12, "red": 12})
    command = (
        "svm_baseline", photos, "--weights", weights / "resnet18.safetensors", "--image-size", 32,
        "--num-epochs", 1, "--num-folds", 3, "--out", tmp_path / "result.json", "--num-seeds",
    )  # fmt: skip
    assert "head, seed 0" in run(*command, 1)
    out = run(*command, 2)
    assert "head, seed 0" not in out
    assert "head, seed 1" in out
    result = json.loads((tmp_path / "result.json").read_text())
    assert {"command", "device", "versions"} <= set(result["conditions"])
    assert result["settings"]["num_groups"] == 24
    assert [(row["method"], row["seed"]) for row in result["runs"]] == [
        (method, seed) for seed in (0, 1) for method in ("svm", "head", "full")
    ]
    for row in result["runs"]:
        assert (row["num_train"], row["num_test"]) == (15, 9)
        assert row["micro"] == pytest.approx(1 - len(row["wrong"]) / 9)
        assert row["images_per_second"] > 0
    for row in result["summary"]:
        accuracies = [one["micro"] for one in result["runs"] if one["method"] == row["method"]]
        assert row["micro"]["value"] == pytest.approx(np.mean(accuracies))
        for average in ("micro", "macro"):
            assert 0 <= row[average]["low"] <= row[average]["value"] <= row[average]["high"] <= 1
    assert [set(row["seconds"]) for row in result["summary"]] == [{"features", "solve"}, {"train"}, {"train"}]

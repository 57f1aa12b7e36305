"""The command line as its users type it, their mistakes included."""

import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import write_photos
from PIL import Image
from safetensors.numpy import save_file

from jaxcls.classifier import create_model
from jaxcls.cli import main
from jaxcls.commands.training import SplitOptions, TrainingCommand
from jaxcls.models.port import from_variables

SMALL = ("--image-size", "32")


@pytest.fixture(autouse=True)
def _own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCLS_HOME", str(tmp_path / "home"))
    # The session's cache of compiled programs is shared by these tests; `main` would point it elsewhere.
    monkeypatch.setattr("jaxcls.parallel.use_compilation_cache", lambda folder: None)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights with an ImageNet-sized head, in a file as torchvision would name them."""
    model = create_model("resnet18", 1000, image_size=32)
    head = (model.head.kernel, model.head.bias)
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(from_variables("resnet18", model.backbone.variables, head), path)
    return str(path)


@pytest.fixture
def folder(tmp_path):
    return write_photos(tmp_path / "photos", {"blue": 6, "red": 6})


@pytest.fixture(scope="module")
def svm(weights, compilation_cache, tmp_path_factory):
    """A saved SVM for red and blue photos."""
    root = tmp_path_factory.mktemp("svm")
    photos = write_photos(root / "photos", {"blue": 6, "red": 6})
    assert main(["svm", str(photos), "--weights", weights, *SMALL, "--out", str(root / "svm.jaxcls")]) == 0
    return str(root / "svm.jaxcls")


def fails(capsys, code, arguments, *parts):
    """The command exits with `code` and one message on standard error that has all `parts`."""
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.startswith("jaxcls: ")
    for part in parts:
        assert part in error


# Work.


def test_info_on_a_folder(folder, capsys):
    (folder / "green").mkdir()
    assert main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "photos: 12 images, 2 classes" in out
    assert "class folders without images: 1 (green)" in out
    assert "every image can be decoded" in out


def test_info_on_duplicates_and_on_a_test_folder(folder, tmp_path, capsys):
    shutil.copy(folder / "red" / "0.png", folder / "red" / "copy.png")
    test = write_photos(tmp_path / "test", {"red": 2}, seed=1)
    shutil.copy(folder / "blue" / "3.png", test / "red")
    assert main(["info", str(folder), "--duplicates", "--test-data", str(test)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "photos: groups of images that show the same: 1 (1 exact and 0 near copies)" in lines
    assert "  red/0.png, red/copy.png (exact)" in lines
    assert lines[-1].startswith("warning: 1 of 3 test images show the same as a training image")
    assert lines[-1].endswith("red/3.png (as blue/3.png)")


def test_duplicates_are_held_out_together(tmp_path, capsys):
    """12 different photos, each twice: of 24, exactly 14 are trained on."""
    folder = write_photos(tmp_path / "photos", {"blue": 6, "red": 6})
    for photo in list(folder.rglob("*.png")):
        shutil.copy(photo, photo.with_stem(f"{photo.stem}-again"))
    for seed in range(3):
        options = SplitOptions(train_size=14, split_seed=seed)
        train, test = TrainingCommand(data=folder, split=options).divide()
        originals = [{photo.replace("-again", "") for photo in part.ids} for part in (train, test)]
        assert (len(train), len(test)) == (14, 10)
        assert not set.intersection(*originals)
        message = "photos: groups of images that show the same: 12 (12 exact and 0 near copies)\n"
        assert capsys.readouterr().err == message
    train, test = TrainingCommand(data=folder, split=replace(options, group_duplicates=False)).divide()
    assert train.groups is test.groups is None


def test_a_chain_that_is_split_is_warned_of(tmp_path, capsys):
    """Views of a window that moves over a wide picture: each shows nearly what the next shows."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 40, 3), np.uint8)
    wide = Image.fromarray(pixels).resize((800, 240), Image.Resampling.BICUBIC)
    for name in ("blue", "red"):
        (tmp_path / name).mkdir()
    for number in range(80):
        view = wide.crop((6 * number, 0, 6 * number + 320, 240))
        view.save(tmp_path / ("blue", "red")[number >= 40] / f"{number}.png")
    train, test = TrainingCommand(data=tmp_path, split=SplitOptions(train_size=0.5)).divide()
    assert (len(train), len(test)) == (40, 40)
    assert "of 40 test images show the same as a training image" in capsys.readouterr().err


def test_info_on_label_errors(folder, svm, capsys):
    (folder / "red" / "2.png").rename(folder / "blue" / "odd.png")
    assert main(["info", str(folder), "--label-errors", "--backbone", svm]) == 0
    captured = capsys.readouterr()
    assert "features of 0 of 12 images were kept from before" in captured.err
    table = captured.out.partition("P(wrong)\n")[2].splitlines()
    assert table[0].split()[:3] == ["blue/odd.png", "blue", "red"]


def test_info_on_the_installation(capsys, tmp_path):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "resnet152" in out
    assert str(tmp_path / "home" / "persistent") in out


def test_info_on_a_classifier(svm, capsys):
    assert main(["info", svm]) == 0
    out = capsys.readouterr().out
    assert "classes: blue, red" in out
    assert "parity: scores its stored images as when saved" in out
    assert float(re.search(r"relative difference ([^)]+)\)", out)[1]) < 1e-5


@pytest.mark.slow
def test_train_leaves_a_run_that_evaluates_alike(folder, weights, tmp_path, capsys, compilation_cache):
    run = tmp_path / "run"
    options = ["--num-epochs", "2", "--learning-rates", "0.01", "--batch-size", "4", "--out", str(run)]
    assert main(["train", str(folder), "--weights", weights, *SMALL, *options]) == 0
    trained = capsys.readouterr()
    assert "The pretrained head of 1000 classes is replaced" in trained.err
    assert {p.name for p in run.iterdir()} >= {
        "config.json", "metrics.jsonl", "accuracy.png", "classifier", "predictions.csv", "test_ids.txt"
    }  # fmt: skip
    assert len((run / "test_ids.txt").read_text().split()) == 12 - 7
    assert len((run / "train_ids.txt").read_text().split()) == 7
    assert main(["evaluate", str(run / "classifier"), str(folder), "--ids", str(run / "test_ids.txt")]) == 0
    report = capsys.readouterr().out
    assert report.strip() in trained.out


def test_predict_writes_csv_and_jsonl(svm, folder, tmp_path, capsys):
    table = tmp_path / "rows.csv"
    assert main(["predict", svm, str(folder), "--out", str(table)]) == 0
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["predicted"] for row in rows] == ["blue"] * 6 + ["red"] * 6
    assert main(["predict", svm, str(folder / "red" / "0.png"), "--format", "jsonl"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["predicted"] == "red"
    assert row["scores"]["red"] == pytest.approx(float(rows[6]["score:red"]), rel=1e-5)


def test_predict_gives_a_bad_file_among_good_ones_a_row_and_exit_code_1(svm, folder, capsys):
    (folder / "red" / "3.png").write_text("no picture")
    assert main(["predict", svm, str(folder), str(folder / "missing.png")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 12 + 1
    assert sum("error" in line for line in lines) == 2
    assert "not an image" in next(line for line in lines if "red/3.png" in line)
    assert "No such file" in next(line for line in lines if "missing.png" in line)


def test_svm_on_the_features_of_a_classifier(svm, folder, tmp_path, capsys):
    assert main(["svm", str(folder), "--backbone", svm, "--out", str(tmp_path / "again.jaxcls")]) == 0
    captured = capsys.readouterr()
    assert "solved by liblinear (scikit-learn), C=1" in captured.err
    assert re.search(r"accuracy \(micro\) +1\.0000", captured.out)


# Mistakes.


@pytest.mark.slow
def test_svm_of_chosen_c_calibrated_and_abstaining(svm, folder, tmp_path, capsys):
    options = ["--C", "cv", "--num-folds", "3", "--calibrate", "sigmoid", "--min-precision", "0.9"]
    for kept in (0, 7):  # of 12 images 7 are trained on
        out = tmp_path / f"chosen{kept}.jaxcls"
        assert main(["svm", str(folder), "--backbone", svm, *options, "--out", str(out)]) == 0
        said = capsys.readouterr().err
        assert f"features of {kept} of 7 images were kept from before" in said
        assert "macro accuracy in 3-fold cross-validation: C=" in said
        assert "expected calibration error, by held-out folds:" in said
        assert "thresholds that leave " in said
    assert main(["info", str(out)]) == 0
    assert "scores: probability" in capsys.readouterr().out


def test_wrong_path(capsys, tmp_path):
    fails(capsys, 1, ["info", str(tmp_path / "phtos")], "phtos does not exist", "one sub-folder")


def test_empty_folder(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    fails(capsys, 1, ["train", str(tmp_path / "empty")], "no images in class folders")


def test_one_class(capsys, tmp_path):
    write_photos(tmp_path, {"red": 2})
    fails(capsys, 1, ["svm", str(tmp_path)], "only one class, 'red'", "at least two")


def test_text_file_renamed(capsys, folder, weights, tmp_path):
    (folder / "red" / "notes.jpg").write_text("not a photo")
    arguments = ["svm", str(folder), "--weights", weights, *SMALL, "--out", str(tmp_path / "s")]
    fails(capsys, 1, arguments, "1 of ", "notes.jpg: not an image", "--skip-bad")
    assert main([*arguments, "--skip-bad", "--train-size", "0.5"]) == 0


def test_weights_of_another_depth(capsys, folder, weights):
    arguments = ["train", str(folder), "--backbone", "resnet34", "--weights", weights]
    named = ("these are weights of resnet18", "--backbone resnet18")
    fails(capsys, 1, arguments, *named, "layer1.2.conv1.weight")


def test_more_folds_than_photos(capsys, folder, svm):
    arguments = ["svm", str(folder), "--backbone", svm, "--C", "cv", "--num-folds", "4"]
    fails(capsys, 2, arguments, "class red has 3 images, fewer than 4 folds", "set num_folds to 3 at most")


def test_class_with_one_image(capsys, folder):
    write_photos(folder, {"green": 1}, seed=1)
    fails(capsys, 1, ["train", str(folder)], "class green has a single image", "stratif")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "photos", "--epochs", "3"],
        ["trian", "photos"],
        ["predict"],
        ["train", "p", "--batch-size", "x"],
    ],
)
def test_unknown_flag_or_command(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_impossible_value(capsys, folder):
    fails(capsys, 2, ["train", str(folder), "--batch-size", "0"], "batch_size must be at least 1")


def test_unknown_network(capsys, folder):
    fails(capsys, 1, ["train", str(folder), "--backbone", "resnet81"], "did you mean", "resnet18")


def test_not_a_classifier(capsys, folder):
    fails(capsys, 1, ["predict", str(folder), str(folder)], "is no saved classifier")


def test_table_into_a_file(capsys, svm, folder, tmp_path):
    arguments = ["predict", svm, str(folder), "--out", str(tmp_path / "x.txt")]
    fails(capsys, 2, arguments, "ends in .csv or .jsonl")


def test_weights_beside_a_classifier(capsys, svm, folder, weights):
    fails(capsys, 2, ["svm", str(folder), "--backbone", svm, "--weights", weights], "--weights does not go")


def test_a_run_folder_where_its_classifier_is_meant(capsys, svm, folder):
    fails(capsys, 1, ["predict", str(Path(svm).parent), str(folder)], f"did you mean {svm}?")


def test_evaluate_writes_into_a_new_folder_only(capsys, svm, folder):
    fails(capsys, 2, ["evaluate", svm, str(folder), "--out", str(folder)], "give a new folder")


def test_run_folder_in_use(capsys, folder, weights, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    arguments = ["train", str(folder), "--weights", weights, *SMALL, "--out", str(tmp_path / "run")]
    fails(capsys, 2, arguments, "is not empty")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "{}"


def test_unknown_test_class(capsys, folder, svm, tmp_path):
    other = write_photos(tmp_path / "other", {"green": 2, "red": 2})
    fails(capsys, 1, ["evaluate", svm, str(other)], "class green is not among")


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(Exception, match="does not exist"):
        main(["info", str(tmp_path / "nothing"), "--debug"])


def test_as_a_process(svm, folder, tmp_path):
    """The installed command, in another process, with a photo that was never on this disk path before."""
    photo = tmp_path / "new photo é.PNG"
    shutil.copy(folder / "blue" / "0.png", photo)
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "black.png")
    done = subprocess.run(
        [sys.executable, "-m", "jaxcls.cli", "predict", svm, str(photo), "--format", "csv"],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert (rows[0]["id"], rows[0]["predicted"]) == (str(photo), "blue")


def test_an_evaluation_on_training_photos_says_so(folder, svm, tmp_path, capsys):
    out = str(tmp_path / "own.jaxcls")
    assert main(["svm", str(folder), "--backbone", svm, "--out", out]) == 0
    capsys.readouterr()
    assert main(["evaluate", out, str(folder)]) == 0
    assert (
        "warning: 7 of these 12 images have the ids of images that were trained on" in capsys.readouterr().err
    )
    assert main(["evaluate", out, str(folder), "--ids", f"{out}/test_ids.txt"]) == 0
    assert "trained on" not in capsys.readouterr().err


def test_a_classifier_is_not_replaced(folder, svm, capsys):
    before = (Path(svm) / "classifier.json").read_bytes()
    fails(capsys, 2, ["svm", str(folder), "--backbone", svm, "--out", svm], f"{svm} exists", "choose another")
    assert (Path(svm) / "classifier.json").read_bytes() == before


def test_warnings_are_one_line_without_code():
    code = "import warnings; from jaxcls.cli import main; main(['list']); warnings.warn('the sky falls')"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr == "jaxcls: the sky falls\n"

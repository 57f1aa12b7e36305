"""`jaxcls augment`, and what training and evaluating make of its folder."""

import shutil

import pytest
from conftest import write_photos
from PIL import Image

from jaxcls.augment.copies import MAX_SHORT_SIDE, augment_dataset
from jaxcls.augment.ops import parse
from jaxcls.cli import main
from jaxcls.commands.augment import Augment
from jaxcls.commands.training import SplitOptions, TrainingCommand
from jaxcls.data.folder import read_folder

MIRROR, NOISE = "Fliplr()", "Sequential([Fliplr(0.5), AdditiveGaussianNoise(scale=(5, 10))])"


@pytest.fixture(autouse=True)
def _own_home(tmp_path, monkeypatch, compilation_cache):
    monkeypatch.setenv("JAXCLS_HOME", str(tmp_path / "home"))
    # The session's cache of compiled programs is shared by these tests; `main` would point it elsewhere.
    monkeypatch.setattr("jaxcls.parallel.use_compilation_cache", lambda folder: None)


@pytest.fixture
def folder(tmp_path):
    return write_photos(tmp_path / "photos", {"blue": 6, "red": 6})


@pytest.fixture(scope="module")
def made(tmp_path_factory, compilation_cache):
    """What is made of those photos once, to be copied."""
    home = tmp_path_factory.mktemp("made")
    folder, out = write_photos(home / "photos", {"blue": 6, "red": 6}), home / "augmented"
    said = []
    augment_dataset(read_folder(folder), [parse(MIRROR), parse(NOISE)], out, report=said.append)
    assert said == [f"{out}: 12 images and 24 augmented copies (24 new, 0 from before; 0 removed)"]
    return out


@pytest.fixture
def augmented(made, tmp_path):
    return shutil.copytree(made, tmp_path / "augmented")


def fails(capsys, code, arguments, *parts):
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("jaxcls: ")
    assert error.count("\n") == 1
    for part in parts:
        assert part in error


def test_a_second_call_makes_what_is_missing(folder, augmented, capsys):
    command = ["augment", str(folder), "--pipeline", NOISE, "--out", str(augmented)]
    next(path for path in augmented.glob("red/0.png~*")).unlink()
    assert main(["augment", str(folder), "--pipeline", MIRROR, *command[2:]]) == 0
    assert "24 augmented copies (1 new, 23 from before; 0 removed)" in capsys.readouterr().out
    assert main([*command, "--seed", "1"]) == 0
    assert "12 augmented copies (12 new, 0 from before; 24 removed)" in capsys.readouterr().out


def test_without_out_it_writes_below_the_outputs(folder, tmp_path, capsys):
    assert main(["augment", str(folder), "--pipeline", MIRROR, "--max-short-side", "16"]) == 0
    (out,) = (tmp_path / "home" / "outputs").iterdir()
    assert capsys.readouterr().out.startswith(f"{out}: 12 images")
    with Image.open(next(out.glob("red/0.png~*"))) as copy:
        assert copy.size == (16, 16)


def test_originals_are_held_out_as_without_copies(folder, augmented, tmp_path, capsys):
    plain, test = TrainingCommand(data=folder).divide()
    capsys.readouterr()
    for is_grouped in (True, False):
        split = SplitOptions(group_duplicates=is_grouped)
        train, held_out = TrainingCommand(data=augmented, split=split).divide()
        assert held_out.ids.tolist() == test.ids.tolist()
        assert held_out.origins is None
        assert train.originals().ids.tolist() == plain.ids.tolist()
        assert sorted(train.origins[train.is_copy]) == sorted([*plain.ids] * 2)
        said = capsys.readouterr().err
        assert said.startswith(f"{2 * len(test)} augmented copies of test images are left out")
    _, tested = TrainingCommand(data=folder, split=SplitOptions(test_data=augmented)).divide()
    assert len(tested) == 12
    assert "24 augmented copies of test images are left out" in capsys.readouterr().err


def test_copies_are_not_evaluated_on_unless_that_is_asked_for(augmented, served_model, capsys):
    refused = f"24 of the 36 images in {augmented} are augmented copies"
    fails(capsys, 2, ["evaluate", str(served_model), str(augmented)], refused, "--allow-copies", "--ids")


@pytest.mark.slow
def test_copies_are_trained_on_and_evaluated_on_only_where_that_is_asked_for(
    augmented, served_model, tmp_path, capsys
):
    model = str(tmp_path / "svm.jaxcls")
    assert main(["svm", str(augmented), "--backbone", str(served_model), "--out", model]) == 0
    captured = capsys.readouterr()
    assert "features of 0 of 21 images were kept" in captured.err  # of 7 photos and their 14 copies
    assert "of 5 images" in captured.out
    evaluate = ["evaluate", model, str(augmented)]
    assert main([*evaluate, "--allow-copies"]) == 0
    assert "of 36 images" in capsys.readouterr().out
    assert main([*evaluate, "--ids", f"{model}/test_ids.txt"]) == 0
    assert "of 5 images" in capsys.readouterr().out


# Mistakes


def test_no_pipeline(folder, capsys):
    fails(capsys, 2, ["augment", str(folder)], "give at least one --pipeline")


def test_a_pipeline_that_is_misspelt(folder, capsys):
    fails(
        capsys, 2, ["augment", str(folder), "--pipeline", "FlipLR(0.5)"],
        "pipeline 'FlipLR(0.5)': 'FlipLR(0.5)' is no number, tuple, list or operation (known are Sequential,",
    )  # fmt: skip


def test_photos_that_are_their_own_output(folder, capsys):
    command = ["augment", str(folder), "--pipeline", MIRROR, "--out"]
    fails(capsys, 2, [*command, str(folder)], "holds something else: give a new folder")
    fails(capsys, 2, [*command, str(folder / "more")], "lie in each other: give a folder elsewhere")


def test_a_damaged_lineage(augmented, served_model, capsys):
    (augmented / "lineage.jsonl").write_text("nothing\n")
    for command in (["evaluate", str(served_model), str(augmented)], ["info", str(augmented)]):
        fails(capsys, 1, command, "lineage.jsonl: line 1 is damaged", "augment the photos again")


def test_a_photo_that_cannot_be_decoded(folder, tmp_path, capsys):
    (folder / "red" / "0.png").write_text("no picture")
    command = ["augment", str(folder), "--pipeline", MIRROR, "--out", str(tmp_path / "out")]
    assert main(command) == 1
    assert "1 of 12 images cannot be decoded" in capsys.readouterr().err
    assert main([*command, "--skip-bad"]) == 0
    assert "11 images and 11 augmented copies (11 new" in capsys.readouterr().out


def test_the_largest_short_side_is_the_same_from_python():
    assert Augment(data=None).max_short_side == MAX_SHORT_SIDE

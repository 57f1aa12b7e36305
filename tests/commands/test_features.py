"""`jaxcls features` on this machine, and what is refused before a cluster is asked."""

import numpy as np
import pytest
from conftest import write_photos

import jaxcls
from jaxcls.classifier import create_model
from jaxcls.cli import main


@pytest.fixture(autouse=True)
def _own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCLS_HOME", str(tmp_path / "home"))
    # The session's cache of compiled programs is shared; `main` would point it elsewhere.
    monkeypatch.setattr("jaxcls.parallel.use_compilation_cache", lambda folder: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory, compilation_cache):
    path = tmp_path_factory.mktemp("features") / "colours.jaxcls"
    return create_model("resnet18", ("red", "blue"), image_size=32).save(path)


@pytest.fixture
def folder(tmp_path):
    return write_photos(tmp_path / "photos", {"blue": 3, "red": 2})


def fails(capsys, code, arguments, *messages):
    assert main(list(map(str, arguments))) == code
    said = capsys.readouterr().err
    assert said.startswith("jaxcls: ")
    assert said.count("\n") == 1
    for message in messages:
        assert message in said


def test_features_of_a_folder(model, folder, tmp_path, capsys):
    out = tmp_path / "features.npz"
    assert main(["features", str(model), str(folder), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"5 images, 512 features: {out}\n"
    values, labels, ids = jaxcls.extract_features(jaxcls.load(model), jaxcls.read_folder(folder))
    with np.load(out, allow_pickle=False) as found:
        np.testing.assert_array_equal(found["values"], values)
        assert found["labels"].tolist() == labels.tolist() == [0, 0, 0, 1, 1]
        assert found["classes"].tolist() == ["blue", "red"]
        assert found["ids"].tolist() == list(ids)


def test_a_photo_that_cannot_be_read_is_an_error_or_left_out(model, folder, tmp_path, capsys):
    (folder / "red" / "x.png").write_text("no picture")
    arguments = ["features", model, folder, "--out", tmp_path / "features.npz"]
    fails(capsys, 1, arguments, "x.png: not an image")
    assert not (tmp_path / "features.npz").exists()
    assert main([*map(str, arguments), "--skip-bad"]) == 0
    assert len(np.load(tmp_path / "features.npz")["ids"]) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["features", "MODEL", "PHOTOS", "--out", "x.csv"], "give a name that ends in .npz"),
        (["predict", "MODEL", "PHOTOS", "--address", "auto"], "go with --target ray"),
        (["predict", "MODEL", "PHOTOS", "--target", "ray"], "--target ray needs --out"),
        (
            ["predict", "MODEL", "PHOTOS", "--target", "ray", "--out", "x", "--format", "csv"],
            "--format does not go with --target ray",
        ),
        (
            ["predict", "MODEL", "PHOTOS", "--target", "ray", "--out", "x", "--shard-size", "0"],
            "must be at least 1",
        ),
    ],
)
def test_what_does_not_go_together(model, folder, arguments, message, capsys):
    named = {"MODEL": model, "PHOTOS": folder}
    fails(capsys, 2, [named.get(word, word) for word in arguments], message)

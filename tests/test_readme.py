"""The README is a promise: its example runs, its commands and files exist."""

import re
import shlex
from pathlib import Path

import pytest
import tyro
from conftest import write_photos

import jaxcls
from jaxcls import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def example() -> str:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]


def test_the_example_is_twelve_lines_long():
    assert len(example().strip().splitlines()) <= 12


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch, backbone):
    write_photos(tmp_path / "photos", {"blue": 6, "red": 6})
    monkeypatch.chdir(tmp_path)
    # Random weights for 32 pixels stand in for the hub's.
    monkeypatch.setattr(jaxcls, "load_pretrained", lambda name: backbone)
    names: dict = {}
    exec(example(), names)
    assert names["evaluation"].num_answered == 5
    assert names["score"](names["train"].image(0)[None, :32, :32].copy()).shape == (1, 2)


def test_the_augmentation_example_runs():
    import jax
    import numpy as np

    (code,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "ops." in block)
    names: dict = {"jax": jax, "images": np.zeros((2, 8, 10, 3), np.uint8)}
    exec(code, names)
    assert (names["augmented"].shape, names["augmented"].dtype) == ((2, 8, 10, 3), np.uint8)


def test_the_notebooks_example_runs(tmp_path):
    import numpy as np

    photos = jaxcls.read_folder(write_photos(tmp_path / "photos", {"blue": 3, "red": 3}))
    scores = np.eye(2, dtype=np.float32)[photos.labels]
    predictions = jaxcls.Predictions(
        scores, "logit", photos.classes, tuple(photos.ids), photos.labels, np.zeros(6, np.bool_)
    )
    (code,) = (
        block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "jaxcls.ui." in block
    )
    names: dict = {"jaxcls": jaxcls, "photos": photos, "test": photos, "predictions": predictions}
    names["classifier"] = jaxcls.create_model("resnet18", 2)
    exec(code, names)
    assert names["classifier"].head.thresholds is None
    names["desk"].close()


def test_the_example_of_augmented_copies_runs(tmp_path, monkeypatch):
    from jaxcls.augment import ops

    monkeypatch.setenv("JAXCLS_HOME", str(tmp_path / "home"))
    photos = jaxcls.read_folder(write_photos(tmp_path / "photos", {"blue": 6, "red": 6}))
    (code,) = (
        block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "augment_dataset" in block
    )
    made, divided, _ = code.splitlines()  # the last line trains as the first example does
    names: dict = {"jaxcls": jaxcls, "photos": photos, "augment": ops.Fliplr(0.5)}
    exec(f"{made}\n{divided}", names)
    assert (len(names["train"]), len(names["test"]), len(names["test"].originals())) == (21, 15, 5)


def test_the_duplicates_example_runs(tmp_path, capsys):
    photos = jaxcls.read_folder(write_photos(tmp_path / "photos", {"blue": 6, "red": 6}))
    (code,) = (
        block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "find_dup" in block
    )
    names: dict = {"photos": photos.merge(jaxcls.read_folder(tmp_path / "photos", name="again"))}
    exec(code, names)
    assert "12 (12 exact and 0 near copies)" in capsys.readouterr().out
    assert len(names["train"]) == 14  # 15 would part a pair


def test_the_inventory_example_runs(tmp_path, monkeypatch, capsys):
    folder = write_photos(tmp_path / "photos", {"blue": 6, "red": 6})
    monkeypatch.chdir(tmp_path)
    photos = jaxcls.read_folder(folder)
    (code,) = (
        block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "inventory" in block
    )
    train, test = photos.split(0.5, seed=3)
    names: dict = {"jaxcls": jaxcls, "photos": photos, "train": train, "test": test}
    exec(code, names)
    assert capsys.readouterr().out.startswith("12 as before, 0 added")
    assert (set(names["train"].ids), set(names["test"].ids)) == (set(train.ids), set(test.ids))


def test_files_and_commands_exist():
    for path in re.findall(r"`((?:experiments|tests|\.ci)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
    known = {command.__name__.lower() for command in cli.COMMANDS}
    for command in re.findall(r"`jaxcls (\w+)`", README):
        assert command in known


def test_modules_exist():
    rows = re.findall(r"^\| `(\w+)/` \|(.*)", README, re.MULTILINE)
    assert len(rows) > 7
    for folder, text in rows:
        for name in re.findall(r"`(\w+\.py)`", text):
            assert (ROOT / "jaxcls" / folder / name).exists(), f"{folder}/{name}"


def commands():
    """The words of each `jaxcls ...` in a block or a table."""
    blocks = [block.replace("\\\n", " ") for block in README.split("```")[1::2] if block.startswith("\n")]
    lines = "".join(blocks).splitlines()
    lines += [code for row in README.splitlines() if row[:1] == "|" for code in re.findall("`([^`]+)`", row)]
    found = (part.strip() for line in lines for part in re.split(r" (?:\||&&) ", line))
    settings = re.compile(r"([A-Z_]+=\S+ )*\s*(?=jaxcls )")
    return [shlex.split(settings.sub("", part, 1)) for part in found if settings.match(part)]


def test_commands_are_understood():
    assert len(commands()) > 40
    kinds = {kind.__name__.lower(): kind for kind in cli.COMMANDS}
    for _, name, *arguments in commands():
        tyro.cli(kinds[name], args=arguments)


def test_commands_that_quickstart_prints_are_understood():
    from jaxcls.quickstart import NEXT

    lines = [line.split()[1:] for line in NEXT.splitlines() if line.strip().startswith("jaxcls ")]
    assert len(lines) == 5
    for name, *arguments in lines:
        kind = next(command for command in cli.COMMANDS if command.__name__.lower() == name)
        tyro.cli(kind, args=[a for a in arguments if a != "..."])

"""Lists in CSV and JSON lines: what is read, and which line is wrong."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxcls.data.lists import read_list
from jaxcls.errors import DatasetError

NAMES = ("cups/a b.png", "茶碗/写真.png", "loose.png", 'a, "quoted".png')


@pytest.fixture
def folder(tmp_path):
    """Photos of different sizes."""
    for number, name in enumerate(NAMES):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (3, 2 + number)).save(tmp_path / name)
    return tmp_path


def write(folder, text, name="list.csv", encoding="utf-8"):
    (folder / name).write_text(text, encoding=encoding)
    return folder / name


def test_csv(folder):
    rows = ("label,size,path", "cup,1,cups/a b.png", "茶碗,2,茶碗/写真.png", "", ",3,loose.png")
    text = "\n".join([*rows, '10,4,"a, ""quoted"".png"'])
    found = read_list(write(folder, text), max_pixels=10**5)
    assert (found.name, found.max_pixels) == ("list", 10**5)
    assert found.classes == ("10", "cup", "茶碗")
    assert found.ids.tolist() == list(NAMES)
    assert found.labels.tolist() == [1, 2, -1, 0]
    assert [found.image(i).shape for i in range(4)] == [(2 + i, 3, 3) for i in range(4)]
    assert found.source.path(1) == folder / "茶碗/写真.png"


def test_json_lines_say_the_same(folder):
    rows = [
        {"path": NAMES[0], "label": "cup", "size": 1},
        {"label": "茶碗", "path": NAMES[1]},
        {"path": NAMES[2], "label": None},
        {"path": NAMES[3], "label": 10},
    ]
    text = "\n\n".join(json.dumps(row) for row in rows)
    found = read_list(write(folder, text, "list.JSONL"), name="mine")
    assert found.name == "mine"
    assert found.classes == ("10", "cup", "茶碗")
    assert found.labels.tolist() == [1, 2, -1, 0]
    assert found.ids.tolist() == list(NAMES)


def test_a_list_of_spreadsheet_programs(folder):
    found = read_list(write(folder, "path,label\r\nloose.png,cup\r\n", encoding="utf-8-sig"))
    assert found.classes == ("cup",)
    assert found.ids.tolist() == ["loose.png"]


def test_without_labels_there_are_no_classes(folder):
    found = read_list(write(folder, "path\nloose.png\n"))
    assert found.classes == ()
    assert found.labels.tolist() == [-1]
    assert found.labels.dtype == np.int32


def test_paths_start_where_one_says_or_are_absolute(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("lists")
    path = write(elsewhere, f"path,label\n{folder / 'loose.png'},a\ncups/a b.png,b\n")
    found = read_list(path, root=str(folder))
    assert found.image(0).shape == (4, 3, 3)
    assert found.image(1).shape == (2, 3, 3)
    assert found.ids.tolist() == [str(folder / "loose.png"), "cups/a b.png"]
    with pytest.raises(DatasetError, match=r"1 of 2 photos are not there, first .*/cups/a b.png \(line 3\)"):
        read_list(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.txt", "path\nloose.png\n", "l.txt: a list of photos ends in .csv or .jsonl"),
        ("l.csv", "", "its first line names no column `path`"),
        ("l.csv", "loose.png,cup\n", "its first line names no column `path`"),
        ("l.csv", "path,label\n", "l.csv lists no photos"),
        ("l.csv", "path,label\nloose.png,a\n,b\n", "l.csv, line 3: it has no path"),
        ("l.csv", "label,path\na\n", "l.csv, line 2: it has no path"),
        ("l.csv", "path,label\nloose.png,a\nloose.png,b\n", "line 3: loose.png is listed in line 2 already"),
        ("l.csv", "path,label\n" + "x" * 200_000 + ",a\n", "l.csv, line 2: field larger than"),
        ("l.csv", "path,label\ncups,a\n", "1 of 1 photos are not there, first .*cups"),
        (
            "l.csv",
            f"path,label\nloose.png,a\n{'é' * 150},a\n",
            "l.csv, line 3: .*é: File name too long: mend",
        ),
        ("l.csv", f"path,label\n{'d/' * 3000}x.png,a\n", "l.csv, line 2: .{200}: File name too long: mend"),
        ("l.csv", "path,label\na\0b,a\n", "1 of 1 photos are not there|contains NUL"),
        ("l.jsonl", "", "l.jsonl lists no photos"),
        ("l.jsonl", '{"path": "loose.png"}\n{"path"', "l.jsonl, line 2: no JSON"),
        ("l.jsonl", "[" * 100_000, "l.jsonl, line 1: no JSON"),
        ("l.jsonl", '["loose.png"]', "line 1: not an object with `path` and `label`"),
        ("l.jsonl", '{"path": 1}', "line 1: it has no path"),
        ("l.jsonl", '{"path": "loose.png", "label": 1.5}', "label 1.5 is neither a text nor a whole number"),
        ("l.jsonl", '{"path": "loose.png", "label": true}', "label True is neither"),
        ("l.jsonl", '{"path": "loose.png", "label": ["a"]}', "is neither a text nor"),
        ("l.jsonl", '{"path": "\\ud800.png"}', r"line 1: '\\ud800.png' is no Unicode text"),
        ("l.jsonl", '{"path": "loose.png", "label": "\\udfff"}', "is no Unicode text"),
    ],
)
def test_mistakes_are_one_line_that_says_where(folder, name, text, message):
    with pytest.raises(DatasetError, match=message) as raised:
        read_list(write(folder, text, name))
    assert "\n" not in str(raised.value)


def test_what_cannot_be_read(folder):
    with pytest.raises(DatasetError, match=r"none.csv cannot be read: No such file"):
        read_list(folder / "none.csv")
    with pytest.raises(DatasetError, match=r"list.csv is not UTF-8"):
        read_list(write(folder, "path,label\ntassé.png,a\n", encoding="latin-1"))


READ_AS_NOBODY = """
import os, sys
from pathlib import Path
from jaxcls.data.lists import read_list
from jaxcls.errors import DatasetError
read_list(sys.argv[1])  # loads what nobody may not
Path(sys.argv[1]).with_name("locked").chmod(0)
if os.getuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
try:
    read_list(sys.argv[1])
except DatasetError as error:
    print(error)
"""


def test_a_photo_in_a_locked_folder_is_named_with_its_line():
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        (root / "locked").mkdir()
        for photo in ("1.png", "locked/2.png"):
            (root / photo).touch()
        path = write(root, "path,label\n1.png,a\nlocked/2.png,b\n")
        command = [sys.executable, "-c", READ_AS_NOBODY, str(path)]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        (root / "locked").chmod(0o755)
    assert told == f"{path}, line 3: {root}/locked/2.png: Permission denied: mend the line, or its folder\n"

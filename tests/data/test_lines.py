"""Ids as lines: all come back, plain ones are as they were, and older files are read."""

import pytest

from jaxcls.data.lines import from_line, to_line


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("cup/é 🍵.png", "cup/é 🍵.png"),
        (" a\tb\u2028 ", " a\tb\u2028 "),
        ("a\nb", r"\a\nb"),
        ("a\r", r"\a\r"),
        (r"a\nb", r"\a\\nb"),
        ("\\", "\\" * 3),
        ("", ""),
    ],
)
def test_ids_come_back(name, line):
    assert to_line(name) == line
    assert from_line(line) == name


@pytest.mark.parametrize("line", [r"a\nb", "a\\", r"\a", r"\a\x", "a\rb"])
def test_a_line_that_was_written_unescaped_is_the_id(line):
    assert from_line(line) == line

"""Lines that were written are read again; others are noticed."""

import json
import resource

import pytest

from jaxcls.data.provenance import Origin, Provenance
from jaxcls.errors import DatasetError

DIGEST = "ab" * 32
ORIGIN = Origin(
    label="caf\u00e9 au lait", file=f"caf\u00e9 au lait/{DIGEST[:20]}.jpeg", sha256=DIGEST,
    url="https://a.example/b", query="caf\u00e9", time="2026-01-01T00:00:00+00:00",
    title="\ud800 \u2028 \x1b",
)  # fmt: skip


def test_any_text_survives(tmp_path):
    with Provenance(tmp_path / "file") as provenance:
        provenance.add(ORIGIN)
    content = (tmp_path / "file").read_bytes()
    assert content.isascii()
    assert content.count(b"\n") == 1
    with Provenance(tmp_path / "file") as provenance:
        assert provenance.origins == {(ORIGIN.label, ORIGIN.url): ORIGIN}


def test_a_line_torn_anywhere_is_cut_off(tmp_path):
    path = tmp_path / "file"
    line = ORIGIN.to_line()
    for length in range(len(line)):
        path.write_bytes(line + line[:length])
        with Provenance(path) as provenance:
            assert len(provenance.origins) == 1
            provenance.add(ORIGIN)
        assert path.read_bytes() == line * 2


def test_a_line_for_which_there_is_no_room_leaves_nothing(tmp_path):
    line = ORIGIN.to_line()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Provenance(tmp_path / "file") as provenance:
        provenance.add(ORIGIN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(line) + 10, limits[1]))
        try:
            with pytest.raises(DatasetError, match="file cannot be written: File too large"):
                provenance.add(ORIGIN)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / "file").read_bytes() == line
        provenance.add(ORIGIN)
    assert (tmp_path / "file").read_bytes() == line * 2


@pytest.mark.parametrize(
    "change",
    [
        {"file": f"cup/{DIGEST[:20]}.jpeg"},
        {"file": f"caf\u00e9 au lait/{DIGEST[:20]}.jpeg/../../x"},
        {"file": f"caf\u00e9 au lait/{DIGEST[:20]}"},
        {"file": f"caf\u00e9 au lait/{DIGEST[:19]}.jpeg"},
        {"sha256": DIGEST[1:]},
        {"sha256": DIGEST.upper()},
        {"title": None},
        {"colour": "blue"},
    ],
    ids=str,
)
def test_other_lines_are_errors(change, tmp_path):
    values = {**json.loads(ORIGIN.to_line()), **change}
    (tmp_path / "file").write_bytes(ORIGIN.to_line() + json.dumps(values).encode() + b"\n")
    with pytest.raises(DatasetError, match=r"line 2: .*: delete the line"):
        Provenance(tmp_path / "file")


@pytest.mark.parametrize("line", [b"", b"[]", b"{}", b"[" * 100_000, b"\xff", b'{"label": "x"}'])
def test_what_is_no_line_is_an_error(line, tmp_path):
    (tmp_path / "file").write_bytes(line + b"\n" + ORIGIN.to_line())
    with pytest.raises(DatasetError, match="line 1: "):
        Provenance(tmp_path / "file")

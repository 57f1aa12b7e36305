"""The lineage file, its damages included; families and groups against SciPy's connected components."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from jaxcls.data.dataset import ID_DTYPE
from jaxcls.data.lineage import (
    LINEAGE_FILE,
    Lineage,
    find_families,
    is_copy_name,
    is_place,
    join_groups,
    read_lineage,
    write_lineage,
)
from jaxcls.errors import DatasetError

ORIGINAL = Lineage("cup/é 1.jpg", "ab" * 32)
COPY = Lineage("cup/é 1.jpg~1.jpg", "", ORIGINAL.id, ORIGINAL.sha256, "Fliplr(p=1.0)", 1, 2, 640)


def test_what_is_written_is_read(tmp_path):
    assert read_lineage(tmp_path) == {}
    write_lineage(tmp_path, [ORIGINAL, COPY])
    assert read_lineage(tmp_path) == {ORIGINAL.id: ORIGINAL, COPY.id: COPY}
    assert [json.loads(line) for line in (tmp_path / LINEAGE_FILE).read_text("utf-8").splitlines()] == [
        {"id": "cup/é 1.jpg", "sha256": "ab" * 32},
        {
            "id": "cup/é 1.jpg~1.jpg",
            "sha256": "",
            "original": "cup/é 1.jpg",
            "original_sha256": "ab" * 32,
            "pipeline": "Fliplr(p=1.0)",
            "repeat": 1,
            "seed": 2,
            "max_short_side": 640,
        },
    ]


def test_a_later_line_counts_and_an_unfinished_one_does_not(tmp_path):
    write_lineage(tmp_path, [ORIGINAL, COPY])
    done = replace(COPY, sha256="cd" * 32)
    with (tmp_path / LINEAGE_FILE).open("a", encoding="utf-8") as file:
        file.write(done.to_line() + ORIGINAL.to_line()[:-5])
    assert read_lineage(tmp_path) == {ORIGINAL.id: ORIGINAL, COPY.id: done}


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"nothing",
        b"5",
        b"\xff",
        b"[" * 100_000,
        b'{"id": "a/b"}',
        b'{"id": "a/b", "sha256": 5}',
        b'{"id": "a/b", "sha256": "", "seed": true}',
        b'{"id": "a/b", "sha256": "", "more": 1}',
        b'{"id": "../b", "sha256": ""}',
        b'{"id": "/etc/passwd", "sha256": ""}',
        b'{"id": "b", "sha256": ""}',
    ],
)
def test_damaged_lines_are_named(tmp_path, line):
    write_lineage(tmp_path, [ORIGINAL])
    with (tmp_path / LINEAGE_FILE).open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(DatasetError, match=r"lineage\.jsonl: line 2 is damaged.*augment the photos again"):
        read_lineage(tmp_path)


def test_places_lie_below():
    assert all(map(is_place, ("a/b", "a/b/c.jpg", "a/b..", "ü/~")))
    assert not any(map(is_place, ("", "b", "/a/b", "a/", "a//b", "a/../b", "./a/b", "a/.b", ".a/b", "a/b\0")))


def test_copies_are_known_by_their_names():
    assert is_copy_name("a/b.webp~0123456789abcdef.png")
    assert is_copy_name("b~0123456789abcdef.jpg")
    for name in (
        "a/b.png",
        "a~1.jpg",
        "a~0123456789abcdef.png.jpg",
        "a~0123456789abcdef.jpg\n",
        "a~0123456789ABCDEF.jpg",
    ):
        assert not is_copy_name(name)


def test_families_are_led_by_the_original_or_the_first_copy():
    ids = np.asarray(["a~1", "a", "b~1", "b~2", "c", "a~2"], ID_DTYPE)
    origins = np.asarray(["a", "", "b", "b", "", "a"], ID_DTYPE)
    assert find_families(ids, origins).tolist() == [1, 1, 2, 2, 4, 1]


@pytest.mark.parametrize("seed", range(20))
def test_groups_are_joined_as_graphs_are(seed):
    generator = np.random.default_rng(seed)
    num = 60
    groups, families = generator.integers(0, 40, num) * 3, generator.integers(0, 40, num)
    edges = coo_array((np.ones(num), (groups, 200 + families)), shape=(400, 400))
    _, component = connected_components(edges, directed=False)
    joined = join_groups(groups, families)
    assert joined.dtype == np.int32
    expected = component[groups]
    np.testing.assert_array_equal(joined[:, None] == joined, expected[:, None] == expected)


def test_without_groups_families_are_the_groups():
    assert join_groups(None, np.asarray([0, 1, 0])).tolist() == [0, 1, 0]
    assert len(join_groups(np.zeros(0, int), np.zeros(0, int))) == 0

"""The arithmetic, by hand for one case; and the README shows what the module prints."""

import re
from pathlib import Path

import pytest

from experiments.cluster import thousand_hosts
from experiments.cluster.thousand_hosts import Assumptions, failing, reading, serving, to_markdown, training

FOLDER = Path(thousand_hosts.__file__).parent
# 8 hosts of 2 GPUs at 100 images/s; 1 GB/s everywhere.
SIMPLE = Assumptions(
    hosts=(8,), gpus=2, cores=4, network_gbps=8, inside_gbps=8, inside_us=100, hop_us=50, images_per_gpu=10,
    train_rate=100, score_rate=1000, gradient_mb=80, state_mb=500, num_small_sums=10, decode_rate=20,
    request_rate=30, photo_kb=100, num_photos=4000, storage_gbps=8, writer_gbps=8, host_hours=80,
    checkpoint_seconds=600, start_seconds=100,
)  # fmt: skip


@pytest.mark.parametrize(
    ("table", "row"),
    [
        # 10 sums of 100 + 6 x 50 us; 80 MB in a ring of 2 (80 ms), then of 8 (140 ms).
        (training, ("8", "160", "100.0 ms", "4.0 ms", "220.0 ms", "31%")),
        # 1,600 images/s: 10 cores of each host, and 160 MB/s.
        (reading, ("8", "1,600", "10", "2.5x", "1 Gbit/s", "0.16x")),
        # 4,000 photos on 2 of 4 cores: 100 s; 100 + 100 + 300 s in 10 hours.
        (failing, ("8", "0.5 s", "10 h", "500 s, 100 s of it the scan", "1.4%")),
        (serving, ("8", "16,000/s", "640/s", "960/s", "80,000/s", "16")),
    ],
)
def test_arithmetic(table, row):
    assert table(SIMPLE)[1:] == [row]


@pytest.mark.parametrize("table", [training, reading, failing, serving])
def test_the_readme_shows_what_is_printed(table):
    text = (FOLDER / "README.md").read_text()
    shown = re.search(rf"<!-- {table.__name__} -->\n\n((?:\|.*\n)+)", text)[1]
    assert shown == to_markdown(table(Assumptions()))

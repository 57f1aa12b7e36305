"""Other people's odd and damaged images through a folder, the scan and the pipeline, each within bounds."""

import json
import subprocess
import sys
import tarfile
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from test_images import bombs

from jaxcls.augment.host import Augmentation
from jaxcls.data.dataset import find_problems, scan
from jaxcls.data.folder import read_folder
from jaxcls.pipeline import evaluation_batches, steps_per_epoch, training_batches
from jaxcls.preprocess import Preprocess

ARCHIVES = {"exif": "exif_orientation.tar.gz", "jpeg": "jpeg_corpus.tar.gz", "png": "pngsuite.tar.gz"}
SMALL = Preprocess(size=32)
BATCH_SIZE = 64
MAX_SECONDS, MAX_BYTES = 1.0, 300 * 10**6


def extract(shared, root, names):
    """Every file of these archives, texts and other formats too, under a name that ends as an image's."""
    for name in names:
        (root / name).mkdir()
        with tarfile.open(shared / "data/images_odd" / ARCHIVES[name]) as tar:
            for member in tar:
                if member.isfile():
                    path = root / name / f"{member.name.replace('/', '_')}.jpg"
                    path.write_bytes(tar.extractfile(member).read())
    return root


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory):
    return extract(shared, tmp_path_factory.mktemp("odd"), ARCHIVES)


@pytest.fixture(scope="module")
def odd(folder):
    return read_folder(folder)


@pytest.fixture(scope="module")
def problems(odd):
    return find_problems(odd)


@pytest.mark.slow
def test_all_are_listed_and_the_scan_leaves_out_what_it_names(folder, odd, problems):
    assert len(odd) == sum(1 for path in folder.rglob("*") if path.is_file()) > 5700
    good = scan(odd, max_bad_fraction=1.0)
    assert len(good) == problems.count(None)
    assert f"{len(odd) - len(good)} undecodable images left out:" in good.notes
    # The licence aside.
    assert (good.class_counts()[0], odd.class_counts()[0]) == (18, 19)


@pytest.mark.slow
def test_the_pipeline_has_an_image_or_a_message_for_each(odd, problems):
    seen = []
    with closing(evaluation_batches(odd, SMALL, batch_size=BATCH_SIZE, num_workers=2)) as batches:
        for batch in batches:
            for index, is_good, error in zip(batch.indices, batch.mask, batch.errors, strict=True):
                if index >= 0:
                    seen.append(index)
                    assert is_good == (not error)
                    assert is_good or Path(odd.ids[index]).name in error
    assert seen == list(range(len(odd)))


@pytest.mark.slow
def test_the_pipeline_trains_on_what_the_scan_kept(odd):
    good = scan(odd, max_bad_fraction=1.0)
    stream = training_batches(good, SMALL, Augmentation(), batch_size=BATCH_SIZE, seed=0, num_workers=2)
    num_steps = steps_per_epoch(len(good), BATCH_SIZE)
    with closing(stream) as batches:
        masks = [batch.mask for batch in islice(batches, num_steps)]
    assert len(masks) == num_steps
    # Whole scans at the smallest scale may pass where full ones fail; hardly any does.
    assert np.mean(masks) > 0.99


def test_the_pipeline_sees_all_orientations_alike(shared, tmp_path):
    exif = read_folder(extract(shared, tmp_path, ["exif"]), classes=["exif"])
    for kind in ("Landscape", "Portrait"):
        photos = exif.filter(lambda i, _, kind=kind: f"_{kind}_" in i)
        assert len(photos) == 9
        with closing(evaluation_batches(photos, SMALL, batch_size=9)) as batches:
            batch = next(batches)
        assert len({tuple(size) for size in batch.sizes.tolist()}) == 1
        # Each was compressed by itself, and carries its number as a caption.
        assert np.abs(batch.images.astype(int) - batch.images[1]).mean(axis=(1, 2, 3)).max() < 5


MEASURE = """
import json, sys, time
from pathlib import Path
from jaxcls.data.folder import read_folder
from jaxcls.errors import ImageError

def memory(field):
    return 1024 * int(Path("/proc/self/status").read_text().partition(field + ":")[2].split()[0])

dataset = read_folder(sys.argv[1])
worst = {"seconds": (0, ""), "bytes": (0, "")}
for index, name in enumerate(dataset.ids):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = memory("VmRSS"), time.thread_time()
    try:
        dataset.image(index)
    except ImageError:
        pass
    worst["seconds"] = max(worst["seconds"], (time.thread_time() - start, name))
    worst["bytes"] = max(worst["bytes"], (memory("VmHWM") - before, name))
print(json.dumps(worst))
"""


def measure(folder):
    """The most seconds and the most bytes that a file takes, each with the file's name."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak memory of one file is measured on Linux alone")
    command = [sys.executable, "-c", MEASURE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_each_takes_little_time_and_memory(folder):
    worst = measure(folder)
    print(worst)
    assert worst["seconds"][0] < MAX_SECONDS
    assert worst["bytes"][0] < MAX_BYTES


def test_bombs_in_a_folder_are_refused_by_their_headers(tmp_path):
    for number, data in enumerate(bombs().values()):
        path = tmp_path / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    bad = read_folder(tmp_path)
    assert all("pixels; at most" in problem for problem in find_problems(bad))
    with closing(evaluation_batches(bad, SMALL, batch_size=len(bad))) as batches:
        batch = next(batches)
    assert not batch.mask.any()
    assert all("pixels; at most" in error for error in batch.errors)
    worst = measure(tmp_path)
    assert worst["seconds"][0] < MAX_SECONDS / 10
    assert worst["bytes"][0] < MAX_BYTES / 10

"""Large sets on a real local Ray, photos in files and in moto's S3; workers and drivers are killed."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import draw, free_port, write_photos

import jaxcls
from jaxcls.classifier import create_model
from jaxcls.cli import main
from jaxcls.cluster.files import find_photos, read_photo, to_text
from jaxcls.errors import (
    DatasetError,
    DeploymentError,
    ImageError,
    JaxclsError,
    MissingExtraError,
    UsageError,
)

pytest.importorskip("ray", reason="a cluster is Ray's: pip install 'jaxcls[cluster]'")
moto_server = pytest.importorskip(
    "moto.server", reason="objects lie in moto's S3: pip install 'moto[server]'"
)

import pyarrow.dataset  # noqa: E402
import pyarrow.fs  # noqa: E402

from jaxcls.cluster import batch  # noqa: E402
from jaxcls.cluster.batch import BatchConfig  # noqa: E402
from jaxcls.cluster.tables import read_metadata  # noqa: E402

# Ray Data's own settings, as it makes them.
pytestmark = pytest.mark.filterwarnings("ignore:`use_:DeprecationWarning")

BUCKET = "photos-of-tests"
DEADLINE_SECONDS = 120


@pytest.fixture(scope="module")
def store_settings():
    """The environment variables that lead to moto's S3, on loopback."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL_S3": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    server.stop()


@pytest.fixture(scope="module")
def store(store_settings):
    """moto's S3 as a filesystem, with an empty bucket."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in store_settings.items():
            environment.setenv(name, value)
        filesystem, _ = pyarrow.fs.FileSystem.from_uri(f"s3://{BUCKET}?allow_bucket_creation=true")
        filesystem.create_dir(BUCKET)
        yield filesystem


@pytest.fixture(scope="module")
def cluster(ray_cluster, store_settings):
    """A connection to a Ray of this machine, whose processes find the store."""
    import ray

    ray.init(ray_cluster, runtime_env={"env_vars": store_settings}, log_to_driver=False)
    yield ray_cluster
    ray.shutdown()


@pytest.fixture(scope="module")
def classifier(compilation_cache):
    """Three classes, the last of which is answered by few photos only."""
    model = create_model("resnet18", ("blue", "green", "red"), image_size=32)
    return replace(model, head=replace(model.head, thresholds=np.asarray([0.1, 0.1, 0.25], np.float32)))


@pytest.fixture
def start(classifier, service_home, tmp_path):
    """Call it to start `jaxcls COMMAND MODEL SOURCE --target ray` with further options."""
    model = classifier.save(tmp_path / "model.jaxcls")
    environment = {
        **os.environ,
        "JAXCLS_HOME": str(service_home),
        # What is left of a Ray tells its head of the death, and waits a minute for one that is gone.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    }

    def start(command, source, *options):
        arguments = [command, model, source, "--target", "ray", *options]
        return psutil.Popen(
            [sys.executable, "-m", "jaxcls.cli", *map(str, arguments)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """150 sound photos, and those that no job may stumble over."""
    folder = write_photos(tmp_path_factory.mktemp("large"), {"blue": 70, "green": 40, "red": 40})
    (folder / "red" / "text.jpg").write_text("no picture")
    (folder / "red" / "empty.png").touch()
    (folder / "blue" / "cut.png").write_bytes((folder / "blue" / "0.png").read_bytes()[:-100])
    draw(0, (400, 300)).save(folder / "bomb.png")
    (folder / "green" / "of a line\nbreak.png").write_bytes((folder / "green" / "1.png").read_bytes())
    return folder


MAX_PIXELS = 100_000
"""Fewer than the bomb has."""


def read_rows(folder, filesystem=None):
    """The rows of the parts in the order of their names, and what the schema says of them."""
    table = pyarrow.dataset.dataset(str(folder), filesystem=filesystem, format="parquet").to_table()
    return table.to_pylist(), read_metadata(table.schema)


def matrix(rows, name, width):
    return np.asarray([row[name] or [np.nan] * width for row in rows], np.float32)


def wait_for(condition):
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, "not within the deadline"
        time.sleep(0.02)
    return found


def processes_named(name, parent):
    """The living processes below another that call themselves so."""
    found = []
    for process in parent.children(recursive=True):
        try:
            if name in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def parts(folder):
    """The parts, and what tells one that is written again from one that is kept."""
    found = {path.name: path.stat() for path in Path(folder).glob("part-*.parquet")}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


def require_like_one_process(rows, classifier, paths):
    """Rows are those of `jaxcls.predict` in float32: ids, errors, answers, and scores up to rounding."""
    from jaxcls.data.dataset import from_items

    alone = jaxcls.predict(classifier, replace(from_items(paths), max_pixels=MAX_PIXELS), precision="float32")
    expected = list(alone.rows())
    for name in ("id", "error", "predicted", "abstained"):
        assert [row[name] for row in rows] == [row[name] for row in expected], name
    scores = matrix(rows, "scores", 3)
    np.testing.assert_allclose(scores, alone.scores, rtol=1e-5, atol=1e-5)
    for row in rows:
        assert row["score"] == (None if row["predicted"] is None else max(row["scores"]))


# The list of photos.


def test_a_list_names_paths_from_its_folder(tmp_path):
    names = ["a.png", "sub/b.png", "/c.png", "s3://bucket/d e.png", "of two\nlines.png"]
    (tmp_path / "files.txt").write_bytes(to_text(names) + b"\n")
    expected = [f"{tmp_path}/a.png", f"{tmp_path}/sub/b.png", "/c.png", names[3], f"{tmp_path}/{names[4]}"]
    assert find_photos([str(tmp_path / "files.txt")]) == expected


def test_a_name_that_is_no_utf8_survives_the_list(tmp_path):
    name = os.fsdecode(b"\xff.png")
    (tmp_path / "files.txt").write_bytes(to_text([name]))
    assert find_photos([str(tmp_path / "files.txt")]) == [f"{tmp_path}/{name}"]


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("nowhere.txt", DatasetError, "nowhere.txt cannot be read"),
        ("http://example.org/", UsageError, "Unrecognized filesystem"),
        ("s3://key:secret@bucket/a", UsageError, "no passwords in addresses"),
    ],
)
def test_what_is_no_source_is_one_clear_error(source, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message) as raised:
        find_photos([source])
    assert "secret" not in str(raised.value)


def test_a_folder_without_photos(tmp_path):
    with pytest.raises(DatasetError, match="holds no images"):
        find_photos([str(tmp_path)])


def test_without_ray_the_extra_is_named(classifier, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'jaxcls\[cluster\]'"):
        batch.predict(classifier, [tmp_path], tmp_path / "out")


def test_a_folder_that_holds_something_else_is_left_alone(classifier, photos, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"is not empty, and holds no _job\.json"):
        batch.predict(classifier, [photos], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# On a cluster.


@pytest.mark.slow
@pytest.mark.cluster
def test_scores_are_those_of_one_process(cluster, classifier, photos, tmp_path):
    config = BatchConfig(shard_size=64)
    missing = tmp_path / "missing.png"
    done = batch.predict(classifier, [photos, missing], tmp_path / "out", config, max_pixels=MAX_PIXELS)
    assert done == batch.Outcome(num_photos=156, num_failed=5, num_parts=3, num_written=3)
    rows, metadata = read_rows(tmp_path / "out")
    paths = [*sorted(photos.rglob("*.*g")), missing]
    assert metadata == {"kind": "logit", "classes": ["blue", "green", "red"]}
    assert 0 < sum(row["abstained"] for row in rows) < 151
    require_like_one_process(rows, classifier, paths)
    for number, name in enumerate(sorted(parts(tmp_path / "out"))):
        part, _ = read_rows(tmp_path / "out" / name)
        assert [row["id"] for row in part] == [str(path) for path in paths[64 * number : 64 * number + 64]]


@pytest.mark.slow
@pytest.mark.cluster
def test_features_are_those_of_one_process_and_only_one_job_has_a_folder(
    cluster, classifier, photos, tmp_path
):
    out, config = tmp_path / "out", BatchConfig(shard_size=40)
    sound = photos / "green"
    done = batch.extract_features(classifier, [sound], out, config)
    assert done == batch.Outcome(num_photos=41, num_failed=0, num_parts=2, num_written=2)
    rows, metadata = read_rows(out)
    values, _, ids = jaxcls.extract_features(classifier, sorted(sound.iterdir()), precision="float32")
    assert [row["id"] for row in rows] == list(ids)
    np.testing.assert_allclose(matrix(rows, "features", 512), values, rtol=1e-4, atol=1e-5)
    assert metadata == {"num_features": 512}
    before = parts(out)

    def refused(message, network=classifier, sources=(sound,), config=config, **options):
        with pytest.raises(UsageError, match=message):
            batch.extract_features(network, sources, out, config, **options)

    other = create_model("resnet18", 3, image_size=32, seed=1)
    refused("is of another network: give a new folder", network=other)
    refused("is of another list of 41 photos: .*_photos.txt as the source", sources=[photos])
    refused("is of another precision and max_pixels", precision="float32", max_pixels=5)
    refused("is of another shard_size", config=BatchConfig(shard_size=41))
    with pytest.raises(UsageError, match="is of another values and network"):
        batch.predict(classifier, [sound], out, config)
    again = batch.extract_features(classifier.backbone, [out / "_photos.txt"], out, config)
    assert again == replace(done, num_written=0)
    assert parts(out) == before


@pytest.mark.slow
@pytest.mark.cluster
def test_objects_are_scored_where_they_lie(cluster, store, classifier, photos, tmp_path):
    paths = sorted(photos.glob("blue/*.png"))
    for path in paths:
        with store.open_output_stream(f"{BUCKET}/set/{path.name}") as file:
            file.write(path.read_bytes())
    with store.open_output_stream(f"{BUCKET}/set/notes.md") as file:
        file.write(b"no photo by its name")
    found = find_photos([f"s3://{BUCKET}/set"])
    assert found == [f"s3://{BUCKET}/set/{path.name}" for path in paths]
    with store.open_output_stream(f"{BUCKET}/lists/files.txt") as file:
        file.write(to_text(found))
    store.delete_file(f"{BUCKET}/set/7.png")  # after it was listed
    out = f"s3://{BUCKET}/scores"
    config = BatchConfig(shard_size=32)
    done = batch.predict(classifier, [f"s3://{BUCKET}/lists/files.txt"], out, config)
    assert done == batch.Outcome(num_photos=71, num_failed=2, num_parts=3, num_written=3)
    rows, _ = read_rows(out.removeprefix("s3://"), store)
    assert [row["id"] for row in rows] == found
    errors = {row["id"]: row["error"] for row in rows if row["error"]}
    gone, cut = (f"s3://{BUCKET}/set/{name}.png" for name in ("7", "cut"))
    assert errors.keys() == {gone, cut}
    assert errors[gone] == f"{gone}: cannot be read: No such object"
    assert errors[cut].startswith(f"{cut}: damaged")
    alone = jaxcls.predict(classifier, paths, precision="float32")
    kept = [i for i, row in enumerate(rows) if row["error"] is None]
    np.testing.assert_allclose(matrix(rows, "scores", 3)[kept], alone.scores[kept], rtol=1e-5, atol=1e-5)
    store.delete_file(f"{BUCKET}/scores/part-0000001.parquet")
    again = batch.predict(classifier, [f"s3://{BUCKET}/lists/files.txt"], out, config)
    assert again == replace(done, num_written=1)
    assert read_rows(out.removeprefix("s3://"), store)[0] == rows


def test_an_object_that_is_not_there_and_a_store_that_refuses(store):
    with pytest.raises(DatasetError, match="is not there"):
        find_photos([f"s3://{BUCKET}/nothing"])
    with pytest.raises(ImageError, match=r"no-such-bucket-at-all/a\.png: cannot be read"):
        read_photo("s3://no-such-bucket-at-all/a.png")


def test_a_store_that_refuses_the_results_is_one_line(
    store, classifier, photos, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("JAXCLS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("jaxcls.parallel.use_compilation_cache", lambda folder: None)
    model = classifier.save(tmp_path / "model.jaxcls")
    out = "s3://no-such-bucket-at-all/scores"
    assert main(["predict", str(model), str(photos), "--target", "ray", "--out", out]) == 1
    said = capsys.readouterr().err
    assert said.startswith("jaxcls: ")
    assert "in bucket 'no-such-bucket-at-all'" in said
    assert said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.cluster
def test_a_killed_worker_costs_nothing_but_time(cluster, classifier, photos, tmp_path):
    """An actor, and a task's process, die in the middle: every photo has one row, in order."""
    out, config = tmp_path / "out", BatchConfig(shard_size=16)
    paths = sorted((photos / "blue").iterdir()) * 6
    (tmp_path / "files.txt").write_bytes(to_text([str(path) for path in paths]))

    with ThreadPoolExecutor(1) as thread:
        job = thread.submit(batch.predict, classifier, [tmp_path / "files.txt"], out, config)
        wait_for(lambda: len(parts(out)) >= 3 or job.done())
        actor, *_ = processes_named("ray::MapWorker(Map(Scorer))", psutil.Process())
        for victim in (actor, *processes_named("ray::Map(Stages.decode)", psutil.Process())[:1]):
            victim.kill()
        assert len(parts(out)) < 27, "it was killed in the middle"
    assert job.result() == batch.Outcome(num_photos=426, num_failed=6, num_parts=27, num_written=27)
    rows, _ = read_rows(out)
    require_like_one_process(rows, classifier, paths)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_killed_job_is_completed_and_leaves_nothing_running(cluster, start, classifier, photos, tmp_path):
    """A job with a Ray of its own is killed; the next one, elsewhere, computes what is missing only."""
    out = tmp_path / "out"
    paths = sorted((photos / "blue").iterdir()) * 6
    (tmp_path / "files.txt").write_bytes(to_text([str(path) for path in paths]))
    job = start("predict", tmp_path / "files.txt", "--out", out, "--shard-size", 16)
    try:
        wait_for(lambda: len(parts(out)) >= 3 or job.poll() is not None)
        below = job.children(recursive=True)
        assert any("raylet" in process.name() for process in below), "it started a Ray"
    finally:
        job.kill()
        job.communicate()
    _, alive = psutil.wait_procs(below, timeout=DEADLINE_SECONDS)
    assert not alive
    before = parts(out)
    assert 3 <= len(before) < 27, "it was killed in the middle"
    done = batch.predict(classifier, [tmp_path / "files.txt"], out, BatchConfig(shard_size=16))
    assert done == batch.Outcome(426, num_failed=6, num_parts=27, num_written=27 - len(before))
    assert {name: parts(out)[name] for name in before} == before
    assert not list(out.glob(".*"))
    rows, _ = read_rows(out)
    require_like_one_process(rows, classifier, paths)


@pytest.mark.slow
@pytest.mark.cluster
def test_the_command_line(cluster, start, photos, tmp_path):
    """On the running cluster, found by its address; one of the photos cannot be read."""
    job = start("features", photos / "blue", "--out", tmp_path / "out", "--address", cluster)
    printed, said = job.communicate()
    assert job.returncode == 1, said
    assert printed == f"71 images in 1 parts, 1 of them new: {tmp_path / 'out'}\n"
    assert "1 images could not be read: the column `error` says why" in said
    assert "Traceback" not in said
    assert len(read_rows(tmp_path / "out")[0]) == 71


@pytest.mark.slow
@pytest.mark.cluster
def test_a_damaged_network_is_one_clear_error(cluster, classifier, photos, tmp_path):
    bias = np.asarray([0, 0, np.nan], np.float32)
    damaged = replace(classifier, head=replace(classifier.head, bias=bias))
    with pytest.raises(JaxclsError, match=r"are not finite .*: the weights have diverged or are damaged$"):
        batch.predict(damaged, [photos / "red"], tmp_path / "out")
    assert not parts(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.cluster
def test_the_benchmark_runs(cluster, service_home, tmp_path):
    """It holds the rows on Ray against those of one process."""
    options = ["--tiny", "--rounds", "1", "--out", str(tmp_path)]
    subprocess.run(
        [sys.executable, "-m", "benchmarks.ray_batch", *options],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "RAY_ADDRESS": cluster, "JAXCLS_HOME": str(service_home)},
        check=True,
    )
    rows = json.loads((tmp_path / "ray_batch_cpu.json").read_text())["rows"]
    assert [row["subject"] for row in rows] == ["one-process", "ray-1", "ray-2"]
    assert all(row["images_per_second"]["median"] > 0 for row in rows)


def test_a_cluster_that_is_not_there_is_soon_an_error(classifier, photos, tmp_path, monkeypatch):
    nowhere = f"127.0.0.1:{free_port()}"
    refused = f"no Ray cluster at {nowhere}: Connection refused; "
    monkeypatch.setenv("RAY_ADDRESS", nowhere)
    for address, error, message in (
        (nowhere, DeploymentError, refused),
        ("auto", DeploymentError, refused),
        (None, DeploymentError, refused),
        ("somewhere", UsageError, "give HOST:PORT, ray://HOST:PORT or auto"),
    ):
        with pytest.raises(error, match=message):
            batch.predict(classifier, [photos], tmp_path / "out", BatchConfig(address=address))

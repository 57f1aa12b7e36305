"""Deployments with their real processes: served, killed, replaced, spoiled, deleted."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from contextlib import contextmanager, suppress
from functools import partial
from io import BytesIO

import httpx2
import numpy as np
import psutil
import pytest
from PIL import Image

from jaxcls.classifier import load
from jaxcls.cli import main
from jaxcls.errors import ClassifierError, DeploymentError, MissingExtraError, UsageError
from jaxcls.manifest import WEIGHTS, read_manifest, write_manifest
from jaxcls.serving.client import Client, parse_result
from jaxcls.serving.config import RayOptions, ServiceConfig
from jaxcls.serving.deployment import Deployment, delete_if_exists, list_deployments
from jaxcls.storage import Storage, file_sha256

SECONDS = 60
NUM_KILLS = 20
QUICK = ServiceConfig(batch_sizes=(1,), grace_seconds=0.5)
IMAGE = np.zeros((32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def home(tmp_path_factory, compilation_cache):
    """A home for this module's deployments, which shares the session's compiled programs."""
    home = tmp_path_factory.mktemp("home")
    (home / "persistent").mkdir()
    (home / "persistent" / "compiled").symlink_to(compilation_cache)
    return home


@pytest.fixture(autouse=True)
def _environment(home, monkeypatch):
    monkeypatch.setenv("JAXCLS_HOME", str(home))
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr("jaxcls.parallel.use_compilation_cache", lambda folder: None)


@pytest.fixture
def name(request):
    """A name, under which nothing is left afterwards."""
    name = request.node.name.replace("_", "-").removeprefix("test-")[:63]
    yield name
    delete_if_exists(name)


@pytest.fixture
def deployment(name, classifiers):
    """Two replicas of the first classifier."""
    deployment = Deployment(name, classifiers[0], replicas=2, config=QUICK)
    deployment.deploy()
    return deployment


def folder_of(name):
    return Storage.default().persistent / "deployments" / name


def supervisor(name):
    return psutil.Process(int((folder_of(name) / ".supervisor").read_text()))


def pids(deployment):
    return {replica.pid for replica in deployment.status().replicas}


def processes_of(deployment):
    return [psutil.Process(pid) for pid in pids(deployment)]


def wait_until(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_gone(process):
    """Whether a process has ended; that nobody has asked how, where no init does, is not its fault."""
    with suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def all_gone(processes):
    wait_until(lambda: all(map(is_gone, processes)))
    return True


def is_replaced(pid, deployment):
    """Whether two replicas are ready without this pid, by one report: two may tell of two states."""
    replicas = deployment.status().replicas
    return [r.state for r in replicas] == ["ready", "ready"] and pid not in {r.pid for r in replicas}


def ask(deployment, path="/v2/health/ready", *, key=True):
    headers = {"Authorization": f"Bearer {(folder_of(deployment.name) / 'key').read_text().strip()}"}
    return httpx2.get(deployment.status().status_url + path, headers=headers if key else {})


@contextmanager
def scoring_without_retries(deployment):
    """Score all the time, a connection for each request; yield the list of statuses, "lost" without one."""
    headers = {"Authorization": f"Bearer {deployment.status().key_file.read_text().strip()}"}
    body, outcomes, stop = b'[{"image_in_base64": "%s"}]' % b64encode(as_png(IMAGE)), [], threading.Event()

    def work():
        while not stop.is_set():
            try:
                answer = httpx2.post(deployment.service_url, content=body, headers=headers, timeout=SECONDS)
                outcomes.append(answer.status_code)
            except httpx2.TransportError:
                outcomes.append("lost")

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield outcomes
    finally:
        stop.set()
        thread.join(SECONDS)


def as_png(pixels):
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@contextmanager
def scoring(deployment, num_threads=4):
    """Score all the time; yield the list of first scores. What fails is raised at the end."""
    key = deployment.status().key_file.read_text().strip()
    url, scores, errors, stop = deployment.service_url, [], [], threading.Event()

    def work():
        try:
            with Client(url, key) as client:
                while not stop.is_set():
                    scores.append(parse_result(client.score([IMAGE])[0])[0])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    try:
        yield scores
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors


def spoil(path, new):
    """A copy whose checksums are right, but whose scores are not those of its parity vectors."""
    shutil.copytree(path, new)
    other = path.with_name("2.jaxcls") / WEIGHTS
    shutil.copy(other, new / WEIGHTS)
    manifest = read_manifest(new)
    write_manifest(new, manifest | {"sha256": manifest["sha256"] | {WEIGHTS: file_sha256(other)}})
    return new


# From the first to the last command.


@pytest.mark.slow
def test_deploy_score_list_delete(name, classifiers, tmp_path, capsys):
    options = ["--replicas", "2", "--batch-sizes", "1", "--grace-seconds", "0"]
    command = [sys.executable, "-m", "jaxcls.cli", "deploy", name, str(classifiers[0]), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as shell:
        out = shell.communicate(timeout=SECONDS)[0]
    with suppress(ProcessLookupError):
        os.killpg(shell.pid, signal.SIGKILL)
    deployment = Deployment(name)
    assert deployment.exists()
    status = deployment.status()
    assert (status.state, status.version, status.num_ready) == ("ready", 1, 2)
    assert out == f"endpoint: {deployment.service_url}\nkey: {status.key_file}\n"

    Image.fromarray(IMAGE).save(tmp_path / "black.png")
    for image in (tmp_path / "black.png", (tmp_path / "black.png").read_bytes(), IMAGE):
        assert parse_result(deployment.score_image(image)).tolist() == [1, 0]
    shares = parse_result(deployment.score_image(IMAGE, softmax=True, image_resize_dims=(64, 64)))
    np.testing.assert_allclose(shares, [0.7310586, 0.2689414], rtol=1e-5)

    assert main(["list"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(name))
    assert row.split()[1:6] == ["ready", "1", "2/2", "0", deployment.service_url]

    load = ("--images", str(tmp_path), "--users", "1", "--duration", "0.5", "--out", str(tmp_path / "load"))
    assert main(["loadtest", name, *load]) == 0

    processes = [supervisor(name), *supervisor(name).children()]
    assert main(["delete", name]) == 0
    assert all_gone(processes)
    assert not list(folder_of(name).parent.glob(f"*{name}*"))
    assert not deployment.exists()
    with pytest.raises(DeploymentError, match=f"there is no deployment {name}"):
        deployment.score_image(IMAGE)


@pytest.mark.slow
def test_the_key_is_private(deployment):
    folder, key = folder_of(deployment.name), deployment.status().key_file.read_text().strip()
    assert len(key) >= 43
    assert [path.stat().st_mode & 0o777 for path in (folder.parent, folder)] == [0o700, 0o700]
    assert (folder / "key").stat().st_mode & 0o777 == 0o600
    owner = supervisor(deployment.name)
    for process in (owner, *owner.children()):
        assert key not in " ".join(process.cmdline())
        assert key not in " ".join(process.environ().values())
    assert key not in (folder / "log").read_text()
    assert httpx2.post(deployment.service_url, content=b"[]").status_code == 401
    assert ask(deployment, "/metrics", key=False).status_code == 401
    assert ask(deployment, key=False).status_code == 200


@pytest.mark.slow
def test_the_supervisor_answers_for_all_replicas(deployment):
    for _ in range(20):
        deployment.score_image(IMAGE)
    text = ask(deployment, "/metrics").text
    names = [replica.name for replica in deployment.status().replicas]
    assert names == ["1-1", "1-2"]
    for replica in names:
        assert f'jaxcls_ready{{replica="{replica}"}} 1.0' in text  # as it says itself
        assert f'jaxcls_replica_ready{{replica="{replica}"}} 1.0' in text
        assert f'jaxcls_replica_restarts_total{{replica="{replica}"}} 0.0' in text
    scored = [line for line in text.splitlines() if line.startswith("jaxcls_requests_total{")]
    counts = [float(line.split()[-1]) for line in scored if "/score" in line]
    assert sum(counts) == 20
    assert text.count("# TYPE jaxcls_requests_total counter") == 1
    report = ask(deployment, "/report").json()
    assert {replica["pid"] for replica in report["replicas"]} == pids(deployment)


@pytest.mark.slow
def test_new_keys_are_taken_over(deployment):
    key_file, url = deployment.status().key_file, deployment.service_url
    key_file.write_text("another-key-of-the-operator\n")
    supervisor(deployment.name).send_signal(signal.SIGHUP)

    headers = {"Authorization": "Bearer another-key-of-the-operator"}

    def is_taken():
        return 401 not in {httpx2.post(url, content=b"[]", headers=headers).status_code for _ in range(9)}

    wait_until(is_taken)
    assert parse_result(deployment.score_image(IMAGE))[0] == 1


# Processes that are killed.


@pytest.mark.slow
def test_a_killed_replica_is_started_again_and_no_request_fails(deployment):
    """Without the client's retries, what was in flight fails, at most: here one request a time."""
    with scoring(deployment) as scores, scoring_without_retries(deployment) as outcomes:
        for _ in range(NUM_KILLS):
            killed = min(pids(deployment))
            os.kill(killed, signal.SIGKILL)
            wait_until(partial(is_replaced, killed, deployment))
    assert set(scores) == {1}
    assert len(outcomes) > NUM_KILLS
    assert outcomes.count("lost") <= NUM_KILLS
    assert set(outcomes) <= {200, "lost"}
    assert sum(replica.num_restarts for replica in deployment.status().replicas) == NUM_KILLS
    assert "exit code -9" in deployment.status().log_file.read_text()


@pytest.mark.slow
def test_requests_wait_while_the_only_replica_is_started_again(name, classifiers):
    deployment = Deployment(name, load(classifiers[0]), config=QUICK)
    deployment.deploy()
    (pid,) = pids(deployment)
    os.kill(pid, signal.SIGKILL)
    assert parse_result(deployment.score_image(IMAGE))[0] == 1


@pytest.mark.slow
def test_without_its_supervisor_a_deployment_is_stopped_and_can_be_deployed_again(deployment):
    replicas = supervisor(deployment.name).children()
    url, key = deployment.service_url, deployment.status().key_file.read_text()
    supervisor(deployment.name).kill()
    wait_until(lambda: deployment.status().state == "stopped")
    assert [s.state for s in list_deployments() if s.name == deployment.name] == ["stopped"]
    with pytest.raises(DeploymentError, match="is stopped"):
        deployment.score_image(IMAGE)
    bounds = deployment._entry.read_spec().config
    assert main(["deploy", deployment.name]) == 0  # with the copy, the replicas and the bounds that it has
    status = deployment.status()
    assert (status.state, status.version, status.num_ready) == ("ready", 2, 2)
    assert deployment._entry.read_spec().config == bounds != {}
    assert (status.service_url, status.key_file.read_text()) == (url, key)
    assert all(map(is_gone, replicas))
    assert parse_result(deployment.score_image(IMAGE))[0] == 1


@pytest.mark.slow
def test_delete_right_after_the_supervisor_was_killed_leaves_no_process(deployment):
    owner = supervisor(deployment.name)
    replicas = owner.children()
    owner.kill()
    deployment.delete()
    assert all(map(is_gone, replicas))


# New versions.


@pytest.mark.slow
def test_a_new_version_takes_over_without_a_failed_request(deployment, classifiers):
    before = processes_of(deployment)
    with scoring(deployment) as scores:
        wait_until(lambda: len(scores) > 20)
        Deployment(deployment.name, classifiers[1], replicas=3, config=QUICK).deploy()
        num_scores = len(scores)
        wait_until(lambda: len(scores) > num_scores + 20)
    # Those under way when `deploy` returned may be old.
    assert set(scores[:20]) == {1}
    assert set(scores[num_scores + 4 :]) == {2}
    status = deployment.status()
    assert (status.version, status.num_ready) == (2, 3)
    for replica in ("1-1", "1-2"):
        assert f"replica {replica}: ended with exit code 0" in status.log_file.read_text()
    assert all(map(is_gone, before))
    assert [path.name for path in (folder_of(deployment.name) / "versions").iterdir()] == ["2"]


@pytest.mark.slow
def test_a_version_that_does_not_work_leaves_the_old_one(deployment, classifiers, tmp_path, capsys):
    before = pids(deployment)
    with scoring(deployment) as scores:
        bad = spoil(classifiers[0], tmp_path / "bad.jaxcls")
        assert main(["deploy", deployment.name, str(bad), "--replicas", "2", "--batch-sizes", "1"]) == 1
        error = capsys.readouterr().err
        assert "version 2 is not served: replica 2-" in error
        assert "exit code 2" in error
        wait_until(lambda: pids(deployment) == before)
        num_scores = len(scores)
        wait_until(lambda: len(scores) > num_scores + 20)
    assert set(scores) == {1}
    status = deployment.status()
    assert (status.state, status.version) == ("ready", 1)
    Deployment(deployment.name, classifiers[1], config=QUICK).deploy()
    assert deployment.status().version == 3
    assert parse_result(deployment.score_image(IMAGE))[0] == 2


@pytest.mark.slow
def test_a_version_that_is_not_ready_in_time_leaves_the_old_one(deployment, classifiers):
    before = pids(deployment)
    slow = Deployment(deployment.name, classifiers[1], config=QUICK)
    with pytest.raises(DeploymentError, match=r"it was not ready within 0\.2 s"):
        slow.deploy(timeout_seconds=0.2)
    wait_until(lambda: pids(deployment) == before)
    assert parse_result(deployment.score_image(IMAGE))[0] == 1
    Deployment(deployment.name, config=QUICK).deploy()  # the classifier that it has is still the old one
    assert (deployment.status().version, parse_result(deployment.score_image(IMAGE))[0]) == (3, 1)


@pytest.mark.slow
def test_a_new_version_interrupted_when_the_old_one_is_going_leaves_the_old_one(deployment, classifiers):
    before = pids(deployment)
    command = [sys.executable, "-m", "jaxcls.cli", "deploy", deployment.name, str(classifiers[1])]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: len(pids(deployment) & before) < 2)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=SECONDS) == (None, "jaxcls: interrupted\n")
    wait_until(lambda: {(r.version, r.state) for r in deployment.status().replicas} == {(1, "ready")})
    assert len(deployment.status().replicas) == 2
    assert parse_result(deployment.score_image(IMAGE))[0] == 1


@pytest.mark.slow
def test_the_port_of_what_runs_cannot_change(deployment, classifiers):
    with pytest.raises(UsageError, match="delete it first"):
        Deployment(deployment.name, classifiers[1], config=QUICK).deploy(port=1)
    assert deployment.status().version == 1


@pytest.mark.slow
def test_a_deployment_that_never_worked_leaves_nothing(name, classifiers, tmp_path):
    bad = spoil(classifiers[0], tmp_path / "bad.jaxcls")
    with pytest.raises(DeploymentError, match=r"version 1 is not served: .*exit code 2"):
        Deployment(name, bad, config=QUICK).deploy()
    assert not list(folder_of(name).parent.glob(f"*{name}*"))


@pytest.mark.slow
def test_an_interrupted_deployment_leaves_nothing(name, classifiers):
    command = [sys.executable, "-m", "jaxcls.cli", "deploy", name, str(classifiers[0])]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: Deployment(name).exists() and Deployment(name).status().replicas)
        replicas = processes_of(Deployment(name))
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=SECONDS) == (None, "jaxcls: interrupted\n")
    assert process.returncode == 130
    assert not folder_of(name).exists()
    assert all_gone(replicas)


@pytest.mark.slow
def test_an_interrupted_new_version_leaves_the_old_one(deployment, classifiers):
    before = pids(deployment)
    command = [sys.executable, "-m", "jaxcls.cli", "deploy", deployment.name, str(classifiers[1])]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: len(pids(deployment) - {None}) == 4)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=SECONDS) == (None, "jaxcls: interrupted\n")
    wait_until(lambda: pids(deployment) == before)
    assert [path.name for path in (folder_of(deployment.name) / "versions").iterdir()] == ["1"]
    assert "version 2 is" not in deployment.status().log_file.read_text()  # neither ready nor given up
    assert parse_result(deployment.score_image(IMAGE))[0] == 1


@pytest.mark.slow
def test_of_two_at_once_one_is_refused(name, classifiers):
    command = [sys.executable, "-m", "jaxcls.cli", "deploy", name, str(classifiers[0]), "--batch-sizes", "1"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=SECONDS)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1]
    assert f"another process deploys or deletes {name}" in "".join(errors)
    assert parse_result(Deployment(name).score_image(IMAGE))[0] == 1


# Mistakes.


def test_a_classifier_that_is_damaged_is_not_deployed(name, classifiers, tmp_path):
    shutil.copytree(classifiers[0], tmp_path / "damaged")
    (tmp_path / "damaged" / WEIGHTS).write_bytes(b"")
    with pytest.raises(ClassifierError, match="is damaged"):
        Deployment(name, tmp_path / "damaged").deploy()
    with pytest.raises(ClassifierError, match="does not exist"):
        Deployment(name, tmp_path / "missing").deploy()
    assert not list(folder_of(name).parent.glob(f"*{name}*"))


def test_a_port_that_is_taken(name, classifiers):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port}: .* --port"):
            Deployment(name, classifiers[0]).deploy(port=port)
    assert not folder_of(name).exists()


@pytest.mark.parametrize("bad", ["", "-a", "A", "a_b", "a/b", "..", "a" * 64, "a\n"])
def test_names(bad):
    with pytest.raises(UsageError, match="deployment name"):
        Deployment(bad)


def test_what_a_deletion_left_that_was_interrupted_is_no_deployment(name, classifiers, tmp_path):
    (folder_of(name) / "versions" / "1").mkdir(parents=True)
    (folder_of(name) / "report.json").write_text("{")
    assert not Deployment(name).exists()
    with pytest.raises(ClassifierError, match="does not exist"):
        Deployment(name, tmp_path / "missing").deploy()
    assert not folder_of(name).exists()


def test_an_extra_that_is_missing(name, classifiers, monkeypatch, capsys):
    monkeypatch.setattr("jaxcls.serving.config.EXTRA", ("no_such_package",))
    with pytest.raises(MissingExtraError, match=r"pip install 'jaxcls\[serve\]'"):
        Deployment(name, classifiers[0]).deploy()
    assert main(["serve", str(classifiers[0])]) == 1
    assert "pip install 'jaxcls[serve]'" in capsys.readouterr().err


def test_values_that_cannot_work(name, classifiers):
    with pytest.raises(UsageError, match="0 replicas"):
        Deployment(name, classifiers[0], replicas=0).deploy()
    with pytest.raises(UsageError, match='"auto" are for the target ray'):
        Deployment(name, classifiers[0], replicas="auto").deploy()
    with pytest.raises(UsageError, match="are for the target ray"):
        Deployment(name, classifiers[0], address="127.0.0.1:6379")
    with pytest.raises(UsageError, match="3 to 2 replicas"):
        RayOptions(min_replicas=3, max_replicas=2)
    with pytest.raises(UsageError, match="choose from local, ray"):
        Deployment(name, target="moon")


def test_a_deployment_that_is_not_there(name, capsys):
    deployment = Deployment(name)
    assert not deployment.exists()
    assert not delete_if_exists(name)
    for act in (deployment.delete, deployment.deploy, deployment.status, lambda: deployment.service_url):
        with pytest.raises(DeploymentError, match=f"there is no deployment {name}"):
            act()
    assert main(["delete", name]) == 1
    assert "jaxcls list" in capsys.readouterr().err
    assert not list(folder_of(name).parent.glob(f"*{name}*"))

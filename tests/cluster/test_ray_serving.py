"""The Ray target in a real cluster: the contract of a replica, and deployments, killed and replaced."""

import json
import os
import signal
import subprocess
import sys
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import httpx2
import psutil
import pytest
from conftest import free_port
from PIL import Image
from services import Served
from test_app import (  # noqa: F401  # the contract: the same tests, of the services that this file's fixtures give
    KEY,
    OTHER_KEY,
    bearer,
    expected,
    http,
    test_a_body_that_does_not_come,
    test_a_compressed_body_is_refused,
    test_clients_that_go_free_their_places,
    test_many_at_once_each_get_their_own_scores,
    test_metrics_and_documents,
    test_mistakes_are_named,
    test_no_key_no_service,
    test_one_bad_image_errs_alone,
    test_raw_bytes_multipart_and_json_are_scored_alike,
    test_softmax_and_resize_dims,
    test_the_published_client,
    test_the_published_client_with_a_key,
    test_triton_client,
    test_urls_are_refused_unless_allowed,
)
from test_deployment import IMAGE, QUICK, as_png, scoring, spoil, wait_until

from jaxcls.errors import DeploymentError, ServiceError, UsageError
from jaxcls.serving.client import parse_result
from jaxcls.serving.config import RayOptions, ServiceConfig
from jaxcls.serving.deployment import Deployment, delete_if_exists, list_deployments
from jaxcls.serving.registry import Entry, Report, Spec
from jaxcls.storage import Storage

pytest.importorskip("ray")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`"),  # Serve, as it is imported
]
SECONDS = 60


@pytest.fixture(scope="module")
def port():
    return free_port()


# A replica, as an app builder's application.


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.touch(0o600)
    path.write_text(f"{KEY}\n")
    return path


@pytest.fixture(scope="module")
def applications(ray_cluster, port, served_model, key_file):
    """Both of the model colours: one at the root without a key, one at /guarded with it."""
    from ray import serve

    from jaxcls.cluster.session import connected
    from jaxcls.serving.ray import application
    from jaxcls.serving.ray_target import start_serve

    config = asdict(ServiceConfig(deadline_ms=2000, max_queue=64, max_body_mib=8))
    args = {"model": str(served_model), "name": "colours", "version": "1", "config": config}
    with connected(ray_cluster):
        start_serve("127.0.0.1", port)
        serve.run(application({**args, "key_file": None}), name="colours", route_prefix="/")
        serve.run(application({**args, "key_file": str(key_file)}), name="guarded", route_prefix="/guarded")
    yield
    with connected(ray_cluster):
        serve.delete("colours")
        serve.delete("guarded")


@pytest.fixture(scope="module")
def service(applications, port):
    return Served(None, f"http://127.0.0.1:{port}")


@pytest.fixture(scope="module")
def guarded(applications, port):
    return Served(None, f"http://127.0.0.1:{port}/guarded")


def test_keys_are_read_again(guarded, http, key_file):  # noqa: F811
    key_file.write_text(f"{KEY}\n{OTHER_KEY}\n")
    wait_until(lambda: http.get(f"{guarded.url}/v2", headers=bearer(OTHER_KEY)).status_code == 200)
    assert http.get(f"{guarded.url}/v2", headers=bearer(KEY)).status_code == 200


# Deployments.


@pytest.fixture(scope="module")
def home(service_home):
    """Where the cluster's processes keep what they compile, too."""
    return service_home


@pytest.fixture(autouse=True)
def _environment(home, monkeypatch):
    monkeypatch.setenv("JAXCLS_HOME", str(home))
    monkeypatch.setattr("jaxcls.parallel.use_compilation_cache", lambda folder: None)


def command(home, *arguments):
    """Exit code, output and errors of `jaxcls` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "jaxcls.cli", *map(str, arguments)],
        env={**os.environ, "JAXCLS_HOME": str(home)}, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def plates(ray_cluster, applications, home, classifiers):
    """Two replicas of the first classifier, deployed by a process that is gone."""
    options = ["--target", "ray", "--address", ray_cluster, "--replicas", "2", "--batch-sizes", "1"]
    code, out, errors = command(home, "deploy", "plates", classifiers[0], *options)
    assert code == 0, errors
    key = home / "persistent" / "deployments" / "plates" / "key"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("JAXCLS_HOME", str(home))
        yield Deployment("plates"), out
        delete_if_exists("plates")
    assert not key.exists()


def test_deployed_listed_and_scored_by_other_processes(plates, port, home, tmp_path):
    deployment, printed = plates
    url = f"http://127.0.0.1:{port}/plates/score"
    status = deployment.status()
    assert printed == f"endpoint: {url}\nkey: {status.key_file}\n"
    assert (status.target, status.state, status.version, status.num_ready) == ("ray", "ready", 1, 2)
    assert all(psutil.pid_exists(replica.pid) for replica in status.replicas)
    code, out, _ = command(home, "list")
    row = next(line for line in out.splitlines() if line.startswith("plates"))
    assert (code, row.split()[1:6]) == (0, ["ready", "1", "2/2", "0", url])

    Image.fromarray(IMAGE).save(tmp_path / "black.png")
    for image in (tmp_path / "black.png", IMAGE):
        assert parse_result(deployment.score_image(image)).tolist() == [1, 0]
    code, out, _ = command(home, "score", "plates", tmp_path / "black.png", "--softmax")
    assert code == 0
    assert "0.7311" in out
    load = ("--images", tmp_path, "--users", "1", "--duration", "0.5", "--out", tmp_path / "load")
    assert command(home, "loadtest", "plates", *load)[0] == 0
    assert httpx2.post(url, content=b"[]").status_code == 401


def test_a_killed_replica_is_replaced_and_nothing_is_lost(plates):
    deployment, _ = plates
    with scoring(deployment) as scores:
        wait_until(lambda: len(scores) > 20)
        killed = deployment.status().replicas[0].pid
        os.kill(killed, signal.SIGKILL)

        def is_replaced():
            status = deployment.status()
            return status.num_ready == 2 and killed not in {replica.pid for replica in status.replicas}

        wait_until(is_replaced)
    assert set(scores) == {1}


def test_a_new_version_takes_over_without_a_failed_request(plates, classifiers):
    deployment, _ = plates
    before = deployment.status()
    with scoring(deployment) as scores:
        wait_until(lambda: len(scores) > 20)
        Deployment("plates", classifiers[1], replicas=1).deploy()
        num_scores = len(scores)
        wait_until(lambda: len(scores) > num_scores + 20)
    # Those under way when `deploy` returned may be old.
    assert set(scores[:20]) == {1}
    assert set(scores[num_scores + 4 :]) == {2}
    status = deployment.status()
    assert (status.version, status.num_ready, status.service_url) == (2, 1, before.service_url)
    assert not {replica.pid for replica in status.replicas} & {replica.pid for replica in before.replicas}
    assert deployment._entry.read_spec().config["batch_sizes"] == [1]


def test_a_version_that_does_not_work_leaves_the_old_one(plates, classifiers, tmp_path):
    deployment, _ = plates
    before = deployment.status()
    with scoring(deployment) as scores:
        with pytest.raises(DeploymentError, match=r"version 3 is not served: .*scores differ from the saved"):
            Deployment("plates", spoil(classifiers[0], tmp_path / "bad.jaxcls")).deploy()
        num_scores = len(scores)
        wait_until(lambda: len(scores) > num_scores + 20)
    assert set(scores) == {2}
    assert deployment.status().version == before.version


def test_the_queue_is_bounded_and_scales_within_limits(plates, ray_cluster):
    from jaxcls.cluster.session import connected
    from jaxcls.serving import ray_target

    limits = RayOptions(min_replicas=1, max_replicas=3)
    config = replace(QUICK, max_queue=1)
    Deployment("plates", None, "auto", "ray", config=config, ray=limits).deploy()
    url, key = plates[0].service_url, plates[0].service_key
    body = b'[{"image_in_base64": "%s"}]' % b64encode(as_png(IMAGE))

    def ask(_):
        return httpx2.post(url, content=body, headers=bearer(key), timeout=SECONDS)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(200)))
    assert {answer.status_code for answer in answers} == {200, 429}
    refused = [answer for answer in answers if answer.status_code == 429]
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert {answer.json()["error"] for answer in refused} == {"the queue is full: come again later"}
    with connected(ray_cluster):
        found = ray_target._find_application(plates[0]._entry)["deployments"]["Replica"]["deployment_config"]
    scale = found["autoscaling_config"]
    assert (scale["min_replicas"], scale["max_replicas"], scale["target_ongoing_requests"]) == (1, 3, 2)


def test_delete_answers_what_was_taken_in(ray_cluster, applications, classifiers):
    deployment = Deployment("short", classifiers[0], 1, "ray", address=ray_cluster, config=QUICK)
    deployment.deploy()
    url, key = deployment.service_url, deployment.service_key
    body = json.dumps([{"image_in_base64": b64encode(as_png(IMAGE)).decode()}] * 100)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx2.post, url, content=body, headers=bearer(key), timeout=SECONDS)
        counted = f"{deployment.status().status_url}/metrics"
        wait_until(lambda: "jaxcls_queue_images 0.0" not in httpx2.get(counted, headers=bearer(key)).text)
        deployment.delete()
        assert asked.result().status_code == 200
    assert not deployment.exists()
    assert httpx2.post(url, content=body).status_code == 404
    with pytest.raises(DeploymentError, match="there is no deployment short"):
        deployment.status()


# Mistakes.


def test_a_cluster_that_is_gone_is_told_of_and_the_others_are_listed(plates, ray_cluster):
    address = f"127.0.0.1:{free_port()}"
    gone = Entry(Storage.default().persistent / "deployments", "gone")
    gone.create()
    gone.write_spec(Spec(1, 1, 1, 600.0, {}, address))
    gone.write_report(Report(8000, 8000, 1, route="/gone"))
    try:
        states = {status.name: status.state for status in list_deployments()}
        assert states == {"gone": "unreachable", "plates": "ready"}
        message = f"no Ray cluster at {address}: .*ray start --head"
        for act in (Deployment("gone").deploy, Deployment("gone").delete):
            with pytest.raises(DeploymentError, match=message):
                act()
        with pytest.raises(DeploymentError, match=r"gone for good, remove .*deployments/gone"):
            Deployment("gone").delete()
        with pytest.raises(UsageError, match=f"is in the cluster at {address}: to have it at {ray_cluster}"):
            Deployment("gone", target="ray", address=ray_cluster).deploy()
        with pytest.raises(UsageError, match="has the target ray"):
            Deployment("gone", target="local").deploy()
    finally:
        gone.remove()


def test_an_application_of_somebody_else_is_left_alone(
    plates, ray_cluster, classifiers, tmp_path, monkeypatch
):
    monkeypatch.setenv("JAXCLS_HOME", str(tmp_path))
    with pytest.raises(DeploymentError, match="has an application plates that was deployed from elsewhere"):
        Deployment("plates", classifiers[0], 1, "ray", address=ray_cluster).deploy()
    assert not list((tmp_path / "persistent" / "deployments").iterdir())


def test_a_cluster_without_what_is_needed(ray_cluster, applications, classifiers):
    options = RayOptions(gpus=0.5)
    deployment = Deployment("thirsty", classifiers[0], 1, "ray", address=ray_cluster, ray=options)
    with pytest.raises(DeploymentError, match=r"no node of the cluster at .* has a GPU"):
        deployment.deploy()
    assert not deployment.exists()


@pytest.mark.parametrize("address", ["127.0.0.1", "here:there"])
def test_an_address_that_is_none(address, classifiers):
    with pytest.raises(UsageError, match="give HOST:PORT"):
        Deployment("nowhere", classifiers[0], 1, "ray", address=address).deploy()


# What only a replica itself can be made to show.


def test_a_broken_device_fails_the_check(served_model):
    from jaxcls.serving.ray import _Replica

    replica = _Replica(str(served_model), "colours", "1", None, {"batch_sizes": (1,)})
    replica.check_health()
    replica._replica.service.batcher.broken.set()
    with pytest.raises(ServiceError, match="must be started anew"):
        replica.check_health()
    assert replica._replica.admission.is_closed

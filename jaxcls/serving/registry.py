"""What is deployed on this machine: a private folder each, which outlives the processes it speaks of.

    deployment.json   what is asked for; the commands write it
    report.json       what there is; the supervisor writes it, or, of a cluster, the commands
    key, log          the service's key; the newest lines of what supervisor and replicas say
    versions/N        copies of the classifiers

Locks tell what is alive: the kernel lets go of them when their holders end, however they end. Neither a pid
that belongs to another process by now nor a reboot deceives anybody.
"""

import fcntl
import json
import os
import re
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

from jaxcls.errors import DeploymentError, UsageError
from jaxcls.storage import make_private_folder, write_whole

T = TypeVar("T")

NAME = re.compile("[a-z0-9][a-z0-9-]{0,62}")
HOST = "127.0.0.1"
SPEC, REPORT, KEY, LOG, VERSIONS = "deployment.json", "report.json", "key", "log", "versions"
SUPERVISOR_LOCK, PROCESSES_LOCK = ".supervisor", ".processes"

Target = Literal["local", "ray"]
Replicas = int | Literal["auto"]
ReplicaState = Literal["starting", "ready", "waiting", "failed", "ending"]


@dataclass(frozen=True)
class Spec:
    """What is asked for.

    Attributes:
        version: to be served, counted from 1.
        num_versions: how many were asked for so far, those that failed included.
        num_replicas: processes that score; "auto", in a cluster alone: as many as the requests need.
        timeout_seconds: in which all of them must be ready.
        config: of each, as `ServiceConfig` takes it.
        address: of the cluster in which they run; None: on this machine.
        ray: there, as `RayOptions` takes it.
    """

    version: int
    num_versions: int
    num_replicas: Replicas
    timeout_seconds: float
    config: dict[str, Any]
    address: str | None = None
    ray: dict[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> Target:
        """Where the replicas run."""
        return "local" if self.address is None else "ray"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be changed of a `Spec`; None: nothing.

    Raises:
        UsageError: no replicas, or no time.
    """

    timeout_seconds: float
    num_replicas: Replicas | None = None
    config: dict[str, Any] | None = None
    address: str | None = None
    ray: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        count = self.num_replicas
        if (isinstance(count, int) and count < 1) or not self.timeout_seconds > 0:
            raise UsageError(f"{count} replicas, {self.timeout_seconds:g} s: both must be more than 0")


@dataclass(frozen=True)
class ReplicaReport:
    """One replica.

    Attributes:
        name: "VERSION-NUMBER".
        version: of the classifier that it scores with.
        state: "waiting" is the pause before it is started again; "failed" means that it is not.
        pid: None while it has no process.
        num_restarts: how often another process took the place of one that had ended.
    """

    name: str
    version: int
    state: ReplicaState
    pid: int | None
    num_restarts: int


@dataclass(frozen=True)
class Report:
    """What there is.

    Attributes:
        port: of the service.
        status_port: of the supervisor, which answers for its replicas.
        version: the newest that became ready; None before the first.
        replicas: of this version, and of others that come or go.
        failed_version: the last that did not become ready.
        failure: why it did not.
        host: that has the ports.
        route: below which the service answers.
    """

    port: int
    status_port: int
    version: int | None = None
    replicas: tuple[ReplicaReport, ...] = ()
    failed_version: int | None = None
    failure: str = ""
    host: str = HOST
    route: str = ""

    @property
    def service_url(self) -> str:
        """To which images are posted."""
        return f"http://{self.host}:{self.port}{self.route}/score"

    @property
    def status_url(self) -> str:
        """Below it, /metrics and /v2/health/ready."""
        return f"http://{self.host}:{self.status_port}{self.route}"

    @property
    def is_ready(self) -> bool:
        """Whether any replica takes requests."""
        return any(replica.state == "ready" for replica in self.replicas)

    def serves(self, version: int) -> bool:
        """Whether this version, and no other, is served."""
        return self.version == version and all(replica.version == version for replica in self.replicas)


@dataclass(frozen=True)
class DeploymentStatus:
    """A deployment as its users see it.

    Attributes:
        name: under which it was deployed.
        target: where it runs.
        state: "ready" if at least one replica takes requests; "stopped" if nothing runs, as after a reboot;
            "unreachable" if the cluster, in which it may run, does not answer.
        version: that is served, counted from 1; None before the first is ready.
        replicas: their states.
        service_url: to which images are posted.
        status_url: below it, /metrics and /v2/health/ready tell of all replicas together; in a cluster, of
            the one that answers.
        key_file: holds the service's key.
        log_file: holds what its processes say; None: the cluster keeps that.
        problem: what is wrong with the cluster, or with the replicas in it.
    """

    name: str
    target: Target
    state: Literal["starting", "ready", "failed", "stopped", "unreachable"]
    version: int | None
    replicas: tuple[ReplicaReport, ...]
    service_url: str
    status_url: str
    key_file: Path
    log_file: Path | None
    problem: str = ""

    @property
    def num_ready(self) -> int:
        """How many replicas take requests."""
        return sum(replica.state == "ready" for replica in self.replicas)


class Entry:
    """The folder of one deployment, whether or not it is there.

    Args:
        registry: the folder of all deployments.
        name: of this one.

    Raises:
        UsageError: the name is not of lower-case letters, digits and hyphens.
    """

    def __init__(self, registry: Path, name: str) -> None:
        if not NAME.fullmatch(name):
            raise UsageError(
                f"deployment name {name!r}: give 1 to 63 lower-case letters, digits or, not first, hyphens"
            )
        self.name = name
        self.folder = registry.absolute() / name
        self.key_file = self.folder / KEY
        self.log_file = self.folder / LOG

    def classifier(self, version: int) -> Path:
        """Where the copy of a version's classifier lies."""
        return self.folder / VERSIONS / str(version)

    def exists(self) -> bool:
        """Whether something is deployed under this name, running or stopped."""
        return (self.folder / SPEC).is_file()

    def require(self) -> None:
        """Raise DeploymentError unless something is."""
        if not self.exists():
            raise DeploymentError(f"there is no deployment {self.name}: `jaxcls list` shows those there are")

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Within, no other process deploys or deletes under this name.

        Raises:
            DeploymentError: another one does.
        """
        make_private_folder(self.folder.parent)
        path = self.folder.with_name(f"{self.name}.lock")
        with path.open("w") as file:
            # Without a link it was deleted before it was locked: another process may have locked a new one.
            if not _try_lock(file, fcntl.LOCK_EX) or not os.fstat(file.fileno()).st_nlink:
                raise DeploymentError(f"another process deploys or deletes {self.name}: wait for it")
            try:
                yield
            finally:
                if not self.folder.exists():
                    path.unlink()

    def create(self) -> None:
        """Make the folder, and the key; what is there already stays."""
        make_private_folder(self.folder)
        if not self.key_file.exists():
            self._write(KEY, secrets.token_urlsafe(32))

    def remove(self) -> None:
        """Delete the folder, if it is there."""
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def keep_version(self, version: int) -> None:
        """Delete the copies of all other versions' classifiers."""
        for folder in (self.folder / VERSIONS).iterdir():
            if folder != self.classifier(version):
                shutil.rmtree(folder)

    def read_key(self) -> str:
        """The first key of the key file; "" where there is none."""
        lines = self.key_file.read_text(encoding="utf-8").splitlines()
        return next(filter(None, (line.partition("#")[0].strip() for line in lines)), "")

    def read_spec(self) -> Spec:
        """What is asked for.

        Raises:
            DeploymentError: nothing is, or the file is damaged.
        """
        self.require()
        return self._read(SPEC, lambda values: Spec(**values))

    def read_target(self) -> Target | None:
        """Where its replicas run; None: there is no deployment. One that is damaged counts as local."""
        try:
            return self.read_spec().target if self.exists() else None
        except DeploymentError:
            return "local"

    def next_spec(self, asked: Asked) -> tuple[Spec | None, Spec]:
        """What is asked for so far, None where nothing is, and with what is asked for now.

        Raises:
            DeploymentError: the file is damaged.
        """
        previous = self.read_spec() if self.exists() else None
        before = previous or Spec(0, 0, 1, asked.timeout_seconds, {})
        version = before.num_versions + 1
        changes = {name: value for name, value in vars(asked).items() if value is not None}
        return previous, replace(before, version=version, num_versions=version, **changes)

    def write_spec(self, spec: Spec) -> None:
        """Ask for something."""
        self._write(SPEC, json.dumps(asdict(spec), indent=2))

    def read_report(self) -> Report | None:
        """What there is, or was when the supervisor ended; None before the first supervisor.

        Raises:
            DeploymentError: the file is damaged.
        """
        return self._read(REPORT, _make_report) if (self.folder / REPORT).exists() else None

    def write_report(self, report: Report) -> None:
        """Say what there is."""
        self._write(REPORT, json.dumps(asdict(report), indent=2))

    def hold(self, lock: str) -> IO[str]:
        """Take a lock that ends with the last process that has the file."""
        file = (self.folder / lock).open("w")
        fcntl.flock(file, fcntl.LOCK_EX)
        return file

    def is_held(self, lock: str) -> bool:
        """Whether any process has the file of a lock that was taken."""
        try:
            with (self.folder / lock).open() as file:
                return not _try_lock(file, fcntl.LOCK_SH)
        except FileNotFoundError:
            return False

    def is_running(self) -> bool:
        """Whether there is a supervisor."""
        return self.is_held(SUPERVISOR_LOCK)

    def send(self, number: signal.Signals) -> None:
        """Send the supervisor a signal, if there is one."""
        if self.is_running():
            with suppress(ProcessLookupError):
                os.kill(int((self.folder / SUPERVISOR_LOCK).read_text()), number)

    def _read(self, name: str, make: Callable[[dict[str, Any]], T]) -> T:
        try:
            return make(json.loads((self.folder / name).read_bytes()))
        except (ValueError, TypeError, KeyError) as error:
            raise DeploymentError(
                f"{self.folder / name} is damaged: `jaxcls delete {self.name}`, then deploy again"
            ) from error

    def _write(self, name: str, text: str) -> None:
        """Write or replace a file in one step, readable by its owner alone."""
        write_whole(self.folder / name, f"{text}\n".encode(), mode=0o600)


def list_entries(registry: Path) -> list[Entry]:
    """Whatever is deployed, running or stopped, by name."""
    folders = sorted(registry.glob(f"*/{SPEC}"))
    return [Entry(registry, folder.parent.name) for folder in folders]


def _make_report(values: dict[str, Any]) -> Report:
    return Report(**values | {"replicas": tuple(ReplicaReport(**item) for item in values["replicas"])})


def _try_lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

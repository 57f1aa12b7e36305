"""`Deployment`: a classifier as a service under a name, started, asked, replaced and deleted by that name."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from jaxcls.cluster.session import require_ray
from jaxcls.errors import UsageError
from jaxcls.serving import local
from jaxcls.serving.client import Client
from jaxcls.serving.config import READY_SECONDS, RayOptions, ServiceConfig
from jaxcls.serving.registry import Asked, DeploymentStatus, Entry, Replicas, Target, list_entries
from jaxcls.storage import Storage

if TYPE_CHECKING:
    from jaxcls.classifier import Classifier


@dataclass(frozen=True, eq=False)
class Deployment:
    """A service under a name: the one that is there, or the one that `deploy` is to make.

    Attributes:
        name: lower-case letters, digits and hyphens, at most 63.
        classifier: to deploy, or the path of a saved one; None: the one that the deployment has.
        replicas: processes that score, each with the whole classifier; None: as many as there are, or 1.
            "auto", with the target "ray": as many as the requests need.
        target: where they run; "local": on this machine, reached from this machine only; "ray": in a Ray
            cluster that runs already, and shares the folder JAXCLS_HOME. None: where they are, or "local".
        config: of each replica; None: as it is, or the default one.
        address: of the cluster: "HOST:PORT", "ray://HOST:PORT", or "auto": that of RAY_ADDRESS, else this
            machine's. None: where it is, or "auto".
        ray: what replicas get there; None: as it is, or the default.

    Raises:
        UsageError: a name that is not of that form, or an unknown target.
    """

    name: str
    classifier: "Classifier | str | Path | None" = None
    replicas: Replicas | None = None
    target: Target | None = None
    config: ServiceConfig | None = field(default=None, kw_only=True)
    address: str | None = field(default=None, kw_only=True)
    ray: RayOptions | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.target not in (None, *get_args(Target)):
            raise UsageError(f"target {self.target!r}: choose from {', '.join(get_args(Target))}")
        if self.target != "ray" and (self.address or self.ray):
            raise UsageError("an address and options of Ray are for the target ray")
        _ = self._entry  # the name is checked

    @property
    def _entry(self) -> Entry:
        return Entry(_registry(), self.name)

    def exists(self) -> bool:
        """Whether something is deployed under this name, running or stopped."""
        return self._entry.exists()

    def deploy(self, *, port: int | None = None, timeout_seconds: float = READY_SECONDS) -> None:
        """Serve the classifier, and print the endpoint and where the key is.

        What is served under this name goes on until all new replicas are ready; no request fails. The service
        outlives this process, and keeps a copy of the classifier.

        Args:
            port: on the loopback address; None: the one the deployment has, or a free one. With the target
                "ray", Serve's, if it does not run yet; None: 8000.
            timeout_seconds: in which all replicas must be ready.

        Raises:
            ClassifierError: the saved classifier is missing or damaged.
            DeploymentError: it does not become ready, and what was there before stays; or another process
                deploys or deletes under this name.
            MissingExtraError: what serving needs is not installed.
            UsageError: a value that cannot work, or a port that cannot be had.
        """
        entry = self._entry
        if self.classifier is None:
            entry.require()
        module = _module_of(entry, self.target)
        asked = Asked(
            num_replicas=self.replicas,
            timeout_seconds=timeout_seconds,
            config=None if self.config is None else asdict(self.config),
            address=self.address,
            ray=None if self.ray is None else asdict(self.ray),
        )
        module.deploy(entry, self.classifier, asked, port)
        status = self.status()
        print(f"endpoint: {status.service_url}")
        print(f"key: {status.key_file}")

    def status(self) -> DeploymentStatus:
        """What is there.

        Raises:
            DeploymentError: there is no such deployment, or its files are damaged.
        """
        return _module_of(self._entry).read_status(self._entry)

    @property
    def service_url(self) -> str:
        """Where images are posted to.

        Raises:
            DeploymentError: there is no such deployment, or it is stopped.
        """
        return _module_of(self._entry).find_url(self._entry)

    @property
    def service_key(self) -> str:
        """What the service wants as `Authorization: Bearer`.

        Raises:
            DeploymentError: there is no such deployment, or its key cannot be read.
        """
        return self._entry.read_key()

    def connect(self) -> Client:
        """A client with the service's key.

        Raises:
            DeploymentError: there is no such deployment, or it is stopped.
        """
        return Client(self.service_url, self.service_key)

    def score_image(
        self,
        image: str | Path | bytes | NDArray[np.uint8],
        *,
        image_resize_dims: tuple[int, int] | None = None,
        softmax: bool = False,
    ) -> str:
        """What the service says of one image, for `parse_result`.

        Args:
            image: a path, an http(s) URL, an encoded image, or uint8 [H, W, 3].
            image_resize_dims: width and height to resize it to first.
            softmax: probabilities in place of the scores as they are.

        Raises:
            DeploymentError: there is no such deployment, or it is stopped.
            ImageError: the image cannot be read here.
            ServiceError: the service gives no good answer.
        """
        with self.connect() as client:
            return client.score([image], image_resize_dims=image_resize_dims, softmax=softmax)[0]

    def delete(self) -> None:
        """Finish the requests under way, end all processes, and remove key, log and copies.

        Raises:
            DeploymentError: there is no such deployment; its processes do not end; or another process
                deploys or deletes under this name.
        """
        _module_of(self._entry).delete(self._entry)


def list_deployments() -> list[DeploymentStatus]:
    """All deployments, running or stopped, by name.

    Raises:
        DeploymentError: the files of one are damaged.
    """
    return [_module_of(entry).read_status(entry) for entry in list_entries(_registry())]


def delete_if_exists(name: str) -> bool:
    """Delete the deployment of that name, and return whether there was one.

    Raises:
        DeploymentError: its processes do not end, or another process deploys or deletes under this name.
        UsageError: no deployment can have this name.
    """
    deployment = Deployment(name)
    if found := deployment.exists():
        deployment.delete()
    return found


class _TargetModule(Protocol):
    """What `local` and `ray_target` have in common."""

    def deploy(
        self, entry: Entry, classifier: "Classifier | str | Path | None", asked: Asked, port: int | None
    ) -> None: ...

    def delete(self, entry: Entry) -> None: ...

    def read_status(self, entry: Entry) -> DeploymentStatus: ...

    def find_url(self, entry: Entry) -> str: ...


def _module_of(entry: Entry, wanted: Target | None = None) -> _TargetModule:
    """What a deployment's target is run by: the one it has, or is to have.

    Raises:
        MissingExtraError: it is "ray", which is not installed.
        UsageError: it has another one than it is to have.
    """
    found = entry.read_target() or wanted or "local"
    if wanted not in (None, found):
        raise UsageError(f"{entry.name} has the target {found}: to have another one, delete it first")
    if found == "ray":
        require_ray()
        from jaxcls.serving import ray_target

        return ray_target
    return local


def _registry() -> Path:
    return Storage.default().persistent / "deployments"

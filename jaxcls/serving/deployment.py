"""`Deployment`: a classifier as a service under a name, started, asked, replaced and deleted by that name."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from jaxcls.errors import DeploymentError, UsageError
from jaxcls.serving import local
from jaxcls.serving.client import Client
from jaxcls.serving.config import READY_SECONDS, ServiceConfig
from jaxcls.serving.registry import DeploymentStatus, Entry, list_entries
from jaxcls.storage import Storage

if TYPE_CHECKING:
    from jaxcls.classifier import Classifier

Target = Literal["local"]


@dataclass(frozen=True, eq=False)
class Deployment:
    """A service under a name: the one that is there, or the one that `deploy` is to make.

    Attributes:
        name: lower-case letters, digits and hyphens, at most 63.
        classifier: to deploy, or the path of a saved one; None: the one that the deployment has.
        replicas: processes that score, each with the whole classifier; None: as many as there are, or 1.
        target: where they run; "local": on this machine, reached from this machine only.
        config: of each replica; None: as it is, or the default one.

    Raises:
        UsageError: a name that is not of that form, or an unknown target.
    """

    name: str
    classifier: "Classifier | str | Path | None" = None
    replicas: int | None = None
    target: Target = "local"
    config: ServiceConfig | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.target not in get_args(Target):
            raise UsageError(f"target {self.target!r}: choose from {', '.join(get_args(Target))}")
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
            port: on the loopback address; None: the one the deployment has, or a free one.
            timeout_seconds: in which all replicas must be ready.

        Raises:
            ClassifierError: the saved classifier is missing or damaged.
            DeploymentError: it does not become ready, and what was there before stays; or another process
                deploys or deletes under this name.
            MissingExtraError: what serving needs is not installed.
            UsageError: a value that cannot work, or a port that cannot be had.
        """
        local.deploy(
            self._entry,
            self.classifier,
            num_replicas=self.replicas,
            port=port,
            timeout_seconds=timeout_seconds,
            config=None if self.config is None else asdict(self.config),
        )
        status = self.status()
        print(f"endpoint: {status.service_url}")
        print(f"key: {status.key_file}")

    def status(self) -> DeploymentStatus:
        """What is there.

        Raises:
            DeploymentError: there is no such deployment, or its files are damaged.
        """
        return local.read_status(self._entry)

    @property
    def service_url(self) -> str:
        """Where images are posted to.

        Raises:
            DeploymentError: there is no such deployment, or it is stopped.
        """
        status = self.status()
        if status.state == "stopped":
            raise DeploymentError(f"{self.name} is stopped: `jaxcls deploy {self.name}` starts it again")
        return status.service_url

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
        local.delete(self._entry)


def list_deployments() -> list[DeploymentStatus]:
    """All deployments, running or stopped, by name.

    Raises:
        DeploymentError: the files of one are damaged.
    """
    return [local.read_status(entry) for entry in list_entries(_registry())]


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


def _registry() -> Path:
    return Storage.default().persistent / "deployments"

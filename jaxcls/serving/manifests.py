"""Kubernetes manifests of a service: plain ones, or a `RayService` for KubeRay 1.6 or newer.

YAML, since it is to be read, changed and kept: what a replica asks for is a first guess. The image is that of
`jaxcls docker`, which holds the classifier; the keys are in a Secret, which is no part of a manifest.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from typing import Any, Literal

from jaxcls.errors import MissingExtraError, UsageError
from jaxcls.serving.config import READY_SECONDS, ServiceConfig
from jaxcls.serving.docker import MODEL, PORT, STOP_SECONDS, USER

Kind = Literal["kubernetes", "kuberay"]
Json = dict[str, Any]

# What the names of Services, and those that KubeRay makes of it, allow.
NAME = re.compile("[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
CPUS, MEMORY_GIB = 2, 4
"""Of each replica."""
CPU_PERCENT = 70
"""Of what replicas ask for; above it, there will be more of them."""
SECRET_FOLDER, KEY_FOLDER = "/run/jaxcls-secret", "/run/jaxcls"
KEY_FILE = f"{KEY_FOLDER}/keys"
PROBE_SECONDS = 10


@dataclass(frozen=True, kw_only=True)
class Service:
    """What is to be served.

    Attributes:
        name: at most 40 lower-case letters, digits and hyphens, a letter first, no hyphen last.
        image: of `jaxcls docker`, with Ray for KubeRay, as the nodes pull it.
        model: path of the classifier in the image.
        replicas: how many, or the fewest and the most.
        gpus: of each replica; fractions with KubeRay alone, whose replicas can share one.
        config: of each replica.

    Raises:
        UsageError: a value that cannot work.
    """

    name: str
    image: str
    model: str = MODEL
    replicas: int | tuple[int, int] = 1
    gpus: float = 0.0
    config: ServiceConfig = field(default_factory=ServiceConfig)

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UsageError(
                f"name {self.name!r}: Kubernetes takes at most 40 lower-case letters, digits and hyphens, "
                "a letter first and no hyphen last"
            )
        if not self.model.startswith("/"):
            raise UsageError(f"{self.model} is no absolute path: say where the classifier lies in the image")
        if not 1 <= self.limits[0] <= self.limits[1]:
            raise UsageError(f"{self.replicas} replicas: give at least 1")
        if self.gpus < 0 or (self.gpus > 1 and self.gpus != int(self.gpus)):
            raise UsageError(f"{self.gpus} GPUs for each replica: give a whole number, or a part of one")

    @property
    def limits(self) -> tuple[int, int]:
        """The fewest and the most replicas."""
        return self.replicas if isinstance(self.replicas, tuple) else (self.replicas, self.replicas)

    @property
    def is_scaled(self) -> bool:
        """Whether their number follows the load."""
        return self.limits[0] < self.limits[1]


def write_manifest(kind: Kind, service: Service) -> str:
    """The manifest as YAML, for `kubectl apply --filename -`.

    Args:
        kind: "kubernetes": a Deployment, its Service and what keeps it up; "kuberay": a RayService.
        service: what is to be served.

    Raises:
        MissingExtraError: Ray, whose version KubeRay is told, is not installed.
        UsageError: what Kubernetes alone cannot do.
    """
    objects = _kubernetes(service) if kind == "kubernetes" else [_ray_service(service)]
    made = f"kubectl create secret generic {_secret(service)} --from-file=keys=KEY_FILE"
    return f"# The keys of clients: {made}\n" + "---\n".join(_to_yaml(each) for each in objects)


def _kubernetes(service: Service) -> list[Json]:
    if service.gpus != int(service.gpus):
        raise UsageError(f"{service.gpus} GPUs: without KubeRay, give each replica whole ones")
    if service.is_scaled and service.gpus:
        raise UsageError("without KubeRay, replicas on GPUs are not scaled with the load: give their number")
    labels = {"app.kubernetes.io/name": "jaxcls", "app.kubernetes.io/instance": service.name}
    selector = {"matchLabels": labels}
    container = {
        "name": "jaxcls",
        "image": service.image,
        "command": _command(service),
        "ports": [{"name": "http", "containerPort": PORT}],
        # Until everything is compiled and checked, nothing listens.
        "startupProbe": _probe("/v2/health/ready", failures=math.ceil(READY_SECONDS / PROBE_SECONDS)),
        "readinessProbe": _probe("/v2/health/ready", failures=1),
        "livenessProbe": _probe("/v2/health/live", failures=3),
        "resources": _resources(int(service.gpus)),
        "securityContext": {**_CONTAINED, "readOnlyRootFilesystem": True},
        "volumeMounts": [_mount("keys", KEY_FOLDER, is_read_only=True), _mount("temp", "/tmp")],
    }
    pods = _pods(service, container, volumes=[{"name": "temp", "emptyDir": {}}])
    deployment = {
        # Applied again, a number would undo what the autoscaler did.
        **({} if service.is_scaled else {"replicas": service.limits[0]}),
        "selector": selector,
        # As locally: a new replica is ready before an old one goes.
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
        "template": {"metadata": {"labels": labels}, "spec": pods},
    }
    port = {"name": "http", "port": PORT, "targetPort": "http"}
    made = [
        _object("apps/v1", "Deployment", service, deployment),
        _object("v1", "Service", service, {"selector": labels, "ports": [port]}),
        _object("policy/v1", "PodDisruptionBudget", service, {"maxUnavailable": 1, "selector": selector}),
    ]
    return [*made, _autoscaler(service)] if service.is_scaled else made


def _autoscaler(service: Service) -> Json:
    fewest, most = service.limits
    target = {"type": "Utilization", "averageUtilization": CPU_PERCENT}
    spec = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": service.name},
        "minReplicas": fewest,
        "maxReplicas": most,
        "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": target}}],
    }
    return _object("autoscaling/v2", "HorizontalPodAutoscaler", service, spec)


def _ray_service(service: Service) -> Json:
    # As many replicas to a pod as share its GPU.
    share = int(1 / service.gpus) if 0 < service.gpus < 1 else 1
    fewest, most = (math.ceil(limit / share) for limit in service.limits)
    worker = {
        "name": "ray-worker",
        "image": service.image,
        "ports": [{"name": "serve", "containerPort": PORT}],
        # KubeRay's own needs wget. Serve's proxy on a node is healthy while it can reach replicas.
        "readinessProbe": _probe("/-/healthz", failures=1),
        "resources": _resources(math.ceil(service.gpus), num_replicas=share),
        "securityContext": _CONTAINED,
        "volumeMounts": [_mount("keys", KEY_FOLDER, is_read_only=True)],
    }
    head = {
        "name": "ray-head",
        "image": service.image,
        "resources": _resources(0),
        "securityContext": _CONTAINED,
    }
    cluster = {
        "rayVersion": _ray_version(),
        # Whoever reaches Ray's ports can run code.
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": service.is_scaled,
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0"},  # no replicas here
            "template": {"spec": {"securityContext": _USER, "containers": [head]}},
        },
        "workerGroupSpecs": [
            {
                "groupName": "replicas",
                "replicas": fewest,
                "minReplicas": fewest,
                "maxReplicas": most,
                "rayStartParams": {"num-cpus": str(CPUS * share)},
                "template": {"spec": _pods(service, worker)},
            }
        ],
    }
    spec = {
        "serveConfigV2": _to_yaml(_serve_config(service)),
        "excludeHeadPodFromServeSvc": True,
        "rayClusterConfig": cluster,
    }
    return _object("ray.io/v1", "RayService", service, spec)


def _serve_config(service: Service) -> Json:
    """What Serve is told, see `jaxcls.serving.ray.application`."""
    fewest, most = service.limits
    number: Json = {"num_replicas": fewest}
    if service.is_scaled:
        number = {"autoscaling_config": {"min_replicas": fewest, "max_replicas": most}}
    args = {
        "model": service.model,
        "name": service.name,
        "version": "1",
        "key_file": KEY_FILE,
        # Through JSON: YAML has no tuples.
        "config": json.loads(json.dumps(asdict(service.config))),
    }
    options = {"num_cpus": CPUS, "num_gpus": service.gpus}
    application = {
        "name": service.name,
        "route_prefix": "/",
        "import_path": "jaxcls.serving.ray:application",
        "args": args,
        "deployments": [{"name": "Replica", **number, "ray_actor_options": options}],
    }
    return {"http_options": {"host": "0.0.0.0", "port": PORT}, "applications": [application]}


def _ray_version() -> str:
    try:
        return metadata.version("ray")
    except metadata.PackageNotFoundError as error:
        raise MissingExtraError("ray", "a manifest for KubeRay", "pip install 'jaxcls[cluster]'") from error


def _pods(service: Service, container: Json, volumes: Sequence[Json] = ()) -> Json:
    """Pods whose first container finds the keys in `KEY_FILE`, as it wants them."""
    copy = {
        # Those of a Secret belong to root, so that its group would have to read them.
        "name": "keys",
        "image": service.image,
        "command": ["install", "-m", "600", f"{SECRET_FOLDER}/keys", KEY_FILE],
        "securityContext": {**_CONTAINED, "readOnlyRootFilesystem": True},
        "volumeMounts": [_mount("secret", SECRET_FOLDER, is_read_only=True), _mount("keys", KEY_FOLDER)],
    }
    secret = {"secretName": _secret(service), "defaultMode": 0o440}
    return {
        "automountServiceAccountToken": False,
        "securityContext": _USER,
        # After SIGTERM a replica goes on for grace_seconds, while it says that it is not ready: no preStop.
        "terminationGracePeriodSeconds": STOP_SECONDS,
        "initContainers": [copy],
        "containers": [container],
        "volumes": [
            {"name": "secret", "secret": secret},
            {"name": "keys", "emptyDir": {"medium": "Memory"}},
            *volumes,
        ],
    }


def _command(service: Service) -> list[str]:
    command = ["jaxcls", "serve", service.model, "--name", service.name, "--host", "0.0.0.0"]
    command += ["--port", str(PORT), "--key-file", KEY_FILE]
    for option in fields(service.config):
        value = getattr(service.config, option.name)
        if value != option.default:
            command += _flag(option.name.replace("_", "-"), value)
    return command


def _flag(name: str, value: Any) -> list[str]:
    match value:
        case bool():
            return [f"--{name}" if value else f"--no-{name}"]
        case tuple():
            return [f"--{name}", *map(str, value)]
        case _:
            return [f"--{name}", str(value)]


def _secret(service: Service) -> str:
    return f"{service.name}-keys"


def _object(version: str, kind: str, service: Service, spec: Json) -> Json:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": service.name}, "spec": spec}


_USER = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    "seccompProfile": {"type": "RuntimeDefault"},
}
_CONTAINED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _probe(path: str, *, failures: int) -> Json:
    return {
        "httpGet": {"path": path, "port": PORT},
        "periodSeconds": PROBE_SECONDS,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _resources(gpus: int, *, num_replicas: int = 1) -> Json:
    bounds = {"memory": f"{MEMORY_GIB * num_replicas}Gi"}
    if gpus:
        bounds["nvidia.com/gpu"] = str(gpus)
    # No bound for cores: XLA starts a thread for each of the node's, and throttled ones wait for each other.
    return {"requests": {"cpu": str(CPUS * num_replicas), **bounds}, "limits": bounds}


def _mount(volume: str, path: str, *, is_read_only: bool = False) -> Json:
    return {"name": volume, "mountPath": path, **({"readOnly": True} if is_read_only else {})}


def _to_yaml(value: Mapping[str, Any]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Texts of several lines as blocks; nothing by reference."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

        def represent_str(self, data: str) -> yaml.ScalarNode:
            return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)

    Dumper.add_representer(str, Dumper.represent_str)
    return yaml.dump(value, Dumper=Dumper, sort_keys=False)

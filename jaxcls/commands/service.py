"""`jaxcls serve`, `score`, `deploy`, `list`, `delete`, `loadtest` and `docker`."""

# Annotations stay text: evaluated, those of the API would load JAX before `--help` is printed.
from __future__ import annotations

import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from jaxcls.commands.base import (
    DONE,
    FAILED,
    INTERRUPTED,
    Command,
    expand,
    new_output,
    note,
    open_text,
    print_columns,
    read_key,
)
from jaxcls.commands.output import OutputOptions
from jaxcls.errors import UsageError
from jaxcls.serving.config import READY_SECONDS, RayOptions, ServiceConfig, require_extra
from jaxcls.serving.registry import Replicas, Target
from jaxcls.storage import Storage

KEY_VARIABLE = "JAXCLS_SERVICE_KEY"
IMAGE = "jaxcls"


@dataclass(frozen=True, kw_only=True)
class Serve(Command):
    """Serve a classifier over HTTP until Ctrl-C or SIGTERM. `jaxcls deploy` keeps one running."""

    model: Annotated[Positional[Path], tyro.conf.arg(metavar="CLASSIFIER")]
    """A saved classifier."""
    config: OmitArgPrefixes[ServiceConfig] = field(default_factory=ServiceConfig)
    host: str = "127.0.0.1"
    """The address to listen on; another than this machine's own needs --key-file."""
    port: int = 8000
    """0: any free one."""
    key_file: Path | None = None
    """Keys, one a line, any of which a request must carry; of mode 0600. Read again on SIGHUP."""
    name: str | None = None
    """Of the model, in addresses; default: that of its folder."""

    def run(self) -> int:
        require_extra()
        from jaxcls.serving.app import Identity
        from jaxcls.serving.auth import Keys
        from jaxcls.serving.replica import listen, serve

        keys = None if self.key_file is None else Keys.read(self.key_file)
        listener = listen(self.host, self.port, is_private=keys is None)
        host, port = listener.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        name = self.name or self.model.resolve().stem
        serve(
            self.model, [listener], self.config, Identity(name, "1", keys),
            on_ready=lambda: print(f"serving {name}: {address}", flush=True),
        )  # fmt: skip
        return DONE


@dataclass(frozen=True, kw_only=True)
class Score(Command):
    """Have a service score images: a row for each. One that fails gets a row with its error, and exit code 1.

    The service's key comes from --key-file or the environment variable JAXCLS_SERVICE_KEY.
    """

    uses_jax = False

    service: Annotated[Positional[str], tyro.conf.arg(metavar="NAME|URL")]
    """Of `jaxcls deploy`, or the service's address, such as http://127.0.0.1:8000."""
    images: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGE ...")]
    """Images, folders of images, and http(s) URLs of images."""
    key_file: Path | None = None
    """A file whose first line, # comments aside, is the key."""
    softmax: bool = False
    """Probabilities in place of the scores as they are."""
    image_resize_dims: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="W H")] = None
    """Have the images resized to this width and height first."""
    output: OmitArgPrefixes[OutputOptions] = field(default_factory=OutputOptions)

    def run(self) -> int:
        from jaxcls.data.download import is_url
        from jaxcls.serving.client import Client

        images: list[str | Path] = []
        for image in self.images:
            images += [image] if is_url(image) else expand([Path(image)])
        with Client(*_find_service(self.service, self.key_file)) as service:
            predictions = service.predict(
                images,
                softmax=self.softmax,
                image_resize_dims=self.image_resize_dims,
                progress=True,
            )
        return self.output.write(predictions)


@dataclass(frozen=True, kw_only=True)
class Deploy(Command):
    """Serve a classifier under a name, in place of what is served under it: no request fails.

    The service outlives the terminal and keeps a copy of the classifier. Replicas that die are started again.
    Without any bound for them, such as --max-queue, those that it was deployed with last stay.
    """

    uses_jax = False

    name: Annotated[Positional[str], tyro.conf.arg(metavar="NAME")]
    """Lower-case letters, digits and hyphens."""
    model: Annotated[Positional[Path | None], tyro.conf.arg(metavar="[CLASSIFIER]")] = None
    """A saved classifier; default: the one that was deployed last under this name."""
    replicas: Replicas | None = None
    """Processes that score, each with the whole classifier; default: as many as there are, or 1. auto, with
    --target ray: as many as the requests need."""
    target: Target | None = None
    """local: on this machine; ray: in a Ray cluster that runs already. Default: where it is, or local."""
    address: str | None = None
    """Of the cluster, HOST:PORT or ray://HOST:PORT; default: where it is; RAY_ADDRESS; or this machine's."""
    port: int | None = None
    """On 127.0.0.1; default: the one that the deployment has, or a free one. With --target ray, Serve's,
    if it does not run yet; default: 8000."""
    timeout_seconds: float = READY_SECONDS
    """Give up, and keep what is served, if the new replicas are not all ready by then."""
    config: OmitArgPrefixes[ServiceConfig] = field(default_factory=ServiceConfig)
    ray: OmitArgPrefixes[RayOptions] = field(default_factory=RayOptions)
    manifest: Literal["kubernetes", "kuberay"] | None = None
    """Deploy nothing, but write what `kubectl apply` takes. CLASSIFIER: its path in the image, or /model."""
    image: str | None = None
    """With --manifest: of `jaxcls docker`, for kuberay with --ray; default: jaxcls."""
    out: Path | None = None
    """With --manifest: a file for it; default: the terminal."""

    def run(self) -> int:
        if self.manifest is not None:
            return self._write_manifest(self.manifest)
        if self.image or self.out:
            raise UsageError("--image and --out go with --manifest")
        from jaxcls.serving.deployment import Deployment

        deployment = Deployment(
            self.name,
            self.model,
            self.replicas,
            self.target,
            config=None if self.config == ServiceConfig() else self.config,
            address=self.address,
            ray=None if self.ray == RayOptions() else self.ray,
        )
        deployment.deploy(port=self.port, timeout_seconds=self.timeout_seconds)
        return DONE

    def _write_manifest(self, kind: Literal["kubernetes", "kuberay"]) -> int:
        from jaxcls.serving.manifests import MODEL, Service, write_manifest

        if self.target or self.address or self.port:
            raise UsageError("--manifest goes with none of --target, --address and --port")
        limits = self.ray.min_replicas, self.ray.max_replicas
        replicas = 1 if self.replicas is None else self.replicas
        service = Service(
            name=self.name,
            image=self.image or IMAGE,
            model=str(self.model or MODEL),
            replicas=limits if replicas == "auto" else replicas,
            gpus=self.ray.gpus,
            config=self.config,
        )
        text = write_manifest(kind, service)
        with open_text(self.out) as file:
            file.write(text)
        return DONE


@dataclass(frozen=True, kw_only=True)
class List(Command):
    """List the deployments, running or stopped. Exit code 1: of some there is something to be told."""

    uses_jax = False

    def run(self) -> int:
        from jaxcls.serving.deployment import list_deployments

        rows = [("name", "state", "version", "ready", "restarts", "endpoint", "status")]
        deployments = list_deployments()
        for found in deployments:
            ready = f"{found.num_ready}/{len(found.replicas)}"
            restarts = sum(replica.num_restarts for replica in found.replicas)
            served = str(found.version or "-")
            urls = (found.service_url, found.status_url)
            rows.append((found.name, found.state, served, ready, str(restarts), *urls))
        print_columns(rows)
        problems = [f"jaxcls: {found.name}: {found.problem}" for found in deployments if found.problem]
        for problem in problems:
            note(problem)
        return FAILED if problems else DONE


@dataclass(frozen=True, kw_only=True)
class Delete(Command):
    """End a deployment once it has answered what it was asked, and remove its key, log and copies."""

    uses_jax = False

    name: Annotated[Positional[str], tyro.conf.arg(metavar="NAME")]
    """As it was deployed."""

    def run(self) -> int:
        from jaxcls.serving.deployment import Deployment

        Deployment(self.name).delete()
        return DONE


@dataclass(frozen=True, kw_only=True)
class Loadtest(Command):
    """Put a service under load, and write a report. Exit code 1: requests failed, or p99 was missed.

    Requests that the service refuses as too many (429, 503) are counted apart and are no failures.
    """

    uses_jax = False

    service: Annotated[Positional[str], tyro.conf.arg(metavar="NAME|URL")]
    """Of `jaxcls deploy`, or the service's address, such as http://127.0.0.1:8000."""
    images: Path
    """A folder of images, sent in turn."""
    rate: float | None = None
    """Requests per second, which come whatever becomes of those before."""
    users: int | None = None
    """Instead of --rate: how many users, each of whom waits for an answer before asking again."""
    duration: float = 30.0
    """Seconds."""
    key_file: Path | None = None
    """A file whose first line, # comments aside, is the key."""
    p99_ms: float | None = None
    """The objective: 99 % of the good answers within so many milliseconds."""
    out: Path | None = None
    """A new folder for report.html, report.json and goodput.png."""

    def run(self) -> int:
        from jaxcls.serving.load_test import Load, choose_images, load_test

        if self.out is not None and self.out.exists():
            raise UsageError(f"{self.out} exists: give a new folder")
        url, key = _find_service(self.service, self.key_file)
        load = Load(
            url=url,
            images=choose_images(self.images),
            rate=self.rate,
            users=self.users,
            seconds=self.duration,
            key=key,
        )
        with Storage.default().scratch() as temp:
            report = load_test(load, p99_ms=self.p99_ms, temp=temp)
        print(report)
        out = self.out or new_output("loadtest")
        report.write(out)
        print(f"report: {out / 'report.html'}")
        if report.is_interrupted:
            return INTERRUPTED
        return FAILED if report.problems else DONE


@dataclass(frozen=True, kw_only=True)
class Docker(Command):
    """Write what a container image that serves a classifier is built from, and build it where Docker runs."""

    uses_jax = False

    model: Annotated[Positional[Path], tyro.conf.arg(metavar="CLASSIFIER")]
    """A saved classifier."""
    out: Path | None = None
    """A new folder for the build context."""
    tag: str = IMAGE
    """The image's name."""
    cuda: bool = False
    """For NVIDIA GPUs."""
    ray: bool = False
    """For the nodes of a Ray cluster, too."""

    def run(self) -> int:
        from jaxcls.serving import docker

        out = self.out or new_output("docker")
        context = docker.write_context(self.model, out, cuda=self.cuda, ray=self.ray)
        print(f"build context: {context}")
        build = docker.build_command(context, self.tag)
        if docker.has_engine():
            if subprocess.run(build).returncode:
                return FAILED
        else:
            print(f"no Docker engine answers here; where one does: {shlex.join(build)}")
        print(f"run it: {docker.run_command(self.tag, cuda=self.cuda)}")
        return DONE


def _find_service(service: str, key_file: Path | None) -> tuple[str, str | None]:
    """Address and key of a service at an address, or deployed under a name."""
    if "://" in service:
        return service, read_key(key_file, KEY_VARIABLE)
    if set(service) & set(":/."):
        raise UsageError(f"{service} is no name of a deployment; for an address, write http://{service}")
    from jaxcls.serving.deployment import Deployment

    deployment = Deployment(service)
    return deployment.service_url, deployment.service_key

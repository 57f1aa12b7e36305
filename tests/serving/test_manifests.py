"""Manifests, held against the schemas of Kubernetes and Serve; what is KubeRay's own, field by field."""

import secrets
import subprocess
from dataclasses import replace

import httpx2
import pytest
import tyro
import yaml
from services import start_service

from jaxcls.cli import main
from jaxcls.commands.service import Serve
from jaxcls.errors import UsageError
from jaxcls.serving.config import MAX_SHUTDOWN_SECONDS, ServiceConfig
from jaxcls.serving.docker import pinned_requirements
from jaxcls.serving.manifests import Service, write_manifest

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="Kubernetes' schemas (extra slow)")
pytest.importorskip("ray", reason="the version of Ray is part of a manifest (extra cluster)")

KUBERNETES = "1.34"
PLAIN = Service(name="tableware", image="registry.example/tableware:2")
SERVICES = {
    "plain": PLAIN,
    "many": replace(
        PLAIN, replicas=3, config=ServiceConfig(batch_sizes=(1, 8), max_queue=64, allow_urls=True)
    ),
    "scaled": replace(PLAIN, replicas=(2, 9)),
    "gpus": replace(PLAIN, replicas=2, gpus=2),
}


def read(kind, service):
    return list(yaml.safe_load_all(write_manifest(kind, service)))


def deployment_of(service):
    (found,) = (each for each in read("kubernetes", service) if each["kind"] == "Deployment")
    return found["spec"]


def cluster_of(service):
    (ray_service,) = read("kuberay", service)
    return ray_service["spec"]["rayClusterConfig"]


def config_of(service):
    (ray_service,) = read("kuberay", service)
    return yaml.safe_load(ray_service["spec"]["serveConfigV2"])


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
def test_kubernetes_takes_it(service):
    objects = read("kubernetes", service)
    for each in objects:
        kubernetes_validate.validate(each, KUBERNETES, strict=True)
        assert each["metadata"] == {"name": "tableware"}
    kinds = [each["kind"] for each in objects]
    scaler = ["HorizontalPodAutoscaler"] if service.is_scaled else []
    assert kinds == ["Deployment", "Service", "PodDisruptionBudget", *scaler]


def test_what_belongs_together_has_the_same_names():
    deployment, service, budget, scaler = read("kubernetes", SERVICES["scaled"])
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["selector"] == labels
    assert budget["spec"]["selector"]["matchLabels"] == labels
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
def test_serve_understands_the_command(service):
    (container,) = deployment_of(service)["template"]["spec"]["containers"]
    program, subcommand, *arguments = container["command"]
    assert (program, subcommand) == ("jaxcls", "serve")
    command = tyro.cli(Serve, args=arguments)
    assert command.config == service.config
    assert (command.name, command.host, str(command.model)) == ("tableware", "0.0.0.0", "/model")
    assert {command.port} == {port["containerPort"] for port in container["ports"]}
    folders = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert str(command.key_file.parent) in folders


def test_replicas_and_gpus():
    assert deployment_of(SERVICES["many"])["replicas"] == 3
    assert "replicas" not in deployment_of(SERVICES["scaled"])
    scaler = read("kubernetes", SERVICES["scaled"])[-1]["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 9)
    (container,) = deployment_of(SERVICES["gpus"])["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"


@pytest.mark.parametrize("kind", ["kubernetes", "kuberay"])
def test_pods_have_time_to_drain_and_few_rights(kind):
    pods = (
        deployment_of(PLAIN)["template"]
        if kind == "kubernetes"
        else cluster_of(PLAIN)["workerGroupSpecs"][0]["template"]
    )["spec"]
    assert pods["terminationGracePeriodSeconds"] > MAX_SHUTDOWN_SECONDS
    assert pods["securityContext"]["runAsNonRoot"]
    for container in (*pods["initContainers"], *pods["containers"]):
        assert container["image"] == PLAIN.image
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.slow
def test_what_the_pod_runs_serves_and_answers_the_probes(served_model, service_home, tmp_path):
    """Its commands, with folders of this machine in place of its volumes."""
    key = secrets.token_hex(16)
    pods = deployment_of(PLAIN)["template"]["spec"]
    (copy,), (container,) = pods["initContainers"], pods["containers"]
    folders = {mount["mountPath"]: tmp_path / mount["name"] for mount in copy["volumeMounts"]}
    (secret, keys) = folders.values()
    secret.mkdir()
    keys.mkdir()
    (secret / "keys").write_text(key)
    (secret / "keys").chmod(0o440)

    def here(words):
        for path, folder in folders.items():
            words = [str(folder / word.removeprefix(path + "/")) if word.startswith(path + "/") else word
                     for word in words]  # fmt: skip
        return words

    subprocess.run(here(copy["command"]), check=True)
    _, _, _, *options = here(container["command"])
    port = options.index("--port")
    del options[port : port + 2]  # a free one
    with start_service(served_model, service_home, *options) as served:
        url = served.url.replace("0.0.0.0", "127.0.0.1")
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert httpx2.get(url + container[probe]["httpGet"]["path"]).status_code == 200
        assert httpx2.get(f"{url}/v2/models/tableware").status_code == 401
        answer = httpx2.get(f"{url}/v2/models/tableware", headers={"Authorization": f"Bearer {key}"})
        assert answer.json()["name"] == "tableware"
        served.end()


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
def test_kuberay_is_told_what_it_asks_for(service):
    (ray_service,) = read("kuberay", service)
    assert (ray_service["apiVersion"], ray_service["kind"]) == ("ray.io/v1", "RayService")
    assert ray_service["spec"].keys() == {"serveConfigV2", "excludeHeadPodFromServeSvc", "rayClusterConfig"}
    cluster = ray_service["spec"]["rayClusterConfig"]
    # It refuses tokens for a Ray whose version it is not told, or that is older than 2.52.
    assert cluster["authOptions"] == {"mode": "token"}
    assert f"ray=={cluster['rayVersion']}" in pinned_requirements("serve", "cluster")
    (workers,) = cluster["workerGroupSpecs"]
    for template in (cluster["headGroupSpec"]["template"], workers["template"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    for group in (cluster["headGroupSpec"], workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert (workers["minReplicas"], workers["maxReplicas"]) == service.limits
    assert cluster["enableInTreeAutoscaling"] == service.is_scaled


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own, when it is imported
@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
def test_serve_takes_its_part_of_it(service):
    from ray.serve.schema import ServeDeploySchema

    from jaxcls.serving.ray import NAME, application

    config = config_of(service)
    parsed = ServeDeploySchema.model_validate(config)
    assert not parsed.model_extra
    (app,) = parsed.applications
    module, _, builder = app.import_path.partition(":")
    assert (module, builder) == (application.__module__, application.__name__)
    application(app.args)
    (deployment,) = app.deployments
    assert deployment.name == NAME
    assert ServiceConfig(
        **{**app.args["config"], "batch_sizes": tuple(app.args["config"]["batch_sizes"])}
    ) == (service.config)
    (workers,) = cluster_of(service)["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    # A replica fills its pod.
    assert str(deployment.ray_actor_options.num_cpus) == f"{container['resources']['requests']['cpu']}.0"
    assert {parsed.http_options.port} == {port["containerPort"] for port in container["ports"]}


def test_replicas_that_share_a_gpu_share_a_pod():
    service = replace(PLAIN, replicas=5, gpus=0.5)
    (workers,) = cluster_of(service)["workerGroupSpecs"]
    assert workers["replicas"] == 3
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"memory": "8Gi", "nvidia.com/gpu": "1"}
    assert workers["rayStartParams"] == {"num-cpus": "4"}
    (deployment,) = config_of(service)["applications"][0]["deployments"]
    assert (deployment["num_replicas"], deployment["ray_actor_options"]["num_gpus"]) == (5, 0.5)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("kubernetes", {"gpus": 0.5}, "without KubeRay, give each replica whole ones"),
        ("kubernetes", {"gpus": 1, "replicas": (1, 2)}, "give their number"),
        ("kuberay", {"gpus": 1.5}, "1.5 GPUs for each replica: give a whole number, or a part of one"),
        ("kuberay", {"replicas": 0}, "0 replicas: give at least 1"),
        ("kuberay", {"name": "7up"}, "a letter first"),
        ("kuberay", {"name": "a" * 41}, "at most 40"),
        ("kuberay", {"name": "tail-"}, "no hyphen last"),
        ("kuberay", {"model": "photos.jaxcls"}, "photos.jaxcls is no absolute path"),
    ],
)
def test_values_that_cannot_work(kind, values, message):
    with pytest.raises(UsageError, match=message):
        write_manifest(kind, replace(PLAIN, **values))


def test_the_command_line(tmp_path, capsys):
    arguments = ["deploy", "tableware", "--manifest", "kubernetes", "--image", PLAIN.image]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed == write_manifest("kubernetes", PLAIN)
    assert main([*arguments, "--out", str(tmp_path / "all.yaml")]) == 0
    assert (tmp_path / "all.yaml").read_text() == printed
    assert "&id" not in printed  # a reference, which nobody wants to edit


@pytest.mark.parametrize(
    "options", [["--port", "80"], ["photos.jaxcls"], ["--gpus", "0.5"], ["--replicas", "0"]]
)
def test_what_the_command_line_refuses_leaves_the_file_alone(options, tmp_path):
    file = tmp_path / "all.yaml"
    file.write_text("mine")
    arguments = ["deploy", "tableware", "--manifest", "kubernetes", "--out", str(file)]
    assert main([*arguments, *options]) == 2
    assert file.read_text() == "mine"


@pytest.mark.parametrize("options", [["--image", "tableware"], ["--out", "all.yaml"]])
def test_what_is_of_a_manifest_needs_one(options, capsys):
    assert main(["deploy", "tableware", "photos.jaxcls", *options]) == 2
    assert "--image and --out go with --manifest" in capsys.readouterr().err

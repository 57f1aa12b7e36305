"""Build contexts, checked without an engine: what a build would copy, install and run."""

import csv
import hashlib
import http.server
import json
import os
import shlex
import subprocess
import sys
import threading
import zipfile
from base64 import urlsafe_b64decode
from importlib import metadata

import numpy as np
import pytest
from packaging.utils import canonicalize_name

from jaxcls.classifier import Classifier, Head, load
from jaxcls.cli import main
from jaxcls.errors import MissingExtraError
from jaxcls.serving import docker


@pytest.fixture(scope="module")
def model(backbone, tmp_path_factory):
    """A saved classifier that only its owner can read."""
    head = Head(kernel=np.zeros((backbone.num_features, 2), np.float32), bias=np.zeros(2, np.float32))
    path = Classifier(backbone, head, ("blue", "red")).save(tmp_path_factory.mktemp("models") / "hue.jaxcls")
    for file in path.iterdir():
        file.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def context(model, tmp_path_factory):
    before = os.umask(0o077)
    try:
        return docker.write_context(model, tmp_path_factory.mktemp("docker") / "context")
    finally:
        os.umask(before)


def instructions(context):
    """The Dockerfile's, by name; each one's arguments, those in JSON as lists."""
    found = {}
    for line in (context / "Dockerfile").read_text().splitlines():
        name, _, rest = line.partition(" ")
        found.setdefault(name, []).append(rest)
    found["ENTRYPOINT"] = json.loads(*found["ENTRYPOINT"])
    found["HEALTHCHECK"] = json.loads(found["HEALTHCHECK"][0].partition(" CMD ")[2])
    return found


def test_everything_to_be_copied_is_there_and_not_ignored(context):
    sources = [copied.split()[0] for copied in instructions(context)["COPY"]]
    assert all((context / source).exists() for source in sources)
    assert (context / ".dockerignore").read_text().split() == ["*", *(f"!{source}" for source in sources)]
    assert {path.name for path in context.iterdir()} == {*sources, "Dockerfile", ".dockerignore"}


def test_the_classifier_is_whole_and_readable_by_the_services_user(context, model):
    load(context / "model")
    assert (context / "model" / "parity.npz").read_bytes() == (model / "parity.npz").read_bytes()
    for path in context.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644)


def test_the_service_is_not_root_and_its_python_is_the_one_of_the_pins(context):
    found = instructions(context)
    assert found["FROM"] == ["python:{}.{}-slim-trixie".format(*sys.version_info)]
    assert int(found["USER"][0].partition(":")[0]) > 0


def test_the_entrypoint_is_a_command_that_serve_understands(context, capsys):
    found = instructions(context)
    program, *arguments = found["ENTRYPOINT"]
    options = dict(zip(arguments[2::2], arguments[3::2], strict=True))
    assert (program, *arguments[:2]) == ("jaxcls", "serve", "/model")
    assert options["--name"] == "hue"
    assert found["EXPOSE"] == [options["--port"]]
    assert not os.path.exists(docker.KEY_FILE)  # noqa: PTH110
    assert main(arguments) == 2
    assert docker.KEY_FILE in capsys.readouterr().err


@pytest.mark.parametrize("status", [200, 503, None])
def test_health_check(context, status):
    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/v2/health/ready" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Health) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        _, *arguments = instructions(context)["HEALTHCHECK"]
        port = server.server_port if status else 1
        check = [sys.executable, *(argument.replace("8000", str(port)) for argument in arguments)]
        environment = {**os.environ, "http_proxy": "http://127.0.0.1:1"}
        code = subprocess.run(check, env=environment, stderr=subprocess.DEVNULL).returncode
        server.shutdown()
        thread.join()
    assert code == (0 if status == 200 else 1)


def test_serving_runs_on_nothing_but_the_requirements(context):
    pins = dict(line.split("==") for line in (context / "requirements.txt").read_text().split())
    assert pins == {name: metadata.version(name) for name in pins}
    assert not {"jaxcls", "torch", "pytest", "locust"} & pins.keys()
    there = {*pins, "jaxcls"}
    absent = [
        module
        for module, names in metadata.packages_distributions().items()
        if not {canonicalize_name(name) for name in names} & there
    ]
    assert "pytest" in absent
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import jaxcls.serving.replica"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_requirements_follow_extras_and_markers(tmp_path, monkeypatch):
    needs = {
        "jaxcls": [
            "one[fast]>=1",
            "old; python_version < '3'",
            "served; extra == 'serve'",
            "x; extra == 'ui'",
        ],
        "one": ["Two_B", "quick; extra == 'fast'", "slow; extra == 'slow'"],
        "two-b": ["one"],
        "quick": [],
        "served": [],
    }
    for name, requirements in needs.items():
        folder = tmp_path / f"{name.replace('-', '_')}-7.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 7"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert docker.pinned_requirements("serve") == ["one==7", "quick==7", "served==7", "two-b==7"]


def test_wheel_installs_and_has_right_checksums(context, tmp_path):
    [wheel] = context.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [record] = [name for name in archive.namelist() if name.endswith("/RECORD")]
        rows = list(csv.reader(archive.read(record).decode().splitlines()))
        assert [name for name, _, _ in rows] == archive.namelist()
        for name, digest, size in rows[:-1]:
            content = archive.read(name)
            kind, _, text = digest.partition("=")
            assert (kind, text.count("=")) == ("sha256", 0)
            assert urlsafe_b64decode(f"{text}=") == hashlib.sha256(content).digest()
            assert int(size) == len(content)
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", tmp_path, wheel]
    subprocess.run(pip, check=True, capture_output=True)
    code = "import jaxcls; print(jaxcls.__file__, jaxcls.__version__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    printed = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment, cwd="/"
    ).stdout
    assert printed.split() == [str(tmp_path / "jaxcls" / "__init__.py"), metadata.version("jaxcls")]
    assert (tmp_path / "bin" / "jaxcls").exists()


def test_cuda(model, tmp_path):
    context = docker.write_context(model, tmp_path / "context", cuda=True)
    assert f"jax[cuda13]=={metadata.version('jax')}" in (context / "requirements.txt").read_text().split()
    assert "--gpus all" in docker.run_command("hue", cuda=True)


def test_ray(model, tmp_path):
    pytest.importorskip("ray")
    context = docker.write_context(model, tmp_path / "context", ray=True)
    pins = (context / "requirements.txt").read_text().split()
    assert {f"ray=={metadata.version('ray')}", f"starlette=={metadata.version('starlette')}"} <= set(pins)


# The command. On PATH stands a program in place of Docker's, so that no test builds an image.


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """Call it to have an engine that answers with an exit code, and the file of what it was asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def answer(code):
        program = folder / "docker"
        program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nexit {code}\n')
        program.chmod(0o755)
        return tmp_path / "asked"

    return answer


def test_without_docker_the_command_is_said(engine, model, tmp_path, capsys):
    out = tmp_path / "context"
    assert main(["docker", str(model), "--out", str(out), "--tag", "a b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert shlex.split(lines[1].partition("where one does: ")[2]) == [
        "docker",
        "build",
        "--tag",
        "a b",
        str(out),
    ]
    assert "--volume ./jaxcls-key:/run/secrets/jaxcls-key:ro" in lines[2]
    assert lines[2].endswith("'a b'")


def test_engine_that_does_not_answer(engine, model, tmp_path, capsys):
    asked = engine(1)
    assert main(["docker", str(model), "--out", str(tmp_path / "context")]) == 0
    assert asked.read_text() == "version\n"
    assert "no Docker engine answers" in capsys.readouterr().out


def test_engine_builds(engine, model, tmp_path):
    asked = engine(0)
    assert main(["docker", str(model), "--out", str(tmp_path / "context"), "--tag", "hue"]) == 0
    assert asked.read_text() == f"version\nbuild --tag hue {tmp_path}/context\n"


def test_existing_folder_is_left_alone(model, tmp_path, capsys):
    assert main(["docker", str(model), "--out", str(tmp_path)]) == 2
    assert "exists: give a new folder" in capsys.readouterr().err


def test_no_classifier(tmp_path, capsys):
    assert main(["docker", str(tmp_path), "--out", str(tmp_path / "context")]) == 1
    assert "is no saved classifier" in capsys.readouterr().err
    assert not (tmp_path / "context").exists()


def test_serving_is_not_installed(monkeypatch):
    def version(name):
        if name == "starlette":
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(MissingExtraError, match=r"needs starlette.*pip install 'jaxcls\[serve\]'"):
        docker.pinned_requirements("serve")

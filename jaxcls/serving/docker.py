"""The build context of a container image that serves one classifier.

The image gets the very versions that are installed here, so it is based on the same minor version of Python:
for another, other dependencies may be needed.
"""

import json
import shlex
import shutil
import subprocess
import sys
import zipfile
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from hashlib import sha256
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from jaxcls.errors import MissingExtraError, UsageError
from jaxcls.manifest import MANIFEST, PARITY, PROGRAMS, WEIGHTS, check_file, check_programs, read_manifest

BASE_IMAGE = f"python:{sys.version_info.major}.{sys.version_info.minor}-slim-trixie"
MODEL, PORT, USER = "/model", 8000, 10001
KEY_FILE = "/run/secrets/jaxcls-key"
STOP_SECONDS = 35
"""A service that was told to stop ends within 30 s by itself; Docker would kill it after 10."""

# Any user can run it, as `docker run --user` may say: nothing is written outside of /tmp. The import shows
# while the image is built, not when it is run, whether all that serving needs is there.
DOCKERFILE = f"""\
FROM {BASE_IMAGE}
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
COPY requirements.txt /tmp/
RUN pip install -r /tmp/requirements.txt
COPY {{wheel}} /tmp/
RUN pip install --no-deps /tmp/{{wheel}} && python -c "import jaxcls.serving.replica"
COPY model {MODEL}
USER {USER}:{USER}
ENV HOME=/tmp JAXCLS_HOME=/tmp/jaxcls PYTHONUNBUFFERED=1
EXPOSE {PORT}
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m CMD {{health_check}}
ENTRYPOINT {{entrypoint}}
"""

# Not urllib: it would ask a proxy that the environment names.
HEALTH_CHECK = f"""\
import http.client, sys
connection = http.client.HTTPConnection("127.0.0.1", {PORT}, timeout=4)
connection.request("GET", "/v2/health/ready")
sys.exit(connection.getresponse().status != 200)
"""


def write_context(model: Path, out: Path, *, cuda: bool = False, ray: bool = False) -> Path:
    """Write Dockerfile, classifier, pinned requirements and a wheel of this jaxcls; return the folder.

    Args:
        model: a saved classifier.
        out: a new folder.
        cuda: have JAX use NVIDIA GPUs; its CUDA libraries are the newest that this version of JAX takes.
        ray: for the nodes of a Ray cluster, too.

    Raises:
        ClassifierError: `model` is no saved classifier, or damaged.
        MissingExtraError: the packages that serving needs are not installed here, so have no versions.
        UsageError: `out` exists.
    """
    if out.exists():
        raise UsageError(f"{out} exists: give a new folder")
    requirements = pinned_requirements("serve", "cluster") if ray else pinned_requirements("serve")
    if cuda:
        requirements.append(f"jax[cuda13]=={metadata.version('jax')}")
    files = _classifier_files(model)
    for name in files:
        target = out / "model" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model / name, target)
    wheel = write_wheel(out)
    entrypoint = ["jaxcls", "serve", MODEL, "--name", model.resolve().stem, "--host", "0.0.0.0"]
    entrypoint += ["--port", str(PORT), "--key-file", KEY_FILE]
    dockerfile = DOCKERFILE.format(
        wheel=wheel.name,
        health_check=json.dumps(["python", "-c", HEALTH_CHECK]),
        entrypoint=json.dumps(entrypoint),
    )
    texts = {
        "Dockerfile": dockerfile,
        "requirements.txt": "\n".join(requirements) + "\n",
        ".dockerignore": f"*\n!requirements.txt\n!{wheel.name}\n!model\n",
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    for path in (out, *out.rglob("*")):  # COPY keeps modes, and the service's user is another
        path.chmod(0o755 if path.is_dir() else 0o644)
    return out


def build_command(context: Path, tag: str) -> list[str]:
    """What builds the image."""
    return ["docker", "build", "--tag", tag, str(context)]


def run_command(tag: str, *, cuda: bool = False) -> str:
    """The shell's command that serves from the image, with the keys in ./jaxcls-key, as that file's owner."""
    return (
        f'docker run --publish {PORT}:{PORT} --user "$(id -u):$(id -g)" '
        f"--volume ./jaxcls-key:{KEY_FILE}:ro --stop-timeout {STOP_SECONDS} "
        f"{'--gpus all ' if cuda else ''}{shlex.quote(tag)}"
    )


def has_engine() -> bool:
    """Whether a Docker engine answers."""
    try:
        return subprocess.run(["docker", "version"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def pinned_requirements(*extras: str) -> list[str]:
    """`name==version` of everything that jaxcls and some of its extras need, as installed here.

    Raises:
        MissingExtraError: something of it is not installed.
    """
    pins: dict[str, str] = {}
    waiting, seen = [("jaxcls", extra) for extra in ("", *extras)], set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            pins[name] = metadata.version(name)
        except metadata.PackageNotFoundError as error:
            install = f"pip install 'jaxcls[{','.join(extras)}]'"
            raise MissingExtraError(name, "an image that serves", install) from error
        waiting += _dependencies(name, extra)
    del pins["jaxcls"]
    return [f"{name}=={version}" for name, version in sorted(pins.items())]


def _dependencies(name: str, extra: str) -> Iterator[tuple[str, str]]:
    """What an extra of an installed package needs ("" for none), itself with its extras."""
    for line in metadata.requires(name) or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            needed = canonicalize_name(requirement.name)
            yield from ((needed, chosen) for chosen in ("", *requirement.extras))


def write_wheel(folder: Path) -> Path:
    """Pack the jaxcls that runs here, installed or from a checkout, into a wheel, and return its path.

    Neither network nor build tools are needed.
    """
    package, distribution = Path(__file__).parents[1], metadata.distribution("jaxcls")
    name = f"jaxcls-{distribution.version}"
    info = {
        "METADATA": distribution.read_text("METADATA") or distribution.read_text("PKG-INFO"),
        "WHEEL": "Wheel-Version: 1.0\nGenerator: jaxcls\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "entry_points.txt": distribution.read_text("entry_points.txt"),
        "licenses/LICENSE": distribution.read_text("licenses/LICENSE"),
    }
    contents = {
        path.relative_to(package.parent).as_posix(): path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    contents |= {f"{name}.dist-info/{key}": text.encode() for key, text in info.items() if text is not None}
    records = [f"{file},sha256={_digest(content)},{len(content)}" for file, content in contents.items()]
    record = f"{name}.dist-info/RECORD"
    contents[record] = "\n".join([*records, f"{record},,", ""]).encode()
    path = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for file, content in contents.items():
            wheel.writestr(file, content)
    return path


def _digest(content: bytes) -> str:
    return urlsafe_b64encode(sha256(content).digest()).decode().rstrip("=")


def _classifier_files(model: Path) -> list[str]:
    """The files of a saved classifier, checked."""
    manifest = read_manifest(model)
    check_file(model, WEIGHTS, manifest)
    check_file(model, PARITY, manifest)
    check_programs(model, manifest)
    programs = [PROGRAMS[name] for name in manifest["programs"] if (model / PROGRAMS[name]).is_file()]
    return [MANIFEST, WEIGHTS, PARITY, *programs]

"""Two forced CPU devices, strict rank promotion, a local Ray cluster, and where the shared files lie."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# Before anything imports Ray, which looks once. Without a token, a cluster would run anybody's code.
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))

import numpy as np
import pytest
from PIL import Image

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _raise_on_rank_promotion():
    """Broadcasting over ranks is an error in our code."""
    import jax

    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of photos, weights and reference outputs that lies beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"the photos and weights that this test reads are not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def weights(shared, tmp_path_factory) -> Path:
    """A folder with resnet18.safetensors and resnet50.safetensors, trained on ImageNet."""
    folder = tmp_path_factory.mktemp("imagenet")
    unpack = shared / "tools" / "unpack_weights.py"
    subprocess.run([sys.executable, unpack, folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory) -> Path:
    """Programs compiled twice in a session, such as by two runs with one configuration, compile once."""
    from jaxcls.parallel import use_compilation_cache

    folder = tmp_path_factory.mktemp("compiled")
    use_compilation_cache(folder)
    return folder


@pytest.fixture(scope="session")
def resnet18(weights, compilation_cache):
    """ResNet-18, trained on ImageNet."""
    from jaxcls.models.pretrained import load_pretrained

    return load_pretrained("resnet18", weights=weights / "resnet18.safetensors")


@pytest.fixture(scope="session")
def feature_cache(tmp_path_factory) -> Path:
    """Where the features of real photos are kept: a set of thousands is worth a minute."""
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="session")
def features_of(shared, resnet18, feature_cache):
    """Call it with the name of a set of real photos to have them, and their features float32 [N, 512]."""
    from jaxcls.data.folder import read_folder
    from jaxcls.feature_cache import features_of

    return lambda name: features_of(resnet18, read_folder(shared / "data" / name), feature_cache)


@pytest.fixture(scope="session")
def compiled_once(compilation_cache) -> dict[str, str]:
    """Environment variables of a process that keeps no programs by itself, with which it uses the cache."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(compilation_cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


def write_photos(folder: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """Write noisy photos of one plain colour per class, 40 x 48 pixels, as `folder/CLASS/NUMBER.png`."""
    generator = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = generator.integers(0, 100, (40, 48, 3), np.uint8)
            pixels[..., ("red", "green", "blue").index(name)] += 120
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def draw(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """A picture of blurred blots in all colours and sizes."""
    generator = np.random.default_rng(seed)
    layers = [
        Image.fromarray(generator.integers(0, 256, (rows, rows, 3), np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        for rows in (5, 11, 23)
    ]
    return Image.fromarray(np.mean([np.asarray(layer) for layer in layers], axis=0).astype(np.uint8))


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A dataset of 8 red and 8 blue photos, in files."""
    from jaxcls.data.folder import read_folder

    return read_folder(write_photos(tmp_path_factory.mktemp("photos"), {"blue": 8, "red": 8}))


@pytest.fixture(scope="session")
def backbone(compilation_cache):
    """An untrained ResNet-18 for 32 x 32 pixels."""
    from jaxcls.classifier import create_model

    return create_model("resnet18", 2, image_size=32).backbone


@pytest.fixture(scope="module")
def world(tmp_path_factory, compilation_cache) -> Path:
    """Photos, photos to evaluate on (7: no whole number of batches), and the network to start from."""
    from jaxcls.classifier import create_model

    folder = tmp_path_factory.mktemp("world")
    write_photos(folder / "photos", {"blue": 8, "red": 9})
    write_photos(folder / "eval", {"blue": 3, "red": 4}, seed=1)
    create_model("resnet18", 2, image_size=32).save(folder / "start")
    return folder


CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="session")
def served_model(tmp_path_factory, compilation_cache) -> Path:
    """A saved classifier of three classes, an untrained ResNet-18 for 32 x 32 pixels."""
    from jaxcls.classifier import create_model

    return create_model("resnet18", CLASSES, image_size=32).save(
        tmp_path_factory.mktemp("served") / "colours"
    )


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory, compilation_cache) -> list[Path]:
    """Two saved classifiers: whatever the image, the scores of the first are (1, 0), of the second (2, 0)."""
    from jaxcls.classifier import Head, create_model

    model, folder = create_model("resnet18", 2, image_size=32), tmp_path_factory.mktemp("classifiers")
    paths = []
    for score in (1, 2):
        head = Head(np.zeros_like(model.head.kernel), np.array([score, 0], np.float32))
        paths.append(replace(model, head=head).save(folder / f"{score}.jaxcls"))
    return paths


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> list[Path]:
    """A dozen photos."""
    folder = write_photos(tmp_path_factory.mktemp("pictures"), dict.fromkeys(CLASSES, 4))
    return sorted(folder.rglob("*.png"))


@pytest.fixture(scope="session")
def service_home(tmp_path_factory) -> Path:
    """A JAXCLS_HOME in which a service's programs are compiled once a session."""
    return tmp_path_factory.mktemp("home")


def free_port() -> int:
    """One of this machine's that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


CLUSTER = """
import sys, ray
def start():
    return ray.init(
        "local", num_cpus=4, include_dashboard=False, _temp_dir=sys.argv[1], _node_ip_address="127.0.0.2"
    )
try:
    cluster = start()
except Exception:  # Ray gives a node 30 s, of which a busy machine needs more the first time
    ray.shutdown()
    cluster = start()
print(cluster.address_info["gcs_address"], flush=True)
sys.stdin.read()
ray.shutdown()
"""


@pytest.fixture(scope="session")
def ray_cluster(service_home):
    """The address of a Ray cluster of four cores on this machine, which ends with this process."""
    environment = {
        **os.environ,
        "JAXCLS_HOME": str(service_home),
        # Else those of all clusters on a machine would be the same.
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
    }
    # In /tmp: sockets have names of at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-c", CLUSTER, folder]
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            address = process.stdout.readline().strip()
            assert address, "the cluster did not start; it says why on standard error"
            yield address
            process.communicate()

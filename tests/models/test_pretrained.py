"""The catalogue and its loading, against a hub on this machine that misbehaves."""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http
from safetensors.numpy import save

from jaxcls.errors import UsageError, WeightsError
from jaxcls.models import pretrained
from jaxcls.models.architecture import ARCHITECTURES
from jaxcls.models.port import from_variables
from jaxcls.models.pretrained import CATALOGUE, imagenet_classes, load_pretrained, unverified_names
from jaxcls.models.resnet import init_variables
from jaxcls.preprocess import Preprocess

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def variables():
    return init_variables("resnet18", jax.random.key(0))


@pytest.fixture(scope="module")
def content(variables):
    """A `model.safetensors` of ResNet-18 with 1000 classes."""
    head = (np.ones((512, 1000), np.float32), np.arange(1000, dtype=np.float32))
    return save(from_variables("resnet18", variables, head, "timm"))


# The catalogue


def test_catalogue_rows_are_complete():
    assert set(ARCHITECTURES) <= set(CATALOGUE)
    for name, entry in CATALOGUE.items():
        assert name.split(".")[0] == entry.architecture
        assert entry.architecture in ARCHITECTURES
        assert entry.repository.startswith(f"timm/{entry.architecture}.")
        assert entry.revision is None or re.fullmatch("[0-9a-f]{40}", entry.revision)
        assert entry.sha256 is None or re.fullmatch("[0-9a-f]{64}", entry.sha256)
    modern = [entry for name, entry in CATALOGUE.items() if "." in name]
    assert [entry.architecture for entry in modern] == list(ARCHITECTURES)
    assert {entry.preprocess for entry in modern} == {Preprocess(crop_fraction=0.95, interpolation="bicubic")}
    assert CATALOGUE["resnet50"].preprocess == Preprocess(224, 0.875, "bilinear")
    checksums = [entry.sha256 for entry in CATALOGUE.values() if entry.sha256]
    assert len(set(checksums)) == len(checksums)
    assert unverified_names() == ("resnet101", "resnet152", "resnet101.a1h", "resnet152.a1h")


def test_imagenet_classes_are_a_thousand_different_names():
    names = imagenet_classes()
    assert len(names) == 1000
    assert len({name.casefold() for name in names}) == 1000
    assert (names[0], names[1], names[999]) == ("tench", "goldfish", "toilet tissue")
    assert (names[134], names[517]) == ("crane (bird)", "crane (machine)")
    assert (names[638], names[639]) == ("maillot (tights)", "maillot (bathing suit)")


def test_imagenet_classes_are_in_the_order_of_their_synsets(shared):
    text = pretrained.resources.files("jaxcls.models").joinpath("imagenet_classes.txt").read_text("utf-8")
    rows = [line.split("\t") for line in text.splitlines() if not line.startswith("#")]
    lines = (shared / "data" / "imagenet_classes.txt").read_text("utf-8").splitlines()
    expected = [line.split(" ", 1) for line in lines]
    assert [synset for synset, _ in rows] == [synset for synset, _ in expected]
    for (_, words), (_, expected_words) in zip(rows, expected, strict=True):
        assert re.sub(r" \([a-z ]+\)", "", words) == expected_words


# From a file


def test_a_file_needs_no_network(tmp_path, variables, content):
    (path := tmp_path / "mine.safetensors").write_bytes(content)
    backbone = load_pretrained("resnet18.a1", weights=path, image_size=320)
    assert backbone.architecture == "resnet18"
    assert backbone.num_features == 512
    assert backbone.preprocess == Preprocess(320, 0.95, "bicubic")
    assert backbone.pretrained_classes == imagenet_classes()
    sha256 = hashlib.sha256(content).hexdigest()
    assert backbone.provenance == {"name": "resnet18.a1", "source": "mine.safetensors", "sha256": sha256}
    jax.tree.map(np.testing.assert_array_equal, backbone.variables, variables)
    kernel, bias = backbone.pretrained_head
    assert kernel.shape == (512, 1000)
    np.testing.assert_array_equal(bias, np.arange(1000))

    larger = backbone.with_image_size(500)
    assert larger.preprocess == Preprocess(500, 0.95, "bicubic")
    assert larger.variables is backbone.variables


@pytest.mark.parametrize("num_classes", [7, None])
def test_a_file_without_the_imagenet_head_has_no_class_names(tmp_path, variables, num_classes):
    head = num_classes and (np.ones((512, num_classes), np.float32), np.zeros(num_classes, np.float32))
    (path := tmp_path / "w.safetensors").write_bytes(save(from_variables("resnet18", variables, head)))
    backbone = load_pretrained("resnet18", weights=path)
    assert backbone.pretrained_classes is None
    assert (backbone.pretrained_head is None) == (num_classes is None)
    assert num_classes is None or backbone.pretrained_head[0].shape == (512, num_classes)


def test_a_file_of_another_network_is_refused_by_name(tmp_path, content):
    (path := tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(
        WeightsError, match=r"w\.safetensors: .*not of resnet34: these are weights of resnet18"
    ):
        load_pretrained("resnet34", weights=path)
    assert path.exists()


def test_unknown_names_and_sizes():
    with pytest.raises(WeightsError, match=r"'resnet-50'.*did you mean resnet50.*resnet152\.a1h"):
        load_pretrained("resnet-50")
    with pytest.raises(WeightsError, match="'mobilenet' in the catalogue; It has"):
        load_pretrained("mobilenet")
    with pytest.raises(UsageError, match="image size 0"):
        load_pretrained("resnet18", image_size=0)


# From the hub


@dataclass
class Hub:
    """A server that speaks as much of the hub's protocol as a download needs."""

    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    status: int = 200
    served_fraction: float = 1.0  # of a file, in answer to GET
    announces_length: bool = False  # of the whole file, in answer to GET, though only a fraction is sent
    url: str = ""

    def answer(self, request):
        self.requests.append((request.command, request.path))
        content = self.files.get(request.path)
        if content is None or self.status != 200 or "Range" in request.headers:
            request.send_response(404 if content is None else max(self.status, 503))
            if content is None:
                request.send_header("X-Error-Code", "EntryNotFound")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        served = content[: int(len(content) * self.served_fraction)]
        is_head = request.command == "HEAD"
        whole = is_head or self.announces_length
        request.send_response(200)
        request.send_header("Content-Length", str(len(content if whole else served)))
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        request.end_headers()
        if not is_head:
            request.wfile.write(served)
            request.close_connection = True


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that is asked in place of the real one, an empty cache and a home of our own."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            hub.answer(self)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("JAXCLS_HOME", str(tmp_path / "home"))
    # The client waits between its attempts.
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr(
        _http,
        "time",
        SimpleNamespace(
            sleep=lambda _: None,
        ),
    )
    yield hub
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def publish(hub, monkeypatch):
    """Put a file on the hub as the catalogue's only row, "resnet18" unless told otherwise."""

    def publish(content, architecture="resnet18", revision=None, sha256=None):
        entry = replace(
            CATALOGUE["resnet18"],
            architecture=architecture,
            repository="acme/net",
            revision=revision,
            sha256=sha256,
        )
        monkeypatch.setattr(pretrained, "CATALOGUE", {architecture: entry})
        hub.files = {f"/acme/net/resolve/{revision or 'main'}/model.safetensors": content}

    return publish


def test_weights_are_kept_in_our_storage_unless_the_hubs_variables_say_where(
    tmp_path, hub, publish, content, monkeypatch
):
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.delenv("HF_HOME", raising=False)
    publish(content, revision=COMMIT, sha256=hashlib.sha256(content).hexdigest())
    for _ in range(2):
        load_pretrained("resnet18")
    assert [method for method, path in hub.requests if path in hub.files] == ["HEAD", "GET"]
    (weights,) = (tmp_path / "home" / "persistent" / "hub").rglob("model.safetensors")
    assert weights.read_bytes() == content
    assert not (tmp_path / "hub").exists()


def cached_bytes(tmp_path):
    """The size of every file of weights, whole or partial, in the hub's cache."""
    files = [path for path in (tmp_path / "hub").rglob("*") if path.is_file()]
    return sum(
        path.stat().st_size for path in files if path.name != "CACHEDIR.TAG" and "refs" not in path.parts
    )


@pytest.mark.parametrize("revision", [None, COMMIT], ids=["newest", "commit"])
def test_the_second_load_asks_nobody(tmp_path, hub, publish, content, variables, revision):
    sha256 = hashlib.sha256(content).hexdigest()
    publish(content, revision=revision, sha256=sha256)
    backbone = load_pretrained("resnet18")
    assert backbone.provenance == {
        "name": "resnet18",
        "source": "https://huggingface.co/acme/net",
        "revision": COMMIT,
        "sha256": sha256,
        "licence": "BSD-3-Clause",
    }
    assert backbone.pretrained_classes == imagenet_classes()
    jax.tree.map(np.testing.assert_array_equal, backbone.variables, variables)
    fetched = [method for method, path in hub.requests if path in hub.files]
    assert fetched == ["HEAD", "GET"], hub.requests
    hub.requests.clear()
    again = load_pretrained("resnet18")
    assert again.provenance == backbone.provenance
    assert hub.requests == []
    assert not (tmp_path / "home").exists()  # nothing to pin


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ({"files": {}}, "404"),
        ({"status": 500}, "503"),
        ({"served_fraction": 0.5}, "Consistency check failed"),
        ({"served_fraction": 0.5, "announces_length": True}, "503"),
    ],
    ids=["not found", "server error", "short file", "connection lost"],
)
def test_a_failed_download_is_one_error_and_leaves_nothing(tmp_path, hub, publish, content, trouble, reason):
    publish(content)
    vars(hub).update(trouble)
    with pytest.raises(WeightsError, match=rf"resnet18 .*acme/net .*{reason}.*weights=PATH") as caught:
        load_pretrained("resnet18")
    assert "\n" not in str(caught.value)
    assert cached_bytes(tmp_path) == 0
    assert not (tmp_path / "home").exists()
    vars(hub).update(vars(Hub()) | {"url": hub.url})
    publish(content)
    assert load_pretrained("resnet18").provenance["revision"] == COMMIT


def test_a_hub_that_is_down(tmp_path, hub, publish, content, monkeypatch):
    publish(content)
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"  # nobody listens there
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(WeightsError, match=r"could not be fetched.*refused.*weights=PATH"):
        load_pretrained("resnet18")
    assert cached_bytes(tmp_path) == 0


def test_offline_mode_reads_the_cache_only(tmp_path, hub, publish, content, monkeypatch):
    publish(content)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(WeightsError, match=r"HF_HUB_OFFLINE.*weights=PATH"):
        load_pretrained("resnet18")
    assert hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    load_pretrained("resnet18")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    load_pretrained("resnet18")
    assert hub.requests == []


def test_a_file_other_than_the_recorded_one_is_deleted(tmp_path, hub, publish, content):
    publish(content, sha256="0" * 64)
    with pytest.raises(
        WeightsError, match=rf"{hashlib.sha256(content).hexdigest()}, not 0{{64}} as recorded"
    ):
        load_pretrained("resnet18")
    assert cached_bytes(tmp_path) == 0


def test_the_first_download_is_pinned(tmp_path, hub, publish, content):
    publish(content)
    load_pretrained("resnet18")
    pins = tmp_path / "home" / "persistent" / "pinned_weights.json"
    assert json.loads(pins.read_text()) == {"acme/net": hashlib.sha256(content).hexdigest()}
    assert [path.name for path in pins.parent.iterdir()] == [pins.name]
    assert pins.parent.stat().st_mode & 0o777 == 0o700

    other = bytearray(content)
    other[-1] ^= 1
    (tmp_path / "hub").rename(tmp_path / "old hub")
    publish(bytes(other))
    with pytest.raises(
        WeightsError, match=rf"at the first download.*remove acme/net from {re.escape(str(pins))}"
    ):
        load_pretrained("resnet18")
    assert cached_bytes(tmp_path) == 0
    pins.write_text("{}")  # as the message says
    load_pretrained("resnet18")
    assert json.loads(pins.read_text()) == {"acme/net": hashlib.sha256(other).hexdigest()}


def test_a_damaged_file_of_pins_is_named(tmp_path, hub, publish, content):
    publish(content)
    pins = tmp_path / "home" / "persistent" / "pinned_weights.json"
    pins.parent.mkdir(parents=True)
    pins.write_text("{")
    with pytest.raises(WeightsError, match=r"pinned_weights\.json is damaged; delete it"):
        load_pretrained("resnet18")


@pytest.mark.parametrize("is_whole", [True, False], ids=["another network", "no weights"])
def test_what_does_not_fit_is_neither_kept_nor_pinned(tmp_path, hub, publish, content, is_whole):
    publish(content if is_whole else b"<html>Sign in to continue</html>", architecture="resnet34")
    reason = "these are weights of resnet18" if is_whole else "not a whole safetensors file"
    with pytest.raises(WeightsError, match=reason):
        load_pretrained("resnet34")
    assert cached_bytes(tmp_path) == 0
    assert not (tmp_path / "home").exists()

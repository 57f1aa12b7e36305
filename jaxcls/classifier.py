"""`Classifier`: what training produces, and all that prediction, export and serving need."""

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as serialize

from jaxcls.errors import ClassifierError, UsageError
from jaxcls.models.pretrained import Backbone, load_pretrained
from jaxcls.models.resnet import abstract_variables, init_variables, make_apply
from jaxcls.predictions import Kind
from jaxcls.preprocess import Preprocess
from jaxcls.storage import file_sha256

FORMAT = "jaxcls-classifier"
FORMAT_VERSION = 1
MANIFEST, WEIGHTS, PARITY = "classifier.json", "weights.safetensors", "parity.npz"

# Largest difference from the stored scores, relative to their largest magnitude.
PARITY_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
NUM_PARITY_IMAGES = 2


@dataclass(frozen=True, eq=False)
class Head:
    """From features to scores: `features @ kernel + bias`.

    Attributes:
        kernel: float32 [D, K].
        bias: float32 [K].
        kind: what the scores are: "logit" (softmax gives probabilities), "margin" (distance from an
            SVM's hyperplane) or "probability".
        normalize: divide each feature vector by its L2 norm first.
        thresholds: float32 [K] or None. Where the best class's score lies below its threshold, the
            classifier abstains.
    """

    kernel: np.ndarray
    bias: np.ndarray
    kind: Kind = "logit"
    normalize: bool = False
    thresholds: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UsageError(f"kind of scores {self.kind!r}: choose one of {', '.join(get_args(Kind))}")
        if self.kernel.ndim != 2 or self.bias.shape != self.kernel.shape[1:]:
            raise UsageError(
                f"a head needs kernel [D, K] and bias [K], not {self.kernel.shape}, {self.bias.shape}"
            )
        if self.thresholds is not None and self.thresholds.shape != self.bias.shape:
            raise UsageError(f"thresholds need one value for each of {len(self.bias)} classes")


@dataclass(frozen=True, eq=False)
class Classifier:
    """A network, its head, and the names of the K classes.

    Attributes:
        backbone: the trunk with its weights and preprocessing.
        head: features to scores.
        classes: names, in the order of the scores.
        provenance: how it was made: plain values for the manifest.
    """

    backbone: Backbone
    head: Head
    classes: tuple[str, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        are_names = all(isinstance(name, str) for name in self.classes)
        if not (are_names and len(set(self.classes)) == len(self.classes) > 0):
            raise UsageError(f"classes must be one or more names, all different, not {self.classes}")
        expected = (self.backbone.num_features, len(self.classes))
        if self.head.kernel.shape != expected:
            raise UsageError(
                f"the head's kernel is {self.head.kernel.shape}; features and classes need {expected}"
            )

    def __repr__(self) -> str:
        size = self.backbone.preprocess.size
        return f"Classifier({self.backbone.architecture}, {size} px, {len(self.classes)} classes)"

    @property
    def preprocess(self) -> Preprocess:
        """How a photo becomes the network's input."""
        return self.backbone.preprocess

    @property
    def weights(self) -> dict[str, Any]:
        """The first argument of `forward`: a tree of arrays."""
        return {
            "backbone": self.backbone.variables,
            "head": {"kernel": self.head.kernel, "bias": self.head.bias},
        }

    def forward(self, dtype: str) -> "Forward":
        """The function `(weights, images) -> scores`, with convolutions in `dtype`."""
        return Forward(
            self.backbone.architecture, self.preprocess, dtype, len(self.classes), self.head.normalize
        )

    def save(self, path: str | Path) -> Path:
        """Write the classifier as a folder: manifest, weights and parity vectors; return its path.

        A classifier already there is replaced once the new one is complete.

        Raises:
            ClassifierError: something else is there, or the folder cannot be written.
        """
        path = Path(path)
        if path.exists() and not (path / MANIFEST).is_file():
            raise ClassifierError(f"{path} exists and is no saved classifier: choose another path")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
                new, old = Path(scratch) / "new", Path(scratch) / "old"
                new.mkdir()
                self._write(new)
                _put_in_place(new, path, old)
        except OSError as error:
            raise ClassifierError(f"cannot save to {path}: {error}") from error
        return path

    def _write(self, folder: Path) -> None:
        # Contiguous: safetensors writes memory as it lies, whatever the strides.
        arrays = {name: np.ascontiguousarray(value, np.float32) for name, value in _flatten(self.weights)}
        (folder / WEIGHTS).write_bytes(serialize(arrays))
        images = _parity_images(self.preprocess.size)
        scores = jax.jit(self.forward("float32"))(self.weights, images)
        np.savez(folder / PARITY, images=images, scores=np.asarray(scores))
        thresholds = self.head.thresholds
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "architecture": self.backbone.architecture,
            "classes": self.classes,
            "preprocess": self.preprocess.to_json(),
            "head": {
                "kind": self.head.kind,
                "normalize": self.head.normalize,
                "thresholds": None if thresholds is None else thresholds.tolist(),
            },
            "parity_tolerance": PARITY_TOLERANCE,
            "provenance": {"backbone": dict(self.backbone.provenance), **self.provenance},
            "versions": {name: version(name) for name in ("jaxcls", "jax", "flax", "numpy")},
            "sha256": {name: file_sha256(folder / name) for name in (WEIGHTS, PARITY)},
        }
        (folder / MANIFEST).write_text(
            json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def as_backbone(network: Backbone | Classifier) -> Backbone:
    """The backbone itself, or a classifier's."""
    return network.backbone if isinstance(network, Classifier) else network


def load(path: str | Path) -> Classifier:
    """Read a classifier that `Classifier.save` wrote.

    Raises:
        ClassifierError: it is missing, incomplete, damaged (by checksum), or of another format.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    for name in (WEIGHTS, PARITY):
        _check_file(path, name, manifest)
    try:
        weights = unflatten_dict(load_file(path / WEIGHTS), sep="/")
        head = manifest["head"]
        thresholds = head["thresholds"]
        provenance = dict(manifest["provenance"])
        architecture, classes = manifest["architecture"], tuple(manifest["classes"])
        _check_tree(weights["backbone"], abstract_variables(architecture))
        return Classifier(
            backbone=Backbone(
                architecture=architecture,
                variables=weights["backbone"],
                preprocess=Preprocess.from_json(manifest["preprocess"]),
                pretrained_head=None,
                pretrained_classes=None,
                provenance=provenance.pop("backbone"),
            ),
            head=Head(
                weights["head"]["kernel"],
                weights["head"]["bias"],
                head["kind"],
                head["normalize"],
                None if thresholds is None else np.asarray(thresholds, np.float32),
            ),
            classes=classes,
            provenance=provenance,
        )
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError, UsageError) as error:
        raise ClassifierError(f"{path}: {MANIFEST} and {WEIGHTS} do not fit together: {error}") from error


def load_parity(path: str | Path) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """A saved classifier's parity vectors: images uint8 [n, size, size, 3], scores float32 [n, K].

    With them the largest difference allowed, by dtype, relative to the scores' largest magnitude.

    Raises:
        ClassifierError: they are missing or damaged.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    _check_file(path, PARITY, manifest)
    with np.load(path / PARITY, allow_pickle=False) as stored:
        return stored["images"], stored["scores"], manifest["parity_tolerance"]


@dataclass(frozen=True)
class Forward:
    """A pure function `(weights, images uint8 [B, size, size, 3]) -> scores [B, K] or features [B, D]`.

    Two with the same fields are equal, so that one compiled program serves all classifiers of a form.

    Attributes:
        architecture: a key of `ARCHITECTURES`.
        preprocess: its device part runs inside.
        dtype: of the convolutions: "float32" or "bfloat16".
        num_classes: K; None for features.
        normalize: as for `Head`.
    """

    architecture: str
    preprocess: Preprocess
    dtype: str
    num_classes: int | None = None
    normalize: bool = False

    def __call__(self, weights: Any, images: jax.Array) -> jax.Array:
        apply = make_apply(self.architecture, dtype=jnp.dtype(self.dtype))
        features, _ = apply(weights["backbone"], self.preprocess.normalize(images), train=False)
        if self.num_classes is None:
            return features
        return apply_head(weights["head"], features, normalize=self.normalize)


def apply_head(head: Mapping[str, jax.Array], features: jax.Array, *, normalize: bool = False) -> jax.Array:
    """Scores [B, K] of features [B, D], for `head = {"kernel": [D, K], "bias": [K]}`."""
    if normalize:
        features /= jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
    # The product is tiny; HIGHEST keeps accelerators from rounding its inputs.
    return jnp.dot(features, head["kernel"], precision="highest") + head["bias"][None, :]


def init_head(key: jax.Array, num_features: int, num_classes: int) -> dict[str, jax.Array]:
    """Uniform in +-1/sqrt(D), as torch's `Linear`: `{"kernel": [D, K], "bias": [K]}`."""
    bound = 1 / math.sqrt(num_features)
    kernel_key, bias_key = jax.random.split(key)
    return {
        "kernel": jax.random.uniform(kernel_key, (num_features, num_classes), minval=-bound, maxval=bound),
        "bias": jax.random.uniform(bias_key, (num_classes,), minval=-bound, maxval=bound),
    }


def create_model(
    name: str, classes: int | Sequence[str], *, image_size: int = 224, seed: int = 0
) -> Classifier:
    """An untrained classifier.

    Args:
        name: "resnet18", "resnet34", "resnet50", "resnet101" or "resnet152".
        classes: their names, or only their number.
        image_size: in pixels.
        seed: of the random weights.

    Raises:
        UsageError: an unknown name.
    """
    names = tuple(f"class {i}" for i in range(classes)) if isinstance(classes, int) else tuple(classes)
    backbone_key, head_key = jax.random.split(jax.random.key(seed))
    backbone = Backbone(
        architecture=name,
        variables=init_variables(name, backbone_key),
        preprocess=Preprocess(size=image_size),
        pretrained_head=None,
        pretrained_classes=None,
        provenance={"source": f"random weights, seed {seed}"},
    )
    head = jax.device_get(init_head(head_key, backbone.num_features, len(names)))
    return Classifier(backbone, Head(head["kernel"], head["bias"]), names)


def imagenet_classifier(name: str, *, weights: str | Path | None = None) -> Classifier:
    """A pretrained network with the 1000-class head it was published with.

    Args:
        name: as for `load_pretrained`.
        weights: a local file instead of the hub's.

    Raises:
        ClassifierError: the weights carry no 1000-class head.
    """
    backbone = load_pretrained(name, weights=weights)
    if backbone.pretrained_head is None or backbone.pretrained_classes is None:
        raise ClassifierError(f"{weights or name}: these weights carry no ImageNet head: use load_pretrained")
    kernel, bias = backbone.pretrained_head
    head = Head(np.asarray(kernel), np.asarray(bias))
    bare = replace(backbone, pretrained_head=None, pretrained_classes=None)
    return Classifier(bare, head, backbone.pretrained_classes)


def _flatten(weights: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(flatten_dict(weights, sep="/").items())


def _check_tree(variables: Any, expected: Any) -> None:
    found = {name: value.shape for name, value in _flatten(variables)}
    wanted = {name: value.shape for name, value in _flatten(expected)}
    if found != wanted:
        different = sorted(set(found.items()) ^ set(wanted.items()), key=str)
        raise ValueError(
            f"{len(different)} arrays are missing, extra or of another shape, first {different[0]}"
        )


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        within = [folder for folder in path.glob("*") if (folder / MANIFEST).is_file()]
        hint = f"; did you mean {within[0]}?" if within else ""
        what = f"holds no readable {MANIFEST}" if path.exists() else "does not exist"
        raise ClassifierError(f"{path} is no saved classifier: it {what}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise ClassifierError(f"{path / MANIFEST} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ClassifierError(f"{path / MANIFEST} is not the manifest of a {FORMAT}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ClassifierError(
            f"{path} has format {manifest.get('format_version')}, this jaxcls reads {FORMAT_VERSION}: "
            "use the jaxcls that wrote it, or a newer one"
        )
    if not isinstance(manifest.get("sha256"), dict) or set(manifest["sha256"]) != {WEIGHTS, PARITY}:
        raise ClassifierError(f"{path / MANIFEST} does not name the checksums of {WEIGHTS} and {PARITY}")
    return manifest


def _check_file(path: Path, name: str, manifest: Mapping[str, Any]) -> None:
    if not (path / name).is_file():
        raise ClassifierError(f"{path}: {name} is missing: copy the whole folder again")
    if file_sha256(path / name) != manifest["sha256"][name]:
        raise ClassifierError(f"{path}: {name} is damaged (its sha256 is not the manifest's): copy it again")


def _put_in_place(new: Path, path: Path, old: Path) -> None:
    if not path.exists():
        new.rename(path)
        return
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:  # Ctrl-C too: `old` goes with the scratch folder
        old.rename(path)
        raise


def _parity_images(size: int) -> np.ndarray:
    """Smooth gratings, uint8 [n, size, size, 3]: the same wherever they are made."""
    ramp = np.arange(size, dtype=np.int64) * 1024 // size
    rows = np.arange(1, NUM_PARITY_IMAGES + 1)[:, None, None, None] * ramp[None, :, None, None]
    columns = np.arange(1, 4)[None, None, None, :] * ramp[None, None, :, None]
    return ((rows + columns) % 256).astype(np.uint8)

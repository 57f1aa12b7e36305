"""`Classifier`: what training produces, and all that prediction, export and serving need."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as serialize

from jaxcls.errors import ClassifierError, UsageError
from jaxcls.evaluation.thresholds import ALWAYS
from jaxcls.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    PARITY,
    WEIGHTS,
    check_file,
    check_programs,
    read_manifest,
    read_program,
    write_manifest,
    write_program,
)
from jaxcls.models.architecture import abstract_variables, find_architecture
from jaxcls.models.fold import apply_folded, fold_batch_norm
from jaxcls.models.hub import write_hub_folder
from jaxcls.models.precision import PLATFORMS, Platform, Precision, compute_dtype
from jaxcls.models.pretrained import Backbone, load_pretrained
from jaxcls.predictions import Kind
from jaxcls.preprocess import Preprocess
from jaxcls.program import deserialize_program, serialize_program
from jaxcls.storage import file_sha256, whole_folder

Score = Callable[[np.ndarray], np.ndarray]
Calibration = Literal["temperature", "sigmoid"]

# Largest difference from the stored scores, relative to their largest magnitude.
PARITY_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
NUM_PARITY_IMAGES = 2


@dataclass(frozen=True, eq=False)
class Head:
    """From features to scores: `features @ kernel + bias`, made probabilities if it is calibrated.

    Attributes:
        kernel: float32 [D, K].
        bias: float32 [K].
        kind: what the scores are: "logit" (softmax gives probabilities), "margin" (distance from an
            SVM's hyperplane) or "probability".
        normalize: divide each feature vector by its L2 norm first.
        calibration: how products become probabilities, kernel and bias holding what was fitted:
            "temperature", their softmax; "sigmoid", the logistic function of each, divided by the sum;
            None: they are the scores.
        thresholds: float32 [K] or None. Where the best class's score lies below its threshold, the
            classifier abstains.
    """

    kernel: np.ndarray
    bias: np.ndarray
    kind: Kind = "logit"
    normalize: bool = False
    calibration: Calibration | None = None
    thresholds: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UsageError(f"kind of scores {self.kind!r}: choose one of {', '.join(get_args(Kind))}")
        if self.calibration not in (None, *get_args(Calibration)):
            raise UsageError(
                f"calibration {self.calibration!r}: choose one of {', '.join(get_args(Calibration))}"
            )
        if self.calibration is not None and self.kind != "probability":
            raise UsageError(f"a calibrated head gives probabilities, not scores of kind {self.kind!r}")
        if self.kernel.ndim != 2 or self.bias.shape != self.kernel.shape[1:]:
            raise UsageError(
                f"a head needs kernel [D, K] and bias [K], not {self.kernel.shape}, {self.bias.shape}"
            )
        if self.thresholds is not None and self.thresholds.shape != self.bias.shape:
            raise UsageError(f"thresholds need one value for each of {len(self.bias)} classes")

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """Kernel and bias by name, as `apply_head` takes them."""
        return {"kernel": self.kernel, "bias": self.bias}


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
        """All its arrays, as they are saved."""
        return {"backbone": self.backbone.variables, "head": self.head.weights}

    def folded_weights(self, dtype: str) -> dict[str, Any]:
        """The first argument of `forward`: a tree of NumPy arrays, batch norm folded, kernels in `dtype`."""
        folded = fold_batch_norm(self.backbone.variables, jnp.dtype(dtype))
        return {"backbone": folded, "head": self.head.weights}

    @property
    def forward(self) -> "Forward":
        """The function `(folded_weights, images) -> scores`."""
        return Forward(
            self.backbone.architecture,
            self.preprocess,
            len(self.classes),
            self.head.normalize,
            self.head.calibration,
        )

    def with_thresholds(self, thresholds: Mapping[str, float]) -> "Classifier":
        """This classifier with other thresholds: it abstains where its best class scores below its own.

        Args:
            thresholds: class -> lowest score at which it is answered, in the units of the scores. Classes
                that it does not name are always answered; {}: all of them.

        Raises:
            UsageError: a class that the classifier does not have, or a threshold that is NaN.
        """
        if unknown := [name for name in thresholds if name not in self.classes]:
            raise UsageError(f"thresholds: no class {unknown[0]!r}; known are {', '.join(self.classes)}")
        if wrong := [name for name, value in thresholds.items() if math.isnan(value)]:
            raise UsageError(f"thresholds: that of {wrong[0]!r} is NaN")
        values = np.asarray([thresholds.get(name, ALWAYS) for name in self.classes], np.float32)
        return replace(self, head=replace(self.head, thresholds=values if thresholds else None))

    def save(self, path: str | Path) -> Path:
        """Write the classifier as a folder: manifest, weights and parity vectors; return its path.

        A classifier already there is replaced once the new one is complete.

        Raises:
            ClassifierError: something else is there, or the folder cannot be written.
        """
        path = Path(path)
        _require_replaceable(path)
        try:
            with whole_folder(path, replace=True) as folder:
                self._write(folder)
                _require_replaceable(path)  # still, after a while
        except OSError as error:
            raise ClassifierError(f"cannot save to {path}: {error}") from error
        return path

    def _write(self, folder: Path) -> None:
        # Contiguous: safetensors writes memory as it lies, whatever the strides.
        arrays = {
            name: np.ascontiguousarray(value, np.float32) for name, value in _flatten(self.weights).items()
        }
        (folder / WEIGHTS).write_bytes(serialize(arrays))
        images = _parity_images(self.preprocess.size)
        np.savez(folder / PARITY, images=images, scores=_unfolded_scores(self, images))
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
                "calibration": self.head.calibration,
                "thresholds": None if thresholds is None else thresholds.tolist(),
            },
            "parity_tolerance": PARITY_TOLERANCE,
            "provenance": {"backbone": dict(self.backbone.provenance), **self.provenance},
            "versions": {name: version(name) for name in ("jaxcls", "jax", "flax", "numpy")},
            "sha256": {name: file_sha256(folder / name) for name in (WEIGHTS, PARITY)},
        }
        write_manifest(folder, manifest)

    def export(
        self,
        path: str | Path,
        platforms: Sequence[Platform] = PLATFORMS,
        *,
        precision: Precision = "auto",
    ) -> tuple[Path, ...]:
        """Write `jax.export` programs that score, one for each platform, into the saved classifier at `path`.

        `load_program` runs them. They hold no weights, and their batch size is symbolic. One for the
        platform that JAX runs on here must score the stored parity vectors before it is written. Earlier
        ones for these platforms are replaced.

        Args:
            path: where this classifier was saved.
            platforms: "cpu", "cuda" or both; none of them is needed to write its program.
            precision: of the convolutions; "auto" is float32 for "cpu" and bfloat16 for "cuda".

        Returns:
            The files, `path/program/PLATFORM.bin`.

        Raises:
            ClassifierError: no classifier or another one is saved there, or a file cannot be written.
            UsageError: an unknown platform or precision, or none.
        """
        path = Path(path)
        if not platforms or not set(platforms) <= set(PLATFORMS):
            raise UsageError(f"platforms {tuple(platforms)}: choose from {', '.join(PLATFORMS)}")
        dtypes = {platform: np.dtype(compute_dtype(precision, platform)).name for platform in platforms}
        if not _are_alike(load(path), self):
            raise ClassifierError(f"{path} holds another classifier: save this one first")
        programs = {platform: self._serialize(platform, dtype) for platform, dtype in dtypes.items()}
        here = jax.export.default_export_platform()
        if here in programs:
            compare_with_parity(self._score_with(programs[here], here, dtypes[here]), path, dtypes[here])
        try:
            return tuple(
                write_program(path, platform, program, dtypes[platform])
                for platform, program in programs.items()
            )
        except OSError as error:
            raise ClassifierError(f"cannot export to {path}: {error}") from error

    def _serialize(self, platform: Platform, dtype: str) -> bytes:
        return serialize_program(self.forward, self.folded_weights(dtype), self.preprocess.size, platform)

    def _score_with(self, program: bytes, platform: str, dtype: str) -> Score:
        """The scoring function that `program` is with this classifier's weights."""
        weights = self.folded_weights(dtype)
        call = deserialize_program(program, weights, self.preprocess.size, platform)
        weights = jax.device_put(weights)

        def score(images: np.ndarray) -> np.ndarray:
            self.preprocess.check_images(images)
            if not len(images):
                raise UsageError("no images to score")
            return np.asarray(call(weights, images))

        return score

    def export_hub(self, path: str | Path) -> Path:
        """Write a new folder that Hugging Face transformers loads, and return its path.

        `ResNetForImageClassification.from_pretrained(path)` gives the same scores as logits, and
        `AutoImageProcessor.from_pretrained(path)` nearly the same pixels: its centre crop rounds half a pixel
        down where this one rounds to even, so that of some photos it lies one pixel apart, and it decodes
        large JPEGs in full where jaxcls decodes them at a smaller scale. What a folder of theirs cannot say,
        such as thresholds, its README.md does.

        Raises:
            UsageError: the head normalises features, which no network of theirs does; or the path exists.
            ClassifierError: the folder cannot be written.
        """
        if self.head.normalize:
            raise UsageError(
                "this head divides features by their norm, which no network of transformers does: "
                "train one without (jaxcls svm without --normalize-features)"
            )
        head = (self.head.kernel, self.head.bias)
        return write_hub_folder(path, self.backbone, head, self.classes, self.hub_notes)

    @property
    def hub_notes(self) -> tuple[str, ...]:
        """What is lost in the folder that `export_hub` writes."""
        notes = []
        if self.head.calibration == "sigmoid":
            notes.append(
                "The outputs named logits want the logistic function, divided by its sum over the classes: "
                "their order is right, but the softmax that an image-classification pipeline reports is not "
                "this classifier's probability."
            )
        elif self.head.kind != "logit" and self.head.calibration is None:
            notes.append(
                f"The outputs named logits are each class's {self.head.kind}: their order is right, but "
                "the softmax that an image-classification pipeline reports is no probability."
            )
        if self.head.thresholds is not None:
            notes.append("The thresholds below which the classifier abstains are left out.")
        return tuple(notes)


def _require_replaceable(path: Path) -> None:
    if path.exists() and not (path / MANIFEST).is_file():
        raise ClassifierError(f"{path} exists and is no saved classifier: choose another path")


def as_backbone(network: Backbone | Classifier) -> Backbone:
    """The backbone itself, or a classifier's."""
    return network.backbone if isinstance(network, Classifier) else network


def load(path: str | Path) -> Classifier:
    """Read a classifier that `Classifier.save` wrote.

    Raises:
        ClassifierError: it is missing, incomplete, damaged (by checksum, programs included), or of
            another format.
    """
    path = Path(path)
    manifest = read_manifest(path)
    for name in (WEIGHTS, PARITY):
        check_file(path, name, manifest)
    check_programs(path, manifest)
    try:
        arrays = load_file(path / WEIGHTS)
        head = manifest["head"]
        thresholds = head["thresholds"]
        provenance = dict(manifest["provenance"])
        architecture, classes = manifest["architecture"], tuple(manifest["classes"])
        weights = _unflatten(arrays, _abstract_weights(architecture, len(classes)))
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
                head.get("calibration"),
                None if thresholds is None else np.asarray(thresholds, np.float32),
            ),
            classes=classes,
            provenance=provenance,
        )
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError, UsageError) as error:
        raise ClassifierError(f"{path}: {MANIFEST} and {WEIGHTS} do not fit together: {error}") from error


def load_program(path: str | Path) -> Score:
    """Read the program that `Classifier.export` wrote for the platform at hand, and the saved weights.

    The network is not traced again. Unlike `make_scorer`'s, the program is compiled for
    each batch size B at its first use.

    Returns:
        A function of uint8 [B, size, size, 3], preprocessed as for `make_scorer`, to scores float32
        [B, K]. It raises UsageError for images of another dtype or shape.

    Raises:
        ClassifierError: there is no program for this platform; it is damaged, or does not fit the
            weights or the installed JAX; or what `load` raises.
    """
    path, platform = Path(path), jax.export.default_export_platform()
    classifier, (program, dtype) = load(path), read_program(path, platform)
    try:
        return classifier._score_with(program, platform, dtype)
    except ValueError as error:
        raise ClassifierError(
            f"{path}: its program for {platform} is of no use here: {error}; "
            f"write it anew with `jaxcls export {path} --platforms {platform}`"
        ) from error


def compare_with_parity(score: Score, path: str | Path, dtype: str) -> float:
    """Score the parity vectors saved at `path` and return the largest relative difference.

    Args:
        score: maps uint8 [n, size, size, 3] to float32 [n, K].
        path: a saved classifier.
        dtype: of the convolutions, which sets the tolerance: "float32" or "bfloat16".

    Raises:
        ClassifierError: the difference exceeds the tolerance.
    """
    images, expected, tolerances = load_parity(path)
    difference = float(np.abs(score(images) - expected).max() / np.abs(expected).max())
    if not difference <= tolerances[dtype]:
        allowed = f"{tolerances[dtype]}" + ("; try precision float32" if dtype == "bfloat16" else "")
        raise ClassifierError(
            f"{path}: scores differ from the saved ones by {difference:.1e}, allowed {allowed}"
        )
    return difference


def load_parity(path: str | Path) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """A saved classifier's parity vectors: images uint8 [n, size, size, 3], scores float32 [n, K].

    With them the largest difference allowed, by dtype, relative to the scores' largest magnitude.

    Raises:
        ClassifierError: they are missing or damaged.
    """
    path = Path(path)
    manifest = read_manifest(path)
    check_file(path, PARITY, manifest)
    with np.load(path / PARITY, allow_pickle=False) as stored:
        return stored["images"], stored["scores"], manifest["parity_tolerance"]


@dataclass(frozen=True)
class Forward:
    """A pure function `(weights, images uint8 [B, size, size, 3]) -> scores [B, K] or features [B, D]`.

    `weights` is `{"backbone", "head"}`: of `fold_batch_norm`, and the head's kernel and bias.
    Two with the same fields are equal, so that one compiled program serves all classifiers of a form.

    Attributes:
        architecture: a key of `ARCHITECTURES`.
        preprocess: its device part runs inside.
        num_classes: K; None for features.
        normalize, calibration: as for `Head`.
        num_at_once: as for `apply_folded`.
    """

    architecture: str
    preprocess: Preprocess
    num_classes: int | None = None
    normalize: bool = False
    calibration: Calibration | None = None
    num_at_once: int | None = None

    def __call__(self, weights: Any, images: jax.Array) -> jax.Array:
        pixels = self.preprocess.normalize(images)
        features = apply_folded(weights["backbone"], pixels, self.num_at_once)
        if self.num_classes is None:
            return features
        return apply_head(weights["head"], features, normalize=self.normalize, calibration=self.calibration)


def apply_head(
    head: Mapping[str, jax.Array],
    features: jax.Array,
    *,
    normalize: bool = False,
    calibration: Calibration | None = None,
) -> jax.Array:
    """Scores [B, K] of features [B, D], for `head = {"kernel": [D, K], "bias": [K]}`; see `Head`."""
    if normalize:
        features /= jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
    # The product is tiny; HIGHEST keeps accelerators from rounding its inputs.
    scores = jnp.dot(features, head["kernel"], precision="highest") + head["bias"][None, :]
    return scores if calibration is None else calibrated(scores, calibration)


def calibrated(scores: jax.Array, calibration: Calibration) -> jax.Array:
    """Probabilities [B, K] of a calibrated head's products [B, K]."""
    if calibration == "temperature":
        return jax.nn.softmax(scores)
    chances = jnp.maximum(jax.nn.sigmoid(scores), jnp.finfo(scores.dtype).tiny)
    return chances / chances.sum(-1, keepdims=True)


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
    from jaxcls.models.resnet import init_variables  # loads Flax

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


def _unfolded_scores(classifier: Classifier, images: np.ndarray) -> np.ndarray:
    """What `Classifier.forward` must reproduce in float32: scores of the network as it was trained."""
    from jaxcls.models.resnet import make_apply  # loads Flax

    @jax.jit
    def score(weights: Any, images: jax.Array) -> jax.Array:
        apply = make_apply(classifier.backbone.architecture)
        features, _ = apply(weights["backbone"], classifier.preprocess.normalize(images), train=False)
        head = classifier.head
        return apply_head(weights["head"], features, normalize=head.normalize, calibration=head.calibration)

    return np.asarray(score(classifier.weights, images))


def _abstract_weights(architecture: str, num_classes: int) -> dict[str, Any]:
    """The tree of `Classifier.weights` with `jax.ShapeDtypeStruct` leaves."""
    shapes = {"kernel": (find_architecture(architecture).num_features, num_classes), "bias": (num_classes,)}
    head = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    return {"backbone": abstract_variables(architecture), "head": head}


def _flatten(weights: Mapping[str, Any]) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(weights)}


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _are_alike(one: Classifier, other: Classifier) -> bool:
    """Whether their scores are equal: of one form, with equal weights."""
    if one.forward != other.forward:
        return False
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, one.weights, other.weights)))


def _unflatten(arrays: Mapping[str, np.ndarray], expected: Any) -> Any:
    """The tree `expected` with these arrays, which must have its names and shapes."""
    found = {name: value.shape for name, value in arrays.items()}
    wanted = {name: value.shape for name, value in _flatten(expected).items()}
    if found != wanted:
        different = sorted(set(found.items()) ^ set(wanted.items()), key=str)
        raise ValueError(
            f"{len(different)} arrays are missing, extra or of another shape, first {different[0]}"
        )
    return jax.tree.map_with_path(lambda path, _: arrays[_name(path)], expected)


def _parity_images(size: int) -> np.ndarray:
    """Smooth gratings, uint8 [n, size, size, 3]: the same wherever they are made."""
    ramp = np.arange(size, dtype=np.int64) * 1024 // size
    rows = np.arange(1, NUM_PARITY_IMAGES + 1)[:, None, None, None] * ramp[None, :, None, None]
    columns = np.arange(1, 4)[None, None, None, :] * ramp[None, None, :, None]
    return ((rows + columns) % 256).astype(np.uint8)

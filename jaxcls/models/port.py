"""ResNet weights between torch's state dicts and Flax variables.

Three layouts of names are known: torchvision's, timm's (the same, for plain
ResNets) and Hugging Face transformers'. All arrays are NumPy, on the host.
"""

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from jaxcls.errors import MissingExtraError, UsageError, WeightsError
from jaxcls.models.architecture import ARCHITECTURES, abstract_variables, find_architecture

Layout = Literal["torchvision", "timm", "transformers"]
Head = tuple[np.ndarray, np.ndarray]
Shape = tuple[int, ...]
FlaxPath = tuple[str, ...]

MAX_BYTES = 4 << 30
MAX_DIFFERENCES = 10

# Flax module -> torch module. `stage` counts from 1, `stage0` and `block0` from 0.
_TORCHVISION_NAMES = {
    "conv": "conv1",
    "norm": "bn1",
    "conv1": "layer{stage}.{block0}.conv1",
    "norm1": "layer{stage}.{block0}.bn1",
    "conv2": "layer{stage}.{block0}.conv2",
    "norm2": "layer{stage}.{block0}.bn2",
    "conv3": "layer{stage}.{block0}.conv3",
    "norm3": "layer{stage}.{block0}.bn3",
    "shortcut_conv": "layer{stage}.{block0}.downsample.0",
    "shortcut_norm": "layer{stage}.{block0}.downsample.1",
    "head": "fc",
}
_TRANSFORMERS_NAMES = {
    "conv": "resnet.embedder.embedder.convolution",
    "norm": "resnet.embedder.embedder.normalization",
    "conv1": "resnet.encoder.stages.{stage0}.layers.{block0}.layer.0.convolution",
    "norm1": "resnet.encoder.stages.{stage0}.layers.{block0}.layer.0.normalization",
    "conv2": "resnet.encoder.stages.{stage0}.layers.{block0}.layer.1.convolution",
    "norm2": "resnet.encoder.stages.{stage0}.layers.{block0}.layer.1.normalization",
    "conv3": "resnet.encoder.stages.{stage0}.layers.{block0}.layer.2.convolution",
    "norm3": "resnet.encoder.stages.{stage0}.layers.{block0}.layer.2.normalization",
    "shortcut_conv": "resnet.encoder.stages.{stage0}.layers.{block0}.shortcut.convolution",
    "shortcut_norm": "resnet.encoder.stages.{stage0}.layers.{block0}.shortcut.normalization",
    "head": "classifier.1",
}
_MODULE_NAMES: Mapping[str, Mapping[str, str]] = {
    "torchvision": _TORCHVISION_NAMES,
    "timm": _TORCHVISION_NAMES,
    "transformers": _TRANSFORMERS_NAMES,
}
_LEAF_NAMES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}
# The axes of a Flax array in torch's order: HWIO -> OIHW, [D, K] -> [K, D].
_TORCH_AXES = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}

_HEAD_KERNEL = ("params", "head", "kernel")
_HEAD_BIAS = ("params", "head", "bias")


@dataclass(frozen=True, eq=False)
class Ported:
    """Weights of one ResNet as the trunk's variables and the head apart.

    Args:
        variables: `{"params", "batch_stats"}`, float32 NumPy arrays.
        head: kernel [D, K] and bias [K], float32; None where the weights came without one.
    """

    variables: dict[str, Any]
    head: Head | None


def to_variables(architecture: str, state: Mapping[str, np.ndarray]) -> Ported:
    """Turn a torch state dict into Flax variables; the layout is recognised from the names.

    A `module.` before every name is taken off, and `num_batches_tracked` is left out.

    Args:
        architecture: a key of `ARCHITECTURES`.
        state: {torch name: floating-point array}.

    Raises:
        WeightsError: names or shapes that are not this network's: each missing one is
            listed with "-", each extra one with "+". Also values that no weight can have.
        UsageError: an unknown architecture.
    """
    find_architecture(architecture)
    state = _canonical(state)
    layout: Layout = "transformers" if any(name.startswith("resnet.") for name in state) else "torchvision"
    num_classes = _num_classes(layout, state)
    found = {name: np.shape(value) for name, value in state.items()}
    if found != _torch_shapes(architecture, layout, num_classes):
        raise WeightsError(_mismatch(architecture, layout, num_classes, found))
    names = {path: _torch_name(layout, path) for path in _flax_shapes(architecture, num_classes)}
    flat = {path: _from_torch(name, state[name]) for path, name in names.items()}
    head = (flat.pop(_HEAD_KERNEL), flat.pop(_HEAD_BIAS)) if num_classes is not None else None
    variables = jax.tree.map_with_path(lambda path, _: flat[_names(path)], abstract_variables(architecture))
    return Ported(variables, head)


def from_variables(
    architecture: str, variables: Mapping[str, Any], head: Head | None, layout: Layout = "torchvision"
) -> dict[str, np.ndarray]:
    """Turn Flax variables into a torch state dict: the exact inverse of `to_variables`.

    Args:
        architecture: a key of `ARCHITECTURES`.
        variables: `{"params", "batch_stats"}` of the trunk.
        head: kernel [D, K] and bias [K], or None to leave the head out.
        layout: whose names to use: "torchvision", "timm" or "transformers".

    Raises:
        WeightsError: `variables` or `head` are not this network's.
        UsageError: an unknown architecture or layout.
    """
    if layout not in _MODULE_NAMES:
        raise UsageError(f"there is no layout {layout!r}: use one of {', '.join(_MODULE_NAMES)}")
    flat = _flatten(variables)
    if head is not None:
        flat[_HEAD_KERNEL], flat[_HEAD_BIAS] = head
    shapes = _flax_shapes(architecture, None if head is None else np.size(head[1]))
    if {path: np.shape(leaf) for path, leaf in flat.items()} != shapes:
        raise WeightsError(f"the variables and head to write are not those of {architecture}")
    return {_torch_name(layout, path): _to_torch(np.asarray(leaf)) for path, leaf in flat.items()}


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Read {name: array} from a `.safetensors`, `.pth` or `.pt` file, of any origin.

    Floating-point tensors become float32. A dict kept under "state_dict" or "model" is unwrapped.
    Nothing in the file is run.

    Raises:
        WeightsError: a missing, damaged or unsuitable file.
        MissingExtraError: a `.pth` or `.pt` file where torch is not installed.
    """
    path = Path(path)
    readers = {".safetensors": _read_safetensors, ".pth": _read_torch, ".pt": _read_torch}
    if path.suffix not in readers:
        raise WeightsError(f"{path}: weights are read from {', '.join(readers)} files only")
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such file")
    if path.stat().st_size > MAX_BYTES:
        raise WeightsError(f"{path}: larger than {MAX_BYTES >> 30} GiB, more than any ResNet here needs")
    return readers[path.suffix](path)


_SAFETENSORS_FLOATS = {"F16": np.float16, "BF16": jnp.bfloat16, "F32": np.float32, "F64": np.float64}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    # Not safetensors.numpy.load_file: NumPy alone has no bfloat16.
    try:
        tensors = safetensors.deserialize(path.read_bytes())
        return {name: _decode(**tensor) for name, tensor in tensors}
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file of weights ({error})") from error


def _decode(dtype: str, shape: list[int], data: bytearray) -> np.ndarray:
    if dtype == "I64":  # num_batches_tracked
        return np.ndarray(shape, "<i8", data)
    if dtype not in _SAFETENSORS_FLOATS:
        raise ValueError(f"it holds {dtype} tensors")
    return np.ndarray(shape, _SAFETENSORS_FLOATS[dtype], data).astype(np.float32)


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError(
            "torch", f"reading {path.suffix} files", "pip install 'jaxcls[peers]'"
        ) from error
    try:
        _refuse_compression(path)
        tensors = _unwrap(torch.load(path, map_location="cpu", weights_only=True))
        # A tensor of stride 0 claims any size for one stored number.
        if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > path.stat().st_size:
            raise ValueError("its tensors claim to be larger than the file")
        return {
            name: (tensor.detach().float() if tensor.is_floating_point() else tensor).numpy()
            for name, tensor in tensors.items()
        }
    except Exception as error:  # torch.load has no error of its own: any kind escapes from a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise WeightsError(f"{path}: not a whole file of plain torch tensors ({reason})") from error


def _refuse_compression(path: Path) -> None:
    """torch never compresses; a file that does may unpack to any size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed")


def _unwrap(loaded: Any) -> dict[str, Any]:
    """The {name: tensor} in what torch.load returned."""
    import torch

    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise ValueError(f"it holds a {type(loaded).__name__}, not a state dict")
    for name, tensor in loaded.items():
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor)):
            raise ValueError(f"its entry {name!r} is not a tensor")
    return dict(loaded)


def _canonical(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Drop what is no weight and the prefixes that wrappers add; give a bare transformers trunk its own."""
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    if all(name.startswith(("embedder.", "encoder.")) for name in state):
        state = {f"resnet.{name}": value for name, value in state.items()}
    return state


def _num_classes(layout: Layout, state: Mapping[str, np.ndarray]) -> int | None:
    """K, as whatever there is of a head has it; None without a head."""
    for path in (_HEAD_BIAS, _HEAD_KERNEL):
        name = _torch_name(layout, path)
        if name in state:
            return len(np.atleast_1d(state[name]))
    return None


def _flatten(variables: Mapping[str, Any]) -> dict[FlaxPath, Any]:
    return {_names(path): leaf for path, leaf in jax.tree.leaves_with_path(variables)}


def _names(path: tuple[Any, ...]) -> FlaxPath:
    return tuple(entry.key for entry in path)


def _flax_shapes(architecture: str, num_classes: int | None) -> dict[FlaxPath, Shape]:
    """{path: shape} of a trunk, and of its head where it has classes."""
    shapes = {path: leaf.shape for path, leaf in _flatten(abstract_variables(architecture)).items()}
    if num_classes is not None:
        shapes[_HEAD_KERNEL] = (find_architecture(architecture).num_features, num_classes)
        shapes[_HEAD_BIAS] = (num_classes,)
    return shapes


def _torch_shapes(architecture: str, layout: Layout, num_classes: int | None) -> dict[str, Shape]:
    return {
        _torch_name(layout, path): tuple(shape[axis] for axis in _TORCH_AXES[len(shape)])
        for path, shape in _flax_shapes(architecture, num_classes).items()
    }


def _torch_name(layout: Layout, path: FlaxPath) -> str:
    """The torch name of e.g. ("params", "stage2", "block1", "conv1", "kernel")."""
    collection, *places, module, leaf = path
    stage, block = map(int, re.findall(r"\d+", "/".join(places)) or (0, 0))  # the stem and the head have none
    torch_module = _MODULE_NAMES[layout][module].format(stage=stage, stage0=stage - 1, block0=block - 1)
    return f"{torch_module}.{_LEAF_NAMES[collection, leaf]}"


def _to_torch(leaf: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(leaf.transpose(_TORCH_AXES[leaf.ndim]))


def _from_torch(name: str, value: np.ndarray) -> np.ndarray:
    if not np.issubdtype(value.dtype, np.floating):
        raise WeightsError(f"{name} holds {value.dtype}, not floating-point weights")
    with np.errstate(over="ignore"):
        value = value.astype(np.float32, copy=False)
    if not np.isfinite(value).all() or (name.endswith("running_var") and (value < 0).any()):
        raise WeightsError(
            f"{name} holds values that no trained weight has: NaN, infinity or a variance below 0"
        )
    return np.ascontiguousarray(value.transpose(np.argsort(_TORCH_AXES[value.ndim])))


def _mismatch(architecture: str, layout: Layout, num_classes: int | None, found: Mapping[str, Shape]) -> str:
    """Say which other network the weights fit, or that they fit none, and some of the differences."""
    fitting = [name for name in ARCHITECTURES if found == _torch_shapes(name, layout, num_classes)]
    verdict = (
        f"these are weights of {fitting[0]}: name that (--backbone {fitting[0]})"
        if fitting
        else "they fit no ResNet known here"
    )
    wanted = _torch_shapes(architecture, layout, num_classes).items()
    differences = [
        *((name, "-", shape) for name, shape in wanted - found.items()),
        *((name, "+", shape) for name, shape in found.items() - wanted),
    ]
    lines = [f"  {sign} {name} {list(shape)}" for name, sign, shape in sorted(differences)[:MAX_DIFFERENCES]]
    if len(differences) > MAX_DIFFERENCES:
        lines.append(f"  and {len(differences) - MAX_DIFFERENCES} more differences")
    return "\n".join([f"the weights are not of {architecture}: {verdict} (- missing, + extra):", *lines])

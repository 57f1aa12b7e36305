"""A ResNet as the folder that Hugging Face transformers reads: configuration, preprocessing and weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from jaxcls.errors import ClassifierError, UsageError
from jaxcls.models.architecture import (
    BOTTLENECK_EXPANSION,
    NUM_STAGES,
    STEM_FEATURES,
    find_architecture,
)
from jaxcls.models.port import Head, from_variables
from jaxcls.models.pretrained import HUB_FILE, Backbone
from jaxcls.preprocess import INTERPOLATIONS, Preprocess
from jaxcls.storage import whole_folder


def write_hub_folder(
    path: str | Path, backbone: Backbone, head: Head, classes: Sequence[str], notes: Sequence[str] = ()
) -> Path:
    """Write config.json, preprocessor_config.json, model.safetensors and README.md as a new folder.

    Args:
        path: the folder; returned.
        backbone: the trunk with its weights and preprocessing.
        head: kernel [D, K] and bias [K].
        classes: K names.
        notes: sentences for README.md.

    Raises:
        UsageError: the path exists.
        ClassifierError: the folder cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise UsageError(f"{path} exists: give a new folder")
    weights = from_variables(backbone.architecture, backbone.variables, head, "transformers")
    # Nothing reads these counters, but without them transformers reports weights as missing.
    for name in [name for name in weights if name.endswith("running_mean")]:
        weights[name.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
    try:
        with whole_folder(path) as folder:
            # transformers refuses a file that does not say whose tensors it holds.
            (folder / HUB_FILE).write_bytes(save(weights, metadata={"format": "pt"}))
            _write_json(folder / "config.json", _config(backbone.architecture, classes))
            _write_json(folder / "preprocessor_config.json", _processor(backbone.preprocess))
            (folder / "README.md").write_text(_model_card(backbone, notes), encoding="utf-8")
    except OSError as error:
        raise ClassifierError(f"cannot export to {path}: {error}") from error
    return path


def _config(architecture: str, classes: Sequence[str]) -> dict[str, Any]:
    depth = find_architecture(architecture)
    expansion = BOTTLENECK_EXPANSION if depth.bottleneck else 1
    return {
        "architectures": ["ResNetForImageClassification"],
        "model_type": "resnet",
        "layer_type": "bottleneck" if depth.bottleneck else "basic",
        "embedding_size": STEM_FEATURES,
        "hidden_sizes": [STEM_FEATURES * 2**stage * expansion for stage in range(NUM_STAGES)],
        "depths": depth.stage_sizes,
        "downsample_in_bottleneck": False,  # v1.5: the stride is the 3x3 convolution's
        "id2label": dict(enumerate(classes)),
        "label2id": {name: index for index, name in enumerate(classes)},
    }


def _processor(preprocess: Preprocess) -> dict[str, Any]:
    # Not ResNet's usual ConvNextImageProcessor: from 384 pixels on that one squeezes instead of cropping.
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": preprocess.short_side},
        "resample": int(INTERPOLATIONS[preprocess.interpolation]),
        "do_center_crop": True,
        "crop_size": {"height": preprocess.size, "width": preprocess.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": preprocess.mean,
        "image_std": preprocess.std,
    }


def _model_card(backbone: Backbone, notes: Sequence[str]) -> str:
    origin = [f"- {name}: {value}" for name, value in backbone.provenance.items()]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: image-classification",
            "---",
            "",
            f"A {backbone.architecture} image classifier, exported by jaxcls. Its backbone's weights:",
            "",
            *origin,
            *(f"\n{note}" for note in notes),
            "",
        ]
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

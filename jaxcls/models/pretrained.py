"""Pretrained ResNets: the catalogue, and `load_pretrained` from the Hugging Face hub, its cache or a file."""

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np

from jaxcls.errors import WeightsError
from jaxcls.models.architecture import ARCHITECTURES
from jaxcls.models.port import Ported, read_state_dict, to_variables
from jaxcls.preprocess import Preprocess
from jaxcls.storage import Storage, file_sha256, make_private_folder, write_whole

HUB_FILE = "model.safetensors"
PINS_FILE = "pinned_weights.json"


@dataclass(frozen=True, eq=False)
class Backbone:
    """A network without its head, and all that is needed to use it.

    Args:
        architecture: a key of `ARCHITECTURES`.
        variables: `{"params", "batch_stats"}` of the trunk, float32.
        preprocess: what the network expects of its input.
        pretrained_head: kernel [D, K] and bias [K] as trained with the trunk, or None.
        pretrained_classes: the names of its K classes, or None where they are not known.
        provenance: where the weights come from: name, source, revision, sha256, licence, as far as known.
    """

    architecture: str
    variables: Any
    preprocess: Preprocess
    pretrained_head: tuple[np.ndarray, np.ndarray] | None
    pretrained_classes: tuple[str, ...] | None
    provenance: Mapping[str, str]

    def __repr__(self) -> str:
        return f"Backbone({self.provenance.get('name', self.architecture)}, {self.preprocess.size} px)"

    @property
    def num_features(self) -> int:
        """D, the width of the pooled features: 512 or 2048."""
        return ARCHITECTURES[self.architecture].num_features

    def with_image_size(self, size: int) -> Self:
        """The same network for inputs of `size` by `size` pixels; the crop fraction stays."""
        return replace(self, preprocess=replace(self.preprocess, size=size))


@dataclass(frozen=True)
class CatalogueEntry:
    """Published weights.

    Args:
        architecture: a key of `ARCHITECTURES`.
        repository: on the Hugging Face hub; the file is its `model.safetensors`.
        preprocess: the evaluation its publisher states.
        licence: an SPDX identifier.
        revision: the commit; None for the newest.
        sha256: of the file; None where no source for it was found. Such weights are
            unverified: the file that a user downloads first is pinned.
    """

    architecture: str
    repository: str
    preprocess: Preprocess
    licence: str
    revision: str | None = None
    sha256: str | None = None


_TORCHVISION = (Preprocess(), "BSD-3-Clause")
# The recipes of "ResNet strikes back" (arXiv:2110.00476). Their publisher evaluates at 288 pixels with crop
# fraction 1; here they start from the size that they were trained at, and `image_size=288` gives the larger.
_STRIKES_BACK = (Preprocess(crop_fraction=0.95, interpolation="bicubic"), "Apache-2.0")

# Names, preprocessing and licences: timm 1.0.31, models/resnet.py. Revisions and checksums are quoted from
# public code that pins the same files: bkc39/rktorch (18, 34, 50), denislabs/mojo-rl (18),
# dollspace-gay/ferrotorch (18.a1, 34.a1, 50.a1). None for ResNet-101 and 152 was found.
CATALOGUE: Mapping[str, CatalogueEntry] = MappingProxyType(
    {
        "resnet18": CatalogueEntry(
            "resnet18",
            "timm/resnet18.tv_in1k",
            *_TORCHVISION,
            revision="bbd144b3e5565108aad885f145491d11bc6ce807",
            sha256="694f673df6520a3158624e8a89af086f59923ee4cd7436fe5bc3bc71d295ad81",
        ),
        "resnet34": CatalogueEntry(
            "resnet34",
            "timm/resnet34.tv_in1k",
            *_TORCHVISION,
            revision="1b7b21cca82ff974d341713f777bf740c2db38c4",
            sha256="0bb82595a564991a9d424708b33f5d843f5aaed7f6c0886ff10849ff97022235",
        ),
        "resnet50": CatalogueEntry(
            "resnet50",
            "timm/resnet50.tv_in1k",
            *_TORCHVISION,
            revision="78f3ecfdb38e06d9b8397f662e7ab8fee96026fa",
            sha256="5d061a3c593d795bfe682d9b152bafbcf550579873492def3515b46db1189888",
        ),
        "resnet101": CatalogueEntry("resnet101", "timm/resnet101.tv_in1k", *_TORCHVISION),
        "resnet152": CatalogueEntry("resnet152", "timm/resnet152.tv_in1k", *_TORCHVISION),
        "resnet18.a1": CatalogueEntry(
            "resnet18",
            "timm/resnet18.a1_in1k",
            *_STRIKES_BACK,
            revision="491b427b45c94c7fb0e78b5474cc919aff584bbf",
            sha256="80c49dee3da4822c009c5a7fe591e9223c5a2cfcf95a4067ca4dfb5a7b89c612",
        ),
        "resnet34.a1": CatalogueEntry(
            "resnet34",
            "timm/resnet34.a1_in1k",
            *_STRIKES_BACK,
            sha256="829a220f9529d2b1ffdc8719d3273463001e0daf411eaf1916865d9db62c0ed2",
        ),
        "resnet50.a1": CatalogueEntry(
            "resnet50",
            "timm/resnet50.a1_in1k",
            *_STRIKES_BACK,
            revision="767268603ca0cb0bfe326fa87277f19c419566ef",
            sha256="773525d5821de224f8f30c33377b7a795d7863e08522698200d3217d3f2a41bb",
        ),
        "resnet101.a1h": CatalogueEntry("resnet101", "timm/resnet101.a1h_in1k", *_STRIKES_BACK),
        "resnet152.a1h": CatalogueEntry("resnet152", "timm/resnet152.a1h_in1k", *_STRIKES_BACK),
    }
)


def unverified_names() -> tuple[str, ...]:
    """The catalogue's names whose checksum is not known: pinned at the user's first download."""
    return tuple(name for name, entry in CATALOGUE.items() if entry.sha256 is None)


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The names of the 1000 ImageNet-1k classes in order of their index: the first of each class's words.

    They differ in more than case. Where two classes share a word (cardigan, crane,
    maillot), a word in parentheses tells them apart.
    """
    lines = resources.files(__package__).joinpath("imagenet_classes.txt").read_text("utf-8").splitlines()
    words = [line.split("\t")[1] for line in lines if not line.startswith("#")]
    return tuple(names.split(",")[0] for names in words)


def load_pretrained(
    name: str, *, weights: str | Path | None = None, image_size: int | None = None
) -> Backbone:
    """Load a network of the catalogue: from the hub's cache on this machine, else from the hub.

    Args:
        name: a key of `CATALOGUE`.
        weights: a `.safetensors`, `.pth` or `.pt` file to read instead; needs no network. `name` still
            gives the architecture and the preprocessing.
        image_size: height and width of the input in pixels; None for the catalogue's.

    Raises:
        WeightsError: an unknown name, or weights that cannot be fetched, are damaged, are not the
            recorded ones, or fit another network.
        UsageError: `image_size` is below 1.
    """
    entry = _find_entry(name)
    preprocess = entry.preprocess if image_size is None else replace(entry.preprocess, size=image_size)
    if weights is None:
        ported, source = _load_from_hub(name, entry)
    else:
        ported = _read(Path(weights), entry)
        source = {"source": Path(weights).name, "sha256": file_sha256(Path(weights))}
    knows_classes = ported.head is not None and len(ported.head[1]) == len(imagenet_classes())
    return Backbone(
        architecture=entry.architecture,
        variables=ported.variables,
        preprocess=preprocess,
        pretrained_head=ported.head,
        pretrained_classes=imagenet_classes() if knows_classes else None,
        provenance={"name": name, **source},
    )


def _find_entry(name: str) -> CatalogueEntry:
    if name not in CATALOGUE:
        nearest = difflib.get_close_matches(name, CATALOGUE, n=2)
        hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
        raise WeightsError(
            f"there is no network {name!r} in the catalogue; {hint}It has {', '.join(CATALOGUE)}"
        )
    return CATALOGUE[name]


def _read(path: Path, entry: CatalogueEntry) -> Ported:
    state = read_state_dict(path)
    try:
        return to_variables(entry.architecture, state)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def _load_from_hub(name: str, entry: CatalogueEntry) -> tuple[Ported, dict[str, str]]:
    path = _fetch(name, entry)
    sha256 = file_sha256(path)
    pinned = None if entry.sha256 else _read_pins().get(entry.repository)
    try:
        _check_sha256(name, entry, sha256, pinned)
        ported = _read(path, entry)
    except WeightsError:
        # Otherwise the hub's client would answer with the same file for ever.
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise
    if not (entry.sha256 or pinned):
        _write_pins(_read_pins() | {entry.repository: sha256})
    return ported, {
        "source": f"https://huggingface.co/{entry.repository}",
        "revision": path.parent.name,
        "sha256": sha256,
        "licence": entry.licence,
    }


def _fetch(name: str, entry: CatalogueEntry) -> Path:
    """The file in the hub's cache, fetched where it is not there yet."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    own = _hub_cache()
    for folder in (own, None):
        cached = try_to_load_from_cache(entry.repository, HUB_FILE, cache_dir=folder, revision=entry.revision)
        if isinstance(cached, str):
            return Path(cached)
    try:
        return Path(hf_hub_download(entry.repository, HUB_FILE, cache_dir=own, revision=entry.revision))
    except Exception as error:  # besides its own, the client lets through its HTTP library's errors
        reason = " ".join(str(error.__cause__ or error).split())
        raise WeightsError(
            f"the weights of {name} could not be fetched from {constants.ENDPOINT}/"
            f"{entry.repository} ({reason}); check the connection, "
            "or give a file with weights=PATH (--weights PATH)"
        ) from error


def _hub_cache() -> Path | None:
    """Where fetched weights are kept; None: where the hub's client is told to by variables of its own."""
    is_told = bool({"HF_HOME", "HF_HUB_CACHE"} & set(os.environ))
    return None if is_told else Storage.default().persistent / "hub"


def _check_sha256(name: str, entry: CatalogueEntry, sha256: str, pinned: str | None) -> None:
    expected = entry.sha256 or pinned
    if expected in (None, sha256):
        return
    if entry.sha256:
        way_out = "load again, or give a file that you trust with weights=PATH"
    else:
        way_out = f"if the change is expected, remove {entry.repository} from {_pins_path()} and load again"
    raise WeightsError(
        f"the weights of {name} from {entry.repository} have the sha256 {sha256}, not {expected} as "
        f"{'recorded' if entry.sha256 else 'at the first download'}; the file was deleted: {way_out}"
    )


def _pins_path() -> Path:
    return Storage.default().persistent / PINS_FILE


def _read_pins() -> dict[str, str]:
    """{repository: sha256} of the unverified weights that were downloaded here."""
    path = _pins_path()
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{path} is damaged; delete it to pin weights anew at their next load") from error


def _write_pins(pins: Mapping[str, str]) -> None:
    path = _pins_path()
    make_private_folder(path.parent)
    write_whole(path, json.dumps(dict(pins), indent=2, sort_keys=True).encode())

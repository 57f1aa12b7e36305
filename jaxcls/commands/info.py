"""`jaxcls info`."""

# Annotations stay text: evaluated, those of the API would load JAX before `--help` is printed.
from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import OmitArgPrefixes, Positional

import jaxcls
from jaxcls.commands.base import (
    DONE,
    FAILED,
    BackboneOptions,
    PhotoCommand,
    feature_cache,
    is_classifier,
    note,
)
from jaxcls.data.duplicates import describe_leakage, find_duplicates, find_leakage
from jaxcls.data.inventory import compare_inventories, read_inventory, take_inventory
from jaxcls.errors import UsageError
from jaxcls.storage import Storage

if TYPE_CHECKING:
    from jaxcls.evaluation.label_errors import LabelErrors


@dataclass(frozen=True, kw_only=True)
class Info(PhotoCommand):
    """Describe a folder of photos or a saved classifier; without a path, this installation."""

    path: Positional[Path | None] = None
    """A folder of photos, records, a .csv or .jsonl list, or a saved classifier."""
    duplicates: bool = False
    """List the photos that show the same."""
    test_data: Path | None = None
    """Test photos, a folder, records or a list: name those that show the same as one of the first photos."""
    inventory: Path | None = None
    """Say which photos were added, removed, changed or moved since this file was written; write it anew. In
    the folder of the photos, `sha256sum --check FILE` reads it too."""
    label_errors: bool = False
    """Rank the photos whose label is probably wrong, by the features of --backbone."""
    start: OmitArgPrefixes[BackboneOptions] = field(default_factory=BackboneOptions)

    def run(self) -> int:
        asked = self.duplicates or self.label_errors or self.test_data or self.inventory
        if asked and (self.path is None or is_classifier(self.path)):
            raise UsageError(
                "--duplicates, --test-data, --inventory and --label-errors go with a folder of photos"
            )
        if self.path is None:
            print(_describe_installation())
            return DONE
        if is_classifier(self.path):
            print(_describe_classifier(self.path))
            return DONE
        return self.describe_photos(self._read(self.path, None))

    def describe_photos(self, photos: jaxcls.Dataset) -> int:
        """Print what is asked for; what cannot be decoded is named, left out, and makes the exit code."""
        print(photos.summary())
        if self.inventory is not None:
            _update_inventory(photos, self.inventory)
        sound = jaxcls.scan(photos, max_bad_fraction=1.0)
        print("\n".join(sound.notes[len(photos.notes) :]) or "every image can be decoded")
        dataset = sound.originals()
        if self.duplicates or self.label_errors:
            duplicates = find_duplicates(dataset)
            dataset = replace(dataset, groups=duplicates.groups)
            if self.duplicates:
                print(duplicates.summary())
        if self.test_data is not None:
            test = self.read(self.test_data, dataset.classes)
            print(describe_leakage(find_leakage(dataset, test), len(test)))
        if self.label_errors:
            print(self.check_labels(dataset))
        return DONE if len(sound) == len(photos) else FAILED

    def check_labels(self, dataset: jaxcls.Dataset) -> LabelErrors:
        """The photos whose label is probably wrong."""
        from jaxcls.svm.labels import check_labels

        return check_labels(dataset, self.start.load(), cache=feature_cache(), progress=True, report=note)


def _update_inventory(dataset: jaxcls.Dataset, path: Path) -> None:
    """Say what changed since the file at `path` was written, and write it anew."""
    before = read_inventory(path) if path.exists() else None
    now = take_inventory(dataset)
    if before is None:
        now.write(path)
        print(f"inventory of {len(now)} images: {path}")
        return
    # First told, then written: what could not be printed is told the next time.
    print(f"since {path} was written: {compare_inventories(before, now)}", flush=True)
    now.carry_over(before).write(path)


def _describe_installation() -> str:
    import jax

    from jaxcls.models.pretrained import CATALOGUE, unverified_names

    devices = jax.devices()
    lines = [
        f"jaxcls {jaxcls.__version__}, jax {jax.__version__}, {len(devices)} x {devices[0].device_kind}",
        str(Storage.default()),
        "backbones: " + ", ".join(CATALOGUE),
        "pinned at the first download, no checksum being published: " + ", ".join(unverified_names()),
    ]
    return "\n".join(lines)


def _describe_classifier(path: Path) -> str:
    from jaxcls.scoring import check_parity

    classifier = jaxcls.load(path)
    difference = check_parity(classifier, path, "float32")
    names = ", ".join(classifier.classes[:20]) + (", ..." if len(classifier.classes) > 20 else "")
    return "\n".join(
        [
            repr(classifier),
            f"classes: {names}",
            f"scores: {classifier.head.kind}",
            f"made by: {json.dumps(dict(classifier.provenance), ensure_ascii=False)}",
            f"backbone: {json.dumps(dict(classifier.backbone.provenance), ensure_ascii=False)}",
            f"parity: scores its stored images as when saved (relative difference {difference:.1e})",
        ]
    )

"""`jaxcls augment`."""

# Annotations stay text: evaluated, those of the API would load JAX before `--help` is printed.
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, UseAppendAction

from jaxcls.commands.base import DONE, PhotoCommand
from jaxcls.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Augment(PhotoCommand):
    """Write photos and augmented copies of them into one folder, for `train` and `svm`.

    Each pipeline makes a copy of every photo. A split keeps a copy with its original, and only originals are
    measured on. Started again, it makes what is missing, and removes what is not asked for any more.
    """

    data: Annotated[Positional[Path], tyro.conf.arg(metavar="PHOTOS")]
    """The folder of photos; or records (`jaxcls pack`), or a .csv or .jsonl list."""
    pipeline: UseAppendAction[tuple[str, ...]] = ()
    """Operations of jaxcls.augment.ops, such as "Sequential([Fliplr(0.5), Affine(rotate=(-45, 45))])", once
    for each copy. The same one twice makes two different ones."""
    seed: int = 0
    """Another seed, other copies."""
    max_short_side: int = 640
    """Pixels; larger photos are reduced to it before they are augmented."""
    skip_bad: bool = False
    """Leave undecodable photos out, however many."""
    out: Path | None = None
    """A new folder, or that of an earlier call."""

    def run(self) -> int:
        from jaxcls.augment.copies import augment_dataset
        from jaxcls.augment.ops import parse

        if not self.pipeline:
            raise UsageError('give at least one --pipeline, such as --pipeline "Fliplr(0.5)"')
        pipelines = [parse(text) for text in self.pipeline]
        photos = self.read(self.data, skip_bad=self.skip_bad)
        augment_dataset(
            photos, pipelines, self.out, seed=self.seed, max_short_side=self.max_short_side, report=print
        )
        return DONE

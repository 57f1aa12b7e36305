"""`jaxcls pack`."""

# Annotations stay text: evaluated, those of the API would load JAX before `--help` is printed.
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro
from tyro.conf import Positional

from jaxcls.commands.base import DONE, PhotoCommand
from jaxcls.data.arrayrecord import write_arrayrecord
from jaxcls.progress import format_bytes


@dataclass(frozen=True, kw_only=True)
class Pack(PhotoCommand):
    """Write photos into a few large files (ArrayRecord), from which training reads faster."""

    uses_jax: ClassVar[bool] = False

    data: Annotated[Positional[Path], tyro.conf.arg(metavar="PHOTOS")]
    """The folder of photos, one sub-folder per class; or a .csv or .jsonl list, or other records."""
    out: Path
    """The new folder. The other commands take it in place of a folder of photos."""
    size: int | None = None
    """Resize photos once, to this short side in pixels; default: keep their files as they are."""
    shards: int = 8
    """How many files to divide them over."""
    skip_bad: bool = False
    """Leave out photos that cannot be decoded, and say which; otherwise they are an error with --size."""

    def run(self) -> int:
        photos = self.read(self.data, skip_bad=self.skip_bad)
        write_arrayrecord(photos, self.out, size=self.size, shards=self.shards)
        num_bytes = sum(file.stat().st_size for file in self.out.iterdir())
        print(f"{len(photos)} images, {format_bytes(num_bytes)}: {self.out}")
        return DONE

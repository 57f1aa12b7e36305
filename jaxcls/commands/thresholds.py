"""`jaxcls thresholds`."""

# Annotations stay text: evaluated, those of the API would load JAX before `--help` is printed.
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro
from tyro.conf import Positional, UseAppendAction

from jaxcls.commands.base import DONE, Command, print_columns
from jaxcls.errors import UsageError
from jaxcls.evaluation.thresholds import ALWAYS, NEVER
from jaxcls.manifest import read_manifest, read_thresholds, write_thresholds
from jaxcls.predictions import Kind

WORDS = {ALWAYS: "always answered", NEVER: "never answered"}


@dataclass(frozen=True, kw_only=True)
class Thresholds(Command):
    """Show or store the scores below which a saved classifier abstains; a deployed copy keeps its own."""

    uses_jax: ClassVar[bool] = False

    model: Annotated[Positional[Path], tyro.conf.arg(metavar="CLASSIFIER")]
    """A saved classifier."""
    changes: Annotated[
        UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="set", metavar="CLASS=SCORE")
    ] = ()
    """The lowest score at which this class is answered, in the units of its scores. May be given again."""
    clear: bool = False
    """Forget all thresholds, before any is set."""

    def run(self) -> int:
        classes, thresholds = read_thresholds(self.model)
        if self.changes or self.clear:
            kept = None if self.clear else thresholds
            values = dict(zip(classes, kept or [ALWAYS] * len(classes), strict=True))
            values |= _parse(self.changes, classes, read_manifest(self.model)["head"]["kind"])
            thresholds = None if set(values.values()) == {ALWAYS} else list(values.values())
            write_thresholds(self.model, thresholds)
        if thresholds is None:
            print("no thresholds: every image is answered")
        else:
            shown = [WORDS.get(value, f"{value:.6g}") for value in thresholds]
            print_columns([("class", "threshold"), *zip(classes, shown, strict=True)])
        return DONE


def _parse(changes: Sequence[str], classes: Sequence[str], kind: Kind) -> dict[str, float]:
    """Class -> threshold of scores of a kind. A class's name may hold "=": the last one counts."""
    parsed = {}
    for change in changes:
        name, equals, text = change.rpartition("=")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not equals or not abs(value) <= NEVER:
            raise UsageError(f"--set {change!r}: give CLASS=SCORE, such as cup=0.7")
        if kind == "probability" and not 0 <= value <= 1 and abs(value) != NEVER:
            raise UsageError(f"--set {change!r}: the scores are probabilities: give one from 0 to 1")
        if name not in classes:
            raise UsageError(f"--set: no class {name!r}; known are {', '.join(classes)}")
        parsed[name] = value
    return parsed

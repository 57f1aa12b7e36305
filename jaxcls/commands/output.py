"""The rows of scored images, printed or written."""

# Annotations stay text: evaluated, those of the API would load JAX before `--help` is printed.
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jaxcls
from jaxcls.commands.base import DONE, FAILED, open_text, print_columns
from jaxcls.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where the rows of scored images go."""

    format: Literal["table", "csv", "jsonl"] | None = None
    """How to write the rows; default: by the suffix of --out, else a table."""
    out: Path | None = None
    """Write to this .csv or .jsonl file instead of the terminal."""

    def __post_init__(self) -> None:
        if self.out is not None and self.form not in ("csv", "jsonl"):
            raise UsageError("--out needs a name that ends in .csv or .jsonl, or --format csv or jsonl")

    @property
    def form(self) -> str:
        """The format, the default resolved."""
        return self.format or ("table" if self.out is None else self.out.suffix.removeprefix("."))

    def write(self, predictions: jaxcls.Predictions) -> int:
        """Write the rows and return the exit code."""
        if self.form == "table":
            _print_table(predictions)
        else:
            write = {"csv": predictions.write_csv, "jsonl": predictions.write_jsonl}[self.form]
            with open_text(self.out) as file:
                write(file)
        return FAILED if predictions.errors else DONE


def _print_table(predictions: jaxcls.Predictions) -> None:
    is_margin = predictions.kind == "margin"
    values = predictions.scores if is_margin else predictions.probabilities()
    rows = [("image", "class", "margin" if is_margin else "probability")]
    for row, score, label in zip(predictions.rows(), values.max(axis=1), predictions.predicted, strict=True):
        if row["error"] is not None:
            rows.append((row["id"], "(error)", row["error"]))
        else:
            rows.append((row["id"], row["predicted"] or "(abstained)", f"{score:.4f}" if label >= 0 else ""))
    print_columns(rows)

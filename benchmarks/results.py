"""Result files: one JSON document with conditions, the machine's rates, and rows."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.recording import write_json

FOLDER = Path(__file__).resolve().parent / "results"
IDENTITY = (
    "benchmark", "work", "subject", "depth", "batch_size", "image_size", "photo_side", "features",
    "num_features", "num_classes", "cache",
)  # fmt: skip


@dataclass
class Results:
    """A file that is written anew with every row, so that nothing measured is lost.

    Attributes:
        path: where it lies.
        machine: as `machine.probe` gives it, `conditions` included.
        rows: in the order in which they first came.
    """

    path: Path
    machine: Mapping[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def put(self, row: Mapping[str, Any]) -> None:
        """Add a row, or replace the one of the same identity, and write the file."""
        matching = [i for i, old in enumerate(self.rows) if identity(old) == identity(row)]
        if matching:
            self.rows[matching[0]] = dict(row)
        else:
            self.rows.append(dict(row))
        write_json(self.path, {**self.machine, "rows": self.rows})

    def find(self, **values: Any) -> list[dict[str, Any]]:
        """The rows that have all these values."""
        return [row for row in self.rows if all(row.get(name) == v for name, v in values.items())]


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells two rows of a file apart."""
    return tuple(row.get(name) for name in IDENTITY)


def read_results(folder: Path = FOLDER) -> list[Results]:
    """Every result file of a folder, the latest first."""
    found = []
    for path in sorted(folder.glob("*.json")):
        values = json.loads(path.read_text("utf-8"))
        rows = values.pop("rows")
        found.append(Results(path, values, rows))
    return sorted(found, key=lambda results: results.machine["conditions"]["time"], reverse=True)

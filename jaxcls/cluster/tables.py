"""The rows of a part: scores or features of photos as an Arrow table. NumPy and Arrow only."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from jaxcls.evaluation.thresholds import are_below
from jaxcls.predictions import Kind, Predictions

if TYPE_CHECKING:
    import pyarrow as pa

METADATA = b"jaxcls"
"""The key of a part's schema under which JSON says what its values are."""


class Table(Protocol):
    """Makes the rows of photos."""

    @property
    def width(self) -> int:
        """Values of each photo."""
        ...

    def rows(self, values: NDArray[np.float32], ids: Sequence[str], errors: Sequence[str]) -> "pa.Table":
        """Rows of values [n, width], n ids, and n messages, "" of photos that could be read."""
        ...


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Rows of a classifier's scores.

    Attributes:
        kind: as of `Predictions`.
        classes: K names.
        thresholds: float32 [K], as of `Head`, or None.
    """

    kind: Kind
    classes: tuple[str, ...]
    thresholds: NDArray[np.float32] | None

    @property
    def width(self) -> int:
        """K."""
        return len(self.classes)

    def rows(self, values: NDArray[np.float32], ids: Sequence[str], errors: Sequence[str]) -> "pa.Table":
        """As of `Table`.

        Raises:
            UsageError: scores are not finite: the weights are damaged.
        """
        import pyarrow as pa

        scores = np.where(np.asarray(errors)[:, None] != "", np.float32(np.nan), values)
        abstained = (
            np.zeros(len(ids), bool) if self.thresholds is None else are_below(scores, self.thresholds)
        )
        found = Predictions(
            scores=scores,
            kind=self.kind,
            classes=self.classes,
            ids=tuple(ids),
            labels=None,
            abstained=abstained,
            errors={index: error for index, error in enumerate(errors) if error},
        )
        best = found.predicted
        columns = {
            "id": pa.array(ids, pa.string()),
            "predicted": pa.array([self.classes[i] if i >= 0 else None for i in best], pa.string()),
            "score": pa.array(scores[np.arange(len(ids)), best], mask=best < 0),
            "abstained": pa.array(abstained),
            "error": _messages(errors),
            "scores": _vectors(scores, found.unreadable),
        }
        return _table(columns, {"kind": self.kind, "classes": self.classes})


@dataclass(frozen=True)
class FeatureTable:
    """Rows of a backbone's features.

    Attributes:
        width: D.
    """

    width: int

    def rows(self, values: NDArray[np.float32], ids: Sequence[str], errors: Sequence[str]) -> "pa.Table":
        """As of `Table`."""
        import pyarrow as pa

        columns = {
            "id": pa.array(ids, pa.string()),
            "error": _messages(errors),
            "features": _vectors(values, np.asarray(errors) != ""),
        }
        return _table(columns, {"num_features": self.width})


def read_metadata(schema: "pa.Schema") -> dict[str, Any]:
    """What the values of a part with this schema are: `kind` and `classes`, or `num_features`."""
    return json.loads(schema.metadata[METADATA])


def _messages(errors: Sequence[str]) -> "pa.Array":
    import pyarrow as pa

    return pa.array([error or None for error in errors], pa.string())


def _vectors(values: NDArray[np.float32], is_null: NDArray[np.bool_]) -> "pa.Array":
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1], mask=pa.array(is_null))


def _table(columns: Mapping[str, "pa.Array"], metadata: Mapping[str, Any]) -> "pa.Table":
    import pyarrow as pa

    return pa.table(columns).replace_schema_metadata({METADATA: json.dumps(metadata)})

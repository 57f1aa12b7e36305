"""The report: one HTML file with numbers, photos and the views of both; it needs no network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxcls.data.dataset import Dataset
from jaxcls.errors import UsageError
from jaxcls.evaluation.metrics import Evaluation
from jaxcls.predictions import Predictions
from jaxcls.storage import write_whole
from jaxcls.ui.page import make_page
from jaxcls.ui.results import describe, losses
from jaxcls.ui.thumbnails import TYPE, Thumbnails, make_thumbnails

MAX_BYTES = 25_000_000
"""Of the file."""


def write_report(
    path: str | Path,
    predictions: Predictions,
    evaluation: Evaluation,
    dataset: Dataset,
    *,
    model: str | Path,
    thresholds: NDArray[np.float32] | None = None,
    max_bytes: int = MAX_BYTES,
) -> str:
    """Write a report of a classifier's predictions, or replace it, and return what it holds, in a line.

    The more photos there are, the smaller are their thumbnails. Where not even the smallest fit, those of the
    photos of highest loss are embedded; of the others the report shows all but the picture.

    Args:
        path: of the HTML file.
        predictions: of N photos, with labels.
        evaluation: of them.
        dataset: the N photos.
        model: where the classifier is saved: what the report's command stores thresholds in.
        thresholds: float32 [K], those that it has.
        max_bytes: of the file.

    Raises:
        UsageError: predictions of other photos; or the numbers alone do not fit.
    """
    path, model = Path(path), Path(model)
    require_same_photos(predictions, dataset)
    title = f"{model.name or model} on {dataset.name}"
    results = describe(predictions, evaluation, title=title, model=model, thresholds=thresholds)
    room = max_bytes - len(_page(title, results | {"note": " " * 400}, None))
    if room < 0:
        raise UsageError(
            f"{path}: the numbers of {len(dataset)} photos take {-room:,} bytes more than the {max_bytes:,}"
            " that a report may have: report fewer photos (--ids)"
        )
    thumbnails = make_thumbnails(dataset, most_telling(predictions), room)
    note = _describe(thumbnails, len(predictions) - len(predictions.errors))
    page = _page(
        title, results | {"note": f"{note} At most {max_bytes / 1e6:.0f} MB, no network."}, thumbnails
    )
    write_whole(path, page)
    return f"{len(page) / 1e6:.1f} MB; {note}"


def require_same_photos(predictions: Predictions, dataset: Dataset) -> None:
    """Raise UsageError unless the predictions are of these photos, in their order."""
    if predictions.ids != tuple(dataset.ids):
        raise UsageError(f"these predictions are not of the photos of dataset {dataset.name}, in their order")


def most_telling(predictions: Predictions) -> Sequence[int]:
    """The readable photos, those of highest loss first and the unlabelled last."""
    order = np.argsort(-losses(predictions), kind="stable")
    return order[~predictions.unreadable[order]].tolist()


def _page(title: str, results: dict[str, Any], thumbnails: Thumbnails | None) -> bytes:
    encoded = () if thumbnails is None else thumbnails.encoded
    data = {"results": results, "thumbnails": {"type": TYPE, "encoded": encoded}}
    return make_page(title, data, sources={"img-src": "data:"})


def _describe(thumbnails: Thumbnails, num_readable: int) -> str:
    counts = f"{thumbnails.num_embedded:,} of {num_readable:,} readable photos"
    note = f"Thumbnails of {counts}, up to {thumbnails.side} px."
    if thumbnails.num_left_out:
        note += " For the others, of lower loss, there is no room."
    return note

"""The results as a page of this machine: photos are read and decoded when they are looked at."""

import secrets
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jaxcls.data.dataset import Dataset
from jaxcls.errors import ImageError, RequestError
from jaxcls.evaluation.metrics import Evaluation
from jaxcls.predictions import Predictions
from jaxcls.ui.app import Page
from jaxcls.ui.page import make_page
from jaxcls.ui.report import require_same_photos
from jaxcls.ui.results import describe
from jaxcls.ui.thumbnails import TYPE, encode

SIZES = {"thumbnails": (256, 75), "photos": (1280, 85)}
"""Kind of picture -> its longer side in pixels, at most, and WebP's quality."""


def review_page(
    predictions: Predictions,
    evaluation: Evaluation,
    dataset: Dataset,
    *,
    model: str | Path,
    thresholds: NDArray[np.float32] | None = None,
) -> Page:
    """What a report shows, with all photos in full: for `app.serve_page`.

    Args:
        predictions, evaluation, dataset, model, thresholds: as in `report.write_report`.

    Raises:
        UsageError: predictions of other photos.
    """
    require_same_photos(predictions, dataset)
    model = Path(model)
    title = f"{model.name or model} on {dataset.name}"
    results = describe(predictions, evaluation, title=title, model=model, thresholds=thresholds)
    html = make_page(title, {"results": with_photos(results)}, sources={"img-src": "'self' data:"})
    return Page(f"results of {title}", lambda: html, [photo_route(dataset)])


def with_photos(results: dict[str, Any]) -> dict[str, Any]:
    """Results whose photos a `photo_route` shows."""
    # A part of their addresses: a later page has other photos, and the browser keeps those of this one.
    return results | {"photosVersion": secrets.token_hex(8), "note": f"{len(results['ids']):,} photos."}


def photo_route(dataset: Dataset) -> Route:
    """The photos of a dataset, of every kind of `SIZES`, by their position."""

    # A plain function: Starlette runs it in a thread.
    def show(request: Request) -> Response:
        kind, index = request.path_params["kind"], request.path_params["index"]
        if kind not in SIZES or index >= len(dataset):
            raise RequestError(404, "no such photo")
        try:
            picture = encode(dataset, index, *SIZES[kind])
        except ImageError as error:
            raise RequestError(404, error.reason) from error
        return Response(picture, media_type=TYPE, headers={"Cache-Control": "private, max-age=86400"})

    return Route("/{kind}/{index:int}", show)

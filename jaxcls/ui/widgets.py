"""The views of reports and pages as notebook widgets: the kernel answers them in place of a server."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import anywidget
import httpx2
import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from traitlets import Dict, Float, Unicode

from jaxcls.data.annotations import TRASH, Annotations, make_dataset
from jaxcls.data.dataset import UNLABELLED, Dataset
from jaxcls.errors import DatasetError, UsageError
from jaxcls.evaluation.label_errors import LabelErrors
from jaxcls.evaluation.metrics import Evaluation, evaluate
from jaxcls.predictions import Predictions
from jaxcls.ui.app import HANDLERS
from jaxcls.ui.desk import Desk, make_hints
from jaxcls.ui.page import STATIC, join_modules
from jaxcls.ui.report import require_same_photos
from jaxcls.ui.results import describe, describe_scores
from jaxcls.ui.review_page import photo_route, with_photos

LOGGER = logging.getLogger(__name__)

STYLES = ("page.css", "annotate.css")


class Widget(anywidget.AnyWidget):
    """A view in the output of a cell.

    Args:
        view: a key of `VIEWS` in `static/widgets.js`.
        data: what it shows, as plain values.
        routes: what it may ask for besides.
        on_close: called when the widget is closed.
    """

    _esm = join_modules("widgets.js")
    stylesheet = Unicode("".join((STATIC / name).read_text("utf-8") for name in STYLES)).tag(sync=True)
    view = Unicode().tag(sync=True)
    data = Dict().tag(sync=True)

    def __init__(
        self,
        view: str,
        data: Mapping[str, Any],
        *,
        routes: Sequence[Route] = (),
        on_close: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(view=view, data=data)
        app = Starlette(routes=routes, exception_handlers={**HANDLERS, Exception: _fail})
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        self._client = httpx2.AsyncClient(transport=transport, base_url="http://kernel")
        self._answers: set[asyncio.Task[None]] = set()
        self._on_close = on_close
        self.on_msg(self._begin_to_answer)

    def close(self) -> None:
        """Take it from the notebook, and give up what it holds."""
        super().close()
        self._on_close()

    def _begin_to_answer(self, _: object, message: Mapping[str, Any], buffers: object) -> None:
        answer = asyncio.get_running_loop().create_task(self._answer(**message))
        self._answers.add(answer)
        answer.add_done_callback(self._answers.discard)

    async def _answer(self, id: str, path: str, body: Any) -> None:  # noqa: A002 - the message's own word
        method = "GET" if body is None else "POST"
        response = await self._client.request(method, f"/{path}", json=body)
        self.send({"id": id, "status": response.status_code}, [response.content])


class AnnotationWidget(Widget):
    """Photos that are labelled; see `annotate`."""

    def __init__(self, desk: Desk, ids: Sequence[str]) -> None:
        super().__init__("annotate", desk.state(), routes=desk.routes(), on_close=desk.close)
        shown = {*self.data["ids"]}
        self._desk, self._ids = desk, [photo for photo in ids if photo in shown]

    def dataset(self) -> Dataset:
        """The photos with their present labels, without those in the trash.

        Raises:
            DatasetError: files were moved or deleted meanwhile; or the journal is damaged, or cannot be read.
        """
        tree, state = self._desk.annotations.tree, self._desk.state()
        present = dict(zip(state["ids"], (state["names"][label] for label in state["labels"]), strict=True))
        if gone := [photo for photo in self._ids if photo not in present]:
            raise DatasetError(
                f"{tree.root}: {len(gone)} of these photos, such as {gone[0]}, are not there any more:"
                " read the folder anew with jaxcls.read_folder"
            )
        kept = [photo for photo in self._ids if present[photo] != TRASH]
        return make_dataset(tree, kept, [present[photo] for photo in kept], self._desk.max_pixels)


class ThresholdWidget(Widget):
    """Curves with a slider; see `thresholds`.

    Attributes:
        chosen: class -> the lowest score at which it is to be answered, as `Classifier.with_thresholds` takes
            it; of the classes for which a threshold was chosen.
    """

    chosen = Dict(value_trait=Float(), key_trait=Unicode()).tag(sync=True)


def annotate(
    dataset: Dataset,
    *,
    predictions: Predictions | None = None,
    label_errors: LabelErrors | None = None,
    unlabelled: Sequence[str] = (),
) -> AnnotationWidget:
    """Label photos in a notebook, as `jaxcls annotate` does on a page.

    Edits go to the same journal beside the photos: both may be open at once, and `jaxcls annotate --apply`
    moves the files: read the folder anew then. The widget's `dataset()` gives the photos with the labels that
    they have by then. Photos behind links are left out.

    Args:
        dataset: photos of one folder, as `read_folder` reads them, or some of them. The labels that are shown
            are those of the folders and the journal.
        predictions: of these photos: they can be ordered by how little the best class leads.
        label_errors: of these photos: those that are probably wrong are shown, with what is suggested.
        unlabelled: sub-folders whose photos have no label yet.

    Raises:
        DatasetError: the folder holds augmented copies, or its journal is damaged.
        UsageError: the photos do not all lie in one folder, in sub-folders named as their classes.
    """
    ids = dataset.ids.tolist()
    # Absolute: the notebook may change its folder while the widget is open.
    annotations = Annotations(_root(dataset).absolute(), unlabelled=unlabelled)
    _require_own_classes(dataset, annotations)
    hints = make_hints(label_errors, predictions)
    return AnnotationWidget(Desk(annotations, hints, only=set(ids), max_pixels=dataset.max_pixels), ids)


def review(predictions: Predictions, dataset: Dataset) -> Widget:
    """Look at a classifier's answers in a notebook, as `jaxcls review` shows them on a page.

    The photos come from the kernel: `jaxcls evaluate --report` makes a file that is whole without one.

    Args:
        predictions: of N photos, with labels.
        dataset: the N photos.

    Raises:
        UsageError: predictions of other photos, or without labels.
    """
    require_same_photos(predictions, dataset)
    results = describe(predictions, evaluate(predictions), title=dataset.name)
    return Widget("review", with_photos(results), routes=[photo_route(dataset)])


def thresholds(evaluation: Evaluation) -> ThresholdWidget:
    """Choose thresholds in a notebook, on the curves of the images that were answered.

    Args:
        evaluation: of images that the classifier was not trained on.

    Returns:
        The widget; `classifier.with_thresholds(widget.chosen)` is the classifier that abstains below them.
    """
    answers = evaluation.answers
    shown = Predictions(
        scores=answers.scores,
        kind=answers.kind,
        classes=evaluation.classes,
        ids=tuple(map(str, range(len(answers.truth)))),
        labels=answers.truth,
        abstained=np.zeros(len(answers.truth), np.bool_),
    )
    return ThresholdWidget("thresholds", describe_scores(shown))


async def _fail(request: Request, error: Exception) -> Response:
    LOGGER.error("no answer to %s", request.url.path, exc_info=error)
    return JSONResponse({"error": f"the kernel failed to answer: {error!r}"}, 500)


def _root(dataset: Dataset) -> Path:
    """The folder below which all photos lie, under their ids."""
    roots = set()
    for index, photo in enumerate(dataset.ids.tolist()):
        path, parts = dataset.source.path(index), PurePosixPath(photo).parts
        is_below = path is not None and path.parts[-len(parts) :] == parts
        roots.add(path.parents[len(parts) - 1] if path is not None and is_below else None)
    (root, *others) = roots or {None}
    if root is None or others:
        raise _elsewhere(dataset)
    return root


def _require_own_classes(dataset: Dataset, annotations: Annotations) -> None:
    """Raise UsageError unless the labels come from the folder's sub-folders or from its journal."""
    classes = {*dataset.classes, TRASH}
    labelled = dataset.ids[dataset.labels != UNLABELLED].tolist()
    for photo, label in zip(labelled, annotations.labels(labelled), strict=True):
        if not classes & {label, annotations.folder_label(photo)}:
            raise _elsewhere(dataset)


def _elsewhere(dataset: Dataset) -> UsageError:
    return UsageError(
        f"the photos of {dataset.name} are not those of one folder with a sub-folder for each class: labels"
        " are edited where photos lie, so take them as jaxcls.read_folder reads them"
    )

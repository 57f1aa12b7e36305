"""The page on which photos are labelled: what `static/annotate.js` asks for, and what it may change."""

import asyncio
import os
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jaxcls.data.annotations import (
    NO_LABEL,
    TRASH,
    Annotations,
    Change,
    ConflictError,
    Edit,
    UnfinishedError,
    View,
    list_photos,
    make_dataset,
)
from jaxcls.data.dataset import Dataset
from jaxcls.data.duplicates import find_duplicates
from jaxcls.data.images import MAX_PIXELS
from jaxcls.data.provenance import label_problem
from jaxcls.data.source import Source
from jaxcls.errors import ImageError, RequestError, UsageError
from jaxcls.evaluation.label_errors import LabelErrors
from jaxcls.predictions import Predictions
from jaxcls.ui.app import Page, read_json
from jaxcls.ui.page import make_page
from jaxcls.ui.thumbnails import TYPE, encode

SIZES = {"thumbnail": (320, 78), "whole": (1600, 85)}
"""What the page may ask for: the longer side in pixels at most, and WebP's quality."""
CACHE_BYTES = 64 * 2**20
"""Of encoded pictures that are kept."""


@dataclass(frozen=True)
class Hints:
    """What is known about photos besides their labels; by id, since photos come and go.

    Attributes:
        doubts: the probability that the label is wrong; None: nobody looked.
        suggested: the class that such a photo probably wants.
        leads: by how much the best class of a classifier leads, in its probability or margin; None: no
            classifier was asked.
        predicted: that best class.
    """

    doubts: Mapping[str, float] | None = None
    suggested: Mapping[str, str] = field(default_factory=dict)
    leads: Mapping[str, float] | None = None
    predicted: Mapping[str, str] = field(default_factory=dict)


def make_hints(errors: LabelErrors | None, predictions: Predictions | None) -> Hints:
    """Hints from labels that are probably wrong and from a classifier's predictions; None: there are none."""
    hints = Hints()
    if errors is not None:
        doubts = dict(zip(errors.ids, errors.probabilities.tolist(), strict=True))
        classes = [errors.classes[label] for label in errors.suggested]
        hints = replace(hints, doubts=doubts, suggested=dict(zip(errors.ids, classes, strict=True)))
    if predictions is not None:
        readable = np.flatnonzero(~predictions.unreadable).tolist()
        scores = predictions.scores if predictions.kind == "margin" else predictions.probabilities()
        ranked = np.sort(scores, axis=1)
        leads = ranked[:, -1] - ranked[:, -2] if ranked.shape[1] > 1 else ranked[:, -1]
        hints = replace(
            hints,
            leads={predictions.ids[i]: float(leads[i]) for i in readable},
            predicted={predictions.ids[i]: predictions.classes[predictions.top(1)[i, 0]] for i in readable},
        )
    return hints


@dataclass(frozen=True)
class Listing:
    """The photos that lay in the folder at one moment.

    Attributes:
        dataset: reads them; without labels.
        positions: of each id in it.
    """

    dataset: Dataset
    positions: Mapping[str, int]


class Desk:
    """The photos of a folder as the page sees them; any number of pages and threads may ask at once.

    Args:
        annotations: their labels.
        hints: what else is known about them.
        only: the ids of the photos to be seen; None: all.
        max_pixels: height times width above which a photo is refused as unreadable.
    """

    def __init__(
        self,
        annotations: Annotations,
        hints: Hints,
        *,
        only: Set[str] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.annotations, self.hints, self.only, self.max_pixels = annotations, hints, only, max_pixels
        self.title = annotations.tree.root.resolve().name
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._pictures = Pictures(CACHE_BYTES)
        self._twins = Twins()
        self.state()

    def page(self) -> Page:
        """What `app.serve_page` serves."""
        title = f"annotating {self.title}, {len(self._listing.positions)} photos"
        return Page(title, self._html, self.routes())

    def routes(self) -> list[Route]:
        """What the view asks for."""
        return [
            Route("/state", self._answer_state),
            Route("/edit", self._answer_edit, methods=["POST"]),
            Route("/undo", self._answer_repeat, methods=["POST"]),
            Route("/redo", self._answer_repeat, methods=["POST"]),
            Route("/duplicates", self._answer_duplicates),
            Route("/photo", self._answer_photo),
        ]

    def close(self) -> None:
        """Give up what is still being looked for."""
        self._twins.stop()
        self._pool.shutdown(cancel_futures=True)

    def state(self) -> dict[str, Any]:
        """All photos with their labels, as plain values. Photos that came or went meanwhile are seen.

        `labels`, `folders`, `suggested` and `predicted` are positions in `names`, -1 where not known.
        """
        self.annotations.refresh()
        ids = self._list()
        view = self.annotations.view(ids)
        hinted = {*self.hints.suggested.values(), *self.hints.predicted.values()}
        self._classes = {*view.labels, *view.folders, *hinted} - {TRASH, NO_LABEL}
        names = [NO_LABEL, TRASH, *sorted(self._classes)]
        number = {name: position for position, name in enumerate(names)}
        return {
            "title": self.title,
            "names": names,
            "ids": ids,
            "labels": [number[label] for label in view.labels],
            "folders": [number[folder] for folder in view.folders],
            "doubts": _aligned(self.hints.doubts, ids),
            "leads": _aligned(self.hints.leads, ids),
            "suggested": [number.get(self.hints.suggested.get(photo, ""), -1) for photo in ids],
            "predicted": [number.get(self.hints.predicted.get(photo, ""), -1) for photo in ids],
            **_position_in_journal(view),
        }

    def _list(self) -> list[str]:
        ids = [
            photo
            for photo in list_photos(self.annotations.tree.root).ids
            if self.only is None or photo in self.only
        ]
        dataset = make_dataset(self.annotations.tree, ids, [NO_LABEL] * len(ids), self.max_pixels)
        self._listing = Listing(dataset, {photo: position for position, photo in enumerate(ids)})
        return ids

    def _html(self) -> bytes:
        return make_page(
            f"{self.title} - annotate",
            {"photos": self.state()},
            entry="annotate_page.js",
            styles=("page.css", "annotate.css"),
            sources={"img-src": "'self' data:", "connect-src": "'self'"},
        )

    def _answer_state(self, request: Request) -> Response:
        self.annotations.refresh()
        if request.query_params.get("seq") == str(self.annotations.seq):
            return Response(status_code=204)
        return JSONResponse(self.state())

    async def _answer_edit(self, request: Request) -> Response:
        body = await read_json(request)
        return await run_in_threadpool(self._edit, body)

    def _edit(self, body: Any) -> Response:
        try:
            changes = [Change(*map(_text, change)) for change in body["changes"]]
        except (TypeError, KeyError) as error:
            raise RequestError(400, 'an edit is {"changes": [[id, label before, label now], ...]}') from error
        positions = self._listing.positions
        if unknown := [change.id for change in changes if change.id not in positions]:
            raise RequestError(404, f"{unknown[0]!r} is no photo here: load the page again")
        self._check_new_classes({change.after for change in changes} - {TRASH, NO_LABEL})
        try:
            edit = self.annotations.edit(changes)
            # A new set: another thread may be reading the old one.
            self._classes = self._classes | {change.after for change in changes} - {TRASH, NO_LABEL}
            return self._answer(edit)
        except ConflictError as error:
            return JSONResponse({"error": str(error), "present": error.present}, 409)
        except UnfinishedError as error:
            raise RequestError(409, str(error)) from error
        except UsageError as error:
            raise RequestError(400, str(error)) from error

    def _check_new_classes(self, labels: set[str]) -> None:
        folded = {_fold(name): name for name in self._classes}
        for label in labels - self._classes:
            if problem := label_problem(label):
                raise RequestError(400, f"{label!r} cannot be a class: it {problem}")
            if other := folded.get(_fold(label)):
                raise RequestError(400, f"{label!r} and {other!r} differ by no more than case: choose one")

    async def _answer_repeat(self, request: Request) -> Response:
        body = await read_json(request)
        seq = body.get("seq") if isinstance(body, dict) else None
        if type(seq) is not int:
            raise RequestError(400, 'the edit is named by {"seq": NUMBER}')
        act = self.annotations.undo if request.url.path == "/undo" else self.annotations.redo
        return await run_in_threadpool(self._repeat, act, seq)

    def _repeat(self, act: Callable[[int], Edit], seq: int) -> Response:
        try:
            return self._answer(act(seq))
        except (UnfinishedError, UsageError) as error:
            raise RequestError(409, str(error)) from error

    def _answer(self, edit: Edit) -> Response:
        changes = [[change.id, change.after] for change in edit.changes]
        return JSONResponse({"changes": changes, **_position_in_journal(self.annotations.view([]))})

    def _answer_duplicates(self, request: Request) -> Response:
        groups = self._twins.of(self._listing.dataset)
        return JSONResponse({"groups": groups}, 202 if groups is None else 200)

    async def _answer_photo(self, request: Request) -> Response:
        listing, photo = self._listing, request.query_params.get("id", "")
        size = SIZES.get(request.query_params.get("size", ""))
        position = listing.positions.get(photo)
        if position is None or size is None:
            raise RequestError(404, "no such photo, or no such size")
        status = await run_in_threadpool(self.annotations.tree.status, photo)
        if status is None:
            raise RequestError(404, f"{photo} is not there any more")
        version = f'"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"'
        headers = {"ETag": version, "Cache-Control": "private, no-cache"}
        if request.headers.get("if-none-match") == version:
            return Response(status_code=304, headers=headers)
        key = (photo, size, version)
        content = self._pictures.get(key)
        if content is None:
            try:
                loop = asyncio.get_running_loop()
                content = await loop.run_in_executor(self._pool, encode, listing.dataset, position, *size)
            except ImageError as error:
                raise RequestError(422, str(error)) from error
            self._pictures.put(key, content)
        return Response(content, media_type=TYPE, headers=headers)


class Pictures:
    """Encoded pictures, those asked for last, up to a number of bytes. For any number of threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._kept: OrderedDict[object, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: object) -> bytes | None:
        """What was put there, if it is still kept."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: object, content: bytes) -> None:
        """Keep it, instead of others if need be."""
        with self._lock:
            self._num_bytes += len(content) - len(self._kept.pop(key, b""))
            self._kept[key] = content
            while self._num_bytes > self._max_bytes:
                self._num_bytes -= len(self._kept.popitem(last=False)[1])


class Twins:
    """Photos that show the same, looked for in a thread of its own once somebody asks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._ids: frozenset[str] | None = None
        self._groups: list[list[str]] | None = None
        self._error: Exception | None = None

    def of(self, dataset: Dataset) -> list[list[str]] | None:
        """The ids of each group of two or more; None while they are being looked for.

        Raises:
            RequestError: the search has failed. Whoever asks again begins another.
        """
        ids = frozenset(dataset.ids.tolist())
        with self._lock:
            if ids != self._ids:
                self._stopped.set()  # a search among other photos
                self._stopped = threading.Event()
                self._ids, self._groups, self._error = ids, None, None
                threading.Thread(target=self._look, args=(dataset, self._stopped), daemon=True).start()
            if self._error is not None:
                self._ids = None
                raise RequestError(500, f"duplicates: {self._error!r}: choose them again") from self._error
            return self._groups

    def stop(self) -> None:
        """End the search: photos that are still to be read fail."""
        with self._lock:
            self._stopped.set()

    def _look(self, dataset: Dataset, stopped: threading.Event) -> None:
        groups = error = None
        try:
            found = find_duplicates(replace(dataset, source=Stoppable(dataset.source, stopped)))
            groups = [dataset.ids[members].tolist() for members in found.members if len(members) > 1]
        except Exception as caught:  # for whoever asks: nobody waits for this thread
            error = caught
        with self._lock:
            if not stopped.is_set():
                self._groups, self._error = groups, error


@dataclass(frozen=True, eq=False)
class Stoppable:
    """The photos of another source, none of which can be read any more once `stopped` is set."""

    source: Source
    stopped: threading.Event

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> bytes | np.ndarray:
        if self.stopped.is_set():
            raise ImageError("", "stopped")
        return self.source[index]

    def path(self, index: int) -> Path | None:
        """The file behind a photo, where there is one."""
        return self.source.path(index)


def _position_in_journal(view: View) -> dict[str, Any]:
    return {"seq": view.seq, "undoable": view.undoable, "redoable": view.redoable}


def _aligned(values: Mapping[str, float] | None, ids: Sequence[str]) -> list[float | None] | None:
    return None if values is None else [values.get(photo) for photo in ids]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _fold(name: str) -> str:
    """What names have in common that some file systems take for one."""
    return unicodedata.normalize("NFD", name).casefold()

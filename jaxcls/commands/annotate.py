"""`jaxcls annotate`."""

# Annotations stay text: evaluated, those of the API would load JAX before `--help` is printed.
from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional

import jaxcls
from jaxcls.commands.base import DONE, FAILED, BackboneOptions, PhotoCommand, feature_cache, note
from jaxcls.data.annotations import NO_LABEL, TRASH, Annotations, Move, list_photos, make_dataset
from jaxcls.data.duplicates import find_duplicates
from jaxcls.data.moves import Outcome, apply_moves, finish_moves, plan_moves, plan_return, return_moves
from jaxcls.errors import DatasetError, UsageError
from jaxcls.storage import Storage

if TYPE_CHECKING:
    from jaxcls.ui.desk import Hints


@dataclass(frozen=True, kw_only=True)
class Annotate(PhotoCommand):
    """Label photos on a page of this machine. Edits are kept beside the photos; --apply moves the files.

    Photos in DATA itself have no label yet. Exit code 1: a photo could not be moved.
    """

    uses_jax = False

    data: Annotated[Positional[Path], tyro.conf.arg(metavar="DATA")]
    """The folder of photos; each sub-folder is a class."""
    unlabelled: tuple[str, ...] = ()
    """Sub-folders whose photos have no label yet."""
    model: Annotated[Path | None, tyro.conf.arg(metavar="CLASSIFIER")] = None
    """A saved classifier: order photos by how little its best class leads, and show that class."""
    label_errors: bool = False
    """Find the photos whose label is probably wrong, by the features of --backbone."""
    port: int = 0
    """Of the page, on 127.0.0.1; 0: any free one."""
    apply: bool = False
    """Move the files into the folders of their labels, and those thrown away into .jaxcls/trash."""
    undo_apply: bool = False
    """Move the files of the last --apply back; the labels stay."""
    dry_run: bool = False
    """Show what --apply, or --undo-apply, would move."""
    start: OmitArgPrefixes[BackboneOptions] = field(default_factory=BackboneOptions)

    def run(self) -> int:
        moving = self.apply or self.undo_apply or self.dry_run
        if self.apply and self.undo_apply:
            raise UsageError("--apply and --undo-apply: choose one")
        if moving and (self.model is not None or self.label_errors):
            raise UsageError("--model and --label-errors go with the page, not with moving files")
        photos = list_photos(self.data)
        if not photos.ids:
            raise DatasetError(f"{self.data} holds no images that could be annotated")
        for line in photos.notes:
            note(line)
        annotations = Annotations(self.data, unlabelled=self.unlabelled)
        if self.dry_run:
            return self._show_moves(annotations, photos.ids)
        if annotations.unfinished is not None:
            note("finishing the moves that were interrupted")
            if (code := _report(finish_moves(annotations))) != DONE:
                return code
        if self.apply:
            return _report(apply_moves(annotations, list_photos(self.data).ids))
        if self.undo_apply:
            return _report(return_moves(annotations))
        return self._serve(annotations, photos.ids)

    def _show_moves(self, annotations: Annotations, ids: tuple[str, ...]) -> int:
        if annotations.unfinished is not None:
            moves = annotations.unfinished.moves
            note("these moves were interrupted; they are finished first:")
        else:
            moves = plan_return(annotations) if self.undo_apply else plan_moves(annotations, ids)
        for move in moves:
            print(_describe(move))
        print(f"photos that would be moved: {len(moves)}")
        return DONE

    def _serve(self, annotations: Annotations, ids: tuple[str, ...]) -> int:
        from jaxcls.ui.extra import require_extra

        require_extra()
        from jaxcls.ui.app import serve_page
        from jaxcls.ui.desk import Desk

        desk = Desk(annotations, self._find_hints(annotations, ids), max_pixels=self.max_pixels)
        try:
            serve_page(desk.page(), port=self.port)
        finally:
            desk.close()
        annotations.refresh()
        if moves := plan_moves(annotations, list_photos(self.data).ids):
            note(f"photos that lie elsewhere than their labels say: {len(moves)}; --apply moves them")
        return DONE

    def _find_hints(self, annotations: Annotations, ids: tuple[str, ...]) -> Hints:
        from jaxcls.ui.desk import make_hints

        if self.model is None and not self.label_errors:
            return make_hints(None, None)
        from jaxcls.parallel import use_compilation_cache
        from jaxcls.svm.labels import check_labels

        use_compilation_cache(Storage.default().persistent / "compiled")
        errors = predictions = None
        labels = annotations.labels(ids)
        kept = [i for i, label in enumerate(labels) if label != TRASH]
        names = [ids[i] for i in kept]
        dataset = make_dataset(annotations.tree, names, [labels[i] for i in kept], self.max_pixels)
        if self.model is not None:
            plain = make_dataset(annotations.tree, names, [NO_LABEL] * len(names), self.max_pixels)
            predictions = jaxcls.predict(jaxcls.load(self.model), plain, progress=True)
        if self.label_errors:
            dataset = replace(dataset, groups=find_duplicates(dataset).groups)
            backbone, cache = self.start.load(), feature_cache()
            errors = check_labels(
                dataset, backbone, cache=cache, max_bad_fraction=1.0, progress=True, report=note
            )
        return make_hints(errors, predictions)


def _report(outcome: Outcome) -> int:
    for move in outcome.moves:
        print(_describe(move))
    for problem in outcome.problems:
        note(f"jaxcls: {problem}")
    print(f"photos moved: {len(outcome.moves)}")
    return FAILED if outcome.problems else DONE


def _describe(move: Move) -> str:
    return f"{move.source} -> {move.target}"

"""`jaxcls review`."""

# Annotations stay text: evaluated, those of the API would load JAX before `--help` is printed.
from __future__ import annotations

from dataclasses import dataclass

import jaxcls
from jaxcls.commands.base import DONE
from jaxcls.commands.scoring import EvaluationCommand
from jaxcls.ui.extra import require_extra


@dataclass(frozen=True, kw_only=True)
class Review(EvaluationCommand):
    """Look at a saved classifier's answers to labelled photos, on a page that this machine serves to you."""

    port: int = 0
    """Of the page, on 127.0.0.1; 0: any free one."""

    def run(self) -> int:
        require_extra()
        from jaxcls.ui.app import serve_page
        from jaxcls.ui.review_page import review_page

        classifier, dataset = self.load()
        predictions = jaxcls.predict(classifier, dataset, progress=True)
        evaluation = jaxcls.evaluate(predictions, allow_copies=self.allow_copies)
        thresholds = classifier.head.thresholds
        serve_page(
            review_page(predictions, evaluation, dataset, model=self.model, thresholds=thresholds),
            port=self.port,
        )
        return DONE

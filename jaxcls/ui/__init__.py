"""What people look at: one front end of ES modules, in a report of one file, in a page, in a notebook.

In a notebook: `jaxcls.ui.annotate(dataset)`, `jaxcls.ui.review(predictions, dataset)` and
`jaxcls.ui.thresholds(evaluation)`, which are functions of `jaxcls.ui.widgets`.
"""

from typing import Any

WIDGETS = ("annotate", "review", "thresholds")


def __getattr__(name: str) -> Any:
    """A widget's function, on first use: what it needs is an extra."""
    if name not in WIDGETS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jaxcls.ui.extra import require_extra

    require_extra()
    from jaxcls.ui import widgets

    return getattr(widgets, name)

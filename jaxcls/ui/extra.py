"""What pages and widgets need that is not installed with the rest."""

from importlib.util import find_spec

from jaxcls.errors import MissingExtraError

EXTRA = ("anywidget", "starlette", "uvicorn")


def require_extra() -> None:
    """Raise MissingExtraError unless all that pages and widgets need is installed."""
    for package in EXTRA:
        if find_spec(package) is None:
            raise MissingExtraError(package, "a page or widget", "pip install 'jaxcls[ui]'")

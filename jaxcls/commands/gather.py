"""`jaxcls gather`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from jaxcls.commands.base import DONE, FAILED, PhotoCommand, note, read_key
from jaxcls.data.gather import PER_QUERY, gather, read_queries
from jaxcls.data.image_search import Brave, Key, Openverse, Provider, SerpApi
from jaxcls.errors import UsageError

_KEYED: dict[str, tuple[Callable[[Key], Provider], str]] = {
    "brave": (Brave, "BRAVE_API_KEY"),
    "serpapi": (SerpApi, "SERPAPI_API_KEY"),
}


@dataclass(frozen=True, kw_only=True)
class Gather(PhotoCommand):
    """Gather photos into a folder: from image searches, URLs and other folders, each with its provenance.

    Run it again to go on, and to try again what failed. Exit code 1: a label has no photo. The key of Brave
    or SerpApi comes from --key-file or the environment variable BRAVE_API_KEY or SERPAPI_API_KEY.
    """

    uses_jax = False

    queries: Annotated[Positional[Path], tyro.conf.arg(metavar="QUERIES.json")]
    """{"LABEL": ["words to search for", "https://an/image.jpg", "./a/folder"], ...}"""
    out: Path
    """A new folder, or one that was gathered into before."""
    provider: Literal["openverse", "brave", "serpapi"] = "openverse"
    """Whom to ask for images. Openverse needs no key, and knows licences."""
    per_query: int = PER_QUERY
    """Photos wanted of each search."""
    key_file: Path | None = None
    """A file whose first line, # comments aside, is the provider's key."""

    def run(self) -> int:
        gathered = gather(
            read_queries(self.queries),
            self.out,
            provider=_make_provider(self.provider, self.key_file),
            per_query=self.per_query,
            max_pixels=self.max_pixels,
        )
        for failure in gathered.failures:
            note(f"jaxcls: {failure}")
        print(gathered)
        for label in gathered.empty_labels:
            note(f"jaxcls: {label}: no photo; give it other queries, or run again if the failures may pass")
        return FAILED if gathered.empty_labels else DONE


def _make_provider(name: str, key_file: Path | None) -> Provider:
    if name not in _KEYED:
        if key_file is not None:
            raise UsageError(f"--key-file does not go with --provider {name}, which takes no key")
        return Openverse()
    kind, variable = _KEYED[name]
    key = read_key(key_file, variable)
    if not key:
        raise UsageError(f"--provider {name} needs a key: give --key-file, or set {variable}")
    return kind(Key(key))

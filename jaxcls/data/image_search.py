"""Image search: what providers are asked, and what their answers mean.

Providers send nothing themselves: they are handed `ask`, which obeys the limits. A provider
of your own is a class like those here:

    class Museum:
        name = "museum"
        interval_seconds = 1.0

        async def search(self, query, number, ask):
            answer = await ask("https://museum.example/search", {"q": query, "page": str(number)})
            items = answer.get("items", [])
            return ResultPage(tuple(Found(item["image"], author=item.get("artist") or "") for item in items))
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from jaxcls.data.download import Guard, fetch_json, is_url
from jaxcls.data.pacing import Limits, Pacer
from jaxcls.errors import DownloadError, UsageError


@dataclass(frozen=True)
class Found:
    """An image that a search found. Whatever is unknown is "".

    Attributes:
        url: of the image itself.
        page: URL of the page that shows it.
        title: its title there.
        author: who made it.
        licence: its name, such as "CC BY-SA 4.0".
        licence_url: where the licence is stated.

    Raises:
        UsageError: one of them is no text, such as None.
    """

    url: str
    page: str = ""
    title: str = ""
    author: str = ""
    licence: str = ""
    licence_url: str = ""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, str):
                raise UsageError(f'{name} of an image is {value!r}: give a text, "" where it is unknown')


@dataclass(frozen=True)
class ResultPage:
    """A page of results, the best first, and whether it is known to be the last."""

    found: tuple[Found, ...]
    is_last: bool = False


@dataclass(frozen=True, repr=False)
class Key:
    """A key that is sent and never shown.

    Raises:
        UsageError: it is empty, or holds other than visible ASCII characters.
    """

    value: str

    def __post_init__(self) -> None:
        if not self.value or not all("!" <= character <= "~" for character in self.value):
            raise UsageError("a key of a search provider is made of visible ASCII characters, without spaces")

    def __repr__(self) -> str:
        return "Key(***)"


_NO_HEADERS: Mapping[str, str | Key] = {}


class Ask(Protocol):
    """Sends a query, and fields of the request's head, to a service; returns the JSON that it answers.

    Raises:
        DownloadError: there is none, also after some attempts.
    """

    async def __call__(
        self, url: str, params: Mapping[str, str | Key], headers: Mapping[str, str | Key] = _NO_HEADERS
    ) -> Any: ...


class Provider(Protocol):
    """Something that finds images by words. Its requests are sent one at a time, `interval_seconds` apart."""

    @property
    def name(self) -> str:
        """For provenance and messages."""

    @property
    def interval_seconds(self) -> float:
        """Shortest time between the starts of two requests."""

    async def search(self, query: str, number: int, ask: Ask) -> ResultPage:
        """Page `number`, from 0, of what is found for `query`.

        Raises:
            DownloadError: there is no answer, or none that can be read.
        """


@dataclass(frozen=True)
class Openverse:
    """Openly licensed images of Flickr, Wikimedia, museums and others, with author and licence. Needs no key.

    Without one it gives 20 results a page and 240 in all, and allows so many requests a minute and a day.
    """

    url: str = "https://api.openverse.org/v1/images/"
    interval_seconds: float = 3.0
    name: str = "openverse"

    async def search(self, query: str, number: int, ask: Ask) -> ResultPage:
        """As `Provider.search`."""
        params = {"q": query, "page": str(number + 1), "page_size": str(_OPENVERSE_RESULTS)}
        answer = await ask(self.url, params)
        found = tuple(
            Found(
                url=_text(item, "url"),
                page=_text(item, "foreign_landing_url"),
                title=_text(item, "title"),
                author=_text(item, "creator"),
                licence=_licence(_text(item, "license"), _text(item, "license_version")),
                licence_url=_text(item, "license_url"),
            )
            for item in _items(self.url, answer, "results")
        )
        num_pages = answer.get("page_count")
        num_pages = num_pages if isinstance(num_pages, int) else _OPENVERSE_PAGES
        # Beyond the last page it answers 401, as if a key were wrong.
        return ResultPage(found, is_last=number + 1 >= min(num_pages, _OPENVERSE_PAGES))


_OPENVERSE_RESULTS, _OPENVERSE_PAGES = 20, 12


@dataclass(frozen=True)
class Brave:
    """Brave's own index of the web. Needs a key; 200 results at most; licences are not known."""

    key: Key
    url: str = "https://api.search.brave.com/res/v1/images/search"
    interval_seconds: float = 1.0
    name: str = "brave"

    async def search(self, query: str, number: int, ask: Ask) -> ResultPage:
        """As `Provider.search`; there is one page."""
        try:
            answer = await ask(self.url, {"q": query, "count": "200"}, {"X-Subscription-Token": self.key})
        except DownloadError as error:
            if error.status == _UNPROCESSABLE and "token" in error.reason:  # so it calls a wrong key
                raise DownloadError(error.url, error.reason, status=REFUSED[0]) from error.__cause__
            raise
        found = tuple(
            Found(url=_text(item, "properties", "url"), page=_text(item, "url"), title=_text(item, "title"))
            for item in _items(self.url, answer, "results")
        )
        return ResultPage(found, is_last=True)


@dataclass(frozen=True)
class SerpApi:
    """Google Images, as SerpApi reads it. Needs a key; of licences it knows at most where one is stated."""

    key: Key
    url: str = "https://serpapi.com/search.json"
    interval_seconds: float = 1.0
    name: str = "serpapi"

    async def search(self, query: str, number: int, ask: Ask) -> ResultPage:
        """As `Provider.search`."""
        params = {"engine": "google_images", "q": query, "ijn": str(number), "safe": "active"}
        answer = await ask(self.url, {**params, "api_key": self.key})
        # The end of the results is an error, among others that are none.
        if "hasn't returned any results" in _text(answer, "error"):
            return ResultPage((), is_last=True)
        found = tuple(
            Found(
                url=_text(item, "original"),
                page=_text(item, "link"),
                title=_text(item, "title"),
                licence_url=_text(item, "license_details_url"),
            )
            for item in _items(self.url, answer, "images_results")
        )
        return ResultPage(found)


def _items(url: str, answer: Any, name: str) -> list[Any]:
    items = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(items, list):
        raise DownloadError(url, f"the answer holds no list of {name}")
    return items


def _text(item: Any, *names: str) -> str:
    """The string that lies at a path of names; "" where there is none."""
    for name in names:
        item = item.get(name) if isinstance(item, dict) else None
    return item if isinstance(item, str) else ""


def _licence(code: str, version: str) -> str:
    """As people write it: Openverse's "by-sa" is "CC BY-SA"."""
    names = {"": "", "cc0": "CC0", "pdm": "Public Domain Mark"}
    return f"{names.get(code, f'CC {code.upper()}')} {version}".strip()


class Searcher:
    """Asks a provider: one request at a time, again where that may help, no more once a quota is used up."""

    def __init__(self, provider: Provider, limits: Limits, guard: Guard) -> None:
        if not isinstance(provider.name, str):
            raise UsageError(f"name of a search provider is {provider.name!r}: give a text")
        self._provider, self._guard = provider, guard
        self._pacer = Pacer(
            replace(limits, num_requests=1, num_per_host=1, interval_seconds=provider.interval_seconds)
        )
        self._spent: DownloadError | None = None

    async def search(self, query: str, number: int) -> ResultPage:
        """Page `number`, from 0, of what is found for `query`, what is no http(s) URL left out.

        Raises:
            DownloadError: there is no answer, or none that can be read. `status` is in `REFUSED` where the
                provider refuses whatever we ask.
        """
        try:
            page = await self._provider.search(query, number, self._ask)
            return replace(page, found=tuple(found for found in page.found if is_url(found.url)))
        except DownloadError as error:
            if error.status not in REFUSED:
                raise
            reason = f"{error.reason}: check the key of {self._provider.name}, or ask another provider"
            raise DownloadError(error.url, reason, status=error.status) from error.__cause__
        except Exception as error:  # a provider of the user's own may do anything
            reason = f"its search raised {type(error).__name__}: {error}"
            raise DownloadError(self._provider.name, reason) from error

    async def _ask(
        self, url: str, params: Mapping[str, str | Key], headers: Mapping[str, str | Key] = _NO_HEADERS
    ) -> Any:
        secrets = [value.value for value in (*params.values(), *headers.values()) if isinstance(value, Key)]

        async def request() -> Any:
            async with self._pacer.turn(""):
                if self._spent is not None:
                    raise self._spent
                return await fetch_json(
                    url, _open(params), _open(headers), secrets=secrets, guard=self._guard
                )

        try:
            return await self._pacer.send(request)
        except DownloadError as error:
            if error.status == _TOO_MANY:
                self._spent = DownloadError(error.url, error.reason, status=error.status)
            raise


REFUSED = (401, 403)
_UNPROCESSABLE, _TOO_MANY = 422, 429


def _open(fields: Mapping[str, str | Key]) -> dict[str, str]:
    return {name: value.value if isinstance(value, Key) else value for name, value in fields.items()}

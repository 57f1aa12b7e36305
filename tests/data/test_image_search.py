"""What providers are asked, and what becomes of their answers; over HTTP they are in test_gather."""

import asyncio
import random
from contextlib import suppress
from dataclasses import replace

import pytest
from scripted_providers import NO_RESULTS

from jaxcls.data.download import PUBLIC
from jaxcls.data.image_search import Brave, Found, Key, Openverse, ResultPage, Searcher, SerpApi
from jaxcls.data.pacing import POLITE
from jaxcls.errors import DownloadError, UsageError

KEY = Key("0123456789abcdef")
PROVIDERS = [Openverse(), Brave(KEY), SerpApi(KEY)]


def search(provider, answer, number: int = 0) -> tuple[ResultPage, tuple]:
    """The page that a provider makes of an answer, and what it asked."""
    asked = []

    async def ask(url, params, headers=None):
        asked.append((url, params, headers or {}))
        return answer

    page = asyncio.run(provider.search("blue cup", number, ask))
    return page, asked[0]


def test_openverse():
    item = {
        "url": "https://live.staticflickr.com/1/a.jpg", "title": "Cup", "creator": "Ann",
        "license": "by-nc-sa", "license_version": "2.0", "license_url": "https://creativecommons.org/licenses/by-nc-sa/2.0/",
        "foreign_landing_url": "https://www.flickr.com/photos/ann/1", "tags": None,
    }  # fmt: skip
    page, asked = search(Openverse(), {"page_count": 3, "results": [item]}, number=1)
    assert asked == (
        "https://api.openverse.org/v1/images/", {"q": "blue cup", "page": "2", "page_size": "20"}, {}
    )  # fmt: skip
    assert page.found == (
        Found(
            url="https://live.staticflickr.com/1/a.jpg",
            page="https://www.flickr.com/photos/ann/1",
            title="Cup",
            author="Ann",
            licence="CC BY-NC-SA 2.0",
            licence_url="https://creativecommons.org/licenses/by-nc-sa/2.0/",
        ),
    )
    assert not page.is_last
    assert search(Openverse(), {"page_count": 3, "results": [item]}, number=2)[0].is_last
    assert search(Openverse(), {"page_count": 500, "results": [item]}, number=11)[0].is_last


@pytest.mark.parametrize(
    ("code", "version", "licence"),
    [("cc0", "1.0", "CC0 1.0"), ("pdm", "1.0", "Public Domain Mark 1.0"), ("by", None, "CC BY"),
     (None, None, "")],
)  # fmt: skip
def test_licences_of_openverse(code, version, licence):
    item = {"url": "https://a.example/b", "license": code, "license_version": version}
    page, _ = search(Openverse(), {"results": [item]})
    assert page.found[0].licence == licence


def test_brave():
    item = {"url": "https://shop.example/cups", "title": "Cups", "properties": {"url": "https://a.example/b"}}
    page, (url, params, headers) = search(Brave(KEY), {"type": "images", "results": [item]})
    assert (url, params) == (
        "https://api.search.brave.com/res/v1/images/search", {"q": "blue cup", "count": "200"}
    )  # fmt: skip
    assert headers == {"X-Subscription-Token": KEY}
    assert page == ResultPage(
        (Found("https://a.example/b", "https://shop.example/cups", "Cups"),), is_last=True
    )


def test_serpapi():
    item = {"original": "https://a.example/b", "link": "https://shop.example", "title": "Cup", "position": 1,
            "license_details_url": "https://creativecommons.org/licenses/by/4.0/"}  # fmt: skip
    page, (url, params, headers) = search(SerpApi(KEY), {"images_results": [item]}, number=2)
    assert (url, headers) == ("https://serpapi.com/search.json", {})
    assert params == {
        "engine": "google_images",
        "q": "blue cup",
        "ijn": "2",
        "safe": "active",
        "api_key": KEY,
    }
    licence = "https://creativecommons.org/licenses/by/4.0/"
    assert page == ResultPage(
        (Found("https://a.example/b", "https://shop.example", "Cup", licence_url=licence),)
    )
    assert search(SerpApi(KEY), {"error": NO_RESULTS})[0] == ResultPage((), is_last=True)


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.name)
def test_answers_of_any_shape_are_pages_or_errors(provider):
    generator = random.Random(0)
    names = [
        "results",
        "images_results",
        "page_count",
        "url",
        "original",
        "properties",
        "license",
        "error",
        "x",
    ]

    def grow(depth: int) -> object:
        kind = generator.choice(["dict", "list", "leaf"]) if depth else "leaf"
        if kind == "dict":
            return {name: grow(depth - 1) for name in generator.sample(names, 5)}
        if kind == "list":
            return [grow(depth - 1) for _ in range(3)]
        return generator.choice([None, True, 0, -7, 1e99, "", "\ud800", "https://a.example/b"])

    pages = []
    for _ in range(1000):
        with suppress(DownloadError):
            pages.append(search(provider, grow(4))[0])
    assert all(
        isinstance(value, str) for page in pages for found in page.found for value in vars(found).values()
    )
    assert len(pages) > 10


@pytest.mark.parametrize("name", ["url", "page", "title", "author", "licence", "licence_url"])
def test_what_is_known_of_an_image_is_text(name):
    with pytest.raises(UsageError, match=f"^{name} of an image is None: give a text"):
        Found(**{"url": "https://a.example/b", name: None})


def test_a_provider_has_a_name():
    with pytest.raises(UsageError, match="name of a search provider is None"):
        Searcher(replace(Openverse(), name=None), POLITE, PUBLIC)


@pytest.mark.parametrize("value", ["", " ", "two words", "line\nend", "schl\u00fcssel", "\x00"])
def test_keys_that_no_request_can_hold(value):
    with pytest.raises(UsageError) as caught:
        Key(value)
    assert value not in str(caught.value) or not value.strip()


def test_keys_are_not_shown():
    for provider in PROVIDERS[1:]:
        assert KEY.value not in f"{provider} {provider!r} {KEY} {KEY!r} {[KEY]}"

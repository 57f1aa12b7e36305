"""Gathering from a web on loopback that behaves like the providers, and like the rest of the web."""

import asyncio
import hashlib
import json
import logging
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import SHARED, draw
from PIL import Image
from scripted_providers import HOST, OTHER_HOST, QUICK, Answer, Web, encode, most_at_once

from jaxcls.cli import main
from jaxcls.data import gather as gather_module
from jaxcls.data.duplicates import find_duplicates
from jaxcls.data.folder import read_folder
from jaxcls.data.gather import PARTIAL, gather, read_queries
from jaxcls.data.image_search import Brave, Found, Key, Openverse, ResultPage, SerpApi
from jaxcls.data.images import decode
from jaxcls.data.provenance import PROVENANCE
from jaxcls.errors import DatasetError, DownloadError, UsageError
from jaxcls.storage import locked


@pytest.fixture
def web():
    with Web() as web:
        yield web


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def openverse(web: Web) -> Openverse:
    return Openverse(web.url("/search/openverse"), interval_seconds=0)


def run(web: Web, queries, out, **options):
    return gather(
        queries, out, **{"provider": openverse(web), "limits": QUICK, "guard": web.guard, **options}
    )


def rows(out: Path) -> list[dict]:
    lines = (out / PROVENANCE).read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]  # the last one is empty, or torn


def kept(out: Path) -> dict[str, dict]:
    """File -> the last that was said of it, of those that are kept."""
    last = {(row["label"], row["url"]): row for row in rows(out)}
    return {row["file"]: row for row in last.values() if not row["duplicate_of"]}


def files(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} - {PROVENANCE}


def check_sound(out: Path) -> None:
    """Every file has its provenance, is whole, and is named after its content; nothing partial lies about."""
    assert files(out) == set(kept(out))
    for name, row in kept(out).items():
        content = (out / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row["sha256"]
        assert Path(name).stem == row["sha256"][:20]
        decode(content)
    assert not (out / PARTIAL).exists()


# What comes, and from where.


def test_searches_urls_and_folders_become_a_folder_with_provenance(web, out, tmp_path):
    web.results["blue cup"] = web.put_pictures(30)
    (tmp_path / "bowls").mkdir()
    draw(500).save(tmp_path / "bowls" / "one.png")
    draw(501).save(tmp_path / "bowls" / "two.bmp")
    lone = web.put("/lone", encode(draw(600), "WEBP"), host=OTHER_HOST)
    queries = {"cup": ["blue cup", lone + "#top"], "bowl": [str(tmp_path / "bowls")]}
    before = datetime.now(UTC).replace(microsecond=0)
    gathered = run(web, queries, out, per_query=25)
    assert gathered.counts == {"cup": 26, "bowl": 2}
    assert (gathered.num_new, gathered.failures, gathered.empty_labels) == (28, (), ())
    check_sound(out)
    photos = read_folder(out)
    assert photos.classes == ("bowl", "cup")
    assert len(photos) == 28
    by_url = {row["url"]: row for row in rows(out)}
    assert set(by_url) >= set(web.results["blue cup"][:25])
    row = by_url[web.results["blue cup"][7]]
    assert (row["label"], row["query"], row["provider"]) == ("cup", "blue cup", "openverse")
    assert (row["licence"], row["author"]) == ("CC BY-SA 2.0", "Ann O'Nym")
    assert row["licence_url"] == "https://creativecommons.org/licenses/by-sa/2.0/"
    assert before <= datetime.fromisoformat(row["time"]) <= datetime.now(UTC)
    assert row["sha256"] == hashlib.sha256(encode(draw(7))).hexdigest()
    assert by_url[lone]["file"].endswith(".webp")
    assert (by_url[lone]["provider"], by_url[lone]["licence"]) == ("", "")
    local = by_url[(tmp_path / "bowls" / "two.bmp").as_uri()]
    assert local["query"] == queries["bowl"][0]
    assert (out / local["file"]).read_bytes() == (tmp_path / "bowls" / "two.bmp").read_bytes()


def test_pages_are_turned_as_far_as_wanted_and_failures_are_replaced(web, out):
    urls = web.put_pictures(70)
    for bad in urls[3:9]:
        web.pages[HOST, bad[-len("/photos/0.jpg") :]] = [Answer(status=404)]
    web.results["cup"] = urls
    gathered = run(web, {"cup": ["cup"]}, out, per_query=45)
    assert gathered.counts == {"cup": 45}
    assert {row["url"] for row in rows(out)} == set(urls[:51]) - set(urls[3:9])
    assert len(gathered.failures) == 6
    assert [request.query["page"] for request in web.asked("/search")] == ["1", "2", "3"]


def test_the_end_of_the_results_is_respected(web, out):
    """Openverse answers 401 to whoever asks beyond 240: that must not look like a wrong key."""
    web.results["blue cup"] = [web.url(f"/missing/{n}") for n in range(300)]
    gathered = run(
        web,
        {"cup": ["blue cup"], "none": ["nothing"]},
        out,
        per_query=240,
        limits=replace(QUICK, num_per_host=16),
    )
    assert len(web.asked("/search")) == 12 + 1
    assert len(gathered.failures) == 240
    assert gathered.empty_labels == ("cup", "none")
    assert str(gathered.failures[0]).startswith("cup, 'blue cup': http://127.0.0.81")
    assert "404 Not Found" in str(gathered.failures[0])


@pytest.mark.parametrize(("provider", "path"), [(Brave, "brave"), (SerpApi, "serpapi")])
def test_providers_with_keys(provider, path, web, out, caplog):
    caplog.set_level(logging.DEBUG)
    urls = web.results["cup"] = web.put_pictures(8)
    keyed = provider(Key(web.key), url=web.url(f"/search/{path}"), interval_seconds=0)
    gathered = run(web, {"cup": ["cup"]}, out, provider=keyed, per_query=8)
    assert gathered.counts == {"cup": 8}
    assert {row["url"] for row in rows(out)} == set(urls)
    assert {(row["provider"], row["licence"]) for row in rows(out)} == {(path, "")}
    (search,) = web.asked("/search")
    assert web.key in (search.headers.get("x-subscription-token"), search.query.get("api_key"))
    for text in (repr(keyed), caplog.text, (out / PROVENANCE).read_text(), str(gathered)):
        assert web.key not in text


def test_a_serpapi_search_ends_where_it_says_that_there_is_no_more(web, out):
    web.results["cup"] = web.put_pictures(3)
    provider = SerpApi(Key(web.key), web.url("/search/serpapi"), interval_seconds=0)
    gathered = run(web, {"cup": ["cup"]}, out, provider=provider)
    assert (gathered.counts, gathered.failures) == ({"cup": 3}, ())
    assert [request.query["ijn"] for request in web.asked("/search")] == ["0", "1"]


@pytest.mark.parametrize(("per_query", "num_pages"), [(1, 2), (100, 2), (101, 3)])
def test_a_search_of_which_all_fails_costs_one_page_more_than_is_wanted(per_query, num_pages, web, out):
    web.results["cup"] = [f"http://127.0.0.1/{n}" for n in range(1000)]  # refused before it is asked
    provider = SerpApi(Key(web.key), web.url("/search/serpapi"), interval_seconds=0)
    gathered = run(web, {"cup": ["cup"]}, out, provider=provider, per_query=per_query)
    assert [request.query["ijn"] for request in web.asked("/search")] == list("012"[:num_pages])
    assert len(gathered.failures) == 100 * num_pages


def test_a_provider_of_ones_own(web, out):
    urls = web.put_pictures(5)
    web.put("/museum", json.dumps({"works": urls}).encode())

    class Museum:
        name = "museum"
        interval_seconds = 0.0

        async def search(self, query, number, ask):
            answer = await ask(web.url("/museum"), {"q": query})
            return ResultPage(tuple(Found(url, author="Rembrandt") for url in answer["works"]))

    gathered = run(web, {"cup": ["cup"]}, out, provider=Museum())
    assert gathered.counts == {"cup": 5}
    assert {(row["provider"], row["author"]) for row in rows(out)} == {("museum", "Rembrandt")}
    assert len(web.asked("/museum")) == 2  # it never says that a page is the last


@pytest.mark.parametrize(
    ("mistake", "reason"),
    [
        (lambda answer: ResultPage((Found(answer["works"][0], author=None),)), "author of an image is None"),
        (lambda answer: ResultPage((Found(answer["artist"]),)), "raised KeyError: 'artist'"),
        (lambda answer: None, "raised AttributeError"),
        (lambda answer: ResultPage((5,)), "raised AttributeError"),
    ],
    ids=["author", "key", "no page", "no image"],
)  # fmt: skip
def test_mistakes_of_a_provider_of_ones_own_are_failures(mistake, reason, web, out):
    urls = web.put_pictures(5)
    web.put("/museum", json.dumps({"works": urls[:4]}).encode())

    class Museum:
        name = "museum"
        interval_seconds = 0.0

        async def search(self, query, number, ask):
            return mistake(await ask(web.url("/museum"), {"q": query}))

    for _ in range(2):  # nothing that the second run cannot read
        gathered = run(web, {"cup": ["some cups", urls[4]]}, out, provider=Museum())
        assert gathered.counts == {"cup": 1}
        (failure,) = gathered.failures
        assert str(failure).startswith("cup, 'some cups': museum: its search ")
        assert reason in failure.reason


def test_where_an_event_loop_is_running_as_in_notebooks(web, out):
    urls = web.put_pictures(3)

    async def cell():
        return run(web, {"cup": urls}, out)

    assert asyncio.run(cell()).counts == {"cup": 3}


# Again.


def test_a_second_run_fetches_only_what_is_missing(web, out):
    web.results |= {"cup": web.put_pictures(12), "mug": web.put_pictures(6, first=100)}
    failing = web.put("/failing", Answer(status=404))
    queries = {"cup": ["cup"], "mug": ["mug", failing]}
    first = run(web, queries, out, per_query=6)
    assert (first.num_new, len(first.failures)) == (12, 1)
    line_count, num_searches = len(rows(out)), len(web.asked("/search"))
    web.requests.clear()
    second = run(web, queries, out, per_query=6)
    assert [request.path for request in web.requests] == ["/failing"]
    assert (second.num_new, second.counts) == (0, first.counts)
    assert (len(rows(out)), num_searches) == (line_count, 2)

    lost = next(row for row in rows(out) if row["label"] == "cup")
    (out / lost["file"]).unlink()
    web.put("/failing", encode(draw(777)))
    web.requests.clear()
    third = run(web, queries, out, per_query=6)
    assert third.counts == {"cup": 6, "mug": 7}
    assert sorted(request.path for request in web.requests if "search" not in request.path) == sorted(
        ["/failing", lost["url"].partition(str(web.port))[2]]
    )
    check_sound(out)

    web.requests.clear()
    more = run(web, queries, out, per_query=10)
    assert more.counts == {"cup": 10, "mug": 7}
    assert len(web.asked()) == 4


CHILD = """
import json, sys
from ipaddress import ip_network
from jaxcls.data.download import Guard
from jaxcls.data.gather import gather
from jaxcls.data.image_search import Openverse
from jaxcls.data.pacing import Limits

url, out, port = sys.argv[1:]
networks = (ip_network("127.0.0.81"), ip_network("127.0.0.82"))
guard = Guard(ports=frozenset({int(port)}), allowed_networks=networks)
gather({"cup": ["cup"], "mug": ["mug"]}, out, provider=Openverse(url, interval_seconds=0), per_query=40,
       limits=Limits(interval_seconds=0), guard=guard)
"""


@pytest.mark.parametrize(
    ("number", "stops"),
    [
        (signal.SIGKILL, [12]),
        pytest.param(signal.SIGKILL, [5, 25], marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, [5, 25], marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_stopped_is_gone_on_with(number, stops, web, out):
    num_each = 40 if len(stops) > 1 else 15
    slow = [Answer(encode(draw(n)), delay=0.05) for n in range(2 * num_each)]
    urls = [web.put(f"/photos/{n}", answer) for n, answer in enumerate(slow)]
    web.results |= {"cup": urls[:num_each], "mug": urls[num_each:]}
    for stop_at in stops:
        start = [sys.executable, "-c", CHILD, web.url("/search/openverse"), str(out), str(web.port)]
        child = subprocess.Popen(start, stderr=subprocess.PIPE)
        while len(web.asked()) < stop_at:
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.01)
        child.send_signal(number)
        begin = time.monotonic()
        _, error = child.communicate(timeout=20)
        assert child.returncode == -number
        assert time.monotonic() - begin < 10
        assert number == signal.SIGKILL or error.decode().rstrip().endswith("KeyboardInterrupt")
        whole = {name for name in files(out) if not name.startswith(PARTIAL)}
        assert whole <= {row["file"] for row in rows(out)}
        for path in whole:
            decode((out / path).read_bytes())
        assert (out / PARTIAL).is_dir()
        assert number == signal.SIGKILL or not list((out / PARTIAL).iterdir())
        if number == signal.SIGKILL:  # as if it had been killed while it wrote a line
            with (out / PROVENANCE).open("ab") as file:
                file.write(b'{"label": "cup", "fi')
    had = len(files(out))
    already = {row["url"] for row in kept(out).values()} if number == signal.SIGINT else set()
    web.requests.clear()
    gathered = run(web, {"cup": ["cup"], "mug": ["mug"]}, out, per_query=40)
    assert gathered.counts == {"cup": num_each, "mug": num_each}
    assert had > 2
    assert not {web.url(request.path) for request in web.asked()} & already
    assert len(web.asked()) < 2 * num_each
    check_sound(out)


def test_a_photo_is_not_kept_where_its_line_was_written_and_it_was_not(web, out):
    """A process may be killed between the two; in the other order, a photo would lie there without a line."""
    web.results["cup"] = web.put_pictures(2)
    run(web, {"cup": ["cup"]}, out)
    row = rows(out)[0]
    (out / row["file"]).unlink()
    assert run(web, {"cup": ["cup"]}, out).counts == {"cup": 2}
    # And between the line that says that it is dropped and its end.
    dropped = {**row, "duplicate_of": rows(out)[1]["file"]}
    with (out / PROVENANCE).open("a") as file:
        file.write(json.dumps(dropped) + "\n")
    assert run(web, {"cup": ["cup"]}, out).counts == {"cup": 1}
    check_sound(out)


def test_one_process_at_a_time(web, out):
    web.results["cup"] = web.put_pictures(1)
    run(web, {"cup": ["cup"]}, out)
    with locked(out) as is_ours:
        assert is_ours
        with pytest.raises(UsageError, match="another process is gathering into it"):
            run(web, {"cup": ["cup"]}, out)


# Duplicates.


def test_exact_copies_within_a_label_are_dropped_and_one_url_is_fetched_once(web, out):
    twins = [web.put(f"/twin/{n}", encode(draw(1))) for n in range(3)]
    other = web.put("/other", encode(draw(2)))
    web.results["cup"] = [*twins, other]
    gathered = run(web, {"cup": ["cup", "cup", twins[0], twins[0] + "#x"]}, out)
    assert gathered.counts == {"cup": 2}
    assert (gathered.num_copies, gathered.num_ambiguous, gathered.failures) == (2, 0, ())
    assert len(web.asked("/twin")) == 3
    web.requests.clear()
    again = run(web, {"cup": ["cup"]}, out)
    assert (again.num_copies, web.asked("/twin"), web.asked("/other")) == (2, [], [])
    check_sound(out)
    # A copy stands in for a photo that was lost and cannot be had again.
    (row,) = (row for row in kept(out).values() if row["url"] != other)
    (out / row["file"]).unlink()
    web.put(row["url"].partition(str(web.port))[2], Answer(status=410))
    assert run(web, {"cup": ["cup"]}, out).counts == {"cup": 2}
    check_sound(out)


@pytest.mark.parametrize("same_url", [True, False])
@pytest.mark.parametrize("runs", [1, 2])
def test_what_several_labels_have_is_dropped_from_each(same_url, runs, web, out):
    shared = web.put("/shared", encode(draw(1)))
    copy = shared if same_url else web.put("/copy", encode(draw(1)))
    own = web.put_pictures(2, first=10)
    queries = {"cup": [own[0], shared], "mug": [own[1], copy]}
    if runs == 2:
        assert run(web, {"cup": queries["cup"]}, out).counts == {"cup": 2}
    for _ in range(2):
        gathered = run(web, queries, out)
        assert gathered.counts == {"cup": 1, "mug": 1}
        assert (gathered.num_copies, gathered.num_ambiguous) == (0, 2)
        check_sound(out)
    assert len(web.asked("/shared")) == 1
    assert len(web.asked("/copy")) == (not same_url)


def test_a_run_that_was_killed_between_the_two_of_a_pair(web, out):
    """Near copies of two labels, one of them dropped: the other is of no certain label either."""
    urls = [web.put(f"/{q}", encode(draw(1, (320, 240)), quality=q)) for q in (90, 60)] + web.put_pictures(
        1, 9
    )
    queries = {"cup": [urls[0]], "mug": urls[1:]}
    run(web, {"mug": urls[1:]}, out)
    (mug,) = (row for row in rows(out) if row["url"] == urls[1])
    picture = (out / mug["file"]).read_bytes()
    assert run(web, queries, out).counts == {"cup": 0, "mug": 1}
    lines = (out / PROVENANCE).read_text().splitlines(keepends=True)
    (out / PROVENANCE).write_text("".join(line for line in lines if not is_drop(line, "mug")))
    (out / mug["file"]).write_bytes(picture)
    assert run(web, queries, out).counts == {"cup": 0, "mug": 1}
    check_sound(out)


def is_drop(line: str, label: str) -> bool:
    row = json.loads(line)
    return row["label"] == label and bool(row["duplicate_of"])


def test_near_copies_the_largest_file_of_a_label_stays_and_none_of_several(web, out):
    def put(path: str, number: int, size: tuple[int, int], quality: int = 90) -> str:
        return web.put(path, encode(draw(number, (320, 240)).resize(size), quality=quality))

    small, large = put("/small", 1, (160, 120)), put("/large", 1, (320, 240))
    cup, mug = put("/cup", 2, (320, 240)), put("/mug", 2, (200, 150), quality=60)
    own = web.put_pictures(2, first=10)
    queries = {"cup": [small, large, cup, own[0]], "mug": [mug, own[1]]}
    gathered = run(web, queries, out)
    assert {row["url"] for row in kept(out).values()} == {large, *own}
    assert (gathered.counts, gathered.num_copies, gathered.num_ambiguous) == ({"cup": 2, "mug": 1}, 1, 2)
    assert gathered.num_new == 3
    assert "3 photos, 3 of them new" in str(gathered)
    check_sound(out)
    web.requests.clear()
    assert run(web, queries, out).counts == gathered.counts
    assert not web.requests


def test_kept_photos_are_compared_again_only_where_some_came_or_a_run_was_stopped(web, out, monkeypatch):
    urls = [web.put(f"/{q}", encode(draw(1, (320, 240)), quality=q)) for q in (90, 60)]

    def stop(photos):
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(gather_module, "find_duplicates", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            run(web, {"cup": urls}, out)
    assert len(kept(out)) == 2
    gathered = run(web, {"cup": urls}, out)
    assert (gathered.num_new, gathered.counts) == (0, {"cup": 1})
    monkeypatch.setattr(gather_module, "find_duplicates", stop)
    assert run(web, {"cup": urls}, out).counts == {"cup": 1}
    with pytest.raises(RuntimeError, match="stopped"):
        run(web, {"cup": [*urls, web.put("/other", encode(draw(2)))]}, out)


def test_a_large_folder_is_gathered_in_batches(out, tmp_path, monkeypatch):
    (tmp_path / "cups").mkdir()
    for n in range(23):
        draw(n, (48, 48)).save(tmp_path / "cups" / f"{n}.png")
    (tmp_path / "cups" / "bad.png").write_text("no picture")
    now = most = 0
    take = gather_module._Gathering._take

    async def counted(self, *arguments):
        nonlocal now, most
        now += 1
        most = max(most, now)
        try:
            return await take(self, *arguments)
        finally:
            now -= 1

    monkeypatch.setattr(gather_module._Gathering, "_take", counted)
    monkeypatch.setattr(gather_module, "BATCH_SIZE", 5)
    gathered = gather({"cup": [str(tmp_path / "cups")]}, out)
    assert (gathered.counts, len(gathered.failures)) == ({"cup": 23}, 1)
    assert most == 5


# What is broken.


def test_failures_are_listed_and_stop_nothing(web, out, tmp_path):
    picture = encode(draw(1))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "text.jpg").write_text("no picture")
    bad = {
        "/404": (Answer(status=404), "404 Not Found"),
        "/html": (
            Answer(b"<html>", headers={"Content-Type": "image/jpeg"}),
            "not an image in a known format",
        ),
        "/cut": (picture[:2000], "damaged or unsupported JPEG"),
        "/short": (Answer(picture, length=len(picture) + 10), "the connection failed"),
        "/large": (Answer(picture + bytes(10**6)), "longer than 1,000,000 bytes"),
        "/huge": (encode(Image.new("1", (7000, 7000)), "PNG"), "at most 40,000,000 are decoded"),
        "/loop": (Answer(status=302, headers={"Location": "/loop"}), "more than 5 redirects"),
        "/inside": (
            Answer(status=302, headers={"Location": f"http://127.0.0.1:{web.port}/"}),
            "not on the public internet",
        ),
        "/dead": (Answer(status=500), "500 Internal Server Error"),
    }
    urls = {web.put(path, page): reason for path, (page, reason) in bad.items()}
    urls |= {"http://127.0.0.1/": "not on the public internet", "http://[::1": "not a valid URL"}
    good = web.put("/good", encode(draw(2)))
    local = {
        str(tmp_path / "folder"): "not an image in a known format",
        str(tmp_path / "none"): "No such file",
    }
    gathered = run(web, {"cup": [*urls, good, *local], "none": [next(iter(urls))]}, out)
    assert gathered.counts == {"cup": 1, "none": 0}
    assert gathered.empty_labels == ("none",)
    assert len(gathered.failures) == len(urls) + len(local) + 1
    for query, reason in (urls | local).items():
        (failure,) = (f for f in gathered.failures if (f.label, f.query) == ("cup", query))
        assert reason in failure.reason
        assert str(failure).startswith(f"cup: {query}")
        assert "\n" not in str(failure)
    assert len(web.asked("/404")) == 1
    assert len(web.asked("/dead")) == QUICK.num_attempts
    check_sound(out)


def test_a_disk_without_room_is_one_error_that_names_the_file(web, out, tmp_path, capsys):
    """A limit to the size of files stands in for it: both end a write with an error, when some is written."""
    (tmp_path / "cups").mkdir()
    for n in range(3):
        (tmp_path / "cups" / f"{n}.jpg").write_bytes(encode(draw(n)))
    (tmp_path / "queries.json").write_text('{"cup": ["./cups"]}')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        assert main(["gather", str(tmp_path / "queries.json"), "--out", str(out)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"jaxcls: {out / PARTIAL}/")
    assert error.endswith(" cannot be written: File too large")
    assert run(web, {"cup": [str(tmp_path / "cups")]}, out).counts == {"cup": 3}
    check_sound(out)


def test_a_server_that_never_ends_is_left(web, out):
    url = web.put("/drip", Answer(encode(draw(1)), chunk_delay=0.1))
    guard, limits = replace(web.guard, seconds=0.3), replace(QUICK, num_attempts=1)
    (failure,) = run(web, {"cup": [url]}, out, guard=guard, limits=limits).failures
    assert str(failure) == f"cup: {url}: not complete after 0.3 seconds"


def test_what_fails_for_now_is_tried_again_when_the_host_says_so(web, out):
    busy = Answer(status=429, headers={"Retry-After": "1"})
    url = web.put("/busy", busy, Answer(status=503), encode(draw(1)))
    patient = web.put("/later", Answer(status=503, headers={"Retry-After": "3600"}))
    gathered = run(web, {"cup": [url, patient]}, out)
    assert gathered.counts == {"cup": 1}
    first, second, _ = web.asked("/busy")
    assert second.start - first.start > 0.95
    assert len(web.asked("/later")) == 1
    assert "503 Service Unavailable" in gathered.failures[0].reason


def test_a_search_is_tried_again_and_its_failure_is_listed(web, out):
    web.results |= {"cup": web.put_pictures(2), "mug": web.put_pictures(2, first=10)}
    web.search_answers = [Answer(status=502), Answer(b"<html>")]
    gathered = run(web, {"cup": ["cup"], "mug": ["mug"]}, out)
    assert sum(gathered.counts.values()) == 2
    assert "the answer is not JSON" in gathered.failures[0].reason
    assert len(web.asked("/search")) == 3


def test_a_quota_that_is_used_up_ends_searching_and_nothing_else(web, out):
    urls = web.put_pictures(3)
    web.results["cup"] = urls[:2]
    used_up = Answer(b'{"detail": "Request was throttled."}', 429, {"Retry-After": "40000"})
    provider = openverse(web)
    assert run(web, {"cup": ["cup"]}, out, provider=provider).counts == {"cup": 2}
    web.requests.clear()
    web.search_answers = [used_up] * 5
    gathered = run(web, {"cup": ["cup"], "mug": ["mug"], "jug": ["jug", urls[2]]}, out, provider=provider)
    assert len(web.asked("/search")) == 1
    assert gathered.counts == {"cup": 2, "mug": 0, "jug": 1}
    assert len(gathered.failures) == 3
    assert all("429 Too Many Requests: Request was throttled." in f.reason for f in gathered.failures)


@pytest.mark.parametrize("kind", [SerpApi, Brave, Openverse])
def test_a_refusal_is_one_error_without_the_key(kind, web, out, caplog):
    caplog.set_level(logging.DEBUG)
    urls = web.results["cup"] = web.put_pictures(4)
    wrong = "wrong-key-98765/+"
    if kind is Openverse:
        provider, web.search_answers = openverse(web), [Answer(status=403)] * 3
    else:  # SerpApi's answer quotes the key
        provider = kind(Key(wrong), web.url(f"/search/{kind.__name__.lower()}"), interval_seconds=0)
    with pytest.raises(DownloadError) as caught:
        run(web, {"cup": [urls[0], "cup"], "mug": ["mug"], "jug": ["jug"]}, out, provider=provider)
    assert len(web.asked("/search")) == 1
    assert caught.value.status == (403 if kind is Openverse else 401)
    message = str(caught.value)
    assert message.startswith(provider.url)
    assert f"check the key of {provider.name}" in message
    assert wrong not in message + caplog.text + repr(caught.value) + repr(provider)
    chain = caught.value
    while chain is not None:
        assert wrong not in str(chain)
        chain = chain.__cause__ or chain.__context__


def test_results_that_are_no_web_addresses_are_no_results(web, out, tmp_path):
    secret = tmp_path / "secret.png"
    draw(1).save(secret)
    web.results["cup"] = [secret.as_uri(), str(secret), "ftp://x.example/y", "", *web.put_pictures(1)]
    gathered = run(web, {"cup": ["cup"]}, out)
    assert (gathered.counts, gathered.failures) == ({"cup": 1}, ())


# Politeness.


def test_hosts_are_asked_few_at_a_time_and_not_too_often(web, out):
    for host, first in ((HOST, 0), (OTHER_HOST, 50)):
        for n in range(first, first + 12):
            web.put(f"/photos/{n}", Answer(encode(draw(n)), delay=0.1), host=host)
    urls = [web.url(path, host) for host, path in web.pages]
    limits = replace(QUICK, num_per_host=3, num_requests=5)
    assert run(web, {"cup": urls}, out, limits=limits).counts == {"cup": 24}
    assert most_at_once([r for r in web.requests if r.host == HOST]) <= 3
    assert most_at_once(web.requests) <= 5

    web.requests.clear()
    for path in (out / "cup").iterdir():
        path.unlink()
    run(web, {"cup": urls[:6]}, out, limits=replace(QUICK, interval_seconds=0.1))
    starts = sorted(request.start for request in web.requests)
    assert starts[-1] - starts[0] > 0.3


def test_redirects_wait_for_the_turn_of_the_host_that_they_lead_to(web, out):
    photos = [web.put(f"/photos/{n}", Answer(encode(draw(n)), delay=0.2)) for n in range(8)]
    far = [
        web.put(f"/far/{n}", Answer(status=302, headers={"Location": photos[n]}), host=OTHER_HOST)
        for n in range(4, 8)
    ]
    urls = [url for pair in zip(far, photos[:4], strict=True) for url in pair]
    assert run(web, {"cup": urls}, out, limits=replace(QUICK, num_per_host=2)).counts == {"cup": 8}
    assert most_at_once(web.asked("/photos")) <= 2


# What is asked for.


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not JSON"),
        ('{"cup": ["a"]', "line 1 column 14"),
        ("[" * 100_000, "not JSON"),
        ('{"cup": ["a"], "cup": ["b"]}', "'cup' is there twice"),
        ("{}", "a label or more"),
        ("[]", "a label or more"),
        ('{"cup": "blue cup"}', "label 'cup': its queries are a list"),
        ('{"cup": []}', "label 'cup': its queries are a list"),
        ('{"cup": ["a", ""]}', "label 'cup', query 2: not a line of text"),
        ('{"cup": ["a", 5]}', "label 'cup', query 2: not a line of text"),
        ('{"cup": ["a\\nb"]}', "label 'cup', query 1: not a line of text"),
        ('{"": ["a"]}', "'' is empty"),
        ('{"a/b": ["a"], "..": ["a"], "c": ["b"]}', "'a/b' holds a slash, a backslash or"),
        ('{"a/b": ["a"], "..": ["a"], "c": ["b"]}', "'..' begins with a dot"),
        ('{"a\\\\b": ["a"]}', "holds a slash"),
        ('{"a\\u0000b": ["a"]}', "control character"),
        ('{"\\ud800": ["a"]}', "control character"),
        ('{" cup": ["a"]}', "begins or ends with a space"),
        ('{"provenance.jsonl": ["a"]}', "the file beside the folders"),
        (json.dumps({"x" * 300: ["a"]}), "longer than 200 bytes"),
        ('{"Cup": ["a"], "cup": ["b"]}', "'Cup' and 'cup' would be the same folder"),
        ('{"caf\\u00e9": ["a"], "cafe\\u0301": ["b"]}', "would be the same folder"),
    ],
    ids=lambda value: value[:30],
)  # fmt: skip
def test_queries_that_cannot_work(text, problem, tmp_path):
    path = tmp_path / "queries.json"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_queries(path)
    assert problem in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_of_queries_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_queries(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(b'{"caf\xe9": ["a"]}')
    with pytest.raises(UsageError, match="not a text in UTF-8"):
        read_queries(tmp_path / "latin.json")


def test_relative_folders_are_meant_from_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job").mkdir()
    Path("job/queries.json").write_text(
        '{"cup": ["../cups", "./c", "/abs", "cups", "https://a.example/../b"]}'
    )
    found = read_queries("job/queries.json")["cup"]
    assert found == [f"{tmp_path}/job/../cups", f"{tmp_path}/job/c", "/abs", "cups", "https://a.example/../b"]


def test_folders_that_cannot_be_gathered_into(web, out, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").write_text("mine")
    with pytest.raises(UsageError, match="holds something else than gathered photos"):
        run(web, {"cup": ["cup"]}, other)
    with pytest.raises(UsageError, match="lie in one another"):
        run(web, {"cup": [str(tmp_path)]}, out)
    with pytest.raises(UsageError, match="lie in one another"):
        run(web, {"cup": [str(out / "cup")]}, out)
    with pytest.raises(UsageError, match=r"cannot hold photos: (File exists|Not a directory)"):
        run(web, {"cup": ["cup"]}, other / "file")
    with pytest.raises(UsageError, match="at least 1 photo"):
        run(web, {"cup": ["cup"]}, out, per_query=0)
    assert not web.requests
    assert list(other.iterdir()) == [other / "file"]


def test_damaged_provenance_is_an_error_and_reaches_no_other_file(web, out, tmp_path):
    victim = tmp_path / "victim.png"
    draw(1).save(victim)
    web.results["cup"] = web.put_pictures(1)
    run(web, {"cup": ["cup"]}, out)
    (row,) = rows(out)
    for change in (
        {"file": "../victim.png", "duplicate_of": "x"},
        {"file": "cup/../../victim.png", "duplicate_of": "x"},
        {"label": "..", "file": f"../{row['sha256'][:20]}.jpeg"},
        {"sha256": "x"},
        {"url": 5},
    ):
        (out / PROVENANCE).write_text(json.dumps({**row, **change}) + "\n")
        with pytest.raises(DatasetError, match=r"provenance\.jsonl, line 1: .*delete the line"):
            run(web, {"cup": ["cup"]}, out)
    assert victim.exists()


# The command line.


@pytest.fixture
def queries(tmp_path):
    """A file of queries for two folders of photos."""
    for label, first in (("cup", 0), ("mug", 10)):
        (tmp_path / label).mkdir()
        for n in range(first, first + 3):
            draw(n).save(tmp_path / label / f"{n}.png")
    path = tmp_path / "queries.json"
    path.write_text('{"cup": ["./cup"], "mug": ["./mug", "http://127.0.0.1/x.jpg"]}')
    return path


def test_the_command(queries, out, capsys):
    assert main(["gather", str(queries), "--out", str(out)]) == 0
    output = capsys.readouterr()
    assert output.out.splitlines()[:3] == [f"{out}: 6 photos, 6 of them new", "  cup  3", "  mug  3"]
    assert output.err.startswith("jaxcls: mug: http://127.0.0.1/x.jpg: 127.0.0.1 is not on the public")
    assert main(["gather", str(queries), "--out", str(out)]) == 0
    assert "6 photos, 0 of them new" in capsys.readouterr().out
    assert main(["info", str(out)]) == 0


def test_a_label_without_a_photo_is_exit_code_1(queries, out, tmp_path, capsys):
    (tmp_path / "jug").mkdir()
    queries.write_text('{"cup": ["./cup"], "jug": ["./jug"]}')
    assert main(["gather", str(queries), "--out", str(out)]) == 1
    output = capsys.readouterr()
    assert "  jug  0" in output.out
    assert "jug: no photo" in output.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--provider", "brave"], "--provider brave needs a key: give --key-file, or set BRAVE_API_KEY"),
        (
            ["--provider", "serpapi"],
            "--provider serpapi needs a key: give --key-file, or set SERPAPI_API_KEY",
        ),
        (["--provider", "serpapi", "--key-file", "KEYS"], "visible ASCII characters"),
        (["--key-file", "KEYS"], "--key-file does not go with --provider openverse"),
        (["--per-query", "0"], "per_query is 0"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, queries, out, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("BRAVE_API_KEY", raising=False)
    monkeypatch.delenv("SERPAPI_API_KEY", raising=False)
    (tmp_path / "keys").write_text("# mine\ntwo words\n")
    arguments = [str(tmp_path / "keys") if a == "KEYS" else a for a in arguments]
    assert main(["gather", str(queries), "--out", str(out), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxcls: ")
    assert message in error
    assert "two words" not in error


def test_photos_of_the_shared_folder(out):
    """Real photos: tableware has two pairs of plates that were taken seconds apart."""
    folder = SHARED / "data" / "tableware"
    if not folder.is_dir():
        pytest.skip(f"the photos that this test reads are not at {folder}")
    photos = read_folder(folder)
    copies = find_duplicates(photos)
    assert (copies.num_exact, copies.num_near) == (0, 2)
    gathered = gather({label: [str(folder / label)] for label in photos.classes}, out)
    assert (gathered.num_copies, gathered.num_ambiguous, gathered.failures) == (2, 0, ())
    assert read_folder(out).classes == photos.classes
    assert sum(gathered.counts.values()) == len(read_folder(out)) == len(photos) - 2
    check_sound(out)

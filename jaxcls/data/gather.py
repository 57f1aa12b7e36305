"""{label: [text query | image URL | local folder]} -> a folder of photos, each with its provenance.

What a query is shows in how it begins: `http://` or `https://` is the URL of one image; `/`, `~/`, `./` or
`../` a folder on this machine; anything else words for an image search.

A photo is kept as `LABEL/DIGITS.SUFFIX`, after its sha256 and what its bytes are. It takes that name only
once it could be decoded, is whole, and has its line in `provenance.jsonl`: after a run that was killed at any
time, run it again. That fetches what is missing: what failed, what was deleted, and further results of a
search of which some failed or were dropped.

Of photos of one label that show the same, the first of exact copies and the largest file of near ones stay.
Photos of several labels that show the same are dropped from each: no label is certain.
"""

import asyncio
import hashlib
import json
import shutil
import unicodedata
from collections import Counter, defaultdict
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from uuid import uuid4

import numpy as np

from jaxcls.data.dataset import ID_DTYPE, Dataset
from jaxcls.data.download import PUBLIC, Guard, fetched, is_url
from jaxcls.data.duplicates import find_duplicates
from jaxcls.data.folder import list_images
from jaxcls.data.image_search import REFUSED, Found, Openverse, Provider, Searcher
from jaxcls.data.images import MAX_PIXELS, format_name, open_photo, read_bytes
from jaxcls.data.pacing import POLITE, Limits, Pacer
from jaxcls.data.provenance import PROVENANCE, Origin, Provenance, file_of, label_problem
from jaxcls.data.source import FileSource
from jaxcls.errors import DatasetError, DownloadError, ImageError, JaxclsError, UsageError
from jaxcls.progress import show_progress
from jaxcls.storage import locked

Tick = Callable[[int], object]

PER_QUERY = 50
MAX_PAGES = 50
"""Of one search, which a page without anything new ends earlier, or that after `per_query` results."""
BATCH_SIZE = 256
"""Photos of one query that are under way together."""
CHECKED_SIDE = 64
"""Pixels of the short side at which a photo is decoded to see whether it can be."""
PARTIAL = ".partial"
"""The folder of what is not whole yet, below the one that is gathered into. A stopped run leaves it."""


@dataclass(frozen=True)
class Failure:
    """What one label did not get, and why.

    Attributes:
        label: that lacks it.
        query: that asked for it.
        reason: with its URL or path.
    """

    label: str
    query: str
    reason: str

    def __str__(self) -> str:
        named = self.label if self.query in self.reason else f"{self.label}, {self.query!r}"
        return f"{named}: {self.reason}"


@dataclass(frozen=True)
class Gathered:
    """What there is after a run.

    Attributes:
        folder: of the photos, for `read_folder`.
        counts: label -> photos.
        num_new: photos that this run added, without those that it dropped again.
        num_copies: photos that were dropped for another one of their label, by this run or an earlier one.
        num_ambiguous: those that were dropped because photos of other labels show the same.
        failures: what this run could not get.
    """

    folder: Path
    counts: Mapping[str, int]
    num_new: int
    num_copies: int
    num_ambiguous: int
    failures: tuple[Failure, ...]

    @property
    def empty_labels(self) -> tuple[str, ...]:
        """Labels without any photo."""
        return tuple(label for label, count in self.counts.items() if not count)

    def __str__(self) -> str:
        width = max(map(len, self.counts))
        return "\n".join(
            [
                f"{self.folder}: {sum(self.counts.values())} photos, {self.num_new} of them new",
                *(f"  {label:{width}}  {count}" for label, count in self.counts.items()),
                f"dropped: {self.num_copies} copies within a label, "
                f"{self.num_ambiguous} photos that several labels have",
                f"failed: {len(self.failures)}",
            ]
        )


def read_queries(path: str | Path) -> dict[str, list[str]]:
    """Read a JSON file of queries. Folders that begin with `./` or `../` are meant from where the file lies.

    Raises:
        UsageError: it cannot be read, is no JSON, names a label twice, or is not as `gather` wants it.
    """
    try:
        queries = json.loads(Path(path).read_text("utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a text in UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON as it should be: {error}") from error
    try:
        check_queries(queries)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    base = Path(path).parent.absolute()
    return {
        label: [str(base / query) if query.startswith(_RELATIVE) else query for query in found]
        for label, found in queries.items()
    }


_RELATIVE = ("./", "../")
_FOLDERS = ("/", "~/", *_RELATIVE)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} is there twice")
    return dict(pairs)


def check_queries(queries: object) -> None:
    """Check that every label can be a folder's name and has a list of queries.

    Raises:
        UsageError: otherwise, with all labels that cannot be names.
    """
    if not isinstance(queries, Mapping) or not queries:
        raise UsageError(
            'queries are {"LABEL": ["words", "https://...", "./folder"], ...}, with a label or more'
        )
    problems = [
        f"{label!r} {problem}"
        for label in queries
        if (problem := label_problem(label) if isinstance(label, str) else "is no text")
    ]
    if problems:
        raise UsageError(f"labels that cannot be the names of folders: {'; '.join(problems)}")
    folded: dict[str, str] = {}
    for label in queries:
        other = folded.setdefault(unicodedata.normalize("NFKC", label).casefold(), label)
        if other != label:
            raise UsageError(f"labels {other!r} and {label!r} would be the same folder on some systems")
    for label, found in queries.items():
        if isinstance(found, str) or not isinstance(found, Sequence) or not found:
            raise UsageError(f"label {label!r}: its queries are a list of one or more, in brackets")
        for position, query in enumerate(found, start=1):
            if not isinstance(query, str) or not query.strip() or not query.isprintable():
                raise UsageError(f"label {label!r}, query {position}: not a line of text, but {query!r}")


def gather(
    queries: Mapping[str, Sequence[str]],
    out: str | Path,
    *,
    provider: Provider | None = None,
    per_query: int = PER_QUERY,
    max_pixels: int = MAX_PIXELS,
    limits: Limits = POLITE,
    guard: Guard = PUBLIC,
) -> Gathered:
    """Gather photos into `out`, a folder for each label, beside `provenance.jsonl`.

    What cannot be had is listed and stops nothing. Ctrl-C stops at once; what is there stays.

    Args:
        queries: label -> text queries, image URLs and local folders.
        out: a new folder, or one that photos were gathered into before.
        provider: whom to ask for text queries. Default: `image_search.Openverse()`.
        per_query: photos wanted of each text query. The page after so many results is the last that is
            asked for, whatever fails: searches may cost money.
        max_pixels: height times width above which a photo is refused.
        limits: how hard hosts are pressed, the provider's included.
        guard: what may be fetched, and how much that may take.

    Raises:
        UsageError: queries that `check_queries` refuses, a folder that holds something else, lies in
            one that is gathered from, or that another process gathers into.
        DatasetError: `provenance.jsonl` is damaged, or the disk is full.
        DownloadError: the provider refuses whatever we ask, such as for a wrong key.
    """
    check_queries(queries)
    if per_query < 1:
        raise UsageError(f"per_query is {per_query}: want at least 1 photo of each query")
    root = Path(out)
    _check_folders(queries, root)
    with _open_collection(root) as collection:
        work = _Gathering(collection, provider or Openverse(), per_query, max_pixels, limits, guard)
        jobs = work.plan(queries)
        _run(lambda tick: work.run(jobs, tick), total=sum(job.num_wanted for job in jobs))
        collection.drop_near_copies(max_pixels)
        return collection.report(queries, work.failures)


def _check_folders(queries: Mapping[str, Sequence[str]], root: Path) -> None:
    """Refuse to gather into a folder that is gathered from."""
    here = root.resolve()
    for query in (query for found in queries.values() for query in found if query.startswith(_FOLDERS)):
        there = Path(query).expanduser().resolve()
        if here.is_relative_to(there) or there.is_relative_to(here):
            raise UsageError(f"{root} and the query {query!r} lie in one another: gather into another folder")


@dataclass(frozen=True)
class _Photo:
    """A decodable photo, and the partial file that holds it, unless its URL was fetched by an earlier run."""

    sha256: str
    suffix: str
    file: Path | None


class _Collection:
    """The folder and its provenance. One thread at a time changes it."""

    def __init__(self, root: Path, provenance: Provenance) -> None:
        self._root, self._provenance = root, provenance
        self._was_stopped = (root / PARTIAL).exists()
        self.partial = root / PARTIAL
        self._new: set[tuple[str, str]] = set()
        origins = provenance.origins.values()
        kept = {origin.file for origin in origins if not origin.duplicate_of}
        missing = {file for file in kept if not (root / file).is_file()}
        self._origins: dict[tuple[str, str], Origin] = {}
        self._by_content: dict[str, list[tuple[str, str]]] = defaultdict(list)
        self._by_url: dict[str, Origin] = {}
        for origin in list(origins):
            if origin.duplicate_of and origin.file not in kept:
                self._path(origin).unlink(missing_ok=True)  # where a run was killed before it came to that
            if (origin.duplicate_of or origin.file) not in missing:
                self._know(origin)
        by_file = {origin.file: origin for origin in self._kept()}
        for origin in list(self._origins.values()):  # or between the two of a pair
            twin = by_file.get(origin.duplicate_of)
            if twin is not None and twin.label != origin.label:
                self._drop(twin, origin)

    def knows(self, label: str, url: str) -> bool:
        """Whether there is nothing left to fetch from a URL for a label."""
        return (label, url) in self._origins

    def photo_at(self, url: str) -> _Photo | None:
        """What a URL brought for whatever label, if it was fetched by an earlier run."""
        if url not in self._by_url:
            return None
        origin = self._by_url[url]
        return _Photo(origin.sha256, origin.file.rpartition(".")[2], file=None)

    def num_kept(self, label: str, query: str) -> int:
        return sum((origin.label, origin.query) == (label, query) for origin in self._kept())

    def add(self, origin: Origin, photo: _Photo) -> bool:
        """Keep a photo, unless its content is known: then drop it, and those of other labels too."""
        known = [self._origins[key] for key in self._by_content[origin.sha256]]
        others = [other for other in known if other.label != origin.label]
        for other in others:
            if not other.duplicate_of:
                self._drop(other, origin)
        if twins := others or [twin for twin in known if not twin.duplicate_of]:
            self._record(replace(origin, duplicate_of=twins[0].file))
            return False
        assert photo.file is not None, "what an earlier run fetched is known by its content"
        self._record(origin)
        path = self._path(origin)
        path.parent.mkdir(exist_ok=True)
        photo.file.replace(path)
        self._new.add((origin.label, origin.url))
        return True

    def drop_near_copies(self, max_pixels: int) -> None:
        """Of photos that show the same, keep the largest file; none where they are of several labels.

        Where this run added nothing, and the one before it came to its end, there are none: no photo is read.
        """
        if not self._new and not self._was_stopped:
            return
        kept = self._kept()
        labels = sorted({origin.label for origin in kept})
        files = np.asarray([origin.file for origin in kept], ID_DTYPE)
        photos = Dataset(
            name=self._root.name,
            classes=tuple(labels),
            labels=np.asarray([labels.index(origin.label) for origin in kept], np.int32),
            ids=files,
            source=FileSource(self._root, files),
            max_pixels=max_pixels,
        )
        for group in find_duplicates(photos).members:
            alike = sorted((kept[i] for i in group), key=self._size, reverse=True)
            for origin in alike:
                other = next((other for other in alike if other.label != origin.label), alike[0])
                if other is not origin:
                    self._drop(origin, other)

    def report(self, labels: Iterable[str], failures: Sequence[Failure]) -> Gathered:
        counts = Counter(dict.fromkeys(labels, 0))
        counts.update(origin.label for origin in self._kept())
        dropped = [origin for origin in self._origins.values() if origin.duplicate_of]
        num_copies = sum(origin.duplicate_of.startswith(f"{origin.label}/") for origin in dropped)
        order = list(counts)
        return Gathered(
            folder=self._root,
            counts=dict(counts),
            num_new=sum((origin.label, origin.url) in self._new for origin in self._kept()),
            num_copies=num_copies,
            num_ambiguous=len(dropped) - num_copies,
            failures=tuple(
                sorted(failures, key=lambda failure: (order.index(failure.label), failure.reason))
            ),
        )

    def _kept(self) -> list[Origin]:
        return [origin for origin in self._origins.values() if not origin.duplicate_of]

    def _path(self, origin: Origin) -> Path:
        return self._root / origin.file

    def _size(self, origin: Origin) -> tuple[int, str]:
        return self._path(origin).stat().st_size, origin.file

    def _drop(self, origin: Origin, twin: Origin) -> None:
        self._record(replace(origin, duplicate_of=twin.file))
        self._path(origin).unlink(missing_ok=True)

    def _record(self, origin: Origin) -> None:
        self._provenance.add(origin)
        self._know(origin)

    def _know(self, origin: Origin) -> None:
        key = (origin.label, origin.url)
        if key not in self._origins:
            self._by_content[origin.sha256].append(key)
            self._by_url.setdefault(origin.url, origin)
        self._origins[key] = origin


@contextmanager
def _open_collection(root: Path) -> Iterator[_Collection]:
    """A new folder, or one that was gathered into before; nobody else's while the block runs."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        if any(root.iterdir()) and not (root / PROVENANCE).is_file():
            raise UsageError(f"{root} holds something else than gathered photos: give a new folder")
    except OSError as error:
        raise UsageError(f"{root} cannot hold photos: {error.strerror}") from error
    with locked(root) as is_ours:
        if not is_ours:
            raise UsageError(f"{root}: another process is gathering into it: wait for its end")
        with Provenance(root / PROVENANCE) as provenance:
            collection = _Collection(root, provenance)
            _empty(collection.partial)  # of a run that was killed
            try:
                yield collection
            except BaseException:
                _empty(collection.partial)
                raise
            shutil.rmtree(collection.partial)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


@dataclass(frozen=True)
class _Job:
    """One query of one label.

    Attributes:
        found: where its photos are; None for a text query.
        num_wanted: photos.
    """

    label: str
    query: str
    found: tuple[Found, ...] | None
    num_wanted: int


class _Gathering:
    """One run: queries -> photos in the collection."""

    def __init__(
        self,
        collection: _Collection,
        provider: Provider,
        per_query: int,
        max_pixels: int,
        limits: Limits,
        guard: Guard,
    ) -> None:
        self._collection, self._max_pixels, self._guard = collection, max_pixels, guard
        self._provider, self._per_query = provider, per_query
        self._searcher = Searcher(provider, limits, guard)
        self._pacer = Pacer(limits)
        self._paths: dict[str, Path] = {}
        self._photos: dict[str, asyncio.Task[_Photo | JaxclsError]] = {}
        self._claimed: set[tuple[str, str]] = set()
        self.failures: list[Failure] = []

    def plan(self, queries: Mapping[str, Sequence[str]]) -> list[_Job]:
        """What is to be done; local folders are listed."""
        jobs = []
        for label, texts in queries.items():
            for query in dict.fromkeys(texts):
                if is_url(query) or query.startswith(_FOLDERS):
                    found = self._list(label, query)
                    found = tuple(item for item in found if not self._collection.knows(label, item.url))
                    jobs.append(_Job(label, query, found, len(found)))
                else:
                    num_wanted = max(0, self._per_query - self._collection.num_kept(label, query))
                    jobs.append(_Job(label, query, None, num_wanted))
        return jobs

    def _list(self, label: str, query: str) -> tuple[Found, ...]:
        if is_url(query):
            return (Found(query.partition("#")[0]),)
        folder = Path(query).expanduser().absolute()
        try:
            listing = list_images(folder)
            paths = [folder / name for name in sorted([*listing.images, *listing.not_utf8])]
            if not paths:
                raise DatasetError(f"{query}: no images")
        except DatasetError as error:
            self.failures.append(Failure(label, query, str(error)))
            return ()
        self._paths |= {path.as_uri(): path for path in paths}
        return tuple(Found(path.as_uri()) for path in paths)

    async def run(self, jobs: Sequence[_Job], tick: Tick) -> None:
        """Do it; `tick` hears the number of photos that came, or will not come."""
        await asyncio.gather(*(self._do(job, tick) for job in jobs))

    async def _do(self, job: _Job, tick: Tick) -> None:
        """Take what is wanted; further results, if there are any, stand in for what fails or is known."""
        num_wanted = job.num_wanted
        results = self._search(job.query) if job.found is None else _listed(job.found)
        async with aclosing(results):
            while num_wanted and (batch := await self._next(job, results, min(num_wanted, BATCH_SIZE))):
                taken = await asyncio.gather(*(self._take(job, found, tick) for found in batch))
                num_wanted -= sum(taken)
        tick(num_wanted)

    async def _next(self, job: _Job, results: AsyncIterator[Found], count: int) -> list[Found]:
        """So many results that the label lacks, or those that there are."""
        batch: list[Found] = []
        try:
            async for found in results:
                key = (job.label, found.url)
                if key not in self._claimed and not self._collection.knows(*key):
                    self._claimed.add(key)
                    batch.append(found)
                if len(batch) == count:
                    break
        except DownloadError as error:
            if error.status in REFUSED:
                raise
            self._fail(job, error)
        return batch

    async def _search(self, query: str) -> AsyncGenerator[Found]:
        seen: set[str] = set()
        num_found = 0
        for number in range(MAX_PAGES):
            page = await self._searcher.search(query, number)
            for found in page.found:
                yield found
            urls = {found.url for found in page.found}
            if page.is_last or urls <= seen or num_found >= self._per_query:
                return
            seen |= urls
            num_found += len(page.found)

    async def _take(self, job: _Job, found: Found, tick: Tick) -> bool:
        """Whether the photo was kept."""
        photo = await self._photo(found.url)
        if isinstance(photo, JaxclsError):
            self._fail(job, photo)
            return False
        origin = Origin(
            label=job.label,
            file=file_of(job.label, photo.sha256, photo.suffix),
            sha256=photo.sha256,
            query=job.query,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            provider=self._provider.name if job.found is None else "",
            **asdict(found),
        )
        is_kept = self._collection.add(origin, photo)
        if is_kept:
            tick(1)
        return is_kept

    def _fail(self, job: _Job, error: JaxclsError) -> None:
        self.failures.append(Failure(job.label, job.query, str(error)))

    async def _photo(self, url: str) -> _Photo | JaxclsError:
        """What lies at a URL, fetched once however many labels want it."""
        if url not in self._photos:
            self._photos[url] = asyncio.create_task(self._bring(url))
        return await self._photos[url]

    async def _bring(self, url: str) -> _Photo | JaxclsError:
        if (photo := self._collection.photo_at(url)) is not None:
            return photo
        try:
            if path := self._paths.get(url):
                return await asyncio.to_thread(lambda: self._check(str(path), read_bytes(path)))
            return await self._pacer.send(partial(self._fetch, url))
        except (DownloadError, ImageError) as error:
            return error

    async def _fetch(self, url: str) -> _Photo:
        async with fetched(url, self._guard, self._pacer.turn) as data:
            # Within the request's turn, which bounds how many photos are in memory.
            return await asyncio.to_thread(self._check, url, data)

    def _check(self, name: str, data: bytes) -> _Photo:
        """Decode a photo to see whether it can be, and write its partial file."""
        open_photo(data, name=name, max_pixels=self._max_pixels).decode(CHECKED_SIDE)
        file = self._collection.partial / uuid4().hex
        try:
            file.write_bytes(data)
        except OSError as error:
            raise DatasetError(f"{file} cannot be written: {error.strerror}") from error
        return _Photo(hashlib.sha256(data).hexdigest(), format_name(data).lower(), file)


async def _listed(found: Iterable[Found]) -> AsyncGenerator[Found]:
    for item in found:
        yield item


def _run(work: Callable[[Tick], Awaitable[None]], *, total: int) -> None:
    """Run on an event loop in a thread of its own: another may be running, as in notebooks.

    Here the progress is shown, and Ctrl-C is heard: it ends the work at once.
    """
    ticks: SimpleQueue[int | None] = SimpleQueue()
    started: Future[Callable[[], object]] = Future()

    async def run() -> None:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        started.set_result(partial(loop.call_soon_threadsafe, task.cancel))
        try:
            await work(ticks.put)
        finally:
            ticks.put(None)

    with ThreadPoolExecutor(1, "gather") as thread:
        done = thread.submit(asyncio.run, run())
        try:
            photos = (None for number in iter(ticks.get, None) for _ in range(number))
            for _ in show_progress(photos, "gathering", total):
                pass
            done.result()
        except KeyboardInterrupt:
            with suppress(RuntimeError):  # the loop has just ended
                started.result()()
            raise

"""Augmented copies: each pipeline applied once to every photo, in one folder with the photos themselves.

Below `CLASS/` lie the originals, byte for byte, beside each its copies; `lineage.jsonl` says what each is.
What is drawn for a copy depends on its original's bytes, the pipeline and the seed, and on nothing else:
photos that come later leave all others as they are. Its pixels depend on the versions of JAX and Pillow and
on the device, too; what others of them made is not made again.

| original | its copies |
| --- | --- |
| JPEG | JPEG, quality 95, colours at full resolution (4:4:4) |
| anything else | PNG, without loss |
"""

import hashlib
import json
import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import numpy as np
from PIL import Image

from jaxcls.augment.ops import Function, parse
from jaxcls.data.dataset import ID_DTYPE, UNLABELLED, Dataset, leave_out, scan
from jaxcls.data.images import SUFFIXES, encode, format_name, is_image
from jaxcls.data.lineage import LINEAGE_FILE, Lineage, is_place, read_lineage, write_lineage
from jaxcls.data.source import FileSource
from jaxcls.errors import DatasetError, ImageError, UsageError
from jaxcls.progress import map_threads, show_progress
from jaxcls.storage import Storage, file_sha256, locked, remove_partial, write_whole

Report = Callable[[str], object]
_Jobs = dict[int, list[tuple["_Recipe", Lineage]]]
"""Position of a photo -> the copies that are to be made of it."""

MAX_SHORT_SIDE = 640
"""Pixels: enough for a network that sees 500, whose evaluation view has a short side of 571."""
MAX_ASPECT_RATIO = 4
"""The long side is at most so many times `max_short_side`: a crop takes memory by its square."""
GRID = 16
"""Of the long side of photos that are reduced: each size needs a program, which half a second compiles."""
VERSION = 1
"""Of what the code here makes of a photo: to be raised when that changes. It does not tell of another version
of JAX or Pillow, or of another device."""
MAX_NAME_BYTES = 255
"""Of a file's name, on all common file systems."""


def augment_dataset(
    dataset: Dataset,
    pipelines: Sequence[Function],
    out: str | Path | None = None,
    *,
    seed: int = 0,
    max_short_side: int = MAX_SHORT_SIDE,
    report: Report = lambda text: None,
) -> Dataset:
    """The originals and, for each pipeline, a copy of every one of them: 50 photos, 2 pipelines -> 150.

    What an earlier call left in the folder is used again where nothing changed, and removed where it is not
    asked for any more, unless somebody has changed it; an interrupted call is taken up where it ended.
    `jaxcls.read_folder` reads the folder.

    Args:
        dataset: photos, all labelled; copies among them are left out.
        pipelines: operations of `jaxcls.augment.ops`, such as a `Sequential`. The same one twice makes two
            different copies.
        out: a new folder, or that of an earlier call. Default: one below `Storage.default().outputs`,
            named after all that is asked for.
        seed: another seed, other copies.
        max_short_side: in pixels; a larger photo is first reduced to it, and its long side to a multiple of
            16, at most four times as long.
        report: hears what was made.

    Returns:
        The originals in order, then the copies of the first pipeline, and so on. `origins` names each copy's
        original; both are of one group, so that no split parts them.

    Raises:
        DatasetError: photos that cannot be decoded or are unlabelled; ids that cannot be files' names, or
            leave no room for their copies'; a damaged lineage, links in the place of the folder's folders, or
            a folder in which another process is at work.
        UsageError: no pipeline, or one that is no operation of `jaxcls.augment.ops`; a folder that holds
            something else, or the photos themselves.
    """
    recipes = _make_recipes(pipelines, seed, max_short_side)
    dataset = dataset.originals()
    originals, suffixes = _describe(dataset)
    copies = [
        [recipe.describe(original, suffix) for original, suffix in zip(originals, suffixes, strict=True)]
        for recipe in recipes
    ]
    folder = _default_folder(dataset.name, copies) if out is None else Path(out)
    _require_place(folder, dataset)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder) as is_ours:
        if not is_ours:
            raise DatasetError(f"{folder} is being augmented by another process: wait for its end")
        report(_fill(folder, dataset, recipes, originals, copies))
    ids = [photo.id for photos in (originals, *copies) for photo in photos]
    repeats = len(recipes) + 1
    return Dataset(
        name=dataset.name,
        classes=dataset.classes,
        labels=np.tile(dataset.labels, repeats),
        ids=np.asarray(ids, ID_DTYPE),
        source=FileSource(folder, np.asarray(ids, ID_DTYPE)),
        groups=None if dataset.groups is None else np.tile(dataset.groups, repeats),
        max_pixels=dataset.max_pixels,
        origins=np.asarray([photo.original for photos in (originals, *copies) for photo in photos], ID_DTYPE),
    )


@dataclass(frozen=True)
class _Recipe:
    pipeline: Function
    text: str
    repeat: int
    seed: int
    max_short_side: int

    def describe(self, original: Lineage, suffix: str) -> Lineage:
        """The copy of an original; its content is not known yet."""
        copy = Lineage(
            id=original.id,
            sha256="",
            original=original.id,
            original_sha256=original.sha256,
            pipeline=self.text,
            repeat=self.repeat,
            seed=self.seed,
            max_short_side=self.max_short_side,
        )
        return replace(copy, id=f"{original.id}{_name_end(_digest(copy), suffix)}")

    def compile(self, size: tuple[int, int]) -> Any:
        """The program for one picture, uint8 [H, W, 3], and the two words of its key."""

        def run(words: jax.Array, image: jax.Array) -> jax.Array:
            key = jax.random.wrap_key_data(words, impl="threefry2x32")
            return self.pipeline(key, image[None])[0]

        words, image = jax.ShapeDtypeStruct((2,), np.uint32), jax.ShapeDtypeStruct((*size, 3), np.uint8)
        return jax.jit(run, compiler_options=_compiler_options()).lower(words, image).compile()


def _compiler_options() -> dict[str, Any]:
    """On CPU, half the time to compile for twice the time to run: most sizes have few photos."""
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}


def _digest(copy: Lineage) -> bytes:
    """Of all that decides what a copy shows."""
    causes = [VERSION, copy.original_sha256, copy.pipeline, copy.repeat, copy.seed, copy.max_short_side]
    return hashlib.sha256(json.dumps(causes).encode()).digest()


def _name_end(digest: bytes, suffix: str) -> str:
    """What a copy's name has more than its original's."""
    return f"~{digest[:8].hex()}{suffix}"


def _make_recipes(pipelines: Sequence[Function], seed: int, max_short_side: int) -> list[_Recipe]:
    if not pipelines:
        raise UsageError("give at least one pipeline")
    if max_short_side < 1:
        raise UsageError(f"max_short_side {max_short_side}: must be at least 1 pixel")
    texts: list[str] = []
    recipes = []
    for pipeline in pipelines:
        text = repr(pipeline)
        try:
            is_told = parse(text) == pipeline
        except UsageError as error:
            raise UsageError(f"only operations of jaxcls.augment.ops leave a lineage: {error}") from error
        if not is_told:
            raise UsageError(f"pipeline {text}: give plain numbers as options, or no lineage can tell of it")
        recipes.append(_Recipe(pipeline, text, texts.count(text), int(seed), int(max_short_side)))
        texts.append(text)
    return recipes


def _describe(dataset: Dataset) -> tuple[list[Lineage], list[str]]:
    """The originals as they will lie in the folder, and the suffixes of their copies."""
    if (dataset.labels == UNLABELLED).any():
        raise DatasetError(f"dataset {dataset.name} has unlabelled images: label or filter them")

    def describe(index: int) -> tuple[str, str]:
        try:
            content = _content(dataset, index)
        except ImageError as error:
            return "", str(error)
        # Of what is no image, `_look` will tell.
        return hashlib.sha256(content).hexdigest(), format_name(content) if is_image(content) else ""

    found = list(map_threads(describe, len(dataset), "reading"))
    leave_out(dataset, [text if not sha256 else None for sha256, text in found], max_bad_fraction=0.0)
    originals = [Lineage(_place(dataset, index, form), sha256) for index, (sha256, form) in enumerate(found)]
    if len({original.id for original in originals}) < len(originals):
        raise DatasetError(f"dataset {dataset.name} has ids that name the same file: give each photo its own")
    return originals, [".jpg" if form == "JPEG" else ".png" for _, form in found]


def _content(dataset: Dataset, index: int) -> bytes:
    """The photo's file; pixels in memory become a PNG."""
    item = dataset.source[index]
    return item if isinstance(item, bytes) else encode(Image.fromarray(dataset.image(index)), "PNG")


def _place(dataset: Dataset, index: int, form: str) -> str:
    """Where an original lies below the folder: `CLASS/...`, as its id says if it says so already."""
    own, class_name = dataset.ids[index], dataset.classes[dataset.labels[index]]
    place = own if own.startswith(f"{class_name}/") else f"{class_name}/{own}"
    if Path(place).suffix.lower() not in SUFFIXES:
        place += f".{form.lower()}"
    if "/" in class_name or not is_place(place):
        raise DatasetError(
            f"{own} of class {class_name} gives no file's name, {place!r}: rename it, or the class"
        )
    longest = max(len(part.encode()) for part in f"{place}{_name_end(bytes(8), '.jpg')}".split("/"))
    if longest > MAX_NAME_BYTES:
        raise DatasetError(
            f"{place}: it or its copies would have names of {longest} bytes; at most {MAX_NAME_BYTES} are "
            "possible: give it, or its class, a shorter name"
        )
    return place


def _default_folder(name: str, copies: Sequence[Sequence[Lineage]]) -> Path:
    digest = hashlib.sha256(json.dumps([copy.id for some in copies for copy in some]).encode()).hexdigest()
    plain_name = re.sub(r"[^\w-]+", "_", name)
    return Storage.default().outputs / f"{plain_name}-augmented-{digest[:12]}"


def _require_place(folder: Path, dataset: Dataset) -> None:
    """Raise unless the folder is new, empty or an earlier one, and apart from the photos."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: give a new folder")
    found = {path.name for path in folder.glob("[!.]*")}
    if found and LINEAGE_FILE not in found:
        raise UsageError(f"{folder} holds something else: give a new folder for the photos and their copies")
    place = folder.resolve()
    for root in {root.resolve() for root in _roots(dataset)}:
        if place.is_relative_to(root) or root.is_relative_to(place):
            raise UsageError(f"{folder} and the photos in {root} lie in each other: give a folder elsewhere")


def _roots(dataset: Dataset) -> set[Path]:
    """The folders that the photos' ids start from."""
    roots = set()
    for index, own in enumerate(dataset.ids):
        path = dataset.source.path(index)
        if path is not None:
            is_below = path.as_posix().endswith(f"/{own}")
            roots.add(path.parents[own.count("/")] if is_below else path.parent)
    return roots


def _fill(
    folder: Path,
    dataset: Dataset,
    recipes: Sequence[_Recipe],
    originals: Sequence[Lineage],
    copies: Sequence[Sequence[Lineage]],
) -> str:
    """Make of the folder what is asked for, doing only what is left to do; say what that was."""
    wanted = {photo.id: photo for photos in (originals, *copies) for photo in photos}
    before = read_lineage(folder)
    _require_no_links(folder, [*wanted, *before])
    for parent in {folder, *((folder / own).parent for own in (*wanted, *before))}:
        remove_partial(parent)
    done = _find_done(folder, wanted, before)
    jobs: _Jobs = defaultdict(list)
    for recipe, photos in zip(recipes, copies, strict=True):
        for index, photo in enumerate(photos):
            if photo.id not in done:
                jobs[index].append((recipe, photo))
    full_sizes = dict(zip(jobs, _look(dataset.select(list(jobs))), strict=True))
    sizes = {index: _reduce(size, recipes[0].max_short_side) for index, size in full_sizes.items()}
    others = [photo for own, photo in before.items() if own not in wanted]
    num_others = sum(bool(photo.original) for photo in others)
    # What is still there stays in the lineage, too, or it would pass for an original.
    theirs = [photo for photo in others if not _remove(folder, photo) and photo.original]
    # Before the first copy is there, so that at no time one would pass for an original.
    write_lineage(folder, [*(done.get(own, photo) for own, photo in wanted.items()), *theirs])
    for index, original in enumerate(originals):
        if original.id not in done:
            _write_original(folder / original.id, _content(dataset, index), original)
    ids = np.asarray([original.id for original in originals], ID_DTYPE)
    kept, made = replace(dataset, ids=ids, source=FileSource(folder, ids)), []
    with (folder / LINEAGE_FILE).open("a", encoding="utf-8") as file:
        for some in show_progress(_make(folder, kept, jobs, sizes), "augmenting", len(jobs)):
            file.writelines(copy.to_line() for copy in some)
            file.flush()
            made += some
    done |= {copy.id: copy for copy in made}
    write_lineage(folder, [*(done.get(own, photo) for own, photo in wanted.items()), *theirs])
    num_copies = len(wanted) - len(originals)
    return (
        f"{folder}: {len(originals)} images and {num_copies} augmented copies ({len(made)} new, "
        f"{num_copies - len(made)} from before; {num_others - len(theirs)} removed"
        f"{f'; {len(theirs)} changed by somebody and kept' if theirs else ''})"
    )


def _find_done(
    folder: Path, wanted: Mapping[str, Lineage], before: Mapping[str, Lineage]
) -> dict[str, Lineage]:
    """The photos that lie in the folder already as they are wanted."""

    def find(photo: Lineage) -> Lineage | None:
        path, known = folder / photo.id, before.get(photo.id, photo)
        sha256 = photo.sha256 or known.sha256  # of a copy, only the file tells
        is_there = replace(known, sha256="") == replace(photo, sha256="") and path.is_file()
        return replace(photo, sha256=sha256) if is_there and file_sha256(path) == sha256 else None

    photos = list(wanted.values())
    found = map_threads(lambda index: find(photos[index]), len(photos), "checking")
    return {photo.id: photo for photo in found if photo is not None}


def _look(dataset: Dataset) -> list[tuple[int, int]]:
    """Heights and widths of photos that can all be decoded."""
    scan(dataset)
    return list(map_threads(lambda index: dataset.photo(index).size, len(dataset), None))


def _reduce(size: tuple[int, int], max_short_side: int) -> tuple[int, int]:
    """Height and width at which a photo is augmented."""
    short, long = sorted(size)
    scale = min(max_short_side / short, MAX_ASPECT_RATIO * max_short_side / long)
    if scale >= 1:
        return size
    short, long = max(1, round(scale * short)), max(1, round(scale * long / GRID)) * GRID
    return (short, long) if size[0] <= size[1] else (long, short)


def _remove(folder: Path, photo: Lineage) -> bool:
    """Remove what is no longer asked for, unless somebody has changed it since; whether it is gone."""
    path = folder / photo.id
    if path.is_file():
        # Of a copy that was being made when the process was killed, the name has to do.
        was_being_made = photo.id == f"{photo.original}{_name_end(_digest(photo), path.suffix)}"
        if file_sha256(path) == photo.sha256 if photo.sha256 else was_being_made:
            path.unlink()
    is_gone = not path.exists()
    with suppress(OSError):  # not empty
        path.parent.rmdir()
    return is_gone


def _require_no_links(folder: Path, ids: Iterable[str]) -> None:
    """Raise if a link leads out of the folder to where one of the files is, or would be."""
    for parent in {parent for own in ids for parent in PurePosixPath(own).parents}:
        if parent != PurePosixPath() and (folder / parent).is_symlink():
            raise DatasetError(f"{folder / parent} is a link: put a folder in its place, or give a new one")


def _write_original(path: Path, content: bytes, original: Lineage) -> None:
    if hashlib.sha256(content).hexdigest() != original.sha256:
        raise DatasetError(f"{original.id} has changed while it was being augmented: augment again")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)


def _make(
    folder: Path, photos: Dataset, jobs: _Jobs, sizes: Mapping[int, tuple[int, int]]
) -> Iterator[list[Lineage]]:
    """Make copies, on all cores; yield those of one photo after the other.

    Args:
        folder: where they go.
        photos: the originals.
        jobs: position of a photo -> what to make of it.
        sizes: position -> height and width at which it is augmented.
    """

    def make(index: int, programs: Future[dict[_Recipe, Any]]) -> list[Lineage]:
        height, width = sizes[index]
        picture = photos.photo(index).decode(min(height, width))
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        pixels, made = np.asarray(picture), []
        for recipe, copy in jobs[index]:
            words = np.frombuffer(_digest(copy), np.uint32)[:2]
            picture = Image.fromarray(np.asarray(programs.result()[recipe](words, pixels)))
            content = encode(picture, "JPEG" if copy.id.endswith(".jpg") else "PNG")
            write_whole(folder / copy.id, content)
            made.append(replace(copy, sha256=hashlib.sha256(content).hexdigest()))
        return made

    by_size = defaultdict(list)
    for index in jobs:
        by_size[sizes[index]].append(index)
    pool = ThreadPoolExecutor()
    try:
        running: deque[Future[list[Lineage]]] = deque()
        for size, members in by_size.items():
            recipes = {recipe for index in members for recipe, _ in jobs[index]}
            # Begun before those that wait for it, as it is submitted before them; and gone with the last of
            # them, since thousands of programs would not fit into memory.
            programs = pool.submit(_compile, recipes, size)
            running += [pool.submit(make, index, programs) for index in members]
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _compile(recipes: Iterable[_Recipe], size: tuple[int, int]) -> dict[_Recipe, Any]:
    return {recipe: recipe.compile(size) for recipe in recipes}

"""Planted copies: how many of each kind are found, what is joined besides, and how long it takes.

    python -m experiments.duplicates PHOTOS --twins twins.json --out results.json

A seed decides which photos are copied and how. Each is copied once in every kind of `KINDS`, and the copies
are shuffled among all photos of the folder. A copy is found if it is in the group of its original. A group
that joins different photos of the folder is a mistake, unless they are on the list of twins. The folder is
also searched as it is.
"""

import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from tyro.conf import Positional

import jaxcls
from experiments.recording import spread, write_result
from jaxcls.data import duplicates
from jaxcls.data.dataset import Dataset, from_items


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    data: Positional[Path]
    """A folder of photos, one sub-folder per class."""
    twins: Path | None = None
    """A JSON file with "pairs" of ids that are known to show the same."""
    num_originals: int = 400
    """Photos that are copied."""
    num_seeds: int = 3
    """Seeds 0, 1, ..."""
    out: Path | None = None
    """A JSON file for the result."""


def shrunk(image: Image.Image, generator: np.random.Generator) -> bytes:
    """To 50 to 90 % of each side."""
    factor = generator.uniform(0.5, 0.9)
    return _jpeg(image.resize((round(factor * image.width), round(factor * image.height))))


def recompressed(image: Image.Image, generator: np.random.Generator) -> bytes:
    """With a quality of 30 to 70."""
    return _jpeg(image, quality=int(generator.integers(30, 71)))


def cropped(image: Image.Image, generator: np.random.Generator) -> bytes:
    """Without 2 to 8 % of each side, wherever."""
    width, height = (round(side * generator.uniform(0.92, 0.98)) for side in image.size)
    left = int(generator.integers(0, image.width - width + 1))
    top = int(generator.integers(0, image.height - height + 1))
    return _jpeg(image.crop((left, top, left + width, top + height)))


def brightened(image: Image.Image, generator: np.random.Generator) -> bytes:
    """By 10 to 40 %."""
    return _jpeg(ImageEnhance.Brightness(image).enhance(generator.uniform(1.1, 1.4)))


def _jpeg(image: Image.Image, *, quality: int = 90) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


KINDS: tuple[Callable[[Image.Image, np.random.Generator], bytes], ...] = (
    shrunk, recompressed, cropped, brightened,
)  # fmt: skip
UNCHANGED = -1


class Planted(NamedTuple):
    """A folder's photos and copies of some, shuffled.

    Attributes:
        mixed: N photos and copies.
        shown: int64 [N], the position in the folder of what each shows.
        kinds: int64 [N], as positions in `KINDS`; of the folder's photos UNCHANGED.
    """

    mixed: Dataset
    shown: NDArray[np.int64]
    kinds: NDArray[np.int64]


def plant(photos: Dataset, num_originals: int, seed: int) -> Planted:
    """Copy some photos, each once in every kind."""
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(photos), num_originals, replace=False)
    originals = [Image.fromarray(photos.image(int(index))) for index in chosen]
    copies = [kind(image, generator) for kind in KINDS for image in originals]
    shown = np.concatenate([np.arange(len(photos)), np.tile(chosen, len(KINDS))])
    kinds = np.repeat([UNCHANGED, *range(len(KINDS))], [len(photos)] + [num_originals] * len(KINDS))
    items = [*map(photos.source.path, range(len(photos))), *copies]
    order = generator.permutation(len(items))
    return Planted(from_items([items[i] for i in order]), shown[order], kinds[order])


def search(photos: Dataset) -> tuple[duplicates.Duplicates, dict[str, float]]:
    """The duplicates, and what it cost to find them."""
    with _counted() as counts:
        started = time.perf_counter()
        found = duplicates.find_duplicates(photos)
        seconds = time.perf_counter() - started
    return found, {"num_compared": sum(counts), "seconds_per_thousand": 1000 * seconds / len(photos)}


@contextmanager
def _counted() -> Iterator[list[int]]:
    """The numbers of pairs whose pixels are compared meanwhile."""
    counts, similarity = [], duplicates.similarity

    def counting(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        counts.append(len(first))
        return similarity(first, second)

    with patch.object(duplicates, "similarity", counting):
        yield counts


Twins = frozenset[frozenset[str]]
"""Sets of ids that are known to show the same."""


def read_twins(path: Path) -> Twins:
    """The "pairs" of a JSON file."""
    return frozenset(map(frozenset, json.loads(path.read_text("utf-8"))["pairs"]))


def share_found(groups: NDArray[np.int32], planted: Planted) -> dict[str, float]:
    """Of each kind of copies, those in the group of their original."""
    is_photo = planted.kinds == UNCHANGED
    group_of = dict(zip(planted.shown[is_photo].tolist(), groups[is_photo].tolist(), strict=True))
    is_found = groups == [group_of[photo] for photo in planted.shown.tolist()]
    return {kind.__name__: float(is_found[planted.kinds == k].mean()) for k, kind in enumerate(KINDS)}


def wrongly_joined(groups: NDArray[np.int32], shown: NDArray[np.str_], twins: Twins) -> list[list[str]]:
    """Of each group that joins different photos which are no known twins, their ids.

    Args:
        groups: int32 [N].
        shown: [N], the id of the photo that each shows.
        twins: what may be joined.
    """
    joined = (frozenset(shown[groups == group].tolist()) for group in np.flatnonzero(np.bincount(groups) > 1))
    return [sorted(ids) for ids in joined if len(ids) > 1 and ids not in twins]


def search_folder(photos: Dataset, twins: Twins) -> dict[str, Any]:
    """What the folder holds itself."""
    found, cost = search(photos)
    return {
        "num_exact": found.num_exact,
        "num_near": found.num_near,
        "wrongly_joined": wrongly_joined(found.groups, photos.ids, twins),
        **cost,
    }


def search_planted(photos: Dataset, num_originals: int, seed: int, twins: Twins) -> dict[str, Any]:
    """What is found of a seed's copies."""
    planted = plant(photos, num_originals, seed)
    found, cost = search(planted.mixed)
    return {
        "seed": seed,
        "num_images": len(planted.mixed),
        "share_found": share_found(found.groups, planted),
        "num_groups": sum(len(group) > 1 for group in found.members),
        "wrongly_joined": wrongly_joined(found.groups, photos.ids[planted.shown], twins),
        **cost,
    }


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The spread over seeds."""
    shares = [row["share_found"] for row in rows]
    return {
        "share_found": {name: spread([share[name] for share in shares]) for name in shares[0]},
        "num_groups": sum(row["num_groups"] for row in rows),
        "num_wrongly_joined": sum(len(row["wrongly_joined"]) for row in rows),
        "num_compared": spread([row["num_compared"] for row in rows]),
        "seconds_per_thousand": spread([row["seconds_per_thousand"] for row in rows]),
    }


def main(arguments: Arguments) -> None:
    """Search the folder, then plant and search for every seed."""
    photos = jaxcls.read_folder(arguments.data)
    twins = read_twins(arguments.twins) if arguments.twins else frozenset()
    folder = search_folder(photos, twins)
    rows = [
        search_planted(photos, arguments.num_originals, seed, twins) for seed in range(arguments.num_seeds)
    ]
    summary = summarize(rows)
    if arguments.out is not None:
        result = {
            "dataset": photos.name,
            "num_images": len(photos),
            "num_originals": arguments.num_originals,
            "num_known_twins": len(twins),
            "folder": folder,
            "summary": summary,
            "runs": rows,
        }
        write_result(arguments.out, result)
    print(f"{photos.name}: {folder['num_exact']} exact and {folder['num_near']} near copies")
    for name, share in summary["share_found"].items():
        print(f"found, {name:12}  {share['mean']:.3f}")
    print(f"wrongly joined       {summary['num_wrongly_joined']} of {summary['num_groups']} groups")
    print(f"compared pairs       {summary['num_compared']['mean']:.0f}")
    print(f"seconds per 1,000    {summary['seconds_per_thousand']['mean']:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

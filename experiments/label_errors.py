"""Planted label errors: how many are found among the most suspicious, and how many are named.

    python -m experiments.label_errors PHOTOS --weights resnet18.safetensors --out results.json

A seed decides which labels are changed, each to another class drawn uniformly, and the folds. From the same
features come out-of-fold scores of an SVM, scores of nearest neighbours, and both; `find_label_errors` and
cleanlab's confident learning, where it is installed, see the same scores. As many images are looked at as
labels were changed; beside it stands what each names of its own accord. An unchanged label counts as right,
also where it is not.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from numpy.typing import NDArray
from tyro.conf import Positional

import jaxcls
from experiments.recording import spread, write_result
from jaxcls.evaluation import find_label_errors, score_by_neighbours
from jaxcls.parallel import use_compilation_cache
from jaxcls.svm.cross_validation import out_of_fold

CLEANLAB_ORDERS = ("self_confidence", "normalized_margin")
MEASURES = ("precision_at_planted", "recall_at_planted", "num_named", "precision_named", "recall_named")


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    data: Positional[Path]
    """A folder of photos, one sub-folder per class."""
    backbone: str = "resnet18"
    """A name of the catalogue."""
    weights: Path | None = None
    """A local file of weights."""
    share: float = 0.02
    """Of the labels, that are changed."""
    num_seeds: int = 10
    """Seeds 0, 1, ..."""
    C: float = 1.0
    """Of the SVM, on L2-normalized features."""
    out: Path | None = None
    """A JSON file for the result."""


class Suspects(NamedTuple):
    """int64 positions of images, the most suspicious first; the first `num_named` are called wrong."""

    indices: NDArray[np.int64]
    num_named: int


def plant(
    labels: NDArray[np.int32], num_classes: int, share: float, seed: int
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Labels [N] of which a share was changed to another class, at least one; and bool [N], which."""
    generator = np.random.default_rng(seed)
    num_planted = max(1, round(share * len(labels)))
    changed = generator.choice(len(labels), num_planted, replace=False)
    noisy, planted = labels.copy(), np.zeros(len(labels), np.bool_)
    noisy[changed] = (labels[changed] + generator.integers(1, num_classes, num_planted)) % num_classes
    planted[changed] = True
    return noisy, planted


def search(scores: Mapping[str, jaxcls.Predictions]) -> Iterator[tuple[str, str, Suspects]]:
    """Name of the scores, method and what it suspects; "both" are all scores together."""
    for name, sets in {
        **{name: (one,) for name, one in scores.items()},
        "both": tuple(scores.values()),
    }.items():
        found = find_label_errors(*sets)
        yield name, "jaxcls", Suspects(found.indices, found.num_probable)
        if find_spec("cleanlab"):
            for order in CLEANLAB_ORDERS:
                yield name, f"cleanlab, {order}", confident_learning(sets, order)


def confident_learning(sets: tuple[jaxcls.Predictions, ...], order: str) -> Suspects:
    """What cleanlab finds, with its defaults but the order, in the geometric mean of the probabilities."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    labels = sets[0].labels
    logits = np.mean([np.log(np.maximum(p.probabilities(), 1e-7)) for p in sets], axis=0)
    p = np.exp(logits)
    p /= p.sum(axis=1, keepdims=True)
    named = find_label_issues(labels, p, return_indices_ranked_by=order, n_jobs=1)
    ranked = np.argsort(get_label_quality_scores(labels, p, method=order), kind="stable")
    return Suspects(np.concatenate([named, ranked[~np.isin(ranked, named)]]), len(named))


def judge(suspects: Suspects, planted: NDArray[np.bool_]) -> dict[str, float | None]:
    """MEASURES of one search; the precision of nothing is None."""
    hits, num_planted, num_named = planted[suspects.indices], int(planted.sum()), suspects.num_named
    return {
        "precision_at_planted": float(hits[:num_planted].mean()),
        "recall_at_planted": int(hits[:num_planted].sum()) / num_planted,
        "num_named": num_named,
        "precision_named": float(hits[:num_named].mean()) if num_named else None,
        "recall_named": int(hits[:num_named].sum()) / num_planted,
    }


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The spread of each measure over seeds, for each scores and method."""
    pairs = dict.fromkeys((row["scores"], row["method"]) for row in rows)
    summary = []
    for scores, method in pairs:
        chosen = [row for row in rows if (row["scores"], row["method"]) == (scores, method)]
        values = {name: [row[name] for row in chosen if row[name] is not None] for name in MEASURES}
        spreads = {name: spread(found) for name, found in values.items() if found}
        summary.append({"scores": scores, "method": method, **spreads})
    return summary


def main(arguments: Arguments) -> None:
    """Plant, search and judge, for every seed."""
    use_compilation_cache(jaxcls.Storage.default().persistent / "compiled")
    photos = jaxcls.read_folder(arguments.data)
    backbone = jaxcls.load_pretrained(arguments.backbone, weights=arguments.weights)
    values, labels, _ = jaxcls.extract_features(backbone, photos)
    ids = tuple(photos.ids.tolist())
    directions = values / np.linalg.norm(values, axis=1, keepdims=True)
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.num_seeds):
        noisy, planted = plant(labels, len(photos.classes), arguments.share, seed)
        scores = {
            "svm": out_of_fold(directions, noisy, photos.classes, ids, C=arguments.C, seed=seed),
            "neighbours": score_by_neighbours(values, noisy, photos.classes, ids),
        }
        for name, method, suspects in search(scores):
            rows.append({"seed": seed, "scores": name, "method": method, **judge(suspects, planted)})
        if arguments.out is not None:
            result = {
                "dataset": photos.name,
                "num_images": len(photos),
                "num_planted": int(planted.sum()),
                "C": arguments.C,
                "notes": [] if find_spec("cleanlab") else ["cleanlab is not installed: not compared"],
                "summary": summarize(rows),
                "runs": rows,
            }
            write_result(arguments.out, result)
    print(f"{'scores':10}  {'method':27}  found of {planted.sum()}  named  of these planted")
    for row in summarize(rows):
        means = {name: row[name]["mean"] for name in MEASURES if name in row}
        precision = f"{means['precision_named']:.2f}" if "precision_named" in means else "-"
        print(
            f"{row['scores']:10}  {row['method']:27}  {means['recall_at_planted']:>11.2f}"
            f"  {means['num_named']:>5.1f}  {precision:>16}"
        )


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

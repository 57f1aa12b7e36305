"""AMLPCV's four recipes for a better classifier: larger images, a deeper network, or both.

    python -m experiments.improve_accuracy PHOTOS --weights-folder WEIGHTS --out results.json

Fine-tunes with each recipe on the same split and prints accuracy and time relative to
the first. AMLPCV reported, on photos of its own: 82.6 % (1x), 90.2 % (2-5x), 87.5 %
(2-5x) and 92.8 % (5-15x).
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from tyro.conf import Positional

import jaxcls
from experiments.recording import write_result


class Recipe(NamedTuple):
    """One row of AMLPCV's table. The rate halves with the batch."""

    image_size: int
    backbone: str
    batch_size: int
    rate: float


RECIPES = (
    Recipe(224, "resnet18", 32, 0.05),
    Recipe(500, "resnet18", 16, 0.025),
    Recipe(224, "resnet50", 16, 0.025),
    Recipe(500, "resnet50", 8, 0.01),
)


@dataclass(frozen=True)
class Arguments:
    """What to compare on."""

    data: Positional[Path]
    """A folder of photos, one sub-folder per class."""
    weights_folder: Path | None = None
    """A folder with NAME.safetensors for each network; default: the hub."""
    recipes: tuple[int, ...] = (0, 1, 2, 3)
    """Which rows of the table to run."""
    num_epochs: int = 15
    """Of each recipe."""
    train_size: float = 0.66
    """Share of the photos to train on."""
    seed: int = 0
    """Of split and training."""
    out: Path | None = None
    """A JSON file for the result."""


def run(recipe: Recipe, arguments: Arguments, photos: jaxcls.Dataset) -> dict[str, Any]:
    """Fine-tune with one recipe; its accuracies and training time."""
    folder = arguments.weights_folder
    weights = None if folder is None else folder / f"{recipe.backbone}.safetensors"
    backbone = jaxcls.load_pretrained(recipe.backbone, weights=weights, image_size=recipe.image_size)
    train, test = photos.split(arguments.train_size, seed=arguments.seed)
    config = jaxcls.FinetuneConfig(
        num_epochs=arguments.num_epochs, batch_size=recipe.batch_size, seed=arguments.seed
    )
    scale = recipe.rate / config.learning_rates[0]
    config = replace(config, learning_rates=tuple(rate * scale for rate in config.learning_rates))
    started = time.perf_counter()
    classifier = jaxcls.finetune(train, backbone, config).classifier
    seconds = time.perf_counter() - started
    evaluation = jaxcls.evaluate(jaxcls.predict(classifier, test))
    return {
        **recipe._asdict(),
        "micro": evaluation.accuracy("micro"),
        "macro": evaluation.accuracy("macro"),
        "num_test": len(test),
        "train_seconds": seconds,
    }


def main(arguments: Arguments) -> None:
    """Run the recipes and print the table."""
    photos = jaxcls.read_folder(arguments.data)
    rows: list[dict[str, Any]] = []
    for number in arguments.recipes:
        rows.append(run(RECIPES[number], arguments, photos))
        if arguments.out is not None:
            write_result(
                arguments.out, {"dataset": photos.name, "num_epochs": arguments.num_epochs, "rows": rows}
            )
    print("image size  network   batch  rate   accuracy (macro)  (micro)  relative time")
    for row in rows:
        times = row["train_seconds"] / rows[0]["train_seconds"]
        print(
            f"{row['image_size']:>7} px  {row['backbone']}  {row['batch_size']:>5}  {row['rate']:<5}  "
            f"{row['macro']:>16.1%}  {row['micro']:>7.1%}  {times:>12.1f}x"
        )


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

"""Accuracy over seeds: split, train, evaluate, again and again; mean, spread and every run.

    python -m experiments.accuracy svm PHOTOS --weights resnet18.safetensors --num-seeds 20
    python -m experiments.accuracy finetune PHOTOS --weights resnet18.safetensors --num-seeds 5

A seed decides the split and, for fine-tuning, the head, the order, the views and
dropout. The result file is written anew after every seed.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional

import jaxcls
from experiments.recording import spread, write_result
from jaxcls.parallel import use_compilation_cache


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    method: Positional[Literal["svm", "finetune"]]
    """An SVM on frozen features, or fine-tuning."""
    data: Positional[Path]
    """A folder of photos, one sub-folder per class."""
    backbone: str = "resnet18"
    """A name of the catalogue."""
    weights: Path | None = None
    """A local file of weights."""
    train_size: float = 0.66
    """Share of the photos to train on."""
    num_seeds: int = 5
    """Seeds 0, 1, ..."""
    C: float = 1.0
    """Of the SVM."""
    config: OmitArgPrefixes[jaxcls.FinetuneConfig] = field(default_factory=jaxcls.FinetuneConfig)
    out: Path | None = None
    """A JSON file for the result."""


def measure(
    arguments: Arguments, seed: int, photos: jaxcls.Dataset, backbone: jaxcls.Backbone
) -> dict[str, Any]:
    """Accuracies of one seed."""
    train, test = photos.split(arguments.train_size, seed=seed)

    def finetune() -> jaxcls.Classifier:
        return jaxcls.finetune(
            train, backbone, replace(arguments.config, seed=seed), eval_dataset=test
        ).classifier

    methods: dict[str, Callable[[], jaxcls.Classifier]] = {
        "svm": lambda: jaxcls.fit_svm(train, backbone, C=arguments.C),
        "finetune": finetune,
    }
    started = time.perf_counter()
    classifier = methods[arguments.method]()
    seconds = time.perf_counter() - started
    evaluation = jaxcls.evaluate(jaxcls.predict(classifier, test))
    return {
        "seed": seed,
        "micro": evaluation.accuracy("micro"),
        "macro": evaluation.accuracy("macro"),
        "num_train": len(train),
        "num_test": len(test),
        "train_seconds": seconds,
    }


def main(arguments: Arguments) -> None:
    """Measure every seed."""
    use_compilation_cache(jaxcls.Storage.default().persistent / "compiled")
    photos = jaxcls.read_folder(arguments.data)
    backbone = jaxcls.load_pretrained(arguments.backbone, weights=arguments.weights)
    settings = {"C": arguments.C} if arguments.method == "svm" else {"config": asdict(arguments.config)}
    runs: list[dict[str, Any]] = []
    for seed in range(arguments.num_seeds):
        runs.append(measure(arguments, seed, photos, backbone))
        print(runs[-1], flush=True)
        summary = {average: spread([run[average] for run in runs]) for average in ("micro", "macro")}
        if arguments.out is not None:
            write_result(
                arguments.out, {"dataset": photos.name, **settings, "accuracy": summary, "runs": runs}
            )
    print(summary)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

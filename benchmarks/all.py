"""Every benchmark, one after another; a result file for each."""

import argparse

from benchmarks import (
    correctness,
    features,
    input_pipeline,
    listing,
    memory,
    score,
    short_run,
    startup,
    svm,
    train_end_to_end,
    train_step,
)
from benchmarks.session import Session, Settings, parse

BENCHMARKS = {
    "train_step": train_step,
    "score": score,
    "features": features,
    "input_pipeline": input_pipeline,
    "listing": listing,
    "startup": startup,
    "train_end_to_end": train_end_to_end,
    "short_run": short_run,
    "memory": memory,
    "svm": svm,
    "correctness": correctness,
}


def main() -> None:
    """Run them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.all", description=__doc__)
    settings = Settings.of(parse(parser))
    for name, benchmark in BENCHMARKS.items():
        benchmark.run(Session(settings, name))


if __name__ == "__main__":
    main()

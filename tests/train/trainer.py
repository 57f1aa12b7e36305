"""A training process to kill, end or join: `python trainer.py JSON`, see `command`.

It resumes, and prints messages, a line "STEPS n" for every few steps, and a checksum of the weights.
"""

import json
import resource
import sys
import zlib
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np

from jaxcls.classifier import load
from jaxcls.data.folder import read_folder
from jaxcls.parallel import processes, use_compilation_cache
from jaxcls.train.config import FinetuneConfig
from jaxcls.train.finetune import finetune
from jaxcls.train.reporters import Reporter


def command(world, cache, run_dir, config, photos="photos", largest_file=-1, num_processes=1):
    """What Python runs; `world` holds `photos`, `eval` and the classifier `start`, and files are in bytes."""
    values = {
        "photos": str(world / photos), "eval_photos": str(world / "eval"), "start": str(world / "start"),
        "cache": str(cache), "run_dir": str(run_dir), "config": vars(config),
        "largest_file": largest_file, "num_processes": num_processes,
    }  # fmt: skip
    return [__file__, json.dumps(values)]


class Print(Reporter):
    def message(self, text):
        print(text, flush=True)

    def steps(self, num_steps, row):
        print("STEPS", num_steps, flush=True)


def main(photos, eval_photos, start, cache, run_dir, config, largest_file, num_processes):
    use_compilation_cache(Path(cache))
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, -1))
    with processes() if num_processes > 1 else nullcontext():
        assert jax.process_count() == num_processes
        result = finetune(
            read_folder(photos), load(start), FinetuneConfig(**config),
            eval_dataset=read_folder(eval_photos), run_dir=run_dir, resume=True, reporters=[Print()],
        )  # fmt: skip
        leaves = jax.tree.leaves(result.classifier.weights)
        print("WEIGHTS", zlib.crc32(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))

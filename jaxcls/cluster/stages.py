"""What happens on the cluster: three stages of Ray Data, decoding, scoring, writing.

A shard of photos is one row throughout, so that Ray Data neither splits nor joins them. A stage that is begun
again, because its process was killed, does the same once more: nothing is lost, and nothing written twice.
"""

# Tasks that decode import this module: JAX, which they do not need, is loaded by the actors alone.

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxcls.cluster.files import ResultFolder, read_photo
from jaxcls.cluster.tables import Table
from jaxcls.data.images import open_photo
from jaxcls.errors import ImageError, JaxclsError
from jaxcls.models.precision import Precision
from jaxcls.preprocess import Preprocess

BATCH_SIZE = 64
"""As of `jaxcls.predict` for as many photos."""
NUM_READERS = 16
"""Threads of a task that decodes: an object store answers after tens of milliseconds."""
DECODING, SCORING = 0.25, 0.75
"""Shares of a core, where there are no GPUs: decoding takes a fraction of the time that a network takes."""

Row = dict[str, Any]


def part_name(shard: int) -> str:
    """The file of a shard's rows; sorted, the names are in the order of the shards."""
    return f"part-{shard:07}.parquet"


@dataclass(frozen=True, eq=False)
class Stages:
    """What tasks do before and after an actor's work.

    Attributes:
        preprocess: of the network.
        max_pixels: height times width above which a photo is refused.
        table: what is written.
        folder: where to.
    """

    preprocess: Preprocess
    max_pixels: int
    table: Table
    folder: ResultFolder

    def decode(self, row: Row) -> Row:
        """Add `images`, the bytes of uint8 [n, size, size, 3], and `errors`, n messages."""
        photos = json.loads(row["photos"])
        size = self.preprocess.size
        images = np.zeros((len(photos), size, size, 3), np.uint8)

        def load(index: int) -> str:
            try:
                photo = open_photo(read_photo(photos[index]), name=photos[index], max_pixels=self.max_pixels)
                images[index] = self.preprocess.resize_and_crop(photo.decode(self.preprocess.short_side))
            except ImageError as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(NUM_READERS) as pool:
            errors = list(pool.map(load, range(len(photos))))
        return {**row, "images": images.tobytes(), "errors": errors}

    def write(self, row: Row) -> Row:
        """Write a part; what remains is the shard's number."""
        import pyarrow as pa
        import pyarrow.parquet

        ids = [photo.encode(errors="backslashreplace").decode() for photo in json.loads(row["photos"])]
        values = np.frombuffer(row["values"], np.float32).reshape(len(ids), self.table.width)
        content = pa.BufferOutputStream()
        pyarrow.parquet.write_table(self.table.rows(values, ids, list(row["errors"])), content)
        self.folder.write(part_name(row["shard"]), content.getvalue().to_pybytes())
        return {"shard": row["shard"]}


class Scorer:
    """An actor: a compiled network, on the one GPU that Ray gives it, or on one core.

    Args:
        network: a reference to a classifier or backbone, in a list, in which Ray leaves it as it is.
        precision: of the convolutions; "auto": bfloat16 on GPUs, float32 on CPUs.
        on_gpu: else on CPU, with one thread.
    """

    def __init__(self, network: Sequence[Any], precision: Precision, on_gpu: bool) -> None:
        import jax
        import ray

        from jaxcls.parallel import use_compilation_cache
        from jaxcls.scoring import compile_network
        from jaxcls.storage import Storage

        if not on_gpu:
            jax.config.update("jax_platforms", "cpu")
            os.environ["PJRT_NPROC"] = "1"  # read by XLA as it starts its threads
            # All nodes' rows alike, whether or not their CPUs multiply bfloat16.
            precision = "float32" if precision == "auto" else precision
        use_compilation_cache(Storage.default().persistent / "compiled")
        self.program = compile_network(ray.get(network[0]), batch_sizes=(BATCH_SIZE,), precision=precision)

    def __call__(self, row: Row) -> Row:
        """Put `values`, the bytes of float32 [n, width], in the place of `images`."""
        size = self.program.preprocess.size
        images = np.frombuffer(row.pop("images"), np.uint8).reshape(-1, size, size, 3)
        started = [self.program(batch) for batch in full_batches(images)]
        values = np.concatenate([np.asarray(batch) for batch in started])[: len(images)]
        return {**row, "values": values.tobytes()}


def full_batches(images: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Batches of `BATCH_SIZE`, the last one filled with black."""
    for start in range(0, len(images), BATCH_SIZE):
        batch = images[start : start + BATCH_SIZE]
        yield np.pad(batch, ((0, BATCH_SIZE - len(batch)), (0, 0), (0, 0), (0, 0)))


def compute(
    stages: Stages,
    network: Any,
    precision: Precision,
    shards: Mapping[int, Sequence[str]],
    num_actors: int | None,
) -> Iterator[int]:
    """Write the parts of shards; yield their numbers as they are there. Ray must be connected.

    Args:
        stages: before and after.
        network: a classifier or backbone.
        precision: of its convolutions.
        shards: addresses of photos by the number of the shard.
        num_actors: at most; None: one for each GPU, or for each core where there are none.
    """
    import ray
    import ray.data

    _quieten()
    resources = ray.cluster_resources()
    num_gpus = int(resources.get("GPU", 0))
    most = num_actors or num_gpus or int(resources["CPU"])
    scorer: Any = Scorer  # the types of Ray Data know functions only
    # As JSON, since names that are not UTF-8 are no strings to Arrow.
    rows = [{"shard": shard, "photos": json.dumps(photos)} for shard, photos in shards.items()]
    written = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map(stages.decode, num_cpus=1 if num_gpus else DECODING)
        .map(
            scorer,
            fn_constructor_args=([ray.put(_on_host(network))], precision, num_gpus > 0),
            compute=ray.data.ActorPoolStrategy(size=min(most, len(rows))),
            num_gpus=1 if num_gpus else None,
            num_cpus=None if num_gpus else SCORING,
        )
        .map(stages.write, num_cpus=DECODING)
    )
    try:
        for row in written.iter_rows():
            yield row["shard"]
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, JaxclsError | OSError):
            raise JaxclsError(str(error.cause).partition("\n")[0]) from error  # Ray Data adds lines
        raise


def _on_host(network: Any) -> Any:
    """The network with NumPy's arrays: JAX's would start its devices wherever they are received."""
    import jax

    from jaxcls.classifier import Classifier

    if isinstance(network, Classifier):
        return replace(network, backbone=_on_host(network.backbone))
    return replace(network, variables=jax.tree.map(np.asarray, network.variables))


def _quieten() -> None:
    """Leave the terminal to our own progress bar and error; Ray Data's warnings pass."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    for name in ("_internal.progress", "_internal.execution.streaming_executor_state", "exceptions"):
        logging.getLogger(f"ray.data.{name}").setLevel(logging.CRITICAL)

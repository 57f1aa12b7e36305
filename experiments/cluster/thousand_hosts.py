"""1,000 hosts on paper: what limits training and serving at which size, by arithmetic alone.

    python -m experiments.cluster.thousand_hosts --network-gbps 400

Prints the tables of the README beside it. Nothing was measured on more than one machine: the defaults are
assumptions, but for those that say where they come from.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import tyro


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Of ResNet-50 at 224 px on hosts of 8 GPUs."""

    hosts: tuple[int, ...] = (1, 8, 64, 1000)
    gpus: int = 8
    """Of each host."""
    cores: int = 64
    """Of each host."""
    network_gbps: float = 200
    """Gbit/s of each host, in each direction."""
    inside_gbps: float = 2400
    """Gbit/s of each GPU to the others of its host."""
    inside_us: float = 30
    """Microseconds of a sum of few numbers over a host's GPUs."""
    hop_us: float = 5
    """Microseconds from host to host, of which a tree needs 2 log2(hosts)."""
    images_per_gpu: int = 64
    """In a step."""
    train_rate: float = 6900
    """Images/s of a GPU alone: the target of the README's table, not reached by anything yet."""
    score_rate: float = 32_000
    """Images/s of a GPU: the goal there."""
    gradient_mb: float = 107.3
    """25,557,032 parameters in float32, and the second moments of what batch norm sees."""
    state_mb: float = 204.7
    """Parameters, momentum and statistics."""
    num_small_sums: int = 93
    """All-reduces in a step for batch norm, counted in what XLA makes for two CPU devices. A third carry more
    than a few numbers, up to 1 MB forward and 4 MB back, which is in `gradient_mb`."""
    decode_rate: float = 388
    """JPEGs of 500 px/s of a core: half of two cores' (`benchmarks/results/input_pipeline_cpu.json`)."""
    request_rate: float = 301
    """Requests/s of a core: half of two cores', clients included (`benchmarks/results/serving_cpu.json`)."""
    photo_kb: float = 110
    num_photos: float = 1.28e6
    storage_gbps: float = 800
    """Gbit/s of a file system that all share."""
    writer_gbps: float = 8
    """Gbit/s of one process that writes to it."""
    host_hours: float = 6000
    """Between two failures of one host."""
    checkpoint_seconds: float = 600
    start_seconds: float = 60
    """To notice, start all processes again, and load compiled programs."""


Row = tuple[str, ...]


def training(a: Assumptions) -> list[Row]:
    """Milliseconds of a step's parts, one after the other."""
    rows: list[Row] = [
        ("hosts", "images/step", "computing", "batch norm's sums", "gradients", "computing is")
    ]
    for hosts in a.hosts:
        computing = a.images_per_gpu / a.train_rate * 1e3
        small = a.num_small_sums * (a.inside_us + 2 * a.hop_us * math.log2(hosts)) / 1e3
        inside = _ring_ms(a.gradient_mb, a.gpus, a.inside_gbps)
        gradients = inside + _ring_ms(a.gradient_mb, hosts, a.network_gbps)
        share = computing / (computing + small + gradients)
        images = hosts * a.gpus * a.images_per_gpu
        parts = (f"{part:.1f} ms" for part in (computing, small, gradients))
        rows.append((f"{hosts:,}", f"{images:,}", *parts, f"{share:.0%}"))
    return rows


def _ring_ms(megabytes: float, members: int, gbps: float) -> float:
    return 2 * (members - 1) / members * megabytes * 8 / gbps


def reading(a: Assumptions) -> list[Row]:
    """What must be decoded and read while the GPUs compute at their full rate."""
    rows: list[Row] = [("hosts", "images/s", "cores a host", "of the cores it has", "read", "of the storage")]
    for hosts in a.hosts:
        images = hosts * a.gpus * a.train_rate
        cores = images / hosts / a.decode_rate
        gbps = images * a.photo_kb * 8 / 1e6
        row = (f"{images:,.0f}", f"{cores:.0f}", f"{cores / a.cores:.1f}x", f"{gbps:,.0f} Gbit/s")
        rows.append((f"{hosts:,}", *row, f"{gbps / a.storage_gbps:.2f}x"))
    return rows


def failing(a: Assumptions) -> list[Row]:
    """What checkpoints cost, and what failures do."""
    rows: list[Row] = [("hosts", "write a checkpoint", "a failure every", "costs", "of the time")]
    write = a.state_mb * 8 / 1e3 / a.writer_gbps
    # Every process decodes all photos once, to find those that cannot be read.
    scan = a.num_photos / (a.decode_rate * a.cores / a.gpus)
    lost = a.start_seconds + scan + a.checkpoint_seconds / 2
    for hosts in a.hosts:
        hours = a.host_hours / hosts
        row = (f"{write:.1f} s", f"{hours:,.0f} h", f"{lost:.0f} s, {scan:.0f} s of it the scan")
        rows.append((f"{hosts:,}", *row, f"{lost / 3600 / hours:.1%}"))
    return rows


def serving(a: Assumptions) -> list[Row]:
    """Images/s that each part could pass, one image a request, if it had the host to itself."""
    rows: list[Row] = [("hosts", "GPUs", "decoding", "HTTP", "network", "replicas to know of")]
    for hosts in a.hosts:
        network = a.network_gbps / 8 * 1e6 / a.photo_kb
        rates = (a.gpus * a.score_rate, a.cores * a.decode_rate, a.cores * a.request_rate, network)
        rows.append((f"{hosts:,}", *(f"{hosts * rate:,.0f}/s" for rate in rates), f"{hosts * a.gpus:,}"))
    return rows


def to_markdown(rows: Sequence[Row]) -> str:
    """The first row above the others."""
    lines = [" | ".join(row) for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    return "".join(f"| {line} |\n" for line in lines)


def main(assumptions: Assumptions) -> None:
    """Print all tables."""
    for table in (training, reading, failing, serving):
        print(to_markdown(table(assumptions)))


if __name__ == "__main__":
    main(tyro.cli(Assumptions, description=__doc__))

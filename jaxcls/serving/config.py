"""How a service is to be run. No JAX: the command line reads it for `--help`."""

from dataclasses import dataclass
from importlib.util import find_spec

from jaxcls.data.images import MAX_PIXELS
from jaxcls.errors import MissingExtraError, UsageError
from jaxcls.models.precision import Precision

BATCH_SIZES = (1, 2, 4, 8, 16)
READY_SECONDS = 600.0
"""In which all replicas of a deployment must be ready."""
MAX_SHUTDOWN_SECONDS = 30
"""From SIGTERM to the end of the process, whatever is still under way."""
EXTRA = ("starlette", "uvicorn", "httptools", "uvloop", "python_multipart", "prometheus_client")


def require_extra() -> None:
    """Raise MissingExtraError unless all that serving needs is installed."""
    for package in EXTRA:
        if find_spec(package) is None:
            raise MissingExtraError(package, "serving", "pip install 'jaxcls[serve]'")


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """The bounds of one replica.

    Raises:
        UsageError: a value that cannot work.
    """

    batch_sizes: tuple[int, ...] = BATCH_SIZES
    """Compiled before the first request; whatever waits is scored in one of these."""
    max_queue: int = 128
    """Images taken in and not yet answered; further ones are told to come again (429)."""
    max_queue_mib: int = 256
    """MiB of request bodies held at once."""
    max_body_mib: int = 64
    """MiB of one request body."""
    max_connections: int = 1024
    """Open connections; further ones are told to come again (503)."""
    max_pixels: int = MAX_PIXELS
    """Refuse photos of more pixels, before decoding them."""
    deadline_ms: int = 10_000
    """Milliseconds from a request's arrival to its answer. What would take longer is told to come again."""
    grace_seconds: float = 3.0
    """After SIGTERM, go on taking requests for so long, while saying that this replica is not ready."""
    precision: Precision = "auto"
    """Of the convolutions; auto: bfloat16 on accelerators and, from 128 px on, CPUs that multiply it."""
    allow_urls: bool = False
    """Fetch images that requests name by URL, from public addresses."""

    def __post_init__(self) -> None:
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise UsageError(f"batch sizes {self.batch_sizes}: give at least one, each at least 1")
        counts = (
            "max_queue",
            "max_queue_mib",
            "max_body_mib",
            "max_connections",
            "max_pixels",
            "deadline_ms",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)}: must be at least 1")
        if not 0 <= self.grace_seconds <= MAX_SHUTDOWN_SECONDS / 2:
            raise UsageError(
                f"grace_seconds {self.grace_seconds}: must lie from 0 to {MAX_SHUTDOWN_SECONDS // 2}"
            )


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """What the replicas of a deployment get in a Ray cluster.

    Raises:
        UsageError: a value that cannot work.
    """

    min_replicas: int = 1
    """At least so many, with --replicas auto."""
    max_replicas: int = 4
    """At most so many, with --replicas auto."""
    gpus: float = 0.0
    """GPUs of each replica; of a fraction, several share one."""
    host: str = "127.0.0.1"
    """The address of each node that Serve listens on, unless it does already."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise UsageError(
                f"{self.min_replicas} to {self.max_replicas} replicas: give at least 1, then more"
            )
        if self.gpus < 0:
            raise UsageError(f"gpus {self.gpus}: must be at least 0")

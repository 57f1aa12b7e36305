"""What a replica counts, for Prometheus."""

import time

import jax
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

COMPILATION = "/jax/core/compile/backend_compile_duration"
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class Metrics:
    """The counters of one process. Create it when nothing is left to be compiled."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "jaxcls_requests", "Requests answered.", ("endpoint", "status"), registry=registry
        )
        self.images = Counter("jaxcls_images", "Images answered.", ("outcome",), registry=registry)
        self.request_seconds = Histogram(
            "jaxcls_request_seconds", "From a request's arrival to its answer.", ("endpoint",),
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.batches = Histogram(
            "jaxcls_batch_seconds", "What a batch took on the device.", ("size",), buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.batch_images = Counter(
            "jaxcls_batch_images", "Images in batches, without padding.", ("size",), registry=registry
        )
        self.queue_images = Gauge(
            "jaxcls_queue_images", "Images taken in and not yet answered.", registry=registry
        )
        self.queue_bytes = Gauge("jaxcls_queue_bytes", "Bytes of request bodies held.", registry=registry)
        self.is_ready = Gauge("jaxcls_ready", "Whether this replica wants requests.", registry=registry)
        self.compilations = Counter(
            "jaxcls_compilations", "Programs compiled since this replica was ready.", registry=registry
        )
        started = Gauge("jaxcls_start_time_seconds", "When this replica became ready.", registry=registry)
        started.set(time.time())
        jax.monitoring.register_event_duration_secs_listener(self._count_compilation)

    def _count_compilation(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILATION:
            self.compilations.inc()

    def observe_batch(self, size: int, num_images: int, seconds: float) -> None:
        """Count a batch that was scored."""
        self.batches.labels(size).observe(seconds)
        self.batch_images.labels(size).inc(num_images)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

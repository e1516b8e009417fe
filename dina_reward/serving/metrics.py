"""What operators watch, in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST


_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class ServingMetrics:
    """Counters of one application, in a registry of their own.

    Args:
        queue_rows: asked for the rows that wait, with every reading.
        held_bytes: asked for the bytes of bodies that are held.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, queue_rows: Callable[[], float], held_bytes: Callable[[], float]) -> None:
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # CPU time, memory, open files
        self._registry = registry
        prefix = "dina_reward_"
        labels = ("path", "status")
        self.requests = Counter(f"{prefix}requests", "Requests answered.", labels, registry=registry)
        self.request_seconds = Histogram(
            f"{prefix}request_seconds", "Time from head to answer.", ("path",), buckets=_SECONDS, registry=registry
        )
        self.rejected = Counter(f"{prefix}rejected", "Requests not scored, by fault.", ("reason",), registry=registry)
        self.rows = Counter(f"{prefix}rows_scored", "Rows whose scores were sent.", registry=registry)
        self.body_bytes = Counter(f"{prefix}body_bytes", "Bytes of bodies that were read.", registry=registry)
        self.queue_seconds = Histogram(
            f"{prefix}queue_seconds", "Time a request waited.", buckets=_SECONDS, registry=registry
        )
        self.batch_rows = Histogram(f"{prefix}batch_rows", "Rows per batch.", buckets=_ROWS, registry=registry)
        self.batch_requests = Histogram(
            f"{prefix}batch_requests", "Requests per batch.", buckets=_ROWS, registry=registry
        )
        self.batch_seconds = Histogram(
            f"{prefix}batch_seconds", "Time of the model per batch.", buckets=_SECONDS, registry=registry
        )
        self.prompt_hits = Counter(
            f"{prefix}prompt_cache_hits", "Encoded prompts found on the device.", registry=registry
        )
        self.prompt_misses = Counter(
            f"{prefix}prompt_cache_misses", "Encoded prompts moved to the device.", registry=registry
        )
        self.ready = Gauge(f"{prefix}ready", "Whether /readyz says 200.", registry=registry)
        self.model_info = Gauge(
            f"{prefix}model_info", "The reward.", ("family", "weights", "noise_level", "version"), registry=registry
        )
        Gauge(f"{prefix}queue_rows", "Rows that wait.", registry=registry).set_function(queue_rows)
        Gauge(f"{prefix}held_bytes", "Bytes of bodies that are held.", registry=registry).set_function(held_bytes)

    def text(self) -> bytes:
        """The reading."""
        return generate_latest(self._registry)

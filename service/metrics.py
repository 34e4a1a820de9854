"""What the front end counts."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from service.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HTTP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Seconds: a probe takes milliseconds, an answer as long as its caller waits (`max_timeout_s` at most)."""


class Metrics:
    """The front end's families, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.http_seconds = Histogram(
            "prismprune_http_request_duration_seconds",
            "Time from a request's first byte to its response's last, waiting included.",
            ("route", "method", "status"),
            registry=self.registry,
            buckets=HTTP_BUCKETS,
        )
        self.rejections = Counter(
            "prismprune_admission_rejections_total",
            "Questions refused before they became jobs, by the problem's slug.",
            ("reason",),
            registry=self.registry,
        )
        self.queue_depth = self._gauge("queue_depth", "Jobs that wait in the queue.", "model")
        self.workers = self._gauge("workers", "Workers with a recent heartbeat.", "model")
        self.upstream_up = self._gauge(
            "metrics_upstream_up", "1 if an upstream's metrics are below.", "upstream"
        )
        self.broker_memory_used = self._number(
            "broker_memory_used_bytes", "Memory that the broker uses; NaN while it does not answer."
        )
        self.broker_memory_limit = self._number(
            "broker_memory_limit_bytes", "The broker's maxmemory, 0 for none; NaN while it does not answer."
        )
        self._connections = self._number(
            "http_connections", "Open connections to the API; NaN where another server than ours runs it."
        )
        self._connections_limit = self._number(
            "http_connections_limit", "From so many connections on every request gets a bare 503."
        )

    def _gauge(self, name: str, documentation: str, *labels: str) -> Gauge:
        return Gauge(f"prismprune_{name}", documentation, labels, registry=self.registry)

    def _number(self, name: str, documentation: str) -> Gauge:
        """A gauge without labels, which is always on the page: NaN, not 0, until its value is known."""
        gauge = self._gauge(name, documentation)
        gauge.set(math.nan)
        return gauge

    def watch_connections(self, count: Callable[[], int], limit: int) -> None:
        """Asks for the server's open connections at each scrape; `limit`: how many it takes."""
        self._connections.set_function(count)
        self._connections_limit.set(limit)

    @contextmanager
    def counting_rejections(self) -> Iterator[None]:
        """Counts the error that leaves the block by its slug."""
        try:
            yield
        except ServiceError as error:
            self.rejections.labels(error.slug).inc()
            raise

    def page(self) -> str:
        return generate_latest(self.registry).decode()

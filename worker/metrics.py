"""What a worker measures: one registry, observed once a request at its terminal write.

Names and labels are those of API.md; base units. Process and Python collectors are left out: the front end
has its own, and one scrape may show both.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from worker.contract import AnswerResult, JobState

_FAST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75)
_SLOW_S = (1, 1.5, 2, 3, 5, 7.5, 10, 15, 30, 60, 120, 300)
STAGE_BUCKETS = (*_FAST_S, *_SLOW_S)
"""Seconds: selection takes one millisecond, a 7B prefill on CPU a minute."""
LATENCY_BUCKETS = (*_FAST_S[5:], *_SLOW_S)
"""Seconds, up to the default deadline of five minutes."""
TOKEN_BUCKETS = (8, 16, 32, 64, 128, 192, 256, 384, 576, 768, 1024, 1536, 2048, 2880, 4096, 8192, 16384)
"""Powers of two, and what LLaVA-1.5 (576), LLaVA-NeXT (2880) and eight frames (2048) have."""
MEMORY_BUCKETS = tuple(2.0**exponent * half for exponent in range(28, 38) for half in (1, 1.5))
"""Bytes: 256 MiB to 192 GiB, two to an octave."""
BATCH_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)

_STAGES = ("queue", "decode", "preprocess", "vision", "select", "prefill", "generate")


class WorkerMetrics:
    """The metrics of one worker, which serves one model."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self._declare_histograms()
        self._declare_counts()

    def _declare_histograms(self) -> None:
        self._latency = self._histogram(
            "request_latency_seconds", "Accepted to terminal.", ["modality", "outcome"], LATENCY_BUCKETS
        )
        self._stage = self._histogram("stage_seconds", "Time of each stage.", ["stage"], STAGE_BUCKETS)
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "Accepted to first token.", [], LATENCY_BUCKETS
        )
        self._original = self._histogram(
            "visual_tokens_original", "Visual tokens before pruning.", ["modality"], TOKEN_BUCKETS
        )
        self._kept = self._histogram(
            "visual_tokens_kept", "Visual tokens after pruning.", ["modality", "method"], TOKEN_BUCKETS
        )
        self._peak = self._histogram(
            "device_memory_peak_bytes",
            "Highest device memory while the request was in the engine; resident on CPU.",
            ["device"],
            MEMORY_BUCKETS,
        )
        self._cuda_peak = self._histogram(
            "cuda_memory_peak_bytes",
            "Highest CUDA memory allocated for a request.",
            ["device"],
            MEMORY_BUCKETS,
        )
        self._batch = self._histogram("batch_size", "Requests answered together.", [], BATCH_BUCKETS)

    def _declare_counts(self) -> None:
        self._requests = Counter(
            "prismprune_requests",
            "Requests that reached a terminal state.",
            ["model", "modality", "outcome"],
            registry=self.registry,
        )
        self._generated = Counter(
            "prismprune_generated_tokens", "Tokens generated.", ["model"], registry=self.registry
        )
        self.redelivered = Counter(
            "prismprune_jobs_redelivered", "Jobs delivered again after an attempt.", registry=self.registry
        )
        self.dead_lettered = Counter(
            "prismprune_jobs_dead_lettered", "Jobs given up after the last attempt.", registry=self.registry
        )
        self._running = self._gauge("jobs_running", "Jobs that this worker works on.", [])
        self._allocated = self._gauge(
            "device_memory_allocated_bytes", "Device memory now; resident on CPU.", ["device"]
        )
        self._info = self._gauge(
            "model_info", "1, labelled by what is served.", ["family", "quantization", "revision"]
        )

    def _histogram(self, name: str, text: str, labels: list[str], buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"prismprune_{name}", text, ["model", *labels], buckets=buckets, registry=self.registry
        )

    def _gauge(self, name: str, text: str, labels: list[str]) -> Gauge:
        return Gauge(f"prismprune_{name}", text, ["model", *labels], registry=self.registry)

    def describe(self, *, family: str, quantization: str | None, revision: str | None) -> None:
        """Says what is served, once it is loaded."""
        self._info.labels(self._model, family, quantization or "none", revision or "").set(1)

    def watch(self, device: str, *, memory_bytes: Callable[[], int], jobs_running: Callable[[], int]) -> None:
        """Asks these two at each scrape."""
        self._allocated.labels(self._model, device).set_function(memory_bytes)
        self._running.labels(self._model).set_function(jobs_running)

    def batch(self, size: int) -> None:
        """One batch of `size` requests went through the model."""
        self._batch.labels(self._model).observe(size)

    def finished(
        self, modality: str, outcome: JobState, latency_s: float, result: AnswerResult | None
    ) -> None:
        """One request reached its terminal state; `result` if it succeeded."""
        self._requests.labels(self._model, modality, outcome).inc()
        self._latency.labels(self._model, modality, outcome).observe(latency_s)
        if result is not None:
            self._answered(modality, result)

    def _answered(self, modality: str, result: AnswerResult) -> None:
        for stage in _STAGES:
            self._stage.labels(self._model, stage).observe(getattr(result.timings, f"{stage}_ms") / 1e3)
        self._first_token.labels(self._model).observe(result.timings.time_to_first_token_ms / 1e3)
        visual, memory = result.visual_tokens, result.memory
        self._original.labels(self._model, modality).observe(visual.original)
        self._kept.labels(self._model, modality, visual.method).observe(visual.kept)
        self._peak.labels(self._model, memory.device).observe(memory.peak_bytes)
        if memory.device.startswith("cuda"):
            self._cuda_peak.labels(self._model, memory.device).observe(memory.peak_bytes)
        usages = [result.usage, *(item.usage for item in result.answers or ())]
        self._generated.labels(self._model).inc(sum(usage.completion_tokens for usage in usages if usage))

    @contextmanager
    def serving(self, host: str, port: int) -> Iterator[None]:
        """Serves `/metrics` as long as the block runs; not at all for port 0."""
        if port == 0:
            yield
            return
        server, thread = start_http_server(port, host, self.registry)
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

"""What a worker measures: one registry, observed once a request at its terminal write.

Names and labels are those that rules and dashboards ask for; base units. Process and Python collectors are
left out: the front end has its own, and one scrape may show both.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from http import HTTPStatus
from socket import AF_INET, AF_INET6
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app

from prismprune.errors import PartsUnavailableError, PrismError, UnknownModelError
from worker.contract import JobState
from worker.errors import StoppedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from worker.contract import AnswerResult, Usage
    from worker.probes import Probes

_FAST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75)
_SLOW_S = (1, 1.5, 2, 3, 5, 7.5, 10, 15, 30, 60, 120, 300, 900, 3600)
STAGE_BUCKETS = (*_FAST_S, *_SLOW_S)
"""Seconds: selection takes one millisecond, a 7B prefill on CPU a minute."""
LATENCY_BUCKETS = (*_FAST_S[5:], *_SLOW_S)
"""Seconds, up to the longest deadline that a request may ask for, an hour."""
_BUDGETS = (8, 16, 32, 64, 128, 192, 256, 384, 576, 768, 1024, 1536, 2048, 2880, 4096, 8192, 16384)
TOKEN_BUCKETS = (*_BUDGETS, 23040, 36864)
"""The paper's budgets, powers of two, and what media have: 576 (LLaVA-1.5), 2048 (eight frames of
Video-LLaVA), 2880 (LLaVA-NeXT), 23040 (eight of its pictures), 36864 (64 frames of 576)."""
CACHE_BUCKETS = tuple(2.0**exponent for exponent in range(18, 36))
"""Bytes: 256 KiB to 32 GiB. A token has 45 KiB in the demo, 512 KiB in a 7B in half precision."""
MEMORY_BUCKETS = tuple(2.0**exponent * half for exponent in range(28, 38) for half in (1, 1.5))
"""Bytes: 256 MiB to 192 GiB, two to an octave."""
BATCH_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)

_NO_FAILURES = {StoppedError, UnknownModelError, PartsUnavailableError}
"""The first is a cancellation, the others end a worker while it loads."""
FAILURES: tuple[type[PrismError], ...] = (
    PrismError,
    *(each for each in PrismError.__subclasses__() if each not in _NO_FAILURES),
)
"""Errors that a job may end with: their slugs are the reasons that failures are counted by."""

_STAGES = ("queue", "decode", "preprocess", "vision", "select", "prefill", "generate")


class WorkerMetrics:
    """The metrics of one worker, which serves one model."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self._ended = 0
        self._lock = threading.Lock()
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
        self._cache = self._histogram(
            "kv_cache_bytes", "Keys and values that a request held at its end.", ["method"], CACHE_BUCKETS
        )

    def _declare_counts(self) -> None:
        self._requests = self._counter(
            "requests", "Requests that reached a terminal state.", ["model", "modality", "outcome"]
        )
        self._failures = self._counter(
            "job_failures", "Jobs that failed or expired, by the problem's slug.", ["model", "reason"]
        )
        self._generated = self._counter("generated_tokens", "Tokens generated.", ["model"])
        self.redelivered = self._counter("jobs_redelivered", "Jobs delivered again after an attempt.")
        self.dead_lettered = self._counter("jobs_dead_lettered", "Jobs given up after the last attempt.")
        self._hits = self._counter("media_cache_hits", "Answers whose visual tokens were kept from before.")
        self._misses = self._counter("media_cache_misses", "Answers whose media were encoded for them.")
        self._declare_savings()
        self._declare_gauges()
        for modality in ("image", "video"):  # a counter that is born with its first count shows no increase
            for outcome in filter(lambda state: state.terminal, JobState):
                self._requests.labels(self._model, modality, outcome)
        for failure in FAILURES:
            self._failures.labels(self._model, failure.slug)

    def _declare_savings(self) -> None:
        by_method = ["model", "method"]
        self._cache_saved = self._counter(
            "kv_cache_saved_bytes",
            "Keys and values that dropped visual tokens would have held, at the measured size of a token.",
            by_method,
        )
        self._prefill_saved = self._counter(
            "prefill_saved_seconds",
            "Estimate: prefill time per token that was prefilled, times the visual tokens dropped.",
            by_method,
        )

    def _declare_gauges(self) -> None:
        self._running = self._gauge("jobs_running", "Jobs that this worker works on.", [])
        self._allocated = self._gauge(
            "device_memory_allocated_bytes", "Device memory now; resident on CPU.", ["device"]
        )
        self._limit = self._gauge(
            "device_memory_limit_bytes", "What the device has; on CPU what the container may use.", ["device"]
        )
        self._info = self._gauge(
            "model_info", "1, labelled by what is served.", ["family", "quantization", "revision"]
        )

    def _histogram(self, name: str, text: str, labels: list[str], buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"prismprune_{name}", text, ["model", *labels], buckets=buckets, registry=self.registry
        )

    def _counter(self, name: str, text: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(f"prismprune_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: list[str]) -> Gauge:
        return Gauge(f"prismprune_{name}", text, ["model", *labels], registry=self.registry)

    def describe(self, *, family: str, quantization: str | None, revision: str | None) -> None:
        """Says what is served, once it is loaded."""
        self._info.labels(self._model, family, quantization or "none", revision or "").set(1)

    def watch(
        self,
        device: str,
        *,
        memory_bytes: Callable[[], int],
        jobs_running: Callable[[], int],
        limit_bytes: int | None = None,
    ) -> None:
        """Asks these two at each scrape; `limit_bytes`: what the first may reach."""
        if limit_bytes is not None:
            self._limit.labels(self._model, device).set(limit_bytes)
        self._allocated.labels(self._model, device).set_function(memory_bytes)
        self._running.labels(self._model).set_function(jobs_running)

    def batch(self, size: int) -> None:
        """One batch of `size` requests went through the model."""
        self._batch.labels(self._model).observe(size)

    def finished(
        self,
        modality: str,
        outcome: JobState,
        latency_s: float,
        result: AnswerResult | None,
        joined: int = 1,
        *,
        reason: str | None = None,
    ) -> None:
        """One request reached its terminal state; `result` if it succeeded, `reason` if it failed or expired.

        joined: how many requests its prefill was shared by, itself included. reason: the slug of its problem.
        """
        with self._lock:  # one thread a job
            self._ended += 1
        self._requests.labels(self._model, modality, outcome).inc()
        self._latency.labels(self._model, modality, outcome).observe(latency_s)
        if reason is not None:
            self._failures.labels(self._model, reason).inc()
        if result is not None:
            self._answered(modality, result, joined)

    def _answered(self, modality: str, result: AnswerResult, joined: int) -> None:
        for stage in _STAGES:
            self._stage.labels(self._model, stage).observe(getattr(result.timings, f"{stage}_ms") / 1e3)
        self._first_token.labels(self._model).observe(result.timings.time_to_first_token_ms / 1e3)
        visual, memory = result.visual_tokens, result.memory
        self._original.labels(self._model, modality).observe(visual.original)
        self._kept.labels(self._model, modality, visual.method).observe(visual.kept)
        self._peak.labels(self._model, memory.device).observe(memory.peak_bytes)
        if memory.device.startswith("cuda"):
            self._cuda_peak.labels(self._model, memory.device).observe(memory.peak_bytes)
        self._cache.labels(self._model, visual.method).observe(memory.kv_cache_bytes)
        usages = [usage for usage in (result.usage, *(item.usage for item in result.answers or ())) if usage]
        self._generated.labels(self._model).inc(sum(usage.completion_tokens for usage in usages))
        cached = any(usage.prompt_tokens_details.cached_tokens for usage in usages)
        (self._hits if cached else self._misses).inc()
        self._saved(result, usages, joined)

    def _saved(self, result: AnswerResult, usages: list[Usage], joined: int) -> None:
        """What pruning spared: tokens that are in no prompt and in no cache.

        Each answer's cache holds all of its tokens but the last one drawn. The prefill sees the media once,
        however many questions there are; it is taken as linear in tokens (attention grows faster, the fixed
        cost of a pass not at all), and as shared evenly by the `joined` requests whose time it is.
        """
        dropped = max(0, result.visual_tokens.original - result.visual_tokens.kept)
        shown = usages[0].prompt_tokens_details.image_tokens + usages[0].prompt_tokens_details.video_tokens
        prefilled = sum(usage.prompt_tokens for usage in usages) - (len(usages) - 1) * shown
        held = sum(usage.total_tokens - 1 for usage in usages)
        if not prefilled or not held:
            return
        labels = (self._model, result.visual_tokens.method)
        self._cache_saved.labels(*labels).inc(dropped * len(usages) * result.memory.kv_cache_bytes / held)
        prefill_s = result.timings.prefill_ms / 1e3 / joined
        self._prefill_saved.labels(*labels).inc(dropped * prefill_s / prefilled)

    @property
    def ended(self) -> int:
        """How many requests have been observed so far."""
        return self._ended

    @contextmanager
    def serving(self, host: str, port: int, probes: Probes | None = None) -> Iterator[None]:
        """Serves `/metrics`, and `probes` if given, as long as the block runs; not at all for port 0."""
        if port == 0:
            yield
            return
        pages = _pages(make_wsgi_app(self.registry), probes)
        server_class = _ServerV6 if ":" in host else _Server
        with make_server(host, port, pages, server_class, _QuietHandler) as server:
            thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
            thread.start()
            try:
                yield
            finally:
                server.shutdown()
                thread.join()


def _pages(metrics: WSGIApplication, probes: Probes | None) -> WSGIApplication:
    """`/metrics`; with `probes`, `/livez` and `/readyz` too, 200 or 503."""

    def page(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            return metrics(environ, start_response)
        if probes is not None and path in ("/livez", "/readyz"):
            fine = probes.alive if path == "/livez" else probes.ready
            status = HTTPStatus.OK if fine else HTTPStatus.SERVICE_UNAVAILABLE
        else:
            status = HTTPStatus.NOT_FOUND
        start_response(f"{status.value} {status.phrase}", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{status.phrase}\n".encode()]

    return page


class _Server(ThreadingMixIn, WSGIServer):
    """A thread a request: a slow scrape keeps no probe waiting."""

    daemon_threads = True
    address_family = AF_INET


class _ServerV6(_Server):
    address_family = AF_INET6


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Scrapes and probes come every few seconds: they are not logged."""

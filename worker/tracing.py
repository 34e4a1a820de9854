"""OpenTelemetry spans of a worker: each attempt at a job, below it the stages that the library has timed.

Imported only where `PRISM_TRACING_ENDPOINT` is set. Spans are written when an attempt has ended, from what
its result tells anyway: the engine does nothing for them. They carry ids, times, budgets and counts; no
media, no prompt, no answer, and of an error the slug alone.
"""

from __future__ import annotations

import threading
import time
from importlib.metadata import version
from itertools import pairwise
from typing import TYPE_CHECKING, Self

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from worker.contract import (
    JOB_ID_ATTRIBUTE,
    REQUEST_ID_ATTRIBUTE,
    AnswerResult,
    JobState,
    Problem,
    queue_name,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.context import Context
    from opentelemetry.util.types import AttributeValue

    from worker.contract import AnswerJob
    from worker.jobs import Claim, Outcome

    Attributes = dict[str, AttributeValue]

FLUSH_S = 2.0
"""For the last spans at the end of the process, which has 3 s to leave after its grace."""
STAGES = ("preprocess", "vision", "select", "prefill", "generate")
"""One after another in the engine; named as in the metrics."""

_w3c = TraceContextTextMapPropagator()


class AttemptSpans:
    """Sends the spans of one worker to the collector at `endpoint` by OTLP over HTTP while the block runs.

    The provider is its own and not the process's: libraries that trace by themselves, as transformers does,
    would put into their spans what they are called with.
    """

    def __init__(self, endpoint: str, worker_id: str) -> None:
        own = {
            "service.name": "prismprune-worker",
            "service.version": version("prismprune"),
            "service.instance.id": worker_id,
        }
        resource = Resource.create(own).merge(OTELResourceDetector().detect())  # OTEL_SERVICE_NAME wins
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("prismprune.worker", version("prismprune"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)  # it takes no timeout itself
        closing.start()
        closing.join(FLUSH_S)

    def attempt(self, job: AnswerJob, claim: Claim, outcome: Outcome) -> None:
        """Writes the attempt that ends now: its wait in the queue beside it, its stages below."""
        ended_s = time.time()
        claimed_s = ended_s - (time.monotonic() - claim.at)
        accepted_s = min(job.created_at, claimed_s)  # another machine's clock
        sent = _w3c.extract(job.trace.model_dump()) if job.trace else None
        self._write("queue", accepted_s, claimed_s, sent)
        queue = queue_name(job.model)
        span = self._tracer.start_span(
            f"process {queue}", sent, SpanKind.CONSUMER, _asked(job, queue, claim), start_time=_ns(claimed_s)
        )
        span.set_attributes(_became(outcome))
        if outcome.state is not JobState.SUCCEEDED and outcome.state is not JobState.CANCELED:
            span.set_status(StatusCode.ERROR)
        if outcome.result:
            below = set_span_in_context(span)
            for name, began_s, until_s in _stages(outcome.result, accepted_s, claimed_s):
                self._write(name, began_s, until_s, below)
        span.end(_ns(ended_s))

    def _write(self, name: str, began_s: float, ended_s: float, parent: Context | None) -> None:
        self._tracer.start_span(name, parent, start_time=_ns(began_s)).end(_ns(ended_s))


def _asked(job: AnswerJob, queue: str, claim: Claim) -> Attributes:
    """What is known before it is answered."""
    attributes: dict[str, AttributeValue | None] = {
        "messaging.system": "redis",
        "messaging.operation.type": "process",
        "messaging.destination.name": queue,
        JOB_ID_ATTRIBUTE: job.id,
        REQUEST_ID_ATTRIBUTE: job.request_id,
        "gen_ai.request.model": job.model,
        "prismprune.attempt": claim.attempt,
        "prismprune.modality": job.modality,
        "prismprune.questions": len(job.questions),
        "prismprune.method": job.method,
        "prismprune.token_budget": job.token_budget,
        "prismprune.keep_ratio": job.keep_ratio,
    }
    return {name: value for name, value in attributes.items() if value is not None}


def _became(outcome: Outcome) -> Attributes:
    """How it ended; of an answer its tokens and memory, with the budget and method that were applied."""
    attributes: Attributes = {"prismprune.state": outcome.state}
    if isinstance(outcome.content, Problem):
        return attributes | {"error.type": outcome.content.slug}
    result = outcome.content
    usages = [usage for usage in (result.usage, *(item.usage for item in result.answers or ())) if usage]
    visual = result.visual_tokens
    attributes |= {
        "gen_ai.usage.input_tokens": sum(usage.prompt_tokens for usage in usages),
        "gen_ai.usage.output_tokens": sum(usage.completion_tokens for usage in usages),
        "prismprune.method": visual.method,
        "prismprune.visual_tokens.original": visual.original,
        "prismprune.visual_tokens.kept": visual.kept,
        "prismprune.cached_tokens": max(usage.prompt_tokens_details.cached_tokens for usage in usages),
        "prismprune.memory.peak_bytes": result.memory.peak_bytes,
        "prismprune.memory.kv_cache_bytes": result.memory.kv_cache_bytes,
        "prismprune.memory.shared_with": result.memory.shared_with,
    }
    return attributes if visual.budget is None else attributes | {"prismprune.token_budget": visual.budget}


def _stages(result: AnswerResult, accepted_s: float, claimed_s: float) -> Iterator[tuple[str, float, float]]:
    """Name, begin and end of each stage that took time, in Unix seconds.

    Decoding comes first, at the claim; `wait` is for the media store and for a place in the engine, where
    the others follow each other. Each is drawn in one piece: of `vision` the projector's part, and of
    `preprocess` the writing of prompts, come a little later in truth.
    """
    timings = result.timings
    decoded_s = claimed_s + timings.decode_ms / 1e3
    ends = [accepted_s + (timings.queue_ms + timings.decode_ms) / 1e3]  # when its turn came
    for stage in STAGES:
        ends.append(ends[-1] + getattr(timings, f"{stage}_ms") / 1e3)
    spans = [("decode", claimed_s, decoded_s), ("wait", decoded_s, ends[0])]
    spans += [(stage, *times) for stage, times in zip(STAGES, pairwise(ends), strict=True)]
    return ((name, began_s, until_s) for name, began_s, until_s in spans if until_s > began_s)


def _ns(unix_s: float) -> int:
    return int(unix_s * 1e9)

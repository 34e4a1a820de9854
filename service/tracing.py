"""OpenTelemetry spans of the front end: each request under `/v1`, and the sending of its job.

Imported only where `PRISM_TRACING_ENDPOINT` is set. Spans carry ids, routes and statuses; no media, no
prompt, no answer, and neither query strings nor messages of errors, which may quote one: that is why
FastAPI's own telemetry stays off.
"""

from __future__ import annotations

import threading
from contextlib import asynccontextmanager, contextmanager
from http import HTTPMethod
from typing import TYPE_CHECKING

from anyio import to_thread
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers

from service import VERSION
from worker.contract import JOB_ID_ATTRIBUTE, REQUEST_ID_ATTRIBUTE, TraceContext, queue_name

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from opentelemetry.trace import Span
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from worker.contract import AnswerJob

TRACED = "/v1/"
"""Below it somebody asks for something; probes and scrapes come every few seconds and are not traced."""
FLUSH_S = 3.0
"""For the last spans at the end of the process: a collector that is away does not hold it up."""
SERVER_ERROR = 500

_w3c = TraceContextTextMapPropagator()


class Tracing:
    """The spans of one front end, sent to the collector at `endpoint` by OTLP over HTTP.

    The provider is its own and not the process's: libraries that trace by themselves would put into their
    spans what they are called with. Sampler, headers and resource are those of OpenTelemetry's own variables.
    """

    def __init__(self, endpoint: str) -> None:
        own = Resource.create({"service.name": "prismprune-service", "service.version": VERSION})
        self._provider = TracerProvider(
            resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("prismprune.service", VERSION)

    @asynccontextmanager
    async def exporting(self) -> AsyncIterator[None]:
        """Sends what is left when the block ends, for at most `FLUSH_S`."""
        try:
            yield
        finally:
            await to_thread.run_sync(self._close)

    def _close(self) -> None:
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)  # it takes no timeout itself
        closing.start()
        closing.join(FLUSH_S)

    def middleware(self, app: ASGIApp) -> TracedRequests:
        """`app` with a span for each of its requests."""
        return TracedRequests(app, self)

    @contextmanager
    def request(self, scope: Scope) -> Iterator[Span]:
        """The current span of one HTTP request; continues the caller's trace if there is one."""
        method = scope["method"] if scope["method"] in HTTPMethod.__members__ else "_OTHER"
        with self._tracer.start_as_current_span(
            method,
            _w3c.extract(Headers(scope=scope)),
            SpanKind.SERVER,
            {"http.request.method": method, REQUEST_ID_ATTRIBUTE: scope["state"]["request_id"]},
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            yield span

    @contextmanager
    def sending(self, job: AnswerJob) -> Iterator[AnswerJob]:
        """Spans the sending of `job`; gives the job as it is to be sent, with the way back to this trace."""
        queue = queue_name(job.model)
        attributes = {
            "messaging.system": "redis",
            "messaging.operation.type": "send",
            "messaging.destination.name": queue,
            REQUEST_ID_ATTRIBUTE: job.request_id,
            JOB_ID_ATTRIBUTE: job.id,
        }
        with self._tracer.start_as_current_span(
            f"send {queue}",
            kind=SpanKind.PRODUCER,
            attributes=attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            carrier: dict[str, str] = {}
            _w3c.inject(carrier)  # nothing where OTEL_SDK_DISABLED is set
            try:
                yield job.model_copy(update={"trace": TraceContext(**carrier) if carrier else None})
            except Exception as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(StatusCode.ERROR)
                raise


class TracedRequests:
    """Middleware: a span for each request under `TRACED`, as long as its response takes, streams included."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(TRACED):
            await self._app(scope, receive, send)
            return
        with self._tracing.request(scope) as span:

            async def send_noting_status(message: Message) -> None:
                if message["type"] == "http.response.start":
                    _note(span, scope, message["status"])
                await send(message)

            await self._app(scope, receive, send_noting_status)


def _note(span: Span, scope: Scope, status: int) -> None:
    """Route and outcome, known when the response begins. The caller's own mistakes are no errors here."""
    if (route := getattr(scope.get("route"), "path", None)) is not None:
        span.update_name(f"{scope['method']} {route}")
        span.set_attribute("http.route", route)
    span.set_attribute("http.response.status_code", status)
    if status >= SERVER_ERROR:
        span.set_attribute("error.type", str(status))
        span.set_status(StatusCode.ERROR)

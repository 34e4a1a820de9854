"""The front end as an ASGI application, which `python -m service` serves: `create_app` makes it."""

from __future__ import annotations

from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING

import httpx
from fastapi import FastAPI
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from service import (
    VERSION,
    answer,
    chat,
    errors,
    events,
    health,
    metrics_page,
    models,
    openapi,
    pages,
    uploads,
)
from service.admission import Admission
from service.broker import Durability
from service.context import Context
from service.fetch import Fetcher
from service.idempotency import Idempotency
from service.jobs import Jobs
from service.media import MediaStore, open_store
from service.metrics import Metrics
from service.middleware import BodyLimit, Failures, HttpMetrics, KeyGuard, RequestId
from service.rates import RateLimit
from service.settings import ServiceSettings
from service.shelf import Shelf
from service.signals import JobSignals
from service.sweeper import Sweeper
from service.workers import Workers
from worker.contract import redis_url

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi.telemetry import TelemetryConfig

    from service.tracing import Tracing

CONNECTIONS = 32
"""To the broker from one process: every use but the shared subscription is a single short command."""
NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
"""Of FastAPI's own, which would send messages of errors and query strings: they may quote a question."""


def create_app(settings: ServiceSettings | None = None) -> FastAPI:
    """The application with `settings`, or those of the environment; connects to nothing before it starts."""
    settings = settings or ServiceSettings()
    counted, tracing = Metrics(), _tracing(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with (
            _context(settings, counted, tracing) as app.state.context,
            metrics_page.serving(app.state.context),
        ):
            yield

    app = FastAPI(
        title="PrismPrune",
        version=VERSION,
        lifespan=lifespan,
        redirect_slashes=False,  # it would send callers to whatever host they name
        openapi_url=None,  # `pages` has it, and /docs: FastAPI's own takes its scripts from another host
        telemetry=NO_TELEMETRY,
    )
    app.add_middleware(BodyLimit, settings=settings)  # the last one added is the outermost
    app.add_middleware(KeyGuard, settings=settings)
    app.add_middleware(Failures)
    if tracing:
        app.add_middleware(tracing.middleware)
    app.add_middleware(HttpMetrics, metrics=counted)
    app.add_middleware(RequestId)
    errors.install(app, settings.problem_base_url)
    for router in (answer.router, events.router, chat.router, models.router, uploads.router, health.router):
        app.include_router(router)
    app.include_router(pages.router)
    if not settings.metrics_port:
        app.include_router(metrics_page.router)
    openapi.install(app, guarded=bool(settings.key_lines))
    return app


@asynccontextmanager
async def _context(
    settings: ServiceSettings, counted: Metrics, tracing: Tracing | None
) -> AsyncIterator[Context]:
    """The parts while the process serves: connections are made on use, and closed at the end."""
    async with (
        tracing.exporting() if tracing else nullcontext(),
        _redis(settings) as redis,
        httpx.AsyncClient(trust_env=False) as http,
    ):
        signals, durability = JobSignals(redis), Durability(redis, settings)
        store, shelf = open_store(settings.media_url), Shelf(redis, settings)
        sweeper = Sweeper(store, shelf, settings)
        async with durability.watching(), signals.reading(), sweeper.sweeping():
            yield Context(
                settings=settings,
                metrics=counted,
                redis=redis,
                http=http,
                jobs=Jobs(redis, signals, settings),
                workers=Workers(redis, settings),
                shelf=shelf,
                media=MediaStore(store, shelf, Fetcher(settings), settings),
                rates=RateLimit(redis, settings),
                admission=Admission(redis, durability, settings),
                idempotency=Idempotency(redis, settings),
                tracing=tracing,
            )


def _tracing(settings: ServiceSettings) -> Tracing | None:
    """None where no collector is named; OpenTelemetry is an extra, which need not be installed then."""
    if settings.tracing_endpoint is None:
        return None
    from service.tracing import Tracing  # noqa: PLC0415 - see above

    return Tracing(settings.tracing_endpoint)


def _redis(settings: ServiceSettings) -> Redis:
    """A pool that makes callers wait for a connection, where redis-py's own would refuse the 101st.

    One retry at once, for a pooled connection that a restart of the broker has cut.
    """
    pool = BlockingConnectionPool.from_url(
        redis_url(settings.broker_url),
        max_connections=CONNECTIONS,
        timeout=settings.broker_timeout_s,
        decode_responses=True,
        socket_timeout=settings.broker_timeout_s,
        socket_connect_timeout=settings.broker_timeout_s,
        socket_keepalive=True,
        retry=Retry(NoBackoff(), 1),
    )
    return Redis.from_pool(pool)

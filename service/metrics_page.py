"""One page of the front end's metrics and the workers' own; on a port of its own if that is wanted."""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import httpx
import uvicorn
from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from service import broker
from service.admission import waiting
from service.context import Here  # noqa: TC001 (fastapi reads the annotations at run time)
from service.errors import BrokerAwayError
from service.health import livez
from service.jobs import broker_within
from service.openapi import problems

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from starlette.requests import Request

    from service.context import Context

logger = logging.getLogger(__name__)
router = APIRouter(tags=["operations"])

UPSTREAM_TIMEOUT_S = 1.0


@router.get("/metrics", responses=problems(401), summary="Prometheus metrics", response_class=Response)
async def metrics(here: Here) -> Response:
    """The front end's metrics, then those of each upstream that answers."""
    upstreams = here.settings.metrics_upstreams
    texts, queues, (used, limit) = await asyncio.gather(
        asyncio.gather(*(_fetch(here, url) for url in upstreams)),
        _queues(here),
        broker.memory(here.redis, here.settings.broker_timeout_s),
    )
    for url, text in zip(upstreams, texts, strict=True):
        here.metrics.upstream_up.labels(url).set(text is not None)
    here.metrics.queue_depth.clear()  # nothing awaits from here to the page: scrapes do not mix
    here.metrics.workers.clear()
    here.metrics.broker_memory_used.set(used)
    here.metrics.broker_memory_limit.set(limit)
    for model, (depth, count) in queues.items():
        here.metrics.queue_depth.labels(model).set(depth)
        here.metrics.workers.labels(model).set(count)
    pages = [here.metrics.page(), *(text for text in texts if text is not None)]
    return Response("".join(pages), media_type=CONTENT_TYPE_LATEST)


@asynccontextmanager
async def serving(here: Context) -> AsyncIterator[None]:
    """Serves `/metrics`, and `/livez`, on `metrics_port` while the block runs; not at all for port 0.

    In this event loop: the numbers are this process's own, and the probe is answered as long as it turns,
    also when the main port has all the connections that it takes. Raises `OSError` if the port cannot be had.
    """
    settings = here.settings
    if not settings.metrics_port:
        yield
        return

    async def page(_request: Request) -> Response:
        return await metrics(here)

    async def live(_request: Request) -> Response:
        return JSONResponse(await livez())

    family = socket.AF_INET6 if ":" in settings.metrics_host else socket.AF_INET
    with socket.create_server((settings.metrics_host, settings.metrics_port), family=family) as listening:
        app = Starlette(routes=[Route("/metrics", page), Route("/livez", live)])
        server = _Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
        serve = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield
        finally:
            server.should_exit = True
            await serve


class _Server(uvicorn.Server):
    """A server beside the main one, which alone listens to signals."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _queues(here: Context) -> dict[str, tuple[int, int]]:
    """Model to jobs waiting and workers seen; nothing while the broker is away."""
    try:
        fresh = [status.model for status in await here.workers.fresh()]
        async with broker_within(here.settings.broker_timeout_s):
            depths = {model: await waiting(here.redis, model) for model in here.workers.models}
    except BrokerAwayError:
        return {}
    return {model: (depth, fresh.count(model)) for model, depth in depths.items()}


async def _fetch(here: Context, url: str) -> str | None:
    """The upstream's page in Prometheus' text format, None if there is none."""
    try:
        response = await here.http.get(url, timeout=UPSTREAM_TIMEOUT_S, headers={"Accept": "text/plain"})
        response.raise_for_status()
    except httpx.HTTPError as error:
        logger.warning("a metrics upstream does not answer: %s", type(error).__name__)
        return None
    return response.text.rstrip("\n") + "\n"

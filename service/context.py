"""What every route works with, made once at start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends
from starlette.requests import Request  # noqa: TC002 (fastapi reads the annotations at run time)

if TYPE_CHECKING:
    from httpx import AsyncClient
    from redis.asyncio import Redis

    from service.admission import Admission
    from service.idempotency import Idempotency
    from service.jobs import Jobs
    from service.media import MediaStore
    from service.metrics import Metrics
    from service.rates import RateLimit
    from service.settings import ServiceSettings
    from service.shelf import Shelf
    from service.tracing import Tracing
    from service.workers import Workers


@dataclass(frozen=True, slots=True)
class Context:
    """The parts of one front-end process."""

    settings: ServiceSettings
    metrics: Metrics
    redis: Redis
    http: AsyncClient
    jobs: Jobs
    workers: Workers
    shelf: Shelf
    media: MediaStore
    rates: RateLimit
    admission: Admission
    idempotency: Idempotency
    tracing: Tracing | None


def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


Here = Annotated[Context, Depends(_context)]

"""Is it alive, does it accept, would it answer; and which build it is."""

from __future__ import annotations

import platform
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import JSONResponse

from service import VERSION
from service.context import Here  # noqa: TC001 (fastapi reads the annotations at run time)
from service.errors import BrokerAwayError
from service.openapi import RETRY, problems

if TYPE_CHECKING:
    from service.context import Context

LOOK_AGAIN_S = 5
"""`Retry-After` of `/healthz`: a worker reports this often."""
router = APIRouter(tags=["operations"])


class BrokerHealth(BaseModel):
    """Whether the broker answers."""

    state: Literal["up", "away"]


class WorkerHealth(BaseModel):
    """Workers of the default model: how many were seen lately, and how many of them are warm."""

    state: Literal["warm", "warming", "absent", "unknown"]
    model: str
    warm: int | None = None
    seen: int | None = None


class Health(BaseModel):
    """What `/healthz` says, healthy or not."""

    status: Literal["ok", "unavailable"]
    broker: BrokerHealth
    worker: WorkerHealth


@router.head("/livez", include_in_schema=False)
@router.get("/livez", summary="The process lives")
async def livez() -> dict[str, str]:
    """200 as long as the event loop turns."""
    return {"status": "ok"}


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", summary="It accepts requests")
async def readyz() -> dict[str, str]:
    """200 once started, whatever broker and worker do: a probe must not take every front end away."""
    return {"status": "ok"}


@router.head("/healthz", include_in_schema=False)
@router.get(
    "/healthz",
    summary="A question would be answered now",
    response_model=Health,
    responses={
        503: {"model": Health, "description": "It would not be, for want of what is not well.", **RETRY},
        **problems(401),
    },
)
async def healthz(here: Here) -> JSONResponse:
    """200 only when the broker answers and a worker for the default model is warm, else 503."""
    parts = await _parts(here)
    healthy = parts["worker"]["state"] == "warm"
    return JSONResponse(
        {"status": "ok" if healthy else "unavailable", **parts},
        status_code=HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE,
        headers={} if healthy else {"Retry-After": str(LOOK_AGAIN_S)},
    )


async def _parts(here: Context) -> dict[str, dict[str, Any]]:
    model = here.settings.model
    try:
        seen = [status for status in await here.workers.fresh() if status.model == model]
    except BrokerAwayError:
        return {"broker": {"state": "away"}, "worker": {"state": "unknown", "model": model}}
    warm = sum(status.warm for status in seen)
    state = "warm" if warm else "warming" if seen else "absent"
    worker = {"state": state, "model": model, "warm": warm, "seen": len(seen)}
    return {"broker": {"state": "up"}, "worker": worker}


@router.head("/version", include_in_schema=False)
@router.get("/version", summary="The build", responses=problems(401))
async def build(here: Here) -> dict[str, str | None]:
    return {"version": VERSION, "revision": here.settings.build_revision, "python": platform.python_version()}

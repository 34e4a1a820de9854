"""A job's events as server-sent events, and what becomes of a job whose caller hangs up."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Header
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from starlette.responses import StreamingResponse

from service.context import Here  # noqa: TC001 (fastapi reads the annotations at run time)
from service.errors import CallerGoneError, InvalidRequestError, problem_details
from service.jobs import START, STOPPING, StoppedWaitingError
from service.keys import CallerHere  # noqa: TC001 (fastapi reads the annotations at run time)
from service.openapi import problems
from worker.contract import EventName, JobState

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.requests import Request

    from service.context import Context
    from service.jobs import JobRecord

router = APIRouter(tags=["answers"])

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
EVENT_STREAM = {
    "text/event-stream": {
        "schema": {  # of one event
            "type": "object",
            "properties": {
                "event": {"enum": [*EventName]},
                "data": {"type": "string", "contentMediaType": "application/json"},
                "id": {"type": "string"},
            },
        },
        "example": 'event: token\ndata: {"question": 0, "text": "red"}\nid: 1763852400000-1\n\n',
    }
}
_ENTRY_ID = re.compile(r"[0-9]{1,20}-[0-9]{1,20}")


@router.get(
    "/v1/jobs/{job_id}/events",
    summary="What happens to a job, as it happens",
    response_class=StreamingResponse,
    responses={
        200: {"content": EVENT_STREAM, "description": "Server-sent events, to the job's end."},
        **problems(401, 404, 422, 503),
    },
)
async def read_events(
    job_id: str,
    here: Here,
    caller: CallerHere,
    last_event_id: Annotated[str, Header(json_schema_extra={"pattern": f"^{_ENTRY_ID.pattern}$"})] = START,
) -> EventSourceResponse:
    """`queued`, `started`, `token`, and the end: `completed` (the result), `failed`, `canceled`, `expired`.

    A reader whose line broke goes on after the `Last-Event-ID` that it sends. `started` again: the worker of
    the attempt before was lost, and the text begins anew.
    """
    if not _is_entry_id(last_event_id):
        raise InvalidRequestError("Last-Event-ID: the id of an event of this job")
    record = await here.jobs.known(job_id, caller.owner)
    return EventSourceResponse(sent(here, record, last_event_id), headers=HEADERS)


def _is_entry_id(text: str) -> bool:
    """Whether the broker knows such ids, and one may lie behind it."""
    if not _ENTRY_ID.fullmatch(text):
        return False
    halves = tuple(map(int, text.split("-")))
    return max(halves) < 2**64 and halves < (2**64 - 1, 2**64 - 1)


async def sent(here: Context, record: JobRecord, after: str = START) -> AsyncGenerator[bytes, None]:
    """The job's events in the wire's format, with a comment now and then that keeps the line open.

    Ends without an end where the server stops: the reader goes on elsewhere, after the last id.
    """
    async for event in here.jobs.follow(record, after):
        if event is None:
            yield KEEPALIVE_COMMENT
        elif event.ends:
            ended = await here.jobs.ended(record)  # not what the event says, where the job is lost since
            if ended.error is STOPPING:
                return
            yield format_sse_event(
                event=EventName.of_end(ended.state), data_str=_outcome(here, ended), id=event.id
            )
        else:
            yield format_sse_event(event=event.name, data_str=json.dumps(event.data), id=event.id)


async def unless_hung_up(
    here: Context, record: JobRecord, stream: AsyncGenerator[bytes, None]
) -> AsyncGenerator[bytes, None]:
    """`stream` to its end; a caller who leaves before cancels the job."""
    over = False
    try:
        async for piece in stream:
            yield piece
        over = True
    finally:
        if not over:
            here.jobs.cancel_soon(record)


async def waited_for(
    request: Request, here: Context, record: JobRecord, timeout_s: float, *, findable: bool = False
) -> JobRecord:
    """As `Jobs.wait`; a caller who hangs up meanwhile cancels the job. Raises `CallerGoneError` then.

    findable: the caller is told where the job is if the server stops; else that cancels it, too.
    """
    waiting = asyncio.ensure_future(here.jobs.wait(record, timeout_s))
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        here.jobs.cancel_soon(record)
        raise CallerGoneError("The caller hung up; the job was canceled.")
    except StoppedWaitingError:
        if not findable:
            here.jobs.cancel_soon(record)
        raise
    finally:
        waiting.cancel()
        leaving.cancel()


async def _gone(request: Request) -> None:
    """Returns when the caller has hung up: its body was read before, and nothing else comes."""
    while (await request.receive())["type"] != "http.disconnect":
        continue


def _outcome(here: Context, ended: JobRecord) -> str:
    """What came of the job, as JSON on one line."""
    if ended.state is JobState.SUCCEEDED:
        return json.dumps(ended.result)
    base_url = here.settings.problem_base_url
    return json.dumps(ended.error and problem_details(ended.error, base_url, ended.request_id))

"""The questions' and jobs' routes: admit, hand over, wait, show."""

from __future__ import annotations

import hashlib
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Header
from fastapi.sse import EventSourceResponse
from starlette.requests import Request  # noqa: TC002 (fastapi reads the annotations at run time)
from starlette.responses import JSONResponse, Response

from service.body import answer_request
from service.context import Here  # noqa: TC001 (fastapi reads the annotations at run time)
from service.errors import InvalidRequestError, problem_details
from service.events import EVENT_STREAM, HEADERS, sent, unless_hung_up, waited_for
from service.idempotency import MAX_KEY
from service.ids import new_id
from service.jobs import StoppedWaitingError
from service.keys import CallerHere  # noqa: TC001 (fastapi reads the annotations at run time)
from service.openapi import RETRY, answer_body, problems
from service.schemas import JobView
from worker.contract import AnswerJob, AnswerResult

if TYPE_CHECKING:
    from service.context import Context
    from service.jobs import JobRecord
    from service.keys import Caller
    from service.media import Intake
    from service.schemas import AnswerRequest
    from service.settings import ServiceSettings

router = APIRouter(tags=["answers"])

POLL_AFTER_S = 1
"""`Retry-After` of an answer that is not there yet."""
IdempotencyKey = Annotated[
    str | None,
    Header(
        description="The same key, fields and media: the same job, for 24 h.",
        json_schema_extra={"minLength": 1, "maxLength": MAX_KEY},
    ),
]
_LOCATION = {"Location": {"description": "Of the job.", "schema": {"type": "string"}}, **RETRY["headers"]}


@router.post(
    "/v1/answer",
    summary="Ask about an image, several images or a video",
    response_model=AnswerResult,
    responses={
        200: {"content": EVENT_STREAM, "description": "The answer; with `stream`, server-sent events."},
        202: {"model": JobView, "description": "Accepted; poll the `Location`.", "headers": _LOCATION},
        **problems(400, 401, 404, 408, 409, 413, 415, 422, 429, 500, 503, 504, 507),
    },
    openapi_extra={"requestBody": answer_body()},
)
async def answer(
    request: Request,
    here: Here,
    caller: CallerHere,
    prefer: Annotated[tuple[str, ...], Header()] = (),
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Waits for the answer, at most `timeout_s`; then, or at once with `Prefer: respond-async`, 202.

    With `stream: true` the job's events as they happen, its result in the last. A caller who hangs up cancels
    the job, unless it sent an `Idempotency-Key` or `respond-async`.
    """
    at_once = "respond-async" in _preferences(prefer)
    with here.metrics.counting_rejections():
        async with answer_request(request) as asked:
            record = await accept(request, here, caller, asked, key=idempotency_key, followed=at_once)
            timeout_s, stream = asked.timeout_s, asked.stream
        del asked  # its media, while the caller waits
    if stream:
        events = sent(here, record)
        kept = events if at_once or idempotency_key else unless_hung_up(here, record, events)
        return EventSourceResponse(kept, headers={"Location": f"/v1/jobs/{record.id}", **HEADERS})
    if not at_once:
        wait_s = default_wait_s(here.settings) if timeout_s is None else timeout_s
        wait = (
            here.jobs.wait(record, wait_s)
            if idempotency_key
            else waited_for(request, here, record, wait_s, findable=True)
        )
        try:
            record = await wait
        except StoppedWaitingError as stopped:
            record = stopped.record
    if record.state.terminal:
        return JSONResponse(record.outcome())
    headers = {"Location": f"/v1/jobs/{record.id}", "Retry-After": str(POLL_AFTER_S)}
    if at_once:
        headers["Preference-Applied"] = "respond-async"
    return JSONResponse(_view(record, here), status_code=202, headers=headers)


@router.get(
    "/v1/jobs/{job_id}",
    summary="State and result of a job",
    response_model=JobView,
    responses=problems(401, 404, 503),
)
async def read_job(job_id: str, here: Here, caller: CallerHere) -> JSONResponse:
    """200 for every known job, also a failed one, with its problem. Known for 24 h after its end."""
    return JSONResponse(_view(await here.jobs.known(job_id, caller.owner), here))


@router.delete(
    "/v1/jobs/{job_id}",
    summary="Cancel a job",
    response_model=JobView,
    responses=problems(401, 404, 503),
)
async def cancel_job(job_id: str, here: Here, caller: CallerHere) -> JSONResponse:
    """The job as it stands then: canceled, also while it is being answered, or as it had ended before."""
    record = await here.jobs.known(job_id, caller.owner)
    return JSONResponse(_view(await here.jobs.cancel(record), here))


async def accept(
    request: Request, here: Context, caller: Caller, asked: AnswerRequest, *, key: str | None, followed: bool
) -> JobRecord:
    """The accepted job, or the one that the idempotency `key` stands for.

    followed: somebody may read its events, though not over this connection.
    """
    _check_limits(asked, here.settings)
    async with here.media.intake(asked, caller) as intakes:
        job = _job(
            _lowered(asked, here.settings),
            intakes,
            here.settings,
            request.state.request_id,
            stream=asked.stream or followed,
        )
        same = _fingerprint(request.url.path, asked, intakes)
        async with here.idempotency.once(caller.owner, key, same, job.id) as existing:
            if existing is not None:
                return await here.jobs.known(existing, caller.owner)
            return await _enter(job, intakes, here, caller, key)


async def _enter(
    job: AnswerJob, intakes: tuple[Intake, ...], here: Context, caller: Caller, key: str | None
) -> JobRecord:
    """Puts `job` into its model's queue if there is a worker and a place; only then its media are stored."""
    await here.workers.expect(job.model)
    async with here.admission.admit(job.model):
        await here.media.keep(intakes, caller)
        await here.idempotency.hold(caller.owner, key, job.id)
        with here.tracing.sending(job) if here.tracing else nullcontext(job) as traced:
            return await here.jobs.submit(traced, caller.owner)


def _fingerprint(route: str, asked: AnswerRequest, intakes: tuple[Intake, ...]) -> str:
    """What makes two requests the same: route, fields, and the bytes of the media however they came."""
    fields = asked.model_dump_json(exclude={"image", "images", "video"})
    kind = "images" if asked.images is not None else "one"
    media = (f"{intake.ref.modality} {intake.ref.id}" for intake in intakes)
    return hashlib.sha256("\0".join((route, fields, kind, *media)).encode()).hexdigest()


def _check_limits(asked: AnswerRequest, settings: ServiceSettings) -> None:
    """What the operator may set, of what was sent; the contract's own ranges are checked already."""
    tokens_sent = "max_new_tokens" in asked.model_fields_set
    frames_sent = asked.video is not None and "num_frames" in asked.sampling.model_fields_set
    for field, value, limit in (
        ("questions", len(asked.all_questions), settings.max_questions),
        ("max_new_tokens", asked.max_new_tokens if tokens_sent else None, settings.max_new_tokens),
        (
            "sampling.num_frames",
            asked.sampling.num_frames if frames_sent else None,
            settings.max_sampled_frames,
        ),
        ("timeout_s", asked.timeout_s, settings.max_timeout_s),
        ("deadline_s", asked.deadline_s, settings.max_deadline_s),
    ):
        if value is not None and value > limit:
            raise InvalidRequestError(f"{field}: at most {limit:g} here")


def _lowered(asked: AnswerRequest, settings: ServiceSettings) -> AnswerRequest:
    """With what was not sent within the operator's limits, which may lie below a default."""
    frames = min(asked.sampling.num_frames, settings.max_sampled_frames)
    return asked.model_copy(
        update={
            "max_new_tokens": min(asked.max_new_tokens, settings.max_new_tokens),
            "sampling": asked.sampling.model_copy(update={"num_frames": frames}),
        }
    )


def default_wait_s(settings: ServiceSettings) -> float:
    """How long a call waits that does not say."""
    return min(settings.timeout_s, settings.max_timeout_s)


def _preferences(lines: tuple[str, ...]) -> set[str]:
    """The names of the preferences of all `Prefer` lines, without their parameters (RFC 7240, section 2)."""
    return {each.partition(";")[0].strip().lower() for line in lines for each in line.split(",")}


def _job(
    asked: AnswerRequest,
    intakes: tuple[Intake, ...],
    settings: ServiceSettings,
    request_id: str,
    *,
    stream: bool,
) -> AnswerJob:
    now = time.time()
    deadline_s = settings.deadline_s if asked.deadline_s is None else asked.deadline_s
    return AnswerJob(
        id=new_id("job"),
        request_id=request_id,
        model=settings.model if asked.model is None else asked.model,
        questions=asked.all_questions,
        several=asked.questions is not None,
        media=tuple(intake.ref for intake in intakes),
        token_budget=asked.token_budget,
        keep_ratio=asked.keep_ratio,
        method=asked.method,
        prism=asked.prism,
        generation=asked.generation,
        sampling=asked.sampling,
        include=asked.include,
        stream=stream,
        created_at=now,
        deadline_at=now + min(deadline_s, settings.max_deadline_s),
    )


def _view(record: JobRecord, here: Context) -> dict[str, Any]:
    """`JobView` as JSON."""
    error = record.error and problem_details(record.error, here.settings.problem_base_url, record.request_id)
    return {
        "id": record.id,
        "state": record.state,
        "created_at": record.created_at,
        "started_at": record.started_at,
        "finished_at": record.finished_at,
        "attempts": record.attempts,
        "result": record.result,
        "error": error,
    }

"""The questions' and jobs' routes: admit, hand over, wait, show."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Header
from starlette.requests import Request  # noqa: TC002 (fastapi reads the annotations at run time)
from starlette.responses import JSONResponse

from service.body import answer_request
from service.context import Here  # noqa: TC001 (fastapi reads the annotations at run time)
from service.errors import InvalidRequestError, UnknownJobError, UnsupportedError, problem_details
from service.ids import is_id, new_id
from service.keys import CallerHere  # noqa: TC001 (fastapi reads the annotations at run time)
from service.openapi import answer_body, problems
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


@router.post(
    "/v1/answer",
    summary="Ask about an image, several images or a video",
    response_model=AnswerResult,
    responses={
        202: {"model": JobView, "description": "Accepted; poll the `Location`."},
        **problems(400, 401, 404, 408, 409, 413, 415, 422, 429, 503, 504),
    },
    openapi_extra={"requestBody": answer_body()},
)
async def answer(
    request: Request,
    here: Here,
    caller: CallerHere,
    prefer: Annotated[str, Header()] = "",
    idempotency_key: Annotated[
        str | None, Header(description="The same key, fields and media: the same job, for 24 h.")
    ] = None,
) -> JSONResponse:
    """Waits for the answer, at most `timeout_s`; then, or at once with `Prefer: respond-async`, 202."""
    at_once = "respond-async" in {each.strip().lower() for each in prefer.split(",")}
    with here.metrics.counting_rejections():
        record, timeout_s = await _accept(request, here, caller, idempotency_key)
    record = await here.jobs.wait(record, 0 if at_once else timeout_s)
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
    return JSONResponse(_view(await _known(job_id, here, caller), here))


async def _known(job_id: str, here: Context, caller: Caller) -> JobRecord:
    """The caller's own job. Raises `UnknownJobError`, for another's too."""
    record = await here.jobs.read(job_id) if is_id("job", job_id) else None
    if record is None or record.owner != caller.owner:
        raise UnknownJobError("There is no job of this id, or its 24 hours are over.")
    return record


async def _accept(
    request: Request, here: Context, caller: Caller, key: str | None
) -> tuple[JobRecord, float]:
    """The accepted job, or the one that `key` stands for, and how long the caller waits for it.

    The request's body is out of memory when this returns: many callers wait for long.
    """
    async with answer_request(request) as asked:
        _check_limits(asked, here.settings)
        async with here.media.intake(asked, caller) as intakes:
            job = _job(asked, intakes, here.settings, request.state.request_id)
            same = _fingerprint(request.url.path, asked, intakes)
            async with here.idempotency.once(caller.owner, key, same, job.id) as existing:
                if existing is not None:
                    record = await _known(existing, here, caller)
                else:
                    record = await _enter(job, intakes, here, caller)
        return record, here.settings.timeout_s if asked.timeout_s is None else asked.timeout_s


async def _enter(job: AnswerJob, intakes: tuple[Intake, ...], here: Context, caller: Caller) -> JobRecord:
    """Puts `job` into its model's queue if there is a worker and a place; only then its media are stored."""
    await here.workers.expect(job.model)
    async with here.admission.admit(job.model):
        await here.media.keep(intakes, caller)
        return await here.jobs.submit(job, caller.owner)


def _fingerprint(route: str, asked: AnswerRequest, intakes: tuple[Intake, ...]) -> str:
    """What makes two requests the same: route, fields, and the bytes of the media however they came."""
    fields = asked.model_dump_json(exclude={"image", "images", "video"})
    kind = "images" if asked.images is not None else "one"
    media = (f"{intake.ref.modality} {intake.ref.id}" for intake in intakes)
    return hashlib.sha256("\0".join((route, fields, kind, *media)).encode()).hexdigest()


def _check_limits(asked: AnswerRequest, settings: ServiceSettings) -> None:
    """What the operator may set; the contract's own ranges are checked already."""
    if asked.stream:
        raise UnsupportedError("stream: server-sent events are not served yet; leave it out or send false.")
    for field, value, limit in (
        ("questions", len(asked.all_questions), settings.max_questions),
        ("max_new_tokens", asked.max_new_tokens, settings.max_new_tokens),
        ("sampling.num_frames", asked.sampling.num_frames, settings.max_sampled_frames),
        ("timeout_s", asked.timeout_s or 0, settings.max_timeout_s),
        ("deadline_s", asked.deadline_s or 0, settings.max_deadline_s),
    ):
        if value > limit:
            raise InvalidRequestError(f"{field}: at most {limit:g} here")


def _job(
    asked: AnswerRequest, intakes: tuple[Intake, ...], settings: ServiceSettings, request_id: str
) -> AnswerJob:
    now = time.time()
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
        created_at=now,
        deadline_at=now + (settings.deadline_s if asked.deadline_s is None else asked.deadline_s),
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

"""`POST /v1/chat/completions`: OpenAI's shapes around the same job, so that their clients work unchanged."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from pydantic import BaseModel, ValidationError
from starlette.requests import Request  # noqa: TC002 (fastapi reads the annotations at run time)
from starlette.responses import JSONResponse, Response

from service.answer import IdempotencyKey, accept, default_wait_s
from service.body import from_json, refusal
from service.context import Here  # noqa: TC001 (fastapi reads the annotations at run time)
from service.errors import DeadlineError, ServiceError, openai_error
from service.events import HEADERS, unless_hung_up, waited_for
from service.examples import chat_examples
from service.keys import CallerHere  # noqa: TC001 (fastapi reads the annotations at run time)
from service.openapi import openai_problems
from service.schemas import ChatRequest, OpenAIError
from worker.contract import EventName, JobState, Memory, Problem, Timings, Usage, VisualTokens

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from service.context import Context
    from service.jobs import JobRecord

router = APIRouter(tags=["openai"])
DONE = format_sse_event(data_str="[DONE]")
SAID_OTHERWISE = Problem(
    slug="answer-changed",
    status=503,
    title="Answer changed",
    detail="The worker was lost while it answered, and the next one's answer began otherwise; ask again.",
)
"""Only where the temperature is not 0: what was sent cannot be taken back."""


_OWN_NAMES = re.compile(r"(?:^|(?<=; ))(?:max_new_tokens|question|system|images?|images\.\d+|video)(?=[.:])")
"""Fields of the `AnswerRequest` that a chat becomes, where an error names them and its caller sent others."""


class Reply(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(BaseModel):
    """The one answer."""

    index: Literal[0]
    message: Reply
    logprobs: None
    finish_reason: str


class Pruning(BaseModel):
    """What was kept of the media, and what it cost; of a plain answer the fields of the same names."""

    visual_tokens: VisualTokens
    timings: Timings
    memory: Memory
    warnings: tuple[str, ...]


class ChatCompletion(BaseModel):
    """OpenAI's reply, with `prismprune` beside."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: tuple[Choice]
    usage: Usage
    prismprune: Pruning


_STREAM = {
    "text/event-stream": {
        "schema": {"type": "object", "properties": {"data": {"type": "string"}}},  # of one event
        "example": 'data: {"object": "chat.completion.chunk", "choices": [...]}\n\ndata: [DONE]\n\n',
    }
}


@router.post(
    "/v1/chat/completions",
    summary="As OpenAI's clients ask, with token_budget beside",
    response_model=ChatCompletion,
    responses={
        200: {"content": _STREAM, "description": "The answer; with `stream`, its text as it comes."},
        **openai_problems(400, 401, 404, 408, 409, 413, 415, 422, 429, 500, 503, 504, 507),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"$ref": "#/components/schemas/ChatRequest"},
                    "examples": chat_examples(),
                }
            },
        }
    },
)
async def complete(
    request: Request, here: Here, caller: CallerHere, idempotency_key: IdempotencyKey = None
) -> Response:
    """An answer, or with `stream` its text as it comes; `prismprune` says what was kept and what it cost.

    A caller who hangs up cancels the job, unless it sent an `Idempotency-Key`.
    """
    chat = None
    try:
        with here.metrics.counting_rejections():
            chat, data_uris = await from_json(request, ChatRequest)
            try:
                asked = chat.asked().with_media(data_uris)
            except ValidationError as error:
                raise refusal(error) from None
            record = await accept(request, here, caller, asked, key=idempotency_key, followed=False)
    except ServiceError as error:
        return _refused(error, chat)
    del asked, data_uris  # its media, while the caller waits
    if chat.stream:
        chunks = _chunks(here, record, chat)
        kept = chunks if idempotency_key else unless_hung_up(here, record, chunks)
        return EventSourceResponse(kept, headers=HEADERS)
    wait_s = default_wait_s(here.settings)
    wait = here.jobs.wait(record, wait_s) if idempotency_key else waited_for(request, here, record, wait_s)
    record = await wait
    if not record.state.terminal:
        record = await here.jobs.cancel(record)  # its end may have come before that
        if record.state is JobState.CANCELED or not record.state.terminal:
            raise DeadlineError(f"No answer within {wait_s:g} s; the job was canceled.")
    return JSONResponse(_completion(record, record.outcome(), chat.model))


def _refused(error: ServiceError, chat: ChatRequest | None) -> JSONResponse:
    """`error` in the words of the request, with the field at fault, which its message begins with."""
    told = OpenAIError.model_validate(openai_error(error))
    if chat is not None:
        tokens = "max_tokens" if chat.max_completion_tokens is None else "max_completion_tokens"
        told.error.message = _OWN_NAMES.sub(
            lambda found: tokens if found[0] == "max_new_tokens" else "messages", told.error.message
        )
    name = re.match(r"[a-z_]+(?=[.:])", told.error.message)
    told.error.param = name[0] if name and name[0] in ChatRequest.model_fields else None
    return JSONResponse(told.model_dump(), status_code=error.status, headers=error.headers)


def _completion(record: JobRecord, result: dict[str, Any], model: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": result["answer"], "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": result["finish_reason"]}
    return _head(record, model, "chat.completion") | {
        "choices": [choice],
        "usage": result["usage"],
        "prismprune": _own(result),
    }


def _head(record: JobRecord, model: str, kind: str) -> dict[str, Any]:
    return {"id": record.id, "object": kind, "created": int(record.created_at), "model": model}


def _own(result: dict[str, Any]) -> dict[str, Any]:
    return {name: result[name] for name in ("visual_tokens", "timings", "memory", "warnings")}


async def _chunks(here: Context, record: JobRecord, chat: ChatRequest) -> AsyncGenerator[bytes, None]:
    """The answer as OpenAI streams it. A job that runs again says the same words: new ones are sent on."""
    head = _head(record, chat.model, "chat.completion.chunk")
    yield _event(_chunk(head, {"role": "assistant", "content": ""}))
    said = heard = ""
    async for event in here.jobs.follow(record):
        if event is None:
            yield KEEPALIVE_COMMENT
        elif event.name is EventName.STARTED:
            heard = ""
        elif event.name is EventName.TOKEN:
            heard += event.data["text"]
            if heard.startswith(said) and heard != said:
                yield _event(_chunk(head, {"content": heard[len(said) :]}))
                said = heard
        elif event.ends:
            for piece in _ending(await here.jobs.ended(record), head, chat, said):
                yield _event(piece)
    yield DONE


def _ending(ended: JobRecord, head: dict[str, Any], chat: ChatRequest, said: str) -> Iterator[dict[str, Any]]:
    """What is left of the text, why it ended, and the usage if it was asked for; or the error."""
    result, problem = ended.result, ended.error
    if result is None or not result["answer"].startswith(said):
        yield openai_error(SAID_OTHERWISE if problem is None else problem)
        return
    if rest := result["answer"][len(said) :]:
        yield _chunk(head, {"content": rest})
    yield _chunk(head, {}, result["finish_reason"]) | {"prismprune": _own(result)}
    if chat.stream_options is not None and chat.stream_options.include_usage:
        yield head | {"choices": [], "usage": result["usage"]}


def _chunk(head: dict[str, Any], delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return head | {"choices": [choice]}


def _event(content: dict[str, Any]) -> bytes:
    return format_sse_event(data_str=json.dumps(content))

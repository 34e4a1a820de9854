"""From a request's body, JSON or multipart, to an `AnswerRequest` or an error that names the field."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from email.message import Message
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.formparsers import MultiPartException, MultiPartParser

from service.errors import (
    BodyTooLargeError,
    InvalidBudgetError,
    InvalidRequestError,
    MalformedBodyError,
    ServiceError,
    UnknownMethodError,
    UnsupportedMediaError,
)
from service.long_texts import taken_out
from service.media import room_on_disk
from service.schemas import MAX_TEXT, TAGS, AnswerRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from pydantic_core import ErrorDetails
    from starlette.datastructures import FormData, UploadFile
    from starlette.requests import Request

    from service.long_texts import DataUri

M = TypeVar("M", bound=BaseModel)
MULTIPART = "multipart/form-data"
MAX_PARTS = 64
"""More files or fields than any valid request has: the parser gives up there."""
MAX_COMMAS = 1 << 17
"""In a JSON body, texts included: its parser takes a microsecond or two a value, and the loop waits."""
MAX_QUOTES = 1 << 18
"""Likewise; a text has two, and so many steps it costs to find the data URIs among the others."""
MAX_PARSED = 4096
"""Characters of a form's field that is parsed as JSON: ample for `prism` and `sampling`, and soon parsed."""
CHARSETS = (b"utf-8", b"utf8", b"us-ascii", b"iso-8859-1")
"""Of a form's text. Any of Python's other codecs could be named; to decode `punycode` takes 16 s a MiB."""
_LISTS = ("questions", "images", "stop", "include")
_TEXTS = ("model", "question", "questions", "method", "system", "stop", "include", "image", "images", "video")
_NAMED_ERRORS: dict[str, type[InvalidRequestError]] = {
    "token_budget": InvalidBudgetError,
    "keep_ratio": InvalidBudgetError,
    "method": UnknownMethodError,
}


def content_type(header: str | None) -> str:
    """The media type of a Content-Type header in lower case, without its parameters."""
    message = Message()
    message["content-type"] = header or "application/octet-stream"
    return message.get_content_type()


@asynccontextmanager
async def answer_request(request: Request) -> AsyncIterator[AnswerRequest]:
    """The validated body. Uploaded files stay open, and the body in memory, until the context ends."""
    kind = content_type(request.headers.get("content-type"))
    if kind == MULTIPART:
        async with form(request) as fields:
            yield _from_form(fields)
    elif _is_json(kind):
        asked, data_uris = await from_json(request, AnswerRequest)
        yield asked.with_media(data_uris)
    else:
        raise UnsupportedMediaError("Send the body as application/json or multipart/form-data.")


def _is_json(kind: str) -> bool:
    return kind == "application/json" or kind.endswith("+json")


async def from_json(request: Request, model: type[M]) -> tuple[M, dict[str, DataUri]]:
    """The validated body, and what the stand-ins of its long data URIs stand for.

    Raises `UnsupportedMediaError` for a body that is declared as anything but JSON, and `BodyTooLargeError`
    for one of so many values that to parse it would take seconds.
    """
    if not _is_json(content_type(request.headers.get("content-type"))):
        raise UnsupportedMediaError("Send the body as application/json.")
    try:
        rest, data_uris = taken_out(await _read(request), MAX_TEXT + 1)  # so that no other text may be one
        return model.model_validate_json(rest), data_uris
    except ValidationError as error:
        raise refusal(error) from None


async def _read(request: Request) -> bytearray:
    """The bytes of the body; `request.body()` would keep them for as long as the caller waits."""
    body, commas, quotes = bytearray(), 0, 0
    async for chunk in request.stream():
        body += chunk
        commas += chunk.count(b",")
        quotes += chunk.count(b'"')
        if commas > MAX_COMMAS or quotes > MAX_QUOTES:
            raise BodyTooLargeError(
                f"A JSON body may have at most {MAX_COMMAS} commas and {MAX_QUOTES} quotation marks."
            )
    return body


class _Parser(MultiPartParser):
    """Knows whether the closing boundary came: without it the last part is left out, and nothing says so."""

    ended = False

    def on_end(self) -> None:
        self.ended = True


@asynccontextmanager
async def form(request: Request) -> AsyncIterator[FormData]:
    """The parts of a multipart body; its files are open until the context ends."""
    _, parameters = parse_options_header(request.headers["content-type"])
    if parameters.get(b"charset", CHARSETS[0]).lower() not in CHARSETS:
        raise MalformedBodyError(f"The charset of {MULTIPART} may be {b', '.join(CHARSETS).decode()}.")
    parser = _Parser(request.headers, request.stream(), max_files=MAX_PARTS, max_fields=MAX_PARTS)
    try:
        with room_on_disk():
            parts = await parser.parse()
    except MultiPartException:
        raise MalformedBodyError(
            f"The body is not valid {MULTIPART}, has more than {MAX_PARTS} parts, or a text field over 1 MiB."
        ) from None
    try:
        if not parser.ended:
            raise MalformedBodyError(f"The body is not valid {MULTIPART}: its closing boundary is missing.")
        yield parts
    finally:
        await parts.close()


def _from_form(form: FormData) -> AnswerRequest:
    fields: dict[str, Any] = {}
    for name in form:
        values = tuple(_form_value(name, value) for value in form.getlist(name) if value != "")
        if name == "image" and len(values) > 1:
            fields["images"] = values + fields.get("images", ())
        elif name in _LISTS:
            fields[name] = fields.get(name, ()) + values
        elif len(values) > 1:
            raise InvalidRequestError(f"{name[:64]}: is given more than once")
        elif values:
            fields[name] = values[0]
    try:
        return AnswerRequest.model_validate(fields)
    except ValidationError as error:
        raise refusal(error) from None


def _form_value(name: str, value: str | UploadFile) -> Any:
    """Text as it stands; a number, true, null or an object from its JSON; else, as with "all", the text.

    Text that no field can want is left for validation to refuse: the loop waits while JSON is parsed.
    """
    if name in _TEXTS or not isinstance(value, str):
        return value
    if name not in AnswerRequest.model_fields or len(value) > MAX_PARSED:
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def refusal(error: ValidationError) -> ServiceError:
    """The error that names the fields at fault."""
    found = error.errors(include_url=False, include_input=False)
    wrong = {detail["loc"] for detail in found}
    details = [each for each in found if each["type"] != "too_short" or not _has_below(wrong, each["loc"])]
    first = details[0]
    if first["type"] == "json_invalid":
        return MalformedBodyError(f"The body is not valid JSON: {first['ctx']['error']}.")
    name = str(first["loc"][0]) if first["loc"] else first["type"]
    return _NAMED_ERRORS.get(name, InvalidRequestError)("; ".join(map(_readable, details[:3])))


def _has_below(wrong: Iterable[tuple[int | str, ...]], place: tuple[int | str, ...]) -> bool:
    """Whether an item of the list at `place` is wrong; pydantic then finds the list too short as well."""
    return any(len(each) > len(place) and each[: len(place)] == place for each in wrong)


def _readable(detail: ErrorDetails) -> str:
    """`sampling.num_frames: Input should be ...`."""
    message = "is not a known field" if detail["type"] == "extra_forbidden" else detail["msg"]
    if detail["type"] in ("too_short", "too_long"):
        message = message.replace("Tuple", "List").replace(" after validation", "")
    path = ".".join(str(part)[:64] for part in detail["loc"] if part not in TAGS)
    return f"{path}: {message}" if path else message

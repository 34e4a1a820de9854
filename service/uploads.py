"""`POST /v1/media`: upload once, ask often."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import IO, TYPE_CHECKING, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import UploadFile
from starlette.requests import Request  # noqa: TC002 (fastapi reads the annotations at run time)

from service.body import MULTIPART, content_type, form
from service.context import Here  # noqa: TC001 (fastapi reads the annotations at run time)
from service.errors import InvalidRequestError
from service.keys import CallerHere  # noqa: TC001 (fastapi reads the annotations at run time)
from service.media import spool, spooled_file
from service.openapi import problems

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from service.context import Context
    from service.media import Upload

router = APIRouter(tags=["media"])

_BINARY = {"type": "string", "format": "binary"}
_BODY = {
    "required": True,
    "content": {
        MULTIPART: {"schema": {"type": "object", "properties": {"file": _BINARY}, "required": ["file"]}},
        "application/octet-stream": {"schema": _BINARY},
    },
}


class StoredMedia(BaseModel):
    """Media that questions may name by `id`. `expires_at` is Unix time, put off by every use."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    """The SHA-256 of the bytes: `{"id": "..."}` in a question."""
    media_type: str
    """What the bytes are, whatever was declared."""
    bytes: int
    """The file's size."""
    width: int | None
    """In pixels, upright; of a video null until a worker has decoded it."""
    height: int | None
    """As `width`."""
    frames: int | None
    """As `width`; 1 for a picture."""
    expires_at: float
    """When they go unless they are used before, in Unix seconds."""


@router.post(
    "/v1/media",
    summary="Upload a picture or a video once, to ask about it by id",
    response_model=StoredMedia,
    responses=problems(400, 401, 408, 413, 415, 422, 429, 503),
    openapi_extra={"requestBody": _BODY},
)
async def upload(request: Request, here: Here, caller: CallerHere) -> Upload:
    """The file itself as the body, whatever its Content-Type says, or one file part of multipart/form-data.

    The id is the SHA-256 of the bytes: the same file again is the same media. A video's `width`, `height` and
    `frames` are null until a worker has decoded it.
    """
    with here.metrics.counting_rejections():
        await here.shelf.reachable()
        async with _file(request, here) as file:
            return await here.media.upload(file, caller)


@asynccontextmanager
async def _file(request: Request, here: Context) -> AsyncIterator[IO[bytes]]:
    """The uploaded file, on disk once it is larger than a mebibyte; closed when the context ends."""
    if content_type(request.headers.get("content-type")) == MULTIPART:
        async with form(request) as fields:
            yield _only_file([value for name in fields for value in fields.getlist(name)])
    else:
        with spooled_file() as file:
            await spool(request.stream(), file, here.media.upload_limit)
            yield file


def _only_file(values: list[Any]) -> IO[bytes]:
    if len(values) != 1 or not isinstance(values[0], UploadFile):
        raise InvalidRequestError("file: send exactly one part, a file")
    return values[0].file

"""What a person with a browser opens: the playground at `/`, and `/docs`.

Neither holds data or asks for a key.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastapi_offline
from fastapi import APIRouter
from starlette.requests import Request  # noqa: TC002 (fastapi reads the annotations at run time)
from starlette.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles

from service import openapi

if TYPE_CHECKING:
    from collections.abc import Mapping

router = APIRouter(include_in_schema=False)

PATHS = frozenset(("/", "/docs", "/openapi.json"))
BELOW = ("/playground/", "/docs/static/")
"""What the paths of their files begin with."""
_READ = ["GET", "HEAD"]
_FRESH = {
    "Cache-Control": "no-cache",  # after an update no page meets another version's script
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_ALONE = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'; "
)
PLAYGROUND_POLICY = _ALONE + "style-src 'self'; img-src 'self' blob:; media-src blob:"
DOCS_POLICY = _ALONE + "style-src 'self' 'unsafe-inline'; img-src 'self' data:"
"""Swagger UI writes styles into its elements, and has its icons as data URIs."""


class _Files(StaticFiles):
    """One directory's files, which a browser asks for again, and gets 304 as long as they are the same."""

    def __init__(self, directory: Path, headers: Mapping[str, str] = {}) -> None:
        super().__init__(directory=directory)
        self._headers = {**_FRESH, **headers}

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(self._headers)
        return response


_OWN = Path(__file__).with_name("playground")
_PLAYGROUND = _Files(_OWN, {"Content-Security-Policy": PLAYGROUND_POLICY})
_DOCS = _Files(_OWN, {"Content-Security-Policy": DOCS_POLICY})
_STATIC = _Files(_OWN / "static")
_SWAGGER = _Files(Path(fastapi_offline.__file__).with_name("static"))


@router.api_route("/", methods=_READ)
async def playground(request: Request) -> Response:
    return await _PLAYGROUND.get_response("index.html", request.scope)


@router.api_route("/playground/{name}", methods=_READ)
async def playground_file(request: Request, name: str) -> Response:
    return await _STATIC.get_response(name, request.scope)


@router.api_route("/docs", methods=_READ)
async def docs(request: Request) -> Response:
    return await _DOCS.get_response("docs.html", request.scope)


@router.api_route("/docs/static/{name}", methods=_READ)
async def docs_file(request: Request, name: str) -> Response:
    return await _SWAGGER.get_response(name, request.scope)


@router.api_route("/openapi.json", methods=_READ)
async def openapi_document(request: Request) -> JSONResponse:
    """Its description has a command to paste, for the address that it was asked for at."""
    document = request.app.openapi()
    document["info"]["description"] = openapi.description(
        str(request.base_url).rstrip("/"), guarded="security" in document
    )
    if root := request.scope.get("root_path"):
        document["servers"] = [{"url": root}]
    return JSONResponse(document, headers=_FRESH)

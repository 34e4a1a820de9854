"""What surrounds every request: its id, its time, the limit of its body. Plain ASGI: nothing is buffered."""

from __future__ import annotations

import logging
import re
import time
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

from service.body import MULTIPART, content_type
from service.errors import BodyTooLargeError
from service.ids import new_id

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from service.metrics import Metrics
    from service.settings import ServiceSettings

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:+/=-]{1,128}")
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


class RequestId:
    """Takes a caller's `X-Request-Id` if it is harmless in logs, else draws one; sends it back."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else new_id("req")
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class HttpMetrics:
    """Observes each request under its route's template, so that ids in paths make no new series; logs it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, start = 500, time.perf_counter()  # what an exception on its way out becomes

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noting_status)
        finally:
            seconds = time.perf_counter() - start
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.http_seconds.labels(route, method, str(status)).observe(seconds)
            logger.info(
                "%s %s %d %.1f ms request_id=%s",
                method,
                route,
                status,
                seconds * 1000,
                scope["state"]["request_id"],
            )


class BodyLimit:
    """Refuses a body over the limit of its content type when it is read, by its declared size or its bytes.

    Reading raises `BodyTooLargeError`, which becomes a problem like every other error of the route.
    """

    def __init__(self, app: ASGIApp, settings: ServiceSettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limit, taken = self._limit(headers), 0
        declared = headers.get("content-length", "")
        too_large = declared.isdecimal() and int(declared[:20]) > limit

        async def receive_within_limit() -> Message:
            nonlocal taken
            message = {} if too_large else await receive()
            taken += len(message.get("body", b""))
            if too_large or taken > limit:
                raise BodyTooLargeError(f"The body may have at most {limit} bytes.")
            return message

        await self._app(scope, receive_within_limit, send)

    def _limit(self, headers: Headers) -> int:
        multipart = content_type(headers.get("content-type")) == MULTIPART
        return self._settings.max_multipart_bytes if multipart else self._settings.max_json_bytes

"""What surrounds every request: its id, its time, who sends it, the limits of its body.

Plain ASGI: nothing is buffered.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request

from service.body import MULTIPART, content_type
from service.errors import (
    BodyTooLargeError,
    ServerStoppingError,
    ServiceError,
    SlowBodyError,
    UnauthorizedError,
    error_response,
)
from service.ids import new_id
from service.keys import WHY_NOT, ApiKeys, may_listen
from service.pages import BELOW, PATHS
from worker.logs import REQUEST_ID, without_content

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from service.context import Context
    from service.metrics import Metrics
    from service.settings import ServiceSettings

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:+/=-]{1,128}")
OPEN = frozenset(("/livez", "/readyz")) | PATHS
"""Paths that need no key: probes have none, and a browser sends one only from a page that it has."""
UPLOAD = "/v1/media"
FORMS = "/v1/answer"
"""Takes multipart besides JSON; that type is refused elsewhere, and lifts no limit there."""
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


def is_open(path: str) -> bool:
    return path in OPEN or path.startswith(BELOW)


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
        REQUEST_ID.set(request_id)

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
            logger.info("%s %s %d %.1f ms", method, route, status, seconds * 1000)


class Failures:
    """Answers what the layers below raise; what nobody raised on purpose is logged, and goes no further.

    The framework's own last resort would raise it again, for the server to log its message, which may quote
    a question.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_noting_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_noting_start)
        except asyncio.CancelledError:  # by the server alone, at the end of its grace
            if started:
                raise
            stopping = ServerStoppingError(
                "The server stops; ask again, with the same Idempotency-Key if any."
            )
            await error_response(Request(scope), stopping)(scope, receive, send)
        except Exception as error:  # noqa: BLE001 - the one place that no error passes
            if not isinstance(error, ServiceError):
                told = without_content(error)
                logger.error("request %s failed: %s", scope["state"]["request_id"], told)  # noqa: TRY400 - see above
            if not started:
                await error_response(Request(scope), error)(scope, receive, send)


class KeyGuard:
    """Lets nobody in whose key is not known, but to probes and pages, and nobody who posts too often.

    Without keys it serves whoever has reached a loopback address: `python -m service` listens on no other
    unless told to, and this holds for other ways to start the application as well.
    """

    def __init__(self, app: ASGIApp, settings: ServiceSettings) -> None:
        self._app = app
        self._settings = settings
        self._keys = ApiKeys(settings.key_lines)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_open(scope["path"]):
            if not self._keys and not self._may_answer(scope):
                raise UnauthorizedError(WHY_NOT)
            caller = self._keys.caller(Headers(scope=scope).get("authorization", ""))
            scope["state"]["caller"] = caller
            if scope["method"] == "POST":  # what makes work; to ask how far it is costs next to nothing
                here: Context = scope["app"].state.context
                with here.metrics.counting_rejections():
                    await here.rates.spend(caller)
        await self._app(scope, receive, send)

    def _may_answer(self, scope: Scope) -> bool:
        """Judged by the address that the connection came in at; a unix socket has none, and no port."""
        host, port = scope.get("server") or ("", 0)
        return port is None or may_listen(self._settings, host)


class BodyLimit:
    """Refuses a body over the limit of its content type when it is read, by its declared size or its bytes.

    Reading raises `BodyTooLargeError`, or `SlowBodyError` for one that drips in for too long, which become
    problems like every other error of the route.
    """

    def __init__(self, app: ASGIApp, settings: ServiceSettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limit, taken, complete = self._limit(scope["path"], headers), 0, False
        declared = headers.get("content-length", "")
        too_large = declared.isdecimal() and int(declared[:20]) > limit
        due = asyncio.get_running_loop().time() + self._settings.body_timeout_s

        async def receive_within_limit() -> Message:
            nonlocal taken, complete
            if complete:  # what comes now is the end of the connection, which may take its time
                return await receive()
            message = {} if too_large else await _before(due, receive)
            taken += len(message.get("body", b""))
            if too_large or taken > limit:
                raise BodyTooLargeError(f"The body may have at most {limit} bytes.")
            complete = not message.get("more_body", False)
            return message

        await self._app(scope, receive_within_limit, send)

    def _limit(self, path: str, headers: Headers) -> int:
        form = path == FORMS and content_type(headers.get("content-type")) == MULTIPART
        return self._settings.max_multipart_bytes if form or path == UPLOAD else self._settings.max_json_bytes


async def _before(due: float, receive: Receive) -> Message:
    try:
        async with asyncio.timeout_at(due):
            return await receive()
    except TimeoutError:
        raise SlowBodyError("The body did not come in time.") from None

"""Every error that the front end answers with: one root, and the one place that makes it a response."""

from __future__ import annotations

from http import HTTPMethod, HTTPStatus
from typing import TYPE_CHECKING

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.routing import Match

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response

    from worker.contract import Problem

OPENAI_ROUTES = "/v1/chat/"
"""What the paths begin with whose errors OpenAI's clients read."""
_OPENAI_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ServiceError(Exception):
    """Something that a caller can act on.

    The message becomes the problem's `detail`: no path and no decoder's text belong into it.
    `slug` is stable and ends the problem's `type`; `retry_after_s` becomes the header of that name.
    """

    slug: str = "internal-error"
    status: int = 500
    title: str = "Internal error"
    retry_after_s: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


class UnauthorizedError(ServiceError):
    """No key, or none that is known."""

    slug = "unauthorized"
    status = 401
    title = "Unauthorized"

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class MalformedBodyError(ServiceError):
    """The body cannot be parsed at all."""

    slug = "malformed-body"
    status = 400
    title = "Malformed body"


class InvalidRequestError(ServiceError):
    """A field is missing, unknown or out of range."""

    slug = "invalid-request"
    status = 422
    title = "Invalid request"


class InvalidBudgetError(InvalidRequestError):
    """The token budget is out of range, no budget at all, or given twice."""

    slug = "invalid-budget"
    title = "Invalid token budget"


class UnknownMethodError(InvalidRequestError):
    """No selection method of that name."""

    slug = "unknown-method"
    title = "Unknown method"


class UrlNotAllowedError(ServiceError):
    """Media by URL, from a domain that the operator does not allow."""

    slug = "url-not-allowed"
    status = 422
    title = "URL not allowed"


class UrlNotFetchedError(ServiceError):
    """An allowed URL did not give media. Why is not told: the server is no means to look at its network."""

    slug = "url-not-fetched"
    status = 422
    title = "URL not fetched"


class UndecodableMediaError(ServiceError):
    """The bytes begin like a known format, but its header cannot be read."""

    slug = "undecodable-media"
    status = 422
    title = "Media cannot be decoded"


class UnsupportedMediaError(ServiceError):
    """A format outside the allowed list, judged by its first bytes."""

    slug = "unsupported-media-type"
    status = 415
    title = "Unsupported media type"


class MediaTooLargeError(ServiceError):
    """Too many bytes or pixels in one file."""

    slug = "media-too-large"
    status = 413
    title = "Media too large"


class BodyTooLargeError(ServiceError):
    """The whole body is over the limit of its content type."""

    slug = "body-too-large"
    status = 413
    title = "Body too large"


class SlowBodyError(ServiceError):
    """The body was not complete in time."""

    slug = "request-timeout"
    status = 408
    title = "Request timeout"


class RateLimitedError(ServiceError):
    """The key has sent more requests than it may."""

    slug = "rate-limited"
    status = 429
    title = "Too many requests"

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"More requests than this key may send; try again in {retry_after_s} s.")
        self.retry_after_s = retry_after_s


class QueueFullError(ServiceError):
    """As many jobs of the model wait as may."""

    slug = "queue-full"
    status = 429
    title = "Queue full"

    def __init__(self, model: str, retry_after_s: int) -> None:
        super().__init__(f"The queue of {model} is full; try again in {retry_after_s} s.")
        self.retry_after_s = retry_after_s


class IdempotencyBusyError(ServiceError):
    """A request with the same `Idempotency-Key` is still being admitted."""

    slug = "idempotency-key-busy"
    status = 409
    title = "Idempotency key in use"
    retry_after_s = 1


class IdempotencyMismatchError(ServiceError):
    """The `Idempotency-Key` was used for another request."""

    slug = "idempotency-key-reused"
    status = 422
    title = "Idempotency key reused"


class UnknownModelError(ServiceError):
    """No worker serves that model."""

    slug = "unknown-model"
    status = 404
    title = "Unknown model"


class UnknownMediaError(ServiceError):
    """No stored media of that id."""

    slug = "unknown-media"
    status = 404
    title = "Unknown media"


class UnknownJobError(ServiceError):
    """No job of that id, or its 24 hours are over."""

    slug = "unknown-job"
    status = 404
    title = "Unknown job"


class DeadlineError(ServiceError):
    """A wait that may not end as 202 has run out."""

    slug = "deadline-exceeded"
    status = 504
    title = "Deadline exceeded"


class CallerGoneError(ServiceError):
    """The caller hung up before the answer: nobody reads this, but logs and metrics count it."""

    slug = "caller-gone"
    status = 499
    title = "Caller gone"


class BrokerAwayError(ServiceError):
    """The broker does not answer."""

    slug = "broker-away"
    status = 503
    title = "Broker away"
    retry_after_s = 2


class BrokerNotDurableError(ServiceError):
    """The broker is not known to keep jobs, and `PRISM_REQUIRE_DURABLE_BROKER` is set."""

    slug = "broker-not-durable"
    status = 503
    title = "Broker not durable"
    retry_after_s = 30


class StoreAwayError(ServiceError):
    """The media store does not take or give media."""

    slug = "media-store-away"
    status = 503
    title = "Media store away"
    retry_after_s = 5


class ServerStoppingError(ServiceError):
    """The server stops, and has no time left for what this request waits for."""

    slug = "server-stopping"
    status = 503
    title = "Server stopping"
    retry_after_s = 5


class NoWorkerError(ServiceError):
    """No worker of the model was seen for longer than the grace period."""

    slug = "no-worker"
    status = 503
    title = "No worker"
    retry_after_s = 30


class JobEndedError(ServiceError):
    """The job that the caller waits for ended without a result, with the problem that this carries."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.slug, self.status, self.title = problem.slug, problem.status, problem.title
        self.retry_after_s = 5 if problem.status in (429, 503) else None


def problem_details(error: ServiceError | Problem, base_url: str, request_id: str) -> dict[str, object]:
    """`error` as the object of RFC 9457 with a `request_id` beside its members."""
    return {
        "type": base_url + error.slug,
        "title": error.title,
        "status": error.status,
        "detail": str(error) if isinstance(error, ServiceError) else error.detail,
        "request_id": request_id,
    }


def install(app: FastAPI, base_url: str) -> None:
    """Makes `app` answer each error as `application/problem+json`, on OpenAI's routes as theirs."""
    app.state.problem_base_url = base_url

    async def answer(request: Request, error: Exception) -> Response:
        return error_response(request, error)

    for kind in (ServiceError, RequestValidationError, ClientDisconnect, HTTPException):
        app.add_exception_handler(kind, answer)


def error_response(request: Request, error: Exception) -> Response:
    """The response to `error`, which need not be one of ours: then it tells nothing but the request's id."""
    if isinstance(error, HTTPException):
        known, headers = _from_status(error.status_code), dict(error.headers or {})
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = ", ".join(_methods(request))
    else:
        known = error if isinstance(error, ServiceError) else _known(error)
        headers = known.headers
    request_id = request.state.request_id
    openai = request.url.path.startswith(OPENAI_ROUTES)
    return JSONResponse(
        openai_error(known)
        if openai
        else problem_details(known, request.app.state.problem_base_url, request_id),
        status_code=known.status,
        headers={**headers, "X-Request-Id": request_id},
        media_type="application/json" if openai else "application/problem+json",
    )


def _methods(request: Request) -> list[str]:
    """Those of every route for the path; the framework names the first route's alone."""
    routes, scope = request.app.routes, request.scope
    return sorted(
        method
        for method in HTTPMethod
        if any(route.matches({**scope, "method": method.value})[0] is Match.FULL for route in routes)
    )


def openai_error(error: ServiceError | Problem) -> dict[str, object]:
    """`error` as OpenAI's clients read it: `code` is the slug, `type` one of the API's few."""
    kind = _OPENAI_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    detail = str(error) if isinstance(error, ServiceError) else error.detail
    return {"error": {"message": detail, "type": kind, "param": None, "code": error.slug}}


def _known(error: Exception) -> ServiceError:
    if isinstance(error, RequestValidationError):  # of a header or a part of the URL: bodies are read by hand
        return InvalidRequestError("A parameter of the request is not valid.")
    if isinstance(error, ClientDisconnect):
        return MalformedBodyError("The connection closed before the body was complete.")
    return ServiceError(
        "The request could not be completed. The server's log has more under the request's id."
    )


def _from_status(status: int) -> ServiceError:
    """What the framework itself refuses: an unknown route, a method that a route does not have."""
    phrase = HTTPStatus(status).phrase
    error = ServiceError(f"{phrase}.")
    error.slug, error.status, error.title = phrase.lower().replace(" ", "-"), status, phrase
    return error

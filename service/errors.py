"""Every error that the front end answers with: one root, and the one place that makes it a response."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import TYPE_CHECKING

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response

    from worker.contract import Problem

logger = logging.getLogger(__name__)


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


class UnsupportedError(ServiceError):
    """Part of the contract, but not of this version."""

    slug = "unsupported"
    status = 422
    title = "Not supported yet"


class UrlNotAllowedError(ServiceError):
    """Media by URL, from a domain that the operator does not allow."""

    slug = "url-not-allowed"
    status = 422
    title = "URL not allowed"


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


class BrokerAwayError(ServiceError):
    """The broker does not answer."""

    slug = "broker-away"
    status = 503
    title = "Broker away"
    retry_after_s = 2


class StoreAwayError(ServiceError):
    """The media store does not take or give media."""

    slug = "media-store-away"
    status = 503
    title = "Media store away"
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
    """Makes `app` answer each error as `application/problem+json`."""

    def respond(request: Request, error: ServiceError, headers: Mapping[str, str]) -> Response:
        request_id = request.state.request_id
        return JSONResponse(
            problem_details(error, base_url, request_id),
            status_code=error.status,
            headers={**headers, "X-Request-Id": request_id},
            media_type="application/problem+json",
        )

    def service_error(request: Request, error: Exception) -> Response:
        known = error if isinstance(error, ServiceError) else _known(error)
        return respond(request, known, known.headers)

    def http_error(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            return service_error(request, error)
        return respond(request, _from_status(error.status_code), error.headers or {})

    def unexpected(request: Request, error: Exception) -> Response:
        logger.error("request %s failed", request.state.request_id, exc_info=error)
        return service_error(request, error)

    app.add_exception_handler(ServiceError, service_error)
    app.add_exception_handler(RequestValidationError, service_error)
    app.add_exception_handler(ClientDisconnect, service_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unexpected)


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

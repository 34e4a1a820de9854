"""Every error this library raises on purpose: one root, each with a stable slug and an HTTP status."""

from __future__ import annotations

from typing import ClassVar


class PrismError(Exception):
    """Something a caller can act on.

    `slug` is stable and ends up in `https://.../problems/<slug>`; `status` is the HTTP status that
    a service should answer with; the message is safe to show to a caller.
    """

    slug: ClassVar[str] = "internal-error"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"


class InvalidBudgetError(PrismError):
    """The token budget is out of range or not a budget at all."""

    slug = "invalid-budget"
    status = 422
    title = "Invalid token budget"


class UnknownMethodError(PrismError):
    """No selection method of that name; the message lists those known."""

    slug = "unknown-method"
    status = 422
    title = "Unknown method"


class InvalidOptionError(PrismError):
    """An option of a method or of the generation is out of range or unknown."""

    slug = "invalid-option"
    status = 422
    title = "Invalid option"


class UndecodableMediaError(PrismError):
    """The bytes are not the picture or video they claim to be."""

    slug = "undecodable-media"
    status = 422
    title = "Media cannot be decoded"


class UnsupportedMediaError(PrismError):
    """A format outside the allowed list."""

    slug = "unsupported-media-type"
    status = 415
    title = "Unsupported media type"


class MediaTooLargeError(PrismError):
    """Too many bytes, pixels, frames or seconds."""

    slug = "media-too-large"
    status = 413
    title = "Media too large"


class UnknownModelError(PrismError):
    """Neither a hub id, a directory nor the embedded demo; or a family that has no adapter."""

    slug = "unknown-model"
    status = 404
    title = "Unknown model"


class PartsUnavailableError(PrismError):
    """A pretrained part of the demo model could not be fetched, or its hash differs from the pinned one."""

    slug = "parts-unavailable"
    status = 503
    title = "Model parts unavailable"


class InvalidScoresError(PrismError):
    """Attention and features that do not belong together, a tower that gave none, or logits that are NaN."""

    slug = "invalid-scores"
    title = "Invalid scores"


def with_cause(error: BaseException) -> str:
    """What `error` says, and the first line of what it came from.

    That alone may tell a wrong path from a broken file.
    """
    cause = error.__cause__
    if cause is None:
        return str(error)
    first = next(iter(str(cause).splitlines()), "")
    return f"{error} ({type(cause).__name__}: {first})"

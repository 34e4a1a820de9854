"""What can go wrong between the queue and the library, and how any error crosses the queue."""

from __future__ import annotations

from prismprune.errors import PrismError
from worker.contract import Problem


class DeadlineExceededError(PrismError):
    """The job's own deadline passed before its answer was complete."""

    slug = "deadline-exceeded"
    status = 504
    title = "Deadline exceeded"


class StoppedError(PrismError):
    """The job was told to stop; the message is the reason's value."""

    slug = "job-canceled"
    status = 409
    title = "Job canceled"


class DeadLetteredError(PrismError):
    """Every attempt at the job ended with its worker."""

    slug = "dead-lettered"
    status = 500
    title = "Job given up"


class OutOfMemoryError(PrismError):
    """The request does not fit into the device's memory, even by itself."""

    slug = "out-of-memory"
    status = 507
    title = "Out of memory"


class MediaNotFoundError(PrismError):
    """The media store no longer holds what the job refers to."""

    slug = "media-not-found"
    status = 404
    title = "Media not found"


class StoreAwayError(PrismError):
    """The media store does not answer, or not this worker."""

    slug = "media-store-away"
    status = 503
    title = "Media store away"


class JobGivenBackError(Exception):
    """The job waits in the queue again; its delivery has to go back there, too."""


def problem(error: Exception) -> Problem:
    """The problem a caller may see; an error that nobody raised on purpose says nothing of itself."""
    if not isinstance(error, PrismError):
        error = PrismError("The worker could not answer this request.")
    return Problem(slug=error.slug, status=error.status, title=error.title, detail=str(error))

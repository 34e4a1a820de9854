"""How a job is told to stop, and how its own thread waits for what another thread does for it."""

from __future__ import annotations

import threading
import time
from enum import Enum
from typing import TYPE_CHECKING, TypeVar

from worker.errors import DeadlineExceededError, StoppedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

T = TypeVar("T")

MEANWHILE_S = 0.02
"""How often a wait looks after its other business: text arrives smoothly, fifty writes a second at most."""


class StopReason(Enum):
    """Why a job stops before its end."""

    CANCELED = "canceled"
    LOST = "lost"
    """Another worker has it, or may have it by now."""
    DRAINING = "draining"
    """This worker leaves."""


class Stop:
    """A request to stop: made once, from any thread; the first reason stays."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reason: StopReason | None = None
        self._listeners: list[Callable[[], object]] = []

    @property
    def reason(self) -> StopReason | None:
        """None as long as nobody asked."""
        return self._reason

    def request(self, reason: StopReason) -> None:
        """Asks; whoever listens is called in this thread."""
        with self._lock:
            if self._reason is not None:
                return
            self._reason = reason
        for listener in self._listeners:
            listener()

    def then(self, listener: Callable[[], object]) -> None:
        """Calls `listener` when somebody asks, or now if that has happened."""
        with self._lock:
            if self._reason is None:
                self._listeners.append(listener)
                return
        listener()


def result_within(
    future: Future[T], stop: Stop, deadline: float, meanwhile: Callable[[], None] | None = None
) -> T:
    """What comes of `future`, unless `stop` or the `deadline` (monotonic) comes first.

    `meanwhile` is called every `MEANWHILE_S`. Raises `StoppedError`, `DeadlineExceededError`, or what the
    future raises.
    """
    over = threading.Event()
    future.add_done_callback(lambda _: over.set())
    stop.then(over.set)
    while (left := deadline - time.monotonic()) > 0:
        if over.wait(min(left, MEANWHILE_S) if meanwhile else left):
            break
        if meanwhile:
            meanwhile()
    if stop.reason is not None:
        raise StoppedError(stop.reason.value)
    if not future.done():
        raise DeadlineExceededError("The deadline passed before the answer was complete.")
    return future.result()

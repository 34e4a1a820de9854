"""How a job is told to stop, and how its own thread waits for what another thread does for it."""

from __future__ import annotations

import math
import threading
import time
from enum import Enum
from typing import TYPE_CHECKING, Protocol, TypeVar

from worker.errors import DeadlineExceededError, StoppedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

T = TypeVar("T")

REST_S = 0.02
"""Between two errands of a wait: text arrives smoothly, fifty writes a second at most."""


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


class Errand(Protocol):
    """What a thread does between times while it waits for something else.

    due: set, by any thread, when there is something to do. A thread that looked by itself every so often
    would take a core from the engine's just to look, as many times as jobs wait.
    """

    due: threading.Event

    def run(self) -> float:
        """Does it. In so many seconds there is more to do though nobody says so; infinite: there is not."""


def result_within(future: Future[T], stop: Stop, deadline: float, errand: Errand | None = None) -> T:
    """What comes of `future`, unless `stop` or the `deadline` (monotonic) comes first.

    Runs the `errand` meanwhile, with rests of `REST_S`. Raises `StoppedError`, `DeadlineExceededError`, or
    what the future raises.
    """
    over = threading.Event()
    due = errand.due if errand else threading.Event()

    def end(*_: object) -> None:
        over.set()
        due.set()

    future.add_done_callback(end)
    stop.then(end)
    again_s = math.inf
    while not over.is_set() and (left := deadline - time.monotonic()) > 0:
        due.wait(min(left, again_s))
        if errand and not over.is_set():
            due.clear()
            again_s = errand.run()
            over.wait(min(left, REST_S))
    if stop.reason is not None:
        raise StoppedError(stop.reason.value)
    if not future.done():
        raise DeadlineExceededError("The deadline passed before the answer was complete.")
    return future.result()

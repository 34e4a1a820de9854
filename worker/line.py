"""Whose turn it is: requests in the order in which they came, and when those in front are taken in."""

from __future__ import annotations

import time
from bisect import bisect_right, insort
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

SHARE = 0.05
"""Of the time that the last answer took: so long others are worth waiting for (`benchmarks/waiting.py`)."""
UNTIL_FIRST_S = 0.1
"""So long an answer is taken to take before there was one."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much the engine takes on at once.

    max_batch: requests. max_tokens: of text and images, with room for the answers; once those at work may
    fill it, no other joins. max_wait_s: how long, at most, those in line wait for expected neighbors.
    """

    max_batch: int
    max_tokens: int
    max_wait_s: float


class Line(Generic[T]):
    """Any thread may `join`; one takes from it.

    Requests cost less each the more of them are taken in together. Where none is at work the first therefore
    waits for those that are expected, for a twentieth of what the last answer took: those that are `coming`,
    and the next ones of callers that had an answer just before, who ask again nearly together if they had
    them together. Nobody waits where nobody is expected: each that joins stands for one of the callers.
    Beside others at work one step is let pass where more are in line than there are places, as answers that
    began together end within a step of each other.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._changed = Condition()
        self._waiting: deque[T] = deque()
        self._coming = 0
        self._back: list[float] = []  # until when a caller may be back, in order
        self._patience_s = self._share_of(UNTIL_FIRST_S)
        self._skipped = False  # whether those in front have let one step pass
        self._closing = False

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def closed(self) -> bool:
        """Whether nobody is in it any more, or will be."""
        return self._closing and not self._waiting

    def close(self) -> None:
        """Nobody joins any more."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    @contextmanager
    def coming(self) -> Iterator[None]:
        """Somebody is on the way to the line, until the end of the block."""
        with self._changed:
            self._coming += 1
        try:
            yield
        finally:
            with self._changed:
                self._coming -= 1
                self._changed.notify()

    def join(self, one: T) -> None:
        """Puts it at the end."""
        with self._changed:
            del self._back[:1]
            self._waiting.append(one)
            self._changed.notify()

    def answered(self, began: float) -> None:
        """Notes that a request whose turn came at `began`, by the clock, has its answer now."""
        with self._changed:
            now = self._clock()
            self._patience_s = self._share_of(now - began)
            insort(self._back, now + self._patience_s)

    def take(self, working: int, has_room: Callable[[int], bool]) -> list[T]:
        """Those whose turn it is; waits for them where none is `working`.

        has_room: whether one more fits beside so many new ones.
        """
        taken: list[T] = []
        with self._changed:
            if working:
                if not self._in_turn(self._limits.max_batch - working, roomy=has_room(0)):
                    return taken
            else:
                self._wait()
            while self._waiting and has_room(len(taken)):
                taken.append(self._waiting.popleft())
        return taken

    def _wait(self) -> None:
        """For the first, and for those that are expected."""
        while not self._waiting and not self._closing:
            self._changed.wait()
        now = self._clock()
        patient_until = now + self._patience_s
        while len(self._waiting) < self._limits.max_batch and not self._closing:
            expected_until = patient_until if self._coming else min(patient_until, self._back_until(now))
            if expected_until <= now:
                break
            self._changed.wait(expected_until - now)
            now = self._clock()

    def _in_turn(self, places: int, *, roomy: bool) -> bool:
        """Whether those in front may join others at work in so many places."""
        if not self._waiting or not roomy:
            self._skipped = False
            return False
        crowded = len(self._waiting) > places
        self._skipped = crowded and not (self._skipped or self._closing or self._patience_s == 0)
        return not self._skipped

    def _back_until(self, now: float) -> float:
        """Until when a caller may be back; 0: none is missed."""
        del self._back[: bisect_right(self._back, now)]
        return self._back[-1] if self._back else 0

    def _share_of(self, took_s: float) -> float:
        return min(self._limits.max_wait_s, SHARE * took_s)

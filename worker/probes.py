"""`/livez` and `/readyz` of a worker, beside `/metrics`: what a container's probes ask.

A worker has no other door. Alive is not warm: a model may load for minutes, and a broker that is away is
not cured by a restart. What a restart does cure is a worker that has stopped consuming while jobs wait.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from redis.exceptions import RedisError

if TYPE_CHECKING:
    from collections.abc import Callable

STALLED_S = 90.0
"""Longer than a lost connection takes to be noticed (10 s) and a held lease to run out (20 s)."""


class Probes:
    """What the probes are told, from what the worker knows of itself.

    `waiting`: jobs in the queue, may raise `RedisError`; `running`: jobs this worker works on; `ended`: how
    many it has ended so far; `ready`: whether a request would be answered now.
    """

    def __init__(
        self,
        *,
        waiting: Callable[[], int],
        running: Callable[[], int],
        ended: Callable[[], int],
        ready: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._waiting = waiting
        self._running = running
        self._ended = ended
        self._ready = ready
        self._clock = clock
        self._lock = threading.Lock()  # one thread a request
        self._ended_before = 0
        self._idle_since: float | None = None

    @property
    def ready(self) -> bool:
        return self._ready()

    @property
    def alive(self) -> bool:
        """False once jobs have waited for `STALLED_S` before a warm worker that took none and ended none.

        A queue that other workers share may be full at every look; what counts is that this one does nothing.
        """
        with self._lock:
            ended = self._ended()
            resting = self._running() == 0 and ended == self._ended_before
            idle = resting and self._ready() and self._jobs_wait()
            self._ended_before = ended
            if not idle:
                self._idle_since = None
                return True
            self._idle_since = self._clock() if self._idle_since is None else self._idle_since
            return self._clock() - self._idle_since < STALLED_S

    def _jobs_wait(self) -> bool:
        try:
            return self._waiting() > 0
        except RedisError:
            return False

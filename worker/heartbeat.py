"""Tells the front end, every few seconds, that this worker lives; and keeps its leases."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Self

from redis.exceptions import RedisError

from worker.contract import WORKERS_KEY

if TYPE_CHECKING:
    from collections.abc import Callable

    from redis import Redis

    from worker.contract import WorkerStatus
    from worker.jobs import Jobs

log = logging.getLogger(__name__)


class Heartbeat:
    """A thread that beats until the block ends, then removes the worker from the list.

    A broker that is away costs beats, not the worker: the next beat tries again.
    """

    def __init__(
        self, redis: Redis, jobs: Jobs, status: Callable[[], WorkerStatus], *, every_s: float
    ) -> None:
        self._redis = redis
        self._jobs = jobs
        self._status = status
        self._every_s = every_s
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._wake.set()
        self._thread.join()

    def beat_now(self) -> None:
        """Does not wait for the next beat: the worker has just become warm."""
        self._wake.set()

    def _main(self) -> None:
        while not self._stopping:
            self._try(self._beat)
            self._wake.wait(self._every_s)
            self._wake.clear()
        self._try(lambda: self._redis.hdel(WORKERS_KEY, self._status().worker_id))

    def _beat(self) -> None:
        status = self._status()
        self._redis.hset(WORKERS_KEY, status.worker_id, status.model_dump_json())
        self._jobs.renew_leases()

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except RedisError as error:
            log.warning("heartbeat: the broker does not answer (%s)", type(error).__name__)

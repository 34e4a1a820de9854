"""What a worker does every few seconds: tells that it lives, keeps its leases, looks for lost jobs."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any, Self

from kombu.exceptions import OperationalError
from pydantic import BaseModel, FiniteFloat, ValidationError
from redis.exceptions import RedisError

from worker.contract import WORKERS_KEY

if TYPE_CHECKING:
    from collections.abc import Callable

    from redis import Redis

    from worker.contract import WorkerStatus
    from worker.jobs import Jobs

log = logging.getLogger(__name__)

FORGET_S = 600.0
"""The heartbeat of a worker that was killed stays this long for the curious."""


class Heartbeat:
    """A thread that beats until the block ends, then removes the worker from the list.

    redis: a quick client; a broker that is away costs beats, not the worker: the next beat tries again.
    `send_again` puts a job, given as id and payload, into the queue; `check` is called at every beat.
    `on_death` is called in the thread when it ends by an error: nobody would renew the leases any more.
    """

    def __init__(
        self,
        redis: Redis,
        jobs: Jobs,
        status: Callable[[], WorkerStatus],
        send_again: Callable[[str, dict[str, Any]], None],
        check: Callable[[], None],
        *,
        on_death: Callable[[BaseException], None],
        every_s: float,
    ) -> None:
        self._redis = redis
        self._jobs = jobs
        self._status = status
        self._send_again = send_again
        self._check = check
        self._on_death = on_death
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
        try:
            while not self._stopping:
                self._try(self._beat)
                self._try(self._recover)
                self._check()
                self._wake.wait(self._every_s)
                self._wake.clear()
            self._try(lambda: self._redis.hdel(WORKERS_KEY, self._status().worker_id))
        except BaseException as error:  # noqa: BLE001 - whatever it is, it must not go unnoticed
            self._on_death(error)

    def _beat(self) -> None:
        status = self._status()
        self._jobs.renew_leases()
        self._redis.hset(WORKERS_KEY, status.worker_id, status.model_dump_json())

    def _recover(self) -> None:
        for job_id, payload in self._jobs.sweep():
            log.warning("job %s was lost and is sent again", job_id)
            self._send_again(job_id, payload)
            self._jobs.put_first()
        # Not decoded: what is no text must not keep anybody from the rest.
        beats: dict[bytes, bytes] = self._redis.execute_command("HGETALL", WORKERS_KEY, NEVER_DECODE=True)
        for gone in [key for key, beat in beats.items() if _seen_at(beat) < time.time() - FORGET_S]:
            self._redis.hdel(WORKERS_KEY, gone)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (RedisError, OperationalError) as error:
            log.warning("heartbeat: the broker does not answer (%s)", type(error).__name__)


class _Beat(BaseModel):
    """What is asked of a heartbeat, of whichever version its worker is."""

    seen_at: FiniteFloat


def _seen_at(beat: bytes) -> float:
    """When a worker wrote it; 0 where nobody could tell, so that it is forgotten."""
    try:
        return _Beat.model_validate_json(beat).seen_at
    except ValidationError:
        return 0.0

"""Hears at once which jobs their callers no longer want; what it misses the next heartbeat finds."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Self

from redis.exceptions import RedisError

from worker.contract import CANCEL_CHANNEL
from worker.stops import StopReason

if TYPE_CHECKING:
    from redis import Redis

    from worker.jobs import Jobs

log = logging.getLogger(__name__)

LISTEN_S = 0.5
"""How long leaving may take."""
RECONNECT_S = 1.0


class Cancellations:
    """A thread that listens on `CANCEL_CHANNEL` until the block ends. redis: a quick client."""

    def __init__(self, redis: Redis, jobs: Jobs) -> None:
        self._redis = redis
        self._jobs = jobs
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._main, name="cancellations", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _main(self) -> None:
        while not self._over.is_set():
            try:
                self._listen()
            except RedisError as error:
                log.warning("cancellations: the broker does not answer (%s)", type(error).__name__)
                self._over.wait(RECONNECT_S)

    def _listen(self) -> None:
        """Over one connection: a new one for each failure, so that it is certain to be subscribed."""
        with self._redis.pubsub(ignore_subscribe_messages=True) as channel:
            channel.subscribe(CANCEL_CHANNEL)
            while not self._over.is_set():
                if message := channel.get_message(timeout=LISTEN_S):
                    self._jobs.stop(message["data"], StopReason.CANCELED)

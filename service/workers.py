"""Which workers are there, from their heartbeats."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from pydantic import ValidationError

from service.errors import NoWorkerError, UnknownModelError
from service.jobs import broker_within
from worker.contract import WORKER_FRESH_S, WORKERS_KEY, WorkerStatus

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from service.settings import ServiceSettings

logger = logging.getLogger(__name__)

FORGET_AFTER_S = 3600.0
"""A model that is not named in the settings and has no worker for so long is one that was taken away."""


class Workers:
    """Reads the heartbeats, and remembers when each model was last served."""

    def __init__(self, redis: Redis, settings: ServiceSettings) -> None:
        self._redis = redis
        self._settings = settings
        self._expected = {settings.model, *settings.models}
        # Their first workers are given the grace period too.
        self._last_seen = dict.fromkeys(self._expected, time.time())

    @property
    def models(self) -> tuple[str, ...]:
        """Those of the settings, and every model that a worker was lately seen with."""
        return tuple(sorted(self._last_seen))

    async def fresh(self) -> list[WorkerStatus]:
        """The workers whose last heartbeat is recent, warm or not. Raises `BrokerAwayError`."""
        async with broker_within(self._settings.broker_timeout_s):
            # Not decoded: what is no text must not hide the workers.
            beats: list[bytes] = await self._redis.execute_command("HVALS", WORKERS_KEY, NEVER_DECODE=True)
        seen = [status for status in map(_parse, beats) if status is not None]
        for status in seen:
            self._last_seen[status.model] = max(status.seen_at, self._last_seen.get(status.model, 0))
        for model in [each for each, at in self._last_seen.items() if time.time() - at > FORGET_AFTER_S]:
            if model not in self._expected:
                del self._last_seen[model]
        return [status for status in seen if time.time() - status.seen_at <= WORKER_FRESH_S]

    async def expect(self, model: str) -> None:
        """Raises `UnknownModelError`, `NoWorkerError` or `BrokerAwayError` where a job had no prospect.

        While a heartbeat of that model is recent nobody asks for all of them again, once a request.
        """
        recent_s = min(WORKER_FRESH_S, self._settings.worker_grace_s)
        if time.time() - self._last_seen.get(model, 0) > recent_s:
            await self.fresh()
        if model not in self._last_seen:
            raise UnknownModelError(f"No such model; served here: {', '.join(self.models)}.")
        if time.time() - self._last_seen[model] > self._settings.worker_grace_s:
            raise NoWorkerError(f"No worker for {model} was seen for {self._settings.worker_grace_s:.0f} s.")


def _parse(beat: bytes) -> WorkerStatus | None:
    """A heartbeat; None for one that a worker of another version has written in its own way."""
    try:
        return WorkerStatus.model_validate_json(beat)
    except ValidationError:
        logger.warning("a heartbeat that this version does not understand is left out")
        return None

"""Whether one more job may wait. A full queue refuses at once and tells when to come again."""

from __future__ import annotations

import logging
import math
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from service.errors import BrokerAwayError, QueueFullError
from service.jobs import broker_within
from worker.contract import DRAIN_STEP_S, drained_key, open_jobs_key, queue_name

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from redis.asyncio import Redis

    from service.broker import Durability
    from service.settings import ServiceSettings

logger = logging.getLogger(__name__)

RESERVED_S = 30
"""A place whose front end died before its job was in the queue is free again after this long."""
DRAIN_STEPS = 6
"""Counters that the drain rate is read from: a minute."""
MAX_RETRY_AFTER_S = 60
"""Also what is said while nothing drains."""

# KEYS: queue, reserved places, open jobs. ARGV: place, most jobs, seconds until a place is free again.
# Returns 1 if the place is reserved: jobs that are about to enter count as if they were in the queue.
_RESERVE = """
local now = tonumber(redis.call('TIME')[1])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
local waiting = math.min(redis.call('LLEN', KEYS[1]), redis.call('ZCARD', KEYS[3]))
if waiting + redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[2]) then return 0 end
redis.call('ZADD', KEYS[2], now + ARGV[3], ARGV[1])
redis.call('EXPIRE', KEYS[2], 2 * ARGV[3])
return 1
"""


class Admission:
    """Bounds each model's queue for all front ends together."""

    def __init__(self, redis: Redis, durability: Durability, settings: ServiceSettings) -> None:
        self._redis = redis
        self._durability = durability
        self._settings = settings
        self._reserve = redis.register_script(_RESERVE)

    @asynccontextmanager
    async def admit(self, model: str) -> AsyncIterator[None]:
        """Holds a place in the queue while the block enters it.

        Raises `QueueFullError`, `BrokerNotDurableError` or `BrokerAwayError`.
        """
        self._durability.require()
        place, reserved = uuid4().hex, reserved_key(model)
        args: list[Any] = [place, self._settings.max_queue, RESERVED_S]
        keys = [queue_name(model), reserved, open_jobs_key(model)]
        async with broker_within(self._settings.broker_timeout_s):
            admitted = await self._reserve(keys=keys, args=args)
        if not admitted:
            raise QueueFullError(model, await self._retry_after_s(model))
        try:
            yield
        finally:
            await self._give_back(reserved, place)

    async def drain_rate(self, model: str) -> float:
        """Jobs of `model` that ended per second over the last minute. Raises `BrokerAwayError`."""
        now = time.time()
        keys = [drained_key(model, now - step * DRAIN_STEP_S) for step in range(DRAIN_STEPS)]
        async with broker_within(self._settings.broker_timeout_s):
            counts: list[str | None] = await self._redis.mget(keys)  # type: ignore[assignment]  # decoded
        seconds = (DRAIN_STEPS - 1) * DRAIN_STEP_S + now % DRAIN_STEP_S  # the first step has only begun
        return sum(int(count or 0) for count in counts) / seconds

    async def _retry_after_s(self, model: str) -> int:
        """When a quarter of the queue will have drained: sooner, most of those who come back come in vain."""
        rate = await self.drain_rate(model)
        if rate == 0:
            return MAX_RETRY_AFTER_S
        return max(1, min(math.ceil(self._settings.max_queue / 4 / rate), MAX_RETRY_AFTER_S))

    async def _give_back(self, reserved: str, place: str) -> None:
        try:
            async with broker_within(self._settings.broker_timeout_s):
                await self._redis.zrem(reserved, place)
        except BrokerAwayError:
            logger.warning("a place in the queue stays reserved for %d s", RESERVED_S)


async def waiting(redis: Redis, model: str) -> int:
    """How many jobs of `model` wait, as `Admission` counts them: messages, but no more than jobs are open.

    A job that was canceled leaves its message in the queue until a worker takes it, and one that was lost may
    have been sent twice. Those that run are open, too, so that up to as many of these are counted.
    """
    async with redis.pipeline(transaction=False) as pipe:
        pipe.llen(queue_name(model))
        pipe.zcard(open_jobs_key(model))
        counts: list[int] = await pipe.execute()
    return min(counts)


def reserved_key(model: str) -> str:
    """Redis sorted set of places in the queue that are about to be taken, by when they are free again."""
    return f"{queue_name(model)}:reserved"

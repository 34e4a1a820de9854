"""Whether the broker keeps what it is given (it must not evict or forget jobs), and how full it is."""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from service.errors import BrokerAwayError, BrokerNotDurableError
from service.jobs import broker_within
from service.tasks import in_background

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from redis.asyncio import Redis

    from service.settings import ServiceSettings

logger = logging.getLogger(__name__)

LOOK_AGAIN_S = 5.0
KNOWN_FOR_S = 60.0
"""A broker that was found fit is looked at again: after a failover it is another node."""


class NotDurableError(Exception):
    """`PRISM_REQUIRE_DURABLE_BROKER` is set and the broker may lose jobs: the front end does not start."""


class Durability:
    """What is known of the broker; nothing while it has not answered yet."""

    def __init__(self, redis: Redis, settings: ServiceSettings) -> None:
        self._redis = redis
        self._timeout_s = settings.broker_timeout_s
        self._required = settings.require_durable_broker
        self._faults: tuple[str, ...] | None = None

    def require(self) -> None:
        """Raises `BrokerNotDurableError` where it is required and not known."""
        if self._required and self._faults != ():
            raise BrokerNotDurableError("The broker is not known to keep jobs through a restart.")

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Asks at the start, then in the background: often until the broker answers, seldom after that.

        Where durability is required it asks often until the broker is durable: an operator may mend that.

        Raises `NotDurableError`, at the start only: a process that serves goes on, and refuses jobs.
        """
        await self._look()
        if self._required and self._faults:
            raise NotDurableError(_said(self._faults))
        async with in_background(self._look_again()):
            yield

    async def _look_again(self) -> None:
        while True:
            await asyncio.sleep(KNOWN_FOR_S if self._settled else LOOK_AGAIN_S)
            await self._look()

    @property
    def _settled(self) -> bool:
        return self._faults is not None and not (self._required and self._faults)

    async def _look(self) -> None:
        try:
            async with broker_within(self._timeout_s):  # INFO: hosted brokers refuse CONFIG
                about: dict[str, Any] = await self._redis.info()
        except BrokerAwayError:
            logger.warning("the broker does not answer yet: whether it keeps jobs is looked at later")
            return
        before, self._faults = self._faults, faults(about)
        if self._faults and self._faults != before:
            logger.warning(_said(self._faults))
        elif before and not self._faults:
            logger.info("the broker is durable now: jobs are accepted")


def faults(about: dict[str, Any]) -> tuple[str, ...]:
    """Why a broker that says `about` of itself in INFO may lose jobs; empty if it does not.

    What it does not say counts against it.
    """
    policy = about.get("maxmemory_policy", "unknown")
    found = []
    if policy != "noeviction":
        found.append(f"its maxmemory-policy is {policy}, not noeviction: it may evict accepted jobs")
    if about.get("aof_enabled") != 1:
        found.append("appendonly is off: a restart loses accepted jobs")
    return tuple(found)


async def memory(redis: Redis, within_s: float) -> tuple[float, float]:
    """Bytes that the broker uses, and that it may use: 0 for no limit.

    NaN for what it does not say, and for both while it does not answer: an old number would lie.
    """
    try:
        async with broker_within(within_s):
            about: dict[str, Any] = await redis.info("memory")
    except BrokerAwayError:
        return math.nan, math.nan
    return float(about.get("used_memory", math.nan)), float(about.get("maxmemory", math.nan))


def _said(found: tuple[str, ...]) -> str:
    return "THE BROKER IS NOT DURABLE: " + "; ".join(found)

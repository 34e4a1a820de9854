"""One subscription a process: wakes those who wait for a job when it may have changed."""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from pydantic import ValidationError
from redis.exceptions import RedisError

from worker.contract import JobEvent, events_channel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from redis.asyncio import Connection, Redis

logger = logging.getLogger(__name__)

RECONNECT_S = 0.5
_IDLE_CHANNEL = "prism:front-end"
"""Nothing is published here: it keeps the connection subscribed while nobody waits."""


class JobSignals:
    """Wakes waiters; what happened they read from the job itself, so that a lost message loses nothing.

    The broker's confirmation of a subscription is a signal too: it comes after every new subscription, also
    when a broken connection was replaced, and makes the waiter look for what it may have missed.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._waiting: dict[str, dict[asyncio.Event, bool]] = {}  # whether only the end matters
        self._connection: Connection | None = None

    @asynccontextmanager
    async def of(self, job_id: str, *, end_only: bool = False) -> AsyncIterator[asyncio.Event]:
        """An event that is set whenever the job may have changed; at first once the subscription stands.

        end_only: not set by a change that is not the job's end.
        """
        channel, event = events_channel(job_id), asyncio.Event()
        first = channel not in self._waiting
        self._waiting.setdefault(channel, {})[event] = end_only
        try:
            if first:
                await self._send("SUBSCRIBE", channel)
            else:
                event.set()
            yield event
        finally:
            del self._waiting[channel][event]
            if not self._waiting[channel]:
                del self._waiting[channel]
                await self._send("UNSUBSCRIBE", channel)

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Signals come while this context lasts, over a new connection when one breaks."""
        reader = asyncio.create_task(self._run())
        try:
            yield
        finally:
            while not reader.done():  # before Python 3.12 `wait_for`, in redis-py, may swallow a cancellation
                reader.cancel()
                await asyncio.wait([reader], timeout=0.1)

    async def _run(self) -> None:
        while True:
            try:
                await self._read()
            except (RedisError, OSError) as error:
                logger.warning("subscription lost, connecting again: %s", type(error).__name__)
                await asyncio.sleep(RECONNECT_S)

    async def _read(self) -> None:
        """A bare connection: redis-py's `PubSub` would let reader and subscribers reconnect it at once."""
        connection = await self._redis.connection_pool.get_connection()
        try:
            self._connection = connection
            await self._send("SUBSCRIBE", _IDLE_CHANNEL, *self._waiting)
            while True:
                kind, channel, content = await connection.read_response(timeout=math.inf, push_request=True)
                goes_on = kind == "message" and _goes_on(content)
                for event, end_only in self._waiting.get(channel, {}).items():
                    if not (goes_on and end_only):
                        event.set()
        finally:
            self._connection = None
            await connection.disconnect(nowait=True)
            await self._redis.connection_pool.release(connection)

    async def _send(self, *command: str) -> None:
        connection = self._connection
        if connection is None or not connection.is_connected:
            return  # the reader subscribes to everything that is waited for once it is connected
        try:
            await connection.send_command(*command, check_health=False)
        except (RedisError, OSError):
            logger.warning(
                "subscription lost while sending"
            )  # the reader finds out by itself and starts again


def _goes_on(message: str) -> bool:
    """Whether the job has not ended; what a later version's worker may say is looked into."""
    try:
        return not JobEvent.model_validate_json(message).state.terminal
    except ValidationError:
        return False

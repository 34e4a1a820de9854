"""Which media are stored, whose they are and until when: in Redis, beside the store that has the bytes.

Media expire `media_ttl_s` after their last upload or question, which is later than any job that reads them.
An id that is being deleted cannot be claimed: a claim either comes first and keeps the bytes, or waits until
they are gone and puts them there again.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING

from service.errors import StoreAwayError
from service.jobs import broker_within
from worker.contract import media_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from redis.asyncio import Redis

    from service.keys import Caller
    from service.settings import ServiceSettings
    from worker.contract import MediaRef

EXPIRY_KEY = "prism:media:expiry"
"""Sorted set: media id to when it expires."""
DELETING_KEY = "prism:media:deleting"
"""Sorted set: media id to when its deletion counts as given up, and is somebody else's to do."""
DELETING_S = 120
BATCH = 100
CLAIM_AGAIN_S = 0.05
CLAIM_WITHIN_S = 5.0

# KEYS: expiry, deleting, then the hash of each. ARGV: now, expiry, owner's field, then id, media type and
# bytes of each. Returns 1, or 0 where one of them is being deleted.
_CLAIM = """
for i = 3, #KEYS do
  local id = ARGV[3 * i - 5]
  local until_ = redis.call('ZSCORE', KEYS[2], id)
  if until_ and tonumber(until_) > tonumber(ARGV[1]) then return 0 end
end
for i = 3, #KEYS do
  local id = ARGV[3 * i - 5]
  redis.call('ZREM', KEYS[2], id)
  redis.call('ZADD', KEYS[1], 'GT', ARGV[2], id)
  redis.call('HSET', KEYS[i], ARGV[3], 1, 'media_type', ARGV[3 * i - 4], 'bytes', ARGV[3 * i - 3],
    'expires_at', ARGV[2])
  redis.call('EXPIREAT', KEYS[i], ARGV[2])
end
return 1
"""
# KEYS: expiry, deleting. ARGV: now, when the deletion counts as given up, most ids. Returns those to delete:
# the expired, and those that somebody else began to delete and never finished.
_DUE = """
local due = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', ARGV[1], 'LIMIT', 0, ARGV[3])
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[1], 'LIMIT', 0, ARGV[3])) do
  redis.call('ZREM', KEYS[1], id)
  due[#due + 1] = id
end
for _, id in ipairs(due) do redis.call('ZADD', KEYS[2], ARGV[2], id) end
return due
"""
# KEYS: deleting, then the hash of each. ARGV: until when the deletion is ours, then id of each. One that took
# longer may have been claimed since, or be somebody else's: then the entry is theirs.
_DELETED = """
for i = 2, #KEYS do
  local until_ = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if until_ and tonumber(until_) == tonumber(ARGV[1]) then
    redis.call('ZREM', KEYS[1], ARGV[i])
    redis.call('DEL', KEYS[i])
  end
end
"""


class Shelf:
    """Every method raises `BrokerAwayError`."""

    def __init__(self, redis: Redis, settings: ServiceSettings) -> None:
        self._redis = redis
        self._timeout_s = settings.broker_timeout_s
        self._ttl_s = settings.media_ttl_s
        self._claim = redis.register_script(_CLAIM)
        self._due = redis.register_script(_DUE)
        self._deleted = redis.register_script(_DELETED)

    async def reachable(self) -> None:
        """Returns if the broker answers: to be asked before a long upload begins."""
        async with broker_within(self._timeout_s):
            await self._redis.ping()

    async def facts(self, media_id: str, caller: Caller) -> dict[str, str] | None:
        """The hash of media that `caller` may use; None if there are none, or only others may."""
        async with broker_within(self._timeout_s):
            found: dict[str, str] = await self._redis.hgetall(media_key(media_id))  # type: ignore[assignment]  # decoded
        return found if _field(caller) in found else None

    async def claim(self, refs: Iterable[MediaRef], caller: Caller) -> float:
        """Keeps `refs` for `caller` until the time returned, before their bytes are looked for or written.

        Waits for a deletion that is under way. Raises `StoreAwayError` if that takes too long.
        """
        expires_at = math.ceil(time.time() + self._ttl_s)
        each = {ref.id: ref for ref in refs}.values()
        keys = [EXPIRY_KEY, DELETING_KEY, *(media_key(ref.id) for ref in each)]
        about: list[str | int] = [value for ref in each for value in (ref.id, ref.media_type, ref.size_bytes)]
        waited_until = time.monotonic() + CLAIM_WITHIN_S
        while True:
            async with broker_within(self._timeout_s):
                args: list[str | int | float] = [time.time(), expires_at, _field(caller), *about]
                claimed = await self._claim(keys=keys, args=args)
            if claimed:
                return expires_at
            if time.monotonic() > waited_until:
                raise StoreAwayError("The same media are being deleted; try again.")
            await asyncio.sleep(CLAIM_AGAIN_S)

    async def due(self) -> tuple[list[str], float]:
        """At most 2 * `BATCH` ids to delete now, and until when nobody else claims or deletes them."""
        now = time.time()
        until = now + DELETING_S
        async with broker_within(self._timeout_s):
            ids: list[str] = await self._due(keys=[EXPIRY_KEY, DELETING_KEY], args=[now, until, BATCH])
        return ids, until

    async def deleted(self, ids: Sequence[str], until: float) -> None:
        """The bytes of `ids` are gone, which `due` gave out until then."""
        keys = [DELETING_KEY, *map(media_key, ids)]
        async with broker_within(self._timeout_s):
            await self._deleted(keys=keys, args=[until, *ids])

    async def adopt(self, ids: Iterable[str]) -> None:
        """Lets stored media that nothing is known of expire now: the broker may have lost their entries."""
        now = time.time()
        async with broker_within(self._timeout_s):
            await self._redis.zadd(EXPIRY_KEY, dict.fromkeys(ids, now), nx=True)

    async def first_within(self, task: str, seconds: float) -> bool:
        """Whether this process is the one of all front ends that does `task` in the next `seconds`."""
        async with broker_within(self._timeout_s):
            taken = await self._redis.set(f"prism:media:{task}", 1, nx=True, px=max(1, int(seconds * 1000)))
        return bool(taken)


def _field(caller: Caller) -> str:
    return f"owner:{caller.owner}"

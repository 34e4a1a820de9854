"""`Idempotency-Key`: the same key, fields and media are the same job, for 24 hours and for each owner alone.

A key is claimed before its job is accepted and settled afterwards. The claim carries the id that the job is
going to have: if its front end dies in between, whoever asks next, once the claim has run out, finds either
that job in the broker or nothing, and goes on from there.
"""

from __future__ import annotations

import hashlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from service.errors import (
    BrokerAwayError,
    IdempotencyBusyError,
    IdempotencyMismatchError,
    InvalidRequestError,
    ServiceError,
)
from service.jobs import broker_within
from worker.contract import job_key

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from redis.asyncio import Redis

    from service.settings import ServiceSettings

KEPT_S = 24 * 3600
CLAIM_S = 60
"""How long a front end may take from the claim until the media are stored, and then to the accepted job."""
MAX_KEY = 255

# KEYS: key. ARGV: fingerprint, id of the job to be, seconds of a claim, seconds a key is kept, prefix of a
# job's Redis key. Returns {'mine'}, {'busy'}, {'other'} or {'job', id}.
_BEGIN = """
local now = tonumber(redis.call('TIME')[1])
local seen = redis.call('HMGET', KEYS[1], 'fingerprint', 'job', 'claimed_until')
if seen[1] and seen[1] ~= ARGV[1] then return {'other'} end
if seen[1] then
  if not seen[3] then return {'job', seen[2]} end
  if seen[2] == ARGV[2] then return {'mine'} end
  if tonumber(seen[3]) > now then return {'busy'} end
  if redis.call('EXISTS', ARGV[5] .. seen[2]) == 1 then
    redis.call('HDEL', KEYS[1], 'claimed_until')
    return {'job', seen[2]}
  end
end
redis.call('HSET', KEYS[1], 'fingerprint', ARGV[1], 'job', ARGV[2], 'claimed_until', now + ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[4])
return {'mine'}
"""
# KEYS: key. ARGV: id of the job to be, seconds of a claim. Returns whether the key is still its.
_HOLD = """
local seen = redis.call('HMGET', KEYS[1], 'job', 'claimed_until')
if seen[1] ~= ARGV[1] or not seen[2] then return 0 end
redis.call('HSET', KEYS[1], 'claimed_until', tonumber(redis.call('TIME')[1]) + ARGV[2])
return 1
"""
# KEYS: key. ARGV: id of the job, seconds to keep it.
_FINISH = """
if redis.call('HGET', KEYS[1], 'job') ~= ARGV[1] then return end
redis.call('HDEL', KEYS[1], 'claimed_until')
redis.call('EXPIRE', KEYS[1], ARGV[2])
"""
# KEYS: key. ARGV: id of the job that is not going to be.
_RELEASE = "if redis.call('HGET', KEYS[1], 'job') == ARGV[1] then redis.call('DEL', KEYS[1]) end"


class Idempotency:
    """The keys of one broker. Every method raises `BrokerAwayError`."""

    def __init__(self, redis: Redis, settings: ServiceSettings) -> None:
        self._timeout_s = settings.broker_timeout_s
        self._begin = redis.register_script(_BEGIN)
        self._hold = redis.register_script(_HOLD)
        self._finish = redis.register_script(_FINISH)
        self._release = redis.register_script(_RELEASE)

    async def begin(self, owner: str, key: str, fingerprint: str, job_id: str) -> str | None:
        """The id of the job that `key` stands for, or None: then the caller goes on to make `job_id`.

        Raises `InvalidRequestError` for a key of a wrong length, `IdempotencyMismatchError` where it stands
        for something else and `IdempotencyBusyError` while its job is still being admitted.
        """
        if not 1 <= len(key) <= MAX_KEY:
            raise InvalidRequestError(f"Idempotency-Key: 1 to {MAX_KEY} characters")
        args: list[str | int] = [fingerprint, job_id, CLAIM_S, KEPT_S, job_key("")]
        async with broker_within(self._timeout_s):
            found, *ids = await self._begin(keys=[_redis_key(owner, key)], args=args)
        if found == "other":
            raise IdempotencyMismatchError("This Idempotency-Key was used for another request.")
        if found == "busy":
            raise IdempotencyBusyError("A request with this Idempotency-Key is still being admitted.")
        return str(ids[0]) if ids else None

    @asynccontextmanager
    async def once(
        self, owner: str, key: str | None, fingerprint: str, job_id: str
    ) -> AsyncIterator[str | None]:
        """The id of the job that `key` stands for, or None: then the block is to make `job_id`.

        A block that refuses frees the key at once. Where it is not known whether the job was accepted (the
        broker went away, the caller hung up) the claim stays, and tells by itself once it has run out.
        Raises as `begin` does. Without a key it is always the block's turn.
        """
        existing = None if key is None else await self.begin(owner, key, fingerprint, job_id)
        try:
            yield existing
        except BrokerAwayError:
            raise
        except ServiceError:
            if key is not None and existing is None:
                await self.release(owner, key, job_id)
            raise
        if key is not None and existing is None:
            await self.finish(owner, key, job_id)

    async def hold(self, owner: str, key: str | None, job_id: str) -> None:
        """The claim lasts anew, for what is left to do after the media were stored, however long that took.

        Raises `IdempotencyBusyError` where it has run out and is another's: one key makes one job.
        """
        if key is None:
            return
        async with broker_within(self._timeout_s):
            ours = await self._hold(keys=[_redis_key(owner, key)], args=[job_id, CLAIM_S])
        if not ours:
            raise IdempotencyBusyError("A request with this Idempotency-Key is being admitted elsewhere.")

    async def finish(self, owner: str, key: str, job_id: str) -> None:
        """From now on `key` stands for `job_id`, which the broker has accepted."""
        async with broker_within(self._timeout_s):
            await self._finish(keys=[_redis_key(owner, key)], args=[job_id, KEPT_S])

    async def release(self, owner: str, key: str, job_id: str) -> None:
        """Forgets the claim: `job_id` was not accepted."""
        async with broker_within(self._timeout_s):
            await self._release(keys=[_redis_key(owner, key)], args=[job_id])


def _redis_key(owner: str, key: str) -> str:
    """Hashed: a key is a caller's own text. No owner's name has a zero byte, so no two pairs are one."""
    digest = hashlib.sha256(f"{owner}\0{key}".encode(errors="surrogateescape")).hexdigest()
    return f"prism:idempotency:{digest}"

"""How often a key may ask: the generic cell rate algorithm, one number in Redis for each owner.

All front ends share it. A dozen lines of Lua on the broker's own clock give what a library would: no window
that can be used twice at its edge, and the very second from which the next request passes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from service.errors import RateLimitedError
from service.jobs import broker_within

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from service.keys import Caller
    from service.settings import ServiceSettings

# KEYS: when the owner's allowance would be whole again. ARGV: seconds a request costs, requests at once.
# Returns how long to wait, 0 for a request that passes.
_GCRA = """
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6
local cost, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local whole = math.max(tonumber(redis.call('GET', KEYS[1]) or '0'), now) + cost
local wait = whole - cost * burst - now
if wait > 1e-6 then return tostring(wait) end
redis.call('SET', KEYS[1], string.format('%.6f', whole), 'PX', math.ceil((whole - now) * 1000) + 1000)
return '0'
"""


class RateLimit:
    """Lets each owner send `rate_per_minute` requests on average and `rate_burst` at once."""

    def __init__(self, redis: Redis, settings: ServiceSettings) -> None:
        self._settings = settings
        self._gcra = redis.register_script(_GCRA)

    async def spend(self, caller: Caller) -> None:
        """Counts one request. Raises `RateLimitedError`, then it does not count, or `BrokerAwayError`."""
        rate = self._settings.rate_per_minute
        if not (caller.owner and rate):
            return
        async with broker_within(self._settings.broker_timeout_s):
            args: list[str | int | float] = [60 / rate, self._settings.rate_burst]
            wait_s = float(await self._gcra(keys=[f"prism:rate:{caller.owner}"], args=args))
        if wait_s > 0:
            raise RateLimitedError(math.ceil(wait_s))

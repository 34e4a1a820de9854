"""Job state in Redis: claimed by one worker at a time, finished exactly once.

Each change is one Lua script, so that it happens whole or not at all, and each is safe to send twice: a
connection that breaks before the reply arrives is retried with the same token.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from uuid import uuid4

from redis import Redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from worker.contract import (
    RESULT_TTL_S,
    AnswerResult,
    JobEvent,
    JobState,
    Problem,
    events_channel,
    job_key,
    redis_url,
)

_Args = list[str | int | float]

# How both scripts begin. KEYS: job, lease; ARGV[1]: the token of whoever asks.
_OBSERVE = """
local function observe(key, token)
  redis.call('HSETNX', key, 'observed_by', token)
  return redis.call('HGET', key, 'observed_by') == token and 1 or 0
end
local state = redis.call('HGET', KEYS[1], 'state')
local open = state == 'queued' or state == 'running'
"""
# ARGV: token, now, lease in ms, most attempts, channel, event.
# Returns the job's state or what stands in the way, attempts so far, first to observe.
_CLAIM = (
    _OBSERVE
    + """
if not state then return {'missing', 0, 0} end
local attempts = tonumber(redis.call('HGET', KEYS[1], 'attempts') or '0')
if not open then return {state, attempts, observe(KEYS[1], ARGV[1])} end
local holder = redis.call('GET', KEYS[2])
if holder == ARGV[1] then return {'running', attempts, 0} end
if holder then return {'leased', attempts, 0} end
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[3])
if attempts >= tonumber(ARGV[4]) then return {'exhausted', attempts, 0} end
attempts = attempts + 1
redis.call('HSET', KEYS[1], 'state', 'running', 'started_at', ARGV[2], 'attempts', attempts)
redis.call('PUBLISH', ARGV[5], ARGV[6])
return {'running', attempts, 0}
"""
)
# ARGV: token, now, state, field, value, ttl in s, channel, event. Returns the job's state, first to observe.
_FINISH = (
    _OBSERVE
    + """
if redis.call('GET', KEYS[2]) == ARGV[1] then redis.call('DEL', KEYS[2]) end
if not state then return {'missing', 0} end
if open then
  state = ARGV[3]
  redis.call('HSET', KEYS[1], 'state', state, 'finished_at', ARGV[2], ARGV[4], ARGV[5])
  redis.call('EXPIRE', KEYS[1], ARGV[6])
  redis.call('PUBLISH', ARGV[7], ARGV[8])
end
return {state, observe(KEYS[1], ARGV[1])}
"""
)
# KEYS: lease; ARGV: token, lease in ms.
_RENEW = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end"


def lease_key(job_id: str) -> str:
    """Redis key that lives as long as somebody works on the job."""
    return f"prism:job:{job_id}:lease"


def connect(broker_url: str) -> Redis:
    """A client that outlasts a broker's restart of some seconds and never waits for ever."""
    return Redis.from_url(
        redis_url(broker_url),
        decode_responses=True,
        socket_timeout=5,
        health_check_interval=10,
        retry=Retry(ExponentialWithJitterBackoff(base=0.1, cap=2), retries=8),
        retry_on_error=[RedisConnectionError, RedisTimeoutError],
    )


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to work on a job, for the `attempt`-th time; `exhausted`: the right to give it up.

    `at` is monotonic, for durations.
    """

    job_id: str
    token: str
    attempt: int
    exhausted: bool
    at: float


@dataclass(frozen=True, slots=True)
class Settled:
    """A terminal state as it stands in Redis; `first` for the one caller that counts it in the metrics."""

    state: JobState
    first: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended: with a result if it succeeded, else with a problem."""

    state: JobState
    content: AnswerResult | Problem

    @property
    def result(self) -> AnswerResult | None:
        return self.content if isinstance(self.content, AnswerResult) else None

    @property
    def field(self) -> str:
        """Where the job's hash keeps the content."""
        return "error" if self.result is None else "result"


class Jobs:
    """The jobs of one broker; remembers which leases this worker holds."""

    def __init__(self, redis: Redis, *, lease_s: float, max_attempts: int) -> None:
        self._max_attempts = max_attempts
        self._lease_ms = int(lease_s * 1000)
        self._leases: dict[str, str] = {}
        self._claim = redis.register_script(_CLAIM)
        self._finish = redis.register_script(_FINISH)
        self._renew = redis.register_script(_RENEW)

    @property
    def running(self) -> int:
        """How many jobs this worker works on."""
        return len(self._leases)

    def claim(self, job_id: str) -> Claim | Settled | None:
        """Takes the job if nobody has it, waiting while somebody else holds a live lease on it.

        `Settled` if it has ended already, None if Redis no longer knows it.
        """
        token = uuid4().hex
        while True:
            # While the broker was away a lease may have run out under a job that still runs here.
            ours = job_id in self._leases
            state, attempt, first = ("leased", 0, 0) if ours else self._try_claim(job_id, token)
            if state == "leased":
                time.sleep(self._lease_ms / 4000)
            elif state == "missing":
                return None
            elif state in (JobState.RUNNING, "exhausted"):
                self._leases[job_id] = token
                return Claim(job_id, token, attempt, state == "exhausted", time.monotonic())
            else:
                return Settled(JobState(state), first=bool(first))

    def _try_claim(self, job_id: str, token: str) -> tuple[str, int, int]:
        now = time.time()
        event = JobEvent(state=JobState.RUNNING, at=now).model_dump_json()
        args: _Args = [token, now, self._lease_ms, self._max_attempts, events_channel(job_id), event]
        state, attempt, first = self._claim(keys=_keys(job_id), args=args)
        return state, attempt, first

    def finish(self, claim: Claim, outcome: Outcome) -> Settled | None:
        """Writes the terminal state unless there is one, gives the lease back, and tells the listeners.

        Returns the state that stands then, which a cancellation may have written first; None if Redis no
        longer knows the job.
        """
        now = time.time()
        event = JobEvent(state=outcome.state, at=now).model_dump_json()
        channel = events_channel(claim.job_id)
        content = outcome.content.model_dump_json()
        args: _Args = [claim.token, now, outcome.state, outcome.field, content, RESULT_TTL_S, channel, event]
        try:
            state, first = self._finish(keys=_keys(claim.job_id), args=args)
        finally:
            self._leases.pop(claim.job_id, None)
        return None if state == "missing" else Settled(JobState(state), first=bool(first))

    def renew_leases(self) -> None:
        """Gives every lease that this worker holds its full time again."""
        for job_id, token in self._leases.copy().items():
            self._renew(keys=[lease_key(job_id)], args=[token, self._lease_ms])


def _keys(job_id: str) -> list[str]:
    return [job_key(job_id), lease_key(job_id)]

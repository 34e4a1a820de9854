"""What the broker says, as text: redis-py's types leave open what its clients here were told to decode."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from worker.contract import JobState, job_key

if TYPE_CHECKING:
    from redis import Redis


def field(redis: Redis, key: str, name: str) -> str:
    """One field of a hash, which has to be there."""
    value = redis.hget(key, name)
    assert isinstance(value, str), f"{key} has no {name}"
    return value


def state(redis: Redis, job_id: str) -> JobState:
    """The state of a job."""
    return JobState(field(redis, job_key(job_id), "state"))


def entries(redis: Redis, stream: str) -> list[dict[str, str]]:
    """The entries of a stream, from the first on; none where there is no stream."""
    return [cast("dict[str, str]", entry) for _, entry in redis.xrange(stream) or ()]

"""Bounded queues, idempotency keys, and a broker that may lose jobs."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from redis.asyncio import Redis as AsyncRedis

from service.admission import MAX_RETRY_AFTER_S, Admission, reserved_key
from service.app import _redis
from service.broker import Durability, NotDurableError, faults
from service.errors import (
    BrokerAwayError,
    BrokerNotDurableError,
    IdempotencyBusyError,
    IdempotencyMismatchError,
    InvalidRequestError,
    QueueFullError,
)
from service.idempotency import KEPT_S, Idempotency
from tests.service.conftest import MODEL, StandInWorker, line_up, problem, question, serving, until
from tests.service.test_operations import scrape
from worker.contract import drained_key, job_key, open_jobs_key, queue_name

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Container

    import httpx
    from redis import Redis

    from service.settings import ServiceSettings
    from tests.service.conftest import MakeSettings


@pytest.fixture
async def connected(make_settings: MakeSettings) -> AsyncIterator[AsyncRedis]:
    """An asynchronous client of the test's broker, with the front end's own pool."""
    async with _redis(make_settings()) as redis:
        yield redis


def admission(redis: AsyncRedis, settings: ServiceSettings) -> Admission:
    return Admission(redis, Durability(redis, settings), settings)


async def test_a_thousand_at_once_do_not_overshoot_the_queue(
    make_settings: MakeSettings, connected: AsyncRedis, redis: Redis
) -> None:
    """Each holds its place from the moment it is let in: at the end the queue is just full."""
    queue = admission(connected, make_settings(max_queue=20))

    async def enter() -> bool:
        try:
            async with queue.admit(MODEL):
                await asyncio.sleep(0.01)  # media are stored
                await connected.zadd(open_jobs_key(MODEL), {uuid4().hex: time.time()})
                await connected.lpush(queue_name(MODEL), "job")
        except QueueFullError:
            return False
        return True

    entered = await asyncio.gather(*(enter() for _ in range(1000)))
    assert sum(entered) == 20
    assert redis.llen(queue_name(MODEL)) == 20
    assert redis.zcard(reserved_key(MODEL)) == 0


async def test_a_place_is_given_back_when_the_job_was_not_accepted(
    make_settings: MakeSettings, connected: AsyncRedis
) -> None:
    """Whatever fails between admission and queue."""
    queue = admission(connected, make_settings(max_queue=1))
    for _ in range(3):
        with pytest.raises(ValueError, match="store away"):
            async with queue.admit(MODEL):
                raise ValueError("store away")


async def test_a_front_end_that_died_blocks_its_place_for_a_while_only(
    make_settings: MakeSettings, connected: AsyncRedis, redis: Redis
) -> None:
    """Places that nobody gives back run out."""
    queue = admission(connected, make_settings(max_queue=1))
    redis.zadd(reserved_key(MODEL), {"of the dead": time.time() + 10})
    with pytest.raises(QueueFullError):
        async with queue.admit(MODEL):
            pass
    redis.zadd(reserved_key(MODEL), {"of the dead": time.time() - 1})
    async with queue.admit(MODEL):
        pass


@pytest.mark.parametrize(
    ("ended", "told"), [(0, [MAX_RETRY_AFTER_S]), (60, range(9, 14)), (6000, [1]), (1, [60])]
)
async def test_retry_after_follows_the_drain_rate(
    make_settings: MakeSettings,
    connected: AsyncRedis,
    redis: Redis,
    ended: int,
    told: Container[int],
) -> None:
    """The time in which a quarter of the queue drains, as fast as jobs ended within the last minute."""
    queue = admission(connected, make_settings(max_queue=40))
    redis.set(drained_key(MODEL, time.time() - 20), ended)
    redis.set(drained_key(MODEL, time.time() - 200), 10**6)  # too long ago to count
    line_up(redis, 40)
    with pytest.raises(QueueFullError) as raised:
        async with queue.admit(MODEL):
            pass
    assert raised.value.retry_after_s in told
    assert raised.value.headers == {"Retry-After": str(raised.value.retry_after_s)}


async def test_other_models_have_queues_of_their_own(
    make_settings: MakeSettings, connected: AsyncRedis, redis: Redis
) -> None:
    """One that is full does not close the others."""
    queue = admission(connected, make_settings(max_queue=1))
    line_up(redis)
    async with queue.admit("another"):
        pass


async def test_a_canceled_job_leaves_its_place_at_once(
    make_settings: MakeSettings, worker: StandInWorker, redis: Redis
) -> None:
    """Its message stays until a worker takes it, but nobody waits any more, and no metric says so."""

    async def depth(client: httpx.AsyncClient) -> float:
        return (await scrape(client))["prismprune_queue_depth", MODEL]

    later = {"Prefer": "respond-async"}
    worker.pause()
    async with serving(make_settings(max_queue=1)) as client:
        accepted = await client.post("/v1/answer", json=question(), headers=later)
        problem(await client.post("/v1/answer", json=question(), headers=later), 429, "queue-full")
        assert await depth(client) == 1
        assert (await client.delete(accepted.headers["location"])).status_code == 200
        assert redis.llen(queue_name(MODEL)) == 1
        assert await depth(client) == 0
        again = await client.post("/v1/answer", json=question(), headers=later)
        assert (accepted.status_code, again.status_code) == (202, 202)


async def test_one_of_fifty_callers_makes_the_job(make_settings: MakeSettings, connected: AsyncRedis) -> None:
    """The others are told that it is being admitted; afterwards everyone gets that job."""
    keys = Idempotency(connected, make_settings())
    first, busy = [], 0

    async def ask(number: int) -> None:
        nonlocal busy
        try:
            if await keys.begin("alice", "key", "same", f"job_{number}") is None:
                first.append(f"job_{number}")
        except IdempotencyBusyError as error:
            busy += error.headers == {"Retry-After": "1"}

    await asyncio.gather(*map(ask, range(50)))
    assert (len(first), busy) == (1, 49)
    await keys.finish("alice", "key", first[0])
    assert await keys.begin("alice", "key", "same", "job_x") == first[0]


async def test_a_key_stands_for_one_request_of_one_owner(
    make_settings: MakeSettings, connected: AsyncRedis, redis: Redis
) -> None:
    """Other content: 422, also while the first is being admitted; another owner's key is another key."""
    keys = Idempotency(connected, make_settings())
    assert await keys.begin("alice", "key", "one", "job_1") is None
    with pytest.raises(IdempotencyMismatchError):
        await keys.begin("alice", "key", "another", "job_2")
    await keys.finish("alice", "key", "job_1")
    with pytest.raises(IdempotencyMismatchError):
        await keys.begin("alice", "key", "another", "job_2")
    assert await keys.begin("bob", "key", "another", "job_3") is None
    kept = [redis.ttl(name) for name in redis.scan_iter("prism:idempotency:*")]
    assert all(KEPT_S - 60 < ttl <= KEPT_S for ttl in kept)
    assert len(kept) == 2


async def test_a_released_key_is_free_and_only_its_holder_releases_it(
    make_settings: MakeSettings, connected: AsyncRedis
) -> None:
    """A refusal, a full queue say, may be tried again with the same key at once."""
    keys = Idempotency(connected, make_settings())
    assert await keys.begin("", "key", "one", "job_1") is None
    await keys.release("", "key", "job_of_another")
    with pytest.raises(IdempotencyBusyError):
        await keys.begin("", "key", "one", "job_2")
    await keys.release("", "key", "job_1")
    assert await keys.begin("", "key", "one", "job_2") is None


@pytest.mark.parametrize("accepted", [True, False])
async def test_a_front_end_that_dies_in_between_leaves_neither_a_dead_key_nor_two_jobs(
    make_settings: MakeSettings,
    connected: AsyncRedis,
    redis: Redis,
    monkeypatch: pytest.MonkeyPatch,
    accepted: bool,
) -> None:
    """Once the claim has run out, the next one finds the job that was accepted, or makes its own."""
    monkeypatch.setattr("service.idempotency.CLAIM_S", 0)
    keys = Idempotency(connected, make_settings())
    assert await keys.begin("alice", "key", "one", "job_1") is None
    if accepted:
        redis.hset(job_key("job_1"), "state", "queued")
    assert await keys.begin("alice", "key", "one", "job_2") == ("job_1" if accepted else None)


@pytest.mark.parametrize("key", ["", "x" * 256])
async def test_a_key_has_1_to_255_characters(
    make_settings: MakeSettings, connected: AsyncRedis, key: str
) -> None:
    """Others are refused before anything is remembered."""
    with pytest.raises(InvalidRequestError, match="255"):
        await Idempotency(connected, make_settings()).begin("", key, "one", "job_1")


@pytest.mark.parametrize(
    ("about", "count"),
    [
        ({"maxmemory_policy": "noeviction", "aof_enabled": 1}, 0),
        ({"maxmemory_policy": "allkeys-lru", "aof_enabled": 1}, 1),
        ({"maxmemory_policy": "volatile-ttl", "aof_enabled": 0}, 2),
        ({}, 2),
    ],
)
def test_a_broker_is_durable_if_it_says_so(about: dict[str, Any], count: int) -> None:
    """No eviction and an append-only file; silence counts against it."""
    assert len(faults(about)) == count


async def test_a_broker_that_may_lose_jobs_is_warned_of_or_refused(
    make_settings: MakeSettings, connected: AsyncRedis, caplog: pytest.LogCaptureFixture
) -> None:
    """The test's broker has no append-only file: loud by default, no start where it is required."""
    async with Durability(connected, make_settings()).watching():
        assert "THE BROKER IS NOT DURABLE: appendonly is off" in caplog.text
        assert caplog.records[-1].levelno == logging.WARNING
    with pytest.raises(NotDurableError):
        async with Durability(connected, make_settings(require_durable_broker=True)).watching():
            pass


async def test_while_it_is_not_known_to_be_durable_jobs_are_refused(
    make_settings: MakeSettings, nowhere: str
) -> None:
    """A front end starts while its broker is away; only where durability is required it then says 503."""
    for required, error in ((True, BrokerNotDurableError), (False, BrokerAwayError)):
        settings = make_settings(broker_url=nowhere, require_durable_broker=required)
        async with AsyncRedis.from_url(nowhere) as redis:
            durability = Durability(redis, settings)
            async with durability.watching():
                with pytest.raises(error):
                    async with Admission(redis, durability, settings).admit(MODEL):
                        pass


async def test_a_broker_that_comes_later_is_looked_at_then(
    make_settings: MakeSettings,
    connected: AsyncRedis,
    nowhere: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The check is not lost because the front end was first."""
    monkeypatch.setattr("service.broker.LOOK_AGAIN_S", 0.01)
    async with AsyncRedis.from_url(nowhere) as away:
        durability = Durability(away, make_settings())
        async with durability.watching():
            assert "NOT DURABLE" not in caplog.text
            durability._redis = connected
            await until(lambda: "NOT DURABLE" in caplog.text)


async def test_a_broker_that_is_mended_is_given_jobs_again(
    make_settings: MakeSettings,
    connected: AsyncRedis,
    nowhere: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It came back without its append-only file; nobody restarts the front ends when that is turned on."""
    monkeypatch.setattr("service.broker.LOOK_AGAIN_S", 0.01)
    asked = []

    async def info() -> dict[str, Any]:
        asked.append(1)
        about: dict[str, Any] = await connected.info()
        return about

    async with AsyncRedis.from_url(nowhere) as away:
        durability = Durability(away, make_settings(require_durable_broker=True))
        async with durability.watching():
            monkeypatch.setattr(away, "info", info)
            await until(lambda: len(asked) > 3)
            with pytest.raises(BrokerNotDurableError):
                durability.require()
            await connected.config_set("appendonly", "yes")
            try:
                await until(lambda: not durability._faults)
            finally:
                await connected.config_set("appendonly", "no")
            durability.require()
    assert caplog.text.count("NOT DURABLE") == 1

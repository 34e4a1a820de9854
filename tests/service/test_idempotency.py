"""Keys, queues and owners as callers meet them at the routes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from redis.asyncio import Redis as AsyncRedis

from service import idempotency
from service.errors import IdempotencyBusyError
from service.idempotency import Idempotency
from service.keys import new_key
from service.media import MediaStore
from tests.service.conftest import (
    MODEL,
    StandInWorker,
    bearer,
    data_uri,
    encoded,
    line_up,
    png,
    problem,
    question,
    serving,
)
from worker.contract import queue_name

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx
    from redis import Redis

    from tests.service.conftest import MakeSettings

KEY = {"Idempotency-Key": "same"}
LATER = {"Prefer": "respond-async"}


async def test_fifty_callers_with_one_key_make_one_job(
    client: httpx.AsyncClient, worker: StandInWorker
) -> None:
    """At once: those who are not first hear 409 with Retry-After, or get that job."""
    responses = await asyncio.gather(
        *(client.post("/v1/answer", json=question(), headers=KEY) for _ in range(50))
    )
    done = [response for response in responses if response.status_code == 200]
    assert len({response.json()["id"] for response in done}) == 1
    assert len(worker.jobs) == 1
    for response in responses:
        if response.status_code != 200:
            problem(response, 409, "idempotency-key-busy")
            assert response.headers["retry-after"] == "1"
    again = await client.post("/v1/answer", json=question(), headers=KEY)
    assert again.json()["id"] == done[0].json()["id"]


async def test_the_same_bytes_are_the_same_media_however_they_come(
    client: httpx.AsyncClient, worker: StandInWorker
) -> None:
    """As a data URI or by id; another picture, or another field, is another request."""
    media = (await client.post("/v1/media", content=png())).json()
    first = await client.post("/v1/answer", json=question(), headers=KEY)
    second = await client.post("/v1/answer", json=question(image={"id": media["id"]}), headers=KEY)
    assert first.json()["id"] == second.json()["id"]
    for other in ({"image": data_uri(png(color="blue"))}, {"seed": 1}, {"question": "And now?"}):
        refused = await client.post("/v1/answer", json=question(**other), headers=KEY)
        problem(refused, 422, "idempotency-key-reused")
    assert len(worker.jobs) == 1


async def test_a_refused_request_leaves_its_key_free(
    make_settings: MakeSettings, worker: StandInWorker, redis: Redis
) -> None:
    """A full queue, say; when there is room the same key works. A key that has its job needs no room."""
    worker.pause()
    line_up(redis)
    async with serving(make_settings(max_queue=1)) as client:
        refused = await client.post("/v1/answer", json=question(), headers=KEY)
        problem(refused, 429, "queue-full")
        assert int(refused.headers["retry-after"]) >= 1
        redis.delete(queue_name(MODEL))
        accepted = await client.post("/v1/answer", json=question(), headers=KEY | LATER)
        again = await client.post("/v1/answer", json=question(), headers=KEY | LATER)
        problem(await client.post("/v1/answer", json=question(), headers=LATER), 429, "queue-full")
    assert accepted.status_code == again.status_code == 202
    assert accepted.json()["id"] == again.json()["id"]


@pytest.mark.parametrize("refusal", [{"model": "none"}, {"image": data_uri(b"text")}])
async def test_after_a_refusal_the_key_may_be_used_for_something_else(
    client: httpx.AsyncClient, refusal: dict[str, str]
) -> None:
    """Nothing was accepted, so nothing is remembered."""
    assert (await client.post("/v1/answer", json=question(**refusal), headers=KEY)).status_code >= 400
    assert (await client.post("/v1/answer", json=question(), headers=KEY)).status_code == 200


async def test_a_full_queue_stores_no_media(
    make_settings: MakeSettings, worker: StandInWorker, redis: Redis
) -> None:
    """It refuses before the bytes are written."""
    worker.pause()
    line_up(redis)
    async with serving(make_settings(max_queue=1)) as client:
        problem(
            await client.post("/v1/answer", json=question(image=data_uri(encoded("BMP")))), 429, "queue-full"
        )
    assert list(redis.scan_iter("prism:media:*")) == []


async def test_jobs_and_keys_belong_to_the_key_that_made_them(
    make_settings: MakeSettings, worker: StandInWorker
) -> None:
    """Another's job is 404 in the words for no job at all; another's idempotency key is another key."""
    (alice, alices), (bob, bobs) = new_key("alice"), new_key("bob")
    by_alice, by_bob = bearer(alice), bearer(bob)
    async with serving(make_settings(api_keys=f"{alices},{bobs}")) as client:
        mine = (await client.post("/v1/answer", json=question(), headers=by_alice | KEY)).json()["id"]
        assert (await client.get(f"/v1/jobs/{mine}", headers=by_alice)).status_code == 200
        others = problem(await client.get(f"/v1/jobs/{mine}", headers=by_bob), 404, "unknown-job")
        nobodys = await client.get(f"/v1/jobs/job_{'0' * 26}", headers=by_bob)
        assert others == problem(nobodys, 404, "unknown-job")
        other = await client.post("/v1/answer", json=question(seed=1), headers=by_bob | KEY)
        assert other.status_code == 200
        assert other.json()["id"] != mine


@pytest.fixture
async def keys(make_settings: MakeSettings) -> AsyncIterator[Idempotency]:
    settings = make_settings()
    async with AsyncRedis.from_url(settings.broker_url, decode_responses=True) as connected:
        yield Idempotency(connected, settings)


async def test_a_claim_that_is_sent_twice_is_one(keys: Idempotency) -> None:
    """As where a connection breaks before the reply, and the command goes again."""
    assert await keys.begin("alice", "key", "same", "job_a") is None
    assert await keys.begin("alice", "key", "same", "job_a") is None
    with pytest.raises(IdempotencyBusyError):
        await keys.begin("alice", "key", "same", "job_b")


async def test_who_stored_media_for_too_long_makes_no_second_job(
    keys: Idempotency, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim that has run out may be another's; one that nobody took is held on."""
    monkeypatch.setattr(idempotency, "CLAIM_S", 0)
    assert await keys.begin("alice", "key", "same", "job_a") is None
    monkeypatch.setattr(idempotency, "CLAIM_S", 60)
    await keys.hold("alice", "key", "job_a")
    with pytest.raises(IdempotencyBusyError):
        await keys.begin("alice", "key", "same", "job_b")
    monkeypatch.setattr(idempotency, "CLAIM_S", 0)
    await keys.hold("alice", "key", "job_a")
    assert await keys.begin("alice", "key", "same", "job_b") is None
    with pytest.raises(IdempotencyBusyError):
        await keys.hold("alice", "key", "job_a")


async def test_the_claim_is_looked_at_after_the_media_are_stored(
    client: httpx.AsyncClient, worker: StandInWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first front end comes back from a slow store, and another has made the job meanwhile."""
    keep, slow = MediaStore.keep, iter([True])
    second: list[httpx.Response] = []

    async def overtaken(self: MediaStore, *args: Any) -> None:
        await keep(self, *args)
        if next(slow, False):
            second.append(await client.post("/v1/answer", json=question(), headers=KEY))

    monkeypatch.setattr(idempotency, "CLAIM_S", 0)
    monkeypatch.setattr(MediaStore, "keep", overtaken)
    first = await client.post("/v1/answer", json=question(), headers=KEY)
    problem(first, 409, "idempotency-key-busy")
    assert [reply.status_code for reply in second] == [200]
    assert len(worker.jobs) == 1

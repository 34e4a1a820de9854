"""Keys, queues and owners as callers meet them at the routes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from service.keys import new_key
from tests.service.conftest import (
    MODEL,
    StandInWorker,
    bearer,
    data_uri,
    encoded,
    png,
    problem,
    question,
    serving,
)
from worker.contract import queue_name

if TYPE_CHECKING:
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
    redis.lpush(queue_name(MODEL), "a job")
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
    redis.lpush(queue_name(MODEL), "a job")
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

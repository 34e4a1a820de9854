"""Which models are served: what the settings, the heartbeats and the time say."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from redis import Redis

from service.workers import FORGET_AFTER_S
from tests.service.conftest import MODEL, question, serving
from worker.contract import WORKERS_KEY

if TYPE_CHECKING:
    from tests.service.conftest import MakeSettings, StandInWorker


async def test_heartbeats_are_not_read_for_every_request(
    make_settings: MakeSettings, worker: StandInWorker, broker_url: str
) -> None:
    """A model whose worker was seen a moment ago is taken to be served: 64 heartbeats are not parsed anew."""
    worker.beat(model="other")
    async with serving(make_settings()) as client:
        with Redis.from_url(broker_url) as broker:
            broker.config_resetstat()
            for _ in range(3):
                body = question(model="other")
                response = await client.post("/v1/answer", json=body, headers={"Prefer": "respond-async"})
                assert response.status_code == 202
            assert broker.info("commandstats")["cmdstat_hvals"]["calls"] == 1


@pytest.mark.parametrize("beat", ["not json", "[]", '{"seen_at": null}', b"\xff"])
async def test_what_is_no_heartbeat_hides_no_worker(
    make_settings: MakeSettings, worker: StandInWorker, broker_url: str, beat: str | bytes
) -> None:
    """The hash is everyone's, of any version."""
    with Redis.from_url(broker_url) as broker:
        broker.hset(WORKERS_KEY, "odd", beat)
    async with serving(make_settings()) as client:
        assert f'prismprune_workers{{model="{MODEL}"}} 1.0' in (await client.get("/metrics")).text


async def test_a_model_of_the_settings_is_missed_before_a_worker_of_it_was_seen(
    make_settings: MakeSettings, worker: StandInWorker
) -> None:
    """503 and a zero in the metrics, where a model that nobody speaks of is 404 and has no series."""
    async with serving(make_settings(models="absent, other", worker_grace_s=0)) as client:
        named = await client.post("/v1/answer", json=question(model="absent"))
        assert (named.status_code, named.json()["type"].rsplit("/", 1)[1]) == (503, "no-worker")
        assert (await client.post("/v1/answer", json=question(model="unnamed"))).status_code == 404
        page = (await client.get("/metrics")).text
        counts = [line for line in page.splitlines() if line.startswith("prismprune_workers{")]
        assert counts == [
            'prismprune_workers{model="absent"} 0.0',
            'prismprune_workers{model="other"} 0.0',
            f'prismprune_workers{{model="{MODEL}"}} 1.0',
        ]


async def test_a_model_that_was_taken_away_is_forgotten(
    make_settings: MakeSettings, worker: StandInWorker
) -> None:
    """Its zero would be an alert that never ends."""
    worker.beat(model="old", age_s=FORGET_AFTER_S - 2)
    async with serving(make_settings()) as client:
        assert 'prismprune_workers{model="old"} 0.0' in (await client.get("/metrics")).text
        await asyncio.sleep(2.1)
        page = (await client.get("/metrics")).text
        assert 'model="old"' not in page
        assert f'prismprune_workers{{model="{MODEL}"}} 1.0' in page

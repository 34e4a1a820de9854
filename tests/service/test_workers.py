"""What a request costs the broker before it is admitted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from redis import Redis

from tests.service.conftest import question, serving

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

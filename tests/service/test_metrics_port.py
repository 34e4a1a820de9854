"""`PRISM_METRICS_PORT`: the numbers on a port of their own."""

from __future__ import annotations

import asyncio
import math
import socket
from typing import TYPE_CHECKING

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.__main__ import server
from service.serve.machine import free_ports
from tests.service.conftest import serving, until

if TYPE_CHECKING:
    from tests.service.conftest import MakeSettings, StandInWorker


async def test_metrics_move_to_a_port_of_their_own(
    make_settings: MakeSettings, worker: StandInWorker, port: int
) -> None:
    """They are there without a key, count what the other port did, and are gone from it and at the end."""
    key = f"me:{'0' * 64}"
    url = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(trust_env=False, base_url=url) as scraper:
        async with serving(make_settings(metrics_port=port, api_keys=key)) as client:
            assert (await client.get("/livez")).status_code == 200
            assert (await client.get("/metrics")).status_code in (401, 404)
            page = await scraper.get("/metrics")
            assert page.status_code == 200
            assert 'route="/livez"' in page.text
            assert 'prismprune_workers{model="prism-demo"} 1.0' in page.text
            assert (await scraper.get("/livez")).json() == {"status": "ok"}
            assert (await scraper.get("/readyz")).status_code == 404
        with pytest.raises(httpx.ConnectError):
            await scraper.get("/metrics")


async def test_a_port_in_use_is_told_at_start(make_settings: MakeSettings) -> None:
    """A front end that cannot be watched does not serve."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = make_settings(metrics_port=taken.getsockname()[1])
        with pytest.raises(OSError, match="in use"):
            async with serving(settings):
                pass


def connections(page: str) -> list[float]:
    """The open connections and their limit."""
    families = text_string_to_metric_families(page)
    values = {each.name: each.value for family in families for each in family.samples}
    return [values["prismprune_http_connections"], values["prismprune_http_connections_limit"]]


async def test_a_full_front_end_is_seen(make_settings: MakeSettings, worker: StandInWorker) -> None:
    """Its connections and how many it takes; what it refuses for their number is no request that counts."""
    main, beside = free_ports(2)
    running = server(make_settings(port=main, metrics_port=beside, max_connections=3))
    task = asyncio.create_task(running.serve())
    await until(lambda: running.started)
    try:
        async with httpx.AsyncClient(trust_env=False) as client:

            async def seen() -> list[float]:
                return connections((await client.get(f"http://127.0.0.1:{beside}/metrics")).text)

            assert await seen() == [0, 3]
            with socket.create_connection(("127.0.0.1", main)), socket.create_connection(("127.0.0.1", main)):
                await until(lambda: len(running.server_state.connections) == 2)
                assert await seen() == [2, 3]
                refused = await client.get(f"http://127.0.0.1:{main}/readyz", headers={"Connection": "close"})
                assert refused.status_code == 503
                page = (await client.get(f"http://127.0.0.1:{beside}/metrics")).text
                assert 'route="/readyz"' not in page
            await until(lambda: not running.server_state.connections)
            assert await seen() == [0, 3]
    finally:
        running.should_exit = True
        await task


async def test_connections_of_another_server_are_not_known(client: httpx.AsyncClient) -> None:
    """NaN, where 0 of 0 would be a statement."""
    page = (await client.get("/metrics")).text
    assert all(map(math.isnan, connections(page)))

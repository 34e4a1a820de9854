"""`PRISM_METRICS_PORT`: the numbers on a port of their own."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.service.conftest import serving

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

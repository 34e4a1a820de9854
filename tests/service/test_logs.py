"""What is logged, and above all what is not; and a broker that is silent."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING

import pytest

from service.ids import new_id
from service.keys import new_key
from service.logs import configure
from tests.service.conftest import StandInWorker, bearer, png, problem, question, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.service.conftest import MakeSettings

SECRET = "the-" + "quick-brown-fox"


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """The root logger, as it was found when the test is over."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(capture=False)


async def test_what_callers_say_is_not_logged(
    make_settings: MakeSettings,
    worker: StandInWorker,
    root_logger: logging.Logger,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Questions, media, keys and idempotency keys stay out of every line, at every level."""
    key, line = new_key("alice")
    settings = make_settings(log_format="json", log_level="debug", api_keys=line)
    configure(settings)
    headers = bearer(key) | {"Idempotency-Key": SECRET, "X-Request-Id": "find-me"}
    async with serving(settings) as client:
        for fields in ({}, {"token_budget": 0}, {"image": {"url": f"https://{SECRET}.example/"}}):
            await client.post("/v1/answer", json=question(question=SECRET, **fields), headers=headers)
        await client.post(f"/v1/{SECRET}", content=png(), headers=headers)
    said = capsys.readouterr().err
    lines = [json.loads(each) for each in said.splitlines()]
    assert [each["request_id"] for each in lines if each["logger"] == "service.middleware"] == ["find-me"] * 4
    assert SECRET not in said
    assert key not in said
    assert question()["image"][30:60] not in said


@pytest.fixture
async def silent() -> AsyncIterator[str]:
    """URL of a broker that takes connections and never says a word."""
    held = []

    async def hold(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)

    async with await asyncio.start_server(hold, "127.0.0.1", 0) as server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        for writer in held:
            writer.close()


@pytest.mark.parametrize("keys", [True, False])
async def test_a_silent_broker_is_503_everywhere(
    make_settings: MakeSettings, silent: str, keys: bool
) -> None:
    """Frozen or black-holed rather than closed: every route that needs it says so, none waits for it."""
    key, line = new_key("alice")
    settings = make_settings(broker_url=silent, broker_timeout_s=0.2, api_keys=line if keys else "")
    headers = bearer(key) if keys else {}
    async with serving(settings) as client, asyncio.timeout(30):
        for method, path, sent in (
            ("POST", "/v1/answer", {"json": question()}),
            ("POST", "/v1/media", {"content": png()}),
            ("GET", f"/v1/jobs/{new_id('job')}", {}),
        ):
            response = await client.request(method, path, headers=headers, **sent)
            problem(response, 503, "broker-away")
            assert response.headers["retry-after"] == "2"
        assert (await client.get("/livez")).status_code == 200
        health = await client.get("/healthz", headers=headers)
        assert (health.status_code, health.headers["retry-after"]) == (503, "5")

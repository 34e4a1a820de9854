"""OpenAI's own clients, both of them, where they are refused, told to come again, or lose patience."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import openai
import pytest

from service.keys import new_key
from tests.replies import state
from tests.service.conftest import MODEL, data_uri, line_up, listening, png, until
from tests.service.test_chat import client, messages
from worker.contract import JobState

if TYPE_CHECKING:
    from redis import Redis

    from tests.service.conftest import MakeSettings, StandInWorker


async def test_the_synchronous_client_does_all_that_the_other_does(
    make_settings: MakeSettings, worker: StandInWorker
) -> None:
    """An answer with its budget and usage, a stream, the models, and an error of its own."""

    def use(port: int) -> None:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as official:
            asked: Any = {"model": MODEL, "messages": messages()}
            reply = official.chat.completions.create(**asked, extra_body={"token_budget": 64})
            assert reply.choices[0].message.content == "red"
            assert reply.usage is not None
            assert reply.usage.prompt_tokens_details is not None
            assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
            assert reply.usage.prompt_tokens_details.cached_tokens == 0
            asked["messages"] = messages(text="stream")
            chunks = list(official.chat.completions.create(**asked, stream=True))
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "red"
            assert [model.id for model in official.models.list()] == [MODEL]
            assert official.models.retrieve(MODEL).id == MODEL
            with pytest.raises(openai.NotFoundError):
                official.chat.completions.create(**(asked | {"model": "gpt-none"}))

    async with listening(make_settings()) as port:
        await asyncio.to_thread(use, port)
    assert [job.token_budget for job in worker.jobs] == [64, None]


async def test_a_full_queue_is_openais_rate_limit_error(
    make_settings: MakeSettings, worker: StandInWorker, redis: Redis
) -> None:
    """With the seconds after which its own retries come again."""
    worker.pause()
    line_up(redis)
    async with listening(make_settings(max_queue=1)) as port, client(port) as official:
        with pytest.raises(openai.RateLimitError) as raised:
            await official.chat.completions.create(model=MODEL, messages=messages())
    assert raised.value.code == "queue-full"
    assert int(raised.value.response.headers["retry-after"]) >= 1


async def test_a_key_that_asks_too_often_is_retried_by_the_client_itself(
    make_settings: MakeSettings, worker: StandInWorker
) -> None:
    """Without retries it is a `RateLimitError`; with them, after `Retry-After`, the answer."""
    del worker
    key, line = new_key("alice")
    settings = make_settings(api_keys=line, rate_per_minute=60, rate_burst=1)
    asked: Any = {"model": MODEL, "messages": messages()}
    async with listening(settings) as port, client(port, key) as official:
        await official.chat.completions.create(**asked)
        with pytest.raises(openai.RateLimitError) as raised:
            await official.chat.completions.create(**asked)
        assert raised.value.code == "rate-limited"
        reply = await official.with_options(max_retries=2).chat.completions.create(**asked)
    assert reply.choices[0].message.content == "red"


async def test_a_broker_that_is_away_is_openais_server_error(
    make_settings: MakeSettings, nowhere: str
) -> None:
    """503 with `Retry-After`, for a question and for the models alike."""
    async with listening(make_settings(broker_url=nowhere)) as port, client(port) as official:
        for call in (
            official.chat.completions.create(model=MODEL, messages=messages()),
            official.models.retrieve(MODEL),
        ):
            with pytest.raises(openai.InternalServerError) as raised:
                await call
            assert raised.value.status_code == 503
            assert int(raised.value.response.headers["retry-after"]) >= 1


async def test_a_client_that_loses_patience_ends_its_job(
    make_settings: MakeSettings, worker: StandInWorker, redis: Redis
) -> None:
    """Its timeout closes the connection, and the worker is free."""
    async with listening(make_settings()) as port, client(port) as official:
        with pytest.raises(openai.APITimeoutError):
            await official.with_options(timeout=0.5).chat.completions.create(
                model=MODEL, messages=messages(text="for ever")
            )
        await until(lambda: worker.jobs and state(redis, worker.jobs[0].id) is JobState.CANCELED)


async def test_a_body_that_is_no_json_is_openais_bad_request(
    make_settings: MakeSettings, worker: StandInWorker
) -> None:
    """400, in the shape that the client reads the message from."""
    del worker
    async with listening(make_settings()) as port, client(port) as official:
        with pytest.raises(openai.BadRequestError, match="not valid JSON") as raised:
            await official.post("/chat/completions", cast_to=object, content=b"{")
    assert raised.value.code == "malformed-body"


async def test_a_body_over_the_limit_is_said_to_be(
    make_settings: MakeSettings, worker: StandInWorker
) -> None:
    """413 with its slug, though no more of the body is read."""
    del worker
    asked = messages(data_uri(png() + bytes(200_000)))
    async with listening(make_settings(max_json_bytes=100_000)) as port, client(port) as official:
        with pytest.raises(openai.APIStatusError) as raised:
            await official.chat.completions.create(model=MODEL, messages=asked)
    assert (raised.value.status_code, raised.value.code) == (413, "body-too-large")

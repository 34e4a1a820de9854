"""OpenAI's own client against a front end on a real port, with a stand-in for the worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import openai
import pytest

from service.jobs import Jobs
from service.keys import new_key
from tests.replies import state
from tests.service.conftest import MODEL, data_uri, listening, png, serving, until
from worker.contract import JobState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx
    from redis import Redis

    from service.jobs import JobRecord
    from tests.service.conftest import MakeSettings, StandInWorker


@pytest.fixture
async def api(make_settings: MakeSettings, worker: StandInWorker) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client, unchanged."""
    del worker
    async with listening(make_settings()) as port, client(port) as official:
        yield official


def client(port: int, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=60)


def messages(*urls: str, text: str = "What color is it?", kind: str = "image_url") -> list[Any]:
    media = [{"type": kind, kind: {"url": url}} for url in urls or (data_uri(png()),)]
    return [{"role": "user", "content": [*media, {"type": "text", "text": text}]}]


async def test_an_image_is_asked_about_with_a_budget(api: openai.AsyncOpenAI, worker: StandInWorker) -> None:
    """The answer, its usage, and what was kept beside it; the budget reaches the job."""
    reply = await api.chat.completions.create(
        model=MODEL, messages=messages(), max_tokens=8, temperature=0, extra_body={"token_budget": 64}
    )
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("red", "stop")
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (90, 2)
    assert reply.model_extra is not None
    assert reply.model_extra["prismprune"]["visual_tokens"]["kept"] == 64
    (job,) = worker.jobs
    assert (job.token_budget, job.generation.max_new_tokens, job.questions) == (64, 8, ("What color is it?",))


async def test_system_messages_stop_strings_and_several_images(
    api: openai.AsyncOpenAI, worker: StandInWorker
) -> None:
    """What OpenAI's fields say is what the job asks."""
    asked = messages(data_uri(png()), data_uri(png(color="blue")))
    await api.chat.completions.create(
        model=MODEL,
        messages=[{"role": "system", "content": "Be brief."}, *asked],
        stop="\n",
        seed=3,
        top_p=0.5,
    )
    (job,) = worker.jobs
    assert len(job.media) == 2
    assert job.generation.model_dump() | {"max_new_tokens": 0} == {
        "max_new_tokens": 0,
        "temperature": 0,
        "top_p": 0.5,
        "seed": 3,
        "stop": ("\n",),
        "system": "Be brief.",
    }


async def test_the_text_is_streamed_with_its_usage(api: openai.AsyncOpenAI, worker: StandInWorker) -> None:
    """Pieces that spell the answer, the reason of its end, and the usage if it was asked for."""
    stream = await api.chat.completions.create(
        model=MODEL,
        messages=messages(text="stream"),
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == "red"
    assert len([piece for piece in pieces if piece]) == 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        "stop"
    ]
    assert [chunk.usage.total_tokens for chunk in chunks if chunk.usage] == [92]
    assert worker.jobs[0].stream


async def test_a_job_that_runs_again_says_its_words_once(api: openai.AsyncOpenAI) -> None:
    """The worker is lost after two letters; the next one begins anew."""
    stream = await api.chat.completions.create(model=MODEL, messages=messages(text="again"), stream=True)
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == "red"


async def test_an_error_in_the_middle_of_a_stream_is_raised(api: openai.AsyncOpenAI) -> None:
    """The client raises what the stream says."""
    stream = await api.chat.completions.create(model=MODEL, messages=messages(text="expire"), stream=True)
    with pytest.raises(openai.APIError, match="deadline passed"):
        _ = [chunk async for chunk in stream]


@pytest.mark.parametrize(
    ("changes", "error", "code"),
    [
        ({"model": "gpt-none"}, openai.NotFoundError, "unknown-model"),
        (
            {"messages": [{"role": "user", "content": "No picture?"}]},
            openai.UnprocessableEntityError,
            "invalid-request",
        ),
        (
            {"messages": messages("data:image/png;base64,AAAA")},
            openai.APIStatusError,
            "unsupported-media-type",
        ),
        (
            {"messages": messages("https://example.org/a.png")},
            openai.UnprocessableEntityError,
            "url-not-allowed",
        ),
        ({"extra_body": {"token_budget": 0}}, openai.UnprocessableEntityError, "invalid-budget"),
        ({"extra_body": {"method": "none"}}, openai.UnprocessableEntityError, "unknown-method"),
        ({"n": 2}, openai.UnprocessableEntityError, "invalid-request"),
        ({"logprobs": True}, openai.UnprocessableEntityError, "invalid-request"),
        ({"frequency_penalty": 1.0}, openai.UnprocessableEntityError, "invalid-request"),
        ({"messages": [*messages(), *messages()]}, openai.UnprocessableEntityError, "invalid-request"),
        ({"messages": messages(text="expire")}, openai.APIStatusError, "deadline-exceeded"),
    ],
)
async def test_errors_are_openais(
    api: openai.AsyncOpenAI, changes: dict[str, Any], error: type[openai.APIStatusError], code: str
) -> None:
    """The client's own exceptions, with the problem's slug as code."""
    with pytest.raises(error) as raised:
        await api.chat.completions.create(**({"model": MODEL, "messages": messages()} | changes))
    assert raised.value.code == code


TEXT = {"type": "text", "text": "What color is it?"}
PICTURE = {"type": "image_url", "image_url": {"url": data_uri(png())}}


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"max_tokens": 1025}, "max_tokens", "max_tokens: Input should be less than or equal to 1024"),
        (
            {"max_completion_tokens": 1025},
            "max_completion_tokens",
            "max_completion_tokens: Input should be less than or equal to 1024",
        ),
        ({"messages": user(PICTURE)}, "messages", "messages: the user message has no text"),
        (
            {"messages": user(PICTURE, TEXT | {"text": " "})},
            "messages",
            "messages: the user message has no text",
        ),
        ({"messages": user(TEXT)}, "messages", "messages: the user message has no picture and no video"),
        (
            {"messages": user(TEXT | {"text": "x" * 16_385}, PICTURE)},
            "messages",
            "messages: String should have at most 16384 characters",
        ),
        (
            {"messages": user(TEXT | {"text": 7}, PICTURE)},
            "messages",
            "messages.0.content.0.text: Input should be a valid string",
        ),
        (
            {"messages": user({"type": "image_url", "image_url": {}}, TEXT)},
            "messages",
            "messages.0.content.0.image_url.url: Field required",
        ),
        (
            {"messages": user({"type": ["audio"]}, TEXT)},
            "messages",
            "messages.0.content.0: must be of type text, image_url or video_url",
        ),
        (
            {"messages": [{"role": "user", "content": 7}]},
            "messages",
            "messages.0.content: must be a text or a list of parts",
        ),
        (
            {"messages": user(PICTURE | {"image_url": {"url": "data:image/png;base64,####"}}, TEXT)},
            "messages",
            "messages: the data URI is not valid base64",
        ),
        ({"messages": user(*[PICTURE] * 9, TEXT)}, "messages", "messages: at most 8 images in one request"),
        ({"messages": []}, "messages", "messages: List should have at least 1 item, not 0"),
        ({"stop": ["a"] * 17}, "stop", "stop: List should have at most 16 items, not 17"),
        ({"stop": 7}, "stop", "stop: must be a text or a list of texts"),
        ({"stop": ["a", 7]}, "stop", "stop.1: Input should be a valid string"),
        ({"token_budget": "many"}, "token_budget", "token_budget: must be"),
        ({"tools": [{"type": "function"}]}, "tools", "tools: is not supported here"),
        ({"n": 2}, "n", "n: "),
        ({"model": "gpt-none"}, None, ""),
    ],
)
async def test_an_error_names_what_was_sent(
    client: httpx.AsyncClient, worker: StandInWorker, changes: dict[str, Any], param: str | None, message: str
) -> None:
    """In OpenAI's words, with the field as `param`, and nothing of what checks it."""
    asked = {"model": MODEL, "messages": user(PICTURE, TEXT)} | changes
    response = await client.post("/v1/chat/completions", json=asked)
    assert response.status_code in (404, 422)
    error = response.json()["error"]
    assert error["message"].startswith(message)
    assert error["param"] == param
    assert not any(
        leak in response.text for leak in ("tuple", "Tuple", "union", "-part", "as-", "validation")
    )
    assert worker.jobs == []


async def test_an_operators_limit_is_told_in_the_same_words(
    make_settings: MakeSettings, worker: StandInWorker
) -> None:
    """And who does not name it is answered within it."""
    asked = {"model": MODEL, "messages": user(PICTURE, TEXT)}
    async with serving(make_settings(max_new_tokens=32)) as client:
        refused = await client.post("/v1/chat/completions", json=asked | {"max_tokens": 33})
        assert refused.json()["error"]["message"] == "max_tokens: at most 32 here"
        assert (await client.post("/v1/chat/completions", json=asked)).status_code == 200
    assert [job.generation.max_new_tokens for job in worker.jobs] == [32]


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("part", [PICTURE, {"type": "video_url", "video_url": {"url": "data:,"}}])
async def test_a_picture_before_the_user_message_is_refused(
    client: httpx.AsyncClient, worker: StandInWorker, role: str, part: dict[str, Any]
) -> None:
    """It would be seen by nobody."""
    before = {"role": role, "content": [TEXT, part]}
    asked = {"model": MODEL, "messages": [before, *user(PICTURE, TEXT)]}
    response = await client.post("/v1/chat/completions", json=asked)
    assert response.status_code == 422
    assert "belong into the user message" in response.json()["error"]["message"]
    assert worker.jobs == []


NOTHING: dict[str, list[Any]] = {
    "tools": [None, []],
    "tool_choice": [None, "none", "auto"],
    "parallel_tool_calls": [None, True, False],
    "functions": [None, []],
    "function_call": [None, "none", "auto"],
    "logit_bias": [None, {}],
    "top_logprobs": [None, 0],
    "modalities": [None, ["text"]],
    "reasoning_effort": [None, "none"],
    "audio": [None],
    "prediction": [None],
    "verbosity": [None],
    "web_search_options": [None],
    "prompt_cache_key": [None, "mine"],
    "stop": [None],
    "response_format": [None, {"type": "text"}],
}


async def test_a_field_that_asks_for_nothing_is_taken(
    client: httpx.AsyncClient, worker: StandInWorker
) -> None:
    """Null, or what stands for the same; clients write all of their fields out."""
    asked = {"model": MODEL, "messages": user(PICTURE, TEXT)}
    for number in range(3):
        neutral = {name: values[number] for name, values in NOTHING.items() if number < len(values)}
        response = await client.post("/v1/chat/completions", json=asked | neutral)
        assert response.status_code == 200, response.text
    assert len(worker.jobs) == 3


@pytest.mark.parametrize(
    "asks",
    [
        {"tool_choice": "required"},
        {"logit_bias": {"50256": -100}},
        {"top_logprobs": 2},
        {"modalities": ["text", "audio"]},
        {"reasoning_effort": "high"},
        {"audio": {"voice": "alloy", "format": "wav"}},
        {"nobody_knows": None},
    ],
)
async def test_a_field_that_asks_for_something_is_refused(
    client: httpx.AsyncClient, worker: StandInWorker, asks: dict[str, Any]
) -> None:
    """And not ignored."""
    asked = {"model": MODEL, "messages": user(PICTURE, TEXT)}
    response = await client.post("/v1/chat/completions", json=asked | asks)
    assert response.status_code == 422
    assert response.json()["error"]["message"].startswith(next(iter(asks)))
    assert worker.jobs == []


async def test_a_chat_waits_no_longer_than_anybody_may(
    make_settings: MakeSettings, worker: StandInWorker
) -> None:
    """`max_timeout_s` bounds the default, too."""
    del worker
    asked = {"model": MODEL, "messages": user(PICTURE, TEXT | {"text": "for ever"})}
    async with serving(make_settings(timeout_s=60, max_timeout_s=0.2)) as client:
        response = await client.post("/v1/chat/completions", json=asked)
    assert response.status_code == 504
    assert "within 0.2 s" in response.json()["error"]["message"]


async def test_a_wait_that_runs_out_ends_the_job(
    make_settings: MakeSettings, worker: StandInWorker, redis: Redis
) -> None:
    """504, never 202, and nobody goes on working."""
    async with listening(make_settings(timeout_s=0.2)) as port, client(port) as official:
        with pytest.raises(openai.InternalServerError) as raised:
            await official.chat.completions.create(model=MODEL, messages=messages(text="for ever"))
    assert (raised.value.status_code, raised.value.code) == (504, "deadline-exceeded")
    (job,) = worker.jobs
    assert state(redis, job.id) is JobState.CANCELED


async def test_an_answer_that_comes_as_the_wait_runs_out_is_given(
    make_settings: MakeSettings, redis: Redis, worker: StandInWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Canceling is too late then, and says so."""
    del worker

    async def just_too_short(_: Jobs, record: JobRecord, __: float) -> JobRecord:
        await until(lambda: state(redis, record.id) is JobState.SUCCEEDED)
        return record

    monkeypatch.setattr(Jobs, "wait", just_too_short)
    async with listening(make_settings()) as port, client(port) as official:
        answer = await official.chat.completions.create(model=MODEL, messages=messages())
    assert answer.choices[0].message.content == "red"


async def test_a_wrong_key_is_openais_authentication_error(
    make_settings: MakeSettings, worker: StandInWorker
) -> None:
    """And the right one is served."""
    del worker
    key, line = new_key("alice")
    async with listening(make_settings(api_keys=line)) as port:
        async with client(port, "wrong") as stranger:
            with pytest.raises(openai.AuthenticationError):
                await stranger.chat.completions.create(model=MODEL, messages=messages())
        async with client(port, key) as alice:
            reply = await alice.chat.completions.create(model=MODEL, messages=messages())
    assert reply.choices[0].message.content == "red"


async def test_models_are_listed_as_openai_does(api: openai.AsyncOpenAI) -> None:
    """By the client's own calls, with methods and budget beside; an unknown one is its NotFoundError."""
    (model,) = [model async for model in api.models.list()]
    assert (model.id, model.object) == (MODEL, "model")
    assert model.model_extra is not None
    assert model.model_extra["default_token_budget"] == 64
    assert (await api.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError):
        await api.models.retrieve("org/none")

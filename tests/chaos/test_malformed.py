"""Malformed input at scale: no 5xx, no hang, no growth of memory, one terminal state for each job.

Through a real front end and queue; a stand-in takes the jobs and really decodes their media, as a worker
does. `--malformed full` has the full numbers; the seed is the case's number, so that each can be seen again.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from prismprune.errors import PrismError
from prismprune.media import DEFAULT_LIMITS
from tests.chaos import malformed
from tests.replies import state
from tests.service.conftest import StandInWorker, serving
from worker.answering import decode
from worker.errors import problem
from worker.store import MediaStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    import httpx
    from kombu.message import Message
    from redis import Redis

    from tests.service.conftest import MakeSettings
    from worker.contract import AnswerJob, Problem

    Note = Callable[[str, object], None]
    Case = Callable[[random.Random], dict[str, Any]]
    Answered = Callable[[str, Case], Awaitable[Counter[int]]]

AT_ONCE = 8
WITHIN_S = 60
"""A case that takes longer hangs."""
GROWTH_BYTES = 64 * 1024 * 1024
SHORT = {"pictures": 300, "videos": 12, "requests": 300}
FULL = {"pictures": 10_000, "videos": 1_000, "requests": 5_000}


class Decoder(StandInWorker):
    """Decodes each job's media as a worker does; keeps of the jobs no more than their ids."""

    def __init__(self, broker_url: str, media: Path) -> None:
        super().__init__(broker_url, media)
        self.ids: list[str] = []

    def _take(self, message: Message) -> AnswerJob:
        job = super()._take(message)
        self.ids.append(job.id)
        self.jobs.clear()
        self.messages.clear()
        return job

    def _undecodable(self, job: AnswerJob) -> Problem | None:
        try:
            decode(job, MediaStore(self._media.as_uri()), DEFAULT_LIMITS)
        except PrismError as error:
            return problem(error)
        return None


@pytest.fixture
def scale(request: pytest.FixtureRequest) -> dict[str, int]:
    """How many cases of each kind."""
    return FULL if request.config.getoption("--malformed", default="short") == "full" else SHORT


@pytest.fixture
def decoder(broker_url: str, media_directory: Path) -> Iterator[Decoder]:
    with Decoder(broker_url, media_directory) as stand_in:
        yield stand_in


@pytest.fixture
async def client(make_settings: MakeSettings, decoder: Decoder) -> AsyncIterator[httpx.AsyncClient]:
    """Its workers' grace is long: the stand-in beats once."""
    async with serving(make_settings(worker_grace_s=24 * 3600)) as front_end:
        yield front_end


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Note:
    """Keeps what was seen with the test's report, from which `make chaos` writes its page."""
    return lambda name, value: request.node.user_properties.append((name, value))


async def run(client: httpx.AsyncClient, count: int, case: Case, note: Note) -> Counter[int]:
    """Sends `count` cases, some at once; their statuses. Memory may not grow after a third of them."""
    process, numbers = psutil.Process(), iter(range(count))
    statuses, settled, slowest_s = Counter[int](), [0], [0.0]

    async def caller() -> None:
        for number in numbers:
            if number == count // 3:
                settled[0] = process.memory_info().rss
            began = time.monotonic()
            async with asyncio.timeout(WITHIN_S):
                response = await client.request(**case(random.Random(number)))
            slowest_s[0] = max(slowest_s[0], time.monotonic() - began)
            statuses[response.status_code] += 1
            assert response.status_code < 500, (number, response.text)
            if response.status_code >= 400:
                assert "Traceback" not in response.text, number

    await asyncio.gather(*(caller() for _ in range(AT_ONCE)))
    grown = process.memory_info().rss - settled[0]
    assert grown < GROWTH_BYTES, f"{grown} bytes more than after a third of the cases"
    note("cases", count)
    note("by status", {status: statuses[status] for status in sorted(statuses)})
    note("slowest, s", round(slowest_s[0], 1))
    note("grown after a third of them, MiB", round(grown / 2**20, 1))
    return statuses


async def ended(redis: Redis, decoder: Decoder) -> None:
    """Every job that was accepted has a terminal state, and none was taken twice."""
    ids = {str(key).removeprefix("prism:job:") for key in redis.scan_iter("prism:job:*", 1000, _type="hash")}
    async with asyncio.timeout(WITHIN_S):
        while not all(state(redis, job_id).terminal for job_id in ids):  # noqa: ASYNC110 -- it is Redis' state
            await asyncio.sleep(0.02)
    assert decoder.ids
    assert ids >= set(decoder.ids)
    assert len(set(decoder.ids)) == len(decoder.ids)


@pytest.fixture
def answered(
    client: httpx.AsyncClient, decoder: Decoder, redis: Redis, scale: dict[str, int], note: Note
) -> Answered:
    """Sends as many cases as the scale has of their kind; their statuses, once every job has ended."""

    async def send(kind: str, case: Case) -> Counter[int]:
        statuses = await run(client, scale[kind], case, note)
        await ended(redis, decoder)
        return statuses

    return send


def post(body: dict[str, Any]) -> dict[str, Any]:
    return {"method": "POST", "url": "/v1/answer", "json": body}


@pytest.mark.timeout(7200)
async def test_broken_pictures(answered: Answered) -> None:
    """Refused at the door, failed by the worker, or answered: some of each."""
    goods = malformed.pictures()
    statuses = await answered(
        "pictures", lambda rng: post(malformed.with_picture(malformed.broken(goods, rng)))
    )
    assert set(statuses) <= {200, 413, 415, 422}
    assert min(statuses[200], statuses[415], statuses[422]) > 0


@pytest.mark.timeout(14400)
async def test_broken_videos(answered: Answered) -> None:
    """Each is decoded in a process of its own, whose end costs that job alone."""
    goods = malformed.videos()
    statuses = await answered("videos", lambda rng: post(malformed.with_video(malformed.broken(goods, rng))))
    assert set(statuses) <= {200, 413, 415, 422}
    assert statuses[422] > 0


@pytest.mark.timeout(7200)
async def test_broken_requests(answered: Answered) -> None:
    """Whatever the route, the headers and the fields: a refusal of the caller's, or an answer."""
    statuses = await answered("requests", malformed.request)
    assert {202, 400, 404, 405, 415, 422} <= set(statuses)

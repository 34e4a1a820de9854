"""A front end on a real broker, and a stand-in for the worker that keeps to the contract."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Self

import httpx
import pytest
import uvicorn
from kombu.connection import Connection
from kombu.entity import Queue
from PIL import Image
from redis import Redis

from service.app import create_app
from service.settings import ServiceSettings
from worker.contract import (
    TASK_ANSWER,
    WORKERS_KEY,
    AnswerItem,
    AnswerJob,
    AnswerResult,
    EndedData,
    EventName,
    JobEvent,
    JobState,
    Memory,
    Problem,
    PromptTokensDetails,
    StartedData,
    Timings,
    TokenData,
    TokenMapPart,
    Usage,
    VisualTokens,
    WorkerStatus,
    events_channel,
    events_key,
    job_key,
    media_path,
    open_jobs_key,
    queue_name,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from fastapi import FastAPI
    from kombu.message import Message as Delivery
    from pydantic import BaseModel
    from starlette.types import Message

    MakeSettings = Callable[..., ServiceSettings]

MODEL = "prism-demo"
USAGE = Usage(
    prompt_tokens=90,
    completion_tokens=2,
    total_tokens=92,
    prompt_tokens_details=PromptTokensDetails(image_tokens=64, video_tokens=0),
)


def png(width: int = 32, height: int = 24, color: str = "red") -> bytes:
    """A picture of one color."""
    return encoded("PNG", width, height, color)


def encoded(image_format: str, width: int = 32, height: int = 24, color: str = "red") -> bytes:
    """A picture of one color in any format that Pillow writes."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, image_format)
    return buffer.getvalue()


MP4 = b"\x00\x00\x00\x18ftypmp42" + bytes(100)
"""The first bytes of a video, which is all that the front end looks at."""


def data_uri(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def question(**fields: Any) -> dict[str, Any]:
    """A request that is answered; `fields` replace its own."""
    return {"image": data_uri(png()), "question": "What color is it?", **fields}


class StandInWorker(threading.Thread):
    """Takes jobs off the real queue and ends them as the contract says; a question may ask for more.

    "for ever" runs until `release` is set; "stream" is answered letter by letter, "again" loses its worker
    after two letters; the media are really read and decoded. A canceled job is left as it is.
    """

    def __init__(self, broker_url: str, media: Path) -> None:
        super().__init__(daemon=True)
        self._connection = Connection(broker_url)
        self._redis = Redis.from_url(broker_url, decode_responses=True)
        self._media = media
        self._stopped = threading.Event()
        self._taking = threading.Event()
        self._taking.set()
        self.release = threading.Event()
        self.jobs: list[AnswerJob] = []
        self.messages: list[dict[str, Any]] = []

    def run(self) -> None:
        queue, held = Queue(queue_name(MODEL)), list[AnswerJob]()
        with self._connection, self._connection.channel() as channel:
            while not self._stopped.wait(0.002):
                if not self._taking.is_set():
                    continue
                if (message := queue(channel).get(accept=["json"])) is not None:
                    held.append(self._take(message))
                for job in [job for job in held if job.questions[0] != "for ever" or self.release.is_set()]:
                    held.remove(job)
                    self._end(job)

    def pause(self) -> None:
        """Leaves the broker alone until `go_on`."""
        self._taking.clear()
        time.sleep(0.05)

    def go_on(self) -> None:
        self._taking.set()

    def __enter__(self) -> Self:
        self.beat()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self.join()
        self._redis.close()

    def beat(self, *, warm: bool = True, model: str = MODEL, age_s: float = 0) -> None:
        """Writes a heartbeat that is `age_s` old."""
        status = WorkerStatus(
            worker_id=f"stand-in-{model}",
            model=model,
            family="llava",
            device="cpu",
            modalities=("image", "video"),
            methods=("prism",),
            default_token_budget=64,
            warm=warm,
            jobs_running=0,
            seen_at=time.time() - age_s,
        )
        self._redis.hset(WORKERS_KEY, status.worker_id, status.model_dump_json())

    def _take(self, message: Delivery) -> AnswerJob:
        message.ack()
        assert message.headers["task"] == TASK_ANSWER
        job = AnswerJob.model_validate(message.payload[0][0])
        assert message.headers["id"] == job.id
        assert self._redis.hget(job_key(job.id), "state") == JobState.QUEUED
        self.messages.append(message.headers)
        self.jobs.append(job)
        self._publish(job, JobState.RUNNING, {"started_at": time.time(), "attempts": 1})
        for text, attempt in {"stream": [("red", 1)], "again": [("re", 1), ("red", 2)]}.get(
            job.questions[0], ()
        ):
            self.tell(job, EventName.STARTED, StartedData(attempt=attempt))
            for letter in text:
                self.tell(job, EventName.TOKEN, TokenData(question=0, text=letter))
        return job

    def tell(self, job: AnswerJob, event: EventName, data: BaseModel) -> None:
        """As a worker's attempt does."""
        self._redis.xadd(events_key(job.id), {"event": event, "data": data.model_dump_json()})
        more = JobEvent(state=JobState.RUNNING, at=time.time())
        self._redis.publish(events_channel(job.id), more.model_dump_json())

    def _end(self, job: AnswerJob) -> None:
        if self._redis.hget(job_key(job.id), "state") == JobState.CANCELED:
            return
        error = self._undecodable(job)
        if job.questions[0] == "expire":
            self._publish(job, JobState.EXPIRED, {"finished_at": time.time()})
        elif error:
            ended = {"finished_at": time.time(), "error": error.model_dump_json()}
            self._publish(job, JobState.FAILED, ended)
        else:
            ended = {"finished_at": time.time(), "result": result(job).model_dump_json()}
            self._publish(job, JobState.SUCCEEDED, ended)

    def _undecodable(self, job: AnswerJob) -> Problem | None:
        for ref in job.media if job.modality == "image" else ():
            try:
                Image.open(self._media / media_path(ref.id)).load()
            except OSError:
                return Problem(
                    slug="undecodable-media",
                    status=422,
                    title="Media cannot be decoded",
                    detail="The image ends early.",
                )
        return None

    def _publish(self, job: AnswerJob, state: JobState, fields: dict[str, Any]) -> None:
        with self._redis.pipeline(transaction=True) as pipe:
            for name, value in {"state": state.value, **fields}.items():
                pipe.hset(job_key(job.id), name, value)
            # At once, as a worker does: a reader takes an end without its event for a lost one.
            if state.terminal:
                end = EndedData(id=job.id, state=state).model_dump_json()
                pipe.xadd(events_key(job.id), {"event": EventName.of_end(state), "data": end})
            pipe.publish(events_channel(job.id), JobEvent(state=state, at=time.time()).model_dump_json())
            pipe.execute()


def result(job: AnswerJob) -> AnswerResult:
    """What the contract says about an answer to `job` with 64 of 576 tokens."""
    item = AnswerItem(answer="red", finish_reason="stop", usage=USAGE)
    token_map = TokenMapPart(
        media=0,
        crop=0,
        frame=None,
        time_s=None,
        grid=(24, 24),
        box=(0, 0, 32, 24),
        salient=(1,),
        diverse=(2,),
    )
    visual = VisualTokens(original=576, kept=64, salient=32, diverse=32, budget=64, method="prism")
    return AnswerResult(
        id=job.id,
        model=job.model,
        **({"answers": (item,) * len(job.questions)} if job.several else item.__dict__),
        visual_tokens=visual if job.method == "prism" else visual.model_copy(update={"salient": None}),
        timings=Timings(**dict.fromkeys(Timings.model_fields, 1.0)),
        memory=Memory(device="cpu", peak_bytes=1, shared_with=0, kv_cache_bytes=1),
        token_map=(token_map,) if job.include else None,
    )


@pytest.fixture
def media_directory(tmp_path: Path) -> Path:
    return tmp_path / "media store"


@pytest.fixture
def make_settings(broker_url: str, media_directory: Path) -> MakeSettings:
    """Makes the settings of a front end on the test's broker and store."""

    def make(**fields: Any) -> ServiceSettings:
        defaults: dict[str, Any] = {
            "broker_url": broker_url,
            "media_url": media_directory.as_uri(),
            "broker_timeout_s": 5,
        }
        return ServiceSettings(**(defaults | fields))

    return make


@pytest.fixture
def worker(broker_url: str, media_directory: Path) -> Iterator[StandInWorker]:
    """A warm stand-in for the worker of the default model."""
    with StandInWorker(broker_url, media_directory) as stand_in:
        yield stand_in


@asynccontextmanager
async def serving(settings: ServiceSettings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a front end with `settings`, in this process."""
    app = create_app(settings)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://front-end", timeout=60) as client,
    ):
        yield client


@asynccontextmanager
async def listening(settings: ServiceSettings) -> AsyncIterator[int]:
    """The port of a front end with `settings`, in this process and its loop."""
    server = uvicorn.Server(uvicorn.Config(create_app(settings), port=0, log_level="warning"))
    task = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 -- uvicorn has no event for it
        await asyncio.sleep(0.01)
    try:
        yield _port(server)
    finally:
        server.should_exit = True
        await task


@contextmanager
def listening_in_a_thread(settings: ServiceSettings) -> Iterator[int]:
    """The port of a front end with `settings`, in this process and a loop of its own."""
    server = uvicorn.Server(uvicorn.Config(create_app(settings), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    try:
        yield _port(server)
    finally:
        server.should_exit = True
        thread.join()


def _port(server: uvicorn.Server) -> int:
    return int(server.servers[0].sockets[0].getsockname()[1])


async def until(condition: Callable[[], Any], within_s: float = 60) -> None:
    """Waits for `condition()`; a hang becomes a failure, a slow machine does not."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 -- it is another process' state, or another thread's
            await asyncio.sleep(0.01)


async def exchanged(app: FastAPI, scope: dict[str, Any], *received: Message) -> list[Message]:
    """What `app` sends to a caller of whom nothing but `scope` and these messages arrives."""
    messages = iter(received)
    sent: list[Message] = []

    async def receive() -> Message:
        return next(messages)

    async def send(message: Message) -> None:
        sent.append(message)

    request = {"type": "http", "headers": [], "query_string": b"", **scope}
    async with app.router.lifespan_context(app):
        await app(request, receive, send)
    return sent


@pytest.fixture
async def client(make_settings: MakeSettings, worker: StandInWorker) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a front end with default settings and a warm worker."""
    async with serving(make_settings()) as front_end:
        yield front_end


@pytest.fixture
def nowhere(port: int) -> str:
    """URL of a broker that is away."""
    return f"redis://127.0.0.1:{port}/0"


def line_up(redis: Redis, count: int = 1) -> None:
    """So many jobs wait."""
    for number in range(count):
        redis.zadd(open_jobs_key(MODEL), {f"job_{number}": time.time()})
        redis.lpush(queue_name(MODEL), "a message")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def stored(directory: Path) -> list[Path]:
    """The files of a media store."""
    return [path for path in directory.rglob("*") if path.is_file()]


def problem(response: httpx.Response, status: int, slug: str) -> str:
    """The detail of `response`, which must be a problem of that status and slug."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = json.loads(response.text)
    assert set(body) == {"type", "title", "status", "detail", "request_id"}
    assert body["type"] == f"https://prismprune.dev/problems/{slug}"
    assert body["status"] == status
    assert body["request_id"] == response.headers["x-request-id"]
    assert "Traceback" not in body["detail"]
    return str(body["detail"])


@pytest.fixture
def redis(broker_url: str) -> Iterator[Redis]:
    """A client of the test's broker."""
    with Redis.from_url(broker_url, decode_responses=True) as connected:
        yield connected

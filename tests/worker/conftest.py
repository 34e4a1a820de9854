"""A broker's view of jobs, a media store with a picture in it, and a model that answers without weights."""

from __future__ import annotations

import hashlib
import io
import math
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import av
import numpy as np
import pytest
import torch
from obstore.store import from_url
from PIL import Image

from prismprune.caching import EncodingCache
from prismprune.errors import UnknownModelError, UnsupportedMediaError
from prismprune.results import Answer, Memory, PartMap, Timings, VisualTokens
from tests.replies import field, state
from worker.contract import AnswerJob, AnswerResult, JobState, MediaRef, Problem, job_key, media_path
from worker.engine import Engine
from worker.jobs import Claim, Jobs, connect
from worker.line import Limits
from worker.metrics import WorkerMetrics
from worker.store import MediaStore
from worker.tasks import JobRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from redis import Redis

    from prismprune import VisualRequest

    MakeJob = Callable[..., AnswerJob]


class Scripted:
    """Answers each question with itself. A question may ask for more: see `ScriptedSession`.

    `gate` holds whoever joins until it is set, `sight` whoever's media are looked at; `batches` lists the
    questions of each joining, `steps` counts; of more than `fits()` requests at once it says that memory is
    short, and in a step while they are `crowded()`; each takes `tokens_each` tokens. `on_encode` is called
    with each request whose media are looked at, `on_join` with the questions that join.
    """

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.sight = threading.Event()
        self.sight.set()
        self.steps = 0
        self.fits: Callable[[], float] = lambda: math.inf
        self.tokens_each = 1
        self.crowded: Callable[[], bool] = lambda: False
        self.on_encode: Callable[[VisualRequest], None] = lambda _: None
        self.on_join: Callable[[list[str]], None] = lambda _: None

    def session(self, cache: EncodingCache | None = None) -> ScriptedSession:
        return ScriptedSession(self, cache)


@dataclass(eq=False)
class ScriptedRequest:
    """One request in a `ScriptedSession`."""

    questions: tuple[str, ...]
    tokens_each: int = 1
    shared_with: int = 0
    canceled: bool = False
    steps: int = 0
    done: bool = False

    @property
    def lengths(self) -> list[int]:
        """A question that is `long` takes a hundred times as much."""
        return [self.tokens_each * (100 if "long" in question.split() else 1) for question in self.questions]

    def cancel(self) -> None:
        self.canceled = True


class ScriptedSession:
    """Says the words of each question in the first step and ends it in the second."""

    def __init__(self, script: Scripted, cache: EncodingCache | None) -> None:
        self._script = script
        self._cache = cache
        self.pending: list[ScriptedRequest] = []

    @property
    def tokens(self) -> int:
        return self.tokens_with(())

    def tokens_with(self, more: Sequence[ScriptedRequest]) -> int:
        lengths = [length for one in (*self.pending, *more) for length in one.lengths]
        return len(lengths) * max(lengths, default=0)

    def encode(self, requests: Sequence[VisualRequest]) -> Sequence[VisualRequest]:
        assert self._script.sight.wait(30)
        if any(question == "unreadable" for request in requests for question in request.questions):
            raise UnsupportedMediaError("unreadable")
        for request in requests:
            self._script.on_encode(request)
        return requests

    def prepare(self, request: VisualRequest) -> ScriptedRequest:
        if "no template" in request.questions:
            raise UnknownModelError("no template")
        return ScriptedRequest(request.questions, self._script.tokens_each)

    def join(self, requests: Sequence[ScriptedRequest]) -> None:
        script = self._script
        if len(self.pending) + len(requests) > script.fits():
            raise torch.OutOfMemoryError
        script.batches.append([question for request in requests for question in request.questions])
        script.entered.set()
        assert script.gate.wait(30)
        script.on_join(script.batches[-1])
        self.pending += requests
        for one in self.pending:
            one.shared_with = max(one.shared_with, len(self.pending) - 1)

    def step(self) -> list[tuple[ScriptedRequest, int, str]]:
        self._script.steps += 1
        if self._script.crowded():
            raise torch.OutOfMemoryError
        events = [event for one in self.pending for event in self._advance(one)]
        self.pending = [one for one in self.pending if not one.done]
        return events

    def _advance(self, one: ScriptedRequest) -> list[tuple[ScriptedRequest, int, str]]:
        one.steps += 1
        if one.steps == 1:
            return [(one, number, word) for number, q in enumerate(one.questions) for word in q.split()]
        one.done = all(self._ends(one, question) for question in one.questions)
        return []

    @staticmethod
    def _ends(one: ScriptedRequest, question: str) -> bool:
        if question == "too large":
            raise MemoryError
        if question.startswith("raise"):
            raise RuntimeError(question)
        if question == "exit":
            raise SystemExit(3)
        if question == "for ever":
            time.sleep(0.001)
            return one.canceled
        return True

    def make_room(self) -> bool:
        kept = self._cache is not None and self._cache.bytes > 0
        if self._cache is not None:
            self._cache.clear()
        return kept

    @staticmethod
    def answers(one: ScriptedRequest) -> list[Answer]:
        reason = "canceled" if one.canceled else "stop"
        return [answer(question, finish_reason=reason) for question in one.questions]


def answer(text: str, **changes: Any) -> Answer:
    """An answer about one picture of 576 tokens, 64 of them kept."""
    fields: dict[str, Any] = {
        "text": text,
        "token_ids": (5, 6),
        "finish_reason": "stop",
        "prompt_tokens": 80,
        "visual_tokens": VisualTokens(576, 64, 32, 32, 64, "prism"),
        "timings": Timings(
            decode_ms=1, vision_ms=40, prefill_ms=80, generate_ms=20, time_to_first_token_ms=130
        ),
        "memory": Memory("cpu", peak_bytes=3 * 2**28, kv_cache_bytes=1000),
        "token_map": (PartMap(0, None, None, None, (24, 24), (0, 0, 8, 8), (1, 2), (7,), (1, 2, 7)),),
    }
    return Answer(**(fields | changes))


@pytest.fixture
def redis(broker_url: str) -> Iterator[Redis]:
    """A client of the test's broker."""
    with connect(broker_url) as client:
        yield client


@pytest.fixture
def jobs(redis: Redis) -> Jobs:
    """Job state with leases that a test never outlives."""
    return tiny_jobs(redis)


def tiny_jobs(redis: Redis, *, lease_s: float = 60, max_attempts: int = 3, owner: str = "") -> Jobs:
    """The jobs of the model that `make_job` asks for, as one worker sees them."""
    return Jobs(redis, redis, "tiny", lease_s=lease_s, max_attempts=max_attempts, owner=owner)


def claimed(jobs: Jobs, job_id: str, payload: str = "{}", *, alone: bool = False) -> Claim:
    """The claim on a job that is free."""
    claim = jobs.claim(job_id, payload, alone=alone)
    assert isinstance(claim, Claim)
    return claim


@pytest.fixture
def media_url(tmp_path: Path) -> str:
    """An empty media store on disk."""
    (tmp_path / "media").mkdir()
    return (tmp_path / "media").as_uri()


@pytest.fixture
def picture(media_url: str) -> MediaRef:
    """A red picture in the store, as the front end puts it there."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 24), "red").save(buffer, "PNG")
    return stored(media_url, buffer.getvalue())


def video(media_url: str, frames: int) -> MediaRef:
    """A clip of 64 x 48 in the store, each of its `frames` in a gray of its own."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for shade in range(frames):
            pixels = np.full((48, 64, 3), shade * 20, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    ref = stored(media_url, file.getvalue())
    return ref.model_copy(update={"modality": "video", "media_type": "video/mp4"})


def stored(media_url: str, data: bytes) -> MediaRef:
    """Writes `data` as the front end does; returns what a job refers to."""
    media_id = hashlib.sha256(data).hexdigest()
    from_url(media_url).put(media_path(media_id), data)
    return MediaRef(id=media_id, media_type="image/png", modality="image", size_bytes=len(data))


@pytest.fixture
def make_job(redis: Redis, picture: MediaRef) -> MakeJob:
    """Makes a job and its hash in Redis, as the front end does before it enqueues."""

    def make(question: str = "What is this?", **fields: Any) -> AnswerJob:
        now = time.time()
        defaults: dict[str, Any] = {
            "id": f"job_{uuid4().hex}",
            "request_id": "req_1",
            "model": "tiny",
            "questions": (question,),
            "media": (picture,),
            "created_at": now,
            "deadline_at": now + 60,
        }
        job = AnswerJob(**(defaults | fields))
        redis.hset(job_key(job.id), mapping={"state": JobState.QUEUED, "created_at": job.created_at})
        return job

    return make


class Worker:
    """A job runner with its neighbors, and what they did."""

    def __init__(self, redis: Redis, media_url: str) -> None:
        self.redis = redis
        self.model = Scripted()
        self.metrics = WorkerMetrics("tiny")
        self.jobs = tiny_jobs(redis)
        self.cache = EncodingCache(2**20)
        self.engine = Engine(
            lambda: self.model,
            limits=Limits(4, 10**6, 0),
            cache=self.cache,
            on_batch=lambda _: None,
            on_death=lambda _: None,
        )
        store = MediaStore(media_url)
        self.runner = JobRunner(self.jobs, store, self.engine, self.metrics, default_budget=64, decoders=2)

    def run(self, job: AnswerJob) -> None:
        """Delivers the job, as Celery does."""
        self.runner(job.id, job.model_dump(mode="json"))

    def deliver(self, job: AnswerJob) -> threading.Thread:
        """Delivers the job to a thread of the pool."""
        thread = threading.Thread(target=self.run, args=(job,))
        thread.start()
        return thread

    def state(self, job: AnswerJob) -> JobState:
        """The job's state in Redis."""
        return state(self.redis, job.id)

    def problem(self, job: AnswerJob) -> Problem:
        """The job's problem in Redis."""
        return Problem.model_validate_json(field(self.redis, job_key(job.id), "error"))

    def result(self, job: AnswerJob) -> AnswerResult:
        """The job's result in Redis."""
        return AnswerResult.model_validate_json(field(self.redis, job_key(job.id), "result"))

    def counted(self, outcome: JobState, modality: str = "image") -> float | None:
        """How many requests the metrics saw end like that."""
        labels = {"model": "tiny", "modality": modality, "outcome": outcome}
        return self.metrics.registry.get_sample_value("prismprune_requests_total", labels)

    def counter(self, name: str) -> float | None:
        """A counter without labels."""
        return self.metrics.registry.get_sample_value(f"prismprune_{name}")


@pytest.fixture
def worker(redis: Redis, media_url: str) -> Iterator[Worker]:
    """A worker whose engine is warm."""
    made = Worker(redis, media_url)
    with made.engine:
        yield made

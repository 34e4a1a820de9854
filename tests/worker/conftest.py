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

import pytest
import torch
from obstore.store import from_url
from PIL import Image

from prismprune.results import Answer, Memory, PartMap, Timings, VisualTokens
from worker.contract import AnswerJob, JobState, MediaRef, job_key, media_path
from worker.jobs import Jobs, connect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from redis import Redis

    from prismprune import VisualRequest
    from prismprune.caching import EncodingCache


class Scripted:
    """Answers each question with itself. A question may ask for more: see `ScriptedSession`.

    `gate` holds whoever joins until it is set; `batches` lists the questions of each joining; of more than
    `fits()` requests at once it says that memory is short; each takes `tokens_each` tokens.
    """

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.fits: Callable[[], float] = lambda: math.inf
        self.tokens_each = 1

    def session(self, cache: EncodingCache | None = None) -> ScriptedSession:
        del cache  # media are not looked at
        return ScriptedSession(self)


@dataclass(eq=False)
class ScriptedRequest:
    """One request in a `ScriptedSession`."""

    questions: tuple[str, ...]
    shared_with: int = 0
    canceled: bool = False
    steps: int = 0
    done: bool = False

    def cancel(self) -> None:
        self.canceled = True


class ScriptedSession:
    """Says the words of each question in the first step and ends it in the second."""

    def __init__(self, script: Scripted) -> None:
        self._script = script
        self.pending: list[ScriptedRequest] = []

    @property
    def tokens(self) -> int:
        return self._script.tokens_each * len(self.pending)

    def ask(self, requests: Sequence[VisualRequest]) -> list[ScriptedRequest]:
        script = self._script
        if len(self.pending) + len(requests) > script.fits():
            raise torch.OutOfMemoryError
        script.batches.append([question for request in requests for question in request.questions])
        script.entered.set()
        assert script.gate.wait(30)
        asked = [ScriptedRequest(request.questions) for request in requests]
        self.pending += asked
        for one in self.pending:
            one.shared_with = max(one.shared_with, len(self.pending) - 1)
        return asked

    def step(self) -> list[tuple[ScriptedRequest, int, str]]:
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


def stored(media_url: str, data: bytes) -> MediaRef:
    """Writes `data` as the front end does; returns what a job refers to."""
    media_id = hashlib.sha256(data).hexdigest()
    from_url(media_url).put(media_path(media_id), data)
    return MediaRef(id=media_id, media_type="image/png", modality="image", size_bytes=len(data))


@pytest.fixture
def make_job(redis: Redis, picture: MediaRef) -> Callable[..., AnswerJob]:
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

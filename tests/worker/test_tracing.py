"""Spans of attempts, written from what an attempt leaves behind."""

from __future__ import annotations

import ast
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from prismprune.results import Timings
from tests.collector import Collector, Sent, collecting
from tests.test_house_rules import ROOT, sources
from tests.worker.conftest import answer
from worker.answering import answer_result
from worker.contract import AnswerJob, JobState, MediaRef, Problem, TraceContext
from worker.engine import Answered
from worker.jobs import Claim, Outcome
from worker.tracing import AttemptSpans

if TYPE_CHECKING:
    from pathlib import Path

TRACE, SENDER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PROBLEM = Problem(slug="undecodable-media", status=422, title="Media cannot be decoded", detail="scene.png")


def make_job(**fields: Any) -> AnswerJob:
    """A job that was accepted 20 s ago."""
    now = time.time()
    media = MediaRef(id="0" * 64, media_type="image/png", modality="image", size_bytes=1)
    defaults: dict[str, Any] = {
        "id": "job_1",
        "request_id": "req_1",
        "model": "tiny",
        "questions": ("Where is the emerald?",),
        "media": (media,),
        "created_at": now - 20,
        "deadline_at": now + 60,
    }
    return AnswerJob(**(defaults | fields))


def answered(job: AnswerJob, **changes: Any) -> Outcome:
    """Answers of a job that was claimed 15 s ago, and whose turn in the engine came 10 s later."""
    claimed_at = time.monotonic() - 15
    answers = [answer("under the ruby", **changes) for _ in job.questions]
    result = answer_result(
        job, Answered(answers, 0, began=claimed_at + 10), queued_s=5, claimed_at=claimed_at
    )
    return Outcome(JobState.SUCCEEDED, result)


def written(job: AnswerJob, outcome: Outcome, attempt: int = 1) -> tuple[dict[str, Sent], Collector]:
    """The spans of one attempt that began 15 s ago, by name, as a collector gets them."""
    with collecting() as collector:
        with AttemptSpans(collector.url, "worker-1") as spans:
            claim = Claim(job.id, "token", attempt, exhausted=False, at=time.monotonic() - 15)
            spans.attempt(job, claim, outcome)
        return {span.name: span for span in collector.spans}, collector


def test_stages_have_the_times_that_the_answer_reports() -> None:
    """One after another within the attempt, which follows the queue; what took no time is no span."""
    job = make_job(trace=TraceContext(traceparent=f"00-{TRACE}-{SENDER}-01"))
    spans, _ = written(job, answered(job))
    timings = {"decode": 1, "vision": 40, "prefill": 80, "generate": 20}
    assert spans.keys() == {"queue", "process prism.tiny", "wait", *timings}
    for name, took_ms in timings.items():
        assert (spans[name].ended - spans[name].began) / 1e6 == pytest.approx(took_ms, abs=0.01)
    in_order = ["queue", "decode", "wait", "vision", "prefill", "generate"]
    assert all(spans[one].ended == spans[next_one].began for one, next_one in pairwise(in_order))
    assert spans["process prism.tiny"].began == spans["queue"].ended
    assert spans["process prism.tiny"].ended > spans["generate"].ended


def test_an_encoding_found_ready_leaves_no_stage_of_its_own() -> None:
    """Neither decoding nor vision: what was not done has no span."""
    job = make_job()
    cached = answered(job, timings=Timings(prefill_ms=80, generate_ms=20), cached_tokens=64)
    spans, _ = written(job, cached)
    assert {"decode", "vision", "select"}.isdisjoint(spans)
    assert spans["process prism.tiny"].attributes["prismprune.cached_tokens"] == 64


def test_several_questions_are_one_attempt() -> None:
    """Their tokens are added up; the visual ones are shared."""
    job = make_job(questions=("a", "b", "c"), several=True)
    attributes = written(job, answered(job))[0]["process prism.tiny"].attributes
    assert attributes["prismprune.questions"] == 3
    assert attributes["gen_ai.usage.input_tokens"] == 3 * 80
    assert attributes["prismprune.visual_tokens.kept"] == 64


@pytest.mark.parametrize(
    ("state", "failed"),
    [(JobState.FAILED, True), (JobState.EXPIRED, True), (JobState.CANCELED, False)],
)
def test_an_attempt_that_brought_no_answer_tells_why(state: JobState, failed: bool) -> None:
    """By the problem's slug and its number; what its caller canceled is no failure."""
    spans, collector = written(make_job(keep_ratio=0.25), Outcome(state, PROBLEM), attempt=2)
    attempt = spans["process prism.tiny"]
    assert attempt.failed is failed
    assert attempt.attributes["error.type"] == "undecodable-media"
    assert attempt.attributes["prismprune.attempt"] == 2
    assert attempt.attributes["prismprune.keep_ratio"] == 0.25
    assert b"scene.png" not in collector.bodies


def test_neither_question_nor_answer_is_in_the_spans() -> None:
    """Also where the answer is there to be told."""
    job = make_job()
    _, collector = written(job, answered(job))
    assert b"req_1" in collector.bodies
    assert b"emerald" not in collector.bodies
    assert b"ruby" not in collector.bodies


def test_a_job_of_an_untraced_front_end_begins_a_trace() -> None:
    """A worker may be traced alone."""
    job = make_job()
    spans, _ = written(job, answered(job))
    attempt = spans["process prism.tiny"]
    assert attempt.parent == ""
    assert spans["prefill"].trace == attempt.trace


def test_what_the_caller_does_not_sample_is_not_sent() -> None:
    """The flag of the caller's `traceparent` holds on both sides of the queue."""
    job = make_job(trace=TraceContext(traceparent=f"00-{TRACE}-{SENDER}-00"))
    assert written(job, answered(job))[0] == {}


def test_clocks_that_disagree_make_no_span_of_negative_time() -> None:
    """A front end whose clock is ahead: the queue takes no time then."""
    job = make_job(created_at=time.time() + 5)
    spans, _ = written(job, answered(job))
    assert all(span.ended >= span.began for span in spans.values())
    assert spans["queue"].began == spans["queue"].ended


@pytest.mark.parametrize("path", [path for path in sources("worker") if path.name != "tracing.py"], ids=str)
def test_nothing_is_imported_while_traces_are_off(path: Path) -> None:
    """When a module of the worker is imported, none of OpenTelemetry is; a function may do it later."""
    found = [node for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.ImportFrom)]
    assert not [node for node in found if (node.module or "").startswith(("opentelemetry", "worker.tracing"))]

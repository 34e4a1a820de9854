"""What a worker measures, and how it is read."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import psutil
import pytest

from prismprune.errors import PrismError
from prismprune.results import Memory
from tests.worker.conftest import answer
from worker.answering import answer_result
from worker.contract import JobState
from worker.engine import Answered
from worker.errors import OutOfMemoryError, StoppedError
from worker.metrics import FAILURES, WorkerMetrics

if TYPE_CHECKING:
    from tests.worker.conftest import MakeJob
    from worker.contract import AnswerJob, AnswerResult


def result_of(job: AnswerJob, **changes: Any) -> AnswerResult:
    """The result of one answer that did not wait."""
    now = time.monotonic()
    return answer_result(job, Answered([answer("red", **changes)], 0, now), queued_s=0, claimed_at=now)


def sample(metrics: WorkerMetrics, name: str, **labels: str) -> float | None:
    """One value, of the model that the tests serve."""
    return metrics.registry.get_sample_value(f"prismprune_{name}", {"model": "tiny", **labels})


def test_an_answer_is_observed_in_every_histogram(make_job: MakeJob) -> None:
    """Latency, stages, first token, tokens before and after, memory: one observation each, in base units."""
    metrics = WorkerMetrics("tiny")
    metrics.finished("image", JobState.SUCCEEDED, 0.25, result_of(make_job()))
    latency = {"modality": "image", "outcome": "succeeded"}
    assert sample(metrics, "request_latency_seconds_sum", **latency) == 0.25
    assert sample(metrics, "requests_total", **latency) == 1
    assert sample(metrics, "stage_seconds_sum", stage="prefill") == 0.08
    assert sample(metrics, "time_to_first_token_seconds_count") == 1
    assert sample(metrics, "visual_tokens_original_sum", modality="image") == 576
    assert sample(metrics, "visual_tokens_kept_sum", modality="image", method="prism") == 64
    assert sample(metrics, "device_memory_peak_bytes_sum", device="cpu") == 3 * 2**28
    assert sample(metrics, "cuda_memory_peak_bytes_count", device="cpu") is None
    assert sample(metrics, "generated_tokens_total") == 2


def test_what_pruning_saved_is_measured_by_the_answer_itself(make_job: MakeJob) -> None:
    """512 tokens dropped, at 100 bytes a cached token and a millisecond a prefilled one."""
    metrics = WorkerMetrics("tiny")
    memory = Memory("cpu", peak_bytes=1, kv_cache_bytes=8100)  # 80 of the prompt and the first of two drawn
    metrics.finished("image", JobState.SUCCEEDED, 0.25, result_of(make_job(), memory=memory))
    assert sample(metrics, "kv_cache_bytes_sum", method="prism") == 8100
    assert sample(metrics, "kv_cache_saved_bytes_total", method="prism") == 51200
    assert sample(metrics, "prefill_saved_seconds_total", method="prism") == pytest.approx(0.512)


def test_the_prefills_time_is_shared_by_those_who_came_together(make_job: MakeJob) -> None:
    """Four in one prefill of 80 ms: a quarter is each one's; neighbors who came at other times have none."""
    metrics = WorkerMetrics("tiny")
    result = result_of(make_job())
    crowded = result.memory.model_copy(update={"shared_with": 7})
    result = result.model_copy(update={"memory": crowded})
    metrics.finished("image", JobState.SUCCEEDED, 0.25, result, 4)
    assert sample(metrics, "prefill_saved_seconds_total", method="prism") == pytest.approx(0.512 / 4)


def test_several_questions_prefill_the_media_once(make_job: MakeJob) -> None:
    """Three prompts of 16 tokens each beside 64 that they share; each one's cache is spared all the same."""
    metrics, now = WorkerMetrics("tiny"), time.monotonic()
    job = make_job(questions=("a", "b", "c"), several=True)
    answers = [answer("red", memory=Memory("cpu", peak_bytes=1, kv_cache_bytes=8100))] * 3
    result = answer_result(job, Answered(answers, 0, now), queued_s=0, claimed_at=now)
    metrics.finished("image", JobState.SUCCEEDED, 0.25, result)
    prefilled = 3 * 16 + 64
    assert sample(metrics, "prefill_saved_seconds_total", method="prism") == pytest.approx(
        512 * 0.08 / prefilled
    )
    assert sample(metrics, "kv_cache_saved_bytes_total", method="prism") == 3 * 51200


@pytest.mark.parametrize("cached", [0, 64])
def test_an_answer_is_a_hit_or_a_miss_of_the_cache(make_job: MakeJob, cached: int) -> None:
    """By what its usage says of cached tokens; a failure is neither."""
    metrics, result = WorkerMetrics("tiny"), result_of(make_job())
    assert result.usage
    details = result.usage.prompt_tokens_details.model_copy(update={"cached_tokens": cached})
    usage = result.usage.model_copy(update={"prompt_tokens_details": details})
    metrics.finished("image", JobState.SUCCEEDED, 0.25, result.model_copy(update={"usage": usage}))
    metrics.finished("image", JobState.FAILED, 0.25, None)
    counted = metrics.registry.get_sample_value
    assert counted("prismprune_media_cache_hits_total") == (cached > 0)
    assert counted("prismprune_media_cache_misses_total") == (cached == 0)
    assert metrics.ended == 2


def test_outcomes_are_there_before_the_first_request() -> None:
    """At zero: a counter that is born with its first count shows Prometheus no increase."""
    metrics = WorkerMetrics("tiny")
    for outcome in (state for state in JobState if state.terminal):
        assert sample(metrics, "requests_total", modality="video", outcome=outcome) == 0


def test_reasons_are_there_before_the_first_failure() -> None:
    """At zero, each error that a job may end with; no cancellation, and nothing that ends the loading."""
    metrics = WorkerMetrics("tiny")
    for error in FAILURES:
        assert sample(metrics, "job_failures_total", reason=error.slug) == 0
    left_out = {each.slug for each in PrismError.__subclasses__()} - {each.slug for each in FAILURES}
    assert left_out == {StoppedError.slug, "unknown-model", "parts-unavailable"}


def test_a_failure_is_counted_by_its_reason() -> None:
    """Once, whatever the media were."""
    metrics = WorkerMetrics("tiny")
    metrics.finished("video", JobState.FAILED, 1.5, None, reason=OutOfMemoryError.slug)
    metrics.finished("image", JobState.CANCELED, 1.5, None)
    counted = {each.slug: sample(metrics, "job_failures_total", reason=each.slug) for each in FAILURES}
    assert {slug for slug, count in counted.items() if count} == {OutOfMemoryError.slug}
    assert counted[OutOfMemoryError.slug] == 1


def test_a_failure_has_a_latency_and_nothing_else() -> None:
    """No stage, token or memory of a request without a result."""
    metrics = WorkerMetrics("tiny")
    metrics.finished("video", JobState.FAILED, 1.5, None)
    labels = {"modality": "video", "outcome": "failed"}
    assert sample(metrics, "request_latency_seconds_count", **labels) == 1
    assert sample(metrics, "time_to_first_token_seconds_count") is None
    assert sample(metrics, "stage_seconds_count", stage="queue") is None


def test_cuda_memory_has_its_own_histogram(make_job: MakeJob) -> None:
    """A request on a CUDA device is observed in both."""
    metrics = WorkerMetrics("tiny")
    result = result_of(make_job(), memory=Memory("cuda:0", peak_bytes=2**30, kv_cache_bytes=1))
    metrics.finished("image", JobState.SUCCEEDED, 0.25, result)
    assert sample(metrics, "device_memory_peak_bytes_sum", device="cuda:0") == 2**30
    assert sample(metrics, "cuda_memory_peak_bytes_sum", device="cuda:0") == 2**30


def test_a_scrape_shows_what_is_served_and_what_runs(port: int) -> None:
    """Over HTTP while the block lasts; the gauges are asked at the scrape."""
    metrics = WorkerMetrics("tiny")
    metrics.describe(family="llava", quantization=None, revision="abc")
    metrics.watch("cpu", memory_bytes=lambda: 123, jobs_running=lambda: 2)
    metrics.batch(3)
    with metrics.serving("127.0.0.1", port), urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        lines = response.read().decode().splitlines()
    assert (
        'prismprune_model_info{family="llava",model="tiny",quantization="none",revision="abc"} 1.0' in lines
    )
    assert 'prismprune_jobs_running{model="tiny"} 2.0' in lines
    assert 'prismprune_device_memory_allocated_bytes{device="cpu",model="tiny"} 123.0' in lines
    assert 'prismprune_batch_size_sum{model="tiny"} 3.0' in lines
    assert not any("python_" in line or "process_" in line for line in lines)


def test_port_0_serves_nothing() -> None:
    """A worker can do without the page: no socket listens, not even on a port that the system picks."""
    process = psutil.Process()
    before = process.net_connections("tcp")
    with WorkerMetrics("tiny").serving("127.0.0.1", 0):
        assert process.net_connections("tcp") == before

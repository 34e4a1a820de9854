"""The way of one job: real broker, real store, real pictures; a model that answers by script."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.worker.conftest import Scripted, stored
from worker.contract import AnswerResult, JobState, MediaRef, Problem, job_key
from worker.engine import Engine
from worker.jobs import Jobs, lease_key
from worker.metrics import WorkerMetrics
from worker.store import MediaStore
from worker.tasks import JobRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from redis import Redis

    from worker.contract import AnswerJob

    MakeJob = Callable[..., AnswerJob]


class Worker:
    """A job runner with its neighbours, and what they did."""

    def __init__(self, redis: Redis, media_url: str) -> None:
        self.redis = redis
        self.model = Scripted()
        self.metrics = WorkerMetrics("tiny")
        self.jobs = Jobs(redis, lease_s=60, max_attempts=3)
        self.engine = Engine(
            lambda: self.model, max_batch=4, max_wait_s=0, on_batch=lambda _: None, on_death=lambda _: None
        )
        store = MediaStore(media_url)
        self._run = JobRunner(self.jobs, store, self.engine, self.metrics, default_budget=64)

    def run(self, job: AnswerJob) -> None:
        """Delivers the job, as Celery does."""
        self._run(job.id, job.model_dump(mode="json"))

    def deliver(self, job: AnswerJob) -> threading.Thread:
        """Delivers the job to a thread of the pool."""
        thread = threading.Thread(target=self.run, args=(job,))
        thread.start()
        return thread

    def state(self, job: AnswerJob) -> JobState:
        """The job's state in Redis."""
        return JobState(self.redis.hget(job_key(job.id), "state"))

    def problem(self, job: AnswerJob) -> Problem:
        """The job's problem in Redis."""
        return Problem.model_validate_json(self.redis.hget(job_key(job.id), "error"))

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


def test_a_job_is_answered(worker: Worker, make_job: MakeJob) -> None:
    """From a picture in the store to a result in Redis, counted once."""
    job = make_job("What color is it?")
    worker.run(job)
    assert worker.state(job) is JobState.SUCCEEDED
    result = AnswerResult.model_validate_json(worker.redis.hget(job_key(job.id), "result"))
    assert (result.id, result.model, result.answer) == (job.id, "tiny", "What color is it?")
    assert worker.counted(JobState.SUCCEEDED) == 1


def test_a_second_delivery_changes_nothing(worker: Worker, make_job: MakeJob) -> None:
    """A job that has ended is neither answered nor counted again."""
    job = make_job()
    worker.run(job)
    before = worker.redis.hgetall(job_key(job.id))
    worker.run(job)
    assert worker.redis.hgetall(job_key(job.id)) == before
    assert len(worker.model.batches) == 1
    assert worker.counted(JobState.SUCCEEDED) == 1


def test_a_canceled_job_never_reaches_the_model(worker: Worker, make_job: MakeJob) -> None:
    """It is dropped, and counted as canceled."""
    job = make_job()
    worker.redis.hset(job_key(job.id), "state", JobState.CANCELED)
    worker.run(job)
    assert worker.model.batches == []
    assert worker.counted(JobState.CANCELED) == 1


def test_a_job_canceled_while_it_runs_stays_canceled(worker: Worker, make_job: MakeJob) -> None:
    """Its answer comes too late: the caller's word stands, and is what is counted."""
    job = make_job()
    worker.model.gate.clear()
    thread = worker.deliver(job)
    assert worker.model.entered.wait(10)
    worker.redis.hset(job_key(job.id), "state", JobState.CANCELED)
    worker.model.gate.set()
    thread.join()
    assert worker.state(job) is JobState.CANCELED
    assert worker.counted(JobState.CANCELED) == 1
    assert worker.counted(JobState.SUCCEEDED) is None


def test_a_deadline_that_passed_in_the_queue_expires_the_job(worker: Worker, make_job: MakeJob) -> None:
    """It is not begun: state expired, status 504."""
    job = make_job(deadline_at=time.time() - 1)
    worker.run(job)
    assert worker.model.batches == []
    assert worker.state(job) is JobState.EXPIRED
    assert (worker.problem(job).slug, worker.problem(job).status) == ("deadline-exceeded", 504)


def test_a_deadline_that_passes_while_generating_expires_the_job(worker: Worker, make_job: MakeJob) -> None:
    """An answer without end is stopped when its time is up."""
    job = make_job("for ever", deadline_at=time.time() + 0.3)
    worker.run(job)
    assert worker.state(job) is JobState.EXPIRED
    assert worker.problem(job).slug == "deadline-exceeded"
    assert worker.counted(JobState.EXPIRED) == 1


def test_media_that_cannot_be_decoded_fails_the_job(
    worker: Worker, make_job: MakeJob, media_url: str
) -> None:
    """The library's own slug and status reach the caller."""
    job = make_job(media=(stored(media_url, b"\xff\xd8\xff\xe0" + b"no picture" * 9),))
    worker.run(job)
    assert worker.state(job) is JobState.FAILED
    assert (worker.problem(job).slug, worker.problem(job).status) == ("undecodable-media", 422)


def test_media_that_are_gone_fail_the_job(worker: Worker, make_job: MakeJob) -> None:
    """An id that the store does not hold is the caller's 404."""
    gone = MediaRef(id="0" * 64, media_type="image/png", modality="image", size_bytes=1)
    job = make_job(media=(gone,))
    worker.run(job)
    assert (worker.problem(job).slug, worker.problem(job).status) == ("media-not-found", 404)


def test_an_unexpected_error_says_nothing_of_itself(
    worker: Worker, make_job: MakeJob, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the problem nor the log quotes what may be a caller's words; the log has the stack."""
    job = make_job("raise a secret")
    worker.run(job)
    assert worker.problem(job).slug == "internal-error"
    assert "secret" not in worker.problem(job).detail
    assert "secret" not in caplog.text
    assert "RuntimeError" in caplog.text
    assert "answer_batch" in caplog.text


def test_a_culprit_fails_alone(worker: Worker, make_job: MakeJob) -> None:
    """Jobs that shared its batch succeed."""
    worker.model.gate.clear()
    jobs = [make_job("first")]
    threads = [worker.deliver(jobs[0])]
    assert worker.model.entered.wait(10)
    jobs += [make_job("raise"), make_job("good")]
    threads += [worker.deliver(job) for job in jobs[1:]]
    while worker.engine._tickets.qsize() < 2:
        time.sleep(0.001)
    worker.model.gate.set()
    for thread in threads:
        thread.join()
    assert [worker.state(job).value for job in jobs] == ["succeeded", "failed", "succeeded"]
    assert {"raise", "good"} in [set(batch) for batch in worker.model.batches]


def test_a_job_that_ended_three_workers_is_dead_lettered(worker: Worker, make_job: MakeJob) -> None:
    """The fourth delivery does not touch the model, and says so in state, problem and counters."""
    job = make_job()
    for _ in range(3):
        Jobs(worker.redis, lease_s=60, max_attempts=3).claim(job.id)
        worker.redis.delete(lease_key(job.id))
    worker.run(job)
    assert worker.model.batches == []
    assert worker.state(job) is JobState.FAILED
    assert worker.problem(job).slug == "dead-lettered"
    assert worker.counter("jobs_dead_lettered_total") == 1
    assert worker.counter("jobs_redelivered_total") == 1


def test_a_job_of_another_version_fails(
    worker: Worker, make_job: MakeJob, caplog: pytest.LogCaptureFixture
) -> None:
    """A field that this worker does not know ends the job instead of coming back for ever."""
    job = make_job("secret question")
    worker._run(job.id, job.model_dump(mode="json") | {"feature_of_tomorrow": "secret"})
    assert worker.state(job) is JobState.FAILED
    assert "feature_of_tomorrow" in caplog.text
    assert "secret" not in caplog.text
    assert worker.counted(JobState.FAILED, modality="unknown") == 1


def test_an_unknown_job_is_dropped(worker: Worker, make_job: MakeJob) -> None:
    """Nobody waits for a job that Redis has forgotten."""
    job = make_job()
    worker.redis.delete(job_key(job.id))
    worker.run(job)
    assert worker.model.batches == []
    assert not worker.redis.exists(job_key(job.id))


@pytest.mark.parametrize("created", [-3600.0, 3600.0])
def test_a_front_end_with_another_clock_yields_no_negative_times(
    worker: Worker, make_job: MakeJob, created: float
) -> None:
    """Waiting and total are never below zero."""
    job = make_job(created_at=time.time() + created)
    worker.run(job)
    timings: Any = AnswerResult.model_validate_json(worker.redis.hget(job_key(job.id), "result")).timings
    assert min(value for _, value in timings) >= 0
    assert timings.total_ms >= timings.queue_ms

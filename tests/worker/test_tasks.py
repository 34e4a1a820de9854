"""The way of one job: real broker, real store, real pictures; a model that answers by script."""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from redis.exceptions import ResponseError

from prismprune.encoding import EncodedMedia
from prismprune.results import Timings
from tests.replies import entries
from tests.worker.conftest import answer, stored, tiny_jobs
from worker.answering import visual_request
from worker.contract import (
    DEAD_LETTERS_KEY,
    DeadLetter,
    JobState,
    MediaRef,
    events_key,
    job_key,
)
from worker.errors import JobGivenBackError
from worker.jobs import lease_key
from worker.stops import StopReason

if TYPE_CHECKING:
    from redis import Redis

    from tests.worker.conftest import MakeJob, Worker
    from worker.contract import AnswerJob


def test_a_job_is_answered(worker: Worker, make_job: MakeJob) -> None:
    """From a picture in the store to a result in Redis, counted once."""
    job = make_job("What color is it?")
    worker.run(job)
    assert worker.state(job) is JobState.SUCCEEDED
    result = worker.result(job)
    assert (result.id, result.model, result.answer) == (job.id, "tiny", "What color is it?")
    assert worker.counted(JobState.SUCCEEDED) == 1


def test_no_moment_is_counted_twice(
    worker: Worker, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a claim over a slow broker too: the timings' total is no longer than the job has existed."""
    claim = worker.jobs.claim

    def slow_claim(*args: Any, **options: Any) -> Any:
        claimed = claim(*args, **options)
        time.sleep(0.3)
        return claimed

    monkeypatch.setattr(worker.jobs, "claim", slow_claim)
    job = make_job("What color is it?")
    worker.run(job)
    assert 300 <= worker.result(job).timings.total_ms <= (time.time() - job.created_at) * 1e3


def test_media_that_were_encoded_before_are_not_decoded(worker: Worker, make_job: MakeJob) -> None:
    """A second question about them is answered even if the store has lost the file."""
    gone = MediaRef(id="0" * 64, media_type="image/png", modality="image", size_bytes=1)
    job = make_job("Again?", media=(gone,))
    encoded = EncodedMedia((), answer("").visual_tokens, (), Timings())
    worker.cache.put(visual_request(job, 64).encoding_key, encoded)
    worker.run(job)
    assert worker.state(job) is JobState.SUCCEEDED
    other = make_job("Another budget?", media=(gone,), token_budget=65)
    worker.run(other)
    assert worker.state(other) is JobState.FAILED


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
    assert not worker.counted(JobState.SUCCEEDED)


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


def test_a_deadline_that_passes_while_decoding_expires_the_job(
    worker: Worker, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for a decoder that takes longer, and the model is not asked."""
    released = threading.Event()
    monkeypatch.setattr("worker.tasks.decode", lambda *_: released.wait(30))
    job = make_job(deadline_at=time.time() + 0.2)
    worker.run(job)
    released.set()
    assert worker.state(job) is JobState.EXPIRED
    assert worker.model.batches == []


def test_a_cancellation_is_heard_while_decoding(
    worker: Worker, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is free at once for the next job."""
    decoding, released = threading.Event(), threading.Event()

    def decode(*_: object) -> None:
        decoding.set()
        released.wait(30)

    monkeypatch.setattr("worker.tasks.decode", decode)
    job = make_job()
    thread = worker.deliver(job)
    assert decoding.wait(10)
    worker.jobs.stop(job.id, StopReason.CANCELED)
    thread.join()
    released.set()
    assert worker.state(job) is JobState.CANCELED


def test_a_cancellation_ends_an_answer_without_end(worker: Worker, make_job: MakeJob) -> None:
    """The engine is free at its next step, and the caller's word is what is counted."""
    job = make_job("for ever")
    thread = worker.deliver(job)
    assert worker.model.entered.wait(10)
    worker.redis.hset(job_key(job.id), "state", JobState.CANCELED)
    worker.jobs.renew_leases()
    thread.join()
    worker.run(make_job("next"))
    assert worker.state(job) is JobState.CANCELED
    assert worker.counted(JobState.CANCELED) == 1
    assert worker.counted(JobState.SUCCEEDED) == 1


def test_a_worker_that_leaves_gives_its_jobs_back(worker: Worker, make_job: MakeJob) -> None:
    """Queued again as if never begun, and so is the delivery."""
    job = make_job("for ever")
    thread = threading.Thread(target=lambda: _given_back(worker, job))
    thread.start()
    assert worker.model.entered.wait(10)
    worker.jobs.stop_all(StopReason.DRAINING)
    thread.join()
    assert worker.state(job) is JobState.QUEUED
    assert worker.redis.hget(job_key(job.id), "attempts") == "0"
    assert not worker.redis.exists(lease_key(job.id))


def test_a_worker_that_leaves_gives_back_what_the_engine_has_not_begun(
    worker: Worker, make_job: MakeJob
) -> None:
    """A job that waits behind another goes back at once, not after it."""
    worker.model.gate.clear()
    ahead = worker.deliver(make_job("ahead"))
    assert worker.model.entered.wait(10)
    waiting = make_job("waiting")
    thread = threading.Thread(target=lambda: _given_back(worker, waiting))
    thread.start()
    while len(worker.engine._line) < 1:
        time.sleep(0.001)
    worker.jobs.stop(waiting.id, StopReason.DRAINING)
    thread.join(10)
    assert worker.state(waiting) is JobState.QUEUED
    worker.model.gate.set()
    ahead.join()


def _given_back(worker: Worker, job: AnswerJob) -> None:
    with pytest.raises(JobGivenBackError):
        worker.run(job)


def test_a_second_delivery_in_the_same_process_is_dropped(worker: Worker, make_job: MakeJob) -> None:
    """The first goes on; the second takes no thread and changes nothing."""
    worker.model.gate.clear()
    job = make_job()
    thread = worker.deliver(job)
    assert worker.model.entered.wait(10)
    worker.run(job)
    worker.model.gate.set()
    thread.join()
    assert worker.state(job) is JobState.SUCCEEDED
    assert len(worker.model.batches) == 1


def test_suspects_run_one_at_a_time(worker: Worker, make_job: MakeJob) -> None:
    """What was in flight at a death is answered alone; what never died shares its batches."""
    worker.model.gate.clear()
    held = worker.deliver(make_job("held"))
    assert worker.model.entered.wait(10)
    suspects, others = [make_job(f"suspect {n}") for n in range(3)], [make_job("other") for _ in range(2)]
    for job in suspects:
        tiny_jobs(worker.redis).claim(job.id)
        worker.redis.delete(lease_key(job.id))
    threads = [held, *(worker.deliver(job) for job in suspects)]
    while not worker.counter("jobs_redelivered_total"):
        time.sleep(0.001)
    threads += [worker.deliver(job) for job in others]
    worker.model.gate.set()
    for thread in threads:
        thread.join()
    assert {worker.state(job) for job in (*suspects, *others)} == {JobState.SUCCEEDED}
    with_suspects = [batch for batch in worker.model.batches if any("suspect" in each for each in batch)]
    assert sorted(with_suspects) == [["suspect 0"], ["suspect 1"], ["suspect 2"]]


def test_a_suspect_that_nobody_can_read_fails_and_holds_up_nobody(worker: Worker, make_job: MakeJob) -> None:
    """It is ended beside those at work, and others are claimed afterwards."""
    worker.model.gate.clear()
    held = worker.deliver(make_job("held"))
    assert worker.model.entered.wait(10)
    suspect = make_job("suspect")
    tiny_jobs(worker.redis).claim(suspect.id)
    worker.redis.delete(lease_key(suspect.id))
    worker.runner(suspect.id, suspect.model_dump(mode="json") | {"feature_of_tomorrow": 1})
    assert worker.state(suspect) is JobState.FAILED
    other = make_job("other")
    thread = worker.deliver(other)
    worker.model.gate.set()
    for each in (held, thread):
        each.join(30)
    assert worker.state(other) is JobState.SUCCEEDED


def test_a_broker_that_takes_nothing_for_a_while_costs_no_job(worker: Worker, make_job: MakeJob) -> None:
    """Out of memory, say: what is told waits for it, and the answer is not computed again."""
    worker.model.gate.clear()
    job = make_job("two words", stream=True)
    thread = worker.deliver(job)
    assert worker.model.entered.wait(10)
    worker.redis.config_set("maxmemory", 1)
    try:
        worker.model.gate.set()
        time.sleep(0.5)
        assert thread.is_alive()
    finally:
        worker.redis.config_set("maxmemory", 0)
    thread.join(30)
    assert worker.state(job) is JobState.SUCCEEDED
    assert len(worker.model.batches) == 1


def test_a_job_whose_writing_fails_is_another_workers(
    worker: Worker, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not kept by renewals: the lease runs out, and the engine stops to answer it."""
    job = make_job("for ever", stream=True)

    def refused(*_: Any) -> None:
        raise ResponseError("MISCONF")

    monkeypatch.setattr(worker.jobs, "tell", refused)
    with pytest.raises(ResponseError):
        worker.run(job)
    assert worker.jobs.running == 0
    worker.redis.delete(lease_key(job.id))  # as when it has run out
    worker.jobs.renew_leases()
    assert not worker.redis.exists(lease_key(job.id))
    other = make_job("other")
    worker.run(other)
    assert worker.state(other) is JobState.SUCCEEDED


def told(redis: Redis, job: AnswerJob) -> list[tuple[str, Any]]:
    """The job's stream: names, with the texts of `token`."""
    stream = entries(redis, events_key(job.id))
    return [(entry["event"], json.loads(entry["data"]).get("text")) for entry in stream]


def test_text_is_told_on_its_way(worker: Worker, make_job: MakeJob) -> None:
    """While the job still runs, and the rest before its end is told."""
    worker.model.gate.clear()
    job = make_job("two words", stream=True)
    thread = worker.deliver(job)
    worker.model.gate.set()
    thread.join()
    names, texts = zip(*told(worker.redis, job), strict=True)
    assert (names[0], names[-1]) == ("started", "completed")
    assert "".join(text for text in texts if text) == "twowords"


def test_text_is_told_only_to_who_asked(worker: Worker, make_job: MakeJob) -> None:
    """Without `stream` the job's stream has its start and its end."""
    job = make_job("two words")
    worker.run(job)
    assert told(worker.redis, job) == [("started", None), ("completed", None)]


def test_a_request_that_does_not_fit_says_so(worker: Worker, make_job: MakeJob) -> None:
    """507, and what to do."""
    job = make_job("too large")
    worker.run(job)
    assert (worker.problem(job).slug, worker.problem(job).status) == ("out-of-memory", 507)


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


def failures(worker: Worker) -> dict[str, float]:
    """How many jobs the metrics saw fail or expire, by reason."""
    (family,) = (each for each in worker.metrics.registry.collect() if each.name == "prismprune_job_failures")
    samples = [each for each in family.samples if each.name.endswith("_total") and each.value]
    return {each.labels["reason"]: each.value for each in samples}


def test_failures_are_told_apart(
    worker: Worker, make_job: MakeJob, media_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By the slug that the caller reads, in the metrics and in the job's line of the log."""
    caplog.set_level("INFO", "worker.tasks")
    damaged = make_job(media=(stored(media_url, b"\xff\xd8\xff\xe0" + b"no picture" * 9),))
    large, late, good = make_job("too large"), make_job(deadline_at=time.time() - 1), make_job()
    canceled = make_job()
    worker.redis.hset(job_key(canceled.id), "state", JobState.CANCELED)
    for job in (damaged, large, late, good, canceled):
        worker.run(job)
    assert failures(worker) == {"undecodable-media": 1, "out-of-memory": 1, "deadline-exceeded": 1}
    assert f"job {damaged.id} failed (undecodable-media) after " in caplog.text
    assert f"job {late.id} expired (deadline-exceeded) after " in caplog.text
    assert f"job {good.id} succeeded after " in caplog.text


def test_a_job_that_a_front_end_let_expire_is_counted_as_late(worker: Worker, make_job: MakeJob) -> None:
    """Whatever its worker came to afterwards."""
    worker.model.gate.clear()
    job = make_job("too large")
    thread = worker.deliver(job)
    assert worker.model.entered.wait(10)
    worker.redis.hset(job_key(job.id), "state", JobState.EXPIRED)
    worker.model.gate.set()
    thread.join()
    assert failures(worker) == {"deadline-exceeded": 1}


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
    assert "in _advance" in caplog.text


def test_a_culprit_fails_alone(worker: Worker, make_job: MakeJob) -> None:
    """Jobs that shared its batch succeed."""
    worker.model.gate.clear()
    jobs = [make_job("first")]
    threads = [worker.deliver(jobs[0])]
    assert worker.model.entered.wait(10)
    jobs += [make_job("raise"), make_job("good")]
    threads += [worker.deliver(job) for job in jobs[1:]]
    while len(worker.engine._line) < 2:
        time.sleep(0.001)
    worker.model.gate.set()
    for thread in threads:
        thread.join()
    assert [worker.state(job).value for job in jobs] == ["succeeded", "failed", "succeeded"]
    assert {"raise", "good"} in [set(batch) for batch in worker.model.batches]


def test_a_job_that_ended_three_workers_is_dead_lettered(worker: Worker, make_job: MakeJob) -> None:
    """The next delivery does not touch the model, and says so in state, problem, counters and a letter."""
    job = make_job()
    for alone in (False, True, True, True):
        tiny_jobs(worker.redis).claim(job.id, alone=alone)
        worker.redis.delete(lease_key(job.id))
    worker.run(job)
    assert worker.model.batches == []
    assert worker.state(job) is JobState.FAILED
    assert worker.problem(job).slug == "dead-lettered"
    assert worker.counter("jobs_dead_lettered_total") == 1
    (entry,) = entries(worker.redis, DEAD_LETTERS_KEY)
    letter = DeadLetter.model_validate_json(entry["job"])
    assert (letter.id, letter.attempts, letter.media) == (job.id, 3, (job.media[0].id,))
    assert worker.counter("jobs_redelivered_total") == 1


def test_a_job_of_another_version_fails(
    worker: Worker, make_job: MakeJob, caplog: pytest.LogCaptureFixture
) -> None:
    """A field that this worker does not know ends the job instead of coming back for ever."""
    job = make_job("secret question")
    worker.runner(job.id, job.model_dump(mode="json") | {"feature_of_tomorrow": "secret"})
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
    timings = worker.result(job).timings
    assert min(value for _, value in timings) >= 0
    assert timings.total_ms >= timings.queue_ms

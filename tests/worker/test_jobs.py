"""Job state in Redis, against a real broker."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

import pytest

from worker.contract import RESULT_TTL_S, JobEvent, JobState, Problem, events_channel, job_key, redis_url
from worker.jobs import Claim, Jobs, Outcome, Settled, lease_key

if TYPE_CHECKING:
    from collections.abc import Callable

    from redis import Redis

    from worker.contract import AnswerJob

    MakeJob = Callable[..., AnswerJob]

PROBLEM = Problem(slug="internal-error", status=500, title="Internal error", detail="No.")
FAILED = Outcome(JobState.FAILED, PROBLEM)
EXPIRED = Outcome(JobState.EXPIRED, PROBLEM)


def claimed(jobs: Jobs, job_id: str) -> Claim:
    """The claim on a job that is free."""
    claim = jobs.claim(job_id)
    assert isinstance(claim, Claim)
    return claim


def test_a_claim_starts_the_job_and_counts_the_attempt(jobs: Jobs, redis: Redis, make_job: MakeJob) -> None:
    """Claimed: running, with a start, one attempt, a lease, and one more job on this worker."""
    job = make_job()
    claim = claimed(jobs, job.id)
    stored = redis.hgetall(job_key(job.id))
    assert (stored["state"], stored["attempts"], claim.attempt) == ("running", "1", 1)
    assert float(stored["started_at"]) >= job.created_at
    assert redis.ttl(lease_key(job.id)) > 0
    assert jobs.running == 1


def test_every_change_of_state_is_published(jobs: Jobs, redis: Redis, make_job: MakeJob) -> None:
    """A listener hears the start and the end."""
    job = make_job()
    with redis.pubsub(ignore_subscribe_messages=True) as listener:
        listener.subscribe(events_channel(job.id))
        jobs.finish(claimed(jobs, job.id), FAILED)
        heard = []
        while len(heard) < 2:
            message = listener.get_message(timeout=5)
            if message:
                heard.append(JobEvent.model_validate_json(message["data"]).state)
    assert heard == [JobState.RUNNING, JobState.FAILED]


def test_the_end_is_stored_for_a_day_and_the_lease_given_back(
    jobs: Jobs, redis: Redis, make_job: MakeJob
) -> None:
    """The terminal state carries its problem and a time to live."""
    job = make_job()
    assert jobs.finish(claimed(jobs, job.id), FAILED) == Settled(JobState.FAILED, first=True)
    stored = redis.hgetall(job_key(job.id))
    assert json.loads(stored["error"])["slug"] == "internal-error"
    assert 0 < redis.ttl(job_key(job.id)) <= RESULT_TTL_S
    assert not redis.exists(lease_key(job.id))
    assert jobs.running == 0


def test_of_many_ends_one_stands(redis: Redis, make_job: MakeJob) -> None:
    """Eight executions that end at once: one terminal state, one of them counts it."""
    job = make_job()
    workers = [Jobs(redis, lease_s=60, max_attempts=100) for _ in range(8)]
    claims = []
    for jobs in workers:
        claims.append(claimed(jobs, job.id))
        redis.delete(lease_key(job.id))  # as if each had lost its lease
    settled: list[Settled | None] = []
    outcomes = [FAILED, EXPIRED] * 4
    threads = [
        threading.Thread(target=lambda j=jobs, c=claim, o=outcome: settled.append(j.finish(c, o)))
        for jobs, claim, outcome in zip(workers, claims, outcomes, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    states = {one.state for one in settled if one}
    assert states == {JobState(redis.hget(job_key(job.id), "state"))}
    assert sum(one.first for one in settled if one) == 1


def test_a_canceled_job_is_not_started(jobs: Jobs, redis: Redis, make_job: MakeJob) -> None:
    """Its claim tells the state, and one delivery only may count it."""
    job = make_job()
    redis.hset(job_key(job.id), "state", JobState.CANCELED)
    assert jobs.claim(job.id) == Settled(JobState.CANCELED, first=True)
    assert jobs.claim(job.id) == Settled(JobState.CANCELED, first=False)
    assert "attempts" not in redis.hgetall(job_key(job.id))


def test_a_cancellation_while_running_stands(jobs: Jobs, redis: Redis, make_job: MakeJob) -> None:
    """The worker's own end comes too late and changes nothing."""
    job = make_job()
    claim = claimed(jobs, job.id)
    redis.hset(job_key(job.id), "state", JobState.CANCELED)
    assert jobs.finish(claim, FAILED) == Settled(JobState.CANCELED, first=True)
    assert not redis.hexists(job_key(job.id), "error")


def test_an_unknown_job_is_nobodys(jobs: Jobs) -> None:
    """Neither claimed nor created."""
    assert jobs.claim("job_of_yesterday") is None


def test_a_second_delivery_waits_for_the_first(redis: Redis, make_job: MakeJob) -> None:
    """While a lease lives the job is not run twice; when the first ends, the second finds it settled."""
    job = make_job()
    first, second = (Jobs(redis, lease_s=0.4, max_attempts=3) for _ in range(2))
    claim = claimed(first, job.id)
    waiter: list[object] = []
    thread = threading.Thread(target=lambda: waiter.append(second.claim(job.id)))
    thread.start()
    first.renew_leases()
    first.finish(claim, FAILED)
    thread.join()
    assert waiter == [Settled(JobState.FAILED, first=False)]


def test_a_lease_lost_with_the_broker_does_not_run_a_job_twice(redis: Redis, make_job: MakeJob) -> None:
    """A worker that still runs the job knows so without the lease: its second delivery waits."""
    job = make_job()
    jobs = Jobs(redis, lease_s=0.4, max_attempts=3)
    claim = claimed(jobs, job.id)
    redis.delete(lease_key(job.id))
    waiter: list[object] = []
    thread = threading.Thread(target=lambda: waiter.append(jobs.claim(job.id)))
    thread.start()
    thread.join(0.3)
    jobs.finish(claim, FAILED)
    thread.join()
    assert waiter == [Settled(JobState.FAILED, first=False)]
    assert redis.hget(job_key(job.id), "attempts") == "1"


def test_a_job_whose_worker_died_is_claimed_again(redis: Redis, make_job: MakeJob) -> None:
    """When the lease has run out, the next claim is the second attempt."""
    job = make_job()
    claimed(Jobs(redis, lease_s=0.05, max_attempts=3), job.id)
    assert claimed(Jobs(redis, lease_s=0.05, max_attempts=3), job.id).attempt == 2


def test_a_job_that_ends_its_workers_is_given_up(redis: Redis, make_job: MakeJob) -> None:
    """After three attempts the claim is for giving up, and counts no fourth."""
    job = make_job()
    for _ in range(3):
        claim = claimed(Jobs(redis, lease_s=60, max_attempts=3), job.id)
        assert not claim.exhausted
        redis.delete(lease_key(job.id))
    assert claimed(Jobs(redis, lease_s=60, max_attempts=3), job.id).exhausted
    assert redis.hget(job_key(job.id), "attempts") == "3"


def test_renewal_leaves_a_lease_of_others_alone(jobs: Jobs, redis: Redis, make_job: MakeJob) -> None:
    """A worker that lost its lease does not lengthen its successor's."""
    job = make_job()
    claimed(jobs, job.id)
    redis.set(lease_key(job.id), "another", px=5000)
    jobs.renew_leases()
    assert redis.pttl(lease_key(job.id)) <= 5000


def test_renewal_gives_a_lease_its_time_again(jobs: Jobs, redis: Redis, make_job: MakeJob) -> None:
    """A lease near its end lives its full time after a beat."""
    job = make_job()
    claimed(jobs, job.id)
    redis.pexpire(lease_key(job.id), 5000)
    jobs.renew_leases()
    assert redis.pttl(lease_key(job.id)) > 50_000


def test_a_command_sent_twice_counts_once(jobs: Jobs, redis: Redis, make_job: MakeJob) -> None:
    """redis-py sends again when the reply got lost: the same token claims and ends once."""
    job = make_job()
    assert jobs._try_claim(job.id, "token") == jobs._try_claim(job.id, "token")
    claim = Claim(job.id, "token", attempt=1, exhausted=False, at=0.0)
    assert jobs.finish(claim, FAILED) == jobs.finish(claim, FAILED) == Settled(JobState.FAILED, first=True)
    assert redis.hget(job_key(job.id), "attempts") == "1"


@pytest.mark.parametrize(
    ("broker", "expected"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis+socket:///run/valkey.sock", "unix:///run/valkey.sock"),
    ],
)
def test_redis_py_is_told_celerys_socket_in_its_own_words(broker: str, expected: str) -> None:
    """One setting names the broker for both."""
    assert redis_url(broker) == expected

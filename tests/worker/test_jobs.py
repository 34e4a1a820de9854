"""Job state in Redis, against a real broker."""

from __future__ import annotations

import json
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from tests.replies import entries, state
from tests.worker.conftest import claimed, tiny_jobs
from worker.contract import (
    DEAD_LETTERS_KEY,
    RESULT_TTL_S,
    DeadLetter,
    EventName,
    JobEvent,
    JobState,
    Problem,
    drained_key,
    events_channel,
    events_key,
    job_key,
    open_jobs_key,
    queue_name,
    redis_url,
)
from worker.jobs import Jobs, Outcome, Refusal, Settled, free, lease_key
from worker.stops import StopReason

if TYPE_CHECKING:
    from redis import Redis

    from tests.worker.conftest import MakeJob
    from worker.contract import AnswerJob

PROBLEM = Problem(slug="internal-error", status=500, title="Internal error", detail="No.")
FAILED = Outcome(JobState.FAILED, PROBLEM)
EXPIRED = Outcome(JobState.EXPIRED, PROBLEM)
PAYLOAD = '{"what": "was sent"}'


def events(redis: Redis, job_id: str) -> list[tuple[str, dict[str, Any]]]:
    """The job's stream: names and data."""
    return [(entry["event"], json.loads(entry["data"])) for entry in entries(redis, events_key(job_id))]


def lose_worker(redis: Redis, job_id: str) -> None:
    """As when the worker that holds the job is killed and its lease runs out."""
    assert redis.delete(lease_key(job_id))


def test_a_claim_starts_the_job_and_counts_the_attempt(jobs: Jobs, redis: Redis, make_job: MakeJob) -> None:
    """Claimed: running, with a start, one attempt, a lease, and one more job on this worker."""
    job = make_job()
    claim = claimed(jobs, job.id)
    stored = redis.hgetall(job_key(job.id))
    assert (stored["state"], stored["attempts"], claim.attempt) == ("running", "1", 1)
    assert float(stored["started_at"]) >= job.created_at
    assert redis.ttl(lease_key(job.id)) > 0
    assert jobs.running == 1


def test_every_change_of_state_and_text_are_published(jobs: Jobs, redis: Redis, make_job: MakeJob) -> None:
    """A listener hears the start, that there is text, and the end."""
    job = make_job()
    with redis.pubsub(ignore_subscribe_messages=True) as listener:
        listener.subscribe(events_channel(job.id))
        claim = claimed(jobs, job.id)
        jobs.tell(claim, 1, [(EventName.TOKEN, "{}"), (EventName.TOKEN, "{}")])
        jobs.finish(claim, FAILED)
        heard: list[JobState] = []
        while JobState.FAILED not in heard:
            message = listener.get_message(timeout=5)
            if message:
                heard.append(JobEvent.model_validate_json(message["data"]).state)
    assert heard == [JobState.RUNNING, JobState.RUNNING, JobState.FAILED]


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
    assert redis.get(drained_key("tiny", float(stored["finished_at"]))) == "1"


def test_of_many_ends_one_stands(redis: Redis, make_job: MakeJob) -> None:
    """Eight executions that end at once: one terminal state, one of them counts it."""
    job = make_job()
    workers = [tiny_jobs(redis, max_attempts=100) for _ in range(8)]
    claims = []
    for jobs in workers:
        claims.append(claimed(jobs, job.id, alone=True))
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
    assert states == {state(redis, job.id)}
    assert sum(one.first for one in settled if one) == 1


@pytest.mark.parametrize("ended", [JobState.CANCELED, JobState.EXPIRED])
def test_a_job_that_the_front_end_ended_is_not_started(
    jobs: Jobs, redis: Redis, make_job: MakeJob, ended: JobState
) -> None:
    """Its claim tells the state, and one delivery only may count it."""
    job = make_job()
    redis.hset(job_key(job.id), "state", ended)
    assert jobs.claim(job.id) == Settled(ended, first=True)
    assert jobs.claim(job.id) == Settled(ended, first=False)
    assert "attempts" not in redis.hgetall(job_key(job.id))


@pytest.mark.parametrize("ended", [JobState.CANCELED, JobState.EXPIRED])
def test_an_end_by_the_front_end_stands(jobs: Jobs, redis: Redis, make_job: MakeJob, ended: JobState) -> None:
    """The worker's own end comes too late and changes nothing."""
    job = make_job()
    claim = claimed(jobs, job.id)
    redis.hset(job_key(job.id), "state", ended)
    assert jobs.finish(claim, FAILED) == Settled(ended, first=True)
    assert not redis.hexists(job_key(job.id), "error")


def test_an_unknown_job_is_nobodys(jobs: Jobs) -> None:
    """Neither claimed nor created."""
    assert jobs.claim("job_of_yesterday") is Refusal.UNKNOWN


def test_a_job_in_anothers_hands_is_refused(jobs: Jobs, redis: Redis, make_job: MakeJob) -> None:
    """While a lease lives nobody else runs the job, however often it is delivered."""
    job = make_job()
    claimed(jobs, job.id)
    assert tiny_jobs(redis).claim(job.id) is Refusal.LEASED
    assert redis.hget(job_key(job.id), "attempts") == "1"


def test_one_process_has_a_job_in_hand_once(jobs: Jobs) -> None:
    """A second delivery to the same worker is told so, and the next after the first has ended is not."""
    with jobs.in_hand("job_1") as first, jobs.in_hand("job_1") as second:
        assert (first, second) == (True, False)
    with jobs.in_hand("job_1") as again:
        assert again


def test_a_job_whose_worker_died_has_to_run_alone(jobs: Jobs, redis: Redis, make_job: MakeJob) -> None:
    """In company it is refused; alone it is claimed, and its first death, in company, does not count."""
    job = make_job()
    claimed(jobs, job.id)
    lose_worker(redis, job.id)
    assert jobs.claim(job.id) is Refusal.SUSPECT
    assert claimed(jobs, job.id, alone=True).attempt == 1
    assert [data for _, data in events(redis, job.id)] == [{"attempt": 1}, {"attempt": 1}]


def test_three_deaths_alone_are_enough(jobs: Jobs, redis: Redis, make_job: MakeJob) -> None:
    """The next claim is for giving up, counts no fourth attempt, and is the same when it is sent twice."""
    job = make_job()
    claimed(jobs, job.id)
    for attempt in (1, 2, 3):
        lose_worker(redis, job.id)
        claim = claimed(jobs, job.id, alone=True)
        assert (claim.attempt, claim.exhausted) == (attempt, False)
    lose_worker(redis, job.id)
    assert claimed(jobs, job.id, alone=True).exhausted
    assert redis.hget(job_key(job.id), "attempts") == "3"


def test_who_is_suspected_stays_so(jobs: Jobs, redis: Redis, make_job: MakeJob) -> None:
    """Also when a worker that was to leave gave the job back in between."""
    job = make_job()
    claimed(jobs, job.id)
    lose_worker(redis, job.id)
    assert jobs.give_back(claimed(jobs, job.id, alone=True))
    assert redis.hget(job_key(job.id), "state") == "queued"
    assert jobs.claim(job.id) is Refusal.SUSPECT


def test_a_claim_given_back_was_no_attempt(jobs: Jobs, redis: Redis, make_job: MakeJob) -> None:
    """The job is queued, free and without suspicion; the next worker's attempt is the first."""
    job = make_job()
    assert jobs.give_back(claimed(jobs, job.id))
    assert not redis.exists(lease_key(job.id))
    assert jobs.running == 0
    assert claimed(tiny_jobs(redis), job.id).attempt == 1


def test_what_another_has_claimed_is_not_given_back(jobs: Jobs, redis: Redis, make_job: MakeJob) -> None:
    """A worker that was away too long leaves its successor alone."""
    job = make_job()
    late = claimed(jobs, job.id)
    lose_worker(redis, job.id)
    claimed(tiny_jobs(redis), job.id, alone=True)
    assert not jobs.give_back(late)
    assert redis.hget(job_key(job.id), "state") == "running"
    assert redis.exists(lease_key(job.id))


def test_a_renewal_stops_what_is_no_longer_ours(jobs: Jobs, redis: Redis, make_job: MakeJob) -> None:
    """Canceled, taken over, forgotten, or still ours though its lease ran out with the broker."""
    canceled, taken, gone, returned, ours = (claimed(jobs, make_job().id) for _ in range(5))
    redis.hset(job_key(canceled.job_id), "state", JobState.CANCELED)
    lose_worker(redis, taken.job_id)
    claimed(tiny_jobs(redis), taken.job_id, alone=True)
    redis.delete(job_key(gone.job_id))
    redis.hset(job_key(returned.job_id), "state", JobState.QUEUED)  # by who had taken it over
    lose_worker(redis, ours.job_id)
    jobs.renew_leases()
    reasons = [claim.stop.reason for claim in (canceled, taken, gone, returned, ours)]
    assert reasons == [StopReason.CANCELED, *[StopReason.LOST] * 3, None]
    assert redis.get(lease_key(ours.job_id)) == ours.token


def test_a_lease_that_may_have_run_out_stops_its_job(redis: Redis, make_job: MakeJob) -> None:
    """Without a renewal for most of it the worker cannot be sure that nobody else has begun."""
    jobs = tiny_jobs(redis, lease_s=0.4)
    claim = claimed(jobs, make_job().id)
    jobs.fence()
    assert claim.stop.reason is None
    claim.renewed_at -= 0.4
    jobs.fence()
    assert claim.stop.reason is StopReason.LOST


def test_who_leaves_takes_nothing_new(jobs: Jobs, make_job: MakeJob) -> None:
    """What runs is stopped, and so is what is claimed from then on."""
    before = claimed(jobs, make_job().id)
    jobs.stop_all(StopReason.DRAINING)
    after = claimed(jobs, make_job().id)
    assert before.stop.reason is after.stop.reason is StopReason.DRAINING


def queue(redis: Redis, job: AnswerJob) -> None:
    """The job's message in its queue, as far as a sweep looks at it, and its entry among the open jobs."""
    redis.lpush(queue_name("tiny"), json.dumps({"headers": {"id": job.id}}))
    redis.zadd(open_jobs_key("tiny"), {job.id: 0})
    redis.hset(job_key(job.id), "payload", PAYLOAD)


def test_a_sweep_finds_the_jobs_of_a_worker_that_died(redis: Redis, make_job: MakeJob) -> None:
    """Once its lease is over, once only, and not while it lives."""
    jobs, job = tiny_jobs(redis, lease_s=0.05), make_job()
    claimed(jobs, job.id, PAYLOAD)
    assert jobs.sweep() == []
    time.sleep(0.06)
    assert jobs.sweep() == [(job.id, json.loads(PAYLOAD))]
    assert jobs.sweep() == []


@pytest.mark.parametrize("waits", [True, False])
def test_a_sweep_finds_what_the_queue_has_lost(
    jobs: Jobs, redis: Redis, make_job: MakeJob, *, waits: bool
) -> None:
    """A queued job older than the queue's next is not in the queue; one that is no older may be."""
    now = time.time()
    job, next_job = make_job(created_at=now - 60), make_job(created_at=now - 90 if waits else now)
    queue(redis, next_job)
    queue(redis, job)
    found = [job_id for job_id, _ in jobs.sweep()]
    assert found == ([] if waits else [job.id])


def test_a_sweep_finds_a_job_that_an_empty_queue_has_lost(
    jobs: Jobs, redis: Redis, make_job: MakeJob
) -> None:
    """The broker handed its message to a connection whose other end was gone."""
    job = make_job()
    queue(redis, job)
    redis.delete(queue_name("tiny"))
    assert [job_id for job_id, _ in jobs.sweep()] == [job.id]


def test_a_sweep_comes_back_when_a_lease_runs_out(redis: Redis, make_job: MakeJob) -> None:
    """Not a whole lease later: a renewal may reach the broker long after it was written."""
    jobs, job = tiny_jobs(redis, lease_s=60), make_job()
    claimed(jobs, job.id)
    redis.zadd(open_jobs_key("tiny"), {job.id: 0})
    redis.pexpire(lease_key(job.id), 50)
    assert jobs.sweep() == []
    time.sleep(0.06)
    assert [job_id for job_id, _ in jobs.sweep()] == [job.id]


def test_the_jobs_of_a_dead_worker_are_free_at_once(redis: Redis, make_job: MakeJob) -> None:
    """Those that it held are found by the next sweep, and again have to run alone; others keep theirs."""
    dead, other = tiny_jobs(redis, owner="dead"), tiny_jobs(redis, owner="deaf")
    mine, theirs = make_job(), make_job()
    claimed(dead, mine.id)
    kept = claimed(other, theirs.id)
    assert other.sweep() == []
    assert free(redis, "tiny", "dead") == 1
    assert [job_id for job_id, _ in other.sweep()] == [mine.id]
    assert redis.get(lease_key(theirs.id)) == kept.token
    assert other.claim(mine.id) is Refusal.SUSPECT
    assert claimed(other, mine.id, alone=True).attempt == 1


def test_what_waited_in_a_dead_workers_hands_is_looked_for_too(redis: Redis, make_job: MakeJob) -> None:
    """A suspect that waits for its turn alone has no lease that could tell whose it is."""
    jobs, job = tiny_jobs(redis, owner="dead"), make_job()
    claimed(tiny_jobs(redis), job.id)
    lose_worker(redis, job.id)
    with jobs.in_hand(job.id):
        jobs.renew_leases()
        assert jobs.sweep() == []
        assert free(redis, "tiny", "dead") == 0
    assert [job_id for job_id, _ in jobs.sweep()] == [job.id]


def test_what_is_sent_again_goes_first(jobs: Jobs, redis: Redis) -> None:
    """Messages enter on the left and leave on the right."""
    redis.lpush(queue_name("tiny"), "first", "second", "sent again")
    jobs.put_first()
    assert redis.lrange(queue_name("tiny"), 0, -1) == ["second", "first", "sent again"]


def test_a_sweep_forgets_what_has_ended(jobs: Jobs, redis: Redis, make_job: MakeJob) -> None:
    """Ended by its worker, canceled, or gone: none is open any more."""
    ended, canceled, gone = make_job(), make_job(), make_job()
    jobs.finish(claimed(jobs, ended.id), FAILED)
    for job in (canceled, gone):
        queue(redis, job)
    redis.hset(job_key(canceled.id), "state", JobState.CANCELED)
    redis.delete(job_key(gone.id))
    assert jobs.sweep() == []
    assert not redis.exists(open_jobs_key("tiny"))


def test_the_stream_tells_start_text_and_end(jobs: Jobs, redis: Redis, make_job: MakeJob) -> None:
    """In order, once for each number, and it lives as long as the job."""
    job = make_job()
    claim = claimed(jobs, job.id)
    for number, text in ((1, "a"), (1, "a"), (2, "b")):
        jobs.tell(claim, number, [(EventName.TOKEN, f'{{"question":0,"text":"{text}"}}')])
    jobs.finish(claim, FAILED)
    jobs.tell(claim, 3, [(EventName.TOKEN, "{}")])
    assert events(redis, job.id) == [
        ("started", {"attempt": 1}),
        ("token", {"question": 0, "text": "a"}),
        ("token", {"question": 0, "text": "b"}),
        ("failed", {"id": job.id, "state": "failed"}),
    ]
    assert 0 < redis.ttl(events_key(job.id)) <= RESULT_TTL_S


def test_a_worker_that_lost_a_job_says_no_more(jobs: Jobs, redis: Redis, make_job: MakeJob) -> None:
    """The text of the second attempt is not mixed with that of the first."""
    job = make_job()
    late = claimed(jobs, job.id)
    lose_worker(redis, job.id)
    claimed(tiny_jobs(redis), job.id, alone=True)
    jobs.tell(late, 1, [(EventName.TOKEN, "{}")])
    assert [name for name, _ in events(redis, job.id)] == ["started", "started"]


def test_a_job_given_up_leaves_a_letter(jobs: Jobs, redis: Redis, make_job: MakeJob) -> None:
    """What an operator needs to look into it stands in a stream of its own."""
    job = make_job()
    letter = DeadLetter(
        id=job.id, request_id="req_1", model="tiny", attempts=3, media=(), created_at=1, given_up_at=2
    )
    jobs.finish(claimed(jobs, job.id), Outcome(JobState.FAILED, PROBLEM, letter))
    (entry,) = entries(redis, DEAD_LETTERS_KEY)
    assert DeadLetter.model_validate_json(entry["job"]) == letter


def test_a_broker_that_is_away_is_waited_for(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has to happen is tried until it does."""
    monkeypatch.setattr("worker.jobs.INSIST_S", 0.0)
    call = Mock(side_effect=[RedisConnectionError(), RedisTimeoutError(), "done"])
    assert jobs.insist(call) == "done"


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


def test_a_command_sent_twice_counts_once(
    jobs: Jobs, redis: Redis, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """redis-py sends again when the reply got lost: the same token claims and ends once."""
    job = make_job()
    monkeypatch.setattr("worker.jobs.uuid4", lambda: SimpleNamespace(hex="token"))
    claimed(jobs, job.id)
    claim = claimed(jobs, job.id)
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

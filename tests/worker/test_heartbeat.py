"""A worker is seen while it lives."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.replies import field
from tests.worker.conftest import claimed, tiny_jobs
from worker.cancellations import Cancellations
from worker.contract import CANCEL_CHANNEL, METHODS, WORKERS_KEY, WorkerStatus
from worker.heartbeat import FORGET_S, Heartbeat
from worker.stops import StopReason

if TYPE_CHECKING:
    from tests.worker.conftest import MakeJob
    from worker.jobs import Jobs


class Status:
    """Reports a warm worker; `asked` is set at the second beat."""

    def __init__(self) -> None:
        self.count = 0
        self.asked_twice = threading.Event()

    def __call__(self) -> WorkerStatus:
        self.count += 1
        if self.count > 1:
            self.asked_twice.set()
        return WorkerStatus(
            worker_id="one",
            model="tiny",
            family="llava",
            device="cpu",
            modalities=("image",),
            methods=METHODS,
            default_token_budget=64,
            warm=True,
            jobs_running=0,
            seen_at=time.time(),
        )


def beating(redis: Redis, jobs: Jobs, status: Status, every_s: float, **changes: Any) -> Heartbeat:
    """A heartbeat that sends nothing again and checks nothing, and does not die, unless told."""
    hooks = {"send_again": lambda _id, _payload: None, "check": lambda: None, "on_death": _raise} | changes
    return Heartbeat(redis, jobs, status, every_s=every_s, **hooks)


def _raise(error: BaseException) -> None:
    raise error


def test_a_worker_is_listed_until_it_leaves(redis: Redis, jobs: Jobs) -> None:
    """Its status stands in Redis between the first beat and the end of the block."""
    status = Status()
    with beating(redis, jobs, status, 0.01):
        assert status.asked_twice.wait(10)
        assert WorkerStatus.model_validate_json(field(redis, WORKERS_KEY, "one")).warm
    assert not redis.hexists(WORKERS_KEY, "one")


def test_news_do_not_wait_for_the_next_beat(redis: Redis, jobs: Jobs) -> None:
    """A worker that has just become warm says so at once."""
    status = Status()
    with beating(redis, jobs, status, 3600) as heartbeat:
        heartbeat.beat_now()
        assert status.asked_twice.wait(10)


def test_a_broker_that_is_away_does_not_end_the_heartbeat(caplog: pytest.LogCaptureFixture) -> None:
    """The thread goes on and tries again; the log says that it could not be heard."""
    status = Status()
    nobody = Redis(port=1, retry=Retry(NoBackoff(), 0), socket_connect_timeout=0.2)
    with beating(nobody, tiny_jobs(nobody), status, 0.01):
        assert status.asked_twice.wait(10)
    assert "the broker does not answer (ConnectionError)" in caplog.text


def test_a_lost_job_is_sent_again(redis: Redis, make_job: MakeJob) -> None:
    """By whichever worker's beat finds it, with what its first worker was sent."""
    sent: list[tuple[str, dict[str, Any]]] = []
    jobs, job = tiny_jobs(redis, lease_s=0.05), make_job()
    claimed(tiny_jobs(redis, lease_s=0.05), job.id, '{"what": "was sent"}')
    again = threading.Event()

    def send_again(job_id: str, payload: dict[str, Any]) -> None:
        sent.append((job_id, payload))
        again.set()

    with beating(redis, jobs, Status(), 0.01, send_again=send_again):
        assert again.wait(10)
    assert sent[0] == (job.id, {"what": "was sent"})


def test_a_worker_that_is_long_gone_is_forgotten(redis: Redis, jobs: Jobs) -> None:
    """One that was killed cannot take itself off the list."""
    gone = Status()().model_copy(update={"worker_id": "gone", "seen_at": time.time() - 2 * FORGET_S})
    redis.hset(WORKERS_KEY, "gone", gone.model_dump_json())
    status = Status()
    with beating(redis, jobs, status, 0.01):
        assert status.asked_twice.wait(10)
        assert redis.hkeys(WORKERS_KEY) == ["one"]


@pytest.mark.parametrize(
    "beat", ["not json", "[]", "{}", '{"seen_at": null}', '{"seen_at": NaN}', "[" * 100_000, b"\xff"]
)
def test_what_is_no_heartbeat_is_forgotten(redis: Redis, jobs: Jobs, beat: str | bytes) -> None:
    """And ends nobody's: the hash is everyone's, of any version."""
    redis.hset(WORKERS_KEY, "odd", beat)
    redis.hset(WORKERS_KEY, b"\xff", beat)
    status = Status()
    with beating(redis, jobs, status, 0.01):
        assert status.asked_twice.wait(10)
        assert redis.hkeys(WORKERS_KEY) == ["one"]


@pytest.mark.parametrize("place", ["send_again", "check"])
def test_a_heartbeat_does_not_end_without_a_word(redis: Redis, make_job: MakeJob, place: str) -> None:
    """Its process would go on with leases that nobody renews."""
    jobs, told = tiny_jobs(redis, lease_s=0.05), list[BaseException]()
    claimed(tiny_jobs(redis, lease_s=0.05), make_job().id, "{}")
    dead, error = threading.Event(), RuntimeError()

    def fail(*_: object) -> None:
        raise error

    def on_death(by: BaseException) -> None:
        told.append(by)
        dead.set()

    with beating(redis, jobs, Status(), 0.01, on_death=on_death, **{place: fail}):
        assert dead.wait(10)
    assert told == [error]


def test_a_cancellation_is_heard_at_once(redis: Redis, make_job: MakeJob) -> None:
    """Published on the channel, it stops the job that this worker runs, and no other."""
    jobs, wanted, unwanted = tiny_jobs(redis), make_job(), make_job()
    kept, canceled = (claimed(jobs, job.id) for job in (wanted, unwanted))
    stopped = threading.Event()
    canceled.stop.then(stopped.set)
    with Cancellations(redis, jobs):
        while not redis.publish(CANCEL_CHANNEL, unwanted.id):
            time.sleep(0.001)
        assert stopped.wait(10)
    assert (kept.stop.reason, canceled.stop.reason) == (None, StopReason.CANCELED)

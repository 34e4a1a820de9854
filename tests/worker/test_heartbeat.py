"""A worker is seen while it lives."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from redis import Redis

from worker.contract import METHODS, WORKERS_KEY, WorkerStatus
from worker.heartbeat import Heartbeat
from worker.jobs import Jobs

if TYPE_CHECKING:
    import pytest


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


def test_a_worker_is_listed_until_it_leaves(redis: Redis, jobs: Jobs) -> None:
    """Its status stands in Redis between the first beat and the end of the block."""
    status = Status()
    with Heartbeat(redis, jobs, status, every_s=0.01):
        assert status.asked_twice.wait(10)
        assert WorkerStatus.model_validate_json(redis.hget(WORKERS_KEY, "one")).warm
    assert not redis.hexists(WORKERS_KEY, "one")


def test_news_do_not_wait_for_the_next_beat(redis: Redis, jobs: Jobs) -> None:
    """A worker that has just become warm says so at once."""
    status = Status()
    with Heartbeat(redis, jobs, status, every_s=3600) as heartbeat:
        heartbeat.beat_now()
        assert status.asked_twice.wait(10)


def test_a_broker_that_is_away_does_not_end_the_heartbeat(caplog: pytest.LogCaptureFixture) -> None:
    """The thread goes on and tries again; the log says that it could not be heard."""
    status = Status()
    nobody = Redis(port=1, retry=None, socket_connect_timeout=0.2)
    with Heartbeat(nobody, Jobs(nobody, lease_s=60, max_attempts=3), status, every_s=0.01):
        assert status.asked_twice.wait(10)
    assert "the broker does not answer (ConnectionError)" in caplog.text

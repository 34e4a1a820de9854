"""What a worker's probes are told."""

from __future__ import annotations

from http.client import HTTPConnection
from typing import TYPE_CHECKING

import psutil
import pytest
import torch
from redis.exceptions import ConnectionError as BrokerAwayError

from worker.limits import memory_limit_bytes
from worker.metrics import WorkerMetrics
from worker.probes import STALLED_S, Probes

if TYPE_CHECKING:
    from pathlib import Path


class Idler:
    """A worker's own numbers, to be set by the test: warm, jobs waiting, none running."""

    def __init__(self) -> None:
        self.now = 0.0
        self.queued: int | Exception = 3
        self.running = 0
        self.ended = 0
        self.ready = True
        self.probes = Probes(
            waiting=self._waiting,
            running=lambda: self.running,
            ended=lambda: self.ended,
            ready=lambda: self.ready,
            clock=lambda: self.now,
        )

    def _waiting(self) -> int:
        if isinstance(self.queued, Exception):
            raise self.queued
        return self.queued

    def alive_after(self, seconds: float) -> bool:
        """Asked twice, `seconds` apart."""
        assert self.probes.alive
        self.now += seconds
        return self.probes.alive


def test_a_worker_that_takes_nothing_while_jobs_wait_is_dead_after_a_while() -> None:
    """Not at the first look, and again alive once it has taken one."""
    worker = Idler()
    assert worker.alive_after(STALLED_S - 1)
    assert not worker.alive_after(1)
    worker.running = 1
    assert worker.alive_after(0)
    worker.running = 0
    assert worker.alive_after(STALLED_S - 1)


@pytest.mark.parametrize(
    "excuse", [{"queued": 0}, {"running": 1}, {"ready": False}, {"queued": BrokerAwayError()}], ids=str
)
def test_a_worker_with_an_excuse_lives(excuse: dict[str, object]) -> None:
    """Nothing to do, busy, still loading or draining, or a broker that is away: no restart would help."""
    worker = Idler()
    vars(worker).update(excuse)
    assert worker.alive_after(10 * STALLED_S)


def test_jobs_that_end_between_two_looks_are_a_sign_of_life() -> None:
    """A worker of short jobs may be seen without any, and the queue full, at every look."""
    worker = Idler()
    for _ in range(10):
        worker.ended += 1
        assert worker.alive_after(0)
        worker.ended += 1
        worker.now += STALLED_S
        assert worker.probes.alive


def test_the_probes_are_served_beside_the_metrics(port: int) -> None:
    """200 or 503, without a log line; other paths are 404."""
    worker = Idler()
    worker.ready = False
    with WorkerMetrics("tiny").serving("127.0.0.1", port, worker.probes):

        def status(path: str) -> int:
            connection = HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", path)
            code = connection.getresponse().status
            connection.close()
            return code

        assert [status(path) for path in ("/livez", "/readyz", "/metrics", "/")] == [200, 503, 200, 404]
        worker.ready = True
        assert status("/readyz") == 200
        assert status("/livez") == 200
        worker.now += STALLED_S
        assert status("/livez") == 503


@pytest.mark.parametrize(
    ("name", "content", "limited"),
    [
        ("memory.max", "1048576\n", True),
        ("memory.max", "max\n", False),
        ("memory/memory.limit_in_bytes", "1048576\n", True),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n", False),
        ("none", "", False),
    ],
)
def test_a_container_knows_its_own_limit(tmp_path: Path, name: str, content: str, *, limited: bool) -> None:
    """What the control group allows, and the machine's memory where it allows all or there is none."""
    (tmp_path / "memory").mkdir()
    (tmp_path / name).write_text(content)
    limit = memory_limit_bytes(torch.device("cpu"), tmp_path)
    assert limit == (1048576 if limited else psutil.virtual_memory().total)

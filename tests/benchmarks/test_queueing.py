"""The stand of `benchmarks.queueing`: how many ask, and what becomes of its servers."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from benchmarks.queueing import BATCH, Part, clients_of

ROOT = Path(__file__).parents[2]


def test_clients_fill_every_worker_twice() -> None:
    """However few jobs there are: with fewer clients, workers would wait for them."""
    assert [clients_of(workers) for workers in (1, 64)] == [2 * BATCH, 128 * BATCH]


def test_a_part_that_ends_is_told_with_its_log(tmp_path: Path) -> None:
    """Nobody waits for it."""
    log = tmp_path / "front end.log"
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-c", "raise SystemExit('no port')"], stderr=output)
    with process, pytest.raises(SystemExit, match=r"front end ended \(1\):\nno port"):
        Part("front end", process, log).until(lambda: False)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_its_servers_end_with_it(end: signal.Signals) -> None:
    """However it ends; here while its workers load."""
    argv = [sys.executable, "-m", "benchmarks.queueing", "--workers", "1", "--jobs", "160"]
    with subprocess.Popen(argv, cwd=ROOT) as benchmark:
        started(psutil.Process(benchmark.pid), 2)
        time.sleep(1)  # the guard hears of each a moment later
        servers = started(psutil.Process(benchmark.pid), 2)
        benchmark.send_signal(end)
    until = time.monotonic() + 60
    while any(map(runs, servers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(runs, servers))


def started(benchmark: psutil.Process, count: int) -> list[psutil.Process]:
    """Broker and workers, which are there besides the guard."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        with suppress(psutil.NoSuchProcess):
            found = [each for each in benchmark.children() if "guard.py" not in " ".join(each.cmdline())]
            if len(found) >= count:
                return found
        time.sleep(0.05)
    pytest.fail("nothing was started")


def runs(process: psutil.Process) -> bool:
    """A zombie does not: nobody may be there to bury it."""
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False

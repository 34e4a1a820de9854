"""Who watches the serving process: real processes, with a few lines of Python in place of the worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from worker.pulse import ALIVE, STALLED, Pulse
from worker.settings import WorkerSettings
from worker.supervisor import BACKOFF_S, BAD_SETTING, EX_GIVE_UP, FAILED, HOPELESS, MINUTE_S, Supervisor, main

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from redis import Redis

CHILD = """
import os, signal, sys, time
pipe, diary, life = int(sys.argv[-1]), sys.argv[-4], sys.argv[-3].split(",")
with open(diary, "a+") as file:
    file.write("x")
    file.flush()
    lives = file.tell()
what = life[min(lives, len(life)) - 1]
for word in what.split("+"):
    if word == "warm": os.write(pipe, b"w")
    elif word == "stall": os.write(pipe, b"s")
    elif word == "sleep": time.sleep(60)
    elif word == "deaf": signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif word == "die": os.kill(os.getpid(), signal.SIGKILL)
    elif word == "ready": print("ready", flush=True)
    elif word == "large": assert "glibc.malloc.hugetlb=1" in os.environ["GLIBC_TUNABLES"]
    elif word == "raise": raise RuntimeError("CUDA error: out of memory")
    else: sys.exit(int(word))
"""
PARENT = """
import sys
from worker.settings import WorkerSettings
from worker.supervisor import Supervisor
sys.exit(Supervisor(sys.argv[1:], WorkerSettings(media_url="memory://", grace_s=0)).run())
"""


def command(diary: Path, lives: str) -> tuple[str, ...]:
    """A process that does, life after life, what the words say; the last one again and again."""
    return (sys.executable, "-c", CHILD, str(diary), lives)


def outcome(diary: Path, lives: str, **settings: Any) -> tuple[int, int]:
    """The supervisor's exit code, and how often it started the process."""
    code = Supervisor(command(diary, lives), WorkerSettings(media_url="memory://", **settings)).run()
    return code, len(diary.read_text())


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    """The supervisor takes over the process' signals; the tests' own come back."""
    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    yield
    signal.set_wakeup_fd(-1)
    for each, handler in handlers.items():
        signal.signal(each, handler)


@pytest.fixture
def diary(tmp_path: Path) -> Path:
    return tmp_path / "diary"


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not wait between two lives."""
    monkeypatch.setattr("worker.supervisor.BACKOFF_S", 0.0)


def test_what_dies_is_started_again(diary: Path) -> None:
    """However it dies, once it has been warm, until it leaves of its own will."""
    assert outcome(diary, "warm+die,warm+70,warm+0") == (0, 3)


def test_it_computes_in_large_pages(diary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert outcome(diary, "large+0") == (0, 1)


def test_what_no_restart_mends_is_not_tried(diary: Path) -> None:
    """The process says so by its code, unless it has been warm before: then it is a death like another."""
    assert outcome(diary, f"warm+{EX_GIVE_UP},{EX_GIVE_UP}") == (FAILED, 2)


def test_an_error_that_nobody_caught_is_not_that(diary: Path) -> None:
    """Memory that was short at a start need not be at the next."""
    assert outcome(diary, "raise,warm+0") == (0, 2)


def test_what_never_gets_warm_is_given_up(diary: Path) -> None:
    """After a few lives, with the code that a shell gives a killed process."""
    assert outcome(diary, "die") == (128 + signal.SIGKILL, HOPELESS)


def test_what_stalls_is_replaced(diary: Path) -> None:
    """It is aborted, so that its log tells where it hung."""
    assert outcome(diary, "warm+stall+sleep,0") == (0, 2)


def test_the_jobs_of_a_process_that_died_are_free_at_once(
    diary: Path, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each life has a name of its own, under which its jobs are freed before the next one begins."""
    freed: list[tuple[str, str, int]] = []

    def free(_redis: Redis, model: str, name: str) -> int:
        freed.append((model, name, len(diary.read_text())))
        return 0

    monkeypatch.setattr("worker.supervisor.free", free)
    code, lives = outcome(diary, "warm+die,die,warm+70,warm+0", broker_url=broker_url, model="tiny")
    assert (code, lives) == (0, 4)
    assert [(model, life) for model, _, life in freed] == [("tiny", 1), ("tiny", 3), ("tiny", 4)]
    assert len({name for _, name, _ in freed}) == 3


def test_a_broker_that_is_away_does_not_keep_a_process_from_its_next_life(
    diary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its jobs are found when their leases run out."""
    assert outcome(diary, "warm+die,0", broker_url="redis://127.0.0.1:1/0") == (0, 2)
    assert "its jobs stay leased to it (ConnectionError)" in caplog.text


def test_what_is_silent_is_replaced(diary: Path) -> None:
    """A process that cannot even say that it stalls."""
    assert outcome(diary, "warm+sleep,0", engine_stall_s=0.2) == (0, 2)


def test_restarts_have_a_rate(diary: Path) -> None:
    """Once a minute has had its starts, the next waits until the oldest of them is a minute old."""
    settings = WorkerSettings(media_url="memory://", max_restarts_per_minute=2)
    supervisor = Supervisor(command(diary, "0"), settings)
    assert supervisor._room_in(MINUTE_S) == 0
    supervisor._starts.extend([0.0, 0.0])
    assert supervisor._room_in(1e12) > 0
    assert BACKOFF_S > 0


@pytest.mark.parametrize("lives", ["ready+sleep", "deaf+ready+sleep"])
def test_a_wish_to_stop_ends_both(diary: Path, lives: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM is passed on; who does not heed it is killed when its grace is over."""
    script = PARENT.replace("import sys", "import sys, worker.supervisor as s; s.MARGIN_S = 0.1", 1)
    parent = subprocess.Popen(
        [sys.executable, "-c", script, *command(diary, lives)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    assert parent.stdout.readline() == "ready\n"
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(30) == 0
    assert parent.stdout.read() == ""  # nobody holds its other end any more


def test_a_pulse_tells_whether_the_engine_stalls() -> None:
    """One byte a second, the first at once; and what has to happen every second happens."""
    reader, writer = os.pipe()
    seconds: list[None] = []
    with Pulse(writer, lambda: False, lambda: seconds.append(None), lambda: None):
        assert os.read(reader, 1) == ALIVE
    with Pulse(writer, lambda: True, lambda: None, lambda: None):
        assert os.read(reader, 1) == STALLED
    assert seconds
    os.close(reader)
    os.close(writer)


def test_a_process_without_its_supervisor_ends() -> None:
    """Nobody reads its pulse any more: another one may be about to start."""
    reader, writer = os.pipe()
    os.close(reader)
    orphaned: list[None] = []
    pulse = Pulse(writer, lambda: False, lambda: None, lambda: orphaned.append(None))
    with pulse:
        pulse._thread.join(10)
    assert orphaned
    os.close(writer)


def test_a_bad_setting_is_a_line_and_never_its_value(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of the front end: a name and what is wrong, of each."""
    monkeypatch.delenv("PRISM_MEDIA_URL", raising=False)
    monkeypatch.setenv("PRISM_BROKER_URL", "redis://:secret@nowhere:1")
    monkeypatch.setenv("PRISM_MAX_BATCH", "secret")
    assert main() == BAD_SETTING
    told = capsys.readouterr().err
    assert [line.partition(":")[0] for line in told.splitlines()] == ["PRISM_MEDIA_URL", "PRISM_MAX_BATCH"]
    assert "secret" not in told

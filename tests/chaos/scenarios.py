"""The promises, each as something that is done to a running service and what is seen then.

A scenario returns what it measured and raises AssertionError where a promise was broken.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from statistics import median
from typing import TYPE_CHECKING, Any, Self

import httpx
import psutil

from tests.chaos import malformed
from tests.chaos.decoder import CRASH, HANG
from tests.chaos.serving import BATCH, STEP_S
from tests.chaos.stack import (
    DEADLY_PICTURE,
    MODEL,
    PICTURE,
    PICTURE_BYTES,
    STALL_S,
    WARM_S,
    asking,
    read,
    submit,
    wait_until,
)
from tests.replies import entries
from tests.service.conftest import data_uri
from worker.contract import DEAD_LETTERS_KEY, events_key, open_jobs_key, queue_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.chaos.stack import Stack, Worker

TERMINAL = {"succeeded", "failed", "canceled", "expired"}
ENDS = {"completed", "failed", "canceled", "expired"}
RERUN_S = 30
CLIENTS = 8
CONVERGE_S = 300
"""A hang becomes a failure."""
SEED = 7
LIVEZ_TIMES = 500
PROBE = """
import http.client, json, sys, time
times = []
for _ in range(int(sys.argv[2])):
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=10)
    began = time.perf_counter()
    connection.request("GET", "/livez")
    assert connection.getresponse().status == 200
    times.append((time.perf_counter() - began) * 1e3)
    connection.close()
    time.sleep(0.02)
print(json.dumps(times))
"""
"""Asks `/livez` at the port, so many times, and prints how many milliseconds each took."""
AGAIN = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
CONFLICT = HTTPStatus.CONFLICT
CAPACITY = round(BATCH / (20 * STEP_S))
"""Requests of 20 steps that a worker answers in a second."""
GROWTH_BYTES = 64 << 20
"""Of a front end under overload."""
LIMIT_S = 60
"""Deadline of the requests under overload."""

Finding = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How much is done: the short version in `make test`, the full one in `make chaos`."""

    workers: int
    jobs: int
    killing_s: float
    """How long the jobs of `killed_processes` keep coming."""
    kill_every_s: float
    """Between two kills, beside the time that a worker takes to start."""
    outage_s: float
    long_s: float
    """A job that takes longer than lease and visibility timeout."""
    load_s: float
    max_queue: int
    """A setting of the front ends."""
    waiting: int
    """Clients that wait while a large upload is under way."""
    upload_bytes: int
    livez_ms: float
    """Within which `/livez` answers, 99 times of 100; a test machine is too busy to say."""


SHORT = Scale(
    workers=2,
    jobs=60,
    killing_s=12,
    kill_every_s=3,
    outage_s=4,
    long_s=8,
    load_s=6,
    max_queue=64,
    waiting=30,
    upload_bytes=4 << 20,
    livez_ms=math.inf,
)
FULL = Scale(
    workers=3,
    jobs=1000,
    killing_s=240,
    kill_every_s=4,
    outage_s=60,
    long_s=90,
    load_s=120,
    max_queue=256,
    waiting=200,
    upload_bytes=30 << 20,
    livez_ms=50,
)


class Load:
    """Clients that submit jobs until so many are accepted, each with a question of its own.

    over_s: how long that takes at least.
    """

    def __init__(self, stack: Stack, jobs: int, over_s: float, *, prefix: str = "job") -> None:
        self._stack = stack
        self._questions = iter([f"{prefix} {number} steps=10" for number in range(jobs)])
        self._pause_s = over_s * CLIENTS / jobs
        self._lock = threading.Lock()
        self.accepted: dict[str, str] = {}
        self._threads = [threading.Thread(target=self._client, args=(n,)) for n in range(CLIENTS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join()

    def _client(self, number: int) -> None:
        with self._stack.client(number % self._stack.front_ends) as client:
            while True:
                with self._lock:
                    question = next(self._questions, None)
                if question is None:
                    return
                while (job_id := submit(client, question)) is None:
                    time.sleep(0.2)
                self.accepted[job_id] = question
                time.sleep(self._pause_s)

    def converge(self) -> Counter[str]:
        """Waits for an end of every accepted job; counts the states, and looks at each job's stream."""
        states = Counter[str]()
        with self._stack.client() as client:
            for job_id, question in self.accepted.items():
                job = ended(client, job_id)
                states[job["state"]] += 1
                if job["state"] == "succeeded":
                    assert job["result"]["answer"] == f"answer to {question}"
                _one_end(self._stack, job_id)
        return states


def accepted(client: httpx.Client, question: str, *, within_s: float = 60, **fields: Any) -> str:
    """Submits until the job is accepted; its id."""
    ids: list[str] = []

    def tried() -> bool:
        ids.extend(filter(None, [submit(client, question, **fields)]))
        return bool(ids)

    wait_until(tried, within_s, f"{question} is accepted")
    return ids[0]


def ended(client: httpx.Client, job_id: str) -> dict[str, Any]:
    """The job once it is in a terminal state."""
    jobs: list[dict[str, Any]] = []

    def over() -> bool:
        jobs.extend(job for job in [read(client, job_id)] if job and job["state"] in TERMINAL)
        return bool(jobs)

    wait_until(over, CONVERGE_S, f"job {job_id} ends")
    return jobs[0]


def _one_end(stack: Stack, job_id: str) -> None:
    """A job's stream tells of one end, and nothing after it."""
    names = [entry["event"] for entry in entries(stack.redis, events_key(job_id))]
    assert sum(name in ENDS for name in names) == 1, names
    assert names[-1] in ENDS, names


def runs_at_once(notes: list[dict[str, Any]]) -> int:
    """How often a question's run began while another run of it was still making steps."""
    lives: dict[tuple[str, int, int], list[float]] = {}
    for note in notes:
        lives.setdefault((note["question"], note["pid"], note["run"]), []).append(note["at"])
    spans: dict[str, list[tuple[float, float]]] = {}
    for (question, _, _), times in lives.items():
        spans.setdefault(question, []).append((min(times), max(times)))
    overlaps = 0
    for each in spans.values():
        each.sort()
        overlaps += sum(later[0] < earlier[1] for earlier, later in itertools.pairwise(each))
    return overlaps


def reruns_after(notes: list[dict[str, Any]], killed: dict[int, float]) -> list[float]:
    """For each question that was at work in a killed process: seconds from the kill to its next run."""
    waits = []
    for pid, at in killed.items():
        mine = [note for note in notes if note["pid"] == pid]
        ended = {note["question"] for note in mine if note["what"] == "end"}
        for question in {note["question"] for note in mine} - ended:
            again = [
                note["at"]
                for note in notes
                if note["question"] == question and note["pid"] != pid and note["at"] > at
            ]
            assert again, f"{question} never ran again"
            waits.append(min(again) - at)
    return waits


def killed_processes(stack: Stack, scale: Scale) -> Finding:
    """Workers with kill -9 at random, then the broker, then a front end, under load.

    A kill leaves one process that serves: where none does, a job waits for as long as a process starts.
    """
    dice, killed = random.Random(SEED), dict[int, float]()
    began = time.monotonic()
    with Load(stack, scale.jobs, scale.killing_s) as load:
        while len(load.accepted) < 0.8 * scale.jobs:
            wait_until(lambda: len(stack.warm_parts) > 1, WARM_S, "two workers are warm")
            time.sleep(scale.kill_every_s * dice.uniform(0.5, 1.5))
            at, pid = time.time(), dice.choice(stack.warm_parts).kill_serving()
            assert pid is not None
            killed[pid] = at
        every_s = (time.monotonic() - began) / len(killed)
        for part in (stack.broker, stack.front_end_parts[0]):
            part.kill()
            time.sleep(1)
            part.start()
    states = load.converge()
    notes = stack.notes("job ")
    waits = sorted(reruns_after(notes, killed))
    assert states == {"succeeded": scale.jobs}, states
    assert runs_at_once(notes) == 0
    assert not waits or waits[-1] <= RERUN_S, waits[-10:]
    return {
        "jobs accepted": scale.jobs,
        "states at the end": dict(states),
        "workers": stack.workers,
        "serving processes killed": len(killed),
        "a kill every, s": round(every_s, 1),
        "broker and front end killed": "once each",
        "jobs at work in a killed process": len(waits),
        "ran again after, s": _spread(waits),
        "runs of one job at once": 0,
    }


def _spread(waits: list[float]) -> str:
    return f"median {median(waits):.1f}, slowest {waits[-1]:.1f}" if waits else "none had to"


def killed_worker(stack: Stack, _scale: Scale) -> Finding:
    """The serving process of one worker of two dies in the middle of a slow job."""
    return _death(stack, "slow", lambda part: part.kill_serving())


def lost_machine(stack: Stack, _scale: Scale) -> Finding:
    """Its supervisor dies with it, and the job's lease has to run out."""
    finding = _death(stack, "slower", lambda part: part.vanish())
    for part in stack.worker_parts:
        if not part.alive:
            part.start()
    return finding


def _death(stack: Stack, words: str, kill: Callable[[Worker], object]) -> Finding:
    """A worker that dies in the middle of a job; the other has it within half a minute."""
    with stack.client() as client:
        job_id = accepted(client, f"{words} steps=60")
        wait_until(lambda: stack.notes(f"{words} "), 20, "the job begins")
        pid, at = stack.notes(f"{words} ")[0]["pid"], time.time()
        kill(next(part for part in stack.worker_parts if part.serving_pid == pid))
        job = ended(client, job_id)
    (wait_s,) = reruns_after(stack.notes(f"{words} "), {pid: at})
    assert wait_s <= RERUN_S
    assert job["state"] == "succeeded"
    return {"ran again after, s": round(wait_s, 1), "state": job["state"]}


def longer_than_any_timeout(stack: Stack, scale: Scale) -> Finding:
    """A job that outlasts lease and visibility timeout, with an idle worker beside: it runs once."""
    with stack.client() as client:
        began = time.time()
        job = ended(client, accepted(client, f"long steps={scale.long_s / STEP_S:.0f}"))
        took_s = time.time() - began
    begins = sum(note["what"] == "begin" for note in stack.notes("long"))
    assert (job["state"], job["attempts"], begins) == ("succeeded", 1, 1)
    return {"the job took, s": round(took_s, 1), "runs": begins}


def poison(stack: Stack, _scale: Scale) -> Finding:
    """A job whose picture kills the process, among fifteen good ones."""
    began = time.time()
    with stack.client() as client:
        pictures = [DEADLY_PICTURE if number == 7 else PICTURE for number in range(16)]
        with ThreadPoolExecutor(16) as pool:
            ids = list(pool.map(lambda n: accepted(client, f"neighbor {n}", image=pictures[n]), range(16)))
        jobs = [ended(client, job_id) for job_id in ids]
    took_s = time.time() - began
    bad = jobs.pop(7)
    letters = [json.loads(entry["job"])["id"] for entry in entries(stack.redis, DEAD_LETTERS_KEY)]
    assert (bad["state"], bad["attempts"]) == ("failed", 3)
    assert bad["error"]["type"].endswith("/dead-lettered")
    assert letters == [bad["id"]]
    assert [job["state"] for job in jobs] == ["succeeded"] * 15
    return {
        "poison job": f"{bad['state']} after {bad['attempts']} attempts alone",
        "dead letters": len(letters),
        "neighbors that succeeded": len(jobs),
        "all had ended after, s": round(took_s, 1),
    }


def hung_engine(stack: Stack, _scale: Scale) -> Finding:
    """A forward that never returns: the process is replaced, and its jobs run again."""
    began = time.time()
    with stack.client() as client:
        ids = [accepted(client, question) for question in ("hang", "beside it")]
        jobs = [ended(client, job_id) for job_id in ids]
    pids = {note["pid"] for note in stack.notes("hang")}
    assert [job["state"] for job in jobs] == ["succeeded", "succeeded"]
    assert len(pids) == 2
    return {"setting PRISM_ENGINE_STALL_S": STALL_S, "answered after, s": round(time.time() - began, 1)}


def broken_decoders(stack: Stack, _scale: Scale) -> Finding:
    """A video that crashes its decoder and one that hangs it, among good ones."""
    pids = {part.serving_pid for part in stack.worker_parts}
    clip, fields = malformed.videos()[0], {"sampling": {"num_frames": 2}}
    videos = [data_uri(clip + end, "video/mp4") for end in (CRASH, HANG, *(bytes([n]) for n in range(6)))]
    deadlines = [LIMIT_S, 5, *[LIMIT_S] * 6]

    def call(video: str, deadline_s: float) -> int:
        body = asking("a video", video=video, deadline_s=deadline_s, timeout_s=LIMIT_S, **fields)
        return client.post("/v1/answer", json=body).status_code

    with stack.client() as client, ThreadPoolExecutor(len(videos)) as pool:
        statuses = list(pool.map(call, videos, deadlines))
    assert statuses == [HTTPStatus.UNPROCESSABLE_ENTITY, HTTPStatus.GATEWAY_TIMEOUT, *[HTTPStatus.OK] * 6]
    assert {part.serving_pid for part in stack.worker_parts} == pids
    return {"crashed": "422", "hung beyond its deadline": "504", "others answered": 6, "workers that died": 0}


def short_memory(stack: Stack, _scale: Scale) -> Finding:
    """Requests that do not fit together, and one that does not fit at all."""
    questions = [f"large {n}" for n in range(6)] + ["small", "huge"]
    with stack.client() as client, ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda q: client.post("/v1/answer", json=asking(q)), questions))
    assert [response.status_code for response in responses] == [200] * 7 + [507]
    assert responses[-1].json()["type"].endswith("/out-of-memory")
    return {"succeeded": 7, "failed as out of memory": 1}


def rolling_restart(stack: Stack, _scale: Scale) -> Finding:
    """SIGTERM of each process in turn, under load, over two front ends."""
    drains: list[float] = []
    with Callers(stack) as callers:
        for part in (*stack.worker_parts, *stack.front_end_parts):
            began = time.monotonic()
            part.send(signal.SIGTERM)
            part.wait(60)
            drains.append(time.monotonic() - began)
            part.start()
            stack.until_warm()
    assert callers.lost == [], callers.lost[:3]
    assert runs_at_once(stack.notes("caller")) == 0
    return {
        "requests answered": callers.answered,
        "requests lost": 0,
        "processes restarted": len(drains),
        "slowest drain, s": round(max(drains), 1),
    }


class Callers:
    """Callers that wait for each answer, at one front end after the other.

    A refused connection and a 503 are no answer and are tried elsewhere, as a load balancer does.
    """

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(n,)) for n in range(CLIENTS)]
        self.answered = 0
        self.lost: list[str] = []

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _call(self, number: int) -> None:
        for count in itertools.takewhile(lambda _: not self._over.is_set(), itertools.count()):
            question = f"caller {number} {count} steps={40 if count % 10 == 0 else 2}"
            try:
                response = self._ask(question, number + count)
            except httpx.TransportError as error:
                self.lost.append(f"{question}: {type(error).__name__}")
                continue
            if response.status_code == HTTPStatus.OK:
                self.answered += 1
            else:
                self.lost.append(f"{question}: {response.status_code}")

    def _ask(self, question: str, first: int) -> httpx.Response:
        for turn in itertools.count(first):
            url = self._stack.urls[turn % len(self._stack.urls)]
            try:
                response = httpx.post(f"{url}/v1/answer", json=asking(question), timeout=90, trust_env=False)
            except httpx.ConnectError:
                time.sleep(0.1)
                continue
            if response.status_code not in AGAIN:
                return response
            time.sleep(0.1)
        raise AssertionError("unreachable: the count has no end")


def broker_stopped(stack: Stack, scale: Scale) -> Finding:
    """Kill -9 of the broker, started again from its append-only file."""
    return _outage(stack, scale, stack.broker.kill, stack.broker.start)


def broker_restarts(stack: Stack, scale: Scale) -> Finding:
    """Kill -9 of the broker under load, again and again, each time started at once."""
    jobs, restarts = scale.jobs // 5, 3
    with Load(stack, jobs, (restarts + 1) * scale.kill_every_s, prefix="restart") as load:
        for _ in range(restarts):
            time.sleep(scale.kill_every_s)
            stack.broker.kill()
            stack.broker.start()
    states = load.converge()
    assert states == {"succeeded": jobs}, states
    assert runs_at_once(stack.notes("restart ")) == 0
    return {"jobs accepted": jobs, "states at the end": dict(states), "restarts": restarts}


def broker_frozen(stack: Stack, scale: Scale) -> Finding:
    """SIGSTOP: connections stand, nothing answers."""
    freeze, thaw = (partial(stack.broker.send, number) for number in (signal.SIGSTOP, signal.SIGCONT))
    return _outage(stack, scale, freeze, thaw)


def broker_black_holed(stack: Stack, scale: Scale) -> Finding:
    """A proxy that takes every byte and passes none."""
    return _outage(stack, scale, stack.proxy.passing.clear, stack.proxy.passing.set)


def _outage(stack: Stack, scale: Scale, away: Callable[[], object], back: Callable[[], object]) -> Finding:
    """The broker goes `away` under load and comes `back`: what callers see then, and how soon it works."""
    parts = (*stack.worker_parts, *stack.front_end_parts)
    with stack.client() as client:
        words = f"before {time.time():.0f}"  # what the diary tells of another outage does not count
        before = [accepted(client, f"{words} {n} steps=60") for n in range(4)]
        pids = [part.pid for part in parts]
        away()
        slowest_s, refused = _refusals(client, scale.outage_s)
        back()
        returned = time.monotonic()
        job = ended(client, accepted(client, "after the return", within_s=RERUN_S))
        resumed_s = time.monotonic() - returned
        states = Counter(ended(client, job_id)["state"] for job_id in before)
    assert all(part.alive for part in parts)
    assert pids == [part.pid for part in parts]
    assert job["state"] == "succeeded"
    assert states == {"succeeded": 4}
    assert runs_at_once(stack.notes(words)) == 0
    assert slowest_s < 1.0
    assert resumed_s <= RERUN_S
    return {
        "away for, s": scale.outage_s,
        "requests refused with 503 and Retry-After": refused,
        "slowest refusal, s": round(slowest_s, 2),
        "a new job answered after the return, s": round(resumed_s, 1),
        "jobs from before": dict(states),
    }


def _refusals(client: httpx.Client, seconds: float) -> tuple[float, int]:
    """Asks for so long while the broker is away: the slowest refusal in seconds, and their number."""
    slowest_s, refused, until = 0.0, 0, time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.monotonic()
        response = client.post("/v1/answer", json=asking("while away"))
        slowest_s, refused = max(slowest_s, time.monotonic() - began), refused + 1
        assert response.status_code == HTTPStatus.SERVICE_UNAVAILABLE, response.text
        assert int(response.headers["retry-after"]) >= 1
        time.sleep(0.5)
    return slowest_s, refused


def same_key(stack: Stack, _scale: Scale) -> Finding:
    """Fifty callers with one `Idempotency-Key` at once: one job."""
    key = {"Idempotency-Key": "the-same", "Prefer": "respond-async"}
    body = asking("the same")

    def call(client: httpx.Client) -> str:
        while (response := client.post("/v1/answer", json=body, headers=key)).status_code == CONFLICT:
            time.sleep(0.05)  # the first is still being admitted
        assert response.status_code in (HTTPStatus.ACCEPTED, HTTPStatus.OK), (
            response.text
        )  # it may have ended
        return str(response.json()["id"])

    with stack.client() as client, ThreadPoolExecutor(50) as pool:
        ids = set(pool.map(call, [client] * 50))
        assert len(ids) == 1
        ended(client, ids.pop())
    begins = sum(note["what"] == "begin" for note in stack.notes("the same"))
    assert begins == 1
    return {"callers": 50, "jobs": 1, "runs": begins}


def responsive(stack: Stack, scale: Scale) -> Finding:
    """`/livez` while a large upload, a ten-second job and many waiting clients are in flight."""
    upload = {"image": ("p.png", PICTURE_BYTES + bytes(scale.upload_bytes), "image/png")}
    with ThreadPoolExecutor(scale.waiting + 2) as pool, stack.client() as client:
        waits = [pool.submit(_ask, client, f"waits {n} steps=200") for n in range(scale.waiting)]
        in_flight = partial(stack.redis.zcard, open_jobs_key(MODEL))
        wait_until(lambda: in_flight() >= scale.waiting, 60, "all clients wait")
        uploads = pool.submit(_upload, client, upload)
        times_ms = _livez_ms(stack.ports[0])
        uploads.result()
        assert all(wait.result() for wait in waits)
    median_ms, p99_ms = times_ms[len(times_ms) // 2], times_ms[int(len(times_ms) * 0.99)]
    assert p99_ms <= scale.livez_ms, f"{p99_ms:.0f} ms"
    return {
        "waiting clients": scale.waiting,
        "upload, MiB": scale.upload_bytes >> 20,
        "/livez asked": len(times_ms),
        "median, ms": round(median_ms, 1),
        "99th percentile, ms": round(p99_ms, 1),
        "slowest, ms": round(times_ms[-1], 1),
    }


def _livez_ms(port: int) -> list[float]:
    """Sorted milliseconds of `/livez`, asked by a process that has nothing else to do."""
    command = [sys.executable, "-c", PROBE, str(port), str(LIVEZ_TIMES)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sorted(json.loads(done.stdout))


def _ask(client: httpx.Client, question: str) -> bool:
    """Whether the caller got an answer, or waited as long as callers may and was told where it will be."""
    response = client.post("/v1/answer", json=asking(question))
    return response.status_code in (HTTPStatus.OK, HTTPStatus.ACCEPTED)


def _upload(client: httpx.Client, files: dict[str, Any]) -> None:
    for _ in range(5):
        client.post("/v1/answer", files=files, data={"question": "an upload"})


def overload(stack: Stack, scale: Scale) -> Finding:
    """Twice the capacity at a constant rate: refusals with `Retry-After`, bounded queue and memory."""
    rate = 2 * CAPACITY * stack.workers
    statuses, latencies = Counter[int](), list[float]()
    front_end = psutil.Process(stack.front_end_parts[0].pid)
    before_bytes, depth = front_end.memory_info().rss, 0

    def call(number: int) -> None:
        began = time.monotonic()
        body = asking(f"load {number} steps=20", deadline_s=LIMIT_S)
        response = clients[number % len(clients)].post("/v1/answer", json=body)
        statuses[response.status_code] += 1
        if response.status_code == HTTPStatus.OK:
            latencies.append(time.monotonic() - began)
        elif response.status_code == HTTPStatus.TOO_MANY_REQUESTS:
            assert int(response.headers["retry-after"]) >= 1

    with ExitStack() as closing, ThreadPoolExecutor(512) as pool:
        clients = [closing.enter_context(stack.client(number)) for number in range(stack.front_ends)]
        began = time.monotonic()
        for number in range(int(rate * scale.load_s)):
            time.sleep(max(0.0, began + number / rate - time.monotonic()))
            pool.submit(call, number)
            if number % rate == 0:
                depth = max(depth, stack.redis.llen(queue_name(MODEL)))
    latencies.sort()
    p99_s = latencies[int(len(latencies) * 0.99)]
    grown_bytes = front_end.memory_info().rss - before_bytes
    assert statuses.keys() <= {HTTPStatus.OK, HTTPStatus.TOO_MANY_REQUESTS}, statuses
    assert statuses[HTTPStatus.TOO_MANY_REQUESTS]
    assert depth <= scale.max_queue
    assert p99_s <= LIMIT_S
    assert grown_bytes <= GROWTH_BYTES, grown_bytes
    return {
        "arrivals a second": rate,
        "for, s": scale.load_s,
        "answered": statuses[HTTPStatus.OK],
        "refused with 429": statuses[HTTPStatus.TOO_MANY_REQUESTS],
        "deepest queue": f"{depth} of {scale.max_queue}",
        "99th percentile of the answered, s": round(p99_s, 1),
        "deadline, s": LIMIT_S,
        "front end grew by, MiB": round(grown_bytes / 2**20, 1),
    }


SCENARIOS: dict[str, Callable[[Stack, Scale], Finding]] = {
    "Accepted means exactly one terminal state, and one visible result": killed_processes,
    "A killed worker's jobs run again within 30 s": killed_worker,
    "Also where its whole machine is lost": lost_machine,
    "A job longer than any timeout never runs twice at once": longer_than_any_timeout,
    "A poison job fails after 3 attempts, and its neighbors succeed": poison,
    "An engine that hangs is noticed and replaced": hung_engine,
    "A decoder that crashes or hangs costs one job": broken_decoders,
    "Out of memory costs a retry in smaller pieces, then the one job that does not fit": short_memory,
    "A restart of the broker loses no accepted job": broker_restarts,
    "The broker away and back, its file read again": broker_stopped,
    "The broker frozen": broker_frozen,
    "The broker black-holed": broker_black_holed,
    "Twice the capacity: refusals, bounded queue and memory, the accepted in time": overload,
    "A rolling restart under load loses no request": rolling_restart,
    "One `Idempotency-Key` from 50 callers at once: one job": same_key,
    "`/livez` answers while uploads, jobs and waiting clients are in flight": responsive,
}

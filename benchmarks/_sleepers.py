"""Workers of `benchmarks.queueing`: the real serving process around an engine that sleeps.

    python -m benchmarks._sleepers WORKERS SLEEP_MS

One process imports all that a worker imports, and forks once a worker: 64 of them share those pages, and each
has its own engine thread, Celery consumer, pool and connections. All end with the parent.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch

from prismprune.results import Answer, Memory, Timings, VisualTokens
from worker.process import WorkerProcess, main

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismprune import VisualRequest
    from prismprune.caching import EncodingCache


@dataclass(eq=False, slots=True)
class Sleep:
    """One request; its answers are there when it has slept."""

    questions: tuple[str, ...]
    shared_with: int = 0
    done: bool = False

    @property
    def lengths(self) -> list[int]:
        return [1] * len(self.questions)

    def cancel(self) -> None:
        self.done = True


@dataclass
class Night:
    """What the engine asks of a session: all who joined sleep `step_s` together, once."""

    step_s: float
    pending: list[Sleep] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.tokens_with(())

    def tokens_with(self, more: Sequence[Sleep]) -> int:
        return len(self.pending) + len(more)

    def encode(self, requests: Sequence[VisualRequest]) -> Sequence[VisualRequest]:
        return requests

    @staticmethod
    def prepare(request: VisualRequest) -> Sleep:
        return Sleep(request.questions)

    def join(self, requests: Sequence[Sleep]) -> None:
        self.pending += requests
        for one in self.pending:
            one.shared_with = max(one.shared_with, len(self.pending) - 1)

    def step(self) -> list[tuple[Sleep, int, str]]:
        time.sleep(self.step_s)
        events = [(one, number, "z") for one in self.pending for number in range(len(one.questions))]
        for one in self.pending:
            one.done = True
        self.pending = []
        return events

    @staticmethod
    def make_room() -> bool:
        return False  # nothing is kept only to be faster

    @staticmethod
    def answers(one: Sleep) -> list[Answer]:
        return [ANSWER for _ in one.questions]


ANSWER = Answer(
    text="z",
    token_ids=(1,),
    finish_reason="stop",
    prompt_tokens=80,
    visual_tokens=VisualTokens(576, 64, 32, 32, 64, "prism"),
    timings=Timings(),
    memory=Memory("cpu", peak_bytes=0, kv_cache_bytes=0),
)


@dataclass(frozen=True)
class Sleeper:
    """Keeps to what the worker asks of `PrunedVLM`."""

    step_s: float
    family = "sleeper"
    modalities = ("image",)
    quantization = revision = None
    device = torch.device("cpu")

    @staticmethod
    def memory_bytes() -> int:
        return 0

    def session(self, cache: EncodingCache | None = None) -> Night:
        del cache  # nothing is encoded
        return Night(self.step_s)


class SleepingProcess(WorkerProcess):
    """Everything of a worker but its model."""

    step_s = 0.0

    def _load(self) -> Any:
        return Sleeper(self.step_s)


def host(workers: int, step_s: float) -> int:
    """Fork the workers and wait for SIGTERM, or for the first of them that ends by itself."""
    SleepingProcess.step_s = step_s
    torch.set_num_threads(1)
    reader, writer = os.pipe()  # every worker's signs of life; closed with this process, they end too
    gc.freeze()  # a collection would touch, and so copy, every page that is shared
    children = [_forked(reader, writer) for _ in range(workers)]
    os.close(writer)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        while os.read(reader, 4096):
            pass
    finally:
        for child in children:
            os.kill(child, signal.SIGTERM)
        for child in children:
            os.waitpid(child, 0)
    return 1


def _forked(reader: int, writer: int) -> int:
    child = os.fork()
    if child:
        return child
    os.close(reader)
    sys.argv[1:] = [uuid4().hex, str(writer)]
    code = 1
    try:
        code = main(SleepingProcess)
    finally:
        os._exit(code)  # the parent's own exit handlers are not ours


if __name__ == "__main__":
    sys.exit(host(int(sys.argv[1]), float(sys.argv[2]) / 1e3))

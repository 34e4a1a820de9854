"""The serving process of the chaos tests: the real one, around a model that sleeps and suffers on request.

What it does is in the question (`hang`, `steps=20`) and in the size of the picture; what it did it writes
into a diary.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prismprune import media
from prismprune.results import Answer, Memory, PartMap, Timings, VisualTokens
from worker.process import WorkerProcess, main

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismprune import VisualRequest
    from prismprune.caching import EncodingCache

DEADLY = (13, 13)
"""Size of the picture that kills the process."""
BATCH = 8
STEP_S = 0.05
STEPS = 4
FITS = 1
"""Requests that say `large` fit into memory so many at a time; one that says `huge` never does."""


class Sleeper:
    """Keeps to what the worker asks of `PrunedVLM`.

    diary: a file that gets a line of JSON for each question at each step, with the number of the run.
    """

    family = "sleeper"
    modalities = ("image", "video")
    quantization = revision = None
    device = torch.device("cpu")

    def __init__(self, diary: Path) -> None:
        self._diary = diary
        self._runs = 0

    @staticmethod
    def memory_bytes() -> int:
        return 1

    def session(self, cache: EncodingCache | None = None) -> Night:
        del cache  # media are not looked at
        return Night(self)

    def begin(self, requests: Sequence[VisualRequest], beside: int) -> None:
        """Note who joins `beside` so many large ones; suffer what they bring."""
        self._runs += 1
        questions = [request.questions[0] for request in requests]
        self.note("begin", questions)
        for request in requests:
            self._suffer(request)
        large = beside + sum("large" in question for question in questions)
        if any("huge" in question for question in questions) or large > FITS:
            raise torch.OutOfMemoryError

    def _suffer(self, request: VisualRequest) -> None:
        """A picture of `DEADLY` size kills; a question that says `hang` hangs the first time it is asked."""
        if request.media[0].size == DEADLY:
            os.kill(os.getpid(), signal.SIGKILL)
        question = request.questions[0]
        if "hang" in question and self._diary.read_text().count(json.dumps(question)) == 1:
            time.sleep(3600)

    def note(self, what: str, questions: list[str]) -> None:
        when = {"what": what, "pid": os.getpid(), "run": self._runs, "at": time.time()}
        lines = [json.dumps({**when, "question": question}) for question in questions]
        with self._diary.open("a") as diary:
            diary.write("".join(line + "\n" for line in lines))


@dataclass(eq=False)
class Sleep:
    """One request of a `Night`."""

    request: VisualRequest
    shared_with: int = 0
    canceled: bool = False
    steps: int = 0

    @property
    def question(self) -> str:
        return self.request.questions[0]

    @property
    def lengths(self) -> list[int]:
        return [1]

    @property
    def done(self) -> bool:
        return self.canceled or self.steps >= _steps(self.question)

    def cancel(self) -> None:
        self.canceled = True


class Night:
    """What the engine asks of a session."""

    def __init__(self, sleeper: Sleeper) -> None:
        self._sleeper = sleeper
        self.pending: list[Sleep] = []

    @property
    def tokens(self) -> int:
        return self.tokens_with(())

    def tokens_with(self, more: Sequence[Sleep]) -> int:
        return len(self.pending) + len(more)

    def encode(self, requests: Sequence[VisualRequest]) -> Sequence[VisualRequest]:
        return requests

    @staticmethod
    def prepare(request: VisualRequest) -> Sleep:
        return Sleep(request)

    def join(self, requests: Sequence[Sleep]) -> None:
        asked = [one.request for one in requests]
        self._sleeper.begin(asked, sum("large" in one.question for one in self.pending))
        self.pending += requests
        for one in self.pending:
            one.shared_with = max(one.shared_with, len(self.pending) - 1)

    def step(self) -> list[tuple[Sleep, int, str]]:
        time.sleep(STEP_S)
        events = []
        for one in self.pending:
            if not one.canceled:
                events.append((one, 0, f" {one.steps}"))
                one.steps += 1
        self._sleeper.note("step", [one.question for one in self.pending if not one.done])
        self._sleeper.note("end", [one.question for one in self.pending if one.done])
        self.pending = [one for one in self.pending if not one.done]
        return events

    @staticmethod
    def make_room() -> bool:
        return False  # nothing is kept only to be faster

    @staticmethod
    def answers(one: Sleep) -> list[Answer]:
        return [_answer(one.question, "canceled" if one.canceled else "stop")]


def _steps(question: str) -> int:
    asked = re.search(r"steps=(\d+)", question)
    return int(asked[1]) if asked else STEPS


def _answer(question: str, finish_reason: Any) -> Answer:
    return Answer(
        text=f"answer to {question}",
        token_ids=(5, 6),
        finish_reason=finish_reason,
        prompt_tokens=80,
        visual_tokens=VisualTokens(576, 64, 32, 32, 64, "prism"),
        timings=Timings(vision_ms=1, prefill_ms=1, generate_ms=1, time_to_first_token_ms=1),
        memory=Memory("cpu", peak_bytes=1, kv_cache_bytes=1),
        token_map=(PartMap(0, None, None, None, (24, 24), (0, 0, 8, 8), (1, 2), (7,), (1, 2, 7)),),
    )


class ChaosProcess(WorkerProcess):
    """Serves the sleeper, whose diary lies beside the media store, with decoders that suffer on request."""

    def _load(self) -> Any:
        media._CHILD = Path(__file__).with_name("decoder.py")
        return Sleeper(Path(self._settings.media_url.removeprefix("file://")).parent / "diary")


if __name__ == "__main__":
    sys.exit(main(ChaosProcess))

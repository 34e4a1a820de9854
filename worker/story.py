"""What a job's caller hears while it runs: text on its way from the engine's thread to the job's stream."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from worker.contract import EventName, StartedData, TokenData
from worker.jobs import AWAY

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Event = tuple[EventName, str]

log = logging.getLogger(__name__)

PAUSE_S = 1.0
"""A broker that is away is not asked at every token."""


class Story:
    """Told by the engine's thread, written by the job's own, so that no broker holds up the engine.

    write: takes the number of a batch, which rises, and its events (name, data as JSON); writing the same
    number twice writes it once.
    """

    def __init__(self, write: Callable[[int, Sequence[Event]], None], attempt: int) -> None:
        self.due = threading.Event()
        self._write = write
        self._attempt = attempt
        self._told: deque[tuple[int, str] | None] = deque()
        self._said = False
        self._number = 0
        self._unsent: list[Event] = []
        self._not_before = 0.0

    def text(self, question: int, text: str) -> None:
        """More text of an answer."""
        self._told.append((question, text))
        self._said = True
        self.due.set()

    def again(self) -> None:
        """The request is answered anew: what was said does not count."""
        if self._said:
            self._told.append(None)
            self.due.set()

    def run(self) -> float:
        """Writes what has been told. A broker that is away gets it later: after so many seconds."""
        if (left := self._not_before - time.monotonic()) > 0:
            return left
        try:
            self.write_all()
        except AWAY as error:
            log.warning("events wait for the broker (%s)", type(error).__name__)
            self._not_before = time.monotonic() + PAUSE_S
            return PAUSE_S
        return math.inf

    def write_all(self) -> None:
        """Writes everything that has been told; raises what the broker raises, and keeps it then."""
        while self._unsent or self._told:
            if not self._unsent:
                self._unsent, self._number = self._gathered(), self._number + 1
            self._write(self._number, self._unsent)
            self._unsent = []

    def _gathered(self) -> list[Event]:
        """What was told; pieces of one answer as one event, in the order in which answers went on."""
        events: list[Event] = []
        pieces: dict[int, str] = {}
        for _ in range(len(self._told)):
            entry = self._told.popleft()
            if entry is None:
                events += [*_tokens(pieces), self._started()]
                pieces = {}
            else:
                question, text = entry
                pieces[question] = pieces.get(question, "") + text
        return [*events, *_tokens(pieces)]

    def _started(self) -> Event:
        return EventName.STARTED, StartedData(attempt=self._attempt).model_dump_json()


def _tokens(pieces: Mapping[int, str]) -> list[Event]:
    return [
        (EventName.TOKEN, TokenData(question=question, text=text).model_dump_json())
        for question, text in pieces.items()
    ]

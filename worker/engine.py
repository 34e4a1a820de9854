"""One thread that owns the model; jobs that arrive together are answered together.

Everything that touches the device happens in this thread. The tasks of Celery's pool only hand tickets in
and wait for their futures.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar

from worker.errors import DeadlineExceededError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prismprune.results import Answer
    from prismprune.vlm import VisualRequest


class Model(Protocol):
    """What the engine asks of `prismprune.PrunedVLM`."""

    def answer_batch(
        self, requests: Sequence[VisualRequest], *, should_stop: Callable[[int], bool] | None = None
    ) -> list[list[Answer]]:
        """The answers of each request; `should_stop` is asked once a step for the request of that index."""


M = TypeVar("M", bound=Model)


@dataclass(frozen=True, slots=True)
class Answered:
    """The answers of one request, the number of its neighbours, and when (monotonic) the batch began."""

    answers: list[Answer]
    shared_with: int
    began: float


@dataclass(eq=False, slots=True)
class Ticket:
    """One request in the engine. `deadline` is monotonic; `cancel` ends it at the next step."""

    request: VisualRequest
    deadline: float
    future: Future[Answered] = field(default_factory=Future)
    _canceled: threading.Event = field(default_factory=threading.Event)

    def answered(self) -> Answered:
        """Waits, at most until the deadline. Raises `DeadlineExceededError`, or what the model raised."""
        wait([self.future], timeout=max(0.0, self.deadline - time.monotonic()))
        if not self.future.done():
            self.cancel()
            raise DeadlineExceededError("The deadline passed before the answer was complete.")
        answered = self.future.result()
        if any(answer.finish_reason == "canceled" for answer in answered.answers):
            raise DeadlineExceededError("The deadline passed before the answer was complete.")
        return answered

    def cancel(self) -> None:
        """Not begun: never begins. Begun: stops at the next decoding step."""
        self._canceled.set()
        self.future.cancel()

    def begin(self) -> bool:
        """False if the ticket was canceled while it waited."""
        return self.future.set_running_or_notify_cancel()

    @property
    def over(self) -> bool:
        return self._canceled.is_set() or time.monotonic() >= self.deadline


class Engine(Generic[M]):
    """Batches of at most `max_batch`; the first job of one waits at most `max_wait_s` for neighbours.

    `load` returns the warm model and runs in the engine's thread. `on_death` is called in that thread when
    it ends by an error: whoever waits for a ticket would wait for ever.
    """

    def __init__(
        self,
        load: Callable[[], M],
        *,
        max_batch: int,
        max_wait_s: float,
        on_batch: Callable[[int], None],
        on_death: Callable[[BaseException], None],
    ) -> None:
        self._load = load
        self._max_batch = max_batch
        self._max_wait_s = max_wait_s
        self._on_batch = on_batch
        self._on_death = on_death
        self._tickets: SimpleQueue[Ticket | None] = SimpleQueue()
        self._model: Future[M] = Future()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._tickets.put(None)
        if self._model.done():  # a model that is still loading cannot be interrupted, only left behind
            self._thread.join()

    @property
    def warm(self) -> bool:
        """Whether a ticket would be answered now."""
        return self._thread.is_alive() and self._model.done()

    def model(self) -> M:
        """Waits for the warm model; raises what loading it raised."""
        return self._model.result()

    def submit(self, request: VisualRequest, deadline: float) -> Ticket:
        """Queues `request`; its answers, or its error, arrive in the ticket's future."""
        ticket = Ticket(request, deadline)
        self._tickets.put(ticket)
        return ticket

    def _main(self) -> None:
        try:
            self._model.set_result(self._load())
        except BaseException as error:  # noqa: BLE001 - whoever waits for the model gets it
            self._model.set_exception(error)
            return
        try:
            while batch := self._gather():
                self._answer([ticket for ticket in batch if not ticket.over and ticket.begin()])
        except BaseException as error:  # noqa: BLE001 - SystemExit too: without this thread nothing is answered
            self._on_death(error)

    def _gather(self) -> list[Ticket]:
        batch: list[Ticket] = []
        close_at: float | None = None
        while len(batch) < self._max_batch:
            try:
                ticket = self._tickets.get(timeout=close_at and max(0.0, close_at - time.monotonic()))
            except Empty:
                break
            if ticket is None:
                if batch:
                    self._tickets.put(None)  # answer these first
                break
            batch.append(ticket)
            close_at = close_at or time.monotonic() + self._max_wait_s
        return batch

    def _answer(self, batch: list[Ticket]) -> None:
        if not batch:
            return
        began = time.monotonic()
        try:
            answers = self._model.result().answer_batch(
                [ticket.request for ticket in batch], should_stop=lambda index: batch[index].over
            )
        except Exception as error:  # noqa: BLE001 - it belongs to one job, which the future tells it to
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            for ticket in batch:  # only the culprit fails
                self._answer([ticket])
            return
        self._on_batch(len(batch))
        for ticket, own in zip(batch, answers, strict=True):
            ticket.future.set_result(Answered(own, len(batch) - 1, began))

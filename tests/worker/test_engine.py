"""Batches, and who fails when one of them fails."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prismprune.errors import UnknownModelError
from tests.worker.conftest import Scripted
from worker.engine import Engine
from worker.errors import DeadlineExceededError

if TYPE_CHECKING:
    from worker.engine import Ticket


def engine(model: Scripted, *, max_batch: int = 4, **changes: Any) -> Engine[Scripted]:
    """An engine around `model` that does not wait for neighbours."""
    options = {"max_wait_s": 0.0, "on_batch": lambda _: None, "on_death": lambda _: None} | changes
    return Engine(lambda: model, max_batch=max_batch, **options)


def ask(running: Engine[Scripted], question: str, deadline_s: float = 60) -> Ticket:
    """Submits one question; the engine looks at nothing else of a request."""
    request: Any = SimpleNamespace(questions=(question,))
    return running.submit(request, time.monotonic() + deadline_s)


def hold(model: Scripted, running: Engine[Scripted]) -> Ticket:
    """Keeps the engine busy with one request, so that what comes next gathers in the queue."""
    model.gate.clear()
    ticket = ask(running, "held")
    assert model.entered.wait(10)
    return ticket


@settings(deadline=None, max_examples=20)
@given(waiting=st.integers(1, 12), max_batch=st.integers(1, 5))
def test_what_waits_is_answered_in_full_batches(waiting: int, max_batch: int) -> None:
    """Requests that gathered leave in order, as many as a batch takes, and each gets its own answer."""
    model, sizes = Scripted(), list[int]()
    with engine(model, max_batch=max_batch, on_batch=sizes.append) as running:
        hold(model, running)
        tickets = [ask(running, f"question {number}") for number in range(waiting)]
        model.gate.set()
        texts = [ticket.answered().answers[0].text for ticket in tickets]
    assert texts == [f"question {number}" for number in range(waiting)]
    full, rest = divmod(waiting, max_batch)
    assert sizes == [1] + [max_batch] * full + [rest] * (rest > 0)


def test_neighbours_are_counted() -> None:
    """Three in a batch: each shared it with two."""
    model = Scripted()
    with engine(model) as running:
        hold(model, running)
        tickets = [ask(running, "together") for _ in range(3)]
        model.gate.set()
        assert [ticket.answered().shared_with for ticket in tickets] == [2, 2, 2]


def test_a_request_waits_for_neighbours() -> None:
    """With time to wait, a batch that is full goes at once and holds both."""
    model = Scripted()
    with engine(model, max_batch=2, max_wait_s=30) as running:
        tickets = [ask(running, "first"), ask(running, "second")]
        assert [ticket.answered().shared_with for ticket in tickets] == [1, 1]


def test_only_the_culprit_fails() -> None:
    """An error in a batch of three is the error of the one that causes it."""
    model = Scripted()
    with engine(model) as running:
        hold(model, running)
        before, culprit, after = (ask(running, question) for question in ("before", "raise", "after"))
        model.gate.set()
        assert before.answered().answers[0].text == "before"
        assert after.answered().answers[0].text == "after"
        with pytest.raises(RuntimeError):
            culprit.answered()


def test_what_is_past_its_deadline_is_not_begun() -> None:
    """A request whose time ran out in the queue never reaches the model."""
    model = Scripted()
    with engine(model) as running:
        held = hold(model, running)
        late = ask(running, "late", deadline_s=0)
        with pytest.raises(DeadlineExceededError):
            late.answered()
        model.gate.set()
        held.answered()
    assert model.batches == [["held"]]


def test_the_deadline_ends_a_generation() -> None:
    """A row that would go on for ever is stopped, and its neighbour still gets its answer."""
    model = Scripted()
    with engine(model) as running:
        hold(model, running)
        endless, neighbour = ask(running, "for ever", deadline_s=0.2), ask(running, "short")
        model.gate.set()
        with pytest.raises(DeadlineExceededError):
            endless.answered()
        assert neighbour.answered().answers[0].text == "short"


def test_a_canceled_ticket_ends_a_generation() -> None:
    """Canceling reaches the row at its next step."""
    model = Scripted()
    with engine(model) as running:
        endless = ask(running, "for ever")
        assert model.entered.wait(10)
        endless.cancel()
        assert endless.future.result(10).answers[0].finish_reason == "canceled"


def test_stopping_answers_what_was_submitted() -> None:
    """Leaving the block waits for the queue to empty."""
    model = Scripted()
    with engine(model, max_batch=2) as running:
        hold(model, running)
        tickets = [ask(running, "last words") for _ in range(3)]
        model.gate.set()
    assert all(ticket.future.done() for ticket in tickets)
    assert not running.warm


def test_a_model_that_does_not_load_says_why() -> None:
    """The error of loading reaches whoever waits for the model, and the engine is not warm."""

    def load() -> Scripted:
        raise UnknownModelError("no such model")

    broken = Engine(load, max_batch=1, max_wait_s=0, on_batch=lambda _: None, on_death=lambda _: None)
    with broken, pytest.raises(UnknownModelError):
        broken.model()
    assert not broken.warm


def test_the_death_of_the_thread_is_reported() -> None:
    """An exit from inside the model ends the engine, and the watchdog hears of it."""
    deaths: list[BaseException] = []
    heard = threading.Event()

    def on_death(error: BaseException) -> None:
        deaths.append(error)
        heard.set()

    with engine(Scripted(), on_death=on_death) as running:
        ask(running, "exit")
        assert heard.wait(10)
    assert isinstance(deaths[0], SystemExit)
    assert not running.warm

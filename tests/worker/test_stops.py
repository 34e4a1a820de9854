"""How jobs stop, run beside each other, and are told about."""

from __future__ import annotations

import json
import math
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from worker.company import Company
from worker.contract import EventName
from worker.errors import DeadlineExceededError, StoppedError
from worker.stops import Stop, StopReason, result_within
from worker.story import Story

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def test_the_first_reason_stays() -> None:
    """Whoever listens hears it once, also who comes late."""
    stop, heard = Stop(), list[str]()
    stop.then(lambda: heard.append("early"))
    stop.request(StopReason.CANCELED)
    stop.request(StopReason.LOST)
    stop.then(lambda: heard.append("late"))
    assert (stop.reason, heard) == (StopReason.CANCELED, ["early", "late"])


class Errands:
    """Each run takes the next of `again`: what is returned, or what is done first."""

    def __init__(self, *again: float | Callable[[], float]) -> None:
        self.due = threading.Event()
        self.again = list(again)

    def run(self) -> float:
        following = self.again.pop(0)
        return following() if callable(following) else following


def test_a_result_is_waited_for_and_other_business_is_done_when_it_comes() -> None:
    """What another thread makes of a future arrives."""
    future: Future[str] = Future()

    def more_comes() -> float:
        threading.Timer(0.01, errand.due.set).start()
        return math.inf

    def finish() -> float:
        future.set_result("done")
        return math.inf

    errand = Errands(more_comes, finish)
    threading.Timer(0.01, errand.due.set).start()
    assert result_within(future, Stop(), time.monotonic() + 60, errand) == "done"
    assert errand.again == []


def test_business_that_could_not_be_done_is_tried_again() -> None:
    """Though nobody says that it is due."""
    future: Future[str] = Future()

    def finish() -> float:
        future.set_result("done")
        return math.inf

    errand = Errands(0.001, 0.001, finish)
    errand.due.set()
    assert result_within(future, Stop(), time.monotonic() + 60, errand) == "done"


def test_without_business_nobody_looks() -> None:
    """A waiting thread that looked would take a core from the engine."""
    errand, future = Errands(), Future[str]()
    threading.Timer(0.2, future.set_result, ["done"]).start()
    assert result_within(future, Stop(), time.monotonic() + 60, errand) == "done"


def test_a_stop_ends_the_wait() -> None:
    """At once, however far away the deadline is."""
    stop = Stop()
    threading.Timer(0.01, stop.request, [StopReason.DRAINING]).start()
    with pytest.raises(StoppedError):
        result_within(Future[None](), stop, time.monotonic() + 60)


def test_a_deadline_ends_the_wait() -> None:
    """Nothing came of the future in time."""
    with pytest.raises(DeadlineExceededError):
        result_within(Future[None](), Stop(), time.monotonic() + 0.01)


def test_who_is_alone_has_no_company() -> None:
    """It waits for those that are there, and who comes later waits for it."""
    company, order = Company(), list[str]()
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with company.shared():
            inside.set()
            leave.wait(10)
            order.append("first leaves")

    def alone() -> None:
        with company.alone(time.monotonic() + 60):
            order.append("alone")

    def late() -> None:
        with company.shared():
            order.append("late")

    threads = [threading.Thread(target=first), threading.Thread(target=alone)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    while not company._waiting_alone:
        time.sleep(0.001)
    threads.append(threading.Thread(target=late))
    threads[2].start()
    leave.set()
    for thread in threads:
        thread.join()
    assert order == ["first leaves", "alone", "late"]


def test_who_cannot_be_alone_in_time_is_let_in() -> None:
    """Its deadline has passed: it will do no more than say so."""
    company = Company()
    with company.shared(), company.alone(time.monotonic()):
        pass
    with company.alone(time.monotonic() + 60):
        pass


Batch = tuple[int, list[tuple[EventName, str]]]


def test_pieces_of_one_answer_are_one_event() -> None:
    """Each question's, also where they take turns; what comes behind a new beginning stays behind it."""
    batches: list[Batch] = []
    story = Story(lambda number, events: batches.append((number, list(events))), attempt=2)
    for question, text in ((0, "a"), (1, "c"), (0, "b")):
        story.text(question, text)
    story.again()
    story.text(0, "d")
    story.run()
    story.run()
    ((number, events),) = batches
    assert number == 1
    assert [(name.value, json.loads(data)) for name, data in events] == [
        ("token", {"question": 0, "text": "ab"}),
        ("token", {"question": 1, "text": "c"}),
        ("started", {"attempt": 2}),
        ("token", {"question": 0, "text": "d"}),
    ]


def test_a_request_that_said_nothing_begins_anew_in_silence() -> None:
    """Its one `started` stands already."""
    batches: list[Batch] = []
    story = Story(lambda number, events: batches.append((number, list(events))), attempt=1)
    story.again()
    story.run()
    assert batches == []


def test_what_the_broker_did_not_take_is_written_again_under_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unchanged, so that it counts once if only the reply was lost; what came since follows."""
    monkeypatch.setattr("worker.story.PAUSE_S", 0.0)
    batches: list[Batch] = []

    def write(number: int, events: Iterable[tuple[EventName, str]]) -> None:
        batches.append((number, list(events)))
        if len(batches) == 1:
            raise RedisConnectionError

    story = Story(write, attempt=1)
    story.text(0, "a")
    story.run()
    story.text(0, "b")
    story.run()
    assert [number for number, _ in batches] == [1, 1, 2]
    assert batches[0] == batches[1]

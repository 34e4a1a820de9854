"""Who waits for whom before it is taken in, by a clock that the tests turn."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.line import SHARE, Limits, Line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

ENOUGH_S = 10
"""For another thread, where a test would fail if it took longer."""
TOOK_S = 1000
"""What an answer took, for a patience that no test outlasts by itself."""
PLACES = 4


class Clock:
    """Seconds since the beginning."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """One that stands still unless it is turned."""
    return Clock()


@pytest.fixture
def line(clock: Clock) -> Line[str]:
    """Of `PLACES`."""
    return make(clock)


@pytest.fixture
def aside() -> Iterator[ThreadPoolExecutor]:
    """Threads for what may wait."""
    with ThreadPoolExecutor() as pool:
        yield pool


def make(clock: Clock, max_wait_s: float = TOOK_S) -> Line[str]:
    """A line of `PLACES`."""
    return Line(Limits(PLACES, 10**6, max_wait_s), clock)


def take(line: Line[str], working: int = 0) -> list[str]:
    """Those that join so many others at work."""
    return line.take(working, lambda new: working + new < PLACES)


def join(line: Line[str], names: str) -> None:
    """One for each letter."""
    for name in names:
        line.join(name)


def answered(line: Line[str], clock: Clock, callers: int, took_s: float = TOOK_S) -> None:
    """So many have their answers now."""
    for _ in range(callers):
        line.answered(began=clock.now - took_s)


def still_waits(future: Future[list[str]]) -> bool:
    """Nothing was taken within a moment."""
    with pytest.raises(FutureTimeoutError):
        future.result(timeout=0.05)
    return True


def test_those_that_are_there_are_taken_in_their_order(line: Line[str]) -> None:
    """As many as there is room for, where nobody else is expected."""
    join(line, "abcdef")
    assert take(line) == ["a", "b", "c", "d"]
    assert take(line, working=2) == ["e", "f"]
    assert take(line, working=1) == []


def test_an_idle_engine_waits_for_the_first(line: Line[str], aside: ThreadPoolExecutor) -> None:
    """Without end."""
    taken = aside.submit(take, line)
    assert still_waits(taken)
    join(line, "a")
    assert taken.result(ENOUGH_S) == ["a"]


def test_callers_that_had_their_answers_together_share_a_batch(
    line: Line[str], clock: Clock, aside: ThreadPoolExecutor
) -> None:
    """The first that comes back waits for the others, and not longer."""
    answered(line, clock, 3)
    join(line, "ab")
    taken = aside.submit(take, line)
    assert still_waits(taken)
    join(line, "c")
    assert taken.result(ENOUGH_S) == ["a", "b", "c"]


def test_beside_others_at_work_nobody_waits_for_those_expected(line: Line[str], clock: Clock) -> None:
    """Joined one by one or together, they have their answers at about the same time."""
    answered(line, clock, 3)
    join(line, "a")
    with line.coming():
        assert take(line, working=1) == ["a"]


def test_one_that_is_coming_is_waited_for(line: Line[str], clock: Clock, aside: ThreadPoolExecutor) -> None:
    """Until it has joined, or will not."""
    answered(line, clock, 1)
    with line.coming(), line.coming():
        join(line, "a")
        taken = aside.submit(take, line)
        assert still_waits(taken)
        join(line, "b")
        assert still_waits(taken)
    assert taken.result(ENOUGH_S) == ["a", "b"]


def test_a_caller_by_itself_waits_for_nobody(
    line: Line[str], clock: Clock, aside: ThreadPoolExecutor
) -> None:
    """It is itself the one that was expected back, beside others at work as well."""
    for working in (0, 0, 1):
        answered(line, clock, 1)
        with line.coming():
            join(line, "a")
        assert aside.submit(take, line, working).result(ENOUGH_S) == ["a"]


def test_who_does_not_come_back_in_time_is_not_missed(
    line: Line[str], clock: Clock, aside: ThreadPoolExecutor
) -> None:
    """A caller is expected for so long after its answer, however late the first of them came."""
    answered(line, clock, 3)
    clock.now += TOOK_S * SHARE
    join(line, "a")
    assert aside.submit(take, line).result(ENOUGH_S) == ["a"]


def test_a_full_batch_waits_for_nobody(line: Line[str], clock: Clock) -> None:
    """Others would not have room in it."""
    answered(line, clock, 9)
    with line.coming():
        join(line, "abcd")
        assert take(line) == ["a", "b", "c", "d"]
        join(line, "ef")
        assert take(line, working=2) == ["e", "f"]


def test_a_lone_place_waits_a_step_for_a_second_where_more_are_in_line(line: Line[str]) -> None:
    """One that leaves a step before the others lets nobody in alone; the wait begins with the place."""
    join(line, "abc")
    assert take(line, working=PLACES) == []
    assert take(line, working=PLACES) == []
    assert take(line, working=PLACES - 1) == []
    assert take(line, working=PLACES - 1) == ["a"]
    assert take(line, working=PLACES - 1) == []
    assert take(line, working=PLACES - 2) == ["b", "c"]


@given(took_s=st.floats(0, 1e3), max_wait_s=st.floats(0, 0.1))
@settings(max_examples=20, deadline=None)
def test_no_wait_is_longer_than_the_share_and_the_most(took_s: float, max_wait_s: float) -> None:
    """Whoever is expected; it ends without that anything more happens."""
    line = Line[str](Limits(PLACES, 10**6, max_wait_s))
    for _ in range(2):
        line.answered(began=time.monotonic() - took_s)
    with line.coming(), ThreadPoolExecutor() as aside:
        join(line, "a")
        assert aside.submit(take, line).result(ENOUGH_S) == ["a"]


def test_without_patience_nobody_waits(clock: Clock) -> None:
    """0 turns it off."""
    line = make(clock, max_wait_s=0)
    answered(line, clock, 3)
    with line.coming():
        join(line, "abc")
        assert take(line, working=PLACES - 1) == ["a"]
        assert take(line) == ["b", "c"]


def test_a_line_that_closes_ends_the_wait(line: Line[str], clock: Clock, aside: ThreadPoolExecutor) -> None:
    """Those in it are taken; after them it is closed, and nobody waits for more."""
    answered(line, clock, 3)
    join(line, "a")
    taken = aside.submit(take, line)
    assert still_waits(taken)
    line.close()
    assert taken.result(ENOUGH_S) == ["a"]
    assert line.closed
    assert aside.submit(take, line).result(ENOUGH_S) == []


def test_an_empty_line_that_closes_lets_the_engine_go(line: Line[str], aside: ThreadPoolExecutor) -> None:
    """It waited for the first."""
    taken = aside.submit(take, line)
    assert still_waits(taken)
    line.close()
    assert taken.result(ENOUGH_S) == []

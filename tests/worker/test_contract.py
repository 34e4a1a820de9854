"""What both sides of the queue must agree on."""

from __future__ import annotations

import pytest

import prismprune
from worker.contract import METHODS, EventName, JobState


def test_the_contract_names_the_librarys_methods() -> None:
    """All of them, in the same order: the front end refuses every other before it reaches a worker."""
    assert METHODS == prismprune.METHODS


@pytest.mark.parametrize("state", [state for state in JobState if state.terminal])
def test_every_end_has_its_event(state: JobState) -> None:
    """Named as the state, but for success."""
    assert EventName.of_end(state) == ("completed" if state is JobState.SUCCEEDED else state)

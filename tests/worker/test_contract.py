"""What both sides of the queue must agree on."""

from __future__ import annotations

from typing import Any

import pytest

import prismprune
from worker.contract import METHODS, EventName, JobState, Problem


def test_the_contract_names_the_librarys_methods() -> None:
    """All of them, in the same order: the front end refuses every other before it reaches a worker."""
    assert METHODS == prismprune.METHODS


@pytest.mark.parametrize("state", [state for state in JobState if state.terminal])
def test_every_end_has_its_event(state: JobState) -> None:
    """Named as the state, but for success."""
    assert EventName.of_end(state) == ("completed" if state is JobState.SUCCEEDED else state)


def test_a_later_versions_worker_is_understood() -> None:
    """Workers are updated first: what they tell beyond what is known here is left out, not refused."""
    told: dict[str, Any] = {"slug": "too-much", "status": 507, "title": "Too much", "detail": "Ask for less."}
    assert Problem.model_validate({**told, "hint": "32"}) == Problem(**told)

"""The promises in short, on one service with short leases: `make chaos` runs them at full size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.chaos.scenarios import SCENARIOS, SHORT
from tests.chaos.stack import QUICK, Stack

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Front ends and workers, which each promise finds as the one before has left them: alive."""
    settings = QUICK | {"max_queue": SHORT.max_queue}
    with Stack(tmp_path_factory.mktemp("chaos") / "stack", settings, workers=SHORT.workers) as running:
        yield running


@pytest.mark.parametrize("promise", SCENARIOS)
def test_a_promise_is_kept(stack: Stack, promise: str) -> None:
    """What the scenario does is survived, and what it measures is within its bounds."""
    stack.until_warm()
    SCENARIOS[promise](stack, SHORT)

"""Tiny checkpoints, each written once a session, and what is loaded back from them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pytest
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from prismprune.vlm import PrunedVLM
from tests.prismprune.families import CHECKPOINTS, Transformers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> Iterator[None]:
    disable_progress_bar()
    yield
    enable_progress_bar()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of one of `CHECKPOINTS`, to be read only."""
    return cache(lambda name: CHECKPOINTS[name](tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def tiny_llava(checkpoints: Callable[[str], Path]) -> Path:
    """Directory of a checkpoint with a CLIP tower."""
    return checkpoints("llava")


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, checkpoints: Callable[[str], Path]) -> Path:
    """The one that the test module names as its `CHECKPOINT`, or LLaVA's."""
    return checkpoints(getattr(request.module, "CHECKPOINT", "llava"))


@pytest.fixture(scope="module")
def vlm(checkpoint: Path) -> PrunedVLM:
    """The module's checkpoint, loaded in float32 on the CPU."""
    return PrunedVLM.from_pretrained(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def eager(checkpoint: Path) -> Transformers:
    """The same in a user's hands and in eager attention, which gives all of its weights."""
    return Transformers(checkpoint, attn_implementation="eager")

"""Tiny checkpoints, written once a session, and the models that are loaded back from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from prismprune.vlm import PrunedVLM
from tests.prismprune.tiny import save_tiny_llava

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> Iterator[None]:
    disable_progress_bar()
    yield
    enable_progress_bar()


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a checkpoint with a CLIP tower."""
    return save_tiny_llava(tmp_path_factory.mktemp("tiny") / "clip")


@pytest.fixture(scope="session")
def vlm(tiny_llava: Path) -> PrunedVLM:
    """The checkpoint of `tiny_llava`, loaded in float32 on the CPU."""
    return PrunedVLM.from_pretrained(tiny_llava, device="cpu")

"""The tiny checkpoints, and models of theirs on CUDA."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch

from prismprune import PrunedVLM
from tests.prismprune.conftest import checkpoints

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Load = Callable[..., PrunedVLM]

__all__ = ["checkpoints", "load"]


@pytest.fixture(scope="session")
def load(checkpoints: Callable[[str], Path]) -> Load:
    """One of `CHECKPOINTS` by name, with the options of `from_pretrained`; on CUDA in float32 if not said."""

    def loaded(name: str, device: str = "cuda", dtype: str = "float32", **options: object) -> PrunedVLM:
        return PrunedVLM.from_pretrained(checkpoints(name), device=device, dtype=dtype, **options)  # type: ignore[arg-type]

    return cache(loaded)


@pytest.fixture(autouse=True)
def _whole_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch embeddings are convolutions, whose inputs cuDNN would round to TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

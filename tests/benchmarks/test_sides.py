"""The two sides that benchmarks compare: each is what it is said to be."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from benchmarks import _models, latency, layers, published
from benchmarks.joining import Joining
from benchmarks.overhead import One, Together, summary
from prismprune import PrunedVLM, TokenBudget
from prismprune.cpu_products import CpuLinear, available
from prismprune.errors import PrismError
from prismprune.heap import TUNABLES
from tests.prismprune.tiny import picture, save_tiny_llava
from worker.process import SWITCH_S

if TYPE_CHECKING:
    from pathlib import Path

needs_products = pytest.mark.skipif(not available(), reason="this torch has no oneDNN")


def test_a_process_of_a_benchmark_computes_as_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program reads as it starts, once it has started anew."""
    before, threads = sys.getswitchinterval(), torch.get_num_threads()
    monkeypatch.delenv(TUNABLES, raising=False)
    monkeypatch.setattr(os, "execve", started := Mock(side_effect=InterruptedError))
    with pytest.raises(InterruptedError):
        _models.as_the_worker(threads=1)
    command, argv, environment = started.call_args.args
    assert (command, argv) == (sys.executable, sys.orig_argv)
    monkeypatch.setenv(TUNABLES, environment[TUNABLES])
    try:
        _models.as_the_worker(threads=1)
        assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
        assert torch.get_num_threads() == 1
    finally:
        sys.setswitchinterval(before)
        torch.set_num_threads(threads)


@needs_products
def test_random_models_multiply_as_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the one that stands for transformers. Both have the same weights."""
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    monkeypatch.setitem(_models.GEOMETRIES, "tiny", _models.Geometry(text))
    monkeypatch.setattr(published, "clip_l", lambda size: published.clip(32, 2, 2, size))
    ours, plain = (
        _models.random_llava("tiny", 2, device=torch.device("cpu"), dtype=torch.float32, plain=plain).model
        for plain in (False, True)
    )
    kinds = [
        {type(each) for each in model.modules() if isinstance(each, nn.Linear)} for model in (ours, plain)
    ]
    assert kinds == [{CpuLinear}, {nn.Linear}]
    assert all(map(torch.equal, ours.parameters(), plain.parameters()))


def test_the_library_is_timed_without_hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook on its language model would make it call all layers as transformers does: slower."""
    path = str(save_tiny_llava(tmp_path))
    theirs = latency.Unpruned(path).answer(picture(), 2)
    ours = latency.Pruned(PrunedVLM.from_pretrained(path), "6")

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a hook")

    for name in ("register_forward_hook", "register_forward_pre_hook"):
        monkeypatch.setattr(type(ours.model.model.language_model), name, refused)
    answer = ours.answer(picture(), 2)
    for run in (theirs, answer):
        assert 0 < run.prefill_ms < run.first_token_ms < run.total_ms


def test_a_picture_for_the_tower_is_of_the_size_that_is_served() -> None:
    """DINOv2's config has that of its own training, 518."""
    shown: list[torch.Tensor] = []

    def tower(pixels: torch.Tensor) -> None:
        shown.append(pixels)

    sizes = SimpleNamespace(image_size=518, patch_size=14)
    tower.config, tower.dtype = sizes, torch.float32  # type: ignore[attr-defined]
    model = SimpleNamespace(
        model=SimpleNamespace(vision_tower=tower), config=SimpleNamespace(image_seq_length=576)
    )
    layers.view(model)()
    assert [pixels.shape for pixels in shown] == [(1, 3, 336, 336)]


@pytest.mark.timeout(60)
def test_a_first_answer_that_fails_is_not_waited_for(tmp_path: Path) -> None:
    """It says no word that others could join at."""
    vlm = PrunedVLM.from_pretrained(save_tiny_llava(tmp_path))
    with pytest.raises(PrismError):
        Joining(vlm, TokenBudget.parse(6), tokens=10**9, arrivals=1).round("between", 0)


def test_what_the_service_adds_at_the_tail_is_of_pairs() -> None:
    """A picture that is slow on both sides adds nothing."""
    library = [One(ms, "a") for ms in [10.0] * 149 + [500.0]]
    service = [One(one.ms + 1, "a") for one in library[:148]] + [One(510.0, "a"), One(501.0, "a")]
    together = [Together(1.0, ("a",))]
    found = summary({"offline": library, "service": service}, {"offline": together, "service": together})
    assert found["added_p99_ms"] == pytest.approx(1)

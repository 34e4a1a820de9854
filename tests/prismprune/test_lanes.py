"""Independent passes on a CPU, side by side: the same results, in less time (`benchmarks/lanes.py`)."""

from __future__ import annotations

import gc
import time
import weakref
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from threading import Barrier, Event, get_ident
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from prismprune import GenerationOptions, PrunedVLM, prefill
from prismprune.lanes import lanes_of, side_by_side
from prismprune.session import Asked
from prismprune.vlm import visual_request
from tests.prismprune.tiny import clip, picture

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import nn

CPU = torch.device("cpu")
PATIENCE_S = 60


@pytest.fixture(params=(2, 4), ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """That torch has."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@given(st.integers(1, 100), st.integers(1, 64))
def test_lanes_share_the_threads_evenly(passes: int, threads: int) -> None:
    """No lane is without a pass or with fewer threads than another."""
    lanes = lanes_of(passes, threads)
    assert lanes in range(1, passes + 1)
    assert threads % lanes == 0
    assert all(threads % more for more in range(lanes + 1, min(passes, threads) + 1))


@pytest.mark.parametrize("passes", range(10))
@torch.inference_mode()
def test_results_come_in_the_order_of_the_passes(passes: int, threads: int) -> None:
    """However long each takes; torch then has the threads that it had."""

    def slow(number: int) -> int:
        time.sleep(0.001 * (passes - number))
        return number

    assert side_by_side([partial(slow, number) for number in range(passes)], CPU) == list(range(passes))
    assert torch.get_num_threads() == threads


@torch.inference_mode()
def test_passes_run_at_the_same_time_on_a_share_of_the_threads_each(threads: int) -> None:
    """As many as there are threads; what is left over has all of them."""
    met = Barrier(threads, timeout=PATIENCE_S)

    def meet() -> int:
        met.wait()
        return torch.get_num_threads()

    assert side_by_side([meet] * threads + [torch.get_num_threads], CPU) == [1] * threads + [threads]


@torch.inference_mode()
def test_no_more_passes_run_at_once_than_may(threads: int) -> None:
    """They have the more threads for it."""
    for most in range(1, threads + 1):
        lanes = lanes_of(most, threads)
        found = side_by_side([torch.get_num_threads] * (2 * lanes), CPU, most)
        assert found == [threads // lanes] * (2 * lanes)


@torch.inference_mode()
def test_threads_of_a_lane_are_those_that_it_is_given(threads: int) -> None:
    """A thread that has run lanes before, of another width, is no exception."""
    for lanes in (threads, 2, threads):
        assert side_by_side([torch.get_num_threads] * lanes, CPU) == [threads // lanes] * lanes


@torch.inference_mode()
def test_an_error_is_told_once_no_pass_is_running(threads: int) -> None:
    """The first of them, in the order of the passes; torch has its threads back."""
    failed, ended = Event(), Event()

    def slow() -> None:
        failed.wait(PATIENCE_S)
        time.sleep(0.05)
        ended.set()
        raise ValueError("the first")

    def fail() -> None:
        failed.set()
        raise ValueError("the second")

    with pytest.raises(ValueError, match="the first"):
        side_by_side([slow, fail], CPU)
    assert ended.is_set()
    assert torch.get_num_threads() == threads


@torch.inference_mode()
def test_of_passes_that_failed_nothing_stays(threads: int) -> None:
    """Once their error is gone, though Python looks for no circles: memory may be what was short."""
    tensors = list[weakref.ref[torch.Tensor]]()

    def fail() -> None:
        own = torch.zeros(1)
        tensors.append(weakref.ref(own))
        raise MemoryError(own.shape)

    gc.disable()
    try:
        with suppress(MemoryError):
            side_by_side([fail] * 2 * threads, CPU)
        alive = [tensor for tensor in tensors if tensor() is not None]
    finally:
        gc.enable()
    assert len(tensors) == 2 * threads
    assert not alive


ASKED: ContextVar[str] = ContextVar("asked")


@pytest.mark.usefixtures("threads")
def test_passes_see_what_their_caller_does() -> None:
    """Its context variables, and whether it infers."""

    def seen() -> tuple[str, bool, bool]:
        return ASKED.get(), torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    token = ASKED.set("by the caller")
    try:
        with torch.inference_mode():
            assert side_by_side([seen] * 2, CPU) == [("by the caller", True, False)] * 2
        with torch.no_grad():
            assert side_by_side([seen] * 2, CPU) == [("by the caller", False, False)] * 2
    finally:
        ASKED.reset(token)


@pytest.mark.usefixtures("threads")
def test_what_torch_keeps_for_a_thread_keeps_the_passes_in_it() -> None:
    """Gradients, autocast and a count of operations are not lost; nor is another device's order."""
    here = [get_ident()] * 2
    assert side_by_side([get_ident] * 2, CPU) == here
    with torch.no_grad(), torch.autocast("cpu"):
        assert side_by_side([get_ident] * 2, CPU) == here
    with torch.inference_mode():
        assert side_by_side([get_ident] * 2, torch.device("cuda")) == here
        with FlopCounterMode(display=False) as counter:
            side_by_side([lambda: torch.ones(2, 3) @ torch.ones(3, 4)] * 2, CPU)
    assert counter.get_total_flops() == 2 * (2 * 2 * 3 * 4)


@pytest.fixture(scope="module")
def packed(checkpoint: Path) -> PrunedVLM:
    """With copies of its weights, so that layers call their parts directly, as in a worker."""
    return PrunedVLM.from_pretrained(checkpoint, device="cpu", packed_bytes=1 << 30)


@contextmanager
def threads_of(module: nn.Module) -> Iterator[set[int]]:
    """Those that call the module meanwhile. In a lane the first waits for another: it might do all alone."""
    seen: set[int] = set()
    several, caller = Event(), get_ident()

    def called(*_: object) -> None:
        seen.add(get_ident())
        if len(seen - {caller}) > 1:
            several.set()
        elif get_ident() != caller:
            several.wait(30)

    hook = module.register_forward_pre_hook(called)
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("method", ["prism", "fps"])
@pytest.mark.parametrize("budget", [5, "all"])
def test_media_encoded_side_by_side_are_those_of_each_alone(
    packed: PrunedVLM, budget: int | str, method: str
) -> None:
    """No pass reads another's attention, tokens or selection."""
    requests = [
        visual_request(picture(noise), "What?", token_budget=budget, method=method) for noise in range(5)
    ]
    alone = [packed.session().encode([request])[0].encoded for request in requests]
    for _ in range(3):
        with threads_of(packed.model.model.vision_tower) as seen:
            together = packed.session().encode(requests)
        assert len(seen) > 1
        for own, its in zip(together, alone, strict=True):
            assert own.encoded.token_map == its.token_map
            for mine, theirs in zip(own.encoded.visuals, its.visuals, strict=True):
                torch.testing.assert_close(mine.features, theirs.features, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("threads")
def test_long_prompts_have_all_threads(packed: PrunedVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that their activations are not there several times."""
    monkeypatch.setattr(prefill, "CPU_PREFILL_TOKENS", 1)
    monkeypatch.setattr(prefill, "TOKENS_AT_ONCE", 1)
    requests = [Asked(packed.encode(picture(noise), "all"), ("What?",)) for noise in range(4)]
    with threads_of(packed.model.model.language_model) as seen:
        packed.session().admit(requests)
    assert seen == {get_ident()}


@pytest.mark.usefixtures("threads")
def test_frames_of_a_clip_are_read_side_by_side(packed: PrunedVLM) -> None:
    """One request has several passes, too."""
    with threads_of(packed.model.model.vision_tower) as seen:
        packed.encode(clip(frames=4), 12)
    assert len(seen) > 1


@pytest.mark.usefixtures("threads")
def test_prompts_prefilled_side_by_side_are_answered_as_alone(
    packed: PrunedVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pass has positions, masks, keys and values of its own."""
    monkeypatch.setattr(prefill, "CPU_PREFILL_TOKENS", 1)  # a pass a prompt
    words = ("What?", "And a question that is much longer than the others are?", "Why then?")
    requests = [
        Asked(
            packed.encode(picture(noise), "all"), words[noise % 3 :][:1], GenerationOptions(max_new_tokens=6)
        )
        for noise in range(6)
    ]
    alone = [
        packed.answer_encoded(one.encoded, one.questions, one.generation)[0].token_ids for one in requests
    ]
    for _ in range(3):
        session = packed.session()
        with threads_of(packed.model.model.language_model) as seen:
            joined = session.admit(requests)
        assert len(seen) > 1
        while session.pending:
            session.step()
        assert [session.answers(one)[0].token_ids for one in joined] == alone

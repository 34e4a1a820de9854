"""Recorded steps, prompts and towers on the device itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from prismprune import GenerationOptions, PrunedVLM, TokenBudget, VisualRequest
from tests.prismprune.families import CHECKPOINTS, MEDIA, still

if TYPE_CHECKING:
    from prismprune.replay import Replay
    from tests.cuda.conftest import Load

pytestmark = pytest.mark.gpu
ENOUGH = 2**30


def requests(name: str, length: int) -> list[VisualRequest]:
    """About all kinds of media, with several questions and lengths."""
    return [
        VisualRequest(
            tuple(media),
            ("What?", "Why is it like that?", "Who?")[: 1 + place % 3],
            TokenBudget(5 + 3 * place),
            generation=GenerationOptions(max_new_tokens=length - place % 5),
        )
        for place, media in enumerate(MEDIA[name].values())
    ]


def said(vlm: PrunedVLM, asked: list[VisualRequest]) -> list[list[tuple[int, ...]]]:
    """Each joins two steps after the one before."""
    session = vlm.session()
    pending: list[Any] = []
    for one in asked:
        pending += session.ask([one])
        session.step()
        session.step()
    while session.pending:
        session.step()
    return [[answer.token_ids for answer in session.answers(each)] for each in pending]


def replays(vlm: PrunedVLM) -> Replay:
    replay = vlm._decoder.replay
    assert replay is not None
    return replay


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_replayed_steps_say_what_plain_ones_do(load: Load, name: str) -> None:
    """In float32, of every family and kind of media, over sizes that change; and steps were replayed."""
    plain, replayed = load(name), load(name, cuda_graph_bytes=ENOUGH)
    asked = requests(name, 24)
    assert said(replayed, asked) == said(plain, asked)
    if name == "llava_next-mistral":  # its tiny language model has a sliding window
        assert replayed._decoder.replay is None
    else:
        assert replays(replayed).steps.recordings


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_replayed_prompts_and_towers_say_what_plain_ones_do(load: Load, name: str) -> None:
    """What was seen before is recorded, and what is recorded is replayed: three times the same questions."""
    plain, replayed = load(name), load(name, cuda_graph_bytes=ENOUGH + 1)
    asked = requests(name, 6)
    expected = said(plain, asked)
    for _ in range(3):
        assert said(replayed, asked) == expected
    if replayed._decoder.replay is not None:
        assert replays(replayed).prompts.recordings
    towers = replayed._family.tower_replay
    assert towers is not None
    if name != "qwen2_5_vl":  # its tower's kernels depend on more than the pixels' shape
        assert towers.recordings


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_steps_of_nf4_are_replayed(load: Load, name: str) -> None:
    """One row and several, which bitsandbytes multiplies by different kernels."""
    options = {"dtype": "bfloat16", "quantization": "nf4"}
    plain, replayed = load(name, **options), load(name, cuda_graph_bytes=ENOUGH, **options)
    for asked in (requests(name, 9)[:1], requests(name, 9)):
        assert said(replayed, asked) == said(plain, asked)
        assert replays(replayed).steps.recordings


def test_int8_takes_plain_steps(load: Load) -> None:
    """Its kernels depend on values."""
    vlm = load("llava", dtype="bfloat16", quantization="int8", cuda_graph_bytes=ENOUGH)
    assert vlm._decoder.replay is None
    assert vlm.answer([still("wide")], "What?", 9, max_new_tokens=3).token_ids


def test_a_model_that_cannot_be_recorded_goes_on_with_plain_steps(load: Load) -> None:
    """A forward that looks at a value: the recording fails, and neither this answer nor the next."""
    plain, replayed = load("llava"), load("llava", cuda_graph_bytes=ENOUGH - 1)
    asked = requests("llava", 12)
    expected = said(plain, asked)
    hook = replayed.model.lm_head.register_forward_pre_hook(lambda *_: torch.ones(1).cuda().cpu() and None)
    try:
        assert said(replayed, asked) == expected
    finally:
        hook.remove()
    assert not replays(replayed).steps.recordings.usable
    assert said(replayed, asked) == expected


def test_memory_of_recordings_is_given_back(load: Load) -> None:
    """`make_room` leaves nothing allocated but the model."""
    vlm = load("llava", cuda_graph_bytes=ENOUGH - 2)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    session = vlm.session()
    session.ask(requests("llava", 12))
    while session.pending:
        session.step()
    assert replays(vlm).bytes > 0
    assert torch.cuda.memory_allocated() > before
    assert session.make_room()
    del session
    assert torch.cuda.memory_allocated() - before < 2**20

"""Loading, precision, `prune` and the engine on the device itself."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

import prismprune
from prismprune import GenerationOptions, PrunedVLM, Selection, TokenBudget, VisualRequest
from prismprune.demo.evaluate import packed
from prismprune.encoding import EncodingRequest, encode
from prismprune.evaluation.compare import compare
from prismprune.evaluation.subjects import Question, Subject
from prismprune.meters import Stopwatch
from tests.prismprune.families import CASES, CHECKPOINTS, MEDIA, Transformers, still
from tests.prismprune.tiny_demo import save_tiny_demo, silent
from worker.engine import Engine
from worker.line import Limits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.cuda.conftest import Load

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("quantization", ["int8", "nf4", None])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_family_answers_at_every_precision(load: Load, name: str, quantization: str | None) -> None:
    """The kept tokens of 16 bits, whatever the language model is stored in: the tower is not quantized."""
    full = load(name, dtype="bfloat16")
    vlm = load(name, dtype="bfloat16", quantization=quantization)
    for media in MEDIA[name].values():
        answer, expected = (each.answer(list(media), "What?", 9, max_new_tokens=4) for each in (vlm, full))
        assert answer.visual_tokens.kept == 9
        assert answer.token_map == expected.token_map
        assert answer.memory.device == "cuda:0"
        assert answer.memory.peak_bytes > 0
        assert answer.timings.prefill_ms > 0


@pytest.mark.parametrize(("name", "media"), CASES)
def test_a_family_keeps_and_says_what_it_does_on_a_cpu(load: Load, name: str, media: str) -> None:
    """In float32: the same tokens stay, unpruned and pruned, of every kind of media."""
    on_cpu, on_cuda = load(name, device="cpu"), load(name)
    for budget in (None, 11):
        expected, answer = (
            vlm.answer(list(MEDIA[name][media]), "What is it?", budget, max_new_tokens=10)
            for vlm in (on_cpu, on_cuda)
        )
        assert answer.token_map == expected.token_map
        assert answer.token_ids == expected.token_ids


@pytest.mark.parametrize(("name", "media"), CASES)
def test_prune_on_cuda_says_what_it_says_on_a_cpu(
    checkpoints: Callable[[str], Path], name: str, media: str
) -> None:
    """A model in a user's own hands, in float32."""
    user = Transformers(checkpoints(name))
    inputs = user.inputs(MEDIA[name][media], "What is it?")
    with prismprune.prune(user.model, 9):
        expected = user.answer(inputs, 8)
    user.model.cuda()
    on_cuda = {key: value.cuda() if hasattr(value, "cuda") else value for key, value in inputs.items()}
    with prismprune.prune(user.model, 9):
        assert user.answer(on_cuda, 8) == expected


@pytest.mark.parametrize("budgets", [(9,), (9, 5)])
def test_nothing_waits_for_the_tower_before_tokens_are_selected(
    load: Load, monkeypatch: pytest.MonkeyPatch, budgets: tuple[int, ...]
) -> None:
    """Torch raises where a call would wait, from the tower's to the selection's last; budgets may differ."""
    vlm = load("llava")
    requests = [EncodingRequest((still("wide"),), TokenBudget(budget)) for budget in budgets]
    expected = [one.token_map for one in encode(vlm._family, requests)]
    read, tokens = vlm._family.read, Selection.tokens

    def reading(pixels: Any, wanted: Any) -> Any:
        found = read(pixels, wanted)
        torch.cuda.set_sync_debug_mode("error")
        return found

    def taken(selection: Selection, features: torch.Tensor) -> torch.Tensor:
        found = tokens(selection, features)
        torch.cuda.set_sync_debug_mode("default")
        return found

    monkeypatch.setattr(vlm._family, "read", reading)
    monkeypatch.setattr(Selection, "tokens", taken)
    try:
        assert [one.token_map for one in encode(vlm._family, requests)] == expected
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_demo_s_questions_are_packed_on_the_device(tmp_path: Path, dtype: str) -> None:
    """Packs are made on the CPU: `compare` marks them where the model is, pruned and unpruned."""
    vlm = silent(PrunedVLM.from_pretrained(save_tiny_demo(tmp_path), device="cuda", dtype=dtype))
    asked = (Question("", "What?", "red"), Question("", "Nothing?", ""))
    subjects = [Subject("wide", asked, lambda: still("wide"))]
    *_, report = compare(vlm, "test", subjects, [("none", None), ("prism", 5)], marker=packed(vlm))
    assert [tally.by_picture for tally in report.tallies.values()] == [[(1, 2)]] * 2


def test_a_lap_ends_when_its_work_does_and_waits_when_it_is_looked_at() -> None:
    """CUDA's own clock."""
    watch = Stopwatch(torch.device("cuda"))
    torch.cuda._sleep(200_000_000)  # cycles
    long = watch.lap()
    short = watch.lap()
    assert not torch.cuda.current_stream().query()
    assert long.ms > 20 * short.ms
    assert torch.cuda.current_stream().query()


def test_media_are_encoded_beside_the_answers_of_others(load: Load) -> None:
    """In a stream of their own, while steps are recorded and replayed: answers as one by one."""
    vlm = load("llava", cuda_graph_bytes=2**29)
    asked = [
        VisualRequest(
            (still(size, number),),
            ("What?",),
            TokenBudget(9),
            generation=GenerationOptions(max_new_tokens=60),
        )
        for number, size in enumerate(("wide", "tall", "square", "panorama", "large") * 4)
    ]
    alone = [vlm.answer_batch([one])[0][0].token_ids for one in asked]
    failures: list[BaseException] = []
    engine: Any = Engine(
        lambda: vlm,
        limits=Limits(max_batch=6, max_tokens=10**6, max_wait_s=0),
        overlap=lambda _: True,
        on_batch=lambda _: None,
        on_death=failures.append,
    )
    with engine:
        tickets = []
        for one in asked:
            tickets.append(engine.submit(one, time.monotonic() + 120))
            time.sleep(0.01)
        answers = [ticket.answered().answers[0].token_ids for ticket in tickets]
    assert answers == alone
    assert not failures


def test_a_request_that_does_not_fit_is_told_so_and_others_are_answered(load: Load) -> None:
    """The allocator's own error ends in the request's, not in the engine's."""
    vlm = load("llava")
    torch.cuda.empty_cache()
    _, whole = torch.cuda.mem_get_info()
    failures: list[BaseException] = []
    engine: Any = Engine(
        lambda: vlm,
        limits=Limits(max_batch=4, max_tokens=10**6, max_wait_s=0),
        on_batch=lambda _: None,
        on_death=failures.append,
    )
    small = VisualRequest((still("wide"),), ("What?",), TokenBudget(9))
    large = VisualRequest(tuple(still("wide", seed) for seed in range(3000)), ("What?",), TokenBudget.all())
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / whole)
    try:
        with engine:
            too_large = engine.submit(large, time.monotonic() + 120)
            with pytest.raises(prismprune.PrismError, match="does not fit"):
                too_large.answered()
            assert engine.submit(small, time.monotonic() + 120).answered().answers[0].token_ids
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert not failures

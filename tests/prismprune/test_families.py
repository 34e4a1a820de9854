"""Every family: unpruned it is transformers' own model, pruned it sees the chosen tokens and no others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch

from prismprune.budget import TokenBudget
from prismprune.caching import EncodingCache
from prismprune.encoding import EncodingRequest, encode
from prismprune.families import FAMILIES
from prismprune.generation import GenerationOptions
from prismprune.selection import METHODS
from prismprune.selection.base import Scores, Selection, Selector
from prismprune.vlm import PrunedVLM, VisualRequest
from tests.present import present
from tests.prismprune.families import BY_CLS, CASES, CHECKPOINTS, MEDIA, Transformers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from prismprune.results import Answer

QUESTION = "What is it?"
LENGTH = 10
"""Tokens of an answer."""


class Pair:
    """One checkpoint, loaded back twice: by the library, and by transformers alone."""

    def __init__(self, path: Any, backend: str = "torchvision") -> None:
        self.vlm = PrunedVLM.from_pretrained(path)
        self.reference = Transformers(path, backend)
        if backend == "pil":
            self.vlm.processor.image_processor = self.reference.processor.image_processor


@pytest.fixture(scope="module")
def pairs(checkpoints: Callable[[str], Path]) -> dict[str, Pair]:
    return {name: Pair(checkpoints(name)) for name in CHECKPOINTS}


@pytest.fixture(scope="module")
def slow_pairs(pairs: dict[str, Pair]) -> dict[str, Pair]:
    """The same checkpoints behind the processors that need no torchvision."""
    return {name: Pair(pair.vlm.name, "pil") for name, pair in pairs.items()}


def logits_of(vlm: PrunedVLM, run: Any) -> tuple[Any, Tensor]:
    """What `run` returns, and the logits [T, vocabulary] of the tokens that one row generates meanwhile."""
    seen: list[Tensor] = []
    hook = vlm.model.lm_head.register_forward_hook(lambda _module, _args, output: seen.append(output[0, -1]))
    try:
        return run(), torch.stack(seen)
    finally:
        hook.remove()


def asked(vlm: PrunedVLM, media: Any, budget: int | None, method: str = "prism") -> tuple[Answer, Tensor]:
    def run() -> Answer:
        return vlm.answer(media, QUESTION, budget, method=method, max_new_tokens=LENGTH)

    answer, logits = logits_of(vlm, run)
    return answer, logits[: len(answer.token_ids)]


@pytest.mark.parametrize(("name", "media"), CASES)
def test_all_tokens_give_the_logits_of_transformers(pairs: dict[str, Pair], name: str, media: str) -> None:
    """Prompt, logits (to 1e-4) and greedy tokens are those of a user without this library."""
    vlm, reference = pairs[name].vlm, pairs[name].reference
    inputs = reference.inputs(MEDIA[name][media], QUESTION)
    answer, logits = asked(vlm, MEDIA[name][media], None)
    assert answer.token_ids == reference.answer(inputs, LENGTH)
    prompt = vlm._family.prompt(QUESTION, None, vlm.encode(MEDIA[name][media]).visuals)
    assert torch.equal(prompt.token_ids, inputs["input_ids"][0])
    with torch.inference_mode():
        expected = reference.model(**inputs).logits[0, -1]
    torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_slow_processors_give_the_same_as_by_transformers(slow_pairs: dict[str, Pair], name: str) -> None:
    """Also where images are processed without torchvision."""
    pair = slow_pairs[name]
    for media in ("wide", "two", "panorama"):
        answer, _ = asked(pair.vlm, MEDIA[name][media], None)
        assert answer.token_ids == pair.reference.answer(
            pair.reference.inputs(MEDIA[name][media], QUESTION), LENGTH
        )


@pytest.mark.parametrize("budget", [None, 11])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_batch_is_answered_as_one_by_one(pairs: dict[str, Pair], name: str, budget: int | None) -> None:
    """Pictures, clips and both, of any size, padded into one batch, change no token."""
    vlm, options = pairs[name].vlm, GenerationOptions(max_new_tokens=LENGTH)
    requests = [
        VisualRequest(tuple(media), (QUESTION * (1 + number % 3),), TokenBudget(budget), generation=options)
        for number, media in enumerate(MEDIA[name].values())
    ]
    together = vlm.answer_batch(requests)
    alone = [vlm.answer_batch([request])[0] for request in requests]
    assert [own[0].token_ids for own in together] == [own[0].token_ids for own in alone]
    assert [own[0].token_map for own in together] == [own[0].token_map for own in alone]


@pytest.mark.parametrize("budget", [None, 11])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_further_question_from_kept_keys_and_values_is_answered_as_a_first(
    pairs: dict[str, Pair], name: str, budget: int | None
) -> None:
    """Pictures, clips and both, one behind the other, and then all at once."""
    vlm, options = pairs[name].vlm, GenerationOptions(max_new_tokens=LENGTH)
    session = vlm.session(EncodingCache(2**24, prefix_bytes=2**26))
    answered: list[Answer] = []
    requests = [
        VisualRequest(tuple(media), (text,), TokenBudget(budget), generation=options, media_key=(name, label))
        for text in (QUESTION, "And what else is there?")
        for label, media in MEDIA[name].items()
    ]
    first, further = requests[: len(MEDIA[name])], requests[len(MEDIA[name]) :]
    for group in [*([request] for request in first), further]:
        pending = session.ask(group)
        while session.pending:
            session.step()
        answered += [session.answers(one)[0] for one in pending]
    fresh = [vlm.answer_batch([request])[0][0] for request in requests]
    assert [answer.token_ids for answer in answered] == [answer.token_ids for answer in fresh]
    assert all(answer.cached_tokens for answer in answered[len(first) :])


@pytest.mark.parametrize("budget", [None, 11])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_begins_with_a_kept_system_text_is_answered_as_a_first(
    pairs: dict[str, Pair], name: str, budget: int | None
) -> None:
    """Texts of two lengths before media of all kinds, all at once; further questions behind them as well."""
    vlm = pairs[name].vlm
    session = vlm.session(EncodingCache(2**24, prefix_bytes=2**26))
    systems = [f"{'Look at what is shown. ' * repeats}Say little." for repeats in (2, 3)]

    def ask(texts: tuple[str, ...]) -> None:
        requests = [
            VisualRequest(
                tuple(media),
                texts,
                TokenBudget(budget),
                generation=GenerationOptions(max_new_tokens=LENGTH, system=systems[number % 2]),
                media_key=(name, label),
            )
            for number, (label, media) in enumerate(MEDIA[name].items())
        ]
        pending = session.ask(requests)
        while session.pending:
            session.step()
        for one, request in zip(pending, requests, strict=True):
            fresh = [answer.token_ids for answer in vlm.answer_batch([request])[0]]
            assert [answer.token_ids for answer in session.answers(one)] == fresh

    for system in systems * 2:
        options = GenerationOptions(max_new_tokens=1, system=system)
        media = tuple(MEDIA[name]["wide"])
        session.ask([VisualRequest(media, (QUESTION,), TokenBudget(budget), generation=options)])
        while session.pending:
            session.step()
    for texts in ((QUESTION,), ("And what else?",), (QUESTION, "Why?")):
        ask(texts)


@pytest.mark.parametrize(("name", "media"), CASES)
def test_pruned_prefill_and_decoding_are_one_full_forward(
    pairs: dict[str, Pair], name: str, media: str
) -> None:
    """Step by step through the cache: the logits of transformers' own forward over the whole sequence."""
    vlm, reference = pairs[name].vlm, pairs[name].reference
    answer, logits = asked(vlm, MEDIA[name][media], 9)
    visuals = vlm.encode(MEDIA[name][media], 9).visuals
    prompt = vlm._family.prompt(QUESTION, None, visuals)
    sequence = torch.cat([prompt.token_ids, torch.tensor(answer.token_ids)])[None]
    inputs = vlm._family.visual_inputs(visuals)
    in_rows = prompt.positions.ndim == 2  # positions of a pruned medium, which transformers cannot know
    if in_rows:
        behind = torch.arange(prompt.following, prompt.following + len(answer.token_ids))
        inputs["position_ids"] = torch.cat([prompt.positions, behind.expand(3, -1)], 1)[:, None]
    with torch.inference_mode():
        full = reference.model(input_ids=sequence, **inputs).logits[0]
    expected = full[len(prompt.token_ids) - 1 : -1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    if not in_rows:
        inputs = {"input_ids": prompt.token_ids[None], **vlm._family.visual_inputs(visuals)}
        assert answer.token_ids == reference.answer(inputs, LENGTH)


@pytest.mark.parametrize("budget", [9, None])
@pytest.mark.parametrize(("name", "media"), CASES)
def test_the_language_model_sees_text_and_what_was_kept(
    pairs: dict[str, Pair], name: str, media: str, budget: int | None
) -> None:
    """Exactly the text, the kept tokens, and the newlines where the layout has them."""
    vlm, lengths = pairs[name].vlm, []
    text = len(vlm._family._template_ids(QUESTION, None, vlm.encode(MEDIA[name][media], 1).visuals))
    hook = vlm.model.model.language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    answer = vlm.answer(MEDIA[name][media], QUESTION, budget, max_new_tokens=1)
    hook.remove()
    placeholders = len(MEDIA[name][media])
    assert lengths == [text - placeholders + answer.visual_tokens.kept + answer.visual_tokens.newlines]
    assert answer.prompt_tokens == lengths[0]
    original = answer.visual_tokens.original
    assert answer.visual_tokens.kept == min(original, original if budget is None else budget)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_method_keeps_its_budget_in_every_family(
    pairs: dict[str, Pair], name: str, method: str
) -> None:
    """On all media at once: as many tokens as the budget says, each of them once, and an answer."""
    vlm = pairs[name].vlm
    for media in MEDIA[name].values():
        encoded = vlm.encode(media, 13, method=method)
        assert encoded.visual_tokens.kept == sum(len(set(part.kept)) for part in encoded.token_map) == 13
        assert sum(len(visual.features) for visual in encoded.visuals) == 13 + encoded.visual_tokens.newlines
        assert all(visual.features.isfinite().all() for visual in encoded.visuals)
        assert encoded.visual_tokens.method == method


@dataclass(frozen=True, slots=True)
class Spy(Selector):
    """Merges all tokens into the first `k`, evenly, and notes what it was given."""

    name: ClassVar[str] = "spy"
    needs_keys: ClassVar[bool] = True
    needs_projected: ClassVar[bool] = True
    seen: list[Scores] = field(default_factory=list, compare=False, hash=False)

    def __call__(self, scores: Scores, k: int) -> Selection:
        self.seen.append(scores)
        indices = torch.arange(k).expand(scores.images, k)
        weights = torch.full((scores.images, k, scores.candidates), 1 / scores.candidates)
        return Selection(indices, weights=weights)


@torch.inference_mode()
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_method_gets_the_keys_and_embeddings_that_it_asks_for(
    pairs: dict[str, Pair], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys a head and projected features of the candidates; what it merges is projected in their place."""
    family, spy = pairs[name].vlm._family, Spy()
    monkeypatch.setattr(EncodingRequest, "selector", lambda _request: spy)
    (encoded,) = encode(family, [EncodingRequest(tuple(MEDIA[name]["two"]), TokenBudget(6))])
    heads, width = 4, 32
    for scores in spy.seen:
        keys, projected, grid = present(scores.keys), present(scores.projected), present(scores.grid)
        assert keys.shape == (scores.images, heads, scores.candidates, 8)
        torch.testing.assert_close(projected, family.project(scores.features))
        assert projected.shape[2] == width
        assert grid[0] * grid[1] == scores.candidates
    possible = torch.cat([family.project(scores.features.mean(1)) for scores in spy.seen])
    if any(visual.newlines for visual in encoded.visuals):
        possible = torch.cat([possible, family.model.model.image_newline[None]])
    for token in torch.cat([visual.features for visual in encoded.visuals]):
        assert (possible - token).abs().amax(1).min() < 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("name", BY_CLS)
def test_the_keys_are_those_of_the_attention(pairs: dict[str, Pair], name: str) -> None:
    """CLS attention is a softmax over its logits, so patches compare by query times key, up to a constant."""
    family = pairs[name].vlm._family
    (pixels, *_) = family.preprocess(family.views(MEDIA[name]["two"]))
    reading = family.read(pixels)
    logits, keys = reading.attention().log(), reading.keys()
    # With more patches than dimensions, logits without their mean lie in the span of the centred keys.
    centred = keys - keys.mean(2, keepdim=True)
    wanted = (logits - logits.mean(2, keepdim=True))[..., None]
    query = torch.linalg.lstsq(centred, wanted).solution
    assert keys.shape[2] > keys.shape[3]
    torch.testing.assert_close(centred @ query, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_family_is_found_by_its_config(pairs: dict[str, Pair], name: str) -> None:
    """`model_type` names the adapter."""
    model_type = pairs[name].vlm.model.config.model_type
    assert FAMILIES[model_type].name == pairs[name].vlm.family == model_type == name.partition("-")[0]

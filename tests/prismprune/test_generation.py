"""Decoding: each row of a batch by its own rules."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from prismprune.decoding import Decoder, Running
from prismprune.errors import InvalidOptionError, InvalidScoresError
from prismprune.generation import Generated, GenerationOptions, Prompt
from prismprune.lanes import lanes_of
from prismprune.prefill import similar_lengths
from tests.prismprune.tiny import tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


def decoder(model: LlamaForCausalLM, end_ids: Collection[int] = ()) -> Decoder:
    return Decoder(model, TOKENIZER, frozenset(end_ids), frozenset(), lambda _visuals: {})


def prompt(text: str) -> Prompt:
    return Prompt(torch.tensor(TOKENIZER(text)["input_ids"]), ())


def generate(
    decoder: Decoder,
    prompts: list[Prompt],
    options: list[GenerationOptions],
    should_stop: Callable[[int], bool] | None = None,
) -> tuple[list[Generated], list[str]]:
    """The outcomes, and the text of each row's events. `should_stop` is asked before each token of a row."""
    running = Running(decoder)
    rows = running.join(prompts, options)
    places, pieces = {id(row): place for place, row in enumerate(rows)}, [""] * len(prompts)
    while running.rows:
        for place, row in enumerate(rows):
            if should_stop is not None and row.finish_reason is None and should_stop(place):
                row.cancel()
        for row, text in running.step():
            pieces[places[id(row)]] += text
    return [row.outcome() for row in rows], pieces


def alone(
    model: LlamaForCausalLM, text: str, options: GenerationOptions, end_ids: Collection[int] = ()
) -> Generated:
    return generate(decoder(model, end_ids), [prompt(text)], [options])[0][0]


TEXTS = [
    "a",
    "Of middling length.",
    "b",
    "A text that is a good deal longer than every other one of them. " * 2,
]


def test_greedy_rows_are_those_of_transformers(model: LlamaForCausalLM) -> None:
    """Rows of mixed lengths and limits in one batch: each as `generate` gives it alone."""
    options = [GenerationOptions(max_new_tokens=limit) for limit in (30, 3, 17, 8)]
    outcomes, _ = generate(decoder(model), [prompt(text) for text in TEXTS], options)
    reference: Any = model  # of which transformers' types say that it cannot `generate`
    for text, own, outcome in zip(TEXTS, options, outcomes, strict=True):
        ids = prompt(text).token_ids[None]
        expected = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=own.max_new_tokens, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert list(outcome.token_ids) == expected[0, ids.shape[1] :].tolist()
        assert outcome.finish_reason == "length"


def test_seeded_rows_do_not_depend_on_their_neighbors(model: LlamaForCausalLM) -> None:
    """The same seed draws the same answer in a batch and alone; greedy rows beside it stay greedy."""
    options = [
        GenerationOptions(max_new_tokens=12, temperature=1.0, seed=7),
        GenerationOptions(max_new_tokens=9),
        GenerationOptions(max_new_tokens=15, temperature=0.7, top_p=0.9, seed=7),
        GenerationOptions(max_new_tokens=12, temperature=1.0, seed=8),
    ]
    outcomes, _ = generate(decoder(model), [prompt(text) for text in TEXTS], options)
    for text, own, outcome in zip(TEXTS, options, outcomes, strict=True):
        assert outcome.token_ids == alone(model, text, own).token_ids


@settings(max_examples=20)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=6))
def test_rows_of_any_lengths_in_any_order_are_answered_as_alone(
    model: LlamaForCausalLM, lengths: list[int]
) -> None:
    """However the rows are grouped and padded for the prefill, each gets its own first token and cache."""
    texts = [chr(ord("a") + row) * length for row, length in enumerate(lengths)]
    options = GenerationOptions(max_new_tokens=4)
    outcomes, _ = generate(decoder(model), [prompt(text) for text in texts], [options] * len(texts))
    alone_ids = [alone(model, text, options).token_ids for text in texts]
    assert [outcome.token_ids for outcome in outcomes] == alone_ids


def test_seeds_differ(model: LlamaForCausalLM) -> None:
    """Another seed, and no seed twice, draw other answers."""
    seeds = (1, 2, None, None)
    answers = {
        alone(model, "x", GenerationOptions(max_new_tokens=20, temperature=1.5, seed=seed)).token_ids
        for seed in seeds
    }
    assert len(answers) == len(seeds)


def test_a_tiny_top_p_and_a_tiny_temperature_are_greedy(model: LlamaForCausalLM) -> None:
    """Both leave the likeliest token only."""
    greedy = alone(model, "x", GenerationOptions(max_new_tokens=8)).token_ids
    for options in (
        GenerationOptions(max_new_tokens=8, temperature=1.0, top_p=1e-6, seed=1),
        GenerationOptions(max_new_tokens=8, temperature=1e-9, seed=1),
    ):
        assert alone(model, "x", options).token_ids == greedy


def test_an_end_token_ends_its_row_and_is_not_part_of_the_answer(model: LlamaForCausalLM) -> None:
    """The row stops before the end token; its neighbors go on."""
    free = alone(model, "x", GenerationOptions(max_new_tokens=10)).token_ids
    end = free[4]
    before = free.index(end)
    rows, _ = generate(
        decoder(model, [end]), [prompt("x"), prompt("yy")], [GenerationOptions(max_new_tokens=10)] * 2
    )
    assert (rows[0].token_ids, rows[0].finish_reason) == (free[:before], "stop")
    assert rows[1].token_ids == alone(model, "yy", GenerationOptions(max_new_tokens=10), [end]).token_ids


def test_the_cache_is_counted_without_padding_and_without_neighbors(model: LlamaForCausalLM) -> None:
    """2 (keys, values) x 2 layers x 2 heads x 8 x 4 bytes a token: the prompt's and those fed back."""
    options = [GenerationOptions(max_new_tokens=limit) for limit in (1, 5)]
    outcomes, _ = generate(decoder(model), [prompt("abc"), prompt("a" * 40)], options)
    token_bytes = 2 * 2 * 2 * 8 * 4
    assert [outcome.kv_cache_bytes for outcome in outcomes] == [3 * token_bytes, (40 + 4) * token_bytes]


def test_a_canceled_row_keeps_what_it_has_and_the_others_go_on(model: LlamaForCausalLM) -> None:
    """Between two tokens, and only that row ends."""
    asked = itertools.count()
    outcomes, _ = generate(
        decoder(model),
        [prompt("x"), prompt("yy")],
        [GenerationOptions(max_new_tokens=6)] * 2,
        lambda row: row == 0 and next(asked) == 3,
    )
    assert [(len(outcome.token_ids), outcome.finish_reason) for outcome in outcomes] == [
        (3, "canceled"),
        (6, "length"),
    ]
    assert outcomes[1].token_ids == alone(model, "yy", GenerationOptions(max_new_tokens=6)).token_ids


def test_a_row_can_be_canceled_before_its_first_token(model: LlamaForCausalLM) -> None:
    """Then it has no text."""
    outcomes, _ = generate(decoder(model), [prompt("x")], [GenerationOptions()], lambda _row: True)
    assert (outcomes[0].text, outcomes[0].token_ids, outcomes[0].finish_reason) == ("", (), "canceled")


def test_a_stop_string_ends_the_text_before_it(model: LlamaForCausalLM) -> None:
    """The text ends where the stop string begins, also when it spans tokens; no piece shows its start."""
    free = alone(model, "x", GenerationOptions(max_new_tokens=30, temperature=1.0, seed=3))
    middle = len(free.text) // 2
    stop = free.text[middle : middle + 2]
    options = GenerationOptions(max_new_tokens=30, temperature=1.0, seed=3, stop=("never", stop))
    outcomes, pieces = generate(decoder(model), [prompt("x")], [options])
    assert outcomes[0].text == pieces[0] == free.text[: free.text.index(stop)].strip()
    assert outcomes[0].finish_reason == "stop"


def test_the_callers_gradient_mode_is_left_alone(model: LlamaForCausalLM) -> None:
    """Between two tokens the caller is not inside inference mode."""
    running = Running(decoder(model))
    running.join([prompt("x")], [GenerationOptions(max_new_tokens=2)])
    running.step()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_row_without_finite_scores_fails_alone(
    model: LlamaForCausalLM, score: float, temperature: float
) -> None:
    """Its outcome is an error; a neighbor's is what it is alone."""
    own = GenerationOptions(max_new_tokens=8, temperature=temperature, seed=5)
    expected = alone(model, "x", own)
    steps = itertools.count()

    def spoil(_head: Any, _inputs: Any, logits: torch.Tensor) -> None:
        if len(logits) == 2 and next(steps) == 3:
            logits[1] = score

    hook = model.lm_head.register_forward_hook(spoil)
    try:
        running = Running(decoder(model))
        rows = running.join([prompt("x"), prompt("yyyyyyyyy")], [own, own])
        while running.rows:
            running.step()
    finally:
        hook.remove()
    assert rows[0].outcome().token_ids == expected.token_ids
    assert (rows[1].finish_reason, len(rows[1].token_ids)) == ("failed", 4)
    with pytest.raises(InvalidScoresError):
        rows[1].outcome()


def test_one_score_that_is_no_number_fails_a_row(model: LlamaForCausalLM) -> None:
    """Also where another token is the likeliest of those that have one."""

    def spoil(_head: Any, _inputs: Any, logits: torch.Tensor) -> None:
        logits[..., -1] = math.nan

    hook = model.lm_head.register_forward_hook(spoil)
    try:
        with pytest.raises(InvalidScoresError):
            alone(model, "x", GenerationOptions())
    finally:
        hook.remove()


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=20))
def test_rows_of_a_group_are_of_similar_length(lengths: list[int]) -> None:
    """Every row is in one group, and no group pads a row to more than a third above its length."""
    groups = similar_lengths(dict(enumerate(lengths)))
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        own = [lengths[row] for row in group]
        assert min(own) >= 0.75 * max(own)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=20), st.integers(1, 6000), st.integers(1, 8))
def test_a_group_has_its_most_tokens_with_the_padding(lengths: list[int], most: int, threads: int) -> None:
    """Only a row that is longer by itself exceeds it; every row is in one group."""
    groups = similar_lengths(dict(enumerate(lengths)), most, threads=threads)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[row] for row in group) <= most


@given(st.integers(1, 40), st.integers(1, 10), st.integers(1, 8))
def test_lanes_have_as_many_rows_of_one_length_each(rows: int, most: int, threads: int) -> None:
    """But for what is left over, which is less than a row for each of them."""
    sizes = [len(group) for group in similar_lengths(dict.fromkeys(range(rows), 100), 100 * most, 0, threads)]
    lanes = lanes_of(-(-rows // most), threads)
    for_lanes = rows - rows % lanes
    ends = list(itertools.accumulate(sizes))
    parts = sizes[: ends.index(for_lanes) + 1]
    assert len(parts) % lanes == 0
    assert max(parts) - min(parts) <= 1
    assert max(sizes) <= most


@pytest.mark.parametrize(("rows", "sizes"), [(5, [5]), (6, [3, 3]), (7, [3, 3, 1]), (9, [4, 4, 1])])
def test_a_row_too_many_for_two_lanes_is_by_itself(rows: int, sizes: list[int]) -> None:
    """Seven on two threads are three for each lane and one for both, not four beside three."""
    groups = similar_lengths(dict.fromkeys(range(rows), 110), 640, threads=2)
    assert [len(group) for group in groups] == sizes


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.5},
        {"max_new_tokens": True},
        {"max_new_tokens": "8"},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"temperature": True},
        {"temperature": "hot"},
        {"top_p": None},
        {"stop": ("",)},
        {"stop": "end"},
        {"stop": (1,)},
        {"seed": 2**63},
        {"seed": 1.0},
        {"seed": False},
        {"system": 1},
        {"system": "caf\udce9"},
        {"stop": ("caf\udce9",)},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    """Each with an error that a caller can act on."""
    with pytest.raises(InvalidOptionError):
        GenerationOptions(**options)


def test_numbers_of_numpy_are_options_too() -> None:
    """Whole ones as Python's own."""
    given_ones: Any = {"max_new_tokens": np.int64(3), "temperature": np.float32(0.5), "seed": np.int32(4)}
    options = GenerationOptions(**given_ones)
    assert options == GenerationOptions(max_new_tokens=3, temperature=0.5, seed=4)
    assert (type(options.max_new_tokens), type(options.seed)) == (int, int)


def test_prompts_with_positions_of_their_own_go_on_from_them() -> None:
    """Three rows of positions with gaps, as M-RoPE has them: each row as one full forward over it decides."""
    torch.manual_seed(0)
    text = {
        "vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    ).eval()
    prompts = []
    for text_of_one in TEXTS:
        ids = prompt(text_of_one).token_ids
        rows = torch.randint(0, 3, (3, len(ids))).cumsum(1)
        prompts.append(Prompt(ids, (), rows, next_position=int(rows.max()) + 5))
    options = [GenerationOptions(max_new_tokens=limit) for limit in (6, 3, 8, 5)]
    decoding = Decoder(model, TOKENIZER, frozenset(), frozenset(), lambda _visuals: {})
    outcomes, _ = generate(decoding, prompts, options)
    for one, own, outcome in zip(prompts, options, outcomes, strict=True):
        ids, positions = one.token_ids, one.positions
        for step in range(own.max_new_tokens):
            with torch.inference_mode():
                logits = model(input_ids=ids[None], position_ids=positions[:, None]).logits[0, -1]
            ids = torch.cat([ids, logits.argmax()[None]])
            positions = torch.cat([positions, torch.full((3, 1), one.following + step)], dim=1)
        assert list(outcome.token_ids) == ids[len(one.token_ids) :].tolist()

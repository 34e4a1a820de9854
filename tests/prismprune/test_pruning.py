"""`prune` around a model in a user's own hands: transformers' calls, with fewer visual tokens."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    DynamicCache,
    GenerationConfig,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    pipeline,
)

import prismprune
from prismprune.budget import TokenBudget
from prismprune.errors import InvalidBudgetError, InvalidOptionError, UnknownMethodError
from prismprune.vlm import PrunedVLM
from tests.prismprune.families import CASES, CHECKPOINTS, MEDIA, Transformers, still

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

QUESTION, LENGTH = "What is it?", 8
# `test_pruning_training.py` has the warning for what is to be trained; here, nothing is.
pytestmark = pytest.mark.filterwarnings("ignore:No gradient reaches")


@pytest.fixture(scope="module")
def own(checkpoints: Callable[[str], Path]) -> dict[str, Transformers]:
    """Models and processors as their users hold them."""
    return {name: Transformers(checkpoints(name)) for name in CHECKPOINTS}


@pytest.fixture(scope="module")
def llava(own: dict[str, Transformers]) -> Transformers:
    return own["llava"]


def pruned(user: Transformers, budget: Any, **options: Any) -> prismprune.Pruning:
    return prismprune.prune(user.model, budget, **options)


@pytest.mark.parametrize(("name", "media"), CASES)
def test_all_tokens_change_nothing(own: dict[str, Transformers], name: str, media: str) -> None:
    """Budget all: the token ids of transformers, and so its placeholders to the last."""
    inputs = own[name].inputs(MEDIA[name][media], QUESTION)
    expected = own[name].answer(inputs, LENGTH)
    with pruned(own[name], "all") as pruning:
        assert own[name].answer(inputs, LENGTH) == expected
    assert all(row.visual_tokens.kept == row.visual_tokens.original for row in pruning.encoded)


@pytest.mark.parametrize(("name", "media"), [case for case in CASES if case[1] != "clip and pictures"])
def test_it_keeps_and_says_what_a_pruned_vlm_does(
    own: dict[str, Transformers], checkpoints: Callable[[str], Path], name: str, media: str
) -> None:
    """The same tokens stay as for the same media and question, and the same answer comes of them.

    Not where Video-LLaVA's template turns the order of the media around, by which a budget's remainders go.
    """
    vlm = PrunedVLM.from_pretrained(checkpoints(name))
    expected = vlm.answer(MEDIA[name][media], QUESTION, 9, max_new_tokens=LENGTH)
    with pruned(own[name], 9) as pruning:
        ids = own[name].answer(own[name].inputs(MEDIA[name][media], QUESTION), LENGTH)
    assert ids == expected.token_ids
    assert pruning.encoded[0].visual_tokens == expected.visual_tokens
    assert [part.kept for part in pruning.encoded[0].token_map] == [p.kept for p in expected.token_map]


def test_rows_of_a_batch_are_requests_of_their_own(own: dict[str, Transformers]) -> None:
    """Pictures of many crops and few, two and one: each row keeps the budget, and answers as alone."""
    user = own["llava_next-llama"]
    rows = [[still("large")], [still("wide", 1), still("tall", 2)], [still("panorama", 3)]]
    questions = ["What?", "And what is that?", "Why?"]
    alone = [user.inputs(row, question) for row, question in zip(rows, questions, strict=True)]
    user.processor.tokenizer.padding_side = "left"
    images = [[item.image for item in row] for row in rows]
    prompts = [user.processor.tokenizer.decode(one["input_ids"][0]) for one in alone]
    marks = [_once_each(prompt) for prompt in prompts]
    batch = user.processor(
        text=marks, images=images, padding=True, return_tensors="pt", add_special_tokens=False
    )
    with pruned(user, 10) as pruning:
        expected = [user.answer(one, LENGTH) for one in alone]
        output = user.model.generate(**batch, max_new_tokens=LENGTH, do_sample=False)
    assert [row.visual_tokens.kept for row in pruning.encoded] == [10, 10, 10]
    assert torch.equal(output[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    end = user.model.generation_config.eos_token_id
    answers = output[:, batch["input_ids"].shape[1] :].tolist()
    assert [tuple(_until(answer, end)) for answer in answers] == expected


def _once_each(prompt: str) -> str:
    """A prompt with one placeholder a picture, as it was before its processor."""
    return "<image>".join(part for part in prompt.split("<image>") if part)


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "temperature": 0.8, "num_return_sequences": 3},
        {"do_sample": False, "return_dict_in_generate": True, "output_scores": True},
    ],
    ids=["beams", "several beams", "sampling", "dictionary"],
)
def test_every_way_to_generate_gives_sequences_behind_the_callers_prompt(
    llava: Transformers, options: dict[str, Any]
) -> None:
    """As many sequences as asked for, each the whole unpruned prompt and new tokens."""
    inputs = llava.inputs([still("wide")], QUESTION)
    with pruned(llava, 5):
        torch.manual_seed(0)
        output = llava.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, **options)
    sequences = output if torch.is_tensor(output) else output.sequences
    assert sequences.shape == (options.get("num_return_sequences", 1), inputs["input_ids"].shape[1] + 4)
    for sequence in sequences:
        assert torch.equal(sequence[:-4], inputs["input_ids"][0])


def test_max_length_counts_the_callers_prompt(llava: Transformers) -> None:
    """The shorter prompt inside does not make answers longer."""
    inputs = llava.inputs([still("wide")], QUESTION)
    length = inputs["input_ids"].shape[1] + 3
    with pruned(llava, 2):
        output = llava.model.generate(**inputs, max_length=length, min_new_tokens=3, do_sample=False)
    assert output.shape[1] == length


@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_gives_logits_and_loss_of_the_shorter_sequence(llava: Transformers, side: str) -> None:
    """Labels are cut with the ids, padding stays on the caller's side, and gradients flow."""
    one, two = (llava.inputs([still("wide", seed)], "?" * (1 + 4 * seed)) for seed in (0, 1))
    length = two["input_ids"].shape[1]
    pad = length - one["input_ids"].shape[1]
    shift = (pad, 0) if side == "left" else (0, pad)
    ids = torch.cat([torch.nn.functional.pad(one["input_ids"], shift), two["input_ids"]])
    mask = torch.cat([torch.nn.functional.pad(one["attention_mask"], shift), two["attention_mask"]])
    labels = ids.masked_fill(mask == 0, -100)
    pixels = torch.cat([one["pixel_values"], two["pixel_values"]])
    with pruned(llava, 6) as pruning:
        together = llava.model(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels)
        together.loss.backward()
        alone = llava.model(**two)
    original = pruning.encoded[0].visual_tokens.original
    assert together.logits.shape[1] == length - original + 6
    torch.testing.assert_close(together.logits[1], alone.logits[0], atol=1e-4, rtol=1e-4)
    assert llava.model.lm_head.weight.grad.abs().sum() > 0
    llava.model.zero_grad()


def test_calls_without_media_are_as_ever(llava: Transformers) -> None:
    """Text alone, by name or by position, is not touched."""
    ids = torch.tensor([[7, 8, 9]])
    expected = llava.model.generate(ids, max_new_tokens=4, do_sample=False), llava.model(ids).logits
    with pruned(llava, 5) as pruning:
        assert torch.equal(llava.model.generate(ids, max_new_tokens=4, do_sample=False), expected[0])
        assert torch.equal(llava.model(ids).logits, expected[1])
    assert pruning.encoded == ()


def test_the_model_is_as_before_at_the_end(llava: Transformers) -> None:
    """Also after an error inside, and with a function that another library has put in place."""
    model = llava.model
    inputs = llava.inputs([still("wide")], QUESTION)
    expected = llava.answer(inputs, LENGTH)

    def hooked(*args: Any, **kwargs: Any) -> Any:
        return type(model).forward(model, *args, **kwargs)

    model.forward = hooked
    with pytest.raises(RuntimeError, match="on purpose"), pruned(llava, 3):
        raise RuntimeError("on purpose")
    assert vars(model)["forward"] is hooked
    del model.forward
    pruning = pruned(llava, 3)
    assert inspect.signature(model.forward) == inspect.signature(type(model).forward.__get__(model))
    pruning.remove()
    pruning.remove()
    assert not {"generate", "forward"} & vars(model).keys()
    assert llava.answer(inputs, LENGTH) == expected


def test_a_model_is_pruned_once_at_a_time(llava: Transformers) -> None:
    """A second pruning is refused, and the first one goes on."""
    with pruned(llava, 4) as first:
        with pytest.raises(InvalidOptionError, match="already"):
            pruned(llava, 2)
        llava.answer(llava.inputs([still("wide")], QUESTION), 2)
    assert first.encoded[0].visual_tokens.kept == 4


def test_methods_and_layouts_are_those_of_the_library(own: dict[str, Transformers]) -> None:
    """Also a layout in which the model's own processor writes other placeholders than there are tokens."""
    user = own["llava_next-llama"]
    inputs = user.inputs([still("large")], QUESTION)
    with pruned(user, 12, method="visionzip", layout="paper") as pruning:
        user.answer(inputs, 3)
    assert pruning.encoded[0].visual_tokens.method == "visionzip"
    assert (pruning.encoded[0].visual_tokens.kept, pruning.encoded[0].visual_tokens.newlines) == (12, 0)
    with pruned(user, "all", layout="paper") as pruning:
        user.answer(inputs, 3)
    assert pruning.encoded[0].visual_tokens.kept == 16 * len(pruning.encoded[0].token_map)


def test_a_call_may_have_a_budget_of_its_own(llava: Transformers) -> None:
    """In `generate` and in `forward`; the next call has that of the pruning again."""
    inputs = llava.inputs([still("wide")], QUESTION)
    kept = []
    with pruned(llava, 6) as pruning:
        for own_budget in ({"token_budget": 3}, {}, {"token_budget": "all"}):
            llava.model.generate(**inputs, max_new_tokens=1, **own_budget)
            kept.append(pruning.encoded[0].visual_tokens.kept)
            llava.model(**inputs, **own_budget)
            kept.append(pruning.encoded[0].visual_tokens.kept)
    assert kept == [3, 3, 6, 6, 16, 16]


def test_several_models_are_pruned_side_by_side(own: dict[str, Transformers]) -> None:
    """Each with its own budget, and each ends by itself."""
    llava, qwen = own["llava"], own["qwen2_5_vl"]
    with pruned(qwen, 5) as second:
        with pruned(llava, 4) as first:
            for user in (llava, qwen):
                user.answer(user.inputs([still("wide")], QUESTION), 2)
        assert "generate" not in vars(llava.model)
        assert "generate" in vars(qwen.model)
    assert [one.encoded[0].visual_tokens.kept for one in (first, second)] == [4, 5]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_pipeline_answers_as_ever(own: dict[str, Transformers], name: str) -> None:
    """`pipeline("image-text-to-text")` around a pruned model: its text is that of the pruned tokens."""
    user, picture = own[name], still("wide")
    content = [{"type": "image", "image": picture.image}, {"type": "text", "text": QUESTION}]
    with pruned(user, 6) as pruning:
        expected = user.answer(user.inputs([picture], QUESTION), LENGTH)
        ask: Any = pipeline("image-text-to-text", model=user.model, processor=user.processor)
        (said,) = ask(
            text=[{"role": "user", "content": content}],
            return_full_text=False,
            generate_kwargs={"max_new_tokens": LENGTH, "do_sample": False},
        )
    assert pruning.encoded[0].visual_tokens.kept == 6
    decoded = user.processor.tokenizer.decode(expected, skip_special_tokens=True)
    assert said["generated_text"].strip() == decoded.strip()


def test_arguments_may_come_by_position(llava: Transformers) -> None:
    """As the model's own signatures have them: nothing is lost, and so nothing goes unpruned."""
    inputs = llava.inputs([still("wide")], QUESTION)
    config = GenerationConfig(max_length=inputs["input_ids"].shape[1] + 3, min_length=0, do_sample=False)
    config.eos_token_id, config.pad_token_id = None, 0
    with pruned(llava, 4) as pruning:
        by_name = llava.model(**inputs).logits
        by_place = llava.model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]).logits
        output = llava.model.generate(inputs["input_ids"], config, pixel_values=inputs["pixel_values"])
    assert torch.equal(by_name, by_place)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 3
    assert pruning.encoded[0].visual_tokens.kept == 4


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_row_without_media_goes_along(own: dict[str, Transformers], name: str) -> None:
    """Text alone beside a picture, padded to its length: each answers as by itself."""
    user = own[name]
    inputs = user.inputs([still("wide")], QUESTION)
    text = torch.tensor([20, 21, 22, 23])
    ids = torch.stack([inputs["input_ids"][0], torch.zeros_like(inputs["input_ids"][0])])
    mask = torch.ones_like(ids)
    ids[1, -4:], mask[1, :-4] = text, 0
    both = inputs | {"input_ids": ids, "attention_mask": mask}
    if "mm_token_type_ids" in both:
        both["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 0, 0, 1))
    with pruned(user, 4):
        output = user.model.generate(**both, max_new_tokens=LENGTH, do_sample=False)
        expected = user.answer(inputs, LENGTH)
    alone = user.answer({"input_ids": text[None]}, LENGTH)
    end, length = user.model.generation_config.eos_token_id, ids.shape[1]
    assert [tuple(_until(row, end)) for row in output[:, length:].tolist()] == [expected, alone]


def test_what_is_drawn_by_chance_is_drawn_from_the_pruned_prompt(llava: Transformers) -> None:
    """With one seed: the same draws twice, and those of the same prompt with features in place of pixels."""
    inputs = llava.inputs([still("wide")], QUESTION)
    drawn = []
    for _ in range(2):
        with pruned(llava, 5) as pruning:
            torch.manual_seed(3)
            output = llava.model.generate(**inputs, max_new_tokens=LENGTH, do_sample=True, temperature=1.5)
            drawn.append(output[0, inputs["input_ids"].shape[1] :])
    assert torch.equal(*drawn)
    (visual,) = pruning.encoded[0].visuals
    family = PrunedVLM.from_pretrained(llava.model.name_or_path)._family
    prompt = family.prompt(QUESTION, None, [visual])
    torch.manual_seed(3)
    by_hand = llava.model.generate(
        input_ids=prompt.token_ids[None],
        **family.visual_inputs([visual]),
        max_new_tokens=LENGTH,
        do_sample=True,
        temperature=1.5,
    )
    assert torch.equal(by_hand[0, len(prompt.token_ids) :], drawn[0])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_keys_and_values_of_a_pruned_prompt_are_refused_behind_its_ids(
    own: dict[str, Transformers], name: str
) -> None:
    """`sequences` begin with the whole prompt, which is longer; `forward` goes on from what it returned."""
    model = own[name].model
    inputs = own[name].inputs([still("wide")], QUESTION)
    given, cache = torch.ones(1, 1, dtype=torch.long), DynamicCache()
    with pruned(own[name], 4):
        first = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
        model.generate(**inputs, max_new_tokens=2, past_key_values=cache)
        turn = torch.cat([first.sequences, given], dim=1)
        for known in (first.past_key_values, cache):
            with pytest.raises(InvalidOptionError, match="past_key_values"):
                model.generate(input_ids=turn, past_key_values=known, max_new_tokens=2)
            with pytest.raises(InvalidOptionError, match="past_key_values"):
                model(**inputs, past_key_values=known)
        with torch.no_grad():
            known = model(**inputs, use_cache=True).past_key_values
        for of_forward in (known, copy.deepcopy(known)):
            with pytest.raises(InvalidOptionError, match="past_key_values"):
                model.generate(input_ids=turn, past_key_values=of_forward, max_new_tokens=2)
            assert model(input_ids=given, past_key_values=of_forward).logits.shape[1] == 1
        with pytest.raises(InvalidOptionError, match="position_ids"):
            model(input_ids=given, past_key_values=known, position_ids=given)
        with pytest.raises(InvalidOptionError, match="attention_mask"):
            model(input_ids=given, past_key_values=known, attention_mask=given)
        known.crop(3 - known.get_seq_length())
        with pytest.raises(InvalidOptionError, match="have been cut"):
            model(input_ids=given, past_key_values=known)
        text = {"input_ids": given.expand(1, 3), "past_key_values": DynamicCache(), "max_new_tokens": 2}
        assert model.generate(**text).shape[1] > 3


def decoded(model: Any, inputs: dict[str, Any], *, with_mask: bool) -> list[list[int]]:
    """Greedy ids by a loop of one's own, the mask that of the caller's prompt and a one for each token."""
    mask, new = inputs["attention_mask"], []
    output = model(**inputs, use_cache=True)
    for _ in range(LENGTH):
        token = output.logits[:, -1:].argmax(-1)
        new.append(token)
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        own = {"attention_mask": mask} if with_mask else {}
        output = model(input_ids=token, past_key_values=output.past_key_values, **own)
    return torch.cat(new, 1).tolist()


@pytest.mark.parametrize("with_mask", [True, False], ids=["with a mask", "without"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_loop_of_ones_own_goes_on_where_the_pruned_prompt_ends(
    own: dict[str, Transformers], name: str, with_mask: bool
) -> None:
    """Position by position as `generate`; also for rows that are equally long until one of them is pruned."""
    user = own[name]
    inputs = user.inputs([still("large")], QUESTION)
    text = torch.arange(20, 20 + inputs["input_ids"].shape[1])[None]
    both = inputs | {
        "input_ids": torch.cat([inputs["input_ids"], text]),
        "attention_mask": torch.ones(2, text.shape[1], dtype=torch.long),
    }
    if "mm_token_type_ids" in both:
        both["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 0, 0, 1))
    with pruned(user, 4), torch.no_grad():
        for given in (inputs, both):
            end = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "eos_token_id": None}
            expected = user.model.generate(**given, **end, do_sample=False)[:, text.shape[1] :]
            assert decoded(user.model, given, with_mask=with_mask) == expected.tolist()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_loop_may_go_on_several_ways_from_each_prompt(own: dict[str, Transformers], name: str) -> None:
    """A repeated cache is of each prompt as often; rows that belong to none are refused."""
    user, given = own[name], torch.tensor([[9], [9]])
    inputs = user.inputs([still("wide")], QUESTION)
    with pruned(user, 4), torch.no_grad():
        known = [user.model(**inputs, use_cache=True).past_key_values for _ in range(2)]
        expected = user.model(input_ids=given[:1], past_key_values=known[0]).logits
        known[1].batch_repeat_interleave(2)
        found = user.model(input_ids=given, past_key_values=known[1]).logits
        torch.testing.assert_close(found, expected.expand(2, -1, -1))
        both = user.inputs([still("wide"), still("tall")], QUESTION)
        ids = torch.cat([both["input_ids"], torch.full_like(both["input_ids"], 20)])
        if "mm_token_type_ids" in both:
            both["mm_token_type_ids"] = torch.nn.functional.pad(both["mm_token_type_ids"], (0, 0, 0, 1))
        two = both | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        cache = user.model(**two, use_cache=True).past_key_values
        with pytest.raises(InvalidOptionError, match="past_key_values"):
            user.model(input_ids=given[:1], past_key_values=cache)


def test_an_emptied_cache_may_serve_another_prompt(llava: Transformers) -> None:
    """It is of no pruned prompt any more."""
    text = torch.tensor([[20, 21, 22]])
    with pruned(llava, 4):
        cache = llava.model(**llava.inputs([still("wide")], QUESTION), use_cache=True).past_key_values
        cache.crop(-cache.get_seq_length())
        output = llava.model.generate(text, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert torch.equal(output, llava.model.generate(text, max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("beams", [1, 2])
def test_criteria_and_processors_see_the_callers_prompt(llava: Transformers, beams: int) -> None:
    """And what is new behind it, as without pruning: also functions that allow tokens, and beams."""
    inputs = llava.inputs([still("wide")], QUESTION)
    asked = inputs["input_ids"]
    seen: list[torch.Tensor] = []

    def stops(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        seen.append(ids)
        return torch.full((len(ids),), ids.shape[1] == asked.shape[1] + 3)

    def processes(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(ids)
        return scores

    def allows(row: int, ids: torch.Tensor) -> list[int]:
        seen.append(ids[None])
        return [9, 10 + ids.shape[0] - asked.shape[1]]

    with pruned(llava, 4):
        output = llava.model.generate(
            **inputs,
            max_new_tokens=6,
            num_beams=beams,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([stops]),
            logits_processor=[processes],
            prefix_allowed_tokens_fn=allows,
        )
    assert output.shape[1] == asked.shape[1] + 3
    assert all(torch.equal(row[: asked.shape[1]], asked[0]) for ids in seen for row in ids)
    assert {ids.shape[1] - asked.shape[1] for ids in seen} == {0, 1, 2, 3}
    assert set(output[0, asked.shape[1] :].tolist()) <= {9, 10, 11, 12}


def test_transformers_own_criteria_and_processors_mean_what_they_say(llava: Transformers) -> None:
    """Lengths count the caller's prompt, and what a user gives takes the place of what `generate` makes."""
    inputs = llava.inputs([still("wide")], QUESTION)
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 6, "do_sample": False}
    with pruned(llava, 4):
        output = llava.model.generate(
            **inputs, **options, stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(length + 2)])
        )
        assert output.shape[1] == length + 2
        for own in (options, options | {"repetition_penalty": 9.0}):
            ends = int(llava.model.generate(**inputs, **own)[0, length])
            shorter = llava.model.generate(**inputs, **own, eos_token_id=ends, pad_token_id=0)
            least = MinLengthLogitsProcessor(length + 3, ends)
            longer = llava.model.generate(
                **inputs, **own, eos_token_id=ends, pad_token_id=0, logits_processor=[least]
            )
            assert shorter.shape[1] == length + 1
            assert longer.shape[1] > length + 3
        penalized = llava.model.generate(
            **inputs,
            **options,
            repetition_penalty=9.0,
            logits_processor=[RepetitionPenaltyLogitsProcessor(1.0)],
        )
        assert torch.equal(penalized, llava.model.generate(**inputs, **options))


def test_max_length_below_the_prompt_is_refused_as_without_pruning(llava: Transformers) -> None:
    """The caller's prompt, which is longer than the pruned one."""
    inputs = llava.inputs([still("wide")], QUESTION)
    length = inputs["input_ids"].shape[1]
    said = f"Input length of input_ids is {length}, but `max_length` is set to {length}"
    with pytest.raises(ValueError, match=said):
        llava.model.generate(**inputs, max_length=length)
    with pruned(llava, 2), pytest.raises(ValueError, match=said):
        llava.model.generate(**inputs, max_length=length)


def test_a_share_may_stand_for_a_number_of_tokens(llava: Transformers) -> None:
    """As an argument, as a `TokenBudget`, and for one call; not beside a number."""
    inputs = llava.inputs([still("wide")], QUESTION)
    shares: tuple[dict[str, Any], ...] = ({"keep_ratio": 0.5}, {"token_budget": TokenBudget(ratio=0.5)})
    for share in shares:
        with prismprune.prune(llava.model, **share) as pruning:
            llava.answer(inputs, 1)
            assert pruning.encoded[0].visual_tokens.kept == 8
            llava.model.generate(**inputs, max_new_tokens=1, keep_ratio=0.25)
            assert pruning.encoded[0].visual_tokens.kept == 4
    with pytest.raises(InvalidBudgetError):
        prismprune.prune(llava.model, 4, keep_ratio=0.5)


def test_a_model_in_pefts_hands_is_pruned_inside_of_it(checkpoints: Callable[[str], Path]) -> None:
    """Its adapters take part, answers and gradients come through it, and it is as before at the end."""
    user = Transformers(checkpoints("llava"))
    inputs = user.inputs([still("wide")], QUESTION)
    with pruned(user, 4):
        expected = user.answer(inputs, LENGTH)
    layers = r".*language_model.*\.(q_proj|v_proj)"
    adapted: Any = get_peft_model(user.model, LoraConfig(r=2, target_modules=layers))
    with prismprune.prune(adapted, 4) as pruning:
        output = adapted.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
        adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert tuple(_until(output[0, inputs["input_ids"].shape[1] :].tolist(), 2)) == expected
    assert pruning.encoded[0].visual_tokens.kept == 4
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.parameters())
    assert not {"generate", "forward"} & vars(adapted.get_base_model()).keys()


def test_what_does_not_generate_is_refused(checkpoints: Callable[[str], Path], llava: Transformers) -> None:
    """The message says what works."""
    for model in (AutoModel.from_pretrained(checkpoints("llava")), llava.model.lm_head, llava.processor):
        with pytest.raises(InvalidOptionError, match="AutoModelForImageTextToText"):
            prismprune.prune(model, 4)


def test_what_cannot_be_pruned_is_said(llava: Transformers) -> None:
    """Budgets and methods that are none, ids that are missing or of other pictures."""
    inputs = llava.inputs([still("wide")], QUESTION)
    with pytest.raises(InvalidBudgetError):
        pruned(llava, 0)
    with pytest.raises(UnknownMethodError):
        pruned(llava, 4, method="magic")
    with pruned(llava, 4):
        with pytest.raises(InvalidOptionError, match="input_ids"):
            llava.model.generate(pixel_values=inputs["pixel_values"])
        with pytest.raises(InvalidOptionError, match="position_ids"):
            llava.model(**inputs, position_ids=torch.arange(inputs["input_ids"].shape[1])[None])
        with pytest.raises(InvalidOptionError, match="do not belong"):
            llava.model(input_ids=inputs["input_ids"][:, 3:], pixel_values=inputs["pixel_values"])
        with pytest.raises(InvalidOptionError, match="more pixels"):
            llava.model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"].repeat(2, 1, 1, 1))

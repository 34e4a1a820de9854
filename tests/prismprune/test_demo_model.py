"""The assembled demo model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from prismprune import PrunedVLM
from prismprune.demo import checkpoint
from prismprune.demo.evaluate import CLIPS, SCENES, evaluate, subjects

pytestmark = [pytest.mark.demo, pytest.mark.timeout(600)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "scene.png"
QUESTION = "What color is the star?"


@pytest.fixture(scope="module")
def demo() -> PrunedVLM:
    return PrunedVLM.from_pretrained("prism-demo")


def test_it_is_an_ordinary_checkpoint(demo: PrunedVLM) -> None:
    """Plain transformers loads it and, with all 576 tokens, says what PrunedVLM says."""
    # Any: transformers' types say that it cannot `generate`.
    model: Any = LlavaForConditionalGeneration.from_pretrained(checkpoint(), dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(checkpoint())
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    inputs = processor(images=Image.open(EXAMPLE), text=prompt, return_tensors="pt")
    with torch.inference_mode():
        produced = model.generate(**inputs, max_new_tokens=8, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
    answer = demo.answer(EXAMPLE, QUESTION, token_budget="all", max_new_tokens=8)
    assert processor.decode(produced, skip_special_tokens=True) == answer.text
    assert answer.visual_tokens.original == answer.visual_tokens.kept == 576


def test_it_answers_the_example_at_64_tokens(demo: PrunedVLM) -> None:
    """The README's own question."""
    answer = demo.answer(EXAMPLE, QUESTION, token_budget=64)
    assert answer.text == "red"
    assert (answer.visual_tokens.salient, answer.visual_tokens.diverse) == (32, 32)


@pytest.mark.parametrize(("suite", "budget"), [(SCENES, 64), (CLIPS, 256)])
def test_evaluation_counts_what_the_model_says(demo: PrunedVLM, suite: str, budget: int) -> None:
    """Marks of packed questions are those of the answers that the model gives one by one."""
    (subject,) = subjects(suite, 1)
    (report,) = evaluate(demo, suite, 1, [("prism", budget)])
    answers = demo.answer(subject.media, [q.text for q in subject.questions], token_budget=budget)
    right = sum(a.text == q.answer for a, q in zip(answers, subject.questions, strict=True))
    assert report.tallies["prism", budget].right.total() == right


def test_a_clip_has_2048_tokens(demo: PrunedVLM) -> None:
    """Eight frames at 224 px, Video-LLaVA's geometry."""
    (subject,) = subjects(CLIPS, 1)
    encoded = demo.encode([subject.media], 512)
    assert (encoded.visual_tokens.original, encoded.visual_tokens.kept) == (2048, 512)
    assert {part.grid for part in encoded.token_map} == {(16, 16)}

"""The published checkpoints' shapes on the meta device: layers, grids and budgets at their true size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import pytest
import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from benchmarks.published import VICUNA_7B, VICUNA_13B, clip_l, llava
from prismprune.budget import TokenBudget
from prismprune.encoding import EncodingRequest, encode
from prismprune.families import FAMILIES
from prismprune.media import Picture
from prismprune.selection.base import Scores, Selection, Selector
from tests.present import present
from tests.prismprune.tiny import (
    clip,
    llava_processor,
    next_processor,
    picture,
    tiny_tokenizer,
    video_processor,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from prismprune.encoding import EncodedMedia
    from prismprune.families.base import Family

LANGUAGE = {"7b": VICUNA_7B, "13b": VICUNA_13B}
LANGUAGE_WIDTH = {"7b": 4096, "13b": 5120}
FAMILY: dict[str, tuple[Any, Any, Callable[..., Any], int]] = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration, llava_processor, 336),
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration, next_processor, 336),
    "video_llava": (VideoLlavaConfig, VideoLlavaForConditionalGeneration, video_processor, 224),
}
IN_USE = 23
"""Blocks of the 24 whose output counts: hidden state -2 leaves block 22, counted from 0."""


@cache
def on_meta(name: str, size: str, layout: str | None = None) -> Family:
    """A family whose model has the shapes of the published one, and no values."""
    config_class, model_class, processor_of, edge = FAMILY[name]
    tokenizer = tiny_tokenizer("<video>")
    ids = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>")}
    if name == "video_llava":
        ids["video_token_index"] = tokenizer.convert_tokens_to_ids("<video>")
    config = llava(config_class, clip_l(edge), LANGUAGE[size], **ids)
    with torch.device("meta"):
        model = model_class(config).eval()
    return FAMILIES[name](model, processor_of(tokenizer, edge), layout)


@dataclass(frozen=True, slots=True)
class First(Selector):
    """The first patches, as there are no values to choose by; checks the shapes of what it gets."""

    name: ClassVar[str] = "first"
    needs_keys: ClassVar[bool] = True

    def __call__(self, scores: Scores, k: int) -> Selection:
        images, patches = scores.images, scores.candidates
        assert scores.attention.shape == (images, 16, patches)
        assert scores.features.shape == (images, patches, 1024)
        assert present(scores.keys).shape == (images, 16, patches, 64)
        return Selection(torch.arange(k).expand(images, k))


def encoded(family: Family, media: list[Any], *budgets: int | None) -> tuple[list[EncodedMedia], set[int]]:
    """What is kept at each budget, all in one run of the tower, and the blocks that ran."""
    ran: set[int] = set()
    encoders = [module for module in family.model.modules() if type(module).__name__ == "CLIPEncoder"]
    hooks = [
        block.register_forward_pre_hook(lambda _module, _args, place=place: ran.add(place))
        for encoder in encoders
        for place, block in enumerate(encoder.layers)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EncodingRequest, "selector", lambda _request: First())
        outcomes = encode(family, [EncodingRequest(tuple(media), TokenBudget(budget)) for budget in budgets])
    for hook in hooks:
        hook.remove()
    return outcomes, ran


def still(width: int, height: int) -> Picture:
    return Picture(picture(0, (width, height)))


class Case(NamedTuple):
    """`original` tokens without pruning, and the layout's `newlines` after them."""

    name: str
    size: str
    layout: str | None
    media: list[Any]
    original: int
    newlines: int


CASES = [
    Case("llava", "7b", None, [still(640, 480)], 576, 0),
    Case("llava", "13b", None, [still(640, 480), still(300, 500)], 2 * 576, 0),
    Case("llava_next", "7b", "native", [still(672, 672)], 5 * 576, 48),
    Case("llava_next", "7b", "native", [still(672, 336)], 3 * 576, 24),
    Case("llava_next", "7b", "native", [still(336, 672)], 3 * 576, 48),
    Case("llava_next", "7b", "native", [still(1008, 336)], 4 * 576, 24),
    Case("llava_next", "7b", "native", [still(640, 480)], 576 + 36 * 48, 36),
    Case("llava_next", "7b", "paper", [still(672, 336)], 3 * 576, 0),
    Case("llava_next", "13b", "native", [still(672, 672)], 5 * 576, 48),
    Case("llava_next", "13b", "paper", [still(1008, 336)], 4 * 576, 0),
    Case("video_llava", "7b", None, [clip(8)], 8 * 257, 0),
    Case("video_llava", "7b", None, [still(640, 480), clip(4)], 256 + 4 * 257, 0),
]


@pytest.mark.parametrize("case", CASES)
def test_tokens_at_true_size(case: Case) -> None:
    """The published counts, as wide as text; the tower ends after block 22; a budget of 160 leaves 160."""
    family = on_meta(case.name, case.size, case.layout)
    (everything, pruned), ran = encoded(family, case.media, None, 160)
    assert everything.visual_tokens.original == everything.visual_tokens.kept == case.original
    assert everything.visual_tokens.newlines == case.newlines
    assert sum(len(visual.features) for visual in everything.visuals) == case.original + case.newlines
    assert {visual.features.shape[1] for visual in everything.visuals} == {LANGUAGE_WIDTH[case.size]}
    assert ran == set(range(IN_USE))
    assert pruned.visual_tokens.kept == 160
    assert pruned.visual_tokens.newlines <= case.newlines
    ids = family.prompt("?", None, pruned.visuals).token_ids
    placeholders = torch.isin(ids, torch.tensor(list(family.placeholder_ids.values())))
    assert int(placeholders.sum()) == 160 + pruned.visual_tokens.newlines


def test_the_papers_budgets_are_equal_shares_of_five_crops() -> None:
    """640, 320 and 160 tokens of 2880 are 128, 64 and 32 a crop."""
    outcomes, _ = encoded(on_meta("llava_next", "7b", "paper"), [still(640, 480)], 640, 320, 160)
    shares = [[len(part.kept) for part in outcome.token_map] for outcome in outcomes]
    assert shares == [5 * [128], 5 * [64], 5 * [32]]


def test_a_clip_of_eight_frames_chooses_among_2048() -> None:
    """A number over the patches leaves all of them, without the eight CLS tokens."""
    (outcome,), _ = encoded(on_meta("video_llava", "7b"), [clip(8)], 2050)
    assert outcome.visual_tokens.kept == 2048
    assert [len(part.kept) for part in outcome.token_map] == 8 * [256]


@pytest.mark.parametrize(("name", "tokens"), [("llava", 576), ("llava_next", 2880), ("video_llava", 256)])
def test_tokens_of_a_picture_at_true_size(name: str, tokens: int) -> None:
    """What a server tells about the model before it has seen any picture."""
    assert on_meta(name, "7b").tokens_per_image == tokens

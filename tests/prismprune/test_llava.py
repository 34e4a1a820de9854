"""LLaVA: unpruned it is transformers' own model, pruned it sees the chosen tokens and no others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    AutoProcessor,
    LlavaConfig,
    SiglipVisionConfig,
)

from prismprune.budget import TokenBudget
from prismprune.encoding import EncodingRequest, encode
from prismprune.errors import UnknownModelError, UnsupportedMediaError
from prismprune.families import family_of, llava
from prismprune.families.base import Visual
from prismprune.families.llava import LlavaFamily
from prismprune.generation import GenerationOptions
from prismprune.loading import load_checkpoint
from prismprune.media import Clip, Picture
from prismprune.selection.prism import Prism
from prismprune.vlm import PrunedVLM, VisualRequest
from tests.present import present
from tests.prismprune.families import Transformers, kept, parts
from tests.prismprune.tiny import GRID, IMAGE_SIZE, PATCHES, clip, picture, save_tiny_llava

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from prismprune.families.base import Family
    from prismprune.selection import Scores, Selection

KINDS = [
    {"tower": tower, "strategy": strategy, "layer": layer, "crop": crop}
    for tower in ("clip", "dinov2")
    for strategy, layer, crop in (("default", -2, True), ("default", -1, False), ("full", 2, False))
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("llava"), **request.param)


def prompt_ids(family: Family, question: str, system: str | None, kept: list[int]) -> Tensor:
    """Token ids of a prompt about pictures of so many tokens each."""
    return family.prompt(
        question, system, [Visual("image", torch.empty(count, 0)) for count in kept]
    ).token_ids


@pytest.mark.parametrize("images", [1, 2])
def test_unpruned_answers_are_those_of_transformers(variant: Path, images: int) -> None:
    """Budget "all" gives the same greedy token ids as `generate`, for one picture and for two."""
    pictures = [Picture(picture(seed, (50 + 30 * seed, 70))) for seed in range(images)]
    answer = PrunedVLM.from_pretrained(variant).answer(pictures, "What is it?", max_new_tokens=24)
    reference = Transformers(variant)
    assert answer.token_ids == reference.answer(reference.inputs(pictures, "What is it?"), 24)
    assert answer.visual_tokens.method == "none"
    assert answer.visual_tokens.kept == answer.visual_tokens.original


def test_an_unpruned_batch_is_answered_as_by_transformers_one_by_one(variant: Path) -> None:
    """Pictures and questions of different numbers and lengths, padded into one batch, change no token."""
    asked = [
        ([Picture(picture(1))], "Why?"),
        ([Picture(picture(2, (30, 90))), Picture(picture(3))], "Which of the two is it?"),
        ([Picture(picture(4))], "A much longer question, " * 5),
    ]
    reference = Transformers(variant)
    requests = [
        VisualRequest(tuple(pictures), (question,), generation=GenerationOptions(max_new_tokens=24))
        for pictures, question in asked
    ]
    answers = PrunedVLM.from_pretrained(variant).answer_batch(requests)
    assert [own[0].token_ids for own in answers] == [
        reference.answer(reference.inputs(*one), 24) for one in asked
    ]


def test_the_kept_tokens_are_those_of_the_algorithm(variant: Path) -> None:
    """Scores read beside SDPA choose what the reference chooses by the whole, eager attention matrix."""
    vlm, eager = PrunedVLM.from_pretrained(variant), Transformers(variant, attn_implementation="eager")
    for seed in range(5):
        image = Picture(picture(seed))
        assert parts(vlm.encode(image, 7).token_map) == kept(eager.views([image]), 7)


def test_a_pruned_answer_is_one_full_forward_over_the_kept_tokens(variant: Path) -> None:
    """Prefill, cache and decode steps give what the language model gives for the whole sequence at once."""
    vlm = PrunedVLM.from_pretrained(variant)
    image, question = picture(5), "And this?"
    answer = vlm.answer(image, question, 6, max_new_tokens=12)
    model, processor = vlm._family.model, vlm._family.processor
    with torch.inference_mode():
        pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        patches = states[model.config.vision_feature_layer][0, 1:]
        features = model.model.multi_modal_projector(patches[list(answer.token_map[0].kept)])
        ids = prompt_ids(vlm._family, question, None, [6])
        embeddings = model.get_input_embeddings()(torch.cat([ids, torch.tensor(answer.token_ids)]))
        embeddings[: len(ids)][ids == model.config.image_token_id] = features
        logits = model.lm_head(model.model.language_model(inputs_embeds=embeddings[None]).last_hidden_state)
    said = logits[0, len(ids) - 1 :].argmax(-1).tolist()
    assert tuple(said[: len(answer.token_ids)]) == answer.token_ids
    assert answer.prompt_tokens == len(ids)


def seen_lengths(module: torch.nn.Module, run: Callable[[], object], argument: str) -> list[int]:
    """Lengths, in tokens, of what `module` was called with while `run` ran."""
    lengths = []

    def note(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        lengths.append((args[0] if args else kwargs[argument]).shape[-2])

    hook = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        run()
    finally:
        hook.remove()
    return lengths


def test_only_the_survivors_are_projected_and_read(vlm: PrunedVLM) -> None:
    """Of 2 x 16 patches at budget 5, the projector sees 5, and the language model those and the text."""
    images, model = [picture(1), picture(2)], vlm._family.model.model
    text = len(prompt_ids(vlm._family, "Hm?", None, [0, 0]))

    def run() -> None:
        vlm.answer(images, "Hm?", 5, max_new_tokens=2)

    assert seen_lengths(model.multi_modal_projector, run, "image_features") == [5]
    assert seen_lengths(model.language_model, run, "inputs_embeds")[0] == text + 5


def test_the_tower_stops_after_the_used_block_and_never_runs_eagerly(vlm: PrunedVLM) -> None:
    """Blocks after the one that feeds the projector are not called; attention stays SDPA."""
    tower, ran = vlm._family.model.model.vision_tower, []
    hooks = [
        block.register_forward_pre_hook(lambda _module, _args, place=place: ran.append(place))
        for place, block in enumerate(tower.encoder.layers)
    ]
    vlm.answer(picture(), "?", 4, max_new_tokens=1)
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1, 2]
    assert tower.config._attn_implementation == "sdpa"


def test_one_token_of_two_pictures(vlm: PrunedVLM) -> None:
    """A view that keeps nothing takes no placeholder, and the answer still comes."""
    answer = vlm.answer([picture(1), picture(2)], "?", 1, max_new_tokens=2)
    assert [len(part.kept) for part in answer.token_map] == [1, 0]
    assert (answer.visual_tokens.kept, answer.visual_tokens.budget) == (1, 1)
    assert sorted((present(answer.visual_tokens.salient), present(answer.visual_tokens.diverse))) == [0, 1]


def test_pictures_of_one_batch_are_selected_together(vlm: PrunedVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views that keep equally many share one call of the selector; others do not disturb it."""
    calls = []
    original = Prism.__call__

    def counting(self: Prism, scores: Scores, k: int) -> Selection:
        calls.append((scores.images, k))
        return original(self, scores, k)

    monkeypatch.setattr(Prism, "__call__", counting)
    requests = [
        EncodingRequest((Picture(picture(seed)),), TokenBudget(tokens))
        for seed, tokens in enumerate([4, 4, 9])
    ]
    encoded = encode(vlm._family, [*requests, EncodingRequest((Picture(picture(9)),))])
    assert sorted(calls) == [(1, 9), (2, 4)]
    assert [media.visual_tokens.kept for media in encoded] == [4, 4, 9, PATCHES]


def test_a_kept_cls_token_goes_first_when_anything_is_pruned(tmp_path: Path) -> None:
    """A checkpoint that feeds CLS to the projector has N + 1 tokens; a budget chooses among the N patches."""
    vlm = PrunedVLM.from_pretrained(save_tiny_llava(tmp_path, strategy="full"))
    everything, patches = vlm.encode(picture(), PATCHES + 1), vlm.encode(picture(), PATCHES)
    assert vlm.visual_tokens_per_image == PATCHES + 1
    assert (everything.visual_tokens.kept, everything.visual_tokens.method) == (PATCHES + 1, "none")
    assert (patches.visual_tokens.kept, patches.visual_tokens.method) == (PATCHES, "prism")


@pytest.mark.parametrize(
    ("budget", "warning"),
    [
        ({"token_budget": 600}, "token_budget 600 is at or above the 16 visual tokens of the media"),
        ({"token_budget": PATCHES}, "token_budget 16 is at or above the 16 visual tokens of the media"),
        ({"keep_ratio": 1.0}, "keep_ratio 1 keeps all 16 visual tokens of the media"),
    ],
)
def test_a_budget_that_prunes_nothing_says_so(vlm: PrunedVLM, budget: dict[str, Any], warning: str) -> None:
    """Method "none", no salient and diverse numbers, and a warning with the reason."""
    encoded = vlm.encode(picture(), **budget)
    assert encoded.warnings == (f"{warning}; nothing was pruned",)
    assert encoded.visual_tokens.method == "none"
    assert encoded.visual_tokens.salient is encoded.visual_tokens.diverse is None
    assert encoded.visual_tokens.budget == budget.get("token_budget", PATCHES)
    assert encoded.token_map[0].kept == tuple(range(PATCHES))


def test_a_budget_too_small_for_every_picture_says_so(vlm: PrunedVLM) -> None:
    """The model sees nothing of some; who has a token each needs no warning."""
    pictures = [picture(noise) for noise in range(3)]
    assert vlm.encode(pictures, 2).warnings == ("1 of 3 pictures have none of the 2 visual tokens kept",)
    assert vlm.encode(pictures, 3).warnings == ()


def test_no_budget_needs_no_warning(vlm: PrunedVLM) -> None:
    """Who asks for all tokens gets them without a word."""
    encoded = vlm.encode(picture())
    assert (encoded.warnings, encoded.visual_tokens.budget) == ((), None)


def test_a_ratio_is_reported_as_the_tokens_it_means(vlm: PrunedVLM) -> None:
    """Half of 2 x 16 tokens is a budget of 16."""
    tokens = vlm.encode([picture(1), picture(2)], keep_ratio=0.5).visual_tokens
    assert (tokens.budget, tokens.kept, tokens.salient, tokens.diverse) == (16, 16, 8, 8)


def test_a_method_without_parts_lists_what_it_kept(vlm: PrunedVLM) -> None:
    """`uniform` tells no salient from diverse tokens: both are None, and `kept` has the indices."""
    encoded = vlm.encode(picture(), 4, method="uniform")
    assert encoded.visual_tokens.salient is None
    assert encoded.token_map[0].salient is encoded.token_map[0].diverse is None
    assert len(encoded.token_map[0].kept) == 4


def test_a_clip_is_its_frames_in_order(vlm: PrunedVLM) -> None:
    """Each frame has its part of the map, with its time; the budget is the whole clip's."""
    encoded = vlm.encode([picture(7), clip()], 10)
    assert [(part.media, part.frame, part.time_s) for part in encoded.token_map] == [
        (0, None, None),
        (1, 0, 0.0),
        (1, 1, 0.5),
        (1, 2, 1.0),
    ]
    assert [len(part.kept) for part in encoded.token_map] == [3, 3, 2, 2]
    assert encoded.token_map[1].box == (0, 0, 900, 600)


def test_an_unpruned_clip_is_its_frames_as_pictures(vlm: PrunedVLM) -> None:
    """Without a size of its own for video, a clip is answered like its frames as pictures."""
    frames = clip()
    assert vlm.answer(frames, "?", max_new_tokens=8).token_ids == (
        vlm.answer(list(frames.frames), "?", max_new_tokens=8).token_ids
    )


@pytest.mark.parametrize("crop", [False, True])
def test_frames_have_the_size_that_the_checkpoint_gives_for_video(tmp_path: Path, crop: bool) -> None:
    """`video_image_size` in the config makes frames smaller than pictures, cropped or not."""
    small = IMAGE_SIZE // 2
    path = save_tiny_llava(tmp_path, tower="dinov2", crop=crop, video_image_size=small)
    encoded = PrunedVLM.from_pretrained(path).encode([picture(), clip()])
    half = (GRID // 2, GRID // 2)
    assert [part.grid for part in encoded.token_map] == [(GRID, GRID), half, half, half]
    assert encoded.token_map[1].box == ((150, 0, 750, 600) if crop else (0, 0, 900, 600))


@pytest.fixture(scope="module")
def cropping(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return load_checkpoint(save_tiny_llava(tmp_path_factory.mktemp("crop"), crop=True)).family


@given(width=st.integers(20, 200), height=st.integers(20, 200))
def test_the_box_is_what_a_centre_crop_leaves(cropping: Family, width: int, height: int) -> None:
    """The centred square of the shorter side, within a pixel and a half of rounding."""
    image = Image.new("RGB", (width, height))
    left, top, right, bottom = cropping.preprocess(cropping.views([Picture(image)]))[0].boxes[0]
    side = min(width, height)
    expected = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    slack = 1 + 1.5 * max(1, side / IMAGE_SIZE)
    assert all(abs(a - b) <= slack for a, b in zip((left, top, right, bottom), expected, strict=True))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@pytest.mark.parametrize("size", [(1, 201), (804, 4)])
def test_what_is_stretched_too_far_is_refused(cropping: Family, size: tuple[int, int]) -> None:
    """Its processor resizes all of it before it crops: a file of 300 bytes would take 20 GB."""
    thin = Image.new("RGB", size)
    for media in (Picture(thin), Clip((thin,), (0.0,), (1900, 10))):
        with pytest.raises(UnsupportedMediaError, match="200 times"):
            cropping.views([media])
    cropping.preprocess(cropping.views([Picture(Image.new("RGB", (1, 200)))]))


def test_what_is_resized_to_a_square_may_be_stretched(vlm: PrunedVLM) -> None:
    """It takes no more memory than any other picture."""
    assert vlm.encode(Image.new("RGB", (1, 5000)), 4).visual_tokens.kept == 4


def test_the_processor_gets_a_few_views_at_once(cropping: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds all that it gets at their size before the crop; what it makes of them is the same."""
    views = cropping.views([clip(5)])
    (together,) = cropping.preprocess(views)
    processor = cropping.processor.image_processor
    sizes: list[int] = []
    monkeypatch.setattr(llava, "VIEWS_PER_CALL", 2)
    monkeypatch.setattr(cropping.processor, "image_processor", Recording(processor, sizes))
    (apart,) = cropping.preprocess(views)
    assert sizes == [2, 2, 1]
    assert torch.equal(apart.values, together.values)


class Recording:
    """A processor that notes how many views it gets."""

    def __init__(self, processor: Any, sizes: list[int]) -> None:
        self._processor = processor
        self._sizes = sizes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, images: list[Image.Image], **options: Any) -> Any:
        self._sizes.append(len(images))
        return self._processor(images, **options)


def test_control_tokens_in_a_question_are_text(vlm: PrunedVLM) -> None:
    """A question with placeholders or turn marks in it adds no image and starts no turn."""
    family = vlm._family
    plain = prompt_ids(family, "?", "Be brief.", [2])
    ids = prompt_ids(family, "<image></s><|assistant|>?", "<image>Be brief.", [2])
    special = torch.tensor(sorted(family.processor.tokenizer.all_special_ids))
    assert torch.equal(ids[torch.isin(ids, special)], plain[torch.isin(plain, special)])


def test_towers_without_a_cls_token_are_refused(tiny_llava: Path) -> None:
    """SigLIP has nothing to read the scores from."""
    loaded = load_checkpoint(tiny_llava)
    model, processor = loaded.family.model, loaded.family.processor
    siglip = SiglipVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    other = type(
        "Model", (), {"config": LlavaConfig(vision_config=siglip, text_config=model.config.text_config)}
    )
    with pytest.raises(UnknownModelError, match="siglip_vision_model"):
        LlavaFamily(other(), processor)


@pytest.mark.parametrize(
    ("layer", "message"), [([-2, -1], "several"), (0, "block"), (-5, "block"), (9, "block")]
)
def test_feature_layers_without_one_block_are_refused(tmp_path: Path, layer: Any, message: str) -> None:
    """A list of layers, the embeddings, and layers that are not there."""
    path = save_tiny_llava(tmp_path, layer=layer)
    with pytest.raises(UnknownModelError, match=message):
        load_checkpoint(path)


def test_a_checkpoint_without_a_chat_template_is_refused(tiny_llava: Path) -> None:
    """Nothing says how its prompts are written."""
    processor = AutoProcessor.from_pretrained(tiny_llava)
    processor.chat_template = None
    with pytest.raises(UnknownModelError, match="chat template"):
        LlavaFamily(load_checkpoint(tiny_llava).family.model, processor)


def test_a_template_that_drops_images_is_refused(tiny_llava: Path) -> None:
    """Placeholders that are not written cannot be filled."""
    processor = AutoProcessor.from_pretrained(tiny_llava)
    processor.chat_template = "no images here"
    family = LlavaFamily(load_checkpoint(tiny_llava).family.model, processor)
    with pytest.raises(UnknownModelError, match="0 image placeholders for 1 images"):
        prompt_ids(family, "?", None, [4])


def test_an_unknown_family_names_the_known_ones() -> None:
    """The message says what there is an adapter for."""
    with pytest.raises(UnknownModelError, match="known families are llava"):
        family_of("fuyu")

"""Qwen2.5-VL: scores without CLS, windows undone, positions in three rows; against transformers' own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from benchmarks.published import QWEN_7B, QWEN_TOWER
from prismprune.attention import received_attention
from prismprune.budget import TokenBudget
from prismprune.encoding import EncodingRequest, encode
from prismprune.errors import UnknownModelError, UnsupportedMediaError
from prismprune.families.qwen2_5_vl import Qwen25VLFamily
from prismprune.media import Clip, Picture
from prismprune.planning import plan
from prismprune.vlm import PrunedVLM
from tests.present import present
from tests.prismprune.families import MEDIA, Scored, Transformers, kept, parts
from tests.prismprune.tiny import clip, picture, save_tiny_qwen

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.prismprune.reference import Array

CHECKPOINT = "qwen2_5_vl"
OURS = MEDIA[CHECKPOINT]


def in_windows(rows: int, columns: int, side: int) -> list[int]:
    """Raster indices in the tower's order: window by window, each of them in raster order."""
    return [
        row * columns + column
        for top in range(0, rows, side)
        for left in range(0, columns, side)
        for row in range(top, min(top + side, rows))
        for column in range(left, min(left + side, columns))
    ]


@torch.inference_mode()
def scored(eager: Transformers, patches: Any, grids: Any, monkeypatch: pytest.MonkeyPatch) -> list[Scored]:
    """Each slice's units by the weights of eager attention, in float64."""
    tower: Any = eager.model.model.visual
    seen: list[Array] = []
    block = tower.blocks[max(tower.config.fullatt_block_indexes)].attn
    window = tower.config.window_size // (2 * tower.config.patch_size)
    original = modeling_qwen2_5_vl.eager_attention_forward

    def noted(module: Any, *args: Any, **kwargs: Any) -> Any:
        output, weights = original(module, *args, **kwargs)
        if module is block:
            seen.append(weights[0].double().numpy())
        return output, weights

    with monkeypatch.context() as patched:
        patched.setattr(modeling_qwen2_5_vl, "eager_attention_forward", noted)
        merged = tower(patches, grid_thw=grids).pooler_output.double().numpy()
    views: list[Scored] = []
    first = 0
    for slices, rows, columns in grids.tolist():
        order = in_windows(rows // 2, columns // 2, window)
        for _ in range(slices):
            received = seen[len(views)].mean(1)  # over the queries
            attention = np.empty((len(received), len(order)))
            attention[:, order] = received.reshape(len(received), len(order), 4).mean(2)
            views.append(Scored(attention, merged[first : first + len(order)]))
            first += len(order)
    return views


def views_of(eager: Transformers, media: Any, monkeypatch: pytest.MonkeyPatch) -> list[Scored]:
    """Of all media of a request, in their order."""
    inputs = eager.inputs(media, "?")
    ready: dict[str, Iterator[list[Scored]]] = {}
    for kind, patches in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if patches in inputs:
            grids = inputs[f"{kind}_grid_thw"]
            flat = iter(scored(eager, inputs[patches], grids, monkeypatch))
            ready[kind] = iter([[next(flat) for _ in range(slices)] for slices in grids[:, 0].tolist()])
    return [view for item in media for view in next(ready["video" if isinstance(item, Clip) else "image"])]


@pytest.mark.parametrize("budget", [5, 13])
@pytest.mark.parametrize("media", OURS)
def test_the_kept_units_are_those_of_a_plain_reference(
    vlm: PrunedVLM, eager: Transformers, monkeypatch: pytest.MonkeyPatch, media: str, budget: int
) -> None:
    """Received attention over heads, windows undone, merged embeddings: of each picture and slice."""
    views = views_of(eager, OURS[media], monkeypatch)
    assert parts(vlm.encode(OURS[media], budget).token_map) == kept(views, budget)


@pytest.mark.parametrize("media", OURS)
def test_scores_and_units_are_those_of_eager_attention(
    vlm: PrunedVLM, eager: Transformers, monkeypatch: pytest.MonkeyPatch, media: str
) -> None:
    """A unit's score is the mean over its patches, of what all patches of its view pay to them."""
    family = vlm._family
    views = views_of(eager, OURS[media], monkeypatch)
    with torch.inference_mode():
        for pixels in family.preprocess(family.views(OURS[media])):
            reading = family.read(pixels)
            for place, scores, tokens in zip(
                pixels.places, reading.attention(), reading.patches, strict=True
            ):
                np.testing.assert_allclose(scores, views[place].attention, atol=1e-5)
                np.testing.assert_allclose(tokens, views[place].features, atol=1e-4)


@pytest.mark.parametrize("media", OURS)
def test_positions_are_those_of_transformers(vlm: PrunedVLM, eager: Transformers, media: str) -> None:
    """Unpruned: those that `generate` gives the prompt, slice by time, row and column, and the next token."""
    prompt = vlm._family.prompt("What?", None, vlm.encode(OURS[media]).visuals)
    given: list[torch.Tensor] = []
    hook = eager.model.model.language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: given.append(kwargs["position_ids"][-3:, 0]), with_kwargs=True
    )
    eager.model.generate(
        **eager.inputs(OURS[media], "What?"), max_new_tokens=2, min_new_tokens=2, do_sample=False
    )
    hook.remove()
    assert torch.equal(prompt.positions, given[0])
    assert given[1].flatten().tolist() == [prompt.following] * 3


@pytest.mark.parametrize("media", OURS)
def test_a_kept_token_keeps_its_position(vlm: PrunedVLM, media: str) -> None:
    """Pruned: the columns of the unpruned positions at the text and at what stays, and the same next one."""
    family, encoded = vlm._family, vlm.encode(OURS[media], 7)
    whole = family.prompt("What?", None, vlm.encode(OURS[media]).visuals)
    pruned = family.prompt("What?", None, encoded.visuals)
    visual = torch.isin(whole.token_ids, torch.tensor([*family.placeholder_ids.values()]))
    stays = ~visual
    units = visual.nonzero().flatten().tolist()
    first = 0
    for part in encoded.token_map:
        for place in part.kept:
            stays[units[first + place]] = True
        first += part.grid[0] * part.grid[1]
    assert torch.equal(pruned.token_ids, whole.token_ids[stays])
    assert torch.equal(pruned.positions, whole.positions[:, stays])
    assert pruned.following == whole.following


def test_time_between_slices_spreads_their_positions(vlm: PrunedVLM) -> None:
    """Frames twice as far apart, positions twice as far apart; the text behind follows the picture's side."""
    near = clip(6)
    far = Clip(near.frames, tuple(2 * time for time in near.times_s), near.size)
    near_at, far_at = (present(vlm.encode([each]).visuals[0].positions) for each in (near, far))
    assert torch.equal(far_at.tokens[0], 2 * near_at.tokens[0])
    assert torch.equal(far_at.tokens[1:], near_at.tokens[1:])
    assert far_at.advance == near_at.advance


def test_an_odd_last_frame_is_a_slice_of_its_own(vlm: PrunedVLM) -> None:
    """Five frames are three slices, told by the first frame and the time of each."""
    token_map = vlm.encode([clip(5)], 9).token_map
    assert [(part.frame, part.time_s) for part in token_map] == [(0, 0.0), (2, 1.0), (4, 2.0)]
    assert all(part.box == (0, 0, 900, 600) for part in token_map)


def test_views_of_one_grid_share_a_run_and_others_do_not_mix(vlm: PrunedVLM) -> None:
    """Clips and pictures of two requests come back in their order, whatever was run together."""
    family = vlm._family
    requests: list[list[Picture | Clip]] = [
        [clip(3), Picture(picture(1))],
        [Picture(picture(2)), clip(4, seed=3), clip(1, seed=9)],
    ]
    together = encode(family, [EncodingRequest(tuple(media), TokenBudget(11)) for media in requests])
    for media, own in zip(requests, together, strict=True):
        alone = vlm.encode(media, 11)
        assert own.token_map == alone.token_map
        for one, other in zip(own.visuals, alone.visuals, strict=True):
            torch.testing.assert_close(one.features, other.features, atol=1e-5, rtol=1e-4)


def test_scores_in_pieces_are_scores_at_once() -> None:
    """However many queries are compared at a time: rows that sum to one, and the means over them."""
    generator = torch.Generator().manual_seed(1)
    queries, keys = torch.randn(2, 2, 3, 150, 8, generator=generator)
    whole = ((queries @ keys.transpose(2, 3)) * 0.4).softmax(3).mean(2)
    received = received_attention(queries, keys, 0.4)
    torch.testing.assert_close(received, whole)
    torch.testing.assert_close(received.sum(2), torch.ones(2, 3))


def test_a_picture_beyond_the_processors_stretch_is_refused(vlm: PrunedVLM) -> None:
    """201 to 1: an error of the request, and not of the processor; of a clip its frames count."""
    thin = picture(0, (804, 4))
    for media in (Picture(thin), Clip((thin,), (0.0,), (1900, 10))):
        with pytest.raises(UnsupportedMediaError, match="200 times"):
            vlm.encode([media], 4)


def test_a_tower_of_windows_alone_is_refused(tmp_path: Path) -> None:
    """Without full attention no patch tells what the others pay to it."""
    path = save_tiny_qwen(tmp_path, fullatt_block_indexes=[])
    with pytest.raises(UnknownModelError, match="see all others"):
        PrunedVLM.from_pretrained(path)


def test_a_picture_without_a_token_still_takes_its_place(vlm: PrunedVLM) -> None:
    """One token for two pictures: the text between and behind them lies where it would unpruned."""
    media = [Picture(picture(1)), Picture(picture(2, (200, 190)))]
    encoded = vlm.encode(media, 1)
    assert sorted(len(visual.features) for visual in encoded.visuals) == [0, 1]
    whole = vlm._family.prompt("What?", None, vlm.encode(media).visuals)
    pruned = vlm._family.prompt("What?", None, encoded.visuals)
    assert pruned.following == whole.following
    assert vlm.answer(media, "What?", 1, max_new_tokens=2).visual_tokens.kept == 1


def test_true_size_is_read_at_its_last_full_block() -> None:
    """The published 7B geometry on the meta device: 32 blocks, windows of 112 px, a picture of 576 tokens."""
    config = Qwen2_5_VLConfig(vision_config=QWEN_TOWER, text_config=QWEN_7B)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(8.29e9, rel=0.01)
    tower = model.model.visual
    assert max(tower.config.fullatt_block_indexes) == len(tower.blocks) - 1 == 31
    assert Qwen25VLFamily.visual_tokens_of(config) == 24 * 24
    patches = torch.empty(48 * 48, 3 * 2 * 14 * 14, device="meta")
    for name in sum(Qwen25VLFamily.outside.values(), ()):
        model.get_submodule(name)
    assert tower.patch_embed(patches).shape == (2304, 1280)


def test_windows_and_blocks_of_the_published_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 blocks, full attention at four of them, windows of 4 x 4 units that a picture does not fill."""
    depth: dict[str, Any] = {"depth": 32, "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112}
    path = save_tiny_qwen(tmp_path, **depth, initializer_range=0.1)
    media = [Picture(picture(4, (210, 150)))]
    views = views_of(Transformers(path, attn_implementation="eager"), media, monkeypatch)
    assert parts(PrunedVLM.from_pretrained(path).encode(media, 9).token_map) == kept(views, 9)


def test_a_plan_is_made_from_its_config(checkpoint: Path) -> None:
    """Weights and cache of the tiny checkpoint, from its config alone."""
    planned = plan(str(checkpoint), 64, dtype="float32")
    assert planned.family == "qwen2_5_vl"
    assert planned.parameters == sum(
        parameter.numel() for parameter in PrunedVLM.from_pretrained(checkpoint).model.parameters()
    )

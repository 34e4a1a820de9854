"""Video-LLaVA: two towers, one placeholder a clip, and the frames' CLS tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from PIL import Image

from prismprune.errors import UnsupportedMediaError
from prismprune.families import llava
from prismprune.media import Clip, Picture
from tests.prismprune.families import MEDIA, kept, parts, still
from tests.prismprune.tiny import PATCHES, clip, picture

if TYPE_CHECKING:
    from prismprune.vlm import PrunedVLM
    from tests.prismprune.families import Transformers


CHECKPOINT = "video_llava"


@pytest.mark.parametrize("budget", [1, 7, 15])
@pytest.mark.parametrize("media", MEDIA["video_llava"])
def test_the_kept_tokens_are_those_of_the_algorithm(
    vlm: PrunedVLM, eager: Transformers, media: str, budget: int
) -> None:
    """Each picture by its tower's CLS row, each frame by the other's; the budget is the request's."""
    expected = kept(eager.views(MEDIA["video_llava"][media]), budget)
    assert parts(vlm.encode(MEDIA["video_llava"][media], budget).token_map) == expected


@pytest.mark.parametrize("budget", [8 * PATCHES + 7, 8 * PATCHES, 20, 5])
def test_a_budget_below_all_drops_the_cls_tokens(vlm: PrunedVLM, eager: Transformers, budget: int) -> None:
    """All of a clip are its frames with a CLS token each; fewer are patches, in order of their frames."""
    frames = clip(8)
    everything, pruned = vlm.encode(frames), vlm.encode(frames, budget)
    assert everything.visual_tokens.original == everything.visual_tokens.kept == 8 * (PATCHES + 1)
    assert everything.visuals[0].features.shape[0] == 8 * (PATCHES + 1)
    assert pruned.visual_tokens.kept == min(budget, 8 * PATCHES)
    expected = torch.cat(
        [
            eager.project(view.features[list(part.kept)])
            for view, part in zip(eager.views([frames]), pruned.token_map, strict=True)
        ]
    )
    (visual,) = pruned.visuals
    assert visual.modality == "video"
    torch.testing.assert_close(visual.features, expected, atol=1e-4, rtol=1e-4)


def test_a_ratio_is_of_the_patches(vlm: PrunedVLM) -> None:
    """Half of 8 x 16 patches: the CLS tokens, which any budget drops, do not count."""
    tokens = vlm.encode(clip(8), keep_ratio=0.5).visual_tokens
    assert (tokens.budget, tokens.kept) == (64, 64)


def test_a_picture_has_no_cls_token(vlm: PrunedVLM) -> None:
    """As transformers has it, pictures are their patches."""
    assert vlm.visual_tokens_per_image == PATCHES
    assert vlm.encode(still("wide")).visual_tokens.original == PATCHES


def test_a_clip_has_one_placeholder(vlm: PrunedVLM) -> None:
    """The prompt has one run of placeholders a clip and one a picture, each of its kind."""
    encoded = vlm.encode([clip(4), still("tall"), clip(2)], 21)
    assert [visual.modality for visual in encoded.visuals] == ["video", "image", "video"]
    ids = vlm._family.prompt("?", None, encoded.visuals).token_ids
    for modality, placeholder in vlm._family.placeholder_ids.items():
        lengths = [len(visual.features) for visual in encoded.visuals if visual.modality == modality]
        (places,) = (ids == placeholder).nonzero(as_tuple=True)
        runs = 1 + int((places.diff() > 1).sum())
        assert (runs, len(places)) == (len(lengths), sum(lengths))


@pytest.mark.parametrize("at_once", [1, 64])
def test_clips_of_different_lengths_share_a_run_of_the_tower(
    vlm: PrunedVLM, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Frames of all clips go through the video tower, as many at once as may; pictures through the other."""
    monkeypatch.setattr(llava, "VIEWS_PER_CPU_PASS", at_once)
    calls: list[tuple[str, int]] = []
    model = vlm.model.model
    hooks = [
        tower.register_forward_pre_hook(lambda _module, args, name=name: calls.append((name, len(args[0]))))
        for name, tower in (("image", model.image_tower), ("video", model.video_tower))
    ]
    vlm.encode([clip(3), still("tall"), clip(5)], 9)
    for hook in hooks:
        hook.remove()
    assert sorted(calls) == [("image", 1), *[("video", min(8, at_once))] * (8 // min(8, at_once))]


def test_control_tokens_of_either_kind_in_a_question_are_text(vlm: PrunedVLM) -> None:
    """A question with placeholders in it adds neither picture nor clip."""
    visuals = vlm.encode([clip(2)], 6).visuals
    answer = vlm._family.prompt("<video> or <image>?", None, visuals)
    for modality, placeholder in vlm._family.placeholder_ids.items():
        assert int((answer.token_ids == placeholder).sum()) == (6 if modality == "video" else 0)


@pytest.mark.parametrize("high", [1, 2, 3, 4])
def test_a_flat_picture_is_read_as_it_lies(vlm: PrunedVLM, high: int) -> None:
    """Its rows are not taken for its colors: it shows what it shows on its side."""
    flat = picture(0, (24, high))
    upright = flat.transpose(Image.Transpose.TRANSPOSE)
    family = vlm._family
    (values,) = family.preprocess(family.views([Picture(flat)]))
    (turned,) = family.preprocess(family.views([Picture(upright)]))
    # The sides are resized in the other order, with a rounding in between.
    assert (values.values - turned.values.transpose(2, 3)).abs().mean() < 0.02


@pytest.mark.parametrize("high", [1, 3])
def test_flat_frames_are_read_as_pictures_are(vlm: PrunedVLM, high: int) -> None:
    """Their processor is told the order of their channels, too."""
    flat = picture(0, (24, high))
    family = vlm._family
    (values,) = family.preprocess(family.views([Picture(flat)]))
    (frames,) = family.preprocess(family.views([Clip((flat,), (0.0,), flat.size)]))
    torch.testing.assert_close(values.values, frames.values, atol=0.05, rtol=0)


def test_what_is_stretched_too_far_is_refused(vlm: PrunedVLM) -> None:
    """Pictures and clips: their processors resize all of them before they crop."""
    thin = picture(0, (804, 4))
    for media in (Picture(thin), Clip((thin,), (0.0,), (1900, 10))):
        with pytest.raises(UnsupportedMediaError, match="200 times"):
            vlm.encode([media], 4)

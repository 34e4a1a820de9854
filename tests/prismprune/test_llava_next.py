"""LLaVA-NeXT: crops, their padding and their newlines, as transformers packs them and as the paper does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from prismprune.errors import InvalidOptionError, UnknownModelError, UnsupportedMediaError
from prismprune.families import llava
from prismprune.families.llava_next import LlavaNextFamily
from prismprune.media import Picture
from prismprune.selection.prism import Prism
from prismprune.visualization.kept import draw_kept
from prismprune.vlm import PrunedVLM
from tests.present import present
from tests.prismprune.families import SIZES, kept, parts, still
from tests.prismprune.tiny import IMAGE_SIZE, PATCHES, PINPOINTS, clip, save_tiny_llava_next

if TYPE_CHECKING:
    from pathlib import Path

    from prismprune.encoding import EncodedMedia
    from prismprune.selection import Scores, Selection
    from tests.prismprune.families import Transformers

CHECKPOINT = "llava_next-llama"
NEWLINE = -1


@pytest.fixture(scope="module")
def native(vlm: PrunedVLM) -> PrunedVLM:
    """In the layout of transformers."""
    return vlm


@pytest.fixture(scope="module")
def family(native: PrunedVLM) -> LlavaNextFamily:
    assert isinstance(native._family, LlavaNextFamily)
    return native._family


@pytest.fixture(scope="module")
def paper(checkpoint: Path) -> PrunedVLM:
    return PrunedVLM.from_pretrained(checkpoint, layout="paper")


def packed(model: Any, size: tuple[int, int]) -> list[int]:
    """What transformers packs of a picture of (width, height): crop * PATCHES + raster index, or NEWLINE."""
    views = image_size_to_num_patches(size[::-1], PINPOINTS, IMAGE_SIZE)
    numbers = torch.arange(views * PATCHES).view(1, views, PATCHES, 1)
    (sequence,), _ = model.model.pack_image_features(
        numbers, torch.tensor([size[::-1]]), "default", torch.tensor([NEWLINE])
    )
    return sequence.flatten().tolist()


def stays(sequence: list[int], numbers: set[int]) -> list[int]:
    """The packed sequence without what was dropped, and without newlines that end nothing."""
    left: list[int] = []
    row_has_token = False
    for number in sequence[:PATCHES]:
        left += [number] * (number in numbers)
    for number in sequence[PATCHES:]:
        if number == NEWLINE:
            left += [NEWLINE] * row_has_token
            row_has_token = False
        elif number in numbers:
            left.append(number)
            row_has_token = True
    return left


def seen_by_crop(sequence: list[int]) -> list[list[int]]:
    """Raster indices that the model sees of each crop."""
    crops: dict[int, list[int]] = {}
    for number in sequence:
        if number != NEWLINE:
            crops.setdefault(number // PATCHES, []).append(number % PATCHES)
    return [sorted(crops[crop]) for crop in sorted(crops)]


def kept_numbers(encoded: EncodedMedia) -> list[int]:
    return [present(part.crop) * PATCHES + index for part in encoded.token_map for index in part.kept]


@pytest.mark.parametrize("budget", [1, 5, 19])
@pytest.mark.parametrize("size", SIZES)
def test_the_kept_tokens_are_those_of_the_algorithm(
    native: PrunedVLM, eager: Transformers, size: str, budget: int
) -> None:
    """Each crop by its own CLS row; what transformers unpads is no candidate; the budget is the picture's."""
    seen = seen_by_crop(packed(eager.model, SIZES[size]))
    expected = kept(eager.views([still(size)]), budget, seen)
    token_map = native.encode(still(size), budget).token_map
    assert parts(token_map) == expected
    assert [part.crop for part in token_map] == list(range(len(expected)))


@pytest.mark.parametrize("budget", [3, 24, None])
@pytest.mark.parametrize("size", SIZES)
def test_the_survivors_stay_in_the_order_of_transformers(
    native: PrunedVLM, eager: Transformers, size: str, budget: int | None
) -> None:
    """Small copy first, then the stitched rows; a row that kept a patch keeps its newline, others lose it."""
    encoded = native.encode(still(size), budget)
    sequence, numbers = packed(eager.model, SIZES[size]), kept_numbers(encoded)
    order = sequence if budget is None else stays(sequence, set(numbers))
    views = eager.views([still(size)])
    newline = eager.model.model.image_newline.detach()
    expected = torch.stack(
        [
            newline
            if number == NEWLINE
            else eager.project(views[number // PATCHES].features[[number % PATCHES]])[0]
            for number in order
        ]
    )
    (visual,) = encoded.visuals
    torch.testing.assert_close(visual.features, expected, atol=1e-4, rtol=1e-4)
    assert encoded.visual_tokens.newlines == visual.newlines == order.count(NEWLINE)
    assert encoded.visual_tokens.kept == len(order) - order.count(NEWLINE) == len(numbers)


@pytest.mark.parametrize("size", SIZES)
def test_the_papers_layout_is_the_small_copy_and_then_the_crops(
    paper: PrunedVLM, eager: Transformers, size: str
) -> None:
    """Padding and all, without newlines, one crop after the other."""
    views = eager.views([still(size)])
    everything, pruned = paper.encode(still(size)), paper.encode(still(size), 11)
    assert everything.visual_tokens.original == len(views) * PATCHES == len(everything.visuals[0].features)
    assert parts(pruned.token_map) == kept(views, 11)
    expected = torch.cat(
        [
            eager.project(view.features[list(part.kept)])
            for view, part in zip(views, pruned.token_map, strict=True)
        ]
    )
    torch.testing.assert_close(pruned.visuals[0].features, expected, atol=1e-4, rtol=1e-4)
    assert (everything.visual_tokens.newlines, pruned.visual_tokens.newlines) == (0, 0)


def test_a_square_picture_has_a_grid_of_two_by_two(native: PrunedVLM, paper: PrunedVLM) -> None:
    """Five views of N tokens: what `visual_tokens_per_image` counts."""
    assert native.visual_tokens_per_image == paper.visual_tokens_per_image == 5 * PATCHES
    picture = Picture(Image.new("RGB", (2 * IMAGE_SIZE, 2 * IMAGE_SIZE)))
    assert native.encode(picture).visual_tokens.original == 5 * PATCHES


@given(width=st.integers(8, 400), height=st.integers(8, 400))
def test_candidates_are_what_transformers_does_not_unpad(
    family: LlavaNextFamily, width: int, height: int
) -> None:
    """Of every size; also where a crop is all padding."""
    views = family.views([Picture(Image.new("RGB", (width, height)))])
    mosaic = family._mosaic((width, height))
    expected = packed(family.model, (width, height))
    counts = [(bottom - top) * (right - left) for top, left, bottom, right in mosaic.candidates()]
    assert len(counts) == len(views) - 1
    assert PATCHES + sum(counts) == len(expected) - expected.count(NEWLINE)


@given(width=st.integers(8, 400), height=st.integers(8, 400))
def test_the_boxes_of_the_crops_tile_the_padded_picture(
    family: LlavaNextFamily, width: int, height: int
) -> None:
    """Each begins where its neighbor ends, and what the model sees of them covers the picture."""
    mosaic = family._mosaic((width, height))
    boxes = family._boxes((width, height), mosaic)
    columns = mosaic.crops[1]
    for place, (left, top, right, bottom) in enumerate(boxes):
        if (place + 1) % columns:
            assert boxes[place + 1][0] == right
        if place + columns < len(boxes):
            assert boxes[place + columns][1] == bottom
        assert left < right
        assert top < bottom
    assert boxes[0][0] <= 0
    assert boxes[0][1] <= 0
    assert boxes[-1][2] >= width - 1
    assert boxes[-1][3] >= height - 1


def test_a_picture_too_thin_for_a_patch_leaves_its_small_copy(native: PrunedVLM) -> None:
    """Its crops are all padding: they have no candidates, and the budget goes to the small copy."""
    line = Picture(Image.new("RGB", (400, 3)))
    assert set(packed(native.model, (400, 3))) == set(range(PATCHES))
    assert native.encode(line).visual_tokens.original == PATCHES
    encoded = native.encode(line, 5)
    assert [len(part.kept) for part in encoded.token_map] == [5, 0, 0, 0]
    assert (encoded.visual_tokens.newlines, len(encoded.visuals[0].features)) == (0, 5)


def test_the_crops_of_a_batch_run_through_the_tower_together(
    native: PrunedVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five views of one picture and four of another are one call, where a tower takes as many at once."""
    monkeypatch.setattr(llava, "VIEWS_PER_CPU_PASS", llava.VIEWS_PER_PASS)
    calls = []
    tower = native.model.model.vision_tower
    hook = tower.register_forward_pre_hook(lambda _module, args: calls.append(len(args[0])))
    native.encode([still("large"), still("panorama")], 12)
    hook.remove()
    assert calls == [9]


@pytest.mark.parametrize("layout", ["native", "paper"])
def test_what_was_kept_can_be_drawn(native: PrunedVLM, paper: PrunedVLM, layout: str) -> None:
    """Also of crops that reach beyond the picture; the drawing has the picture's aspect."""
    vlm = {"native": native, "paper": paper}[layout]
    image = still("tall").image
    drawn = draw_kept(image, vlm.encode(image, 20).token_map)
    assert drawn.width / drawn.height == pytest.approx(image.width / image.height, rel=0.01)
    assert drawn.tobytes() != draw_kept(image, ()).tobytes()


def test_crops_of_one_shape_are_selected_together(
    native: PrunedVLM, family: LlavaNextFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a wide picture on a grid of two by two, crops lose rows on either side; they share one call."""
    calls = []
    original = Prism.__call__

    def counting(self: Prism, scores: Scores, k: int) -> Selection:
        calls.append((scores.images, scores.candidates, k))
        return original(self, scores, k)

    monkeypatch.setattr(Prism, "__call__", counting)
    wide = Picture(Image.new("RGB", (2 * IMAGE_SIZE, IMAGE_SIZE * 3 // 2)))
    assert family._mosaic(wide.size).shown == (1, 0, 7, 8)
    encoded = native.encode(wide, (PATCHES + 4 * 12) // 4)
    assert sorted(calls) == [(1, 16, 4), (4, 12, 3)]
    assert encoded.visual_tokens.kept == 16


def test_videos_are_refused(native: PrunedVLM) -> None:
    """LLaVA-NeXT knows pictures only."""
    assert native.modalities == ("image",)
    with pytest.raises(UnsupportedMediaError):
        native.encode(clip())


def test_an_unknown_layout_is_refused(checkpoint: Path) -> None:
    """The message lists the family's own."""
    with pytest.raises(InvalidOptionError, match="native, paper"):
        PrunedVLM.from_pretrained(checkpoint, layout="newlines")


def test_kept_cls_tokens_are_refused(tmp_path: Path) -> None:
    """Crops with a CLS token cannot be stitched, by transformers either."""
    path = save_tiny_llava_next(tmp_path, vision_feature_select_strategy="full")
    with pytest.raises(UnknownModelError, match="CLS"):
        PrunedVLM.from_pretrained(path)


def test_a_processor_that_cuts_otherwise_is_refused(native: PrunedVLM, checkpoint: Path) -> None:
    """Model and processor each have a list of grids; they must be one."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    processor.image_processor.image_grid_pinpoints = PINPOINTS[:2]
    with pytest.raises(UnknownModelError, match="crops"):
        LlavaNextFamily(native.model, processor)

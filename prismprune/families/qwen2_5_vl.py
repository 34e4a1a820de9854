"""Qwen2.5-VL: pictures of any resolution and clips, a tower without CLS, positions in three rows."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_window_index

from prismprune.attention import FusedReading, read_fused, received_attention
from prismprune.errors import UnknownModelError
from prismprune.families.base import (
    UNSEEN,
    Family,
    Grid,
    Modality,
    Pixels,
    Positions,
    Processed,
    Reading,
    View,
    Visual,
    check_stretch,
)
from prismprune.generation import Prompt
from prismprune.media import Clip

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from prismprune.families.base import KeptPart, Wanted
    from prismprune.media import Picture

PATCHES_PER_PASS = 16384
"""Patches that the tower takes at once; more only add memory for activations."""
TYPICAL_SIDE = 672
"""Pixels of the square picture whose tokens stand for a picture's, as any resolution has its own."""


_PIXELS: dict[Modality, str] = {"image": "pixel_values", "video": "pixel_values_videos"}


@dataclass(frozen=True, slots=True)
class _Slices:
    """What the tower takes: the patches [S, d] of each view, a view's grid of merged units, its modality."""

    patches: list[Tensor]
    grids: list[Grid]
    modality: Modality


class Qwen25VLFamily(Family):
    """`Qwen2_5_VLForConditionalGeneration`: a token is a merged unit of 2 x 2 patches.

    A picture is one view, and of a clip each temporal slice (two frames, which the tower reads as one; an odd
    last frame counts twice). Tokens are scored where the last block with full attention lets every patch of a
    view see all others, and chosen behind the patch merger, so that nothing is left to project. A token that
    stays keeps the position that it has without pruning.
    """

    name: ClassVar[str] = "qwen2_5_vl"
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")
    media_inputs: ClassVar[tuple[str, ...]] = (
        "pixel_values",
        "image_grid_thw",
        "pixel_values_videos",
        "video_grid_thw",
        "second_per_grid_ts",
        "mm_token_type_ids",
    )
    outside: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("model.visual.patch_embed", "model.visual.blocks"),
        "projector": ("model.visual.merger",),
        "head": ("lm_head",),
    }

    def __init__(self, model: Any, processor: Any | None, layout: str | None = None) -> None:
        super().__init__(model, processor, layout)
        if not self._vision.fullatt_block_indexes:
            raise UnknownModelError("No block of the vision tower lets every patch see all others.")

    @staticmethod
    def load(path: str, **options: Any) -> Any:
        return Qwen2_5_VLForConditionalGeneration.from_pretrained(path, **options)

    @staticmethod
    def visual_tokens_of(config: Any) -> int:
        vision = config.vision_config
        return int(TYPICAL_SIDE // (vision.patch_size * vision.spatial_merge_size)) ** 2

    @cached_property
    def tokens_per_image(self) -> int:
        blank = Image.new("RGB", (TYPICAL_SIDE, TYPICAL_SIDE))
        rows, columns = self.preprocess([View(blank, blank.size, media=0)])[0].grid
        return rows * columns

    @property
    def placeholder_ids(self) -> dict[Modality, int]:
        return {"image": self.model.config.image_token_id, "video": self.model.config.video_token_id}

    @property
    def _vision(self) -> Any:
        return self.model.config.vision_config

    @property
    def _tower(self) -> Any:
        return self.model.model.visual

    def views(self, media: Sequence[Picture | Clip]) -> list[View]:
        views: list[View] = []
        for place, item in enumerate(media):
            check_stretch(item)
            if isinstance(item, Clip):
                views += self._slices(place, item)
            else:
                views.append(View(item.image, item.size, place))
        return views

    def _slices(self, place: int, clip: Clip) -> Iterator[View]:
        step = self._vision.temporal_patch_size
        for first in range(0, len(clip.frames), step):
            image, *others = clip.frames[first : first + step]
            yield View(image, clip.size, place, None, first, clip.times_s[first], tuple(others))

    def preprocess(self, views: Sequence[View]) -> list[Pixels]:
        pictures = [place for place, view in enumerate(views) if view.frame is None]
        starts = [place for place, view in enumerate(views) if view.frame == 0]
        pixels: list[Pixels] = []
        if pictures:
            made = self._pictures([views[place].image for place in pictures])
            pixels += self._by_grid(pictures, made, views)
        for start in starts:
            clip = [start, *_following(start, views)]
            pixels += self._by_grid(clip, self._clip([views[place] for place in clip]), views)
        return pixels

    def _pictures(self, images: Sequence[Image.Image]) -> _Slices:
        made = self.processor.image_processor(list(images), return_tensors="pt")
        return self._slices_of(made["pixel_values"], made["image_grid_thw"], "image")

    def _clip(self, slices: Sequence[View]) -> _Slices:
        frames = np.stack([np.asarray(image) for view in slices for image in (view.image, *view.others)])
        made = self.processor.video_processor(
            [frames], do_sample_frames=False, input_data_format="channels_last", return_tensors="pt"
        )
        return self._slices_of(made["pixel_values_videos"], made["video_grid_thw"], "video")

    def _slices_of(self, patches: Tensor, grids: Tensor, modality: Modality) -> _Slices:
        """Media one after the other, each (slices, rows, columns) of patches, by their slices."""
        merge = self._vision.spatial_merge_size
        apart = [(rows, columns) for slices, rows, columns in grids.tolist() for _ in range(slices)]
        by_slice = patches.split([rows * columns for rows, columns in apart])
        units = [(rows // merge, columns // merge) for rows, columns in apart]
        return _Slices(list(by_slice), units, modality)

    def _by_grid(self, places: Sequence[int], made: _Slices, views: Sequence[View]) -> list[Pixels]:
        by_grid: dict[Grid, list[tuple[int, Tensor]]] = defaultdict(list)
        for place, patches, grid in zip(places, made.patches, made.grids, strict=True):
            by_grid[grid].append((place, patches))
        pixels = []
        for grid, group in by_grid.items():
            own, same = zip(*group, strict=True)
            values = torch.stack(same).to(self._tower.device, self._tower.dtype)
            boxes = tuple((0, 0, *views[place].size) for place in own)  # resized, and never cropped
            pixels.append(Pixels(own, values, grid, boxes, made.modality))
        return pixels

    def processed(self, inputs: Mapping[str, Tensor]) -> tuple[list[Processed], list[Pixels]]:
        media: list[Processed] = []
        pixels: list[Pixels] = []
        first = 0
        for modality, name in _PIXELS.items():
            if name not in inputs:
                continue
            grids = inputs[f"{modality}_grid_thw"]
            own = [*self._unseen(grids, modality, inputs.get("second_per_grid_ts"), len(media))]
            views = [view for medium in own for view in medium.views]
            made = self._slices_of(inputs[name], grids, modality)
            groups = self._by_grid(range(len(views)), made, views)
            pixels += [replace(each, places=tuple(first + place for place in each.places)) for each in groups]
            media += own
            first += len(views)
        return media, pixels

    def _unseen(
        self, grids: Tensor, modality: Modality, seconds: Any | None, first: int
    ) -> Iterator[Processed]:
        """Media of (slices, rows, columns) of patches; `seconds` between the slices of each clip, else 1."""
        patch, merge = self._vision.patch_size, self._vision.spatial_merge_size
        step = self._vision.temporal_patch_size
        for number, (slices, rows, columns) in enumerate(grids.tolist()):
            size = (columns * patch, rows * patch)
            times: list[tuple[int, float] | tuple[None, None]] = [(None, None)]
            if modality == "video":
                apart = 1.0 if seconds is None else float(seconds[number])
                times = [(step * at, at * apart) for at in range(slices)]
            views = [View(UNSEEN, size, first + number, None, frame, time) for frame, time in times]
            yield Processed(modality, tuple(views), slices * rows * columns // merge**2)

    def read(self, pixels: Pixels, wanted: Wanted | None = None) -> Reading:
        del wanted  # the merger, which comes last, makes one of several patches
        views = max(1, PATCHES_PER_PASS // pixels.values.shape[1])
        readings = [self._read(values, pixels.grid) for values in pixels.values.split(views)]
        return Reading(
            tokens=torch.cat([reading.tokens for reading in readings]),
            prefix=0,
            attention=lambda: torch.cat([reading.attention() for reading in readings]),
            keys=lambda: torch.cat([reading.keys() for reading in readings]),
        )

    def _read(self, values: Tensor, grid: Grid) -> _UnitReading:
        tower, vision = self._tower, self._vision
        merge = vision.spatial_merge_size
        patches = torch.tensor([[1, grid[0] * merge, grid[1] * merge]], device=values.device)
        attention = tower.blocks[max(vision.fullatt_block_indexes)].attn
        with read_fused(attention, attention.qkv) as fused:
            merged = tower(values.flatten(0, 1), grid_thw=patches.expand(len(values), -1)).pooler_output
        # The tower puts the units of a window side by side; of every view in the same way.
        windows, _ = get_vision_window_index(patches, merge, vision.window_size, vision.patch_size)
        return _UnitReading(
            tokens=merged.unflatten(0, (len(values), -1)),
            fused=fused,
            heads=attention.num_heads,
            scale=attention.scaling,
            raster=windows.argsort(),
        )

    def project(self, tokens: Tensor) -> Tensor:
        """Nothing: the patch merger, which the tower ends with, has projected them."""
        return tokens

    def arrange(self, parts: Sequence[KeptPart]) -> list[Visual]:
        modality: Modality = "image" if parts[0].view.frame is None else "video"
        features = torch.cat([part.projected for part in parts])
        return [Visual(modality, features, positions=self._positions(parts))]

    def _positions(self, parts: Sequence[KeptPart]) -> Positions:
        """Slice, row and column of what stays, as in transformers' `get_rope_index` of the whole medium."""
        rows, columns = parts[0].grid
        steps = (torch.arange(len(parts)) * self._ticks(parts)).long()
        tokens = []
        for step, part in zip(steps.tolist(), parts, strict=True):
            kept = part.candidates.raster(part.grid) if part.kept is None else part.kept
            tokens.append(torch.stack([torch.full_like(kept, step), kept // columns, kept % columns]))
        return Positions(torch.cat(tokens, 1), advance=max(rows, columns))

    def _ticks(self, parts: Sequence[KeptPart]) -> float:
        """Positions between two slices: of a clip, by the time between them."""
        times = [part.view.time_s for part in parts if part.view.time_s is not None]
        if len(times) < 2:
            return 1.0
        return float(self._vision.tokens_per_second * (times[-1] - times[0]) / (len(times) - 1))

    def filled(self, ids: Tensor, visuals: Sequence[Visual]) -> Prompt:
        """See `Family.filled`; positions go on behind a medium as if all of its tokens were there."""
        repeats = self.repeats(ids, visuals)
        waiting = {
            placeholder: iter([visual.positions for visual in visuals if visual.modality == modality])
            for modality, placeholder in self.placeholder_ids.items()
        }
        positions, at = [], 0
        for token in ids.tolist():
            placed = next(waiting[token]) if token in waiting else None
            positions.append(torch.full((3, 1), at) if placed is None else placed.tokens + at)
            at += 1 if placed is None else placed.advance
        return Prompt(ids.repeat_interleave(repeats), tuple(visuals), torch.cat(positions, 1), at)

    def visual_inputs(self, visuals: Sequence[Visual]) -> dict[str, Any]:
        encoded: dict[str, BaseModelOutputWithPooling] = {}
        for modality in self.modalities:
            # Typed as one tensor, but taken as a sequence, so that media may differ in length.
            features: Any = tuple(visual.features for visual in visuals if visual.modality == modality)
            if features:
                encoded[modality] = BaseModelOutputWithPooling(pooler_output=features)
        return {"mm_encoder_outputs": encoded}


@dataclass(frozen=True, slots=True)
class _UnitReading:
    """One pass of the tower over B views: tokens [B, N, width] in raster order.

    fused: what the block computed, its patches by windows, unit by unit. raster: [N], where among the units
    in the tower's order each unit of the raster stands.
    """

    tokens: Tensor
    fused: FusedReading
    heads: int
    scale: float
    raster: Tensor

    def attention(self) -> Tensor:
        """What each unit receives, a head: [B, H, N], float32."""
        queries, keys = self._rotated()
        return self._by_unit(received_attention(queries, keys, self.scale)[..., None])[..., 0]

    def keys(self) -> Tensor:
        """The mean key of each unit's patches: [B, H, N, head_dim]."""
        return self._by_unit(self._rotated()[1])

    def _rotated(self) -> tuple[Tensor, Tensor]:
        """Queries and keys [B, H, S, head_dim] of the patches, in the tower's order."""
        by_head = self.fused.projected.unflatten(1, (3, self.heads, -1))
        queries, keys = apply_rotary_pos_emb_vision(by_head[:, 0], by_head[:, 1], *self.fused.rotary)
        views = (len(self.tokens), -1)
        return queries.unflatten(0, views).transpose(1, 2), keys.unflatten(0, views).transpose(1, 2)

    def _by_unit(self, patches: Tensor) -> Tensor:
        """[B, H, S, x] of patches in the tower's order to means [B, H, N, x] of units in raster order."""
        units: Tensor = patches.unflatten(2, (len(self.raster), -1)).mean(3)
        return units[:, :, self.raster]


def _following(start: int, views: Sequence[View]) -> Iterator[int]:
    """Places of the other slices of the clip that begins there."""
    for place in range(start + 1, len(views)):
        if not views[place].frame:  # another clip's first, or a picture
            return
        yield place

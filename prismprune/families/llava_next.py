"""LLaVA-NeXT (1.6): a picture as a small copy of all of it and, at a higher resolution, its crops."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import LlavaNextForConditionalGeneration
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

from prismprune.errors import UnknownModelError, UnsupportedMediaError
from prismprune.families.base import (
    UNSEEN,
    Box,
    Grid,
    KeptPart,
    Modality,
    Pixels,
    Processed,
    Region,
    View,
    Visual,
)
from prismprune.families.llava import LlavaFamily
from prismprune.media import Clip

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL.Image import Image
    from torch import Tensor

    from prismprune.media import Picture

PAPER = "paper"


@dataclass(frozen=True, slots=True)
class Mosaic:
    """How a picture is cut, in patches.

    crops: rows and columns of them. side: patches along a crop's edge. shown: the part of the stitched crops
    that the picture fills; the rest is padding.
    """

    crops: Grid
    side: int
    shown: Region

    @property
    def places(self) -> list[tuple[int, int]]:
        """Row and column of the first patch of each crop, in order."""
        rows, columns = self.crops
        return [(row * self.side, column * self.side) for row in range(rows) for column in range(columns)]

    @property
    def grid(self) -> Grid:
        """Of one crop."""
        return self.side, self.side

    def candidates(self) -> list[Region]:
        """What of each crop is no padding; it may be empty."""
        top, left, bottom, right = self.shown
        return [
            Region(self._in(top - y), self._in(left - x), self._in(bottom - y), self._in(right - x))
            for y, x in self.places
        ]

    def _in(self, coordinate: int) -> int:
        return min(max(coordinate, 0), self.side)


class LlavaNextFamily(LlavaFamily):
    """`LlavaNextForConditionalGeneration` with a CLIP tower, any language model.

    A picture's first view is the small copy, its others are the crops in raster order. `layout="native"`
    stitches the crops, leaves their padding out and ends each row with a newline token, as transformers does;
    after pruning, each row that kept a patch. `layout="paper"` takes the views one after the other, padding
    and all, without newlines.
    """

    name: ClassVar[str] = "llava_next"
    modalities: ClassVar[tuple[Modality, ...]] = ("image",)
    layouts: ClassVar[tuple[str, ...]] = ("native", PAPER)
    media_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")

    def __init__(self, model: Any, processor: Any | None, layout: str | None = None) -> None:
        super().__init__(model, processor, layout)
        config = model.config
        if config.vision_feature_select_strategy != "default":
            raise UnknownModelError("LLaVA-NeXT cannot stitch crops whose CLS token is kept.")
        expected = _pairs(config.image_grid_pinpoints)
        if processor is not None and _pairs(processor.image_processor.image_grid_pinpoints) != expected:
            raise UnknownModelError("The checkpoint's processor cuts other crops than its model expects.")

    @staticmethod
    def load(path: str, **options: Any) -> Any:
        return LlavaNextForConditionalGeneration.from_pretrained(path, **options)

    @staticmethod
    def visual_tokens_of(config: Any) -> int:
        side = int(config.vision_config.image_size // config.vision_config.patch_size)
        return 5 * side * side  # the small copy and 2 x 2 crops: what the paper reports

    @property
    def tokens_per_image(self) -> int:
        side = self.model.config.vision_config.image_size
        mosaic = self._mosaic((2 * side, 2 * side))
        return sum(candidates.area for candidates in self._candidates(mosaic))

    def views(self, media: Sequence[Picture | Clip]) -> list[View]:
        views: list[View] = []
        for place, item in enumerate(media):
            if isinstance(item, Clip):
                raise UnsupportedMediaError("LLaVA-NeXT answers about pictures, not about videos.")
            views += self._crops(place, item.image, item.size)
        return views

    def preprocess(self, views: Sequence[View]) -> list[Pixels]:
        processor = self.processor.image_processor
        wholes = [view for view in views if view.crop == 0]
        values = [processor(view.image, return_tensors="pt")["pixel_values"][0] for view in wholes]
        return [self._cut(values, [view.size for view in wholes])]

    def processed(self, inputs: Mapping[str, Tensor]) -> tuple[list[Processed], list[Pixels]]:
        sizes = [(width, height) for height, width in inputs["image_sizes"].tolist()]
        media = []
        for place, size in enumerate(sizes):
            mosaic = self._mosaic(size)
            newlines = mosaic.shown.shape[0]  # written in every layout, as transformers knows but one
            tokens = mosaic.side**2 + mosaic.shown.area + newlines
            media.append(Processed("image", tuple(self._crops(place, UNSEEN, size)), tokens))
        # Pictures with fewer crops than others are filled up with crops of nothing.
        pixels = zip(inputs["pixel_values"], media, strict=True)
        return media, [self._cut([own[: len(medium.views)] for own, medium in pixels], sizes)]

    def _crops(self, place: int, image: Image, size: tuple[int, int]) -> list[View]:
        crops = range(1 + len(self._mosaic(size).places))
        return [View(image, size, place, crop=crop) for crop in crops]

    def _cut(self, values: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Pixels:
        """Pictures of (width, height) `sizes`, each as its views [V, 3, edge, edge], one after the other."""
        tower, side = self._tower("image"), self._mosaic(sizes[0]).grid
        boxes: list[Box] = []
        candidates: list[Region] = []
        for size in sizes:
            mosaic = self._mosaic(size)
            boxes += [(0, 0, *size), *self._boxes(size, mosaic)]
            candidates += self._candidates(mosaic)
        return Pixels(
            places=tuple(range(len(boxes))),
            values=torch.cat(list(values)).to(tower.device, tower.dtype),
            grid=side,
            boxes=tuple(boxes),
            candidates=tuple(candidates),
        )

    def _mosaic(self, size: tuple[int, int]) -> Mosaic:
        """How a picture of (width, height) is cut."""
        vision, (height, width) = self.model.config.vision_config, self._resolution(size)
        crops = (height // vision.image_size, width // vision.image_size)
        side = vision.image_size // vision.patch_size
        rows, columns = crops[0] * side, crops[1] * side
        # transformers' own function, on a tensor without values: its rounding decides how many there are.
        _, shown_rows, shown_columns = unpad_image(
            torch.empty(1, rows, columns, device="meta"), size[::-1]
        ).shape
        top, left = (rows - shown_rows) // 2, (columns - shown_columns) // 2
        return Mosaic(crops, side, Region(top, left, top + shown_rows, left + shown_columns))

    def _resolution(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in pixels that the crops of a picture of (width, height) make up."""
        height, width = select_best_resolution(size[::-1], self.model.config.image_grid_pinpoints)
        return height, width

    def _candidates(self, mosaic: Mosaic) -> list[Region]:
        """What the model gets to see of each view."""
        whole = Region.whole(mosaic.grid)
        crops = [whole] * len(mosaic.places) if self.layout == PAPER else mosaic.candidates()
        return [whole, *crops]

    def _boxes(self, original: tuple[int, int], mosaic: Mosaic) -> list[Box]:
        """What each crop covers, in pixels of the original: undoes the padding and the resize."""
        (width, height), (full_height, full_width) = original, self._resolution(original)
        scale = min(full_width / width, full_height / height)
        # ceil() and the halves as transformers computes them.
        resized_width = min(math.ceil(width * scale), full_width)
        resized_height = min(math.ceil(height * scale), full_height)
        left, top = (full_width - resized_width) // 2, (full_height - resized_height) // 2
        across, down = width / resized_width, height / resized_height
        edge = self.model.config.vision_config.image_size
        corners = [(x * self._patch_size - left, y * self._patch_size - top) for y, x in mosaic.places]
        return [
            (round(x * across), round(y * down), round((x + edge) * across), round((y + edge) * down))
            for x, y in corners
        ]

    def arrange(self, parts: Sequence[KeptPart]) -> list[Visual]:
        base, *crops = parts
        if self.layout == PAPER:
            return [Visual("image", torch.cat([part.projected for part in parts]))]
        mosaic = self._mosaic(base.view.size)
        order, rows = _stitched(mosaic, crops)
        newline = self.model.model.image_newline.to(base.projected)
        tokens = torch.cat([*(part.projected for part in crops), newline.expand(len(rows), -1)])
        return [Visual("image", torch.cat([base.projected, tokens[order.to(tokens.device)]]), len(rows))]


def _stitched(mosaic: Mosaic, crops: Sequence[KeptPart]) -> tuple[Tensor, Tensor]:
    """Order of the crops' tokens, one crop after the other, and then the newlines, in the stitched grid.

    Also the rows that end with a newline: those with a token; without pruning, all that are shown.
    """
    columns = mosaic.crops[1] * mosaic.side
    rows, places = [], []
    for crop, (y, x) in zip(crops, mosaic.places, strict=True):
        kept = crop.candidates.raster(crop.grid) if crop.kept is None else crop.kept
        rows.append(y + kept // mosaic.side)
        places.append(rows[-1] * (columns + 1) + x + kept % mosaic.side)
    top, _, bottom, _ = mosaic.shown
    pruned = any(crop.kept is not None for crop in crops)
    ended = torch.cat(rows).unique() if pruned else torch.arange(top, bottom)
    newlines = ended * (columns + 1) + columns
    return torch.cat([*places, newlines]).argsort(), ended


def _pairs(pinpoints: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    return [tuple(pair) for pair in pinpoints]

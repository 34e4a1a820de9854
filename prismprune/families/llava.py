"""LLaVA-1.5's shape: a vision tower with a CLS token, a two-layer projector, any language model."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from prismprune.attention import BlockReading, read_block
from prismprune.errors import UnknownModelError
from prismprune.families.base import (
    UNSEEN,
    Box,
    Family,
    Modality,
    Pixels,
    Processed,
    Reading,
    View,
    Visual,
    check_stretch,
)
from prismprune.lanes import side_by_side
from prismprune.last_block import can_stop_within, read_wanted
from prismprune.media import Clip

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from prismprune.families.base import Wanted
    from prismprune.last_block import WantedOfView
    from prismprune.media import Picture

CLS_TOWERS = ("clip_vision_model", "dinov2")
"""Towers whose first token is CLS and whose others are all patches."""
UNREAD = ("post_layernorm.", "layernorm.", "embeddings.mask_token")
"""Weights of such a tower, outside its blocks, that no patch's token depends on."""
VIEWS_PER_CALL = 8
"""Of the processor: it resizes all before it crops any, to 60 MB each where they are stretched the most."""
VIEWS_PER_PASS = 64
"""Views that an accelerator's tower takes at once; more only add memory for activations."""
VIEWS_PER_CPU_PASS = 1
"""One fills a CPU, and its activations stay in the caches: eight at once took a tenth longer each."""

Sizes = dict[str, dict[str, int]]
T = TypeVar("T")


class LlavaFamily(Family):
    """`LlavaForConditionalGeneration` with a CLIP or DINOv2 tower.

    A clip is its frames as pictures in order, at the config's `video_image_size` if it has one.
    """

    name: ClassVar[str] = "llava"
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")
    media_inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    outside: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector",),
        "head": ("lm_head",),
    }

    def __init__(self, model: Any, processor: Any | None, layout: str | None = None) -> None:
        super().__init__(model, processor, layout)
        config = model.config
        if config.vision_config.model_type not in CLS_TOWERS:
            raise UnknownModelError(
                f"A {config.vision_config.model_type!r} tower gives no CLS attention to choose tokens by; "
                f"known towers are {', '.join(CLS_TOWERS)}."
            )
        if not isinstance(config.vision_feature_layer, int):
            raise UnknownModelError("Features of several vision layers at once are not supported.")
        # `vision_feature_layer` counts hidden states: 0 is the embeddings, i the output of block i - 1.
        states = config.vision_config.num_hidden_layers + 1
        self._block = config.vision_feature_layer % states - 1
        if self._block < 0 or not -states <= config.vision_feature_layer < states:
            raise UnknownModelError(
                f"vision_feature_layer {config.vision_feature_layer} is no block of the tower."
            )

    @staticmethod
    def load(path: str, **options: Any) -> Any:
        return LlavaForConditionalGeneration.from_pretrained(path, **options)

    @staticmethod
    def visual_tokens_of(config: Any) -> int:
        return int(config.image_seq_length)

    @property
    def placeholder_ids(self) -> dict[Modality, int]:
        return {"image": self.model.config.image_token_id}

    @cached_property
    def tokens_per_image(self) -> int:
        blank = Image.new("RGB", (64, 64))
        rows, columns = self.preprocess([View(blank, blank.size, media=0)])[0].grid
        return rows * columns + self.prefix("image")

    def prefix(self, _modality: Modality) -> int:
        return int(self.model.config.vision_feature_select_strategy == "full")

    def reads(self, weight: str) -> bool:
        """See `Family.reads`: a tower stops after the block whose output is used."""
        tower = next((each for each in self.outside["vision"] if weight.startswith(f"{each}.")), None)
        if tower is None:
            return True
        inner = weight.removeprefix(f"{tower}.")
        block = re.match(r"encoder\.layers?\.(\d+)\.", inner)
        return int(block[1]) <= self._block if block else not inner.startswith(UNREAD)

    def _tower(self, _modality: Modality) -> Any:
        return self.model.model.vision_tower

    def _processor(self, _modality: Modality) -> Any:
        return self.processor.image_processor

    def _resize(self, medium: Picture | Clip) -> dict[str, int]:
        """What the processor resizes it to, as `sizes_of` gives it."""
        return sizes_of(self._processor("video" if isinstance(medium, Clip) else "image")).get("size", {})

    def views(self, media: Sequence[Picture | Clip]) -> list[View]:
        views: list[View] = []
        for place, item in enumerate(media):
            if "shortest_edge" in self._resize(item):
                check_stretch(item)
            if isinstance(item, Clip):
                frames = enumerate(zip(item.frames, item.times_s, strict=True))
                views += [
                    View(image, item.size, place, frame=frame, time_s=time) for frame, (image, time) in frames
                ]
            else:
                views.append(View(item.image, item.size, place))
        return views

    def preprocess(self, views: Sequence[View]) -> list[Pixels]:
        by_edge: dict[int | None, list[int]] = defaultdict(list)
        for place, view in enumerate(views):
            frame_edge = getattr(self.model.config, "video_image_size", None)
            by_edge[None if view.frame is None else frame_edge].append(place)
        pixels: list[Pixels] = []
        for edge, places in by_edge.items():
            pixels += self._preprocess_at(edge, places, views)
        return pixels

    def _preprocess_at(self, edge: int | None, places: Sequence[int], views: Sequence[View]) -> list[Pixels]:
        sizes = sizes_of(self._processor("image"), edge)
        values = [
            torch.as_tensor(image)
            for some in in_calls([views[place].image for place in places])
            for image in self._processor("image")(some, **sizes)["pixel_values"]
        ]
        return self._by_shape(places, values, views, sizes)

    def _by_shape(
        self,
        places: Iterable[int],
        images: Iterable[Tensor],
        views: Sequence[View],
        sizes: Sizes,
        modality: Modality = "image",
    ) -> list[Pixels]:
        """Views [3, height, width], processed at those `sizes`, together where they are of one shape."""
        tower = self._tower(modality)
        by_shape: dict[torch.Size, list[tuple[int, Tensor]]] = defaultdict(list)
        for place, image in zip(places, images, strict=True):
            by_shape[image.shape].append((place, image))
        pixels = []
        for shape, group in by_shape.items():
            own, same = zip(*group, strict=True)
            values = torch.stack(same).to(tower.device, tower.dtype)
            grid = (shape[1] // self._patch_size, shape[2] // self._patch_size)
            boxes = tuple(self._box(views[place].size, sizes, grid) for place in own)
            pixels.append(Pixels(own, values, grid, boxes, modality))
        return pixels

    @property
    def _patch_size(self) -> int:
        return int(self.model.config.vision_config.patch_size)

    def _box(self, original: tuple[int, int], sizes: Sizes, grid: tuple[int, int]) -> Box:
        """What the patch grid covers, in pixels of the original: undoes the resize and the centre crop."""
        width, height = original
        resized_width, resized_height = _resized(original, sizes.get("size", {}))
        crop = sizes.get("crop_size", {"width": resized_width, "height": resized_height})
        # int() and the halves as transformers computes them; below zero where it pads.
        left = int((resized_width - crop["width"]) / 2)
        top = int((resized_height - crop["height"]) / 2)
        right, bottom = left + grid[1] * self._patch_size, top + grid[0] * self._patch_size
        across, down = width / resized_width, height / resized_height
        return (
            max(0, round(left * across)),
            max(0, round(top * down)),
            min(width, round(right * across)),
            min(height, round(bottom * down)),
        )

    def processed(self, inputs: Mapping[str, Tensor]) -> tuple[list[Processed], list[Pixels]]:
        pixels = self._processed(inputs["pixel_values"], 0)
        return self._stills(pixels), [pixels]

    def _stills(self, pixels: Pixels) -> list[Processed]:
        tokens = pixels.grid[0] * pixels.grid[1] + self.prefix("image")
        return [
            Processed("image", (View(UNSEEN, UNSEEN.size, place),), tokens)
            for place in range(len(pixels.values))
        ]

    def _processed(self, values: Tensor, first: int, modality: Modality = "image") -> Pixels:
        """Views [B, 3, height, width] that are processed already, at the places from `first` on."""
        tower, (height, width) = self._tower(modality), values.shape[2:]
        return Pixels(
            places=tuple(range(first, first + len(values))),
            values=values.to(tower.device, tower.dtype),
            grid=(height // self._patch_size, width // self._patch_size),
            boxes=((0, 0, width, height),) * len(values),
            modality=modality,
        )

    def read(self, pixels: Pixels, wanted: Wanted | None = None) -> Reading:
        tower, prefix = self._tower(pixels.modality), self.prefix(pixels.modality)
        at_once = VIEWS_PER_CPU_PASS if pixels.values.device.type == "cpu" else VIEWS_PER_PASS
        values = torch.split(pixels.values, at_once)
        # Of several views at once the patches that somebody looks at are not equally many.
        if wanted is not None and at_once == 1 and can_stop_within(tower, self._last_block(tower)[0]):
            passes = [
                partial(self._read_wanted, tower, each, partial(wanted, row))
                for row, each in enumerate(values)
            ]
        else:
            passes = [partial(self._reading, tower, each) for each in values]
        recorded = self.tower_replay is not None  # into the same memory each time
        readings = [each() for each in passes] if recorded else side_by_side(passes, pixels.values.device)
        hidden = torch.cat([reading.hidden for reading in readings])
        return Reading(
            tokens=hidden[:, 1 - prefix :],
            prefix=prefix,
            attention=lambda: torch.cat([reading.cls_attention() for reading in readings]),
            keys=lambda: torch.cat([_patch_keys(reading) for reading in readings]),
        )

    def _reading(self, tower: Any, values: Tensor) -> BlockReading:
        if self.tower_replay is None:
            return self._read_block(tower, values)
        return self.tower_replay.read(tower, values, partial(self._read_block, tower))

    def _last_block(self, tower: Any) -> tuple[Any, int, float]:
        """The block whose output is used, its heads, and the scale of their products."""
        blocks = tower.encoder.layers if hasattr(tower.encoder, "layers") else tower.encoder.layer
        heads = tower.config.num_attention_heads
        return blocks[self._block], heads, (tower.config.hidden_size // heads) ** -0.5

    def _read_block(self, tower: Any, values: Tensor) -> BlockReading:
        block, heads, scale = self._last_block(tower)
        attention = block.self_attn if hasattr(block, "self_attn") else block.attention
        with read_block(block, attention, heads=heads, scale=scale) as reading:
            tower(values)
        return reading

    def _read_wanted(self, tower: Any, values: Tensor, wanted: WantedOfView) -> BlockReading:
        block, heads, scale = self._last_block(tower)
        return read_wanted(tower, block, values, heads=heads, scale=scale, wanted=wanted)

    def project(self, tokens: Tensor) -> Tensor:
        projected: Tensor = self.model.model.multi_modal_projector(tokens)
        return projected

    def visual_inputs(self, visuals: Sequence[Visual]) -> dict[str, Any]:
        # Typed as one tensor, but LLaVA takes (and gives) a sequence, so that views may differ in length.
        features: Any = tuple(visual.features for visual in visuals)
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}}


def _patch_keys(reading: BlockReading) -> Tensor:
    """Keys of the patches, [B, H, N, head_dim]."""
    keys: Tensor = reading.keys[:, 1:].unflatten(2, (reading.heads, -1))
    return keys.transpose(1, 2)


def in_calls(views: Sequence[T]) -> list[Sequence[T]]:
    """What the processor gets at once of what is made of `views`."""
    return [views[first : first + VIEWS_PER_CALL] for first in range(0, len(views), VIEWS_PER_CALL)]


def sizes_of(processor: Any, edge: int | None = None) -> Sizes:
    """`size` and, where the processor crops, `crop_size`; every length is `edge` if that is given."""
    sizes = {"size": processor.size} if processor.do_resize else {}
    if processor.do_center_crop:
        sizes["crop_size"] = processor.crop_size
    return {
        name: {key: edge or length for key, length in dict(size).items() if length is not None}
        for name, size in sizes.items()
    }


def _resized(original: tuple[int, int], size: dict[str, int]) -> tuple[int, int]:
    """(width, height) after the processor's resize, which cuts the longer side to whole pixels."""
    width, height = original
    if "shortest_edge" in size:
        edge = size["shortest_edge"]
        return (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)
    return size.get("width", width), size.get("height", height)

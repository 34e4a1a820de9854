"""Video-LLaVA: pictures and clips, each with a tower of its own, in one prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from transformers import VideoLlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from prismprune.families.base import UNSEEN, KeptPart, Modality, Pixels, Processed, View, Visual
from prismprune.families.llava import LlavaFamily, in_calls, sizes_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


FRAMES = 8
"""Of a clip, as the model was trained and as frames are sampled unless asked otherwise."""


class VideoLlavaFamily(LlavaFamily):
    """`VideoLlavaForConditionalGeneration`: a picture is one view, a clip one placeholder for all its frames.

    Unpruned, each frame keeps its CLS token, as transformers has it; a budget chooses among the patches.
    """

    name: ClassVar[str] = "video_llava"
    media_inputs: ClassVar[tuple[str, ...]] = ("pixel_values_images", "pixel_values", "pixel_values_videos")
    outside: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **LlavaFamily.outside,
        "vision": ("model.image_tower", "model.video_tower"),
    }

    @staticmethod
    def load(path: str, **options: Any) -> Any:
        return VideoLlavaForConditionalGeneration.from_pretrained(path, **options)

    @staticmethod
    def visual_tokens_of(config: Any) -> int:
        side = int(config.vision_config.image_size // config.vision_config.patch_size)
        return FRAMES * side * side

    @property
    def placeholder_ids(self) -> dict[Modality, int]:
        return {"image": self.model.config.image_token_id, "video": self.model.config.video_token_id}

    def prefix(self, modality: Modality) -> int:
        return 1 if modality == "video" else super().prefix(modality)

    def _tower(self, modality: Modality) -> Any:
        return self.model.model.video_tower if modality == "video" else self.model.model.image_tower

    def _processor(self, modality: Modality) -> Any:
        return self.processor.video_processor if modality == "video" else self.processor.image_processor

    def preprocess(self, views: Sequence[View]) -> list[Pixels]:
        pictures = [place for place, view in enumerate(views) if view.frame is None]
        frames = [place for place, view in enumerate(views) if view.frame is not None]
        pixels: list[Pixels] = []
        if pictures:
            values = self._pictures([views[place] for place in pictures])
            pixels += self._by_shape(pictures, values, views, sizes_of(self._processor("image")))
        if frames:
            values = self._frames([views[place] for place in frames])
            sizes = sizes_of(self._processor("video"))
            pixels += self._by_shape(frames, values, views, sizes, modality="video")
        return pixels

    def _pictures(self, views: Sequence[View]) -> list[Tensor]:
        # It would guess where the colors are, and of a picture 1 or 3 pixels high be wrong.
        options = {"input_data_format": "channels_last", "return_legacy_image_output": False}
        processed = self._processor("image")([view.image for view in views], **options)
        return [torch.as_tensor(image) for image in processed["pixel_values"]]

    def _frames(self, views: Sequence[View]) -> list[Tensor]:
        """Each as a clip of its own: clips may differ in length, and a frame knows nothing of the others."""
        clips = [np.array(view.image)[None] for view in views]
        processed = [
            self._processor("video")(some, do_sample_frames=False, input_data_format="channels_last")
            for some in in_calls(clips)
        ]
        return [torch.as_tensor(clip)[0] for some in processed for clip in some["pixel_values_videos"]]

    def processed(self, inputs: Mapping[str, Tensor]) -> tuple[list[Processed], list[Pixels]]:
        media: list[Processed] = []
        pixels: list[Pixels] = []
        # Its image processor and its `forward` have different names for pictures.
        pictures = inputs.get("pixel_values", inputs.get("pixel_values_images"))
        if pictures is not None:
            pixels.append(self._processed(pictures, 0))
            media += self._stills(pixels[0])
        if "pixel_values_videos" in inputs:
            clips = inputs["pixel_values_videos"]
            frames = self._processed(clips.flatten(0, 1), len(media), "video")
            tokens = clips.shape[1] * (frames.grid[0] * frames.grid[1] + self.prefix("video"))
            pixels.append(frames)
            for place in range(len(media), len(media) + len(clips)):
                views = [View(UNSEEN, UNSEEN.size, place, frame=frame) for frame in range(clips.shape[1])]
                media.append(Processed("video", tuple(views), tokens))
        return media, pixels

    def arrange(self, parts: Sequence[KeptPart]) -> list[Visual]:
        if parts[0].view.frame is None:
            return super().arrange(parts)
        return [Visual("video", torch.cat([part.projected for part in parts]))]

    def visual_inputs(self, visuals: Sequence[Visual]) -> dict[str, Any]:
        encoded: dict[str, BaseModelOutputWithPooling] = {}
        for modality in self.modalities:
            features = [visual.features for visual in visuals if visual.modality == modality]
            if features:  # one tensor: Video-LLaVA takes no sequence
                encoded[modality] = BaseModelOutputWithPooling(pooler_output=torch.cat(features)[None])
        return {"mm_encoder_outputs": encoded}

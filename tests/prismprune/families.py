"""The families as tests see them: tiny checkpoints, media, and what a user of transformers would write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.video_utils import VideoMetadata

from prismprune.media import Clip, Picture
from tests.present import present
from tests.prismprune.reference import prism, split
from tests.prismprune.tiny import (
    clip,
    picture,
    save_tiny_llava,
    save_tiny_llava_next,
    save_tiny_qwen,
    save_tiny_video_llava,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from prismprune.results import PartMap
    from tests.prismprune.reference import Array

    Media = Sequence[Picture | Clip]

CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "llava": save_tiny_llava,
    "llava_next-llama": save_tiny_llava_next,
    "llava_next-mistral": lambda path: save_tiny_llava_next(path, text="mistral"),
    "video_llava": save_tiny_video_llava,
    "qwen2_5_vl": save_tiny_qwen,
}
BY_CLS = tuple(name for name in CHECKPOINTS if name != "qwen2_5_vl")
"""Those whose tower has a CLS token that scores are read from."""
SIZES = {"wide": (90, 40), "tall": (30, 70), "square": (56, 56), "panorama": (300, 50), "large": (220, 190)}


def still(size: str, seed: int = 0) -> Picture:
    return Picture(picture(seed, SIZES[size]))


PICTURES: dict[str, Media] = {
    **{size: [still(size, seed)] for seed, size in enumerate(SIZES)},
    "two": [still("wide", 7), still("tall", 8)],
    "three": [still("large", 9), still("square", 10), still("panorama", 11)],
}
CLIPS: dict[str, Media] = {
    "frame": [clip(1)],
    "short clip": [clip(3, (50, 80))],
    "long clip": [clip(8)],
    "two clips": [clip(3), clip(3, seed=5)],
}
MIXED: dict[str, Media] = {
    "picture and clip": [still("tall", 3), clip(2)],
    "clip and pictures": [clip(4), still("wide", 4), still("large", 5)],
}
MEDIA = {
    name: PICTURES | (CLIPS | MIXED if name in ("video_llava", "qwen2_5_vl") else {}) for name in CHECKPOINTS
}
"""What each checkpoint is asked about."""
CASES = [(name, media) for name, own in MEDIA.items() for media in own]


class Transformers:
    """A model and processor in a user's own hands; `backend` "pil" takes the slow image processor."""

    def __init__(self, checkpoint: Path, backend: str = "torchvision", **options: Any) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(checkpoint, **options).eval()
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.processor.image_processor = AutoImageProcessor.from_pretrained(checkpoint, backend=backend)

    def inputs(self, media: Media, question: str) -> dict[str, Any]:
        """What the processor makes of media and question, with every visual token."""
        images = [item.image for item in media if isinstance(item, Picture)]
        videos = [
            np.stack([np.asarray(frame) for frame in item.frames]) for item in media if isinstance(item, Clip)
        ]
        content = [{"type": "video" if isinstance(item, Clip) else "image"} for item in media]
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        times = {}
        if self.model.config.model_type == "qwen2_5_vl" and videos:  # it has no word for time but positions
            times["video_metadata"] = [
                VideoMetadata(len(frames), fps=2.0, frames_indices=list(range(len(frames))))
                for frames in videos
            ]
        inputs = self.processor(
            text=prompt, images=images or None, videos=videos or None, return_tensors="pt", **times
        )
        if "pixel_values_images" in inputs:  # the name that Video-LLaVA's image processor still gives
            inputs["pixel_values"] = inputs.pop("pixel_values_images")
        return dict(inputs)

    def answer(self, inputs: dict[str, Any], max_new_tokens: int = 12) -> tuple[int, ...]:
        """Greedy token ids without the end token."""
        output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        ids = output[0, inputs["input_ids"].shape[1] :].tolist()
        return tuple(ids[:-1] if ids[-1] == self.model.generation_config.eos_token_id else ids)

    def views(self, media: Media) -> list[Scored]:
        """Each view's eager CLS attention and features, by transformers' own tower; the model is eager."""
        inputs, model = self.inputs(media, "?"), self.model.model
        pictures = iter(self._pictures(inputs))
        clips = iter(inputs.get("pixel_values_videos", ()))
        views: list[Scored] = []
        for item in media:
            if isinstance(item, Clip):
                views += self._scored(model.video_tower, next(clips))
            else:
                tower = model.image_tower if hasattr(model, "image_tower") else model.vision_tower
                views += self._scored(tower, next(pictures))
        return views

    def _pictures(self, inputs: dict[str, Any]) -> list[Tensor]:
        """The pixels of each picture's views."""
        if "image_sizes" not in inputs:
            return [pixels[None] for pixels in inputs.get("pixel_values", ())]
        config = self.model.config
        counts = [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
            for size in inputs["image_sizes"]
        ]
        return [pixels[:count] for pixels, count in zip(inputs["pixel_values"], counts, strict=True)]

    @torch.inference_mode()
    def _scored(self, tower: Any, pixels: Tensor) -> list[Scored]:
        output = tower(pixels, output_attentions=True, output_hidden_states=True)
        layer = self.model.config.vision_feature_layer
        block = layer - 1 if layer > 0 else layer  # hidden states begin with the embeddings
        return [
            Scored(attention[:, 0, 1:].double().numpy(), state[1:].double().numpy())
            for attention, state in zip(output.attentions[block], output.hidden_states[layer], strict=True)
        ]

    def project(self, features: Array) -> Tensor:
        """Features [K, d] as the language model gets them."""
        with torch.inference_mode():
            return self.model.model.multi_modal_projector(torch.from_numpy(features).float())


@dataclass
class Scored:
    """What a reference says about one view: attention [H, N] and features [N, d], in float64."""

    attention: Array
    features: Array


def kept(
    views: Sequence[Scored], budget: int, seen: Sequence[Sequence[int]] | None = None
) -> list[list[list[int]]]:
    """Salient and diverse raster indices of each view, by the reference; `seen`: each view's candidates."""
    candidates = seen or [range(view.features.shape[0]) for view in views]
    shares = split(budget, [len(own) for own in candidates])
    chosen = []
    for view, own, share in zip(views, candidates, shares, strict=True):
        raster = list(own)
        parts = prism(view.attention[:, raster], view.features[raster], share)
        chosen.append([[raster[place] for place in part] for part in parts])
    return chosen


def parts(token_map: Sequence[PartMap]) -> list[list[list[int]]]:
    """What the library says of each view, as `kept` says it."""
    return [[list(present(part.salient)), list(present(part.diverse))] for part in token_map]

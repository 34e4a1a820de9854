"""The shapes of published checkpoints, for whatever is planned, run or tested at its true size."""

from __future__ import annotations

from typing import Any, TypeVar

from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    VideoLlavaConfig,
)

Config = TypeVar("Config", bound=LlavaConfig | LlavaNextConfig | VideoLlavaConfig)
VICUNA_7B: dict[str, Any] = {"vocab_size": 32064}
"""The rest is what `LlamaConfig` has by default."""
VICUNA_13B: dict[str, Any] = VICUNA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}
QWEN_7B: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
QWEN_TOWER: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "out_hidden_size": 3584,
}


def clip(width: int, layers: int, heads: int, image_size: int) -> CLIPVisionConfig:
    """A CLIP tower for pictures of `image_size` pixels, in patches of 14."""
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=image_size,
        patch_size=14,
    )


def clip_l(image_size: int = 336) -> CLIPVisionConfig:
    """CLIP ViT-L/14's."""
    return clip(1024, 24, 16, image_size)


def llava(
    kind: type[Config], tower: CLIPVisionConfig | Dinov2Config, text: dict[str, Any], **options: Any
) -> Config:
    """The config of one of LLaVA's kin, with a Llama of the shape `text`."""
    return kind(vision_config=tower, text_config=LlamaConfig(**text), **options)

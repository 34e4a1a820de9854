"""Tiny random LLaVA checkpoints of transformers' own classes, written by its own `save_pretrained`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Dinov2Config,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

if TYPE_CHECKING:
    from pathlib import Path

IMAGE_SIZE = 56
PATCH_SIZE = 14
GRID = IMAGE_SIZE // PATCH_SIZE
PATCHES = GRID * GRID
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def save_tiny_llava(
    path: Path,
    *,
    tower: str = "clip",
    strategy: str = "default",
    layer: Any = -2,
    crop: bool = False,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a model of 4 x 4 = 16 patches, 4 tower blocks and 2 language layers, and its processor.

    `crop`: resize the shorter edge and cut out the centre, as LLaVA-1.5 does; else resize to a square.
    """
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=_tower(tower),
            text_config=_text(len(tokenizer)),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_select_strategy=strategy,
            vision_feature_layer=layer,
            image_seq_length=PATCHES,
            **config,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    model.save_pretrained(path)
    _processor(tokenizer, strategy, crop=crop).save_pretrained(path)
    return path


def _tower(name: str) -> CLIPVisionConfig | Dinov2Config:
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "patch_size": PATCH_SIZE,
        "initializer_range": 0.5,  # far from even attention, so that scores differ
    }
    if name == "clip":
        return CLIPVisionConfig(**shape, image_size=IMAGE_SIZE, intermediate_size=64, initializer_factor=5.0)
    # As in the demo: more positions than the pictures have, so they are interpolated.
    return Dinov2Config(**shape, image_size=IMAGE_SIZE + PATCH_SIZE, mlp_ratio=2)


def _text(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,  # answers that vary with what was seen
        max_position_embeddings=1024,
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that most characters of a random answer take several tokens, or are broken."""
    specials = ["<pad>", "<s>", "</s>", "<image>", "<|user|>", "<|system|>", "<|assistant|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate(specials + letters)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=specials[3:],
    )


def _processor(tokenizer: PreTrainedTokenizerFast, strategy: str, *, crop: bool) -> LlavaProcessor:
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE} if crop else square, crop_size=square, do_center_crop=crop
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def picture(seed: int = 0, size: tuple[int, int] = (80, 60)) -> Image.Image:
    """Noise of (width, height)."""
    width, height = size
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)

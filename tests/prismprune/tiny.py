"""Tiny random checkpoints of transformers' own LLaVA classes, written by its own `save_pretrained`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

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
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
    VideoLlavaVideoProcessor,
)

from prismprune.media import Clip

if TYPE_CHECKING:
    from pathlib import Path

IMAGE_SIZE = 56
PATCH_SIZE = 14
GRID = IMAGE_SIZE // PATCH_SIZE
PATCHES = GRID * GRID


def pinpoints(edge: int) -> list[list[int]]:
    """Heights and widths that LLaVA-NeXT resizes pictures to, in crops of `edge` pixels."""
    shapes = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    return [[edge * rows, edge * columns] for rows, columns in shapes]


PINPOINTS = pinpoints(IMAGE_SIZE)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}{{ '<video>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
QWEN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def save_tiny_llava(
    path: Path,
    *,
    tower: str = "clip",
    strategy: Literal["default", "full"] = "default",
    layer: Any = -2,
    crop: bool = False,
    widths: tuple[int, int] = (32, 64),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a model of 4 x 4 = 16 patches, 4 tower blocks and 2 language layers, and its processor.

    `crop`: resize the shorter edge and cut out the centre, as LLaVA-1.5 does; else resize to a square.
    `widths`: of the language model, hidden and intermediate. `dtype`: of the saved weights.
    """
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=_tower(tower),
            text_config=_text(len(tokenizer), widths=widths),
            image_token_index=_id(tokenizer, "<image>"),
            vision_feature_select_strategy=strategy,
            vision_feature_layer=layer,
            image_seq_length=PATCHES,
            **config,
        )
    )
    return _saved(path, model.type(dtype), llava_processor(tokenizer, IMAGE_SIZE, strategy, crop=crop))


def save_tiny_llava_next(path: Path, *, text: str = "llama", seed: int = 0, **config: Any) -> Path:
    """Write a model whose crops have 4 x 4 patches; `text` "llama" or "mistral"."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = {
        "vision_config": _tower("clip"),
        "text_config": _text(len(tokenizer), text),
        "image_token_index": _id(tokenizer, "<image>"),
        "image_grid_pinpoints": PINPOINTS,
        "image_seq_length": PATCHES,
    } | config
    model = LlavaNextForConditionalGeneration(LlavaNextConfig(**config))
    return _saved(path, model, next_processor(tokenizer, IMAGE_SIZE))


def save_tiny_video_llava(path: Path, *, seed: int = 0, **config: Any) -> Path:
    """Write a model of 4 x 4 patches, with a tower for pictures and one for frames."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer("<video>")
    model = VideoLlavaForConditionalGeneration(
        VideoLlavaConfig(
            vision_config=_tower("clip"),
            text_config=_text(len(tokenizer)),
            image_token_index=_id(tokenizer, "<image>"),
            video_token_index=_id(tokenizer, "<video>"),
            image_seq_length=PATCHES,
            **config,
        )
    )
    return _saved(path, model, video_processor(tokenizer, IMAGE_SIZE))


def save_tiny_qwen(path: Path, *, seed: int = 0, **vision: Any) -> Path:
    """Write a model with windows of 2 x 2 units and, among its four blocks, two of full attention."""
    torch.manual_seed(seed)
    marks = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = tiny_tokenizer(*marks)
    start, end, image, video = (_id(tokenizer, mark) for mark in marks)
    text = _text(len(tokenizer)).to_dict() | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    }
    tower = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [0, 2],
        "window_size": 4 * PATCH_SIZE,
        "initializer_range": 0.3,
    }
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            vision_config=tower | vision,
            text_config={key: value for key, value in text.items() if key != "model_type"},
            image_token_id=image,
            video_token_id=video,
            vision_start_token_id=start,
            vision_end_token_id=end,
        )
    )
    return _saved(path, model, qwen_processor(tokenizer))


def _saved(path: Path, model: Any, processor: Any) -> Path:
    end = processor.tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=0)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def _id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    number = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(number, int)  # of a list of tokens it is a list
    return number


def _tower(name: str) -> CLIPVisionConfig | Dinov2Config:
    shape: dict[str, Any] = {
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


def _text(
    vocabulary: int, name: str = "llama", widths: tuple[int, int] = (32, 64)
) -> LlamaConfig | MistralConfig:
    kinds: dict[str, type[LlamaConfig | MistralConfig]] = {"llama": LlamaConfig, "mistral": MistralConfig}
    return kinds[name](
        vocab_size=vocabulary,
        hidden_size=widths[0],
        intermediate_size=widths[1],
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,  # answers that vary with what was seen
        max_position_embeddings=4096,
    )


def tiny_tokenizer(*more: str) -> PreTrainedTokenizerFast:
    """One token a byte, so that most characters of a random answer take several tokens, or are broken.

    `more`: control tokens besides the usual ones.
    """
    specials = ["<pad>", "<s>", "</s>", "<image>", "<|user|>", "<|system|>", "<|assistant|>", *more]
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


def llava_processor(
    tokenizer: PreTrainedTokenizerFast, edge: int, strategy: str = "default", *, crop: bool = True
) -> LlavaProcessor:
    """LLaVA's own, for pictures of `edge` pixels."""
    square = {"height": edge, "width": edge}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": edge} if crop else square, crop_size=square, do_center_crop=crop
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def next_processor(tokenizer: PreTrainedTokenizerFast, edge: int) -> LlavaNextProcessor:
    """LLaVA-NeXT's own, with crops of `edge` pixels."""
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": edge},
            crop_size={"height": edge, "width": edge},
            image_grid_pinpoints=pinpoints(edge),
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def video_processor(tokenizer: PreTrainedTokenizerFast, edge: int) -> VideoLlavaProcessor:
    """Video-LLaVA's own, for pictures and frames of `edge` pixels."""
    sizes: dict[str, Any] = {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}
    return VideoLlavaProcessor(
        image_processor=VideoLlavaImageProcessor(**sizes),
        video_processor=VideoLlavaVideoProcessor(**sizes),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def qwen_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLProcessor:
    """Qwen2.5-VL's own, for pictures of 16 to 60 tokens and frames of 16 to 30."""
    unit = (2 * PATCH_SIZE) ** 2
    pictures = {"shortest_edge": 16 * unit, "longest_edge": 60 * unit}
    frames = {"shortest_edge": 16 * unit, "longest_edge": 30 * unit}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pictures),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=frames, cap_pixels_per_frame=False),
        chat_template=QWEN_CHAT_TEMPLATE,
    )


def clip(frames: int = 3, size: tuple[int, int] = (90, 60), seed: int = 0) -> Clip:
    """Noise decoded at a tenth of its original's width and height, a frame every half second."""
    images = tuple(picture(seed + number, size) for number in range(frames))
    return Clip(images, tuple(0.5 * number for number in range(frames)), (10 * size[0], 10 * size[1]))


def picture(seed: int = 0, size: tuple[int, int] = (80, 60)) -> Image.Image:
    """Noise of (width, height)."""
    width, height = size
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)

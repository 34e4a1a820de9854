"""Models with random weights for the benchmarks, and a processor that needs no vocabulary of theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from prismprune import PrunedVLM
from prismprune.families.llava import LlavaFamily
from prismprune.loading import Loaded

if TYPE_CHECKING:
    from collections.abc import Callable

SIDE, PATCH = 336, 14
IMAGE_TOKEN_ID = 2
LANGUAGE_MODELS: dict[str, dict[str, int]] = {
    "llava-1.5-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
    "llava-1.5-13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40},
}
LAYERS = {"llava-1.5-7b": 32, "llava-1.5-13b": 40}
"""Of the whole models."""


def word_processor() -> LlavaProcessor:
    """A processor of 336 x 336 pictures for a tower with a CLS token, whose tokenizer knows no word."""
    vocabulary = {token: place for place, token in enumerate(["<pad>", "<end>", "<image>", "<unk>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106 (a word)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",  # noqa: S106
        eos_token="<end>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
        additional_special_tokens=["<image>"],
    )
    square = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size=square, crop_size=square, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for part in messages[0]['content'] %}"
        "{{ '<image> ' if part['type'] == 'image' else part['text'] }}{% endfor %}",
    )


def llava(name: str, layers: int, *, nf4: bool) -> PrunedVLM:
    """LLaVA-1.5's geometry, tower and projector whole, the language model with so many of its layers.

    Weights are random, in float32; of the language model's layers in NF4 where asked for. They are made one
    layer after the other, so that no more than one is ever held unquantised.
    """
    tower = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=SIDE,
        patch_size=PATCH,
    )
    shape: dict[str, Any] = {"vocab_size": 32064, "num_hidden_layers": 1, **LANGUAGE_MODELS[name]}
    text = LlamaConfig(**shape)
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=IMAGE_TOKEN_ID)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    finish: Callable[[nn.Module], nn.Module] = quantized if nf4 else nn.Module.eval
    stack, own = model.model.language_model.layers, model.config.text_config
    stack[0] = finish(stack[0])
    for place in range(1, layers):
        stack.append(finish(LlamaDecoderLayer(own, place).eval()))
    own.num_hidden_layers = layers
    model.generation_config = GenerationConfig(pad_token_id=0)
    family = LlavaFamily(model.requires_grad_(requires_grad=False), word_processor())
    return PrunedVLM(Loaded(name, family, frozenset(), None, "nf4" if nf4 else None))


def quantized(layer: nn.Module) -> nn.Module:
    """Its linear layers in NF4 with double quantisation, as the library loads them, computing in float32."""
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, _quantized(child))
    return layer


def _quantized(linear: nn.Linear) -> nn.Module:
    from bitsandbytes import nn as quantizing  # noqa: PLC0415 (an extra)

    kind: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
    layers: Any = quantizing  # which has no types
    shape = linear.in_features, linear.out_features
    made = layers.Linear4bit(*shape, bias=False, compute_dtype=torch.float32, device="meta", **kind)
    made.weight = layers.Params4bit(linear.weight.detach(), requires_grad=False, **kind)
    moved: nn.Module = made.to("cpu")  # which quantises
    return moved
